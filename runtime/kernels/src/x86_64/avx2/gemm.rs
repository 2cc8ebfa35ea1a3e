//! Many tokens: weights are unpacked once into a panel (16 rows, bytes and f32 scales; nibbles with their offset of 8, Q8_0 signed),
//! which then meets four tokens at a time.

use std::arch::x86_64::*;

use super::lanes::{broadcast_quad, dot_signed, interleave, load_group, load_rows};
use super::{gemm_parts, plane_columns, plane_rows, planes};
use crate::activations::{UNIT_BLOCK, UNIT_ROWS};
use crate::down_layout::DownLayout;
use crate::panel::{PANEL_BLOCK, PanelKind, PanelLayout, Values};
use crate::r16::{R16_ROWS, tile_bytes};
use crate::table::{GEMM_UNITS, PanelOutputs};
use crate::up_layout::UpLayout;
use crate::weight_type::WeightType;

#[target_feature(enable = "avx2,f16c")]
pub(super) fn panel_r16(ty: WeightType, _kb: usize, tiles: &[u8], panel: &mut [u8]) {
    if ty.has_codes() {
        return planes::panel_tiles(ty, tiles, panel);
    }
    let low = _mm256_set1_epi8(15);
    for (tile, block) in tiles.chunks_exact(tile_bytes(ty)).zip(panel.chunks_exact_mut(PANEL_BLOCK)) {
        if ty == WeightType::Q4_0 {
            let (values, _) = block.split_at_mut(512);
            let (lo, hi) = values.split_at_mut(256);
            let parts = tile[32..].chunks_exact(32).zip(lo.chunks_exact_mut(32)).zip(hi.chunks_exact_mut(32));
            for ((w, lo), hi) in parts {
                // SAFETY: 32 bytes each.
                unsafe {
                    let w = _mm256_loadu_si256(w.as_ptr().cast());
                    _mm256_storeu_si256(lo.as_mut_ptr().cast(), _mm256_and_si256(w, low));
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), low);
                    _mm256_storeu_si256(hi.as_mut_ptr().cast(), high);
                }
            }
        } else {
            block[..512].copy_from_slice(&tile[32..]);
        }
        store_scales(&tile[..32], &mut block[512..]);
    }
}

