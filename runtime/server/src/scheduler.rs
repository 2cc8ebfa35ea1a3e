//! The engine's thread: one step after the other, each with rows of all conversations.
//!
//! A step is the next token of every answer, or a piece of the prompts that are read, in turn: nobody who is being answered waits
//! for more than one piece, and where that takes long, not for its end (`between`). What a row computes does not depend on the rows
//! beside it, so neither does any answer.

mod between;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use st_model::{Batch, BatchKind, Engine, Governor, ModelError, Observer, Planned, Sequence, Workspace};
use tokio::sync::mpsc::Sender;

use crate::app::App;
use crate::conversation::Conversation;
use crate::disk::{Disk, Loading, NoPages, Saving};
use crate::failure::without_folders;
use crate::job::{Ending, Event, Failure, Job};
use crate::log::{Record, What};
use crate::piece::Pieces;
use crate::prefix::{Prefixes, common};
use crate::queue::Waiting;
use crate::slots::Slot;

/// Rows of a step in which nobody is being answered: large enough to be fast, small enough that who comes next is soon served.
const ALONE: usize = 512;
/// Who takes nothing for so long, while others wait for the place, is taken for gone.
const PATIENCE: Duration = Duration::from_secs(30);
/// A prompt that shares at least so many tokens with one that is being read waits for them.
const WORTH_WAITING: usize = 32;
/// Rows of prompts beside which answers' experts are still worth keeping.
const FEW: usize = 8;
/// Copies of a text under way are kept at such distances, for models that cannot be cut back anywhere.
const COPY_EVERY: usize = 1024;

/// How long the engine's thread sleeps where others are at work.
const A_WHILE: Duration = Duration::from_millis(2);

/// All conversations, and what runs them.
pub(crate) struct Scheduler<'a> {
    app: &'a App,
    engine: Arc<Engine>,
    workspace: Workspace,
    /// For answers between the layers of a prompt; in the place of the other meanwhile.
    small: Option<Workspace>,
    batch: Batch,
    active: Vec<Conversation>,
    prefixes: Prefixes,
    /// What steps cost, and so how many tokens are worth being drafted.
    governor: Governor,
    disk: Option<Disk>,
    /// Those whose beginning is read from disk.
    restoring: Vec<Restoring>,
    /// The text that is being saved. Its pages are in use until it is.
    saving: Option<Saving>,
    pieces: Pieces,
    /// Whose prompt is read next.
    turn: usize,
    /// The latest step was given up for somebody who had gone; the next reads no prompts, so that answers go on whatever happens.
    gave_up: bool,
}

/// A job whose beginning is read from disk. It has a place, so that there are pages for it.
struct Restoring {
    waiting: Waiting,
    loading: Loading,
    /// Texts that were forgotten to make room for it, the last time.
    forgot: usize,
}

/// A conversation's part of a step.
#[derive(Clone, Copy)]
struct Share {
    index: usize,
    rows: usize,
}

impl<'a> Scheduler<'a> {
    /// Nothing to do yet; texts are saved on `disk`, where there is one.
    ///
    /// # Errors
    /// Where buffers cannot be allocated.
    pub(crate) fn new(app: &'a App, engine: Arc<Engine>, disk: Option<Disk>) -> Result<Self, ModelError> {
        let (workspace, small) = (engine.workspace()?, Some(engine.workspace()?));
        let prefixes = Prefixes::new(2 * app.settings.parallel * engine.ctx());
        let (batch, active) = (Batch::default(), Vec::new());
        let (restoring, pieces) = (Vec::new(), Pieces::new(app.settings.prompt_piece));
        Ok(Self {
            app,
            engine,
            workspace,
            small,
            batch,
            active,
            prefixes,
            governor: Governor::default(),
            disk,
            restoring,
            saving: None,
            pieces,
            turn: 0,
            gave_up: false,
        })
    }

