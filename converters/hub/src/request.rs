//! What is asked for, how it is to be done, and what it would take.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use crate::address::without_user;
use crate::{Proxies, RepoId, Token};

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Everything that is the same for all downloads of a program.
#[derive(Clone)]
pub struct HubConfig {
    /// Address of the hub. User and password in it are sent there instead of a token, and shown nowhere.
    pub endpoint: String,
    /// The folder that holds `models--owner--name` folders.
    pub cache_dir: PathBuf,
    /// Sent to the endpoint, and to no other host.
    pub token: Option<Token>,
    /// Answer from the disk alone.
    pub offline: bool,
    /// Proxies, and what is reached without one.
    pub proxies: Proxies,
    /// When and how often to try again.
    pub retry: RetryPolicy,
    /// The longest a connection may stay silent.
    pub stall_timeout: Duration,
    /// The longest that connecting may take.
    pub connect_timeout: Duration,
    /// Raised by whoever wants the work to end soon; what has arrived stays.
    pub cancel: Arc<AtomicBool>,
}

impl HubConfig {
    /// The public hub, nobody logged in, and the given cache folder.
    pub fn new(cache_dir: impl Into<PathBuf>) -> HubConfig {
        HubConfig {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            cache_dir: cache_dir.into(),
            token: None,
            offline: false,
            proxies: Proxies::default(),
            retry: RetryPolicy::default(),
            stall_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            cancel: Arc::default(),
        }
    }
}

impl fmt::Debug for HubConfig {
    /// Without the address's password: the other secrets hide themselves.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &without_user(&self.endpoint))
            .field("cache_dir", &self.cache_dir)
            .field("token", &self.token)
            .field("offline", &self.offline)
            .field("proxies", &self.proxies)
            .finish_non_exhaustive()
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
    /// Globs over paths inside the repository; none means [`DEFAULT_INCLUDE`](crate::DEFAULT_INCLUDE).
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
    /// The repository, by the name that the hub has for it.
    pub repo: RepoId,
    /// The revision asked for.
    pub revision: String,
    /// The commit it stands for.
    pub commit: String,
    /// The files, by path.
    pub files: Vec<ListedFile>,
    /// The folder that [`Hub::download`](crate::Hub::download) will return.
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
