//! `st-tool download`: from the hub to a folder or a GGUF file, whose path goes to stdout.

use std::path::PathBuf;
use std::process::ExitCode;

use st_hub::{DownloadRequest, Hub, HubError, Listing, Token};

use crate::cli::DownloadArgs;
use crate::context::Context;
use crate::get::Wanted;
use crate::repos::hub_config;
use crate::size::show_size;
use crate::ui::{self, DownloadBars};

pub(crate) fn run(args: &DownloadArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let mut config = hub_config(context);
    config.offline |= args.offline;
    if let Some(token) = &args.token {
        config.token = Token::new(token.as_bytes(), "--token");
    }
    let wanted = Wanted::parse(&args.model)?;
    let request = DownloadRequest {
        revision: args.revision.clone(),
        include: args.include.clone(),
        local_dir: args.local_dir.clone(),
        jobs: args.jobs,
        ..DownloadRequest::new(wanted.repo.clone())
    };
    let hub = Hub::new(config);
    let is_whole = wanted.ty.is_none() || !args.include.is_empty();
    if args.dry_run {
        let listing = match hub.list(&request) {
            Err(HubError::NotSmallThinker { .. }) if is_whole => hub.list(&published(&wanted, &request, &hub)?.0)?,
            _ if !is_whole => hub.list(&published(&wanted, &request, &hub)?.0)?,
            listing => listing?,
        };
        ui::print(&table(&listing))?;
        return Ok(ExitCode::SUCCESS);
    }
    let bars = || DownloadBars::new(context.ui);
    let one = || -> anyhow::Result<PathBuf> {
        let (request, first) = published(&wanted, &request, &hub)?;
        Ok(hub.download(&request, &bars())?.join(first))
    };
    let path = match is_whole {
        false => one()?,
        true => match hub.download(&request, &bars()) {
            // No checkpoint: GGUF files, of which one is meant.
            Err(error @ HubError::NotSmallThinker { .. }) if args.include.is_empty() => {
                one().map_err(|other| if other.downcast_ref::<HubError>().is_some() { error.into() } else { other })?
            }
            folder => folder?,
        },
    };
    ui::print_path(&path)?;
    Ok(ExitCode::SUCCESS)
}

/// The request for the one GGUF model that is meant, and its first file.
fn published(wanted: &Wanted, like: &DownloadRequest, hub: &Hub) -> anyhow::Result<(DownloadRequest, String)> {
    let Some(found) = wanted.published(hub, Some(&like.revision))? else {
        return Err(HubError::NotSmallThinker {
            repo: wanted.repo.to_string(),
            found: "it has no config.json and no GGUF file".to_owned(),
        }
        .into());
    };
    let request = DownloadRequest { jobs: like.jobs, ..found.request(like.local_dir.clone()) };
    Ok((request, found.model.files[0].path.clone()))
}

fn table(listing: &Listing) -> String {
    let mut out = format!("{} {} ({})\n", listing.repo, listing.revision, listing.commit);
    for file in &listing.files {
        let there = match file.on_disk {
            0 => String::new(),
            bytes if bytes >= file.size => "  here already".to_owned(),
            bytes => format!("  {} here already", show_size(bytes)),
        };
        out.push_str(&format!("{:>10}  {}{there}\n", show_size(file.size), file.path));
    }
    out.push_str(&format!("{:>10}  in {} files\n", show_size(listing.total_bytes()), listing.files.len()));
    out.push_str(&format!("{:>10}  to fetch, into {}\n", show_size(listing.missing_bytes()), listing.target.display()));
    if let Some(free) = listing.free_bytes {
        out.push_str(&format!("{:>10}  free there\n", show_size(free)));
    }
    out
}
