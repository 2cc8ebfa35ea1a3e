//! The feed-forward network of one expert, `down · (up·x ⊙ relu(gate·x))`, for a few tokens (sparse) and for many.
//!
//! For quantized experts the hidden values are quantized to Q8_0 in groups of 32 neurons, so that `down` is an integer product
//! as well. Neurons whose gate is not positive are skipped: their rows of up and down are not read. Both forms give the same bits.

mod few;
mod many;

use crate::activations::Q8Acts;

/// What goes into an expert: rows of `n_embd` values, as floats ([`takes_floats`](crate::ExpertFormat::takes_floats)) or quantized
/// ([`takes_acts`](crate::ExpertFormat::takes_acts)). What is not taken may be empty.
#[derive(Debug, Clone, Copy)]
pub struct ExpertInput<'a> {
    /// `rows × n_embd` floats.
    pub floats: &'a [f32],
    /// The same rows as int8 blocks.
    pub acts: &'a Q8Acts,
}
