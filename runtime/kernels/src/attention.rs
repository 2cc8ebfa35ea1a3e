//! Attention over a [`KvPages`]: softmax(q·k / √d)·v for the query heads that share a KV head.
//!
//! Positions are taken in chunks of [`KV_CHUNK`] at absolute boundaries. Each chunk gives, for each query, the maximum score, the
//! sum of exponentials and the weighted sum of values relative to that maximum; chunks are merged in order of position. A query's
//! bits depend on nothing else: not on other queries, nor on the split among threads. One token ([`Kernels::attend_chunk`] and
//! [`Kernels::attend_merge`], which let threads share a long context) and many ([`Kernels::attend_batch`]) agree.

use std::ops::Range;

use crate::dispatch::Kernels;
use crate::kv::{KV_CHUNK, KV_TILE, KvPages, KvType};
use crate::math::round_bf16;
use crate::out::ColumnsMut;
use crate::scratch::with_floats;
use crate::table::{MAX_QUERIES, SoftmaxState};

/// The chunks that hold the positions `visible`.
pub fn kv_chunks(visible: &Range<usize>) -> Range<usize> {
    visible.start / KV_CHUNK..visible.end.div_ceil(KV_CHUNK)
}

/// The positions that the token at `pos` sees: itself and all before it, or the last `window` of them.
pub fn visible_range(pos: usize, window: Option<usize>) -> Range<usize> {
    let end = pos + 1;
    window.map_or(0, |window| end.saturating_sub(window))..end
}

/// Floats that [`Kernels::attend_chunk`] writes for `n_queries` query heads.
pub fn partial_len(n_queries: usize, head_dim: usize) -> usize {
    n_queries * (2 + head_dim)
}

/// Queries of up to MAX_QUERIES (token, head) pairs for one chunk, and what came of them.
struct Part<'a> {
    /// `n × dim`, padded.
    q: &'a [f32],
    /// `n × KV_CHUNK`.
    scores: &'a mut [f32],
    /// `n × dim`.
    acc: &'a mut [f32],
    state: [SoftmaxState; MAX_QUERIES],
}

impl Kernels {
    /// What chunk `chunk` adds to the attention of one token's query heads `q` (`n × head_dim`) over KV head `head`.
    /// `out` ([`partial_len`] floats) receives for each head the maximum, the sum and `head_dim` weighted values.
    ///
    /// # Panics
    /// If a length is wrong, a position of `visible` has no page, or the chunk holds none of it.
    #[allow(clippy::too_many_arguments)]
    pub fn attend_chunk(
        self,
        kv: KvPages<'_>,
        head: usize,
        q: &[f32],
        visible: Range<usize>,
        chunk: usize,
        scale: f32,
        out: &mut [f32],
    ) {
        let d = kv.format().head_dim();
        let n = q.len() / d;
        assert_eq!(q.len(), n * d, "attend_chunk: queries of {d}");
        assert_eq!(out.len(), partial_len(n, d), "attend_chunk: output length");
        check_visible(kv, &visible);
        assert!(kv_chunks(&visible).contains(&chunk), "attend_chunk: chunk {chunk} of {visible:?}");
        let dim = kv.format().padded_dim();
        with_floats(MAX_QUERIES * (KV_CHUNK + 2 * dim), |scratch| {
            let queries = q.chunks(MAX_QUERIES * d).zip(out.chunks_mut(MAX_QUERIES * (2 + d)));
            for (q, out) in queries {
                let n = q.len() / d;
                let (padded, rest) = scratch.split_at_mut(n * dim);
                let (scores, rest) = rest.split_at_mut(n * KV_CHUNK);
                for (dst, src) in padded.chunks_exact_mut(dim).zip(q.chunks_exact(d)) {
                    pad_query(kv.format().ty(), src, dst);
                }
                let mut part =
                    Part { q: padded, scores, acc: &mut rest[..n * dim], state: [SoftmaxState::EMPTY; MAX_QUERIES] };
                self.chunk_part(kv, head, chunk, scale, |_| visible.clone(), &mut part);
                for (i, out) in out.chunks_exact_mut(2 + d).enumerate() {
                    (out[0], out[1]) = (part.state[i].max, part.state[i].sum);
                    out[2..].copy_from_slice(&part.acc[i * dim..i * dim + d]);
                }
            }
        });
    }

