//! The buffers of one forward pass, reused from pass to pass.
//!
//! There is one for each engine that runs, whatever the number of sequences: what a pass leaves behind is its logits.

use st_format::ModelShape;

use crate::activations::Activations;
use crate::batch::Run;
use crate::moe::MoeScratch;
use crate::ops::{Rope, Scratch};
use crate::router::Routing;
use crate::work::Work;

/// Rows whose logits one pass gives, at most, where there are `sequences` sequences: one of each, or some of one.
pub(crate) fn logit_rows(sequences: usize) -> usize {
    sequences.max(8)
}

/// Rows that need no more than the small activations, which are there from the beginning.
const SMALL: usize = 8;

/// What computing needs besides weights and sequences. Made by [`Engine::workspace`](crate::Engine::workspace).
pub struct Workspace {
    /// The engine that it belongs to.
    pub(crate) engine: u64,
    pub(crate) scratch: Scratch,
    pub(crate) moe: MoeScratch,
    pub(crate) routing: Routing,
    /// What the next layer's router would choose by this layer's residual stream.
    pub(crate) guess: Routing,
    pub(crate) rope: Rope,
    /// The rows of the batch, sequence by sequence.
    pub(crate) runs: Vec<Run>,
    pub(crate) head: HeadBuffers,
    pub(crate) work: Work,
    /// The part of each layer in [`Workspace::work`].
    pub(crate) layer_work: Vec<Work>,
    pub(crate) activations: Rooms,
}

/// What the head reads and writes.
#[derive(Debug, Default)]
pub(crate) struct HeadBuffers {
    /// The normed residual stream of the rows whose logits are computed; `[rows, n_embd]`.
    pub(crate) input: Vec<f32>,
    /// `[rows, n_vocab]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) n_vocab: usize,
    /// What a predictor makes of the input on its way to scores.
    hidden: Vec<f32>,
}

/// Buffers for some rows.
pub(crate) struct HeadRows<'a> {
    pub(crate) input: &'a mut [f32],
    pub(crate) logits: &'a mut [f32],
    pub(crate) hidden: &'a mut Vec<f32>,
}

/// Activations of two sizes: a prompt's are made when there is one.
pub(crate) struct Rooms {
    small: Activations,
    large: Option<Activations>,
    /// Whether the latest batch is in the large ones.
    is_large: bool,
    /// Most rows of a batch.
    batch: usize,
}

impl Rooms {
    /// Makes room for a batch of `rows` rows.
    pub(crate) fn begin(&mut self, config: &ModelShape, rows: usize) {
        self.is_large = rows > SMALL;
        if self.is_large {
            self.large.get_or_insert_with(|| Activations::new(config, self.batch)).set_rows(rows);
        } else {
            self.small.set_rows(rows);
        }
    }

    /// Those of the latest batch.
    pub(crate) fn latest(&mut self) -> &mut Activations {
        match &mut self.large {
            Some(large) if self.is_large => large,
            _ => &mut self.small,
        }
    }
}

impl Workspace {
    /// Buffers for batches of at most `batch` rows.
    pub(crate) fn new(engine: u64, config: &ModelShape, n_vocab: usize, batch: usize) -> Self {
        Self {
            engine,
            scratch: Scratch::default(),
            moe: MoeScratch::default(),
            routing: Routing::default(),
            guess: Routing::default(),
            rope: Rope::new(config),
            runs: Vec::new(),
            head: HeadBuffers {
                input: vec![0.0; config.n_embd],
                logits: vec![0.0; n_vocab],
                n_vocab,
                hidden: Vec::new(),
            },
            work: Work::default(),
            layer_work: vec![Work::default(); config.n_layers],
            activations: Rooms { small: Activations::new(config, SMALL), large: None, is_large: false, batch },
        }
    }

    /// The `i`-th logits that the latest batch wanted; `[n_vocab]`.
    ///
    /// # Panics
    /// Where it wanted fewer.
    pub fn logits(&self, i: usize) -> &[f32] {
        &self.head.logits[i * self.head.n_vocab..(i + 1) * self.head.n_vocab]
    }

    /// What was computed so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// What of it was computed in each layer.
    pub fn layer_work(&self) -> &[Work] {
        &self.layer_work
    }

    /// Bytes that a workspace takes for batches of at most `batch` rows and the logits of `logit_rows`, but for what experts need.
    pub(crate) fn bytes(config: &ModelShape, n_vocab: usize, batch: usize, logit_rows: usize) -> usize {
        let head = logit_rows * (config.n_embd + n_vocab) * size_of::<f32>();
        (batch + SMALL) * Activations::bytes_per_row(config) + head
    }
}

impl HeadBuffers {
    /// Room for `rows` rows.
    pub(crate) fn rows(&mut self, rows: usize, n_embd: usize) -> HeadRows<'_> {
        let (input, logits) = (rows * n_embd, rows * self.n_vocab);
        if self.logits.len() < logits {
            self.input.resize(input, 0.0);
            self.logits.resize(logits, 0.0);
        }
        HeadRows { input: &mut self.input[..input], logits: &mut self.logits[..logits], hidden: &mut self.hidden }
    }
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workspace").field("work", &self.work).finish_non_exhaustive()
    }
}
