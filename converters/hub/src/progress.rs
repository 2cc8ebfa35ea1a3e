//! What a download tells whoever watches it.

use std::time::Duration;

use crate::{HubError, Listing};

/// Receives the events of a download, from several threads at once. Every method does nothing by default.
///
/// `file` is an index into [`Listing::files`].
pub trait DownloadProgress: Send + Sync {
    /// What will be downloaded is known; nothing has been transferred yet.
    fn listed(&self, listing: &Listing) {
        let _ = listing;
    }
    /// A file begins, with `already` of its bytes on disk from an earlier attempt.
    fn started(&self, file: usize, already: u64) {
        let _ = (file, already);
    }
    /// `bytes` more of a file have arrived.
    fn advanced(&self, file: usize, bytes: u64) {
        let _ = (file, bytes);
    }
    /// `bytes` of a file that counted as arrived have to be fetched again.
    fn rewound(&self, file: usize, bytes: u64) {
        let _ = (file, bytes);
    }
    /// Another process is fetching this file; this one waits for it.
    fn waiting(&self, file: usize) {
        let _ = file;
    }
    /// A transient failure; the next attempt follows after `wait`. `file` is `None` for requests about the repository.
    fn retrying(&self, file: Option<usize>, wait: Duration, cause: &HubError) {
        let _ = (file, wait, cause);
    }
    /// A file is verified and has its final name.
    fn finished(&self, file: usize) {
        let _ = file;
    }
}

/// Watches nothing.
impl DownloadProgress for () {}
