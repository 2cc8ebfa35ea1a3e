//! The decoder: embedding, layers, head.
//!
//! Owns the weights and the order of operations of one layer (the technical report, section 2): the router reads the
//! residual stream before norm and attention, so that the experts it chose can be read while attention runs.

use std::sync::Arc;

use st_experts::ExpertStore;
use st_format::ModelShape;
use st_kernels::Isa;

use crate::activations::{Activations, Rows};
use crate::batch::Batch;
use crate::error::ModelError;
use crate::moe::{ExpertLayer, Moe};
use crate::observer::{Inputs, Observer};
use crate::ops::{self, ActsScratch, Attention, Compute, Embedding, HeadStats, Linear, RmsNorm, SparseHead};
use crate::options::{LoadOptions, SparseHead as SparseHeadOptions};
use crate::plan::Residency;
use crate::router::Routing;
use crate::sequence::Sequence;
use crate::weights::{self, TensorSource};
use crate::work::Work;
use crate::workspace::{HeadRows, Workspace};

struct Layer {
    attn_norm: RmsNorm,
    /// Queries, keys and values in one matrix; `[q_dim + 2 * kv_dim, n_embd]`.
    qkv: Linear,
    attn_output: Linear,
    /// F32: a quantized router would choose other experts.
    router: Linear,
    ffn_norm: RmsNorm,
    uses_rope: bool,
}

impl Layer {
    /// What this layer's router chooses for the residual stream as it stands.
    fn route(
        &self,
        config: &ModelShape,
        cx: &Compute,
        acts: &mut ActsScratch,
        (x, logits): (&Rows, &mut Rows),
        routing: &mut Routing,
    ) -> Result<(), ModelError> {
        self.router.forward(cx, acts, x, logits)?;
        routing.choose(config, logits.values()?);
        Ok(())
    }
}

/// What makes logits of the residual stream.
enum Head {
    /// The embedding.
    Embedding,
    /// A matrix of its own.
    Own(Linear),
    /// Either of them, of which only some rows are computed.
    Sparse(Box<SparseHead>),
}

/// All weights of a model, and the threads that compute with them.
pub(crate) struct Model {
    config: ModelShape,
    compute: Compute,
    /// `None` where the rows of the sparse head are the embedding.
    embedding: Option<Embedding>,
    layers: Vec<Layer>,
    output_norm: RmsNorm,
    head: Head,
    moe: Moe,
}

impl Model {
    /// Reads all weights but the experts', of which as many are in memory as `residency` says.
    ///
    /// # Errors
    /// Where the file cannot be read or a matrix has a type without kernels.
    pub(crate) fn load(
        source: &TensorSource<'_>,
        config: ModelShape,
        store: Arc<ExpertStore>,
        residency: Residency,
        options: &LoadOptions,
    ) -> Result<Self, ModelError> {
        let compute = Compute::new(options.threads, options.kernels()?)?;
        let c = &config;
        let matrix = |name: String, rows: usize, cols: usize| Linear::load(source, &compute, &[(name, rows)], cols);
        let norm = |name: String| -> Result<RmsNorm, ModelError> {
            Ok(RmsNorm { weight: source.vector_f32(&name, c.n_embd)?, eps: c.rms_eps })
        };
        let sparse = match (source.predictor(options)?, &options.sparse_head) {
            (Some(predictor), Some(SparseHeadOptions { threshold, check, .. })) => {
                let shape = (source.n_vocab(), c.n_embd);
                let head = SparseHead::load(source, &compute, source.head(), shape, &predictor, (*threshold, *check))?;
                Some(head)
            }
            _ => None,
        };
        let embedding = match sparse.is_some() && !source.has_head() {
            true => None,
            false => Some(Embedding::load(source, &compute, c.n_embd, residency.leaves_embedding(source.has_head()))?),
        };
        let head = match sparse {
            Some(sparse) => Head::Sparse(Box::new(sparse)),
            None if source.has_head() => Head::Own(matrix(weights::OUTPUT.into(), source.n_vocab(), c.n_embd)?),
            None => Head::Embedding,
        };
        let mut layers = Vec::with_capacity(c.n_layers);
        for n in 0..c.n_layers {
            let name = |part: &str| weights::layer_tensor(n, part);
            let qkv = [(name("attn_q"), c.q_dim()), (name("attn_k"), c.kv_dim()), (name("attn_v"), c.kv_dim())];
            layers.push(Layer {
                attn_norm: norm(name("attn_norm"))?,
                qkv: Linear::load(source, &compute, &qkv, c.n_embd)?,
                attn_output: matrix(name("attn_output"), c.n_embd, c.q_dim())?,
                router: matrix(name("ffn_gate_inp"), c.n_experts, c.n_embd)?,
                ffn_norm: norm(name("ffn_norm"))?,
                uses_rope: c.rope_layers[n],
            });
        }
        let output_norm = norm(weights::OUTPUT_NORM.into())?;
        let moe = Moe::new(store, source.formats().to_vec(), c, residency.batch());
        Ok(Self { config, compute, embedding, layers, output_norm, head, moe })
    }