/// 16 f16 scales to f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store_scales(scales: &[u8], out: &mut [u8]) {
    for (d, out) in scales.chunks_exact(16).zip(out.chunks_exact_mut(32)) {
        // SAFETY: 16 and 32 bytes.
        unsafe {
            let d = _mm256_cvtph_ps(_mm_loadu_si128(d.as_ptr().cast()));
            _mm256_storeu_ps(out.as_mut_ptr().cast(), d);
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn panel_up(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    if up.ty.has_codes() {
        return plane_rows::panel_rows(up, region, first, panel);
    }
    let (scales, nibbles) = region.split_at(up.scales_bytes);
    for (b, block) in panel.chunks_exact_mut(PANEL_BLOCK).enumerate() {
        let mut d = [0u8; 32];
        for r in 0..R16_ROWS {
            d[r * 2..r * 2 + 2].copy_from_slice(&scales[((first + r) * up.kb + b) * 2..][..2]);
            let qs = &nibbles[(first + r) * up.row_bytes + b * 16..][..16];
            for (g, quad) in qs.chunks_exact(4).enumerate() {
                let w = u32::from_ne_bytes([quad[0], quad[1], quad[2], quad[3]]);
                let at = (g * R16_ROWS + r) * 4;
                block[at..at + 4].copy_from_slice(&(w & 0x0f0f_0f0f).to_ne_bytes());
                block[256 + at..256 + at + 4].copy_from_slice(&(w >> 4 & 0x0f0f_0f0f).to_ne_bytes());
            }
        }
        store_scales(&d, &mut block[512..]);
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn panel_down(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    if down.ty.has_codes() {
        return plane_columns::panel_down(down, region, chunk, panels);
    }
    let low = _mm256_set1_epi8(15);
    assert!(panels.len() == 8 * down.fb * PANEL_BLOCK && chunk * 64 < down.row_bytes);
    for b in 0..down.fb {
        let group = down.group(region, b);
        let (scales, rows) = (group.heads, group.rows);
        for quad in 0..8 {
            let at: [u32; 4] = std::array::from_fn(|i| ((quad * 4 + i) * down.row_bytes) as u32);
            for half in 0..2 {
                // SAFETY: the group has 32 rows, and the chunk is 64 bytes of each.
                let w = unsafe { load_rows(rows.as_ptr(), &at, chunk * 64 + half * 32) };
                for (v, w) in interleave(w).into_iter().enumerate() {
                    let to = |v: usize| (v * down.fb + b) * PANEL_BLOCK + quad * 64 + half * 32;
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), low);
                    for (at, w) in [(to(v), _mm256_and_si256(w, low)), (to(v + 4), high)] {
                        // SAFETY: 32 bytes.
                        unsafe { _mm256_storeu_si256(panels[at..at + 32].as_mut_ptr().cast(), w) };
                    }
                }
            }
        }
        for v in 0..8 {
            let to = (v * down.fb + b) * PANEL_BLOCK + 512;
            store_scales(&scales[chunk * 256 + v * 32..][..32], &mut panels[to..to + 64]);
        }
    }
}

/// Values stay signed.
pub(super) const LAYOUT: PanelLayout = PanelLayout { columns: 4, signed_offset: 0 };

/// Sums of integers of four tokens; those of 16 rows are two vectors.
pub(super) type Sums = [[__m256i; 2]; UNIT_ROWS];

#[target_feature(enable = "avx2,fma")]
pub(super) fn gemm(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs) {
    if !kind.is_plain() {
        // SAFETY: the features are those of this function.
        return unsafe { gemm_parts::gemm::<false>(kind, kb, panel, units, out, |sums, _, _| sums) };
    }
    // A loop of known length would be unrolled and put in the order of tokens, which needs more registers than there are.
    let groups = std::hint::black_box(8);
    match kind.values {
        Values::Nibbles { offset } => by_blocks(kb, panel, units, out, |w, a| {
            let mut sums = [[_mm256_setzero_si256(); 2]; UNIT_ROWS];
            for g in 0..groups {
                // SAFETY: 8 groups of 4 columns, of 16 rows and of 4 tokens.
                unsafe {
                    let w = load_group(w, g);
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let q = broadcast_quad(a.add((g * UNIT_ROWS + t) * 4));
                        sums[0] = _mm256_add_epi16(sums[0], _mm256_maddubs_epi16(w[0], q));
                        sums[1] = _mm256_add_epi16(sums[1], _mm256_maddubs_epi16(w[1], q));
                    }
                }
            }
            std::array::from_fn(|t| {
                // SAFETY: the unit has 4 of them.
                let start = unsafe { start_sums(a, t, offset) };
                sums[t].map(|sum| _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), start))
            })
        }),
        Values::Signed => by_blocks(kb, panel, units, out, |w, a| {
            let mut sums = [[_mm256_setzero_si256(); 2]; UNIT_ROWS];
            for g in 0..groups {
                // SAFETY: as above.
                unsafe {
                    let w = load_group(w, g);
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let q = broadcast_quad(a.add((g * UNIT_ROWS + t) * 4));
                        sums[0] = _mm256_add_epi32(sums[0], dot_signed(w[0], q));
                        sums[1] = _mm256_add_epi32(sums[1], dot_signed(w[1], q));
                    }
                }
            }
            sums
        }),
    }
}

/// `-offset` times the sum of token `t` of a unit's block, in every lane.
///
/// # Safety
/// `a` must be a unit's block, `t` one of 4.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn start_sums(a: *const i8, t: usize, offset: i32) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        if offset == 8 {
            return broadcast_quad(a.add(160 + t * 4));
        }
        _mm256_madd_epi16(broadcast_quad(a.add(144 + t * 4)), _mm256_set1_epi16(-offset as i16))
    }
}

/// Four tokens at a time; `sums` takes one block of the panel and of the unit.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn by_blocks(
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut PanelOutputs,
    sums: impl Fn(*const u8, *const i8) -> Sums,
) {
    assert!(panel.len() >= kb * PANEL_BLOCK && units.len() <= GEMM_UNITS * kb * UNIT_BLOCK);
    for (unit, out) in units.chunks_exact(kb * UNIT_BLOCK).zip(out.chunks_exact_mut(UNIT_ROWS * R16_ROWS)) {
        let mut acc = [[_mm256_setzero_ps(); 2]; UNIT_ROWS];
        for b in 0..kb {
            // SAFETY: block `b` of the panel and of the unit.
            unsafe {
                let w = panel.as_ptr().add(b * PANEL_BLOCK);
                let a: *const i8 = unit.as_ptr().add(b * UNIT_BLOCK).cast();
                for (t, (sums, acc)) in sums(w, a).iter().zip(&mut acc).enumerate() {
                    let d_a = _mm256_set1_ps(a.add(128 + t * 4).cast::<f32>().read_unaligned());
                    for (half, (&sum, acc)) in sums.iter().zip(acc).enumerate() {
                        let d = _mm256_mul_ps(_mm256_loadu_ps(w.add(512 + half * 32).cast()), d_a);
                        *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, *acc);
                    }
                }
            }
        }
        for (acc, out) in acc.as_flattened().iter().zip(out.chunks_exact_mut(8)) {
            // SAFETY: out has 8 floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), *acc) };
        }
    }
}