    /// Merges what [`Self::attend_chunk`] wrote for consecutive chunks (`partials`, in order of position) into the attention
    /// output of the query heads, `n × head_dim`.
    ///
    /// # Panics
    /// If a length is wrong.
    pub fn attend_merge(self, partials: &[f32], head_dim: usize, out: &mut [f32]) {
        let n = out.len() / head_dim;
        let len = partial_len(n, head_dim);
        assert!(n > 0 && out.len() == n * head_dim, "attend_merge: output length");
        assert!(!partials.is_empty() && partials.len().is_multiple_of(len), "attend_merge: partials");
        for (i, acc) in out.chunks_exact_mut(head_dim).enumerate() {
            acc.fill(0.0);
            let mut state = SoftmaxState::EMPTY;
            for chunk in partials.chunks_exact(len) {
                let part = &chunk[i * (2 + head_dim)..(i + 1) * (2 + head_dim)];
                let [max, sum, values @ ..] = part else { continue };
                self.merge_part(&mut state, acc, SoftmaxState { max: *max, sum: *sum }, values);
            }
            for v in acc {
                *v /= state.sum;
            }
        }
    }

    /// Attention of many tokens over KV head `head`.
    ///
    /// `q` has a row of `q_ld` floats for each token: its queries come first, head by head. `out` is a tile of the outputs: rows are the same
    /// tokens, columns the query heads that share this KV head (`n × head_dim`), counted as in a row of `q`. Row `t` of the tile is the
    /// token at position `first_pos + out.first_row() + t`.
    ///
    /// # Panics
    /// If a length is wrong or a position that a token sees has no page.
    #[allow(clippy::too_many_arguments)]
    pub fn attend_batch(
        self,
        kv: KvPages<'_>,
        head: usize,
        q: &[f32],
        q_ld: usize,
        first_pos: usize,
        window: Option<usize>,
        scale: f32,
        out: &mut ColumnsMut<'_>,
    ) {
        let (d, dim) = (kv.format().head_dim(), kv.format().padded_dim());
        let (columns, tokens, first_row) = (out.columns(), out.rows(), out.first_row());
        let heads = columns.len() / d;
        assert!(heads > 0 && columns.len() == heads * d, "attend_batch: columns are not heads of {d}");
        assert!(q_ld >= columns.end && q.len() >= (first_row + tokens) * q_ld, "attend_batch: {} queries", q.len());
        if tokens == 0 {
            return;
        }
        let visible = |i: usize| visible_range(first_pos + first_row + i / heads, window);
        let n = tokens * heads;
        let all = visible(0).start..visible(n - 1).end;
        for i in 0..n {
            check_visible(kv, &visible(i));
        }
        // Per query: dim padded query values, dim accumulated ones, maximum and sum; and the scores and sums of one part.
        with_floats(n * (2 * dim + 2) + MAX_QUERIES * (KV_CHUNK + dim), |scratch| {
            let (queries, rest) = scratch.split_at_mut(n * dim);
            let (acc, rest) = rest.split_at_mut(n * dim);
            let (states, rest) = rest.split_at_mut(n * 2);
            let (scores, part_acc) = rest.split_at_mut(MAX_QUERIES * KV_CHUNK);
            for (i, query) in queries.chunks_exact_mut(dim).enumerate() {
                let from = (first_row + i / heads) * q_ld + columns.start + i % heads * d;
                pad_query(kv.format().ty(), &q[from..from + d], query);
            }
            acc.fill(0.0);
            for state in states.chunks_exact_mut(2) {
                state.copy_from_slice(&[SoftmaxState::EMPTY.max, SoftmaxState::EMPTY.sum]);
            }
            for chunk in kv_chunks(&all) {
                for start in (0..n).step_by(MAX_QUERIES) {
                    let end = n.min(start + MAX_QUERIES);
                    let mut part = Part {
                        q: &queries[start * dim..end * dim],
                        scores: &mut scores[..(end - start) * KV_CHUNK],
                        acc: &mut part_acc[..(end - start) * dim],
                        state: [SoftmaxState::EMPTY; MAX_QUERIES],
                    };
                    self.chunk_part(kv, head, chunk, scale, |i| visible(start + i), &mut part);
                    for i in start..end {
                        let values = &part.acc[(i - start) * dim..][..dim];
                        let mut state = SoftmaxState { max: states[i * 2], sum: states[i * 2 + 1] };
                        self.merge_part(&mut state, &mut acc[i * dim..(i + 1) * dim], part.state[i - start], values);
                        (states[i * 2], states[i * 2 + 1]) = (state.max, state.sum);
                    }
                }
            }
            for i in 0..n {
                let row = &mut out.row_mut(i / heads)[i % heads * d..][..d];
                for (o, &v) in row.iter_mut().zip(&acc[i * dim..]) {
                    *o = v / states[i * 2 + 1];
                }
            }
        });
    }

