//! One answer in the making: logits in, the next token out, until it ends.
//!
//! Owns when an answer ends (an end token, a stop string, the limit, the context, the caller) and the text that it makes,
//! whole characters only. It runs nothing: whoever drives it runs the tokens that it gives, alone or with others'.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::constraint::Constraint;
use crate::engine::Engine;
use crate::logits_hash::{LogitsHash, hash_logits};
use crate::sampler::{Sampler, SamplerError};
use crate::text::TextStream;

/// When an answer ends, besides the model's own end tokens.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// At most this many tokens; `None` goes on until the context is full.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Whether the logits that tokens are chosen by are hashed, for a [`Receipt`](crate::Receipt).
    pub hash_logits: bool,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token, or a stop string.
    Stop,
    /// The limit of tokens, or the end of the context.
    Length,
    /// The caller asked for it.
    Cancelled,
    /// The model failed; what was made before is whole.
    Error,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// This token is to be run; its logits are wanted.
    Token(u32),
    /// The answer is over.
    Finish(FinishReason),
}

/// An answer as far as it is made.
#[derive(Debug)]
pub struct Answer {
    engine: Arc<Engine>,
    stream: TextStream,
    max_tokens: usize,
    /// Tokens that can still be run.
    room: usize,
    /// Place of the answer's first token in the text.
    start: usize,
    ids: Vec<u32>,
    text: String,
    /// What of the text was taken.
    taken: usize,
    finish_reason: Option<FinishReason>,
    /// The stop string that ended it.
    stopped_by: Option<usize>,
    constraint: Option<Box<dyn Constraint>>,
    /// Tokens that the constraint leaves no choice about, not yet part of the answer.
    forced: VecDeque<u32>,
    /// Whether the constraint was asked for them since a token was chosen.
    asked: bool,
    /// Hashes of the logits, where they are wanted.
    hashes: Option<Vec<LogitsHash>>,
}

impl Answer {
    /// An answer of the model of `engine`, where the context has room for `room` tokens after the prompt.
    pub fn new(engine: &Arc<Engine>, options: &GenerateOptions, room: usize) -> Self {
        let max_tokens = options.max_tokens.unwrap_or(usize::MAX);
        Self {
            engine: Arc::clone(engine),
            stream: TextStream::new(options.stop.clone()),
            max_tokens,
            room,
            start: engine.ctx().saturating_sub(room),
            ids: Vec::with_capacity(max_tokens.min(256).min(room)),
            text: String::new(),
            taken: 0,
            finish_reason: None,
            stopped_by: None,
            constraint: None,
            forced: VecDeque::new(),
            asked: false,
            hashes: options.hash_logits.then(Vec::new),
        }
    }

    /// The same, made to fit `constraint`.
    #[must_use]
    pub fn within(mut self, constraint: Option<Box<dyn Constraint>>) -> Self {
        self.constraint = constraint;
        self
    }

    /// The next token: the one that must come, or one chosen by the logits of the latest (at first, of the prompt's last). Where a
    /// token must come, `logits` are not looked at.
    ///
    /// # Errors
    /// Where `sampler` finds none, or the constraint does not let the answer go on; the answer stays as it is.
    pub fn next(&mut self, logits: &[f32], sampler: &mut Sampler) -> Result<Next, SamplerError> {
        if let Some(reason) = self.finish_reason {
            return Ok(Next::Finish(reason));
        }
        if self.ids.len() >= self.max_tokens {
            return Ok(Next::Finish(self.finish(FinishReason::Length)));
        }
        self.ask()?;
        if let Some(id) = self.forced.pop_front() {
            return Ok(self.take(id, sampler, None));
        }
        let position = self.start + self.ids.len();
        let id = match &mut self.constraint {
            None => sampler.sample(logits, position)?,
            Some(constraint) => {
                let allowed = constraint.allowed().map_err(SamplerError::Constraint)?;
                sampler.sample_among(logits, position, Some(allowed))?
            }
        };
        let next = self.take(id, sampler, Some(logits));
        if let (Next::Token(id), Some(constraint)) = (next, &mut self.constraint) {
            constraint.accept(id).map_err(SamplerError::Constraint)?;
            self.asked = false;
        }
        Ok(next)
    }

