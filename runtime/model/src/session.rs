//! One mutable conversation with a shared engine.
//!
//! Owns the KV cache, the tokens that are in it, and the buffers that computing needs; the weights are the engine's.

use std::ops::ControlFlow;

use crate::activations::Activations;
use crate::engine::Engine;
use crate::error::ModelError;
use crate::kv_cache::LayerKv;
use crate::moe::MoeScratch;
use crate::ops::{Rope, Scratch};
use crate::router::Routing;

/// What computing touched, counted since the session began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens run.
    pub tokens: u64,
    /// Bytes of weights read by the kernels, dead neurons left out.
    pub weight_bytes: u64,
    /// Neurons of chosen experts.
    pub neurons: u64,
    /// Those of them that ReLU let through.
    pub live_neurons: u64,
}

impl Work {
    /// Counts `more` in.
    pub(crate) fn add(&mut self, more: Self) {
        self.tokens += more.tokens;
        self.weight_bytes += more.weight_bytes;
        self.neurons += more.neurons;
        self.live_neurons += more.live_neurons;
    }

    /// What was added after `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            tokens: self.tokens - earlier.tokens,
            weight_bytes: self.weight_bytes - earlier.weight_bytes,
            neurons: self.neurons - earlier.neurons,
            live_neurons: self.live_neurons - earlier.live_neurons,
        }
    }
}

/// The buffers of one forward pass, apart from the KV cache so that both can be borrowed at once.
pub(crate) struct Buffers {
    pub(crate) scratch: Scratch,
    pub(crate) moe: MoeScratch,
    pub(crate) routing: Routing,
    /// What the next layer's router would choose by this layer's residual stream.
    pub(crate) guess: Routing,
    pub(crate) rope: Rope,
    /// The normed residual stream of the token whose logits are computed; `[n_embd]`.
    pub(crate) head_input: Vec<f32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) work: Work,
    /// For one token: what decoding uses, allocated once.
    one: Activations,
    /// For a batch, from the first prompt on.
    batch: Option<Activations>,
}

/// A look at each layer: its number, the residual stream after it (`[tokens, n_embd]`) and its routing.
pub type OnLayer<'a> = dyn FnMut(usize, &[f32], &Routing) -> Result<(), ModelError> + 'a;

/// A look at what the routers choose, in the order in which the model runs: for each batch, layer after layer, the layer's
/// number and its routing. What it fails with ends the run.
pub type OnRouting<'e> = dyn FnMut(usize, &Routing) -> std::io::Result<()> + Send + 'e;

/// A conversation: the tokens so far and their KV cache.
pub struct Session<'e> {
    engine: &'e Engine,
    kv: Vec<LayerKv>,
    tokens: Vec<u32>,
    buffers: Buffers,
    /// The part of each layer in [`Buffers::work`].
    layer_work: Vec<Work>,
    on_routing: Option<Box<OnRouting<'e>>>,
}

impl<'e> Session<'e> {
    /// An empty conversation.
    ///
    /// # Errors
    /// Where buffers cannot be allocated.
    pub fn new(engine: &'e Engine) -> Result<Self, ModelError> {
        let config = engine.config();
        let kv = (0..config.n_layers)
            .map(|layer| LayerKv::new(config, layer, engine.kv_type(), engine.ctx(), engine.batch()))
            .collect();
        let buffers = Buffers {
            scratch: Scratch::default(),
            moe: MoeScratch::default(),
            routing: Routing::default(),
            guess: Routing::default(),
            rope: Rope::new(config),
            head_input: vec![0.0; config.n_embd],
            logits: vec![0.0; engine.n_vocab()],
            work: Work::default(),
            one: Activations::new(config, 1)?,
            batch: None,
        };
        let layer_work = vec![Work::default(); config.n_layers];
        let tokens = Vec::with_capacity(engine.ctx().min(1 << 16));
        Ok(Self { engine, kv, tokens, buffers, layer_work, on_routing: None })
    }

    /// Shows the routing of all that is run from now on to `look`.
    pub fn on_routing(&mut self, look: Box<OnRouting<'e>>) {
        self.on_routing = Some(look);
    }

    /// The engine that this is a conversation with.
    pub fn engine(&self) -> &'e Engine {
        self.engine
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

    /// Tokens that the context holds at most.
    pub fn ctx(&self) -> usize {
        self.engine.ctx()
    }

    /// What was computed so far.
    pub fn work(&self) -> Work {
        self.buffers.work
    }

    /// What of it was computed in each layer.
    pub fn layer_work(&self) -> &[Work] {
        &self.layer_work
    }

    /// Logits of the token run last; `[n_vocab]`.
    pub fn logits(&self) -> &[f32] {
        &self.buffers.logits
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.tokens.clear();
        self.kv.iter_mut().for_each(LayerKv::forget);
    }

