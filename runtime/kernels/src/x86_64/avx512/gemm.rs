//! Many tokens: weights are unpacked once into a panel (16 rows, unsigned bytes and f32 scales), which then meets up to 12 tokens
//! at a time with all sums in registers.

use std::arch::x86_64::*;

use super::lanes::{broadcast_quad, interleave, load_rows, start_sums, transpose};
use crate::activations::{UNIT_BLOCK, UNIT_ROWS};
use crate::down_layout::DownLayout;
use crate::panel::{PANEL_BLOCK, PANEL_VALUES, PanelKind, PanelLayout, Values};
use crate::r16::{R16_ROWS, tile_bytes};
use crate::table::PanelOutputs;
use crate::up_layout::UpLayout;
use crate::weight_type::WeightType;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) fn panel_r16(ty: WeightType, _kb: usize, tiles: &[u8], panel: &mut [u8]) {
    if ty.has_codes() {
        return super::planes::panel_tiles(ty, tiles, panel);
    }
    let low = _mm512_set1_epi8(15);
    let offset = _mm512_set1_epi8(-128);
    for (tile, block) in tiles.chunks_exact(tile_bytes(ty)).zip(panel.chunks_exact_mut(PANEL_BLOCK)) {
        let (tile, out) = (tile.as_ptr(), block.as_mut_ptr());
        // SAFETY: a tile is 32 bytes of scales and 4 (Q4_0) or 8 (Q8_0) groups of 64; a panel block has 8 groups of 64 and 64
        // bytes of scales.
        unsafe {
            if ty == WeightType::Q4_0 {
                for g in 0..4 {
                    let w = _mm512_loadu_si512(tile.add(32 + g * 64).cast());
                    _mm512_storeu_si512(out.add(g * 64).cast(), _mm512_and_si512(w, low));
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
                    _mm512_storeu_si512(out.add(256 + g * 64).cast(), high);
                }
            } else {
                for g in 0..8 {
                    let w = _mm512_loadu_si512(tile.add(32 + g * 64).cast());
                    _mm512_storeu_si512(out.add(g * 64).cast(), _mm512_xor_si512(w, offset));
                }
            }
            let d = _mm512_cvtph_ps(_mm256_loadu_si256(tile.cast()));
            _mm512_storeu_ps(out.add(512).cast(), d);
        }
    }
}

/// Four blocks of 16 rows at a time: their 16 × 16 quads of bytes are transposed.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) fn panel_up(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    if up.ty.has_codes() {
        return super::plane_rows::panel_rows(up, region, first, panel);
    }
    let low = _mm512_set1_epi8(15);
    let (scales, nibbles) = region.split_at(up.scales_bytes);
    let scales = &scales[first * up.kb * 2..(first + R16_ROWS) * up.kb * 2];
    let nibbles = &nibbles[first * up.row_bytes..(first + R16_ROWS) * up.row_bytes];
    for (c, blocks) in panel.chunks_mut(4 * PANEL_BLOCK).enumerate() {
        // SAFETY: rows have up.row_bytes bytes, which are whole chunks of 64.
        let rows = std::array::from_fn(|r| unsafe {
            _mm512_loadu_si512(nibbles.as_ptr().add(r * up.row_bytes + c * 64).cast())
        });
        let quads = transpose(rows);
        for (b, out) in blocks.chunks_exact_mut(PANEL_BLOCK).enumerate() {
            let at = c * 4 + b;
            let d: [u16; R16_ROWS] = std::array::from_fn(|r| {
                let i = (r * up.kb + at) * 2;
                u16::from_le_bytes([scales[i], scales[i + 1]])
            });
            let out = out.as_mut_ptr();
            // SAFETY: a panel block has 8 groups of 64 bytes and 64 bytes of scales; d has 32 bytes.
            unsafe {
                for g in 0..4 {
                    let w = quads[b * 4 + g];
                    _mm512_storeu_si512(out.add(g * 64).cast(), _mm512_and_si512(w, low));
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
                    _mm512_storeu_si512(out.add(256 + g * 64).cast(), high);
                }
                let d = _mm512_cvtph_ps(_mm256_loadu_si256(d.as_ptr().cast()));
                _mm512_storeu_ps(out.add(512).cast(), d);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) fn panel_down(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    if down.ty.has_codes() {
        return super::plane_columns::panel_down(down, region, chunk, panels);
    }
    let low = _mm512_set1_epi8(15);
    assert!(panels.len() == 8 * down.fb * PANEL_BLOCK && chunk * 64 < down.row_bytes);
    for b in 0..down.fb {
        let group = down.group(region, b);
        let (scales, rows) = (group.heads, group.rows);
        // SAFETY: each of the 8 panels has a block `b` of 8 groups and scales; the chunk is 64 bytes of each of the 32 rows
        // and 256 bytes of scales.
        unsafe {
            let panels = panels.as_mut_ptr();
            let block = |v: usize| panels.add((v * down.fb + b) * PANEL_BLOCK);
            for quad in 0..8 {
                let at: [u32; 4] = std::array::from_fn(|i| ((quad * 4 + i) * down.row_bytes) as u32);
                for (v, w) in interleave(load_rows(rows.as_ptr(), &at, chunk * 64)).into_iter().enumerate() {
                    _mm512_storeu_si512(block(v).add(quad * 64).cast(), _mm512_and_si512(w, low));
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
                    _mm512_storeu_si512(block(v + 4).add(quad * 64).cast(), high);
                }
            }
            for v in 0..8 {
                let d = _mm256_loadu_si256(scales.as_ptr().add(chunk * 256 + v * 32).cast());
                _mm512_storeu_ps(block(v).add(512).cast(), _mm512_cvtph_ps(d));
            }
        }
    }
}

/// Signed values are multiplied as unsigned bytes.
pub(super) const LAYOUT: PanelLayout = PanelLayout { columns: 4, signed_offset: 128 };

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn gemm(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs) {
    assert!(panel.len() >= kb * kind.block_bytes() && units.len().is_multiple_of(kb * UNIT_BLOCK));
    let offset = match kind.values {
        Values::Nibbles { offset } => offset,
        Values::Signed => 128,
    };
    // SAFETY: a unit's block has both kinds of sums of token `t`.
    let eights = |a: *const i8, t: usize| unsafe { a.add(160 + t * 4).cast::<i32>().read_unaligned() };
    // SAFETY: as above; the sizes are checked.
    unsafe {
        match (kind.sub_blocks, kind.has_minima, offset) {
            (1, false, 8) => units_of::<1, false>(kb, panel, units, out, |a, t, _| _mm512_set1_epi32(eights(a, t))),
            (1, false, 128) => {
                units_of::<1, false>(kb, panel, units, out, |a, t, _| _mm512_set1_epi32(16 * eights(a, t)));
            }
            (1, false, _) => {
                let minus = _mm512_set1_epi16(-offset as i16);
                units_of::<1, false>(kb, panel, units, out, |a, t, _| start_sums(a.add(144 + t * 4), minus));
            }
            (1, true, _) => {
                let minus = _mm512_set1_epi16(-offset as i16);
                units_of::<1, true>(kb, panel, units, out, |a, t, _| start_sums(a.add(144 + t * 4), minus));
            }
            (_, has_minima, _) => {
                let minus = [0, 16].map(|shift| _mm512_set1_epi32((-offset & 0xffff) << shift));
                let start = |a: *const i8, t: usize, sub: usize| start_sums(a.add(144 + t * 4), minus[sub]);
                match has_minima {
                    false => units_of::<2, false>(kb, panel, units, out, start),
                    true => units_of::<2, true>(kb, panel, units, out, start),
                }
            }
        }
    }
}

/// # Safety
/// As [`tokens`], for whole units.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn units_of<const SUBS: usize, const MINIMA: bool>(
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut PanelOutputs,
    start: impl Fn(*const i8, usize, usize) -> __m512i,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match units.len() / (kb * UNIT_BLOCK) {
            1 => tokens::<1, SUBS, MINIMA>(kb, panel, units, out, start),
            2 => tokens::<2, SUBS, MINIMA>(kb, panel, units, out, start),
            3 => tokens::<3, SUBS, MINIMA>(kb, panel, units, out, start),
            n => unreachable!("{n} units"),
        }
    }
}

