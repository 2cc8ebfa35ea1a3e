//! One text that grows: its tokens and their keys and values.
//!
//! A sequence owns its memory and borrows nothing: it can lie in a map, wait, and go on in another thread.

use crate::error::ModelError;
use crate::kv_cache::LayerKv;

/// Tokens that were run, and what later tokens need of them. Made by [`Engine::sequence`](crate::Engine::sequence).
#[derive(Debug)]
pub struct Sequence {
    /// The engine that it belongs to.
    engine: u64,
    tokens: Vec<u32>,
    kv: Vec<LayerKv>,
}

impl Sequence {
    /// An empty text with the caches `kv`, one for each layer, for the engine of that number.
    pub(crate) fn new(engine: u64, kv: Vec<LayerKv>) -> Self {
        Self { engine, tokens: Vec::new(), kv }
    }

    /// The tokens that were run, in order.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens in the context.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was run yet.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.tokens.clear();
        self.trim();
    }

    /// The fewest tokens that it can be cut to, besides none.
    pub fn shortest_cut(&self) -> usize {
        self.kv.iter().map(LayerKv::shortest_cut).max().unwrap_or(0)
    }

    /// How many tokens [`Sequence::truncate`] to `len` would keep.
    pub fn keeps(&self, len: usize) -> usize {
        match len {
            len if len >= self.len() => self.len(),
            len if len < self.shortest_cut() => 0,
            len => len,
        }
    }

    /// Forgets all but the first `len` tokens. Returns how many are kept: `len`, or none where a window layer no longer has
    /// what the next token would see. Where the latest batch began is always kept.
    pub fn truncate(&mut self, len: usize) -> usize {
        let len = self.keeps(len);
        if len < self.len() {
            self.tokens.truncate(len);
            self.trim();
        }
        len
    }

    /// Keeps what the text has in common with `tokens` and forgets the rest; returns how many tokens are kept. At least the
    /// last of `tokens` is left to be run, since its logits are wanted.
    pub fn keep_prefix(&mut self, tokens: &[u32]) -> usize {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        self.truncate(common.min(tokens.len().saturating_sub(1)))
    }

    /// A second text that begins as this one and goes its own way. The two share the memory of what they have in common.
    pub fn fork(&self) -> Self {
        Self { engine: self.engine, tokens: self.tokens.clone(), kv: self.kv.clone() }
    }

    /// A text with its keys and values.
    pub(crate) fn restored(engine: u64, tokens: Vec<u32>, kv: Vec<LayerKv>) -> Self {
        Self { engine, tokens, kv }
    }

    /// The caches of all layers.
    pub(crate) fn layers(&self) -> &[LayerKv] {
        &self.kv
    }

    /// Whether it belongs to the engine of that number.
    ///
    /// # Errors
    /// [`ModelError::Foreign`] where not.
    pub(crate) fn check_engine(&self, engine: u64) -> Result<(), ModelError> {
        if self.engine == engine { Ok(()) } else { Err(ModelError::Foreign { what: "sequence" }) }
    }

    /// Makes room for tokens up to the first `end`.
    ///
    /// # Errors
    /// [`ModelError::KvFull`].
    pub(crate) fn prepare(&mut self, end: usize) -> Result<(), ModelError> {
        let new = self.len()..end;
        self.kv.iter_mut().try_for_each(|kv| kv.prepare(new.clone()))
    }

    /// Gives back the room that no token has taken.
    pub(crate) fn trim(&mut self) {
        let len = self.len();
        self.kv.iter_mut().for_each(|kv| kv.truncate(len));
    }

    /// Keys and values of one layer.
    pub(crate) fn kv(&self, layer: usize) -> &LayerKv {
        &self.kv[layer]
    }

    /// [`Self::kv`], to be written.
    pub(crate) fn kv_mut(&mut self, layer: usize) -> &mut LayerKv {
        &mut self.kv[layer]
    }

    /// A token has gone through all layers.
    pub(crate) fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }
}