    /// The shape of the model.
    pub(crate) fn config(&self) -> &ModelShape {
        &self.config
    }

    /// Rows of the embedding.
    pub(crate) fn n_vocab(&self) -> usize {
        self.config.n_vocab
    }

    /// The instruction set of the kernels.
    pub(crate) fn isa(&self) -> Isa {
        self.compute.kernels.isa()
    }

    /// The expert cache.
    pub(crate) fn store(&self) -> &ExpertStore {
        self.moe.store()
    }

    /// As [`Engine::arranging_speed`](crate::Engine::arranging_speed).
    pub(crate) fn arranging_speed(&self) -> f64 {
        self.moe.arranging_speed(self.compute.kernels)
    }

    /// What a sparse head did, where there is one.
    pub(crate) fn head_stats(&self) -> Option<HeadStats> {
        if let Head::Sparse(head) = &self.head { Some(head.stats()) } else { None }
    }

    /// Writes the embeddings of `tokens` to `x` (`[tokens, n_embd]`).
    fn embed(&self, tokens: &[u32], x: &mut Rows) -> Result<(), ModelError> {
        match (&self.embedding, &self.head) {
            (Some(embedding), _) => embedding.forward(tokens, x),
            (None, Head::Sparse(head)) => {
                let row = |token, row: &mut [f32]| {
                    head.row_f32(token, row);
                    Ok(())
                };
                ops::embed(row, tokens, x)
            }
            // Made so in `load`: without an embedding the head is sparse.
            (None, _) => unreachable!("a model without an embedding"),
        }
    }

