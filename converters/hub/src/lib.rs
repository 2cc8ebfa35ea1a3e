//! From a repository and a revision on the Hugging Face hub to a verified folder on disk.
//!
//! Owns the hub's HTTP interface and the cache on disk, which is the one of the Hugging Face tools: what either
//! fetched, the other finds. Names, paths and the repository's description come from `hf-hub`; transfer, resuming,
//! verification, offline use and locking are here. Nothing here reads the environment, prints, or knows what is
//! inside a weight file; every setting is in [`HubConfig`].
//!
//! ```no_run
//! use st_hub::{DownloadRequest, Hub, HubConfig, HubError, RepoId};
//!
//! fn main() -> Result<(), HubError> {
//!     let hub = Hub::new(HubConfig::new("/home/me/.cache/huggingface/hub"));
//!     let request = DownloadRequest::new(RepoId::parse("4b")?);
//!     let listing = hub.list(&request)?;
//!     println!("{} files, {} bytes to fetch", listing.files.len(), listing.missing_bytes());
//!     let folder = hub.download(&request, &())?;
//!     // From here on it is there without a network, too, and the cache knows what each weight file should contain.
//!     assert_eq!(hub.cached(&request.repo, "main")?, Some(folder.clone()));
//!     for file in listing.files.iter().filter(|file| file.path.ends_with(".safetensors")) {
//!         println!("{} {:?}", file.path, st_hub::expected_sha256(&folder.join(&file.path)));
//!     }
//!     Ok(())
//! }
//! ```

mod address;
mod api;
mod cache;
mod error;
mod expected;
mod files;
mod hasher;
mod held;
mod http;
mod lock;
mod names;
mod part;
mod progress;
mod proxy;
mod published;
mod request;
mod snapshot;
mod token;
mod transfer;
mod trees;
mod work;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

pub use address::without_secrets;
pub use error::{Credentials, HubError};
pub use expected::expected_sha256;
pub use held::{HeldFile, HeldRepo};
pub use names::{ALIASES, Alias, DEFAULT_INCLUDE, RepoId, closest_known, literal};
pub use progress::DownloadProgress;
pub use proxy::Proxies;
pub use published::{Published, TypeTag};
pub use request::{DEFAULT_ENDPOINT, DownloadRequest, HubConfig, ListedFile, Listing, RetryPolicy};
pub use token::Token;

use api::{Api, Entry, select};
use cache::{CachedRepo, Place, State};
use files::free_space;
use http::Client;
use names::{Include, check_revision, is_commit};
use work::Work;

/// A download, worked out and not begun.
struct Prepared {
    place: Place,
    /// The name that the hub is asked by.
    asked: RepoId,
    /// The names that the cache is to know the repository by.
    names: [RepoId; 2],
    /// The whole listing of the commit.
    tree: BTreeMap<String, Entry>,
    /// The wanted files, in the order of [`Listing::files`].
    entries: Vec<Entry>,
    listing: Listing,
    /// Bytes the disk has to have room for.
    needed_space: u64,
}

impl Prepared {
    /// What is noted for later may fail where every file is in its place: a shared cache may be read-only.
    fn unless_settled(&self, noted: Result<(), HubError>) -> Result<(), HubError> {
        match noted {
            Err(error) if self.entries.iter().all(|entry| self.place.state(entry) == State::Present) => {
                tracing::debug!(%error, "nothing is noted");
                Ok(())
            }
            other => other,
        }
    }
}

/// What a request turned out to mean.
struct Located {
    place: Place,
    /// The whole listing of the commit.
    tree: BTreeMap<String, Entry>,
    /// The name that the hub is asked by.
    asked: RepoId,
    /// The name that the hub has for it.
    name: RepoId,
}

/// The way to the hub and to the cache.
#[derive(Debug, Clone)]
pub struct Hub {
    config: HubConfig,
}

impl Hub {
    /// Nothing is connected or created until it is needed.
    pub fn new(config: HubConfig) -> Hub {
        Hub { config }
    }

    /// What [`Hub::download`] would do: files, sizes, what is there already, free space. Writes nothing.
    ///
    /// # Errors
    /// Any [`HubError`] but those of a transfer.
    pub fn list(&self, request: &DownloadRequest) -> Result<Listing, HubError> {
        let client = Client::new(&self.config)?;
        client.watched(|| Ok(self.prepare(&client, request, &())?.listing))
    }

