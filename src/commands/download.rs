//! `st-tool download`: from the hub to a folder, whose path goes to stdout.

use std::process::ExitCode;

use st_hub::{DownloadRequest, Hub, Listing, RepoId, Token};

use crate::cli::DownloadArgs;
use crate::context::Context;
use crate::models::hub_config;
use crate::size::show_size;
use crate::ui::{self, DownloadBars};

pub(crate) fn run(args: &DownloadArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let mut config = hub_config(context);
    config.offline |= args.offline;
    if let Some(token) = &args.token {
        config.token = Token::new(token.as_bytes(), "--token");
    }
    let request = DownloadRequest {
        revision: args.revision.clone(),
        include: args.include.clone(),
        local_dir: args.local_dir.clone(),
        jobs: args.jobs,
        ..DownloadRequest::new(RepoId::parse(&args.model)?)
    };
    let hub = Hub::new(config);
    if args.dry_run {
        ui::print(&table(&hub.list(&request)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let folder = hub.download(&request, &DownloadBars::new(context.ui))?;
    ui::print_path(&folder)?;
    Ok(ExitCode::SUCCESS)
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
