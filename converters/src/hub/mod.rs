//! From a repository and a revision on the Hugging Face hub to a verified folder on disk.
//!
//! Owns the hub's HTTP interface and the cache on disk, which is the one of the Hugging Face tools: what either
//! fetched, the other finds. Names, paths and the repository's description come from `hf-hub`; transfer, resuming,
//! verification, offline use and locking are here. Nothing here reads the environment, prints, or knows what is
//! inside a weight file; every setting is in [`HubConfig`].
//!
//! ```no_run
//! use st_convert::hub::{DownloadRequest, Hub, HubConfig, NoProgress, RepoId};
//!
//! # fn main() -> Result<(), st_convert::hub::HubError> {
//! let hub = Hub::new(HubConfig::new("/home/me/.cache/huggingface/hub"));
//! let request = DownloadRequest::new(RepoId::parse("4b")?);
//! println!("{} bytes to fetch", hub.list(&request)?.missing_bytes());
//! let snapshot = hub.download(&request, &NoProgress)?;
//! # Ok(())
//! # }
//! ```

mod api;
mod cache;
mod error;
mod http;
mod lock;
mod names;
mod progress;
mod snapshot;
mod transfer;
mod trees;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

pub use error::HubError;
pub use names::{ALIASES, DEFAULT_INCLUDE, RepoId};
pub use progress::{DownloadProgress, NoProgress};
pub use ureq::Proxy;

use api::{Api, Entry, select};
use cache::{CachedRepo, Place, State, free_space};
use http::Client;
use lock::FileLock;
use names::{Include, check_revision, is_commit};
use transfer::Transfer;

use crate::Cancel;

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Everything that is the same for all downloads of a program.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// Address of the hub, without a path.
    pub endpoint: String,
    /// The folder that holds `models--owner--name` folders.
    pub cache_dir: PathBuf,
    /// Sent to the endpoint, and to no other host.
    pub token: Option<String>,
    /// Answer from the disk alone.
    pub offline: bool,
    /// Proxy for all connections.
    pub proxy: Option<Proxy>,
    /// When and how often to try again.
    pub retry: RetryPolicy,
    /// The longest a connection may stay silent.
    pub stall_timeout: Duration,
    /// The longest that connecting may take.
    pub connect_timeout: Duration,
    /// Asks the work to end soon; what has arrived stays.
    pub cancel: Cancel,
}

impl HubConfig {
    /// The public hub, nobody logged in, and the given cache folder.
    pub fn new(cache_dir: impl Into<PathBuf>) -> HubConfig {
        HubConfig {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            cache_dir: cache_dir.into(),
            token: None,
            offline: false,
            proxy: None,
            retry: RetryPolicy::default(),
            stall_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            cancel: Cancel::new(),
        }
    }
}

/// When and how often a transient failure (a cut, a stall, 408, 429, 5xx) is tried again.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Attempts after the first, counted anew whenever bytes arrive.
    pub retries: u32,
    /// Wait before the first of them; doubled each time.
    pub first_wait: Duration,
    /// Where the doubling ends.
    pub longest_backoff: Duration,
    /// The longest wait a server may ask for; a longer one is an error at once.
    pub longest_wait: Duration,
    /// How to wait. Called with short slices, so that cancelling takes effect soon.
    pub sleep: fn(Duration),
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            retries: 6,
            first_wait: Duration::from_secs(1),
            longest_backoff: Duration::from_secs(30),
            longest_wait: Duration::from_secs(300),
            sleep: thread::sleep,
        }
    }
}

/// What to download, and where to.
#[derive(Debug, Clone)]
pub struct DownloadRequest {
    /// The repository.
    pub repo: RepoId,
    /// Branch, tag or full commit hash.
    pub revision: String,
    /// Globs over paths inside the repository; none means [`DEFAULT_INCLUDE`].
    pub include: Vec<String>,
    /// Plain files in this folder instead of the cache.
    pub local_dir: Option<PathBuf>,
    /// Files at once, at least 1.
    pub jobs: usize,
}

impl DownloadRequest {
    /// What a conversion needs of the main branch, into the cache, four files at once.
    pub fn new(repo: RepoId) -> DownloadRequest {
        DownloadRequest { repo, revision: "main".to_owned(), include: Vec::new(), local_dir: None, jobs: 4 }
    }
}