    /// Fetches what is missing and returns the folder with the files.
    ///
    /// Every file is verified (size, and the hash that the hub states) before it gets its final name; an
    /// interrupted download is resumed by calling this again. Several processes may do so at once.
    ///
    /// # Errors
    /// See [`HubError`].
    pub fn download(&self, request: &DownloadRequest, progress: &dyn DownloadProgress) -> Result<PathBuf, HubError> {
        let client = Client::new(&self.config)?;
        client.watched(|| {
            if let Some(folder) = self.unlisted_snapshot(request)? {
                return Ok(folder);
            }
            let prepared = self.prepare(&client, request, progress)?;
            self.run(&client, request, &prepared, progress)
        })
    }

    /// Some bytes of a file, without storing them: headers are read so. Unlike a whole file, they are not proven.
    ///
    /// # Errors
    /// Any [`HubError`] but those of the disk.
    pub fn read_part(&self, request: &DownloadRequest, file: &str, range: Range<u64>) -> Result<Vec<u8>, HubError> {
        let client = Client::new(&self.config)?;
        client.watched(|| {
            let api = Api { client: &client, repo: &request.repo, notify: &|_, _| () };
            api.part(&request.revision, file, &range)
        })
    }

    /// The snapshot of a revision that is whole in the cache, without asking anybody; `None` where there is none.
    ///
    /// # Errors
    /// [`HubError::NotSmallThinker`] where the snapshot holds another kind of model.
    pub fn cached(&self, repo: &RepoId, revision: &str) -> Result<Option<PathBuf>, HubError> {
        check_revision(revision)?;
        let Some(cache) = CachedRepo::find(&self.config.cache_dir, &repo.names(), revision) else { return Ok(None) };
        let Some(commit) = cache.cached_commit(revision) else { return Ok(None) };
        let folder = cache.snapshot(&commit);
        let include = Include::new(&[])?;
        let whole = match trees::read(cache.folder(), &commit) {
            Some(tree) => {
                let place = Place::new(cache, commit, None);
                select(&tree, |path| include.matches(path))?.iter().all(|e| place.state(e) == State::Present)
            }
            None => snapshot::looks_whole(&folder),
        };
        if !whole {
            return Ok(None);
        }
        snapshot::check_architecture_file(repo, &folder)?;
        Ok(Some(folder))
    }

    /// Offline, a snapshot that came with no listing (older Hugging Face tools keep none) is taken for what it looks.
    fn unlisted_snapshot(&self, request: &DownloadRequest) -> Result<Option<PathBuf>, HubError> {
        if !self.config.offline || request.local_dir.is_some() || !request.include.is_empty() {
            return Ok(None);
        }
        self.cached(&request.repo, &request.revision)
    }

    fn prepare(
        &self,
        client: &Client<'_>,
        request: &DownloadRequest,
        progress: &dyn DownloadProgress,
    ) -> Result<Prepared, HubError> {
        let DownloadRequest { repo, revision, .. } = request;
        check_revision(revision)?;
        let include = Include::new(&request.include)?;
        let Located { place, tree, asked, name } = self.locate(client, request, progress)?;
        let entries = select(&tree, |path| include.matches(path))?;
        if include.is_default() && !tree.contains_key(snapshot::CONFIG) {
            let found = "it has no config.json".to_owned();
            return Err(HubError::NotSmallThinker { repo: repo.to_string(), found });
        }
        if entries.is_empty() {
            return Err(HubError::NothingMatches { repo: repo.to_string(), patterns: include.describe() });
        }
        let (files, needed_space) = survey(&place, &entries);
        let listing = Listing {
            repo: name.clone(),
            revision: revision.clone(),
            commit: place.commit.clone(),
            files,
            target: place.root(),
            free_bytes: free_space(&place.storage()),
        };
        Ok(Prepared { place, asked, names: [repo.clone(), name], tree, entries, listing, needed_space })
    }

    /// Finds out which commit is meant, where it is or will be, and what it consists of.
    fn locate(
        &self,
        client: &Client<'_>,
        request: &DownloadRequest,
        progress: &dyn DownloadProgress,
    ) -> Result<Located, HubError> {
        let DownloadRequest { repo, revision, local_dir, .. } = request;
        let (cache_dir, is_offline) = (&self.config.cache_dir, self.config.offline);
        let mut names = repo.names();
        let known_tree = |place: &Place| {
            trees::read(&place.trees(), &place.commit).or_else(|| trees::read(place.cache.folder(), &place.commit))
        };
        // A commit with its listing stays what it is; anything else the hub is asked about.
        if is_offline || is_commit(revision) {
            let cache =
                CachedRepo::find(cache_dir, &names, revision).unwrap_or_else(|| CachedRepo::new(cache_dir, repo));
            let place = cache.cached_commit(revision).map(|commit| Place::new(cache, commit, local_dir.clone()));
            let tree = place.as_ref().and_then(known_tree);
            match (place, tree) {
                (Some(place), Some(tree)) => {
                    return Ok(Located { place, tree, asked: repo.clone(), name: repo.clone() });
                }
                (None, _) if is_offline => return Err(offline(request, "nothing is known of it")),
                _ if is_offline => return Err(offline(request, "its list of files is missing")),
                _ => {}
            }
        }
        let notify = |wait: Duration, cause: &HubError| progress.retrying(None, wait, cause);
        let (asked, info) = ask_by_either(repo, |repo| Api { client, repo, notify: &notify }.info(revision))?;
        if !names.contains(&info.name) {
            names.push(info.name.clone());
        }
        let cache =
            CachedRepo::find(cache_dir, &names, revision).unwrap_or_else(|| CachedRepo::new(cache_dir, &info.name));
        let commit = if is_commit(revision) { revision.clone() } else { info.commit };
        let place = Place::new(cache, commit, local_dir.clone());
        let tree = match known_tree(&place) {
            Some(tree) => tree,
            None => Api { client, repo: &asked, notify: &notify }.tree(&place.commit)?,
        };
        Ok(Located { place, tree, asked, name: info.name })
    }

