//! Integer kernels. For every output `acc = fma(f32(Σ a·w), d_w * d_a, acc)` over the blocks of 32 in order, from 0.

use std::ops::Range;

use half::f16;

use super::step::{LAYOUT, add_block, add_panel_block, float};
use crate::activations::{ActRow, HiddenGroup, Sums, UNIT_BLOCK, UNIT_ROWS};
use crate::block::{BlockQ4_0, BlockQ8_0, level};
use crate::columns;
use crate::down_layout::DownLayout;
use crate::down_layout::OUTPUT_CHUNK;
use crate::expert_format::down_nibble;
use crate::live::{self, LiveRows};
use crate::panel::{PANEL_BLOCK, PanelKind, PanelMut};
use crate::planes;
use crate::r16::{self, R16_ROWS, group_bytes, tile_bytes, tile_scale, tile_value};
use crate::table::PanelOutputs;
use crate::up_layout::UpLayout;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

pub(crate) fn quantize_q8(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [Sums]) {
    let blocks = x.chunks_exact(BLOCK_LEN).zip(q.chunks_exact_mut(BLOCK_LEN));
    for ((x, q), (d, sums)) in blocks.zip(d.iter_mut().zip(sums)) {
        let block = BlockQ8_0::quantize(x.try_into().expect("32 floats"));
        q.copy_from_slice(&block.qs);
        *d = f16::from_bits(block.d).to_f32();
        *sums = [0, 16].map(|at| q[at..at + 16].iter().map(|&v| i16::from(v)).sum());
    }
}

pub(crate) fn quantize_q4_0(x: &[f32], out: &mut [u8]) {
    crate::block::quantize_row_q4_0(x, out);
}

pub(crate) fn pack_r16(ty: WeightType, kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    r16::pack(ty, canonical.len() / group_bytes(ty, kb) * R16_ROWS, kb * BLOCK_LEN, canonical, tiles);
}

pub(crate) fn gemv_r16(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    if ty.has_codes() {
        return super::planes::gemv(ty, kb, tiles, acts, out);
    }
    live::each_row_group(kb * tile_bytes(ty), tiles, acts, out, |group, a, out| {
        out.fill(0.0);
        for (b, tile) in group.chunks_exact(tile_bytes(ty)).enumerate() {
            let q = &a.q[b * BLOCK_LEN..][..BLOCK_LEN];
            for (r, acc) in out.iter_mut().enumerate() {
                let isum = q.iter().enumerate().map(|(c, &v)| i32::from(v) * tile_value(ty, tile, r, c)).sum();
                *acc = add_block(*acc, isum, tile_scale(tile, r), a.d[b]);
            }
        }
    });
}

/// Block `b` of row `row` of an up region.
fn up_block(up: &UpLayout, region: &[u8], row: usize, b: usize) -> BlockQ4_0 {
    let scale = &region[(row * up.kb + b) * 2..][..2];
    let qs = &region[up.scales_bytes + row * up.row_bytes + b * 16..][..16];
    BlockQ4_0 { d: u16::from_le_bytes([scale[0], scale[1]]), qs: qs.try_into().expect("16 bytes") }
}

pub(crate) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    if up.ty.has_codes() {
        return super::planes::up_rows(up, region, rows, acts, out);
    }
    live::each_live_row(rows, acts, out, |row, a, out| {
        *out = 0.0;
        for (b, q) in a.q.chunks_exact(BLOCK_LEN).enumerate().take(up.kb) {
            let block = up_block(up, region, row, b);
            let isum = q.iter().enumerate().map(|(c, &v)| i32::from(v) * level(&block.qs, c)).sum();
            *out = add_block(*out, isum, f16::from_bits(block.d).to_f32(), a.d[b]);
        }
    });
}

pub(crate) fn q8_rows(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]) {
    for (&row, out) in rows.iter().zip(out) {
        *out = 0.0;
        let blocks = region[row as usize * kb * 34..].chunks_exact(34).zip(a.q.chunks_exact(BLOCK_LEN));
        for (b, (block, q)) in blocks.enumerate().take(kb) {
            let isum = block[2..].iter().zip(q).map(|(&w, &v)| i32::from(w as i8) * i32::from(v)).sum();
            *out = add_block(*out, isum, f16::from_le_bytes([block[0], block[1]]).to_f32(), a.d[b]);
        }
    }
}