/// What a download consists of.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The repository.
    pub repo: RepoId,
    /// The revision asked for.
    pub revision: String,
    /// The commit it stands for.
    pub commit: String,
    /// The files, by path.
    pub files: Vec<ListedFile>,
    /// The folder that [`Hub::download`] will return.
    pub target: PathBuf,
    /// Free bytes on that disk, where the system says.
    pub free_bytes: Option<u64>,
}

/// One file of a [`Listing`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedFile {
    /// Path inside the repository.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Bytes that need no transfer, because they are on this disk already.
    pub on_disk: u64,
}

impl Listing {
    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).fold(0, u64::saturating_add)
    }

    /// Bytes that have to be transferred.
    pub fn missing_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size - file.on_disk).fold(0, u64::saturating_add)
    }
}

/// A download, worked out and not begun.
struct Prepared {
    place: Place,
    /// The whole listing of the commit; `None` where only the disk was asked and it has none.
    tree: BTreeMap<String, Entry>,
    /// The wanted files, in the order of [`Listing::files`].
    entries: Vec<Entry>,
    listing: Listing,
    /// Bytes the disk has to have room for.
    needed_space: u64,
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
        client.watched(|| Ok(self.prepare(&client, request, &NoProgress)?.listing))
    }

    /// Fetches what is missing and returns the folder with the files.
    ///
    /// Every file is verified (size, and the hash that the hub states) before it gets its final name; an
    /// interrupted download is resumed by calling this again. Several processes may do so at once.
    ///
    /// # Errors
    /// See [`HubError`]; each has a hint where there is something to do.
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

    /// The snapshot of a revision that is whole in the cache, without asking anybody; `None` where there is none.
    ///
    /// # Errors
    /// [`HubError::NotSmallThinker`] where the snapshot holds another kind of model.
    pub fn cached(&self, repo: &RepoId, revision: &str) -> Result<Option<PathBuf>, HubError> {
        check_revision(revision)?;
        let cache = CachedRepo::new(&self.config.cache_dir, repo);
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
        let cache = CachedRepo::new(&self.config.cache_dir, repo);
        let notify = |wait: Duration, cause: &HubError| progress.retrying(None, wait, cause);
        let api = Api { client, repo, notify: &notify };

        let commit = if is_commit(revision) {
            revision.clone()
        } else if self.config.offline {
            cache.cached_commit(revision).ok_or_else(|| offline(request, "the revision"))?
        } else {
            api.commit(revision)?
        };
        let place = Place::new(cache, commit, request.local_dir.clone());
        let known =
            trees::read(&place.trees(), &place.commit).or_else(|| trees::read(place.cache.folder(), &place.commit));
        let tree = match known {
            Some(tree) => tree,
            None if self.config.offline => return Err(offline(request, "the list of files")),
            None => api.tree(&place.commit)?,
        };
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
            repo: repo.clone(),
            revision: revision.clone(),
            commit: place.commit.clone(),
            files,
            target: place.root(),
            free_bytes: free_space(&place.storage()),
        };
        Ok(Prepared { place, tree, entries, listing, needed_space })
    }

    fn run(
        &self,
        client: &Client<'_>,
        request: &DownloadRequest,
        prepared: &Prepared,
        progress: &dyn DownloadProgress,
    ) -> Result<PathBuf, HubError> {
        let Prepared { place, tree, entries, listing, needed_space } = prepared;
        progress.listed(listing);
        if self.config.offline && listing.missing_bytes() > 0 {
            let missing = listing.files.iter().filter(|file| file.on_disk < file.size).count();
            return Err(offline(request, &format!("{missing} files ({} bytes)", listing.missing_bytes())));
        }
        if let Some(free) = listing.free_bytes.filter(|free| *free < *needed_space) {
            return Err(HubError::NoSpace { path: place.storage(), needed: *needed_space, free });
        }
        let work = Work { client, request, place, entries, progress };
        // The few bytes that tell whether the many are wanted come first.
        let config = entries.iter().position(|entry| entry.path == snapshot::CONFIG);
        match config {
            Some(index) => {
                place.begin(tree)?;
                work.fetch(index)?;
                snapshot::check_architecture_file(&request.repo, &place.root())?;
            }
            None => {
                if tree.contains_key(snapshot::CONFIG) && !self.config.offline {
                    let notify = |wait: Duration, cause: &HubError| progress.retrying(None, wait, cause);
                    let api = Api { client, repo: &request.repo, notify: &notify };
                    let text = api.small_file(&place.commit, snapshot::CONFIG, snapshot::MAX_CONFIG)?;
                    snapshot::check_architecture(&request.repo, &text)?;
                }
                place.begin(tree)?;
            }
        }
        let mut rest: Vec<usize> = (0..entries.len()).filter(|index| Some(*index) != config).collect();
        // The largest first: it must not be the one that is left over at the end.
        rest.sort_by_key(|index| std::cmp::Reverse(entries[*index].size));
        work.fetch_all(&rest)?;
        place.conclude(&request.revision)?;
        Ok(place.root())
    }
}

