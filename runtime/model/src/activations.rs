//! The tensors that a batch of tokens flows through, allocated once and written in place.

use candle_core::{DType, Device, Tensor};
use st_format::ModelShape;

use crate::error::ModelError;
use crate::ops;

/// Activations of `tokens` tokens, f32. Cloning and narrowing share the memory.
#[derive(Clone, Debug)]
pub(crate) struct Activations {
    /// The residual stream; `[tokens, n_embd]`.
    pub(crate) x: Tensor,
    /// What a norm makes of it; `[tokens, n_embd]`.
    pub(crate) normed: Tensor,
    /// Queries, keys and values side by side; `[tokens, q_dim + 2 * kv_dim]`.
    pub(crate) qkv: Tensor,
    /// What attention gathered; `[tokens, q_dim]`.
    pub(crate) attn: Tensor,
    /// What a block adds to the residual stream; `[tokens, n_embd]`.
    pub(crate) delta: Tensor,
    /// Router logits; `[tokens, n_experts]`.
    pub(crate) router: Tensor,
}

impl Activations {
    /// Room for `tokens` tokens.
    pub(crate) fn new(config: &ModelShape, tokens: usize) -> Result<Self, ModelError> {
        let zeros = |width: usize| Tensor::zeros((tokens, width), DType::F32, &Device::Cpu);
        Ok(Self {
            x: zeros(config.n_embd)?,
            normed: zeros(config.n_embd)?,
            qkv: zeros(config.q_dim() + 2 * config.kv_dim())?,
            attn: zeros(config.q_dim())?,
            delta: zeros(config.n_embd)?,
            router: zeros(config.n_experts)?,
        })
    }

    /// The part of the first `tokens` tokens.
    pub(crate) fn first(&self, tokens: usize) -> Result<Self, ModelError> {
        Ok(Self {
            x: self.x.narrow(0, 0, tokens)?,
            normed: self.normed.narrow(0, 0, tokens)?,
            qkv: self.qkv.narrow(0, 0, tokens)?,
            attn: self.attn.narrow(0, 0, tokens)?,
            delta: self.delta.narrow(0, 0, tokens)?,
            router: self.router.narrow(0, 0, tokens)?,
        })
    }

    /// Bytes that one token takes.
    pub(crate) fn bytes_per_token(config: &ModelShape) -> usize {
        4 * (3 * config.n_embd + 2 * config.q_dim() + 2 * config.kv_dim() + config.n_experts)
    }

    /// A look at the residual stream.
    pub(crate) fn with_residual<R>(&self, look: impl FnOnce(&[f32]) -> Result<R, ModelError>) -> Result<R, ModelError> {
        ops::with_slice(&self.x, look)
    }
}
