//! The engine's thread: one step after the other, each with rows of all conversations.
//!
//! A step is the next token of every answer, or a piece of the prompts that are read, in turn: nobody who is being answered waits
//! for more than one piece, and where that takes long, not for its end (`between`). What a row computes does not depend on the rows
//! beside it, so neither does any answer.

mod between;
mod kept;
mod steps;

use std::sync::Arc;
use std::time::Duration;

use st_model::{Engine, ModelError, Workspace};

use self::kept::A_WHILE;
use self::steps::{FEW, Steps};
use crate::app::App;
use crate::conversation::Conversation;
use crate::disk::Disk;
use crate::job::Job;
use crate::piece::Pieces;
use crate::prefix::common;
use crate::slots::Slot;

/// Rows of a step in which nobody is being answered: large enough to be fast, small enough that who comes next is soon served.
const ALONE: usize = 512;
/// A prompt that shares at least so many tokens with one that is being read waits for them.
const WORTH_WAITING: usize = 32;

/// Decides what is run next: who begins, and what a step is made of.
pub(crate) struct Scheduler<'a> {
    app: &'a App,
    steps: Steps<'a>,
    /// For answers between the layers of a prompt.
    small: Workspace,
    pieces: Pieces,
}

impl<'a> Scheduler<'a> {
    /// Nothing to do yet; texts are saved on `disk`, where there is one.
    ///
    /// # Errors
    /// Where buffers cannot be allocated.
    pub(crate) fn new(app: &'a App, engine: Arc<Engine>, disk: Option<Disk>) -> Result<Self, ModelError> {
        let small = engine.workspace()?;
        let (steps, pieces) = (Steps::new(app, engine, disk)?, Pieces::new(app.settings.prompt_piece));
        Ok(Self { app, steps, small, pieces })
    }

    /// Answers until the server ends.
    pub(crate) fn run(mut self) {
        loop {
            let steps = &mut self.steps;
            steps.drop_gone();
            while let Some(waiting) = steps.kept.restored(&steps.active) {
                steps.begin(waiting);
            }
            steps.end_all_that_are_over();
            if self.app.is_over() {
                while let Some(waiting) = steps.kept.give_up() {
                    steps.begin(waiting);
                }
                steps.active.iter_mut().for_each(Conversation::cut_off);
                (0..steps.active.len()).rev().for_each(|index| steps.end(index));
            }
            self.admit();
            self.publish();
            let steps = &mut self.steps;
            if steps.active.is_empty() && steps.kept.restoring().len() > 0 {
                std::thread::sleep(A_WHILE);
                continue;
            }
            if steps.active.is_empty() {
                // There is time to save what is kept.
                match (steps.kept.save_one(), self.app.is_ending()) {
                    (true, _) => {}
                    (false, true) => return,
                    (false, false) => self.app.queue.wait(Duration::from_millis(100)),
                }
                continue;
            }
            self.next_step();
        }
    }

    /// Begins conversations as long as there is room.
    fn admit(&mut self) {
        while self.steps.active.len() + self.steps.kept.restoring().len() < self.app.settings.parallel {
            let (active, kept) = (&mut self.steps.active, &self.steps.kept);
            // What another one is reading right now is not read twice.
            let may_begin = |job: &Job| {
                let least = WORTH_WAITING.max(kept.shared(&job.prompt) + 1);
                let shared = |prompt: &[u32]| common(prompt, &job.prompt).min(job.prompt.len() - 1);
                let read_by_another =
                    active.iter_mut().filter(|conversation| conversation.is_reading()).any(|conversation| {
                        let shared = shared(conversation.prompt());
                        let waits = shared >= least && shared > conversation.sequence.len();
                        waits.then(|| conversation.copy_at(shared)).is_some()
                    });
                !read_by_another && !kept.restoring().any(|prompt| shared(prompt) >= least)
            };
            let Some(waiting) = self.app.queue.take(may_begin) else { return };
            let waiting = self.steps.kept.restore(waiting, &self.steps.active);
            waiting.into_iter().for_each(|waiting| self.steps.begin(waiting));
        }
    }

    fn publish(&self) {
        let Steps { active, kept, engine, .. } = &self.steps;
        let slot = |conversation: &Conversation| Slot {
            prompt: conversation.prompt().len(),
            cached: conversation.cached(),
            read: conversation.sequence.len().min(conversation.prompt().len()),
            made: conversation.made(),
        };
        let restored = |prompt: &[u32]| Slot { prompt: prompt.len(), cached: 0, read: 0, made: 0 };
        self.app.slots.set(active.iter().map(slot).chain(kept.restoring().map(restored)));
        let metrics = &self.app.metrics;
        metrics.kv_pages.set(engine.kv_pages().0 as u64);
        metrics.prefixes.set(kept.len() as u64);
        metrics.piece.set(self.pieces.size() as u64);
    }

    /// Runs the next step: a token of every answer, and of prompts what there is room for.
    fn next_step(&mut self) {
        let steps = &mut self.steps;
        let n = steps.active.len();
        let answers = steps.active.iter().filter(|conversation| !conversation.is_reading()).count();
        let room = steps.engine.max_rows().saturating_sub(answers);
        let piece = if answers > 0 { self.pieces.size() } else { self.pieces.size().max(ALONE) };
        let given_up = std::mem::take(&mut steps.gave_up) && answers > 0;
        let prompts = if given_up { Vec::new() } else { steps.prompts(piece.min(room)) };
        let read: usize = prompts.iter().map(|share| share.rows).sum();
        if answers > 0 && read > FEW {
            return between::read(steps, &mut self.small, &mut self.pieces, &prompts);
        }
        // What has to follow a token goes along with it, as long as nobody waits longer than for a piece of a prompt.
        let along = if n == 1 { ALONE } else { piece }.min(room.saturating_sub(read));
        let mut shares = steps.answers(along, answers == n);
        shares.extend(prompts);
        if shares.is_empty() {
            steps.end_all_that_are_over();
            // All readers are slow.
            return std::thread::sleep(Duration::from_millis(5));
        }
        steps.step(&shares);
    }
}
