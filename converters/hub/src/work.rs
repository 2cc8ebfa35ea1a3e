//! The transfers of one download: several files at once, each under its lock, each into its place.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use crate::api::Entry;
use crate::cache::{Place, State};
use crate::files::{create_parent, has_size};
use crate::http::Client;
use crate::lock::FileLock;
use crate::transfer::Transfer;
use crate::{DownloadProgress, HubError, RepoId};

/// The transfers of one download.
pub(crate) struct Work<'a> {
    pub(crate) client: &'a Client<'a>,
    /// The name that the hub is asked by.
    pub(crate) repo: &'a RepoId,
    /// Files at once.
    pub(crate) jobs: usize,
    pub(crate) place: &'a Place,
    pub(crate) entries: &'a [Entry],
    pub(crate) progress: &'a dyn DownloadProgress,
}

impl Work<'_> {
    /// Fetches the files with these indices, several at once. The first failure ends all.
    pub(crate) fn fetch_all(&self, indices: &[usize]) -> Result<(), HubError> {
        let next = AtomicUsize::new(0);
        let (failed, failures) = mpsc::channel();
        thread::scope(|scope| {
            for started in 0..self.jobs.clamp(1, indices.len().max(1)) {
                let (next, failed) = (&next, failed.clone());
                let work = move || {
                    while let Some(index) = indices.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = self.fetch(*index) {
                            // The receiver outlives the scope.
                            let _ = failed.send(error);
                            self.client.abort();
                            return;
                        }
                    }
                };
                match thread::Builder::new().spawn_scoped(scope, work) {
                    Ok(_) => {}
                    Err(error) if started == 0 => return Err(HubError::Thread(error)),
                    // Those that there are do the work of all.
                    Err(_) => break,
                }
            }
            Ok(())
        })?;
        drop(failed);
        // What the others say after the first failure is only that they were stopped.
        failures.into_iter().next().map_or(Ok(()), Err)
    }

    /// Sees to it that one file is in its place.
    pub(crate) fn fetch(&self, index: usize) -> Result<(), HubError> {
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
                    let _ = fs::remove_file(&partial);
                }
                done?;
            }
        }
        self.progress.finished(index);
        Ok(())
    }

    /// Copies content that the cache has instead of fetching it again; the transfer then only proves it.
    fn seed(&self, entry: &Entry, partial: &Path) -> Result<(), HubError> {
        let Some(source) = self.place.cached_content(entry) else { return Ok(()) };
        if has_size(partial, entry.size) {
            return Ok(());
        }
        create_parent(partial)?;
        fs::copy(&source, partial).map_err(HubError::io("copy to", partial))?;
        Ok(())
    }

    fn transfer(&self, index: usize, partial: &Path) -> Result<(), HubError> {
        let transfer = Transfer {
            client: self.client,
            repo: self.repo,
            commit: &self.place.commit,
            entry: &self.entries[index],
            index,
            partial,
            progress: self.progress,
        };
        transfer.run()
    }
}