    fn run(
        &self,
        client: &Client<'_>,
        request: &DownloadRequest,
        prepared: &Prepared,
        progress: &dyn DownloadProgress,
    ) -> Result<PathBuf, HubError> {
        let Prepared { place, asked, names, tree, entries, listing, needed_space } = prepared;
        progress.listed(listing);
        if self.config.offline && listing.missing_bytes() > 0 {
            let missing = listing.files.iter().filter(|file| file.on_disk < file.size).count();
            return Err(offline(request, &format!("missing files: {missing} ({} bytes)", listing.missing_bytes())));
        }
        if let Some(free) = listing.free_bytes.filter(|free| *free < *needed_space) {
            return Err(HubError::NoSpace { path: place.storage(), needed: *needed_space, free });
        }
        let work = Work { client, repo: asked, jobs: request.jobs, place, entries, progress };
        // The few bytes that tell whether the many are wanted come first.
        let config = entries.iter().position(|entry| entry.path == snapshot::CONFIG);
        match config {
            Some(index) => {
                prepared.unless_settled(place.begin(tree, names))?;
                work.fetch(index)?;
                snapshot::check_architecture_file(&request.repo, &place.root())?;
            }
            None => {
                if tree.contains_key(snapshot::CONFIG) && !self.config.offline {
                    let notify = |wait: Duration, cause: &HubError| progress.retrying(None, wait, cause);
                    let api = Api { client, repo: asked, notify: &notify };
                    let text = api.small_file(&place.commit, snapshot::CONFIG, snapshot::MAX_CONFIG)?;
                    snapshot::check_architecture(&request.repo, &text)?;
                }
                prepared.unless_settled(place.begin(tree, names))?;
            }
        }
        let mut rest: Vec<usize> = (0..entries.len()).filter(|index| Some(*index) != config).collect();
        // The largest first: it must not be the one that is left over at the end.
        rest.sort_by_key(|index| std::cmp::Reverse(entries[*index].size));
        work.fetch_all(&rest)?;
        prepared.unless_settled(place.conclude(&request.revision))?;
        Ok(place.root())
    }
}

/// What the hub answers about a repository or, where it knows none of that name, about the same model's other one.
fn ask_by_either<T>(repo: &RepoId, ask: impl Fn(&RepoId) -> Result<T, HubError>) -> Result<(RepoId, T), HubError> {
    match (ask(repo), repo.other_name()) {
        (Err(unknown @ HubError::RepoNotFound { .. }), Some(other)) => match ask(&other) {
            Ok(answer) => Ok((other, answer)),
            Err(HubError::RepoNotFound { .. }) => Err(unknown),
            Err(error) => Err(error),
        },
        (answer, _) => answer.map(|answer| (repo.clone(), answer)),
    }
}

/// What is on disk of each file, and the bytes the disk still has to have room for.
fn survey(place: &Place, entries: &[Entry]) -> (Vec<ListedFile>, u64) {
    let mut needed = 0u64;
    let mut counted = HashSet::new();
    let files = entries.iter().map(|entry| {
        let (on_disk, space) = match place.state(entry) {
            State::Present | State::Local { copy: false } => (entry.size, 0),
            State::Local { copy: true } => (entry.size, entry.size),
            State::Partial(arrived) => (arrived, entry.size - arrived),
        };
        // Two names of one content share it.
        if counted.insert(place.slot(entry).content) {
            needed = needed.saturating_add(space);
        }
        ListedFile { path: entry.path.clone(), size: entry.size, on_disk }
    });
    (files.collect(), needed)
}

fn offline(request: &DownloadRequest, what: &str) -> HubError {
    HubError::Offline { repo: request.repo.to_string(), revision: request.revision.clone(), what: what.to_owned() }
}
