//! Logits to the next token.
//!
//! Owns the choice and its randomness: biases, penalties, what is allowed at all, then greedy at temperature 0, else top-k,
//! top-p, min-p, temperature and a draw, in llama.cpp's order, so that the same settings mean the same there and here. A draw
//! depends on the seed and the token's place in the text and on nothing else: equal seeds give equal draws on every machine,
//! however often a token is chosen and whatever was chosen before. Refuses logits that are not numbers. Nothing is allocated
//! per token once the buffers have grown.

use std::collections::HashMap;

use crate::draw::{Candidate, argmax, best_first, first_not_finite, keep_top_k, keep_top_p, unit};

/// How many of the latest tokens the repeat penalty looks back on.
pub const REPEAT_WINDOW: usize = 64;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits before the draw; 0 is greedy. Finite, not negative.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens up to this total probability, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest one, in [0, 1]; 0 drops none.
    pub min_p: f32,
    /// Makes the last [`REPEAT_WINDOW`] tokens less likely where above 1; 1 does nothing. Finite, positive.
    pub repeat_penalty: f32,
    /// Taken from the logit of a token once for each time that the answer has it. Finite.
    pub frequency_penalty: f32,
    /// Taken from the logit of every token that the answer has. Finite.
    pub presence_penalty: f32,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Default for SamplerOptions {
    /// What most programs of this kind choose: temperature 0.8 among the 40 likeliest, top-p 0.95, min-p 0.05, no penalty. The seed
    /// is 0, the same text every time.
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, ..Self::greedy() }
    }
}

impl SamplerOptions {
    /// Always the likeliest token, no penalty: the same text every time.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

/// Why no token can be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplerError {
    /// A setting outside its range.
    #[error("{name} is {got}, expected {expected}")]
    Option {
        /// The setting.
        name: &'static str,
        /// Its value.
        got: f32,
        /// Its range.
        expected: &'static str,
    },
    /// The model computed something that is not a finite number.
    #[error("the logit of token {id} is {got}: the model's weights or its file are damaged")]
    NotFinite {
        /// The first token concerned.
        id: usize,
        /// Its logit.
        got: f32,
    },
    /// There is nothing to choose from.
    #[error("there is no token to choose from")]
    Empty,
    /// What the answer must fit does not let it go on.
    #[error("the answer cannot go on as its grammar asks: {0}")]
    Constraint(String),
}

/// Tokens that may be chosen, one bit each: token `id` is bit `id % 32` of word `id / 32`. What is beyond its end may not.
pub type Allowed<'a> = &'a [u32];

