//! One text that is run by itself: a sequence and a workspace of its own.
//!
//! Owns the cutting of long texts into batches. Whoever runs several sequences together drives [`Engine::forward`] itself.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use crate::answer::Answer;
use crate::batch::{Batch, BatchKind};
use crate::draft::{Draft, DraftLimit, DraftStats, Drafts, Planned};
use crate::engine::Engine;
use crate::error::ModelError;
use crate::governor::{Governor, MOST_ROWS};
use crate::observer::{Inputs, Observer};
use crate::router::Routing;
use crate::sampler::Sampler;
use crate::sequence::Sequence;
use crate::work::Work;
use crate::workspace::Workspace;

/// A text: the tokens so far, and what running more of them needs.
#[derive(Debug)]
pub struct Session {
    engine: Arc<Engine>,
    sequence: Sequence,
    workspace: Workspace,
    batch: Batch,
    /// Which of the workspace's logits are those of the token run last.
    latest: usize,
    drafts: Drafts,
    governor: Governor,
}

impl Session {
    /// An empty text.
    ///
    /// # Errors
    /// Where buffers cannot be allocated.
    pub fn new(engine: &Arc<Engine>) -> Result<Self, ModelError> {
        Ok(Self {
            engine: Arc::clone(engine),
            sequence: engine.sequence(),
            workspace: engine.workspace()?,
            batch: Batch::default(),
            latest: 0,
            drafts: Drafts::new(DraftLimit::Auto),
            governor: Governor::default(),
        })
    }

    /// The same whose answers are drafted as far as `limit` lets them; at first that is [`DraftLimit::Auto`].
    #[must_use]
    pub fn drafted(self, limit: DraftLimit) -> Self {
        Self { drafts: Drafts::new(limit), ..self }
    }

    /// The same with somebody who drafts where the text itself does not.
    #[must_use]
    pub fn drafted_by(self, draft: Box<dyn Draft>) -> Self {
        Self { drafts: self.drafts.with(draft), ..self }
    }

    /// How far its answers are drafted.
    pub fn draft_limit(&self) -> DraftLimit {
        self.drafts.limit()
    }

    /// What became of its answers' drafts.
    pub fn draft_stats(&self) -> DraftStats {
        self.drafts.stats()
    }

    /// The engine that runs it.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The tokens and their keys and values.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// The same, to be cut or exchanged.
    pub fn sequence_mut(&mut self) -> &mut Sequence {
        &mut self.sequence
    }

    /// The tokens that were run, in order.
    pub fn tokens(&self) -> &[u32] {
        self.sequence.tokens()
    }

    /// Tokens in the context.
    pub fn len(&self) -> usize {
        self.sequence.len()
    }

    /// Whether nothing was run yet.
    pub fn is_empty(&self) -> bool {
        self.sequence.is_empty()
    }

    /// Tokens that the context holds at most.
    pub fn ctx(&self) -> usize {
        self.engine.ctx()
    }

    /// What was computed so far.
    pub fn work(&self) -> Work {
        self.workspace.work()
    }

    /// What of it was computed in each layer.
    pub fn layer_work(&self) -> &[Work] {
        self.workspace.layer_work()
    }

    /// Logits of the token run last; `[n_vocab]`.
    pub fn logits(&self) -> &[f32] {
        self.workspace.logits(self.latest)
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.sequence.reset();
    }

    /// As [`Sequence::keep_prefix`].
    pub fn keep_prefix(&mut self, tokens: &[u32]) -> usize {
        self.sequence.keep_prefix(tokens)
    }

