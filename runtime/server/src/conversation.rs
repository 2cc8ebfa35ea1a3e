//! One answer under way: its text, what of it was run, and whom it is for.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Instant;

use st_model::sampler::Sampler;
use st_model::{
    Answer, Constraint, DraftLimit, DraftStats, Drafts, Engine, FinishReason, Governor, Logprobs, ModelError, Planned,
    Proven, Sequence, Settings,
};
use tokio::sync::mpsc::Sender;

use crate::job::{Ending, Event, Failure, Finished, Piece, Proof, Token};
use crate::prefix::Hit;
use crate::queue::Waiting;

/// Events that a conversation sends in one step, at most: its beginning, a piece, its proof, its end.
const EVENTS_A_STEP: usize = 4;

/// An answer under way.
pub(crate) struct Conversation {
    /// The prompt and the answer's tokens that are to be run.
    text: Vec<u32>,
    prompt: usize,
    /// Tokens of the prompt that were there.
    cached: usize,
    pub(crate) sequence: Sequence,
    answer: Answer,
    sampler: Sampler,
    drafts: Drafts,
    logprobs: Option<usize>,
    /// How the answer is made, where it is to be proven.
    settings: Option<Box<Settings>>,
    events: Sender<Event>,
    /// Lengths at which others will want a copy.
    copies: BTreeSet<usize>,
    submitted: Instant,
    admitted: Instant,
    began: Option<Instant>,
    /// Since when its reader takes nothing.
    pub(crate) stalled: Option<Instant>,
    /// Whether the answer has ended.
    pub(crate) is_over: bool,
    pub(crate) has_failed: bool,
    /// How it ended, once it has.
    pub(crate) ended: Option<Finished>,
}

impl Conversation {
    /// A job that begins, with what others have run of its prompt.
    pub(crate) fn new(waiting: Waiting, hit: Hit, engine: &std::sync::Arc<Engine>, draft: DraftLimit) -> Self {
        let Waiting { job, events, since } = waiting;
        let room = engine.ctx().saturating_sub(job.prompt.len());
        let sequence = hit.sequence.unwrap_or_else(|| engine.sequence());
        let constraint = job.grammar.map(|grammar| Box::new(grammar.constraint()) as Box<dyn Constraint>);
        let mut conversation = Self {
            prompt: job.prompt.len(),
            text: job.prompt,
            cached: sequence.len(),
            sequence,
            answer: Answer::new(engine, &job.limits, room).within(constraint),
            sampler: job.sampler,
            drafts: Drafts::new(draft),
            logprobs: job.logprobs,
            settings: job.settings,
            events,
            copies: BTreeSet::new(),
            submitted: since,
            admitted: Instant::now(),
            began: None,
            stalled: None,
            is_over: false,
            has_failed: false,
            ended: None,
        };
        conversation.sampler.begin(&conversation.text);
        conversation.drafts.begin(&conversation.text);
        conversation.copy_at(hit.parts_at);
        conversation
    }

    /// Somebody else's text goes along with this one for `len` tokens: a copy of that is wanted.
    pub(crate) fn copy_at(&mut self, len: usize) {
        // The end of the prompt is kept anyway, and can be cut by a token.
        if len > self.sequence.len() && len + 1 < self.prompt {
            self.copies.insert(len);
        }
    }

    /// Tokens of the prompt, or the latest of the answer, that are to be run.
    pub(crate) fn pending(&self) -> &[u32] {
        self.text.get(self.sequence.len()..).unwrap_or_default()
    }

    /// Decides what is run after the latest token of the answer, in a pass of which so much is `planned`.
    pub(crate) fn plan(&mut self, governor: &Governor, planned: &Planned) -> Result<(), ModelError> {
        self.drafts.plan(&mut self.answer, governor, planned)
    }

    /// What that is, the tokens that it is expected to make, and from which row on logits are wanted; row 0 is that of the latest token.
    pub(crate) fn ahead(&self) -> (&[u32], f64, usize) {
        let (ahead, first) = self.drafts.ahead();
        (ahead, self.drafts.expected(), if self.tells_logprobs() { 0 } else { first })
    }

    /// Drafts among them.
    pub(crate) fn drafted(&self) -> usize {
        let (ahead, certain) = self.drafts.ahead();
        ahead.len() - certain
    }

    /// Rows that have run and whose logits are there.
    pub(crate) fn wanted_logits(&self) -> usize {
        let (ahead, _, first) = self.ahead();
        if self.is_reading() { usize::from(self.pending().is_empty()) } else { 1 + ahead.len() - first }
    }

    /// Whether somebody wants to know how likely each token was.
    pub(crate) fn tells_logprobs(&self) -> bool {
        self.logprobs.is_some()
    }

    /// What became of its drafts.
    pub(crate) fn draft_stats(&self) -> DraftStats {
        self.drafts.stats()
    }