    /// Answers until the server ends.
    pub(crate) fn run(mut self) {
        loop {
            self.drop_gone();
            self.restored();
            self.end_all_that_are_over();
            if self.app.is_over() {
                while let Some(restoring) = self.restoring.pop() {
                    self.begin(restoring.waiting);
                }
                self.active.iter_mut().for_each(Conversation::cut_off);
                (0..self.active.len()).rev().for_each(|index| self.end(index));
            }
            self.admit();
            self.publish();
            if self.active.is_empty() && !self.restoring.is_empty() {
                std::thread::sleep(A_WHILE);
                continue;
            }
            if self.active.is_empty() {
                // There is time to save what is kept.
                match (self.save_one(), self.app.is_ending()) {
                    (true, _) => {}
                    (false, true) => return,
                    (false, false) => self.app.queue.wait(Duration::from_millis(100)),
                }
                continue;
            }
            self.next_step();
        }
    }

    /// Saves a text that is kept in memory alone, on a thread of its own; whether one is being saved, a while from now.
    fn save_one(&mut self) -> bool {
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

    /// Begins to read what the disk has of a prompt, where it is more than memory has.
    fn restore(&mut self, waiting: Waiting, forgot: usize) -> Option<Waiting> {
        let under_way = self.active.iter().map(|conversation| &conversation.sequence);
        let in_memory = self.prefixes.keeps(&waiting.job.prompt, under_way);
        let Some(disk) = &self.disk else { return Some(waiting) };
        let Some(index) = disk.find(&waiting.job.prompt, in_memory, &self.engine) else { return Some(waiting) };
        let loading = disk.load(index, &self.engine);
        self.restoring.push(Restoring { waiting, loading, forgot });
        None
    }

    /// Begins the conversations whose beginning has been read.
    fn restored(&mut self) {
        for index in (0..self.restoring.len()).rev() {
            let Some(read) = self.restoring[index].loading.done() else { continue };
            let Restoring { waiting, loading, forgot } = self.restoring.swap_remove(index);
            let Some(disk) = &mut self.disk else { continue };
            match disk.loaded(&loading.path, read) {
                // From now on it is in memory.
                Ok(sequence) => {
                    sequence.into_iter().for_each(|sequence| self.prefixes.keep_saved(sequence));
                    self.give_back_pages();
                    self.begin(waiting);
                }
                Err(NoPages) => {
                    // Texts that are only kept make room, more of them each time.
                    let forget = 2 * forgot.max(1);
                    let waiting = match (0..forget).filter(|_| self.prefixes.forget_one()).count() {
                        0 => Some(waiting),
                        _ => self.restore(waiting, forget),
                    };
                    waiting.into_iter().for_each(|waiting| self.begin(waiting));
                }
            }
        }
    }

    /// Begins a conversation with what memory has of its prompt.
    fn begin(&mut self, waiting: Waiting) {
        let under_way = self.active.iter().map(|conversation| &conversation.sequence);
        let hit = self.prefixes.find(&waiting.job.prompt, under_way);
        let conversation = Conversation::new(waiting, hit, &self.engine, self.app.settings.draft);
        self.app.metrics.prompt_tokens.add(conversation.prompt().len() as u64);
        self.app.metrics.cached_tokens.add(conversation.cached() as u64);
        self.app.metrics.prefix_hits.add(u64::from(conversation.cached() > 0));
        self.active.push(conversation);
    }

    /// Ends what nobody waits for.
    fn drop_gone(&mut self) {
        let others_wait = self.app.queue.len() > 0;
        let is_gone = |conversation: &Conversation| {
            let stalled = conversation.stalled.is_some_and(|since| since.elapsed() > PATIENCE);
            conversation.is_gone() || (stalled && others_wait)
        };
        for index in (0..self.active.len()).rev() {
            if is_gone(&self.active[index]) {
                self.app.metrics.hung_up.add(1);
                self.end(index);
            }
        }
    }

    /// A conversation is over: its text is kept for those that begin like it.
    fn end(&mut self, index: usize) {
        let conversation = self.active.remove(index);
        let otherwise = match (conversation.has_failed, conversation.ended) {
            (true, _) => Some("failed"),
            (false, None) => Some("gone"),
            (false, Some(_)) => None,
        };
        let finished = conversation.ended.unwrap_or_else(|| conversation.finished(Ending::Length));
        self.app.log.tell(Record::answer(&finished, otherwise));
        self.app.queue.leave(conversation.age());
        self.prefixes.keep(conversation.sequence);
        self.give_back_pages();
    }

    /// Begins conversations as long as there is room.
    fn admit(&mut self) {
        while self.active.len() + self.restoring.len() < self.app.settings.parallel {
            let (active, restoring, prefixes) = (&mut self.active, &self.restoring, &self.prefixes);
            // What another one is reading right now is not read twice.
            let may_begin = |job: &Job| {
                let least = WORTH_WAITING.max(prefixes.shared(&job.prompt) + 1);
                let shared = |prompt: &[u32]| common(prompt, &job.prompt).min(job.prompt.len() - 1);
                let read_by_another =
                    active.iter_mut().filter(|conversation| conversation.is_reading()).any(|conversation| {
                        let shared = shared(conversation.prompt());
                        let waits = shared >= least && shared > conversation.sequence.len();
                        waits.then(|| conversation.copy_at(shared)).is_some()
                    });
                !read_by_another && !restoring.iter().any(|other| shared(&other.waiting.job.prompt) >= least)
            };
            let Some(waiting) = self.app.queue.take(may_begin) else { return };
            let waiting = self.restore(waiting, 0);
            waiting.into_iter().for_each(|waiting| self.begin(waiting));
        }
    }

    fn publish(&self) {
        let slot = |conversation: &Conversation| Slot {
            prompt: conversation.prompt().len(),
            cached: conversation.cached(),
            read: conversation.sequence.len().min(conversation.prompt().len()),
            made: conversation.made(),
        };
        let restored =
            |restoring: &Restoring| Slot { prompt: restoring.waiting.job.prompt.len(), cached: 0, read: 0, made: 0 };
        self.app.slots.set(self.active.iter().map(slot).chain(self.restoring.iter().map(restored)));
        let metrics = &self.app.metrics;
        metrics.kv_pages.set(self.engine.kv_pages().0 as u64);
        metrics.prefixes.set(self.prefixes.len() as u64);
        metrics.piece.set(self.pieces.size() as u64);
    }

    /// The next token of every answer whose reader has room for it, and what is run after it: what has to follow, `along` tokens of that
    /// for all at most, or drafts where those may be.
    fn answers(&mut self, along: usize, takes_drafts: bool) -> Vec<Share> {
        let mut shares = Vec::new();
        let has_room = |conversation: &Conversation| !conversation.is_reading() && conversation.has_room();
        let answers = self.active.iter().filter(|conversation| has_room(conversation)).count();
        let mut planned = Planned { rows: answers, tokens: answers as f64, most_certain: along, takes_drafts };
        let mut logits = self.engine.max_logits().saturating_sub(self.active.len());
        for index in 0..self.active.len() {
            if !has_room(&self.active[index]) {
                if !self.active[index].is_reading() {
                    self.active[index].stalled.get_or_insert_with(Instant::now);
                }
                continue;
            }
            let conversation = &mut self.active[index];
            conversation.stalled = None;
            let tells = conversation.tells_logprobs();
            let most_certain = if tells { planned.most_certain.min(logits) } else { planned.most_certain };
            if let Err(error) = conversation.plan(&self.governor, &Planned { most_certain, ..planned }) {
                conversation.fail(failure(&error));
                continue;
            }
            let (ahead, expected, first) = conversation.ahead();
            planned.rows += ahead.len();
            planned.tokens += expected;
            planned.most_certain = planned.most_certain.saturating_sub(ahead.len());
            logits = logits.saturating_sub(ahead.len() - first);
            shares.push(Share { index, rows: 1 + ahead.len() });
        }
        shares
    }

    /// Pieces of the prompts that are read, in turn, of `room` tokens together at most.
    fn prompts(&mut self, mut room: usize) -> Vec<Share> {
        let mut shares = Vec::new();
        let (n, turn) = (self.active.len(), self.turn);
        for index in (0..n).map(|i| (turn + i) % n) {
            let conversation = &self.active[index];
            let rows = if conversation.is_reading() { conversation.rows(room) } else { 0 };
            if rows > 0 {
                shares.push(Share { index, rows });
                room -= rows;
                self.turn = index + 1;
            }
        }
        shares
    }

    /// Runs the next step: a token of every answer, and of prompts what there is room for.
    fn next_step(&mut self) {
        let n = self.active.len();
        let answers = self.active.iter().filter(|conversation| !conversation.is_reading()).count();
        let room = self.engine.max_rows().saturating_sub(answers);
        let piece = if answers > 0 { self.pieces.size() } else { self.pieces.size().max(ALONE) };
        let given_up = std::mem::take(&mut self.gave_up) && answers > 0;
        let prompts = if given_up { Vec::new() } else { self.prompts(piece.min(room)) };
        let read: usize = prompts.iter().map(|share| share.rows).sum();
        if answers > 0 && read > FEW {
            return self.read_between(&prompts);
        }
        // What has to follow a token goes along with it, as long as nobody waits longer than for a piece of a prompt.
        let along = if n == 1 { ALONE } else { piece }.min(room.saturating_sub(read));
        let mut shares = self.answers(along, answers == n);
        shares.extend(prompts);
        if shares.is_empty() {
            self.end_all_that_are_over();
            // All readers are slow.
            return std::thread::sleep(Duration::from_millis(5));
        }
        self.step(&shares);
    }

    /// Runs one step.
    fn step(&mut self, shares: &[Share]) {
        let started = Instant::now();
        let outcome = self.forward(shares);
        self.settle(shares, outcome);
        self.app.metrics.steps.add(1);
        self.app.metrics.busy.add_time(started.elapsed());
    }

    /// What follows from a step. Where it failed, each conversation is run alone, so that nobody fails for another.
    fn settle(&mut self, shares: &[Share], outcome: Result<(), ModelError>) {
        if let Err(error) = &outcome
            && !matches!(error, ModelError::Cancelled)
        {
            self.app.log.tell(Record::new(What::Failed(without_folders(error))));
        }
        match outcome {
            Ok(()) => self.advance(shares),
            Err(ModelError::Cancelled) => self.gave_up = true,
            Err(_) if shares.len() > 1 => {
                for share in shares {
                    match self.forward(std::slice::from_ref(share)) {
                        Ok(()) => self.advance_one(0, *share),
                        Err(ModelError::Cancelled) => self.gave_up = true,
                        Err(error) => self.active[share.index].fail(failure(&error)),
                    }
                }
                self.end_all_that_are_over();
            }
            Err(error) => {
                self.active[shares[0].index].fail(failure(&error));
                self.end_all_that_are_over();
            }
        }
    }

    /// Runs the rows of some conversations.
    fn forward(&mut self, shares: &[Share]) -> Result<(), ModelError> {
        let reads = shares.iter().filter(|share| self.active[share.index].is_reading());
        let read: usize = reads.clone().map(|share| share.rows).sum();
        let readers = reads.map(|share| self.active[share.index].reader()).collect();
        let drafted: usize = shares.iter().map(|share| self.active[share.index].drafted()).sum();
        self.batch.clear(match (read > FEW, drafted > 0) {
            (true, _) => BatchKind::Prompt,
            (false, true) => BatchKind::Verify,
            (false, false) => BatchKind::Decode,
        });
        for share in shares {
            let conversation = &self.active[share.index];
            let pending = conversation.pending();
            if !conversation.is_reading() {
                let (ahead, _, first) = conversation.ahead();
                for (row, &token) in pending.iter().chain(ahead).enumerate() {
                    match row < first {
                        true => self.batch.push(share.index, token),
                        false => drop(self.batch.push_with_logits(share.index, token)),
                    }
                }
                continue;
            }
            add_piece(&mut self.batch, share.index, conversation, share.rows);
        }
        let mut watch = Watch { readers, app: self.app };
        loop {
            let mut sequences: Vec<&mut Sequence> =
                self.active.iter_mut().map(|conversation| &mut conversation.sequence).collect();
            let started = Instant::now();
            match self.engine.forward(&self.batch, &mut sequences, &mut self.workspace, &mut watch) {
                Ok(()) if read == 0 => {
                    self.governor.ran(self.batch.len(), drafted, started.elapsed());
                    return Ok(());
                }
                Err(ModelError::KvFull { .. }) if self.make_room() => {}
                outcome => return outcome,
            }
        }
    }

    /// Texts that are only kept make room for those that are under way; whether there is more of it now.
    fn make_room(&mut self) -> bool {
        self.prefixes.forget_one() || self.saved(Duration::MAX)
    }

    /// What follows from a step: copies, tokens, ends.
    fn advance(&mut self, shares: &[Share]) {
        let mut logits = 0;
        for share in shares {
            let wanted = self.active[share.index].wanted_logits();
            self.advance_one(logits, *share);
            logits += wanted;
        }
        self.end_all_that_are_over();
    }

    fn advance_one(&mut self, logits: usize, share: Share) {
        let conversation = &mut self.active[share.index];
        let reading = conversation.is_reading();
        if reading {
            self.app.metrics.read_tokens.add(share.rows as u64);
        }
        let len = conversation.sequence.len();
        let copy = conversation.takes_copy()
            || (reading && (len.is_multiple_of(COPY_EVERY) || conversation.pending().is_empty()));
        if copy {
            self.prefixes.keep(conversation.sequence.fork());
        }
        if conversation.pending().is_empty() {
            let (made, drafts) = (conversation.made(), conversation.draft_stats());
            conversation.advance(|row| self.workspace.logits(logits + row), self.engine.end_ids());
            let drafts = conversation.draft_stats().since(&drafts);
            self.app.metrics.made_tokens.add((conversation.made() - made) as u64);
            self.app.metrics.drafted.add(drafts.drafted);
            self.app.metrics.accepted.add(drafts.accepted);
        }
        self.give_back_pages();
    }

    fn end_all_that_are_over(&mut self) {
        for index in (0..self.active.len()).rev() {
            if self.active[index].is_over {
                self.end(index);
            }
        }
    }

    /// Texts that are kept take no pages beyond those that were planned.
    fn give_back_pages(&mut self) {
        while self.engine.kv_pages().0 > self.engine.planned_pages() && self.prefixes.forget_one() {}
    }
}

/// Adds the next rows of a prompt to a batch in which its text has that index.
fn add_piece(batch: &mut Batch, sequence: usize, conversation: &Conversation, rows: usize) {
    let (rows, rest) = conversation.pending().split_at(rows);
    for (i, &token) in rows.iter().enumerate() {
        match rest.is_empty() && i + 1 == rows.len() {
            true => drop(batch.push_with_logits(sequence, token)),
            false => batch.push(sequence, token),
        }
    }
}

/// What is told of a failure.
fn failure(error: &ModelError) -> Failure {
    Failure::Model(without_folders(error))
}

/// Ends a step as soon as somebody whose prompt is read has gone, or the server's time is over.
struct Watch<'a> {
    readers: Vec<Sender<Event>>,
    app: &'a App,
}

impl Observer for Watch<'_> {
    fn progress(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        let gone = self.readers.iter().any(Sender::is_closed) || (!self.readers.is_empty() && self.app.is_over());
        if gone { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