    /// Keeps what the conversation has in common with `tokens` and forgets the rest; returns how many tokens are
    /// kept. At least the last of `tokens` is left to be run, since its logits are wanted.
    pub fn keep_prefix(&mut self, tokens: &[u32]) -> usize {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let keep = common.min(tokens.len().saturating_sub(1));
        if keep == 0 || keep < self.kv.iter().map(LayerKv::shortest_cut).max().unwrap_or(0) {
            self.reset();
            return 0;
        }
        self.tokens.truncate(keep);
        keep
    }

    /// Runs `tokens` after those already seen, so that [`Session::logits`] are those of the last.
    ///
    /// # Errors
    /// [`ModelError::TokenId`] and [`ModelError::ContextFull`] before anything is run; an error of reading experts
    /// leaves the session at the last whole batch.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<(), ModelError> {
        self.feed(tokens, &mut |_| ControlFlow::Continue(())).map(|_| ())
    }

    /// [`Session::forward`] that tells after each layer how far it is, in tokens, and stops where `progress` breaks: then the
    /// session is at its last whole batch.
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub fn feed(
        &mut self,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ModelError> {
        self.check(tokens)?;
        let n_layers = self.engine.config().n_layers;
        let mut done = 0;
        for batch in tokens.chunks(self.engine.batch()) {
            let ran = self.run(batch, done + batch.len() == tokens.len(), |layer, _, _| {
                match progress(done + batch.len() * (layer + 1) / n_layers) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(ModelError::Cancelled),
                }
            });
            if matches!(ran, Err(ModelError::Cancelled)) {
                return Ok(ControlFlow::Break(()));
            }
            ran?;
            done += batch.len();
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Runs `tokens` and hands out the logits of every one: `on_logits` gets an index into `tokens` and `[n_vocab]`.
    ///
    /// # Errors
    /// As [`Session::forward`], and whatever `on_logits` returns.
    pub fn forward_all(
        &mut self,
        tokens: &[u32],
        on_logits: impl FnMut(usize, &[f32]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        self.forward_traced(tokens, &mut |_, _, _| Ok(()), on_logits)
    }

    /// [`Session::forward_all`] that also shows what each layer did: `on_layer` gets the layer, the residual stream
    /// after it (`[tokens, n_embd]`) and its routing, batch by batch.
    ///
    /// # Errors
    /// As [`Session::forward_all`], and whatever the callbacks return.
    pub fn forward_traced(
        &mut self,
        tokens: &[u32],
        on_layer: &mut OnLayer<'_>,
        mut on_logits: impl FnMut(usize, &[f32]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        self.check(tokens)?;
        let mut done = 0;
        for batch in tokens.chunks(self.engine.batch()) {
            let activations = self.run(batch, false, |layer, activations, routing| {
                activations.with_residual(|x| on_layer(layer, x, routing))
            })?;
            for row in 0..batch.len() {
                self.engine.model().head(&activations, row, &mut self.buffers)?;
                on_logits(done + row, &self.buffers.logits)?;
            }
            done += batch.len();
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<(), ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        let n_vocab = self.engine.n_vocab();
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(ModelError::TokenId { id, n_vocab });
        }
        let needed = self.tokens.len() + tokens.len();
        if needed > self.ctx() {
            return Err(ModelError::ContextFull { needed, ctx: self.ctx() });
        }
        Ok(())
    }

    /// Runs one batch through every layer; with `head`, the logits of its last token too.
    fn run(
        &mut self,
        batch: &[u32],
        head: bool,
        mut on_layer: impl FnMut(usize, &Activations, &Routing) -> Result<(), ModelError>,
    ) -> Result<Activations, ModelError> {
        let activations = self.buffers.activations(self.engine, batch.len())?;
        let model = self.engine.model();
        model.embed(batch, &activations)?;
        self.buffers.rope.prepare(self.tokens.len(), batch.len());
        for (n, kv) in self.kv.iter_mut().enumerate() {
            let before = self.buffers.work;
            model.layer(n, self.tokens.len(), &activations, kv, &mut self.buffers)?;
            self.layer_work[n].add(self.buffers.work.since(&before));
            if let Some(look) = &mut self.on_routing {
                look(n, &self.buffers.routing).map_err(ModelError::Routing)?;
            }
            on_layer(n, &activations, &self.buffers.routing)?;
        }
        if head {
            model.head(&activations, batch.len() - 1, &mut self.buffers)?;
        }
        self.tokens.extend_from_slice(batch);
        self.buffers.work.tokens += batch.len() as u64;
        Ok(activations)
    }
}

impl Buffers {
    /// Activations for `n` tokens: views of what was allocated before.
    fn activations(&mut self, engine: &Engine, n: usize) -> Result<Activations, ModelError> {
        if n == 1 {
            return Ok(self.one.clone());
        }
        let batch = match &mut self.batch {
            Some(batch) => batch,
            None => self.batch.insert(Activations::new(engine.config(), engine.batch())?),
        };
        batch.first(n)
    }
}
