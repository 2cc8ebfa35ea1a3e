//! Whole matrices times one token: each byte of weights is read once, in order.

use std::arch::x86_64::*;

use crate::activations::ActRow;
use crate::r16::R16_ROWS;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;
use crate::x86_64::request::request_stream;

pub(super) fn gemv_r16(ty: WeightType, kb: usize, tiles: &[u8], a: ActRow<'_>, out: &mut [f32]) {
    debug_assert!(tiles.len() * R16_ROWS == out.len() * kb * crate::r16::tile_bytes(ty));
    // SAFETY: the callers of a table's functions have the CPU features; sizes as checked above and by the callers.
    unsafe {
        match ty {
            WeightType::Q4_0 => gemv_q4(kb, tiles, a, out),
            _ => gemv_q8(kb, tiles, a, out),
        }
    }
}

/// 4 bytes of activations in every lane.
///
/// # Safety
/// `q` must be readable for 4 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn broadcast_quad(q: *const i8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { q.cast::<i32>().read_unaligned() })
}

/// # Safety
/// `tiles` has `kb * 288` bytes per 16 outputs, and `a` at least kb blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn gemv_q4(kb: usize, tiles: &[u8], a: ActRow<'_>, out: &mut [f32]) {
    let low = _mm512_set1_epi8(15);
    let mut t = tiles.as_ptr();
    for out in out.chunks_exact_mut(R16_ROWS) {
        let mut acc = _mm512_setzero_ps();
        for b in 0..kb {
            // SAFETY: this is tile `b` of a row group, and block `b` of the activations.
            unsafe {
                request_stream::<288>(t);
                let q = a.q.as_ptr().add(b * BLOCK_LEN);
                let mut i0 = _mm512_set1_epi32(*a.bias.get_unchecked(b));
                let mut i1 = _mm512_setzero_si512();
                for g in 0..4 {
                    let w = _mm512_loadu_si512(t.add(32 + g * 64).cast());
                    i0 = _mm512_dpbusd_epi32(i0, _mm512_and_si512(w, low), broadcast_quad(q.add(g * 4)));
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
                    i1 = _mm512_dpbusd_epi32(i1, high, broadcast_quad(q.add(16 + g * 4)));
                }
                let d_w = _mm512_cvtph_ps(_mm256_loadu_si256(t.cast()));
                let d = _mm512_mul_ps(d_w, _mm512_set1_ps(*a.d.get_unchecked(b)));
                acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(i0, i1)), d, acc);
                t = t.add(288);
            }
        }
        // SAFETY: out has 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), acc) };
    }
}

/// # Safety
/// `tiles` has `kb * 544` bytes per 16 outputs, and `a` at least kb blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn gemv_q8(kb: usize, tiles: &[u8], a: ActRow<'_>, out: &mut [f32]) {
    let offset = _mm512_set1_epi8(-128);
    let mut t = tiles.as_ptr();
    for out in out.chunks_exact_mut(R16_ROWS) {
        let mut acc = _mm512_setzero_ps();
        for b in 0..kb {
            // SAFETY: this is tile `b` of a row group, and block `b` of the activations.
            unsafe {
                request_stream::<544>(t);
                let q = a.q.as_ptr().add(b * BLOCK_LEN);
                let mut i0 = _mm512_set1_epi32(16 * *a.bias.get_unchecked(b));
                let mut i1 = _mm512_setzero_si512();
                for g in [0, 2, 4, 6] {
                    let w = _mm512_loadu_si512(t.add(32 + g * 64).cast());
                    i0 = _mm512_dpbusd_epi32(i0, _mm512_xor_si512(w, offset), broadcast_quad(q.add(g * 4)));
                    let w = _mm512_loadu_si512(t.add(96 + g * 64).cast());
                    i1 = _mm512_dpbusd_epi32(i1, _mm512_xor_si512(w, offset), broadcast_quad(q.add(g * 4 + 4)));
                }
                let d_w = _mm512_cvtph_ps(_mm256_loadu_si256(t.cast()));
                let d = _mm512_mul_ps(d_w, _mm512_set1_ps(*a.d.get_unchecked(b)));
                acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(i0, i1)), d, acc);
                t = t.add(544);
            }
        }
        // SAFETY: out has 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), acc) };
    }
}

/// Canonical Q8_0 rows, one block at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) fn q8_rows(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]) {
    let offset = _mm256_set1_epi8(-128);
    for (&row, out) in rows.iter().zip(out) {
        let blocks = &region[row as usize * kb * 34..][..kb * 34];
        let mut acc = _mm_setzero_ps();
        for (b, block) in blocks.chunks_exact(34).enumerate() {
            // SAFETY: the block has 34 bytes and the activations 32 in block `b`.
            let (w, q) = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(1024).cast());
                (
                    _mm256_loadu_si256(block.as_ptr().add(2).cast()),
                    _mm256_loadu_si256(a.q[b * BLOCK_LEN..][..BLOCK_LEN].as_ptr().cast()),
                )
            };
            let dots = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_xor_si256(w, offset), q);
            let v = _mm_add_epi32(_mm256_castsi256_si128(dots), _mm256_extracti128_si256::<1>(dots));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
            let isum = _mm_add_epi32(v, _mm_set1_epi32(16 * a.bias[b]));
            let d_w = _mm_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes([block[0], block[1]])));
            let d = _mm_mul_ps(d_w, _mm_set1_ps(a.d[b]));
            acc = _mm_fmadd_ps(_mm_cvtepi32_ps(isum), d, acc);
        }
        *out = _mm_cvtss_f32(acc);
    }
}
