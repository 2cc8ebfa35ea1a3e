//! What can go wrong between the hub and the disk.
//!
//! Addresses in messages never carry user, password or query: each may be a credential.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A failure of a listing or a download.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The text is neither a known alias nor `owner/name`.
    #[error("{name:?} does not name a model: {reason}")]
    InvalidName {
        /// What was given.
        name: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// Another process is fetching what is to be removed.
    #[error("another process is fetching files of {repo}")]
    Busy {
        /// The repository.
        repo: String,
    },
    /// There is no thread for a transfer.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The revision could not be a branch, a tag or a commit.
    #[error("{revision:?} is not a revision: {reason}")]
    InvalidRevision {
        /// What was given.
        revision: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// An `include` pattern does not parse.
    #[error("pattern {pattern:?} is not a valid glob")]
    InvalidPattern {
        /// What was given.
        pattern: String,
        /// Where the pattern is wrong.
        source: globset::Error,
    },
    /// The endpoint is not an http(s) address.
    #[error("endpoint {endpoint:?} is not an http or https address")]
    InvalidEndpoint {
        /// What was given, without user and password.
        endpoint: String,
    },
    /// A variable that names a proxy does not hold the address of one.
    #[error("{variable} is not the address of a proxy")]
    InvalidProxy {
        /// The variable.
        variable: String,
    },
    /// A token that cannot be one, and would be refused everywhere.
    #[error("the token of {origin} holds {found:?} (U+{:04X}), which no token has", u32::from(*found))]
    InvalidToken {
        /// Where it was found.
        origin: String,
        /// The first such character.
        found: char,
    },
    /// No connection: no network, no name resolution, refused, or TLS failed.
    #[error("cannot reach {host}: {cause}")]
    Unreachable {
        /// Scheme and host that was tried.
        host: String,
        /// What the network layer said.
        cause: String,
    },
    /// HTTP 401.
    #[error("{host} does not give {repo} to {sent} (HTTP 401)")]
    Unauthorized {
        /// The repository asked for.
        repo: String,
        /// Scheme and host that answered.
        host: String,
        /// What went with the request.
        sent: Credentials,
    },
    /// The repository exists, but its licence has to be accepted first.
    #[error("{repo} is gated: access has to be granted on its page first (HTTP {status})")]
    Gated {
        /// The repository asked for.
        repo: String,
        /// Scheme and host that answered.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What went with the request.
        sent: Credentials,
    },
    /// HTTP 403 for another reason than gating.
    #[error("access to {url} is forbidden (HTTP 403){}", message.as_deref().map(|m| format!(": {m}")).unwrap_or_default())]
    Forbidden {
        /// Address without its query.
        url: String,
        /// The server's own explanation.
        message: Option<String>,
        /// Whether a web page came with it, as from a filter on the way and not from a hub.
        page: bool,
    },
    /// HTTP 404 for the repository.
    #[error("there is no model {repo} on {host} (HTTP 404)")]
    RepoNotFound {
        /// The repository asked for.
        repo: String,
        /// Scheme and host that answered.
        host: String,
    },
    /// HTTP 404 for the listing of a repository's files, where the repository is there.
    #[error("{host} has {repo}, but no list of its files (HTTP 404)")]
    NoListing {
        /// The repository asked for.
        repo: String,
        /// Scheme and host that answered.
        host: String,
    },
    /// HTTP 404 for the revision.
    #[error("{repo} has no revision {revision:?} (HTTP 404)")]
    RevisionNotFound {
        /// The repository asked for.
        repo: String,
        /// The revision asked for.
        revision: String,
    },
    /// HTTP 404 for one file.
    #[error("{repo} has no file {file:?} (HTTP 404)")]
    FileNotFound {
        /// The repository asked for.
        repo: String,
        /// Path inside the repository.
        file: String,
    },
    /// HTTP 429 that outlasted the retries, or that asks for a longer wait than allowed.
    #[error("{host} limits the rate of requests (HTTP 429){}", retry_after.map(|t| format!(", for another {} s", t.as_secs())).unwrap_or_default())]
    RateLimited {
        /// Scheme and host that answered.
        host: String,
        /// How long the server asks to wait.
        retry_after: Option<Duration>,
    },
    /// Any other status that is not success.
    #[error("{url} answered HTTP {status}")]
    Status {
        /// Address without its query.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The connection ended before the file did, and retries did not help.
    #[error("the connection was cut after {at} bytes of {file}: {cause}")]
    Cut {
        /// Path inside the repository, or the address of a request about it.
        file: String,
        /// Bytes that had arrived.
        at: u64,
        /// What the network layer said.
        cause: String,
    },
    /// Nothing arrived for as long as the stall limit, and retries did not help.
    #[error("{host} sent nothing for {} s", limit.as_secs_f32())]
    Stalled {
        /// Scheme and host that fell silent.
        host: String,
        /// The limit that was reached.
        limit: Duration,
    },
    /// The server announced or sent another number of bytes than the repository lists.
    #[error("{file}: the hub lists {expected} bytes, but the download has {got}")]
    Size {
        /// Path inside the repository.
        file: String,
        /// Bytes the repository lists.
        expected: u64,
        /// Bytes announced or received.
        got: u64,
    },
    /// All bytes arrived, twice, and they are not the file.
    #[error("{file}: wrong content: {algorithm} should be {expected}, but is {got}")]
    Digest {
        /// Path inside the repository.
        file: String,
        /// `sha256` or `git sha1`.
        algorithm: &'static str,
        /// Hexadecimal, as the hub states it.
        expected: String,
        /// Hexadecimal, of what arrived.
        got: String,
    },
    /// The server offers other content than the listing of the same commit names.
    #[error("{file}: the hub lists content {expected}, but offers {got}")]
    Changed {
        /// Path inside the repository.
        file: String,
        /// Entity tag in the listing.
        expected: String,
        /// Entity tag in the answer.
        got: String,
    },
    /// A file name that would leave the folder it is to be written to.
    #[error("the repository has a file named {path:?}, which is not a safe path")]
    UnsafePath {
        /// The name as the server sent it.
        path: String,
    },
    /// The server does not speak the hub's interface.
    #[error("{url} answered something unexpected: {reason}")]
    BadResponse {
        /// Address without its query.
        url: String,
        /// What was wrong with it.
        reason: String,
    },
    /// A web page came with status 200, in place of what was asked for.
    #[error("{url} answered with a web page in place of {wanted}")]
    WebPage {
        /// Address without its query.
        url: String,
        /// What was asked for: a path inside the repository, or `the hub's answer`.
        wanted: String,
    },
    /// What git stores in place of a large file, and not the file.
    #[error("{host} has {file} only as a Git LFS pointer, not the file itself")]
    LfsPointer {
        /// Path inside the repository.
        file: String,
        /// Scheme and host that answered.
        host: String,
    },
    /// The missing bytes do not fit on the disk.
    #[error("{} has {free} bytes free, and {needed} more are to be downloaded", path.display())]
    NoSpace {
        /// The folder that is to receive them.
        path: PathBuf,
        /// Bytes that are missing.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// Offline, and the cache does not have everything.
    #[error("offline, and {repo} at revision {revision:?} is not whole in the cache: {what}")]
    Offline {
        /// The repository asked for.
        repo: String,
        /// The revision asked for.
        revision: String,
        /// What is missing, in words.
        what: String,
    },
    /// The patterns exclude every file of the repository.
    #[error("no file of {repo} matches {patterns}")]
    NothingMatches {
        /// The repository asked for.
        repo: String,
        /// The patterns, comma-separated.
        patterns: String,
    },
    /// The repository holds another kind of model.
    #[error("{repo} is not a SmallThinker checkpoint: {found}")]
    NotSmallThinker {
        /// The repository asked for.
        repo: String,
        /// What was found instead.
        found: String,
    },
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// The path it was done to.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Somebody asked to stop.
    #[error("interrupted")]
    Cancelled,
}

impl HubError {
    /// For `map_err` on file system calls: names the action and the path.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> HubError {
        let path = path.into();
        move |source| HubError::Io { action, path, source }
    }
}

/// What proved to a hub who is asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing.
    Nothing,
    /// An access token.
    Token,
    /// User and password of the hub's address.
    Password,
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credentials::Nothing => "somebody who is not logged in",
            Credentials::Token => "this token",
            Credentials::Password => "this user and password",
        })
    }
}