    /// The prompt.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.text[..self.prompt]
    }

    /// Whether the prompt is still being read.
    pub(crate) fn is_reading(&self) -> bool {
        self.began.is_none()
    }

    /// Rows of the prompt in a step that has `room` for them: up to where a copy is wanted.
    pub(crate) fn rows(&self, room: usize) -> usize {
        let len = self.sequence.len();
        let copy = self.copies.iter().find(|&&at| at > len).map_or(usize::MAX, |at| at - len);
        self.pending().len().min(room).min(copy)
    }

    /// Whether a copy is wanted of the text as it stands.
    pub(crate) fn takes_copy(&mut self) -> bool {
        self.copies.remove(&self.sequence.len())
    }

    /// Whether nobody waits for the answer any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    /// Who tells whether anybody still waits.
    pub(crate) fn reader(&self) -> Sender<Event> {
        self.events.clone()
    }

    /// Whether the reader has taken so much that a step can be told of.
    pub(crate) fn has_room(&self) -> bool {
        self.events.capacity() >= EVENTS_A_STEP
    }

    /// How long it has been in the engine's hands.
    pub(crate) fn age(&self) -> std::time::Duration {
        self.admitted.elapsed()
    }

    /// Tokens of the answer so far.
    pub(crate) fn made(&self) -> usize {
        self.answer.ids().len()
    }

    /// Tokens of the prompt that were run already when it began.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// Chooses the next tokens by the logits of the rows that were run, as [`Drafts::settle`] has them, and tells of them.
    pub(crate) fn advance<'l>(&mut self, logits: impl Fn(usize) -> &'l [f32], end_ids: &[u32]) {
        if self.began.is_none() {
            self.began = Some(Instant::now());
            self.send(Event::Begun);
        }
        match self.choose(logits, end_ids) {
            Ok(is_over) => self.is_over = is_over,
            Err(why) => self.fail(Failure::Model(why)),
        }
    }

    fn choose<'l>(&mut self, logits: impl Fn(usize) -> &'l [f32], end_ids: &[u32]) -> Result<bool, String> {
        let first = self.ahead().2;
        let logits = |row: usize| if row < first { &[][..] } else { logits(row - first) };
        let mut piece = Piece::default();
        let Self { answer, sampler, drafts, sequence, logprobs, text, .. } = self;
        let each = |answer: &mut Answer, logits: &[f32]| {
            let id = answer.ids().last().copied();
            if let (Some(top), Some(id)) = (*logprobs, id.filter(|id| !end_ids.contains(id))) {
                piece.tokens.push(Token { id, logprobs: Logprobs::of(logits, id, top) });
            }
            text.extend(id.filter(|_| answer.finish_reason().is_none()));
            piece.text.push_str(answer.take_text());
            ControlFlow::Continue(())
        };
        let settled = drafts.settle(answer, sampler, sequence, logits, each);
        if !piece.text.is_empty() || !piece.tokens.is_empty() {
            self.send(Event::Piece(piece));
        }
        if settled.map_err(|error| error.to_string())?.is_continue() {
            return Ok(false);
        }
        let ending = match (self.answer.stopped_by(), self.answer.finish_reason()) {
            (Some(index), _) => Ending::StopString(index),
            (None, Some(FinishReason::Stop)) => Ending::EndToken,
            (None, _) => Ending::Length,
        };
        self.finish(ending);
        Ok(true)
    }

    /// Ends the answer where it stands.
    pub(crate) fn cut_off(&mut self) {
        self.answer.finish(FinishReason::Length);
        let rest = self.answer.take_text().to_owned();
        if !rest.is_empty() {
            self.send(Event::Piece(Piece { text: rest, tokens: Vec::new() }));
        }
        self.finish(Ending::Length);
    }

    /// Ends it for want of a token.
    pub(crate) fn fail(&mut self, failure: Failure) {
        (self.is_over, self.has_failed) = (true, true);
        self.send(Event::Failed(failure));
    }

    /// What it took so far.
    pub(crate) fn finished(&self, ending: Ending) -> Finished {
        let now = Instant::now();
        let began = self.began.unwrap_or(now);
        Finished {
            ending,
            prompt: self.prompt,
            cached: self.cached,
            made: self.answer.ids().len(),
            waited: self.admitted - self.submitted,
            prompt_time: began - self.admitted,
            answer_time: now - began,
        }
    }

    fn finish(&mut self, ending: Ending) {
        let finished = self.finished(ending);
        self.ended = Some(finished);
        if let Some(settings) = self.settings.take() {
            let (prompt, seed) = (self.prompt().to_vec(), self.sampler.options().seed);
            let answer = Proven::from(&self.answer);
            self.send(Event::Proven(Box::new(Proof { prompt, settings, seed, answer })));
        }
        self.send(Event::Finished(finished));
    }

    /// There is room for what a step tells, or nobody is left to tell it to.
    fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}
