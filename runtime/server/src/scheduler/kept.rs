//! Texts that later ones may begin with: in memory, on disk, and on their way between the two.

use std::sync::Arc;
use std::time::Duration;

use st_model::{Engine, Sequence};

use crate::app::App;
use crate::conversation::Conversation;
use crate::disk::{Disk, Loading, NoPages, Saving};
use crate::failure::without_folders;
use crate::log::{Record, What};
use crate::prefix::{Hit, Prefixes};
use crate::queue::Waiting;

/// How long the engine's thread sleeps where others are at work.
pub(super) const A_WHILE: Duration = Duration::from_millis(2);

/// The texts that are kept.
pub(super) struct Kept<'a> {
    app: &'a App,
    engine: Arc<Engine>,
    prefixes: Prefixes,
    disk: Option<Disk>,
    /// Those whose beginning is read from disk.
    restoring: Vec<Restoring>,
    /// The text that is being saved. Its pages are in use until it is.
    saving: Option<Saving>,
}

/// A job whose beginning is read from disk. It has a place, so that there are pages for it.
struct Restoring {
    waiting: Waiting,
    loading: Loading,
    /// Texts that were forgotten to make room for it, the last time.
    forgot: usize,
}

impl<'a> Kept<'a> {
    /// Nothing in memory yet.
    pub(super) fn new(app: &'a App, engine: Arc<Engine>, disk: Option<Disk>) -> Self {
        let prefixes = Prefixes::new(2 * app.settings.parallel * engine.ctx());
        Self { app, engine, prefixes, disk, restoring: Vec::new(), saving: None }
    }

    /// What memory has of a prompt.
    pub(super) fn find(&mut self, prompt: &[u32], active: &[Conversation]) -> Hit {
        self.prefixes.find(prompt, sequences(active))
    }

    /// Tokens of a prompt that texts that are kept share with it, at most.
    pub(super) fn shared(&self, prompt: &[u32]) -> usize {
        self.prefixes.shared(prompt)
    }

    /// Keeps a text.
    pub(super) fn keep(&mut self, sequence: Sequence) {
        self.prefixes.keep(sequence);
    }

    /// Texts that are kept in memory.
    pub(super) fn len(&self) -> usize {
        self.prefixes.len()
    }

    /// Prompts of the jobs whose beginning is read from disk.
    pub(super) fn restoring(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.restoring.iter().map(|restoring| &restoring.waiting.job.prompt[..])
    }

    /// A job whose beginning is read from disk, which is no longer waited for.
    pub(super) fn give_up(&mut self) -> Option<Waiting> {
        self.restoring.pop().map(|restoring| restoring.waiting)
    }

    /// Saves a text that is kept in memory alone, on a thread of its own; whether one is being saved, a while from now.
    pub(super) fn save_one(&mut self) -> bool {
        if self.saving.is_some() {
            return !self.saved(A_WHILE) || self.prefixes.has_unsaved();
        }
        let Some(disk) = &mut self.disk else { return false };
        let Some(sequence) = self.prefixes.next_unsaved() else { return false };
        self.saving = disk.save(sequence, &self.engine);
        true
    }

    /// Waits for the text that is being saved, for so long at most; whether there was one, and it is done.
    fn saved(&mut self, time: Duration) -> bool {
        let (Some(disk), Some(saving)) = (&mut self.disk, &self.saving) else { return false };
        let Some(written) = saving.wait(time) else { return false };
        if let Err(error) = disk.saved(saving, written) {
            self.app.log.tell(Record::new(What::Failed(without_folders(&error))));
        }
        self.saving = None;
        let (files, bytes) = disk.size();
        self.app.metrics.snapshots.set(files as u64);
        self.app.metrics.snapshot_bytes.set(bytes);
        true
    }

    /// Begins to read what the disk has of a prompt, where it is more than memory has. Returns the job where it is not.
    pub(super) fn restore(&mut self, waiting: Waiting, active: &[Conversation]) -> Option<Waiting> {
        self.restore_again(waiting, 0, active)
    }

    fn restore_again(&mut self, waiting: Waiting, forgot: usize, active: &[Conversation]) -> Option<Waiting> {
        let in_memory = self.prefixes.keeps(&waiting.job.prompt, sequences(active));
        let Some(disk) = &self.disk else { return Some(waiting) };
        let Some(index) = disk.find(&waiting.job.prompt, in_memory, &self.engine) else { return Some(waiting) };
        let loading = disk.load(index, &self.engine);
        self.restoring.push(Restoring { waiting, loading, forgot });
        None
    }

    /// The next job whose beginning has been read: it may begin.
    pub(super) fn restored(&mut self, active: &[Conversation]) -> Option<Waiting> {
        for index in (0..self.restoring.len()).rev() {
            let Some(read) = self.restoring[index].loading.done() else { continue };
            let Restoring { waiting, loading, forgot } = self.restoring.swap_remove(index);
            let Some(disk) = &mut self.disk else { return Some(waiting) };
            match disk.loaded(&loading.path, read) {
                // From now on it is in memory.
                Ok(sequence) => {
                    sequence.into_iter().for_each(|sequence| self.prefixes.keep_saved(sequence));
                    self.give_back_pages();
                    return Some(waiting);
                }
                Err(NoPages) => {
                    // Texts that are only kept make room, more of them each time.
                    let forget = 2 * forgot.max(1);
                    let waiting = match (0..forget).filter(|_| self.prefixes.forget_one()).count() {
                        0 => Some(waiting),
                        _ => self.restore_again(waiting, forget, active),
                    };
                    if waiting.is_some() {
                        return waiting;
                    }
                }
            }
        }
        None
    }

    /// Texts that are only kept make room for those that are under way; whether there is more of it now.
    pub(super) fn make_room(&mut self) -> bool {
        self.prefixes.forget_one() || self.saved(Duration::MAX)
    }

    /// Texts that are kept take no pages beyond those that were planned.
    pub(super) fn give_back_pages(&mut self) {
        while self.engine.kv_pages().0 > self.engine.planned_pages() && self.prefixes.forget_one() {}
    }
}

fn sequences(active: &[Conversation]) -> impl Iterator<Item = &Sequence> {
    active.iter().map(|conversation| &conversation.sequence)
}
