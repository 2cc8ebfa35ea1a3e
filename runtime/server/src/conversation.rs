//! One answer under way: its text, what of it was run, and whom it is for.

use std::collections::BTreeSet;
use std::time::Instant;

use st_model::sampler::Sampler;
use st_model::{Answer, Constraint, Engine, FinishReason, Logprobs, Next, Sequence};
use tokio::sync::mpsc::Sender;

use crate::job::{Ending, Event, Failure, Finished, Piece, Token};
use crate::prefix::Hit;
use crate::queue::Waiting;

/// Events that a conversation sends in one step, at most: its beginning, a piece, its end.
const EVENTS_A_STEP: usize = 3;

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
    logprobs: Option<usize>,
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
    pub(crate) fn new(waiting: Waiting, hit: Hit, engine: &std::sync::Arc<Engine>) -> Self {
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
            logprobs: job.logprobs,
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

    /// Tokens that are to be run.
    pub(crate) fn pending(&self) -> &[u32] {
        &self.text[self.sequence.len()..]
    }

    /// The prompt.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.text[..self.prompt]
    }

    /// Whether the prompt is still being read.
    pub(crate) fn is_reading(&self) -> bool {
        self.began.is_none()
    }

    /// Rows of a step that has `room` for this conversation: up to where a copy is wanted.
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

    /// Chooses the next token by the logits of the latest, and tells of it.
    pub(crate) fn advance(&mut self, logits: &[f32], end_ids: &[u32]) {
        if self.began.is_none() {
            self.began = Some(Instant::now());
            self.send(Event::Begun);
        }
        match self.choose(logits, end_ids) {
            Ok(is_over) => self.is_over = is_over,
            Err(why) => self.fail(Failure::Model(why)),
        }
    }

    fn choose(&mut self, logits: &[f32], end_ids: &[u32]) -> Result<bool, String> {
        let made = self.answer.ids().len();
        let mut next = self.answer.next(logits, &mut self.sampler).map_err(|error| error.to_string())?;
        let chosen = self.answer.ids().get(made).copied();
        while let Next::Token(id) = next {
            self.text.push(id);
            if self.logprobs.is_some() {
                break;
            }
            // What has to follow is run along, unless somebody wants to know how likely it was.
            match self.answer.next_forced(&mut self.sampler).map_err(|error| error.to_string())? {
                Some(forced) => next = forced,
                None => break,
            }
        }
        let mut piece = Piece { text: self.answer.take_text().to_owned(), tokens: Vec::new() };
        if let (Some(top), Some(id)) = (self.logprobs, chosen.filter(|id| !end_ids.contains(id))) {
            piece.tokens.push(Token { id, logprobs: Logprobs::of(logits, id, top) });
        }
        if !piece.text.is_empty() || !piece.tokens.is_empty() {
            self.send(Event::Piece(piece));
        }
        let Next::Finish(reason) = next else { return Ok(false) };
        let ending = match (self.answer.stopped_by(), reason) {
            (Some(index), _) => Ending::StopString(index),
            (None, FinishReason::Stop) => Ending::EndToken,
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
        self.send(Event::Finished(finished));
    }

    /// There is room for what a step tells, or nobody is left to tell it to.
    fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}
