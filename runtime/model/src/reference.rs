//! The plain f32 path: every weight dequantized, every step one of candle's own tensor operations.
//!
//! Slow and simple on purpose. It is what the golden results are compared with, and what every fast path is
//! compared with; nothing of the fast path is used here, so the two cannot share a mistake.

use candle_core::{D, DType, Device, Tensor};
use st_format::{Gating, ModelShape};
use st_gguf::GgufFile;

use crate::error::ModelError;
use crate::progress::{LoadProgress, NoProgress};
use crate::weights::{self, TensorSource};

/// What one layer did with one batch of tokens.
pub struct LayerTrace {
    /// Attention block after the output projection, before the residual add; `[tokens, n_embd]`.
    pub attn_output: Tensor,
    /// Residual stream after the layer; `[tokens, n_embd]`.
    pub output: Tensor,
    /// Router logits of all experts; `[tokens, n_experts]`.
    pub router_logits: Tensor,
    /// Chosen experts of each token, best logit first.
    pub topk_ids: Vec<Vec<u32>>,
    /// Weights of the chosen experts, in the same order.
    pub topk_weights: Vec<Vec<f32>>,
}

struct Expert {
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

struct Layer {
    attn_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    router: Tensor,
    ffn_norm: Tensor,
    experts: Vec<Expert>,
    /// Keys and values of the positions still visible; `[n_kv_heads, positions, head_dim]`.
    cache: Option<(Tensor, Tensor)>,
}

/// A model in f32 with its KV cache: one mutable conversation.
pub struct Reference {
    config: ModelShape,
    embedding: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
    head: Tensor,
    n_past: usize,
}

impl Reference {
    /// Loads and dequantizes every weight of `file`; needs four bytes for each.
    ///
    /// # Errors
    /// [`ModelError`] where the file is not a complete SmallThinker model.
    pub fn load(file: &GgufFile) -> Result<Self, ModelError> {
        Self::load_with(file, &NoProgress)
    }

    /// [`Reference::load`] that `progress` follows and may stop.
    ///
    /// # Errors
    /// As [`Reference::load`]; [`ModelError::Cancelled`] where `progress` breaks.
    pub fn load_with(file: &GgufFile, progress: &dyn LoadProgress) -> Result<Self, ModelError> {
        let config = file.header.model_shape()?;
        let source = TensorSource::new(file, &config, progress)?;
        let matrix = |name: &str, rows: usize, cols: usize| -> Result<Tensor, ModelError> {
            let data = source.matrix_f32(name, rows, cols)?;
            Ok(Tensor::from_vec(data, (rows, cols), &Device::Cpu)?)
        };
        let vector = |name: &str| -> Result<Tensor, ModelError> {
            Ok(Tensor::from_vec(source.vector_f32(name, config.n_embd)?, config.n_embd, &Device::Cpu)?)
        };
        let n_vocab = source.n_vocab();
        let embedding = matrix(weights::TOKEN_EMBD, n_vocab, config.n_embd)?;
        let head = match source.has_head() {
            true => matrix(weights::OUTPUT, n_vocab, config.n_embd)?,
            false => embedding.clone(),
        };
        let mut layers = Vec::with_capacity(config.n_layers);
        for n in 0..config.n_layers {
            let name = |part: &str| weights::layer_tensor(n, part);
            let mut experts = Vec::with_capacity(config.n_experts);
            for e in 0..config.n_experts {
                let [gate, up, down] = source.expert_f32(n, e)?;
                experts.push(Expert {
                    gate: Tensor::from_vec(gate, (config.n_ff, config.n_embd), &Device::Cpu)?,
                    up: Tensor::from_vec(up, (config.n_ff, config.n_embd), &Device::Cpu)?,
                    down: Tensor::from_vec(down, (config.n_embd, config.n_ff), &Device::Cpu)?,
                });
            }
            layers.push(Layer {
                attn_norm: vector(&name("attn_norm"))?,
                q: matrix(&name("attn_q"), config.q_dim(), config.n_embd)?,
                k: matrix(&name("attn_k"), config.kv_dim(), config.n_embd)?,
                v: matrix(&name("attn_v"), config.kv_dim(), config.n_embd)?,
                o: matrix(&name("attn_output"), config.n_embd, config.q_dim())?,
                router: matrix(&name("ffn_gate_inp"), config.n_experts, config.n_embd)?,
                ffn_norm: vector(&name("ffn_norm"))?,
                experts,
                cache: None,
            });
        }
        let output_norm = vector(weights::OUTPUT_NORM)?;
        Ok(Self { config, embedding, layers, output_norm, head, n_past: 0 })
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelShape {
        &self.config
    }

    /// Forgets the conversation.
    pub fn reset(&mut self) {
        self.n_past = 0;
        for layer in &mut self.layers {
            layer.cache = None;
        }
    }

    /// Runs `tokens` after those already seen; returns the logits of each, `[tokens, n_vocab]`.
    ///
    /// # Errors
    /// [`ModelError::TokenId`] for an id outside the vocabulary.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        self.forward_traced(tokens, |_, _| Ok(()))
    }

