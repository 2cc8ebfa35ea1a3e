//! The conversations that are under way, and the steps that take them forward.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use st_model::{Batch, BatchKind, Engine, Governor, ModelError, Observer, Planned, Sequence, Workspace};
use tokio::sync::mpsc::Sender;

use super::kept::Kept;
use crate::app::App;
use crate::conversation::Conversation;
use crate::disk::Disk;
use crate::failure::without_folders;
use crate::job::{Ending, Event, Failure};
use crate::log::{Record, What};
use crate::queue::Waiting;

/// Who takes nothing for so long, while others wait for the place, is taken for gone.
const PATIENCE: Duration = Duration::from_secs(30);
/// Rows of prompts beside which answers' experts are still worth keeping.
pub(super) const FEW: usize = 8;
/// Copies of a text under way are kept at such distances, for models that cannot be cut back anywhere.
const COPY_EVERY: usize = 1024;

/// The conversations, and what runs them.
pub(super) struct Steps<'a> {
    pub(super) app: &'a App,
    pub(super) engine: Arc<Engine>,
    pub(super) workspace: Workspace,
    batch: Batch,
    pub(super) active: Vec<Conversation>,
    pub(super) kept: Kept<'a>,
    /// What steps cost, and so how many tokens are worth being drafted.
    governor: Governor,
    /// Whose prompt is read next.
    pub(super) turn: usize,
    /// The latest step was given up for somebody who had gone; the next reads no prompts, so that answers go on whatever happens.
    pub(super) gave_up: bool,
}

/// A conversation's part of a step.
#[derive(Clone, Copy)]
pub(super) struct Share {
    pub(super) index: usize,
    pub(super) rows: usize,
}

impl<'a> Steps<'a> {
    /// Nothing to do yet.
    ///
    /// # Errors
    /// Where buffers cannot be allocated.
    pub(super) fn new(app: &'a App, engine: Arc<Engine>, disk: Option<Disk>) -> Result<Self, ModelError> {
        let workspace = engine.workspace()?;
        let kept = Kept::new(app, Arc::clone(&engine), disk);
        let (batch, active, governor) = (Batch::default(), Vec::new(), Governor::default());
        Ok(Self { app, engine, workspace, batch, active, kept, governor, turn: 0, gave_up: false })
    }

    /// Begins a conversation with what memory has of its prompt.
    pub(super) fn begin(&mut self, waiting: Waiting) {
        let hit = self.kept.find(&waiting.job.prompt, &self.active);
        let conversation = Conversation::new(waiting, hit, &self.engine, self.app.settings.draft);
        self.app.metrics.prompt_tokens.add(conversation.prompt().len() as u64);
        self.app.metrics.cached_tokens.add(conversation.cached() as u64);
        self.app.metrics.prefix_hits.add(u64::from(conversation.cached() > 0));
        self.active.push(conversation);
    }

    /// Ends what nobody waits for.
    pub(super) fn drop_gone(&mut self) {
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
    pub(super) fn end(&mut self, index: usize) {
        let conversation = self.active.remove(index);
        let otherwise = match (conversation.has_failed, conversation.ended) {
            (true, _) => Some("failed"),
            (false, None) => Some("gone"),
            (false, Some(_)) => None,
        };
        let finished = conversation.ended.unwrap_or_else(|| conversation.finished(Ending::Length));
        self.app.log.tell(Record::answer(&finished, otherwise));
        self.app.queue.leave(conversation.age());
        self.kept.keep(conversation.sequence);
        self.kept.give_back_pages();
    }

    /// The next token of every answer whose reader has room for it, and what is run after it: what has to follow, `along` tokens of that
    /// for all at most, or drafts where those may be.
    pub(super) fn answers(&mut self, along: usize, takes_drafts: bool) -> Vec<Share> {
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
    pub(super) fn prompts(&mut self, mut room: usize) -> Vec<Share> {
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

    /// Runs one step.
    pub(super) fn step(&mut self, shares: &[Share]) {
        let started = Instant::now();
        let outcome = self.forward(shares);
        self.settle(shares, outcome);
        self.app.metrics.steps.add(1);
        self.app.metrics.busy.add_time(started.elapsed());
    }

    /// What follows from a step. Where it failed, each conversation is run alone, so that nobody fails for another.
    pub(super) fn settle(&mut self, shares: &[Share], outcome: Result<(), ModelError>) {
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
                Err(ModelError::KvFull { .. }) if self.kept.make_room() => {}
                outcome => return outcome,
            }
        }
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
            self.kept.keep(conversation.sequence.fork());
        }
        if conversation.pending().is_empty() {
            let (made, drafts) = (conversation.made(), conversation.draft_stats());
            conversation.advance(|row| self.workspace.logits(logits + row), self.engine.end_ids());
            let drafts = conversation.draft_stats().since(&drafts);
            self.app.metrics.made_tokens.add((conversation.made() - made) as u64);
            self.app.metrics.drafted.add(drafts.drafted);
            self.app.metrics.accepted.add(drafts.accepted);
        }
        self.kept.give_back_pages();
    }

    pub(super) fn end_all_that_are_over(&mut self) {
        for index in (0..self.active.len()).rev() {
            if self.active[index].is_over {
                self.end(index);
            }
        }
    }
}

/// Adds the next rows of a prompt to a batch in which its text has that index.
pub(super) fn add_piece(batch: &mut Batch, sequence: usize, conversation: &Conversation, rows: usize) {
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