    /// Tokens that must come next, `most` at most, so that whoever runs them along with the latest need not await its logits; none
    /// that would end the answer.
    ///
    /// # Errors
    /// Where the constraint does not let the answer go on.
    pub fn certain(&mut self, most: usize) -> Result<&[u32], SamplerError> {
        self.ask()?;
        let room = self.room_ahead().min(most);
        let forced = self.forced.make_contiguous();
        let end = forced.iter().position(|id| self.engine.end_ids().contains(id)).unwrap_or(forced.len());
        Ok(&forced[..end.min(room)])
    }

    /// How many tokens after the latest can be run and others still follow them.
    pub fn room_ahead(&self) -> usize {
        let made = self.ids.len();
        self.room.saturating_sub(made).min(self.max_tokens.saturating_sub(made + 1))
    }

    /// Asks the constraint what must come, where that was not done since a token was chosen.
    fn ask(&mut self) -> Result<(), SamplerError> {
        if let (false, Some(constraint)) = (self.asked, &mut self.constraint) {
            self.forced.extend(constraint.forced().map_err(SamplerError::Constraint)?);
            self.asked = true;
        }
        Ok(())
    }

    /// Makes a token part of the answer, which `logits` left a choice of.
    fn take(&mut self, id: u32, sampler: &mut Sampler, logits: Option<&[f32]>) -> Next {
        sampler.accept(id);
        self.ids.push(id);
        if let Some(hashes) = &mut self.hashes {
            hashes.push(logits.map(hash_logits));
        }
        if self.engine.end_ids().contains(&id) {
            return Next::Finish(self.finish(FinishReason::Stop));
        }
        let tokenizer = self.engine.tokenizer();
        let step = self.stream.push(tokenizer.map_or(&[][..], |tokenizer| tokenizer.visible_bytes(id)));
        self.text.push_str(step.text);
        self.stopped_by = step.stopped;
        if step.stopped.is_some() {
            return Next::Finish(self.finish(FinishReason::Stop));
        }
        if self.ids.len() > self.room || self.ids.len() >= self.max_tokens {
            return Next::Finish(self.finish(FinishReason::Length));
        }
        Next::Token(id)
    }

    /// Ends it, if it has not ended: what was held back for a stop string that might have come is text now. Returns why it
    /// ended.
    pub fn finish(&mut self, reason: FinishReason) -> FinishReason {
        if self.finish_reason.is_none() {
            self.text.push_str(self.stream.finish().text);
        }
        *self.finish_reason.get_or_insert(reason)
    }

    /// The text that was added since this was called last; empty where a character is still incomplete, or a stop string may
    /// be coming.
    pub fn take_text(&mut self) -> &str {
        let from = std::mem::replace(&mut self.taken, self.text.len());
        &self.text[from..]
    }

    /// The text, without end tokens and stop strings; empty where the file has no tokenizer.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The token ids made, an end token included.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// For each token a hash of the logits that it was chosen by, `None` where it was forced; nothing where
    /// [`GenerateOptions::hash_logits`] does not ask for them.
    pub fn logits_hashes(&self) -> &[LogitsHash] {
        self.hashes.as_deref().unwrap_or_default()
    }

    /// Why it ended; `None` while it goes on.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// The stop string that ended it, as an index into the list of the options.
    pub fn stopped_by(&self) -> Option<usize> {
        self.stopped_by
    }

    /// Text, ids and hashes of logits, taken out.
    pub(crate) fn into_parts(self) -> (String, Vec<u32>, Vec<LogitsHash>) {
        (self.text, self.ids, self.hashes.unwrap_or_default())
    }
}
