//! A smaller model that drafts for a larger one.
//!
//! Owns that it has read what the other has, a piece at a time, and that it draws with the other's luck: the same seed and place give both
//! the same random number, so that two models that agree say the same at any temperature.

use std::sync::Arc;

use crate::draft::Draft;
use crate::engine::Engine;
use crate::error::ModelError;
use crate::sampler::{Sampler, SamplerOptions};
use crate::session::Session;

/// Tokens of a text that are read before one token of the other model; it drafts once it has read all.
const PIECE: usize = 256;

/// A model that drafts.
#[derive(Debug)]
pub struct SmallerModel {
    session: Session,
    sampler: Sampler,
}

impl SmallerModel {
    /// `engine` as one who drafts for `larger`, whose tokens are chosen by `options`.
    ///
    /// # Errors
    /// [`ModelError::Vocabulary`] where the two have different tokens; where buffers cannot be allocated; options out of range.
    pub fn new(engine: &Arc<Engine>, larger: &Engine, options: SamplerOptions) -> Result<Self, ModelError> {
        let n = engine.n_vocab();
        let same = match (engine.tokenizer(), larger.tokenizer()) {
            (Some(a), Some(b)) => (0..n as u32).all(|id| a.visible_bytes(id) == b.visible_bytes(id)),
            (None, None) => true,
            _ => false,
        };
        if !same || n != larger.n_vocab() {
            return Err(ModelError::Vocabulary);
        }
        Ok(Self { session: Session::new(engine)?, sampler: Sampler::new(options)? })
    }
}

impl Draft for SmallerModel {
    fn propose(&mut self, text: &[u32], most: usize, out: &mut Vec<u32>) -> Result<(), ModelError> {
        if text.len() + most > self.session.ctx() {
            return Ok(());
        }
        let kept = self.session.keep_prefix(text);
        let unread = &text[kept..];
        if unread.len() > PIECE {
            return self.session.forward(&unread[..PIECE]);
        }
        self.session.forward(unread)?;
        self.sampler.begin(text);
        for place in text.len()..text.len() + most {
            let id = self.sampler.sample(self.session.logits(), place)?;
            self.sampler.accept(id);
            out.push(id);
            if place + 1 < text.len() + most {
                self.session.forward(&[id])?;
            }
        }
        Ok(())
    }
}