    /// Runs the rows of `batch`, which go on with `sequences`. Where it fails, the sequences are as before.
    ///
    /// # Errors
    /// What is wrong with the batch, before anything is computed; what reading experts meets; what the observer says.
    pub(crate) fn forward(
        &self,
        batch: &Batch,
        sequences: &mut [&mut Sequence],
        ws: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<(), ModelError> {
        batch.cut(|sequence| sequences[sequence].len(), &mut ws.runs);
        let ran = self.run(batch, sequences, ws, observer);
        match ran {
            Ok(()) => {
                for (&sequence, &token) in batch.sequences().iter().zip(batch.tokens()) {
                    sequences[sequence].push(token);
                }
                ws.work.tokens += batch.len() as u64;
            }
            Err(_) => sequences.iter_mut().for_each(|sequence| sequence.trim()),
        }
        ran
    }

    /// All layers and the head for a batch that was cut into runs.
    fn run(
        &self,
        batch: &Batch,
        sequences: &mut [&mut Sequence],
        ws: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<(), ModelError> {
        for run in &ws.runs {
            sequences[run.sequence].prepare(run.position + run.rows.len())?;
        }
        ws.rope.prepare(&ws.runs);
        let (n, n_layers) = (batch.len(), self.layers.len());
        ws.activations.begin(&self.config, n);
        self.embed(batch.tokens(), &mut ws.activations.latest().x)?;
        for layer in 0..n_layers {
            let work = self.layer(layer, batch, sequences, ws, observer)?;
            ws.layer_work[layer].add(&work);
            ws.work.add(&work);
            observer.routing(layer, batch, &ws.routing).map_err(shown("routing"))?;
            let x = ws.activations.latest().x.values()?;
            observer.residual(layer, batch, x).map_err(shown("residual stream"))?;
            if observer.progress(n * (layer + 1) / n_layers, n).is_break() {
                return Err(ModelError::Cancelled);
            }
        }
        self.head(batch.wants_logits(), ws)
    }

    /// One layer; returns what it touched.
    fn layer(
        &self,
        n: usize,
        batch: &Batch,
        sequences: &mut [&mut Sequence],
        ws: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<Work, ModelError> {
        let (layer, cx) = (&self.layers[n], &self.compute);
        let Workspace { scratch, moe, routing, guess, rope, runs, activations, .. } = ws;
        let Activations { x, normed, qkv, attn, delta, router } = activations.latest();

        // The router looks at the residual stream as it is. Its part is too small to be shared: one thread chooses the experts, and
        // has their reads begin, while the others begin with queries, keys and values.
        layer.attn_norm.forward(cx, x, normed)?;
        let choose = || {
            layer.route(&self.config, cx, &mut scratch.router_acts, (x, router), routing)?;
            Ok::<_, ModelError>(self.moe.prefetch(n, batch.kind(), routing, moe))
        };
        let experts = layer.qkv.forward_while(cx, &mut scratch.acts, normed, qkv, choose)??;
        let watched = observer.watches_inputs();
        let mut show = |tensor: &Rows, of: Inputs<'_>| match watched {
            true => observer.inputs(n, of, tensor.values()?).map_err(shown("inputs")),
            false => Ok(()),
        };
        show(normed, Inputs::Attention)?;
        if layer.uses_rope {
            rope.forward(cx, qkv)?;
        }
        let attention = Attention { config: &self.config, layer: n, runs, sequences };
        attention.forward(cx, &mut scratch.attention, qkv, attn)?;
        show(attn, Inputs::AttentionOutput)?;
        layer.attn_output.forward(cx, &mut scratch.acts, attn, delta)?;
        ops::add(cx, x, delta)?;

        // The disk is busy with this layer's experts or idle: a guess of the next layer's comes after what is certain.
        if let (Some(next), true) = (self.layers.get(n + 1), self.moe.guesses(batch.kind())) {
            next.route(&self.config, cx, &mut scratch.router_acts, (x, router), guess)?;
            self.moe.guess(n + 1, guess, moe);
        }

        layer.ffn_norm.forward(cx, x, normed)?;
        show(normed, Inputs::Experts(routing))?;
        let pass = ExpertLayer { layer: n, cx, acts: &mut scratch.acts, scratch: moe, routing, observer };
        let mut work = self.moe.forward(pass, experts, normed, x)?;
        work.weight_bytes += (layer.router.bytes() + layer.qkv.bytes() + layer.attn_output.bytes()) as u64;
        Ok(work)
    }

    /// Logits of some rows of the latest batch, by one product.
    pub(crate) fn head(&self, rows: &[usize], ws: &mut Workspace) -> Result<(), ModelError> {
        if rows.is_empty() {
            return Ok(());
        }
        let (cx, n_embd) = (&self.compute, self.config.n_embd);
        let Workspace { head, activations, scratch, work, .. } = ws;
        let x = activations.latest().x.values()?;
        let HeadRows { input, logits, hidden } = head.rows(rows.len(), n_embd);
        for (&row, input) in rows.iter().zip(input.chunks_exact_mut(n_embd)) {
            self.output_norm.row(cx, &x[row * n_embd..(row + 1) * n_embd], input);
        }
        let acts = &mut scratch.acts;
        let whole = match &self.head {
            Head::Sparse(head) => {
                work.weight_bytes += head.apply(cx, acts, input, hidden, logits);
                None
            }
            Head::Own(head) => Some(head),
            Head::Embedding => self.embedding.as_ref().and_then(Embedding::matrix),
        };
        if let Some(head) = whole {
            head.apply(cx, acts, input, logits, || ());
            work.weight_bytes += head.bytes() as u64;
        }
        Ok(())
    }
}

/// An observer's failure to take what it was shown.
fn shown(what: &'static str) -> impl FnOnce(std::io::Error) -> ModelError {
    move |cause| ModelError::Observer { what, cause }
}
