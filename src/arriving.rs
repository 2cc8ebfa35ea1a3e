//! A checkpoint of the hub to a GGUF file: converted while it is fetched, shard by shard, so that the disk holds the output and
//! one shard.
//!
//! Owns the order of what is fetched: first what describes the model and the header of every shard, then a shard at a time. What
//! was done stays for the next run, whatever ends this one.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use st_convert::arriving::{self, Arriving};
use st_convert::{ConvertError, ConvertOptions, Converted, Input};
use st_gguf::ModelShape;
use st_hub::{DownloadRequest, Hub, ListedFile, Listing, RepoId, literal};

use crate::context::Context;
use crate::report::Advice;
use crate::repos::hub;
use crate::size::show_size;
use crate::ui::{ConvertBar, DownloadBars};

/// Bytes of embedding and head that are looked at before anything is fetched: two that begin alike are the same, or damaged.
const LOOK: u64 = 64 << 10;

/// What is added to a model, once its shape is known.
pub(crate) struct Addition<'a> {
    /// What decides its bytes.
    pub mark: String,
    /// The options with it.
    pub add: &'a dyn Fn(&ModelShape) -> anyhow::Result<ConvertOptions>,
}

/// One conversion.
struct Job<'a> {
    hub: Hub,
    /// The listing of the commit that is converted.
    listing: Listing,
    folder: std::path::PathBuf,
    options: &'a ConvertOptions,
    context: &'a Context,
}

/// Converts the checkpoint of `repo` into `output`, with what is added to it: while it is fetched, unless it is here, or is to be kept whole
/// (`keep`).
pub(crate) fn convert(
    repo: &RepoId,
    options: &ConvertOptions,
    output: &Path,
    overwrite: bool,
    keep: bool,
    addition: Option<&Addition<'_>>,
    context: &Context,
) -> anyhow::Result<Converted> {
    let hub = hub(context);
    let request = DownloadRequest::new(repo.clone());
    let mut whole = hub.cached(repo, &request.revision)?;
    if whole.is_none()
        && !keep
        && let Some(converted) = while_it_arrives(repo, options, output, overwrite, addition, context)?
    {
        return Ok(converted);
    }
    if whole.is_none() {
        // The bars begin with the number of bytes.
        whole = Some(hub.download(&request, &DownloadBars::new(context.ui))?);
    }
    let input = Input::open(&whole.unwrap_or_default())?;
    let added = addition.map(|addition| (addition.add)(input.shape())).transpose()?;
    let options = added.as_ref().unwrap_or(options);
    let bar = ConvertBar::new(context.ui, "converting");
    Ok(st_convert::convert(&input, options, output, overwrite, &bar, context.interrupt.cancel())?)
}

/// `None` where it cannot be known to give the right bytes before all is here; then nothing was written.
fn while_it_arrives(
    repo: &RepoId,
    options: &ConvertOptions,
    output: &Path,
    overwrite: bool,
    addition: Option<&Addition<'_>>,
    context: &Context,
) -> anyhow::Result<Option<Converted>> {
    let hub = hub(context);
    let listing = hub.list(&DownloadRequest::new(repo.clone()))?;
    let folder = st_sys::beside(output, ".", ".shards");
    let job = Job { hub, listing, folder, options, context };
    let mark = addition.map_or("", |addition| &addition.mark);
    let what = format!("{} {} {mark}", job.listing.repo, job.listing.commit);
    let known = arriving::begin(&job.folder, &what, options)?;
    job.fetch_descriptions()?;
    let found = known.map_or_else(|| job.head_is_embedding(), |known| Ok(Some(known)))?;
    let Some(head_is_embedding) = found else {
        let _ = std::fs::remove_dir_all(&job.folder);
        return Ok(None);
    };
    let added = match addition {
        Some(addition) => Some((addition.add)(&job.or_discard(arriving::shape(&job.folder))?)?),
        None => None,
    };
    let options = added.as_ref().unwrap_or(options);
    let opened = Arriving::open(&job.folder, options, head_is_embedding, output, overwrite);
    let mut arriving = job.or_discard(opened)?;
    job.announce(&arriving)?;
    while let Some(name) = arriving.next().map(str::to_owned) {
        context.interrupt.check()?;
        job.fetch(&name)?;
        let bar = ConvertBar::new(context.ui, "converting");
        if let Err(error) = arriving.take(&name, &bar, context.interrupt.cancel()) {
            // Weights that cannot be converted cannot be tomorrow.
            if !is_passing(&error) {
                arriving.discard();
            }
            return Err(error.into());
        }
    }
    Ok(Some(arriving.finish()?))
}