    /// Scores, softmax and values of one chunk for up to MAX_QUERIES queries. Queries that see nothing of it get an empty state.
    fn chunk_part(
        self,
        kv: KvPages<'_>,
        head: usize,
        chunk: usize,
        scale: f32,
        visible: impl Fn(usize) -> Range<usize>,
        part: &mut Part<'_>,
    ) {
        let dim = kv.format().padded_dim();
        let n = part.q.len() / dim;
        let local = |i: usize| {
            let v = visible(i);
            let base = chunk * KV_CHUNK;
            v.start.clamp(base, base + KV_CHUNK) - base..v.end.clamp(base, base + KV_CHUNK) - base
        };
        let (mut start, mut end) = (KV_CHUNK, 0);
        for v in (0..n).map(local).filter(|v| !v.is_empty()) {
            (start, end) = (start.min(v.start), end.max(v.end));
        }
        part.state.fill(SoftmaxState::EMPTY);
        if start >= end {
            return;
        }
        let seen = start..end;
        let tiles = seen.start / KV_TILE..seen.end.div_ceil(KV_TILE);
        // SAFETY: the table is of this CPU; the chunk has KV_CHUNK positions of `dim` values, and the queries and
        // scores are n rows, n <= MAX_QUERIES.
        unsafe { (self.table.scores)(kv.format().ty(), dim, kv.keys(head, chunk), tiles.clone(), part.q, part.scores) };
        for (i, s) in part.scores.chunks_exact_mut(KV_CHUNK).enumerate() {
            let v = local(i);
            if v.is_empty() {
                s[tiles.start * KV_TILE..tiles.end * KV_TILE].fill(0.0);
            } else {
                // SAFETY: the table is of this CPU; one row of KV_CHUNK scores, ranges inside it.
                part.state[i] = unsafe { (self.table.softmax)(kv.format().ty(), s, tiles.clone(), v, scale) };
            }
        }
        // SAFETY: as for the scores.
        unsafe { (self.table.values)(kv.format().ty(), dim, kv.values(head, chunk), seen, part.scores, part.acc) };
    }

    fn merge_part(self, state: &mut SoftmaxState, acc: &mut [f32], part: SoftmaxState, values: &[f32]) {
        // A part that a query saw nothing of has sum 0 and must not bring its maximum of -inf into play.
        if part.sum != 0.0 {
            // SAFETY: the table is of this CPU; values and sums have the same length.
            *state = unsafe { (self.table.merge)(*state, acc, part, &values[..acc.len()]) };
        }
    }
}

/// A query as the kernels take it: as exact as the cache's type has it multiplied, and zeros up to the padded dimension.
fn pad_query(ty: KvType, q: &[f32], padded: &mut [f32]) {
    let (values, padding) = padded.split_at_mut(q.len());
    values.copy_from_slice(q);
    if ty == KvType::Bf16 {
        values.iter_mut().for_each(|v| *v = round_bf16(*v));
    }
    padding.fill(0.0);
}

fn check_visible(kv: KvPages<'_>, visible: &Range<usize>) {
    let there = kv.positions();
    assert!(
        !visible.is_empty() && there.start <= visible.start && visible.end <= there.end,
        "positions {visible:?} of {there:?}"
    );
}