/// What is on disk of each file, and the bytes the disk still has to have room for.
fn survey(place: &Place, entries: &[Entry]) -> (Vec<ListedFile>, u64) {
    let mut needed = 0u64;
    let mut counted = std::collections::HashSet::new();
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

/// The transfers of one download.
struct Work<'a> {
    client: &'a Client<'a>,
    request: &'a DownloadRequest,
    place: &'a Place,
    entries: &'a [Entry],
    progress: &'a dyn DownloadProgress,
}

impl Work<'_> {
    /// Fetches the files with these indices, several at once. The first failure ends all.
    fn fetch_all(&self, indices: &[usize]) -> Result<(), HubError> {
        let next = AtomicUsize::new(0);
        let (failed, failures) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..self.request.jobs.clamp(1, indices.len().max(1)) {
                let (next, failed) = (&next, failed.clone());
                scope.spawn(move || {
                    while let Some(index) = indices.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = self.fetch(*index) {
                            // The receiver outlives the scope.
                            let _ = failed.send(error);
                            self.client.abort();
                            return;
                        }
                    }
                });
            }
        });
        drop(failed);
        // What the others say after the first failure is only that they were stopped.
        failures.into_iter().next().map_or(Ok(()), Err)
    }

    /// Sees to it that one file is in its place.
    fn fetch(&self, index: usize) -> Result<(), HubError> {
        let (entry, place) = (&self.entries[index], self.place);
        if self.client.stopped() {
            return Err(HubError::Cancelled);
        }
        if place.state(entry) == State::Present {
            self.progress.started(index, entry.size);
            self.progress.finished(index);
            return Ok(());
        }
        let slot = place.slot(entry);
        let lock = FileLock::acquire(&slot.lock, || self.progress.waiting(index), || self.client.stopped())?;
        // Whoever held the lock may have fetched it.
        match place.state(entry) {
            State::Present | State::Local { copy: false } => {
                place.record(entry, &slot)?;
                self.progress.started(index, entry.size);
            }
            State::Local { copy: true } | State::Partial(_) => {
                let partial = if lock.is_exclusive() {
                    slot.partial.clone()
                } else {
                    slot.partial.with_extension(format!("{}-{index}.incomplete", std::process::id()))
                };
                self.seed(entry, &partial)?;
                let done = self.transfer(index, &partial).and_then(|()| place.settle(entry, &slot, &partial));
                if done.is_err() && !lock.is_exclusive() {
                    // Nobody will look for a partial file of this name.
                    let _ = std::fs::remove_file(&partial);
                }
                done?;
            }
        }
        self.progress.finished(index);
        Ok(())
    }

    /// Copies content that the cache has instead of fetching it again; the transfer then only proves it.
    fn seed(&self, entry: &Entry, partial: &std::path::Path) -> Result<(), HubError> {
        let Some(source) = self.place.cached_content(entry) else { return Ok(()) };
        if cache::has_size(partial, entry.size) {
            return Ok(());
        }
        cache::create_parent(partial)?;
        std::fs::copy(&source, partial).map_err(HubError::io("copy to", partial))?;
        Ok(())
    }

    fn transfer(&self, index: usize, partial: &std::path::Path) -> Result<(), HubError> {
        let transfer = Transfer {
            client: self.client,
            repo: &self.request.repo,
            commit: &self.place.commit,
            entry: &self.entries[index],
            index,
            partial,
            progress: self.progress,
        };
        transfer.run()
    }
}
