//! Getting a model that is named: what is here of it, what it would take to have it, and one question.
//!
//! Owns the order: a converted file in this folder or in the store, a GGUF file in the hub's cache, a published GGUF file,
//! and last the checkpoint, converted. Nobody is asked anything over the network before the person has allowed it.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use st_convert::{ConvertOptions, Layout, WeightType};
use st_hub::{DownloadRequest, Hub, HubError, Listing, Published, RepoId, TypeTag};

use crate::arriving;
use crate::context::Context;
use crate::planned::Planned;
use crate::report::Advice;
use crate::repos::{hub, short_name};
use crate::size::show_size;
use crate::store::{Store, best, in_this_folder};
use crate::ui::DownloadBars;
use st_sys::available_threads;

/// The type that a person gets who names none.
const USUAL: &str = "q4_0";

/// A model of the hub, as it was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The repository: of a checkpoint, or of GGUF files.
    pub(crate) repo: RepoId,
    /// The type, where one was named.
    pub(crate) ty: Option<TypeTag>,
}

/// As it may be typed.
impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&short_name(&self.repo))?;
        self.ty.as_ref().map_or(Ok(()), |ty| write!(f, ":{ty}"))
    }
}

/// Published files of one type.
pub(crate) struct Found {
    /// Where they are.
    pub(crate) listing: Listing,
    /// The files.
    pub(crate) model: Published,
}

/// How a model can be had.
enum Offer {
    /// It is published.
    File(Found),
    /// Its checkpoint is, and can be converted.
    Checkpoint(Listing),
}

impl Wanted {
    /// Reads an alias or `owner/name`, perhaps with `:TYPE` behind it.
    ///
    /// # Errors
    /// Where it is no such name.
    pub(crate) fn parse(name: &str) -> Result<Self, HubError> {
        match name.rsplit_once(':') {
            // What has a slash is no type, but the rest of an address.
            Some((repo, ty)) if !ty.contains('/') => {
                Ok(Self { repo: RepoId::parse(repo)?, ty: Some(TypeTag::parse(ty)?) })
            }
            _ => Ok(Self { repo: RepoId::parse(name)?, ty: None }),
        }
    }

    /// The GGUF file of the type that is wanted, as the source of a conversion; fetched where it is not here and may be.
    pub(crate) fn source(&self, context: &Context, may_fetch: bool) -> anyhow::Result<PathBuf> {
        if let Some(path) = self.here(context)? {
            return Ok(path);
        }
        if !may_fetch {
            let message = format!("{self} is not downloaded");
            return Err(Advice::new(
                message,
                format!("st-tool download {self} fetches it; with --dry-run it says how much that is"),
            )
            .into());
        }
        let hub = hub(context);
        match self.published(&hub, None)? {
            Some(found) => found.fetch(&hub, None, context),
            None => {
                Err(Advice::new(format!("{self} is not published"), "st-tool quantize converts a checkpoint").into())
            }
        }
    }

    /// The GGUF file to run: one that is here, or one that is fetched where the person allows that.
    pub(crate) fn file(&self, context: &Context) -> anyhow::Result<PathBuf> {
        if let Some(path) = self.here(context)? {
            context.ui.note(format_args!("note: {self} is {}", path.display()));
            return Ok(path);
        }
        let hub = hub(context);
        let cached = self.ty.is_none() && hub.cached(&self.repo, "main").ok().flatten().is_some();
        if !context.yes && !can_ask() {
            return Err(match cached {
                true => Advice::new(
                    format!("{} is downloaded, but not converted", self.repo),
                    format!("st-tool quantize {self} --q4_0 converts it; --yes here does so, too"),
                ),
                false => Advice::new(
                    format!("{self} is not here{}", self.full_name()),
                    format!(
                        "the same command with --yes fetches it, as does st-tool download {self}; st-tool quantize {} --q4_0 converts \
                         the checkpoint",
                        short_name(&self.repo)
                    ),
                ),
            }
            .into());
        }
        let offer = match cached {
            true => Offer::Checkpoint(hub.list(&DownloadRequest::new(self.repo.clone()))?),
            false => self.offer(&hub)?,
        };
        match offer {
            Offer::File(found) => {
                let free = found.listing.free_bytes;
                let what = format!("{} of {}", found.model.files[0].path, found.listing.repo);
                let missing = found.model.missing_bytes();
                let planned =
                    |hub: &Hub| Planned::of_published(self.to_string(), &found.listing, &found.model, hub.clone());
                let speed = || planned(&hub)?.speed(context);
                self.ask(
                    context,
                    &what,
                    [missing, missing, found.model.bytes()],
                    (&found.listing.target, free),
                    &speed,
                )?;
                found.fetch(&hub, None, context)
            }
            Offer::Checkpoint(listing) => self.convert(listing, &hub, context),
        }
    }