    /// [`Reference::forward`], with a look at each layer as it is done.
    ///
    /// # Errors
    /// As [`Reference::forward`], and whatever `on_layer` returns.
    pub fn forward_traced(
        &mut self,
        tokens: &[u32],
        mut on_layer: impl FnMut(usize, &LayerTrace) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        let n_vocab = self.embedding.dim(0)?;
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(ModelError::TokenId { id, n_vocab });
        }
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        for n in 0..self.layers.len() {
            let trace = self.layer(n, &x)?;
            on_layer(n, &trace)?;
            x = trace.output;
        }
        self.n_past += tokens.len();
        let x = rms_norm(&x, &self.output_norm, self.config.rms_eps)?;
        Ok(x.matmul(&self.head.t()?)?)
    }

    fn layer(&mut self, n: usize, x: &Tensor) -> Result<LayerTrace, ModelError> {
        let eps = self.config.rms_eps;
        let layer = &self.layers[n];
        let router_logits = x.matmul(&layer.router.t()?)?;
        let (topk_ids, topk_weights) = choose(&self.config, &router_logits)?;
        let normed = rms_norm(x, &layer.attn_norm, eps)?;
        let attn_output = self.attention(n, &normed)?;
        let h = (x + &attn_output)?;
        let y = rms_norm(&h, &self.layers[n].ffn_norm, eps)?;
        let ffn = self.experts(n, &y, &topk_ids, &topk_weights)?;
        let output = (h + ffn)?;
        Ok(LayerTrace { attn_output, output, router_logits, topk_ids, topk_weights })
    }

    fn attention(&mut self, n: usize, x: &Tensor) -> Result<Tensor, ModelError> {
        let c = &self.config;
        let (t, _) = x.dims2()?;
        let layer = &self.layers[n];
        let heads = |w: &Tensor, n_heads: usize| -> Result<Tensor, ModelError> {
            Ok(x.matmul(&w.t()?)?.reshape((t, n_heads, c.head_dim))?.transpose(0, 1)?.contiguous()?)
        };
        let (mut q, mut k, v) =
            (heads(&layer.q, c.n_heads)?, heads(&layer.k, c.n_kv_heads)?, heads(&layer.v, c.n_kv_heads)?);
        if c.rope_layers[n] {
            let (cos, sin) = rotary(c, self.n_past, t)?;
            q = rotate(&q, &cos, &sin)?;
            k = rotate(&k, &cos, &sin)?;
        }
        let (k, v) = match &layer.cache {
            Some((past_k, past_v)) => (Tensor::cat(&[past_k, &k], 1)?, Tensor::cat(&[past_v, &v], 1)?),
            None => (k, v),
        };
        let group = c.n_heads / c.n_kv_heads;
        let spread = |kv: &Tensor| -> Result<Tensor, ModelError> {
            let (h, p, d) = kv.dims3()?;
            Ok(kv.unsqueeze(1)?.broadcast_as((h, group, p, d))?.reshape((h * group, p, d))?)
        };
        let scores = (q.matmul(&spread(&k)?.transpose(1, 2)?)? * (1.0 / (c.head_dim as f64).sqrt()))?;
        let positions = k.dim(1)?;
        let scores = scores.broadcast_add(&self.mask(n, t, positions)?)?;
        let max = scores.max_keepdim(D::Minus1)?;
        let exp = scores.broadcast_sub(&max)?.exp()?;
        let probabilities = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        let out = probabilities.matmul(&spread(&v)?)?;
        let out = out.transpose(0, 1)?.contiguous()?.reshape((t, c.q_dim()))?;
        let out = out.matmul(&self.layers[n].o.t()?)?;
        // What no later token of a window layer can see need not be kept.
        let keep = c.windows[n].map_or(positions, |w| positions.min(w - 1));
        let tail = |kv: Tensor| kv.narrow(1, positions - keep, keep)?.contiguous();
        self.layers[n].cache = (keep > 0).then(|| Ok::<_, ModelError>((tail(k)?, tail(v)?))).transpose()?;
        Ok(out)
    }