pub(crate) fn down(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
) {
    if down.ty.has_codes() {
        return super::planes::down(down, region, hidden, chunks, out);
    }
    let first = chunks.start * OUTPUT_CHUNK;
    for (hidden, out) in hidden.chunks_exact(down.fb).zip(out) {
        out.fill(0.0);
        for (b, hidden) in hidden.iter().enumerate().filter(|(_, hidden)| hidden.live != 0) {
            let group = down.group(region, b);
            let (scales, rows) = (group.heads, group.rows);
            for (i, acc) in out.iter_mut().enumerate() {
                let o = first + i;
                let mut isum = 0;
                for (n, &h) in hidden.q.iter().enumerate() {
                    if h != 0 {
                        isum += i32::from(h) * (i32::from(down_nibble(&rows[n * down.row_bytes..], o)) - 8);
                    }
                }
                let d_w = f16::from_le_bytes([scales[o * 2], scales[o * 2 + 1]]).to_f32();
                *acc = add_block(*acc, isum, d_w, hidden.d);
            }
        }
    }
}

/// Writes value (row r, column c) and the scales of one block of a panel.
fn fill_panel_block(
    ty: WeightType,
    block: &mut [u8],
    value: impl Fn(usize, usize) -> i32,
    scale: impl Fn(usize) -> f32,
) {
    let mut panel = PanelMut::zeroed(LAYOUT, PanelKind::of(ty), block);
    for r in 0..R16_ROWS {
        (0..BLOCK_LEN).for_each(|c| panel.put(0, r, c, value(r, c)));
        panel.put_scale(0, r, 0, scale(r), 0.0);
    }
}

pub(crate) fn panel_r16(ty: WeightType, _kb: usize, tiles: &[u8], panel: &mut [u8]) {
    if ty.has_codes() {
        return planes::panel_of_tiles(LAYOUT, ty, tiles, panel);
    }
    for (tile, block) in tiles.chunks_exact(tile_bytes(ty)).zip(panel.chunks_exact_mut(PANEL_BLOCK)) {
        fill_panel_block(ty, block, |r, c| tile_value(ty, tile, r, c), |r| tile_scale(tile, r));
    }
}

pub(crate) fn panel_up(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    if up.ty.has_codes() {
        return planes::panel_of_rows(LAYOUT, up, region, first, panel);
    }
    for (b, out) in panel.chunks_exact_mut(PANEL_BLOCK).enumerate() {
        let blocks: [BlockQ4_0; R16_ROWS] = std::array::from_fn(|r| up_block(up, region, first + r, b));
        fill_panel_block(
            WeightType::Q4_0,
            out,
            |r, c| level(&blocks[r].qs, c),
            |r| f16::from_bits(blocks[r].d).to_f32(),
        );
    }
}

pub(crate) fn panel_down(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    if down.ty.has_codes() {
        return columns::panels_of_chunk(LAYOUT, down, region, chunk, panels);
    }
    for (v, panel) in panels.chunks_exact_mut(down.fb * PANEL_BLOCK).enumerate() {
        let first = chunk * OUTPUT_CHUNK + v * R16_ROWS;
        for (b, out) in panel.chunks_exact_mut(PANEL_BLOCK).enumerate() {
            let group = down.group(region, b);
            let (scales, rows) = (group.heads, group.rows);
            fill_panel_block(
                WeightType::Q4_0,
                out,
                |r, n| i32::from(down_nibble(&rows[n * down.row_bytes..], first + r)) - 8,
                |r| f16::from_le_bytes([scales[(first + r) * 2], scales[(first + r) * 2 + 1]]).to_f32(),
            );
        }
    }
}

pub(crate) fn gemm(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs) {
    out.fill(0.0);
    for (unit, out) in units.chunks_exact(kb * UNIT_BLOCK).zip(out.chunks_exact_mut(UNIT_ROWS * R16_ROWS)) {
        for (w, a) in panel.chunks_exact(kind.block_bytes()).zip(unit.chunks_exact(UNIT_BLOCK)) {
            for (t, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                let q = std::array::from_fn(|c| i32::from(a[(c / 4 * UNIT_ROWS + t) * 4 + c % 4] as i8));
                add_panel_block(kind, w, &q, float(&a[128..], t), out);
            }
        }
    }
}
