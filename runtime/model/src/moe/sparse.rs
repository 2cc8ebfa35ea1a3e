//! Experts for few rows: every (expert, row) pair reads the live rows of up and down only.

use std::ops::Range;

use st_experts::Lease;
use st_gguf::Matrix;
use st_kernels::{BLOCK_LEN, ExpertFormat, ExpertInput, HiddenGroup, OUTPUT_CHUNK, RowSplit};

use super::pairs::Pairs;
use crate::error::ModelError;
use crate::ops::Compute;
use crate::work::Work;

/// Neurons whose gates one task takes, at least.
const TASK_NEURONS: usize = 32;
/// Groups of 32 neurons whose rows of up one task takes, at least: a few rows alone are waited for.
const TASK_GROUPS: usize = 3;
/// Outputs that one task takes, at least: each pass over the neurons has its price.
const TASK_OUTPUTS: usize = 3 * OUTPUT_CHUNK;

/// Buffers for few rows.
#[derive(Debug, Default)]
pub(super) struct SparseScratch {
    /// `[pairs, n_ff]`.
    gates: Vec<f32>,
    /// Hidden values; `[pairs, groups]`.
    groups: Vec<HiddenGroup>,
    /// Pairs of the experts that are computed now.
    ranges: Vec<Range<usize>>,
}

impl SparseScratch {
    /// Bytes for `pairs` pairs.
    pub(super) fn bytes(pairs: usize, n_ff: usize) -> usize {
        pairs * (n_ff * 4 + HiddenGroup::groups(n_ff) * size_of::<HiddenGroup>() + size_of::<Range<usize>>())
    }

    /// Computes the experts at the ranks `ready` of `lease`, their experts ascending, for all rows that chose them, into the
    /// rows of `parts` that are their pairs.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn compute(
        &mut self,
        cx: &Compute,
        format: &ExpertFormat,
        lease: &Lease<'_>,
        ready: &[usize],
        pairs: &Pairs,
        input: ExpertInput<'_>,
        parts: &mut [f32],
    ) -> Result<(), ModelError> {
        let (n_ff, n_embd) = (format.n_ff(), format.n_embd());
        let n_groups = HiddenGroup::groups(n_ff);
        self.gates.resize(self.gates.len().max(pairs.len() * n_ff), 0.0);
        self.groups.resize(self.groups.len().max(pairs.len() * n_groups), HiddenGroup::ZERO);
        self.ranges.clear();
        self.ranges.extend(ready.iter().map(|&rank| pairs.of(lease.id(rank))));
        let of = &self.ranges[..];
        let wait_for = |matrix| ready.iter().try_for_each(|&rank| lease.wait(rank, matrix).map(|_| ()));
        // One matrix after the other: a gate is read as one long stream, which memory answers faster than pieces between the
        // scattered rows of up.
        wait_for(Matrix::Gate)?;
        let gates = &mut self.gates[..pairs.len() * n_ff];
        cx.pool.run_ranges(gates, n_ff, RowSplit::Ranges(of), TASK_NEURONS, || (), &|i, mut out| {
            if let Some(gate) = lease.get(ready[i], Matrix::Gate) {
                cx.kernels.expert_gate_rows(format, gate, input, &pairs.rows()[of[i].clone()], &mut out);
            }
        });
        let gates = &*gates;
        let groups = &mut self.groups[..pairs.len() * n_groups];
        cx.pool.run_ranges(groups, n_groups, RowSplit::Ranges(of), TASK_GROUPS, || (), &|i, mut out| {
            if let Some(up) = lease.get(ready[i], Matrix::Up) {
                let gates = &gates[of[i].start * n_ff..of[i].end * n_ff];
                cx.kernels.expert_hidden_rows(format, up, gates, input, &pairs.rows()[of[i].clone()], &mut out);
            }
        });
        wait_for(Matrix::Down)?;
        let groups = &*groups;
        cx.pool.run_ranges(
            &mut parts[..pairs.len() * n_embd],
            n_embd,
            RowSplit::Ranges(of),
            TASK_OUTPUTS,
            || (),
            &|i, mut out| {
                if let Some(down) = lease.get(ready[i], Matrix::Down) {
                    let hidden = &groups[of[i].start * n_groups..of[i].end * n_groups];
                    cx.kernels.expert_down_rows(format, down, hidden, &mut out);
                }
            },
        );
        Ok(())
    }

    /// Hidden values of some pairs that were computed, in groups of up to 32 neurons, pair after pair.
    pub(super) fn hidden(&self, of: Range<usize>, n_ff: usize) -> impl Iterator<Item = &[f32]> {
        let n_groups = HiddenGroup::groups(n_ff);
        let groups = self.groups[of.start * n_groups..of.end * n_groups].iter().enumerate();
        groups.map(move |(i, group)| &group.h[..BLOCK_LEN.min(n_ff - i % n_groups * BLOCK_LEN)])
    }

    /// What one expert's pairs `of` touched together: the gate whole, up and down only where a neuron lives for one of the
    /// rows (and the scales of down). `bytes` are those of the three matrices.
    pub(super) fn work(&self, format: &ExpertFormat, of: Range<usize>, [gate, up, down]: [u64; 3]) -> Work {
        let (n_ff, n_groups) = (format.n_ff() as u64, HiddenGroup::groups(format.n_ff()));
        let groups = &self.groups[of.start * n_groups..of.end * n_groups];
        let count = |mask: u32| u64::from(mask.count_ones());
        let parts = format.down_parts();
        let (mut active, mut scales, mut neurons, mut block) = (0, 0, 0, None);
        for i in 0..n_groups {
            let any = |mask: fn(&HiddenGroup) -> u32| {
                groups[i..].iter().step_by(n_groups).map(mask).fold(0, |any, mask| any | mask)
            };
            active += count(any(|group| group.active));
            let live = any(|group| group.live);
            if let Some(parts) = parts.filter(|_| live != 0) {
                neurons += count(live) * parts.neuron as u64;
                if block.replace(i / parts.block_groups) != Some(i / parts.block_groups) {
                    scales += parts.scales as u64;
                }
            }
        }
        // Without parts the rows of up alone are skipped.
        let down = parts.map_or(down, |_| scales + neurons);
        let weight_bytes = gate + active * up / n_ff + down;
        let live_neurons = groups.iter().map(|group| count(group.active)).sum();
        Work { tokens: 0, weight_bytes, neurons: of.len() as u64 * n_ff, live_neurons }
    }
}