/// Whether the same conversion may get further another time.
fn is_passing(error: &ConvertError) -> bool {
    matches!(error, ConvertError::Cancelled | ConvertError::Io { .. } | ConvertError::Gguf(_))
}

impl Job<'_> {
    /// Weights at the top of the repository.
    fn shards(&self) -> impl Iterator<Item = &ListedFile> {
        self.listing.files.iter().filter(|file| file.path.ends_with(".safetensors"))
    }

    fn request(&self, include: Vec<String>) -> DownloadRequest {
        DownloadRequest {
            revision: self.listing.commit.clone(),
            include,
            ..DownloadRequest::new(self.listing.repo.clone())
        }
    }

    /// Configuration, tokenizer, index, and the header of every shard.
    fn fetch_descriptions(&self) -> anyhow::Result<()> {
        let others = self.listing.files.iter().filter(|file| !file.path.ends_with(".safetensors"));
        let request = DownloadRequest {
            local_dir: Some(self.folder.clone()),
            ..self.request(others.map(|file| literal(&file.path)).collect())
        };
        self.hub.download(&request, &())?;
        for shard in self.shards() {
            if arriving::is_placed(&self.folder, &shard.path) {
                continue;
            }
            let part = |range| self.hub.read_part(&request, &shard.path, range);
            let len = part(0..8.min(shard.size))?;
            let len = len.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
            let end = len.saturating_add(8);
            ensure!(
                len <= arriving::MAX_SHARD_HEADER && end <= shard.size,
                "{} of {} is no safetensors file: its header would have {len} bytes",
                shard.path,
                self.listing.repo
            );
            arriving::place_header(&self.folder, &shard.path, &part(0..end)?, shard.size)?;
        }
        Ok(())
    }

    /// Whether the LM head is the embedding once more; `None` where only all of both can tell, and it matters.
    fn head_is_embedding(&self) -> anyhow::Result<Option<bool>> {
        let keep = self.options.keep_head;
        let Some(places) = self.or_discard(arriving::head_and_embedding(&self.folder))? else { return Ok(Some(false)) };
        let request = self.request(Vec::new());
        let beginning = |(name, range): &arriving::InShard| {
            self.hub.read_part(&request, name, range.start..range.end.min(range.start + LOOK))
        };
        let [embedding, head] = &places;
        if beginning(embedding)? != beginning(head)? {
            return Ok(Some(false));
        }
        let left_out = arriving::head_is_left_out(&self.folder, keep)?;
        Ok(left_out.then_some(true))
    }

    /// Says what is to come, and refuses it where the disk has no room.
    fn announce(&self, arriving: &Arriving) -> anyhow::Result<()> {
        let (shards, done) = arriving.count();
        let missing: u64 = self.shards().map(|file| file.size).sum();
        let largest = self.shards().map(|file| file.size).max().unwrap_or(0);
        let needed = arriving.missing_space() + largest;
        let free = st_sys::free_space(&self.folder).ok().flatten();
        if let Some(free) = free.filter(|&free| free < needed) {
            let message = format!(
                "{} are needed beside {}, for the output and one shard, and {} are free",
                show_size(needed),
                self.folder.display(),
                show_size(free)
            );
            return Err(Advice::new(message, "free some space, or name a file on a larger disk with -o").into());
        }
        let goes_on =
            if done > 0 { format!(", {done} of {shards} shards are in the output already") } else { String::new() };
        self.context.ui.note(format_args!(
            "{}: {shards} shards of {} are converted while they are fetched; the disk needs {}{goes_on}",
            self.listing.repo,
            show_size(missing),
            show_size(needed)
        ));
        Ok(())
    }

    /// Fetches one shard and proves it.
    fn fetch(&self, name: &str) -> anyhow::Result<()> {
        if !self.shards().any(|file| file.path == name) {
            bail!("{} has no {name}", self.listing.repo);
        }
        let request =
            DownloadRequest { local_dir: Some(arriving::fetched(&self.folder)), ..self.request(vec![literal(name)]) };
        let folder = self.hub.download(&request, &DownloadBars::new(self.context.ui))?;
        ensure!(folder.join(name).is_file(), "{name} was fetched and is not there");
        Ok(())
    }

    /// Removes what was fetched of a checkpoint that cannot be converted.
    fn or_discard<T>(&self, result: Result<T, ConvertError>) -> anyhow::Result<T> {
        if result.as_ref().is_err_and(|error| !is_passing(error)) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
        result.with_context(|| format!("cannot convert {}", self.listing.repo))
    }
}