/// Chooses tokens; remembers the recent ones.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    /// What is added to logits.
    bias: Vec<(u32, f32)>,
    /// The latest tokens, a ring once full.
    recent: Vec<u32>,
    next_recent: usize,
    /// How often the answer has each token, where somebody wants to know.
    counts: HashMap<u32, u32>,
    /// Logits with all that changes them.
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler before a text.
    ///
    /// # Errors
    /// Where an option is outside its range.
    pub fn new(options: SamplerOptions) -> Result<Self, SamplerError> {
        let checks = [
            ("temperature", options.temperature, "a number from 0", options.temperature >= 0.0),
            ("top-p", options.top_p, "above 0 and at most 1", options.top_p > 0.0 && options.top_p <= 1.0),
            ("min-p", options.min_p, "from 0 to 1", (0.0..=1.0).contains(&options.min_p)),
            ("repeat penalty", options.repeat_penalty, "a number above 0", options.repeat_penalty > 0.0),
            ("frequency penalty", options.frequency_penalty, "a number", true),
            ("presence penalty", options.presence_penalty, "a number", true),
        ];
        for (name, got, expected, holds) in checks {
            if !holds || !got.is_finite() {
                return Err(SamplerError::Option { name, got, expected });
            }
        }
        Ok(Self {
            options,
            bias: Vec::new(),
            recent: Vec::with_capacity(REPEAT_WINDOW),
            next_recent: 0,
            counts: HashMap::new(),
            adjusted: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// The same with `bias` added to the logits of some tokens, each before anything else.
    ///
    /// # Errors
    /// Where a bias is no finite number.
    pub fn with_bias(mut self, bias: Vec<(u32, f32)>) -> Result<Self, SamplerError> {
        if let Some(&(_, got)) = bias.iter().find(|(_, bias)| !bias.is_finite()) {
            return Err(SamplerError::Option { name: "logit bias", got, expected: "a number" });
        }
        self.bias = bias;
        Ok(self)
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// What is added to logits.
    pub fn bias(&self) -> &[(u32, f32)] {
        &self.bias
    }

    /// Begins an answer that goes on with `text`: the penalties know the end of it, and nothing of other answers.
    pub fn begin(&mut self, text: &[u32]) {
        self.counts.clear();
        self.recent.clear();
        self.recent.extend_from_slice(&text[text.len().saturating_sub(REPEAT_WINDOW)..]);
        self.next_recent = 0;
    }

    /// Takes note of a token that is now part of the answer: the penalties count it.
    pub fn accept(&mut self, id: u32) {
        if self.recent.len() < REPEAT_WINDOW {
            self.recent.push(id);
        } else {
            self.recent[self.next_recent] = id;
            self.next_recent = (self.next_recent + 1) % REPEAT_WINDOW;
        }
        if self.counts_tokens() {
            *self.counts.entry(id).or_default() += 1;
        }
    }

    fn counts_tokens(&self) -> bool {
        self.options.frequency_penalty != 0.0 || self.options.presence_penalty != 0.0
    }

    /// The token of place `position` in the text, given one logit per token of the vocabulary. Does not
    /// [`accept`](Sampler::accept) it.
    ///
    /// # Errors
    /// Where `logits` is empty or holds NaN or infinity; -inf is a token that is not to be chosen.
    pub fn sample(&mut self, logits: &[f32], position: usize) -> Result<u32, SamplerError> {
        self.sample_among(logits, position, None)
    }

    /// [`Sampler::sample`] among some tokens alone.
    ///
    /// # Errors
    /// As [`Sampler::sample`], and where no token is allowed.
    pub fn sample_among(
        &mut self,
        logits: &[f32],
        position: usize,
        allowed: Option<Allowed<'_>>,
    ) -> Result<u32, SamplerError> {
        if let Some((id, got)) = first_not_finite(logits) {
            return Err(SamplerError::NotFinite { id, got });
        }
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let logits = match self.adjusts() || allowed.is_some() {
            false => logits,
            true => {
                adjusted.clear();
                adjusted.extend_from_slice(logits);
                self.adjust(&mut adjusted, allowed);
                &adjusted
            }
        };
        let chosen = match self.options.temperature {
            0.0 => argmax(logits),
            _ => self.draw(logits, position),
        };
        self.adjusted = adjusted;
        chosen.ok_or(SamplerError::Empty)
    }

    /// Whether anything changes logits.
    fn adjusts(&self) -> bool {
        self.options.repeat_penalty != 1.0 || !self.bias.is_empty() || !self.counts.is_empty()
    }

    fn adjust(&self, logits: &mut [f32], allowed: Option<Allowed<'_>>) {
        // A logit stays a number, however far it is moved.
        let moved = |logit: &mut f32, by: f32| *logit = (*logit + by).clamp(f32::MIN, f32::MAX);
        for &(id, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                moved(logit, bias);
            }
        }
        if self.options.repeat_penalty != 1.0 {
            self.penalize(logits, self.options.repeat_penalty);
        }
        for (&id, &count) in &self.counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                moved(logit, -(self.options.frequency_penalty * count as f32));
                moved(logit, -self.options.presence_penalty);
            }
        }
        if let Some(allowed) = allowed {
            for (word, logits) in logits.chunks_mut(32).enumerate() {
                let bits = allowed.get(word).copied().unwrap_or(0);
                if bits != u32::MAX {
                    let logits = logits.iter_mut().enumerate().filter(|(bit, _)| bits >> bit & 1 == 0);
                    logits.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
    }

    fn penalize(&self, logits: &mut [f32], penalty: f32) {
        for (i, &id) in self.recent.iter().enumerate() {
            let counted = self.recent[..i].contains(&id);
            if let Some(logit) = logits.get_mut(id as usize).filter(|_| !counted) {
                let less = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                // A logit stays a number, however far the penalty moves it.
                *logit = less.clamp(f32::MIN, f32::MAX);
            }
        }
    }

    fn draw(&mut self, logits: &[f32], position: usize) -> Option<u32> {
        let k = match self.options.top_k {
            0 => logits.len(),
            k => k.min(logits.len()),
        };
        keep_top_k(logits, k, &mut self.candidates);
        let candidates = &mut self.candidates;
        let best = candidates.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0f64;
        for candidate in candidates.iter_mut() {
            candidate.weight = exp(candidate.logit - best);
            total += f64::from(candidate.weight);
        }
        if self.options.top_p < 1.0 {
            keep_top_p(candidates, f64::from(self.options.top_p) * total);
        }
        let min_p = self.options.min_p;
        candidates.retain(|c| c.weight >= min_p);

        let mut total = 0.0f64;
        for candidate in candidates.iter_mut() {
            candidate.weight = exp((candidate.logit - best) / self.options.temperature);
            total += f64::from(candidate.weight);
        }
        // Walking in a fixed order keeps the draw the same however the candidates were selected.
        candidates.sort_unstable_by(best_first);
        let target = unit(self.options.seed, position as u64) * total;
        let mut reached = 0.0f64;
        for candidate in candidates.iter() {
            reached += f64::from(candidate.weight);
            if reached > target {
                return Some(candidate.id);
            }
        }
        candidates.last().map(|c| c.id)
    }
}

/// e^x, computed in 64 bits, so that what mathematical libraries differ by is rounded away.
fn exp(x: f32) -> f32 {
    f64::from(x).exp() as f32
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
