//! Attention over the KV cache: store the new positions, then gather what each query sees.

use st_format::ModelShape;
use st_kernels::{RowSplit, kv_chunks, partial_len, visible_range};

use super::{Compute, operands};
use crate::activations::Rows;
use crate::batch::Run;
use crate::error::ModelError;
use crate::sequence::Sequence;

/// Rows of a run that one task takes.
const TASK_ROWS: usize = 8;

/// Buffers that attention needs besides its operands.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    /// What one chunk of positions adds to the output of a row's heads; `[tasks, partial_len]`.
    partials: Vec<f32>,
    tasks: Vec<ChunkTask>,
}

/// One KV head of one row, over one chunk of positions.
#[derive(Debug, Clone, Copy)]
struct ChunkTask {
    /// Which run the row is.
    run: usize,
    head: usize,
    chunk: usize,
}

/// Attention of one layer for all runs of a batch.
pub(crate) struct Attention<'a, 's> {
    pub(crate) config: &'a ModelShape,
    pub(crate) layer: usize,
    pub(crate) runs: &'a [Run],
    pub(crate) sequences: &'a mut [&'s mut Sequence],
}

impl Attention<'_, '_> {
    /// `qkv` is `[rows, q_dim + 2 * kv_dim]`, `out` is `[rows, q_dim]`.
    pub(crate) fn forward(
        self,
        cx: &Compute,
        scratch: &mut AttentionScratch,
        qkv: &Rows,
        out: &mut Rows,
    ) -> Result<(), ModelError> {
        let (width, q_dim) = (self.width(), self.config.q_dim());
        let (qkv, out) = operands("attention", qkv, width, out, q_dim)?;
        for run in self.runs {
            let rows = &qkv[run.rows.start * width..run.rows.end * width];
            self.sequences[run.sequence].kv_mut(self.layer).write(&cx.pool, run.position, rows, width);
        }
        self.single_rows(cx, scratch, qkv, out);
        for run in self.runs.iter().filter(|run| run.rows.len() > 1) {
            let rows = &qkv[run.rows.start * width..run.rows.end * width];
            self.many_rows(cx, run, rows, &mut out[run.rows.start * q_dim..run.rows.end * q_dim]);
        }
        Ok(())
    }

    fn width(&self) -> usize {
        self.config.q_dim() + 2 * self.config.kv_dim()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.config.head_dim as f32).sqrt()
    }

    /// Width of the query heads that share a KV head.
    fn group(&self) -> usize {
        self.config.n_heads / self.config.n_kv_heads * self.config.head_dim
    }

    /// Runs of one row: threads share the positions that they see, of all of them together.
    fn single_rows(&self, cx: &Compute, scratch: &mut AttentionScratch, qkv: &[f32], out: &mut [f32]) {
        let (c, group, width) = (self.config, self.group(), self.width());
        let kv = |run: &Run| self.sequences[run.sequence].kv(self.layer);
        let visible = |run: &Run| visible_range(run.position, kv(run).window());
        let AttentionScratch { partials, tasks } = scratch;
        tasks.clear();
        for (i, run) in self.runs.iter().enumerate().filter(|(_, run)| run.rows.len() == 1) {
            let chunks = kv_chunks(&visible(run));
            tasks.extend(
                (0..c.n_kv_heads).flat_map(|head| chunks.clone().map(move |chunk| ChunkTask { run: i, head, chunk })),
            );
        }
        let len = partial_len(c.n_heads / c.n_kv_heads, c.head_dim);
        let needed = tasks.len() * len;
        if partials.len() < needed {
            partials.resize(needed.next_power_of_two(), 0.0);
        }
        let (partials, tasks) = (&mut partials[..needed], &*tasks);
        cx.pool.run_chunks(partials, len, &|i, partial| {
            let ChunkTask { run, head, chunk } = tasks[i];
            let run = &self.runs[run];
            let q = &qkv[run.rows.start * width + head * group..][..group];
            let pages = kv(run).pages();
            cx.kernels.attend_chunk(pages, head, q, visible(run), chunk, self.scale(), partial);
        });
        let mut rest = &*partials;
        for same in tasks.chunk_by(|a, b| (a.run, a.head) == (b.run, b.head)) {
            let (these, others) = rest.split_at(same.len() * len);
            let at = self.runs[same[0].run].rows.start * c.q_dim() + same[0].head * group;
            cx.kernels.attend_merge(these, c.head_dim, &mut out[at..at + group]);
            rest = others;
        }
    }

    /// A run of several rows: threads share rows and KV heads.
    fn many_rows(&self, cx: &Compute, run: &Run, qkv: &[f32], out: &mut [f32]) {
        let (c, group, width) = (self.config, self.group(), self.width());
        let kv = self.sequences[run.sequence].kv(self.layer);
        cx.pool.run_tiles(out, c.q_dim(), RowSplit::Every(TASK_ROWS), group, &|_, mut out| {
            let head = out.columns().start / group;
            let (pages, window) = (kv.pages(), kv.window());
            cx.kernels.attend_batch(pages, head, qkv, width, run.position, window, self.scale(), &mut out);
        });
    }
}
