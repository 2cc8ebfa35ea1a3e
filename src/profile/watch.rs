//! Counts what a model does while a text runs.

use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;

use indicatif::ProgressBar;
use st_format::ModelShape;
use st_model::{Batch, Observer, Routing};

use crate::picture::Quartiles;
use crate::signals::Interrupt;

/// Distances between tokens at which choices are compared.
pub(crate) const DISTANCES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Steps of the share of neurons that are 0.
const STEPS: usize = 256;
/// Tokens whose choices are kept, to be replayed.
const KEPT: usize = 4096;

/// What was counted of one text.
pub(crate) struct Watch {
    pub(crate) n_layers: usize,
    pub(crate) n_experts: usize,
    pub(crate) n_used: usize,
    n_ff: usize,
    pub(crate) tokens: u64,
    /// By layer and expert, the tokens that chose it.
    pub(crate) chosen: Vec<u64>,
    /// By layer and step, how often so large a share of an expert's neurons was 0.
    zeros: Vec<u64>,
    /// By layer, the choices of the latest tokens.
    recent: Vec<VecDeque<Vec<u32>>>,
    /// By distance: experts that were chosen again, and experts looked at.
    again: [(u64, u64); DISTANCES.len()],
    /// By token, layer and rank.
    pub(crate) trace: Vec<u16>,
    /// Tokens of earlier batches in `trace`.
    before: usize,
    bar: ProgressBar,
    interrupt: Interrupt,
    /// Tokens of earlier passes.
    done: u64,
}

impl Watch {
    /// Nothing was counted yet.
    pub(crate) fn new(config: &ModelShape, bar: ProgressBar, interrupt: Interrupt) -> Self {
        Self {
            n_layers: config.n_layers,
            n_experts: config.n_experts,
            n_used: config.n_experts_used,
            n_ff: config.n_ff,
            tokens: 0,
            chosen: vec![0; config.n_layers * config.n_experts],
            zeros: vec![0; config.n_layers * (STEPS + 1)],
            recent: vec![VecDeque::new(); config.n_layers],
            again: [(0, 0); DISTANCES.len()],
            trace: Vec::new(),
            before: 0,
            bar,
            interrupt,
            done: 0,
        }
    }

    /// Memory that it takes for a model, in bytes, about.
    pub(crate) fn memory(config: &ModelShape) -> u64 {
        let trace = KEPT * config.n_layers * config.n_experts_used;
        let counts = config.n_layers * (config.n_experts + STEPS + 1) * 8;
        let recent = config.n_layers * 64 * (config.n_experts_used * 4 + 32);
        // The trace is made a second time to be replayed, in wider numbers.
        (trace * (2 + 24) + counts + recent) as u64 + (1 << 20)
    }

    /// The sparsity of a layer.
    pub(crate) fn sparsity(&self, layer: usize) -> Quartiles {
        let steps = &self.zeros[layer * (STEPS + 1)..][..=STEPS];
        let total: u64 = steps.iter().sum();
        let at = |share: f64| {
            let mut below = 0;
            let wanted = share * total as f64;
            let step = steps.iter().position(|&count| {
                below += count;
                below as f64 >= wanted && below > 0
            });
            step.unwrap_or(0) as f64 / STEPS as f64
        };
        let sum: f64 = steps.iter().enumerate().map(|(step, &count)| step as f64 * count as f64).sum();
        let mean = sum / total.max(1) as f64 / STEPS as f64;
        Quartiles { p5: at(0.05), p25: at(0.25), median: at(0.5), p75: at(0.75), p95: at(0.95), mean }
    }

    /// For each distance the share of experts that were chosen again.
    pub(crate) fn repeats(&self) -> impl Iterator<Item = f64> {
        self.again.iter().map(|&(again, of)| again as f64 / of.max(1) as f64)
    }

    fn count(&mut self, layer: usize, routing: &Routing) {
        let n_rows = routing.n_tokens();
        if layer == 0 {
            self.tokens += n_rows as u64;
            let kept = self.trace.len() / (self.n_layers * self.n_used);
            self.before = kept;
            let more = n_rows.min(KEPT.saturating_sub(kept));
            self.trace.resize((kept + more) * self.n_layers * self.n_used, 0);
        }
        let kept = self.trace.len() / (self.n_layers * self.n_used) - self.before;
        for (row, ids) in routing.ids().chunks_exact(self.n_used).enumerate() {
            for &id in ids {
                self.chosen[layer * self.n_experts + id as usize] += 1;
            }
            let recent = &mut self.recent[layer];
            for (&distance, (again, of)) in DISTANCES.iter().zip(&mut self.again) {
                if let Some(earlier) = recent.len().checked_sub(distance).and_then(|i| recent.get(i)) {
                    *again += ids.iter().filter(|id| earlier.contains(id)).count() as u64;
                    *of += ids.len() as u64;
                }
            }
            let mut next = if recent.len() == 64 { recent.pop_front().unwrap_or_default() } else { Vec::new() };
            next.clear();
            next.extend_from_slice(ids);
            recent.push_back(next);
            if row < kept {
                let at = ((self.before + row) * self.n_layers + layer) * self.n_used;
                let places = &mut self.trace[at..at + self.n_used];
                places.iter_mut().zip(ids).for_each(|(place, &id)| *place = id as u16);
            }
        }
    }
}

impl Observer for Watch {
    fn routing(&mut self, layer: usize, _: &Batch, routing: &Routing) -> io::Result<()> {
        self.count(layer, routing);
        Ok(())
    }

    fn watches_neurons(&self) -> bool {
        true
    }

    fn neurons(&mut self, layer: usize, _: u32, rows: &[u32], live: &[u32]) -> io::Result<()> {
        let steps = &mut self.zeros[layer * (STEPS + 1)..][..=STEPS];
        for live in live.chunks(live.len() / rows.len().max(1)) {
            let living = live.iter().map(|word| word.count_ones()).sum::<u32>() as usize;
            let zeros = self.n_ff.saturating_sub(living);
            steps[(zeros * STEPS + self.n_ff / 2) / self.n_ff.max(1)] += 1;
        }
        Ok(())
    }

    fn progress(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        self.bar.set_position(self.done + done as u64);
        if done == of {
            self.done += of as u64;
        }
        self.interrupt.flow()
    }
}