    /// The repository, where it goes by a shorter name.
    fn full_name(&self) -> String {
        self.repo.alias().map_or_else(String::new, |_| format!(" ({})", self.repo))
    }

    /// A file that is here already.
    pub(crate) fn here(&self, context: &Context) -> anyhow::Result<Option<PathBuf>> {
        let ty = self.ty.as_ref();
        let converted = best(in_this_folder(&self.repo), ty);
        if let Some(path) = converted.or_else(|| Store::new(&context.env.store).find(&self.repo, ty)) {
            return Ok(Some(path));
        }
        let hub = hub(context);
        for repo in self.gguf_repos() {
            let Some(held) = hub.held_of(&repo)? else { continue };
            let models = Published::all(&held.listed());
            let chosen = match ty {
                Some(ty) => Published::of_type(&models, ty),
                None => Published::of_type(&models, &usual()).or(models.first()),
            };
            let of = |model: &Published| held.files.iter().find(|file| file.name == model.files[0].path);
            if let Some(file) = chosen.and_then(of) {
                return Ok(Some(file.path.clone()));
            }
        }
        Ok(None)
    }

    /// The published files of the type that is wanted; without one the usual type, or the only one that there is.
    ///
    /// # Errors
    /// Where the hub cannot be asked; where a type is named, or cannot be chosen, and what is there is another.
    pub(crate) fn published(&self, hub: &Hub, revision: Option<&str>) -> anyhow::Result<Option<Found>> {
        let mut there = Vec::new();
        for repo in self.gguf_repos() {
            let mut request = DownloadRequest { include: vec!["*.gguf".into()], ..DownloadRequest::new(repo) };
            request.revision = revision.unwrap_or("main").to_owned();
            let listing = match hub.list(&request) {
                Ok(listing) => listing,
                Err(HubError::NothingMatches { .. }) => continue,
                // Not every model is published as GGUF; one that is known is so by several names.
                Err(HubError::RepoNotFound { .. } | HubError::Unauthorized { .. }) if self.repo.alias().is_some() => {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let models = Published::all(&listing.files);
            let chosen = Published::of_type(&models, self.ty.as_ref().unwrap_or(&usual()));
            let only = models.first().filter(|_| self.ty.is_none() && models.len() == 1);
            if let Some(model) = chosen.or(only).cloned() {
                return Ok(Some(Found { listing, model }));
            }
            there.extend(models.into_iter().map(|model| model.stem));
        }
        let is_known = self.repo.alias().is_some();
        match (&self.ty, there.is_empty()) {
            (None, true) => Ok(None),
            // Its checkpoint gives the usual type.
            (None, false) if is_known => Ok(None),
            (Some(ty), true) => {
                let message = format!("{} has no GGUF file of type {ty}, nor of any other", short_name(&self.repo));
                Err(Advice::new(message, format!("st-tool quantize {} converts a checkpoint", short_name(&self.repo)))
                    .into())
            }
            (ty, false) => {
                let missing = ty.as_ref().map_or_else(|| usual().to_string(), TypeTag::to_string);
                let name = short_name(&self.repo);
                let message = format!("{name} has no GGUF file of type {missing}; there are {}", there.join(", "));
                Err(Advice::new(message, format!("name one by the end of its name, as {name}:Q8_0")).into())
            }
        }
    }

    fn offer(&self, hub: &Hub) -> anyhow::Result<Offer> {
        if let Some(found) = self.published(hub, None)? {
            return Ok(Offer::File(found));
        }
        Ok(Offer::Checkpoint(hub.list(&DownloadRequest::new(self.repo.clone()))?))
    }

    /// The repositories that may have it as GGUF.
    pub(crate) fn gguf_repos(&self) -> Vec<RepoId> {
        let known = self.repo.alias().map_or(&[][..], |alias| alias.gguf);
        known.iter().filter_map(|name| RepoId::parse(name).ok()).chain([self.repo.clone()]).collect()
    }

    /// Fetches the checkpoint and converts it into the store.
    fn convert(&self, listing: Listing, hub: &Hub, context: &Context) -> anyhow::Result<PathBuf> {
        let shards = || listing.files.iter().filter(|file| file.path.ends_with(".safetensors")).map(|file| file.size);
        // 16 bits become 4.5 of them.
        let (output, shard) = (shards().sum::<u64>() / 64 * 18, shards().max().unwrap_or(0));
        let what = format!("the checkpoint {}, converted to {USUAL}", listing.repo);
        let store = Store::new(&context.env.store);
        let target = store.place(&self.repo, USUAL)?;
        let folder = target.parent().unwrap_or(Path::new("."));
        let free = st_sys::free_space(folder).ok().flatten();
        let speed = || {
            let planned = Planned::of_checkpoint(self.to_string(), &listing, hub, &context.env.store)?;
            planned.speed(context)
        };
        let asked = self.ask(context, &what, [listing.missing_bytes(), output + shard, output], (folder, free), &speed);
        if asked.is_err() {
            store.tidy(&self.repo);
        }
        asked?;
        let usual = ConvertOptions::new(WeightType::Q4_0, Layout::Gguf);
        let options = ConvertOptions { threads: available_threads(), ..usual };
        arriving::convert(&self.repo, &options, &target, false, false, None, context)?;
        Ok(target)
    }

    /// Says what it takes to have the model, and asks whether that is wanted, unless `--yes` says so.
    fn ask(
        &self,
        context: &Context,
        what: &str,
        [fetched, disk, memory]: [u64; 3],
        (folder, free): (&Path, Option<u64>),
        speed: &dyn Fn() -> anyhow::Result<Option<String>>,
    ) -> anyhow::Result<()> {
        let free = free.map_or_else(String::new, |free| format!(" of {} free", show_size(free)));
        let (fetched, disk) = (show_size(fetched), show_size(disk));
        // Who has agreed already need not wait for a measurement.
        let speed = if context.yes { None } else { speed().unwrap_or_default() };
        let speed = speed.map_or_else(String::new, |speed| format!("\n  speed     {speed}"));
        let lines = format!(
            "{self} is not here; there is {what}\n  to fetch  {fetched}\n  disk      {disk}{free} in {}\n  memory    {} and \
             some for the context; --memory makes it less{speed}",
            folder.display(),
            show_size(memory),
        );
        if context.yes {
            context.ui.note(lines);
            return Ok(());
        }
        context.ui.say(lines);
        match confirmed("Fetch it? [Y/n] ", true, context)? {
            true => Ok(()),
            false => {
                Err(Advice::new(format!("{self} was not fetched"), "a .gguf file that is here can be named as MODEL")
                    .into())
            }
        }
    }
}

impl Found {
    /// Fetches the files; the one to open. Plain files in `local_dir`, where one is named.
    pub(crate) fn fetch(&self, hub: &Hub, local_dir: Option<PathBuf>, context: &Context) -> anyhow::Result<PathBuf> {
        let request = self.request(local_dir);
        // The bars begin with the number of bytes.
        let folder = hub.download(&request, &DownloadBars::new(context.ui))?;
        Ok(folder.join(&self.model.files[0].path))
    }

    /// What to ask for.
    pub(crate) fn request(&self, local_dir: Option<PathBuf>) -> DownloadRequest {
        DownloadRequest {
            revision: self.listing.revision.clone(),
            include: self.model.files.iter().map(|file| st_hub::literal(&file.path)).collect(),
            local_dir,
            ..DownloadRequest::new(self.listing.repo.clone())
        }
    }
}

fn usual() -> TypeTag {
    TypeTag::parse(USUAL).expect("a type")
}

/// Whether there is a person who reads a question and types an answer.
pub(crate) fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks a question; an empty answer means `otherwise`.
pub(crate) fn confirmed(question: &str, otherwise: bool, context: &Context) -> anyhow::Result<bool> {
    let _ = write!(io::stderr().lock(), "{question}");
    let mut answer = String::new();
    let read = context.interrupt.while_reading(|| io::stdin().lock().read_line(&mut answer))?;
    Ok(match read.context("cannot read from the terminal")? {
        0 => false,
        _ => match answer.trim().to_ascii_lowercase().as_str() {
            "" => otherwise,
            "y" | "yes" => true,
            _ => false,
        },
    })
}
