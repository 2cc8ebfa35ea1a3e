//! The lock that keeps two processes from writing one file, shared with the Hugging Face tools.
//!
//! They hold `flock` on `.locks/<repository>/<etag>.lock` while a blob is being written and leave the lock file in
//! place afterwards; so does this.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::HubError;

/// How often a lock that somebody else holds is tried again.
const POLL: Duration = Duration::from_millis(50);

/// A lock, held until it is dropped.
#[derive(Debug)]
pub(crate) struct FileLock {
    /// `None` where the file system knows no locks.
    held: Option<File>,
}

impl FileLock {
    /// Waits for the lock at `path`, creating the file and its folders.
    ///
    /// `on_wait` is called once if somebody else holds it; waiting ends with [`HubError::Cancelled`] when `stopped`
    /// says so.
    pub(crate) fn acquire(
        path: &Path,
        on_wait: impl FnOnce(),
        stopped: impl Fn() -> bool,
    ) -> Result<FileLock, HubError> {
        let failed = |source| HubError::Io { action: "lock", path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(HubError::io("create", folder))?;
        }
        let mut on_wait = Some(on_wait);
        loop {
            let file = st_sys::create_claimable(path, None).map_err(failed)?;
            match file.try_lock() {
                Ok(()) if st_sys::is_named(&file, path).unwrap_or(false) => return Ok(FileLock { held: Some(file) }),
                // Somebody removed the file between opening and locking: this lock excludes nobody.
                Ok(()) => continue,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                    return Ok(FileLock { held: None });
                }
                Err(TryLockError::Error(e)) => return Err(failed(e)),
            }
            if let Some(on_wait) = on_wait.take() {
                on_wait();
            }
            if stopped() {
                return Err(HubError::Cancelled);
            }
            thread::sleep(POLL);
        }
    }

    /// Whether others are kept out. Where the file system knows no locks, nothing may be shared with them.
    pub(crate) fn is_exclusive(&self) -> bool {
        self.held.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_held_lock_is_waited_for_and_the_wait_can_be_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.lock");
        let first = FileLock::acquire(&path, || panic!("nobody holds it"), || false).unwrap();
        assert!(first.is_exclusive());
        let waited = AtomicBool::new(false);
        let second = FileLock::acquire(&path, || waited.store(true, Ordering::Relaxed), || true);
        assert!(matches!(second, Err(HubError::Cancelled)));
        assert!(waited.load(Ordering::Relaxed));
        drop(first);
        FileLock::acquire(&path, || panic!("nobody holds it"), || false).unwrap();
        assert!(path.exists(), "the lock file stays: removing it would split those who wait");
    }
}
