//! The tokens of a product of whole matrices.

use std::arch::x86_64::*;

use crate::activations::{ActRow, Sums};
use crate::r16::R16_ROWS;

/// Activations of one token, and where its outputs go.
pub(super) struct Token {
    pub(super) q: *const i8,
    pub(super) d: *const f32,
    pub(super) sums: *const Sums,
    out: *mut f32,
}

impl Token {
    pub(super) fn new(a: ActRow<'_>, out: &mut [f32]) -> Self {
        Self { q: a.q.as_ptr(), d: a.d.as_ptr(), sums: a.sums.as_ptr(), out: out.as_mut_ptr() }
    }
}

/// # Safety
/// The tokens have 16 outputs for the group.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn put_outputs<const N: usize>(acc: [__m512; N], tokens: &[Token; N], group: usize) {
    for (acc, token) in acc.into_iter().zip(tokens) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(token.out.add(group * R16_ROWS), acc) };
    }
}