/// `U` units of 4 tokens; blocks have `SUBS` scales for each row. Sums of sub-block `sub` of token `t` begin at `start(block, t, sub)`.
///
/// # Safety
/// `panel` has kb blocks, `units` has U units of kb blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn tokens<const U: usize, const SUBS: usize, const MINIMA: bool>(
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut [f32],
    start: impl Fn(*const i8, usize, usize) -> __m512i,
) {
    let mut acc = [[_mm512_setzero_ps(); UNIT_ROWS]; U];
    let unit_bytes = kb * UNIT_BLOCK;
    let block_bytes = PANEL_VALUES + SUBS * 64 * (1 + usize::from(MINIMA));
    // Picks the sum of a whole block, or that of sub-block `sub`.
    let one = |sub: usize| match SUBS {
        1 => _mm512_set1_epi16(1),
        _ => _mm512_set1_epi32(1 << (16 * sub)),
    };
    for b in 0..kb {
        for sub in 0..SUBS {
            // SAFETY: block `b` of the panel and of each unit.
            unsafe {
                let w = panel.as_ptr().add(b * block_bytes);
                let a: [*const i8; U] =
                    std::array::from_fn(|u| units.as_ptr().add(u * unit_bytes + b * UNIT_BLOCK).cast());
                let mut sums = [[_mm512_setzero_si512(); UNIT_ROWS]; U];
                for (a, sums) in a.iter().zip(&mut sums) {
                    for (t, sum) in sums.iter_mut().enumerate() {
                        *sum = start(*a, t, sub);
                    }
                }
                for g in sub * 8 / SUBS..(sub + 1) * 8 / SUBS {
                    let w = _mm512_loadu_si512(w.add(g * 64).cast());
                    for (a, sums) in a.iter().zip(&mut sums) {
                        for (t, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_dpbusd_epi32(*sum, w, broadcast_quad(a.add((g * UNIT_ROWS + t) * 4)));
                        }
                    }
                }
                let d_w = _mm512_loadu_ps(w.add(PANEL_VALUES + sub * 64).cast());
                for ((a, sums), acc) in a.iter().zip(&sums).zip(&mut acc) {
                    for ((t, sum), acc) in sums.iter().enumerate().zip(acc) {
                        let d_a = _mm512_set1_ps(a.add(128 + t * 4).cast::<f32>().read_unaligned());
                        *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), _mm512_mul_ps(d_w, d_a), *acc);
                        if MINIMA {
                            let m_w = _mm512_loadu_ps(w.add(PANEL_VALUES + (SUBS + sub) * 64).cast());
                            let sum = _mm512_cvtepi32_ps(start_sums(a.add(144 + t * 4), one(sub)));
                            *acc = _mm512_fmadd_ps(sum, _mm512_mul_ps(m_w, d_a), *acc);
                        }
                    }
                }
            }
        }
    }
    for (acc, out) in acc.as_flattened().iter().zip(out.chunks_exact_mut(R16_ROWS)) {
        // SAFETY: out has 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *acc) };
    }
}