    /// Runs `tokens` after those already seen, so that [`Session::logits`] are those of the last.
    ///
    /// # Errors
    /// [`ModelError::EmptyPrompt`], [`ModelError::TokenId`] and [`ModelError::ContextFull`] before anything is run; an error
    /// of reading experts leaves the session at the last whole batch.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<(), ModelError> {
        self.run(tokens, &mut ())
    }

    /// [`Session::forward`] that `observer` follows. Its progress is told in tokens of all of `tokens`; where it breaks, or
    /// fails, the session is at its last whole batch.
    ///
    /// # Errors
    /// As [`Session::forward`], and what the observer says.
    pub fn run(&mut self, tokens: &[u32], observer: &mut dyn Observer) -> Result<(), ModelError> {
        self.each_batch(tokens, true, observer, |_, _| Ok(()))
    }

    /// An answer begins to the text as it stands.
    pub(crate) fn begin_answer(&mut self) {
        self.drafts.begin(self.sequence.tokens());
    }

    /// Chooses tokens of `answer` by the logits that are there, as [`Drafts::settle`].
    ///
    /// # Errors
    /// Where no token can be chosen.
    pub(crate) fn settle(
        &mut self,
        answer: &mut Answer,
        sampler: &mut Sampler,
        each: impl FnMut(&mut Answer, &[f32]) -> ControlFlow<()>,
    ) -> Result<ControlFlow<(), u32>, ModelError> {
        let Self { sequence, workspace, drafts, latest, .. } = self;
        let first = drafts.ahead().1;
        let logits = |row: usize| if row < first { &[][..] } else { workspace.logits(*latest + row - first) };
        Ok(drafts.settle(answer, sampler, sequence, logits, each)?)
    }

    /// Runs `token`, the latest of `answer`, and along with it what must or may follow; [`Session::settle`] comes next. Where
    /// it fails, the session is as it was.
    ///
    /// # Errors
    /// As [`Session::run`], and what drafting meets.
    pub(crate) fn run_ahead(
        &mut self,
        token: u32,
        answer: &mut Answer,
        observer: &mut dyn Observer,
    ) -> Result<(), ModelError> {
        let most_certain = Planned::alone().most_certain.min(self.engine.max_rows() - 1);
        let planned = Planned { most_certain, takes_drafts: observer.takes_drafts(), ..Planned::alone() };
        self.drafts.plan(answer, &self.governor, &planned)?;
        let (ahead, first) = self.drafts.ahead();
        let rows = 1 + ahead.len();
        self.batch.clear(match rows {
            1 => BatchKind::Decode,
            2..=MOST_ROWS => BatchKind::Verify,
            _ => BatchKind::Prompt,
        });
        for (row, &token) in std::iter::once(&token).chain(ahead).enumerate() {
            match row < first {
                true => self.batch.push(0, token),
                false => drop(self.batch.push_with_logits(0, token)),
            }
        }
        self.latest = 0;
        let (start, drafted) = (Instant::now(), ahead.len() - first);
        self.engine.forward(&self.batch, &mut [&mut self.sequence], &mut self.workspace, observer)?;
        self.governor.ran(rows, drafted, start.elapsed());
        Ok(())
    }

    /// Runs `tokens` and hands out the logits of every one: `on_logits` gets an index into `tokens` and `[n_vocab]`.
    ///
    /// # Errors
    /// As [`Session::run`], and whatever `on_logits` returns.
    pub fn run_all(
        &mut self,
        tokens: &[u32],
        observer: &mut dyn Observer,
        mut on_logits: impl FnMut(usize, &[f32]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        self.each_batch(tokens, false, observer, |session, done| {
            let rows: Vec<usize> = (0..session.batch.len()).collect();
            for rows in rows.chunks(session.engine.max_logits()) {
                session.engine.head(rows, &mut session.workspace)?;
                for (i, row) in rows.iter().enumerate() {
                    session.latest = i;
                    on_logits(done + row, session.workspace.logits(i))?;
                }
            }
            Ok(())
        })
    }

    /// Runs `tokens` batch by batch, with the logits of the very last where `last` is set, and calls `then` with the tokens
    /// before each batch that has gone through.
    fn each_batch(
        &mut self,
        tokens: &[u32],
        last: bool,
        observer: &mut dyn Observer,
        mut then: impl FnMut(&mut Self, usize) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        self.engine.check_tokens(tokens)?;
        self.engine.check_room(self.len() + tokens.len())?;
        // One token after the other is how answers are made, more at once how texts are read.
        let kind = if tokens.len() == 1 { BatchKind::Decode } else { BatchKind::Prompt };
        let mut done = 0;
        for piece in tokens.chunks(self.engine.max_rows()) {
            self.batch.clear(kind);
            let ends = done + piece.len() == tokens.len();
            let (&final_token, others) = piece.split_last().ok_or(ModelError::EmptyPrompt)?;
            others.iter().for_each(|&token| self.batch.push(0, token));
            if ends && last {
                self.latest = self.batch.push_with_logits(0, final_token);
            } else {
                self.batch.push(0, final_token);
            }
            let mut observer = Offset { observer, done, of: tokens.len() };
            let sequences = &mut [&mut self.sequence];
            self.engine.forward(&self.batch, sequences, &mut self.workspace, &mut observer)?;
            then(self, done)?;
            done += piece.len();
        }
        Ok(())
    }
}

/// An observer that is told the progress of all batches together.
struct Offset<'a> {
    observer: &'a mut dyn Observer,
    done: usize,
    of: usize,
}

impl Observer for Offset<'_> {
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        self.observer.routing(layer, batch, routing)
    }

    fn watches_neurons(&self) -> bool {
        self.observer.watches_neurons()
    }

    fn neurons(&mut self, layer: usize, expert: u32, rows: &[u32], live: &[u32]) -> io::Result<()> {
        self.observer.neurons(layer, expert, rows, live)
    }

    fn watches_inputs(&self) -> bool {
        self.observer.watches_inputs()
    }

    fn inputs(&mut self, layer: usize, of: Inputs<'_>, rows: &[f32]) -> io::Result<()> {
        self.observer.inputs(layer, of, rows)
    }

    fn residual(&mut self, layer: usize, batch: &Batch, x: &[f32]) -> io::Result<()> {
        self.observer.residual(layer, batch, x)
    }

    fn progress(&mut self, done: usize, _: usize) -> ControlFlow<()> {
        self.observer.progress(self.done + done, self.of)
    }
}
