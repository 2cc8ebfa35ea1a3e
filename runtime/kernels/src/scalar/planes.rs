//! Products with the types of [`crate::planes`]: 16 rows become a panel, rows of up and columns of down codes.

use std::ops::Range;

use super::step::{LAYOUT, add_block, add_panel_block};
use crate::activations::{ActRow, HiddenGroup};
use crate::codes::Coding;
use crate::columns::{block_scales, group_codes};
use crate::down_layout::DownLayout;
use crate::down_layout::OUTPUT_CHUNK;
use crate::live::{self, LiveRows};
use crate::panel::PanelKind;
use crate::planes::{panel_of_tiles, row_codes, row_scales};
use crate::r16::{R16_ROWS, group_bytes};
use crate::scratch::with_bytes;
use crate::up_layout::UpLayout;
use crate::weight_type::{BLOCK_LEN, WeightType};

pub(crate) fn gemv(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    let kind = PanelKind::of(ty);
    with_bytes(kb * kind.block_bytes(), |panel| {
        for (i, group) in tiles.chunks_exact(group_bytes(ty, kb)).enumerate() {
            panel_of_tiles(LAYOUT, ty, group, panel);
            for (a, out) in acts.iter().zip(out.iter_mut()) {
                let mut acc = [0.0; R16_ROWS];
                for (b, w) in panel.chunks_exact(kind.block_bytes()).enumerate() {
                    let q = std::array::from_fn(|c| i32::from(a.q[b * BLOCK_LEN + c]));
                    add_panel_block(kind, w, &q, a.d[b], &mut acc);
                }
                out[i * R16_ROWS..][..R16_ROWS].copy_from_slice(&acc);
            }
        }
    });
}

pub(crate) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    let coding = Coding::of(up.ty);
    let (steps, subs) = (up.ty.block_len() / BLOCK_LEN, BLOCK_LEN / coding.sub_len);
    live::each_live_row(rows, acts, out, |row, a, out| {
        *out = 0.0;
        for b in 0..up.kb / steps {
            let scales = row_scales(up, region, row, b);
            for step in 0..steps {
                let s = b * steps + step;
                let codes = row_codes(up, region, row, s);
                let q = &a.q[s * BLOCK_LEN..][..BLOCK_LEN];
                for (sub, (codes, q)) in codes.chunks(coding.sub_len).zip(q.chunks(coding.sub_len)).enumerate() {
                    let (scale, minimum) = scales[step * subs + sub];
                    let isum = codes.iter().zip(q).map(|(&code, &q)| coding.value(code) * i32::from(q)).sum();
                    *out = add_block(*out, isum, scale, a.d[s]);
                    if coding.has_minima {
                        *out = add_block(*out, q.iter().map(|&q| i32::from(q)).sum(), minimum, a.d[s]);
                    }
                }
            }
        }
    });
}

pub(crate) fn down(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
) {
    let coding = Coding::of(down.ty);
    let first = chunks.start * OUTPUT_CHUNK;
    for (hidden, out) in hidden.chunks_exact(down.fb).zip(out) {
        out.fill(0.0);
        for (b, hidden) in hidden.iter().enumerate().filter(|(_, hidden)| hidden.live != 0) {
            let group = down.group(region, b);
            for (i, acc) in out.iter_mut().enumerate() {
                let (scales, codes) = (block_scales(down, group.heads, first + i), group_codes(down, group, first + i));
                let parts = codes.chunks(coding.sub_len).zip(hidden.q.chunks(coding.sub_len)).enumerate();
                for (sub, (codes, q)) in parts {
                    let (scale, minimum) = scales[group.step * down.subs + sub];
                    let isum = codes.iter().zip(q).map(|(&code, &q)| coding.value(code) * i32::from(q)).sum();
                    *acc = add_block(*acc, isum, scale, hidden.d);
                    if coding.has_minima {
                        *acc = add_block(*acc, q.iter().map(|&q| i32::from(q)).sum(), minimum, hidden.d);
                    }
                }
            }
        }
    }
}