    /// 0 where query `i` of this batch sees the cached position, -inf elsewhere; `[t, positions]`.
    fn mask(&self, n: usize, t: usize, positions: usize) -> Result<Tensor, ModelError> {
        let window = self.config.windows[n].unwrap_or(usize::MAX);
        let first_query = positions - t;
        let mut mask = Vec::with_capacity(t * positions);
        for i in 0..t {
            for j in 0..positions {
                let visible = j <= first_query + i && first_query + i - j < window;
                mask.push(if visible { 0.0 } else { f32::NEG_INFINITY });
            }
        }
        Ok(Tensor::from_vec(mask, (t, positions), &Device::Cpu)?)
    }

    fn experts(&self, n: usize, y: &Tensor, ids: &[Vec<u32>], weights: &[Vec<f32>]) -> Result<Tensor, ModelError> {
        let mut out = Tensor::zeros_like(y)?;
        for (e, expert) in self.layers[n].experts.iter().enumerate() {
            let (mut rows, mut scale) = (Vec::new(), Vec::new());
            for (token, chosen) in ids.iter().enumerate() {
                if let Some(rank) = chosen.iter().position(|&id| id as usize == e) {
                    rows.push(token as u32);
                    scale.push(weights[token][rank]);
                }
            }
            if rows.is_empty() {
                continue;
            }
            let m = rows.len();
            let rows = Tensor::new(rows, &Device::Cpu)?;
            let scale = Tensor::from_vec(scale, (m, 1), &Device::Cpu)?;
            let x = y.index_select(&rows, 0)?;
            let hidden = (x.matmul(&expert.gate.t()?)?.relu()? * x.matmul(&expert.up.t()?)?)?;
            let part = hidden.matmul(&expert.down.t()?)?.broadcast_mul(&scale)?;
            out = out.index_add(&rows, &part, 0)?;
        }
        Ok(out)
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor, ModelError> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let scale = (mean_square + f64::from(eps))?.sqrt()?.recip()?;
    Ok(x.broadcast_mul(&scale)?.broadcast_mul(weight)?)
}

/// Cosines and sines of positions `start..start + t`; each `[t, head_dim]`, the two halves alike.
fn rotary(c: &ModelShape, start: usize, t: usize) -> Result<(Tensor, Tensor), ModelError> {
    let half = c.head_dim / 2;
    let (mut cos, mut sin) = (Vec::with_capacity(t * c.head_dim), Vec::with_capacity(t * c.head_dim));
    for position in start..start + t {
        for i in 0..c.head_dim {
            let frequency = 1.0 / c.rope_theta.powf((2 * (i % half)) as f32 / c.head_dim as f32);
            let angle = position as f32 * frequency;
            cos.push(angle.cos());
            sin.push(angle.sin());
        }
    }
    let shape = (t, c.head_dim);
    Ok((Tensor::from_vec(cos, shape, &Device::Cpu)?, Tensor::from_vec(sin, shape, &Device::Cpu)?))
}

/// Rotate-half: `x * cos + [-x2, x1] * sin` for `x = [x1, x2]`; `x` is `[heads, t, head_dim]`.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, ModelError> {
    let half = x.dim(D::Minus1)? / 2;
    let (x1, x2) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned = Tensor::cat(&[&x2.neg()?, &x1], D::Minus1)?;
    Ok((x.broadcast_mul(cos)? + turned.broadcast_mul(sin)?)?)
}

/// For each token, best logit first: the chosen experts, and their weights.
type Choices = (Vec<Vec<u32>>, Vec<Vec<f32>>);

fn choose(c: &ModelShape, logits: &Tensor) -> Result<Choices, ModelError> {
    let mut ids = Vec::new();
    let mut weights = Vec::new();
    for row in logits.to_dtype(DType::F32)?.to_vec2::<f32>()? {
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
        order.truncate(c.n_experts_used);
        let chosen = order.iter().map(|&id| row[id as usize]);
        let raw: Vec<f32> = match c.gating {
            Gating::Softmax => chosen.map(|logit| (logit - row[order[0] as usize]).exp()).collect(),
            Gating::Sigmoid => chosen.map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        };
        let sum: f32 = raw.iter().sum();
        weights.push(raw.iter().map(|w| w / sum).collect());
        ids.push(order);
    }
    Ok((ids, weights))
}
