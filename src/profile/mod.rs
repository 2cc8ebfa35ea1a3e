//! What a model did with texts: which experts its routers chose, which neurons lived, how choices follow each other, and what caches of
//! any size would have held.
//!
//! `watch.rs` counts while a text runs, in memory that does not grow with it; this file turns counts into figures; `page.rs` shows them.

mod importance;
mod page;
mod watch;

use serde::Serialize;
use st_experts::cache_sim::Replay;
use st_experts::{Policy, RoutingTrace, TraceHeader, Use};

pub(crate) use importance::Importance;
pub(crate) use page::{page, pictures};
pub(crate) use watch::{DISTANCES, Watch};

use crate::picture::Quartiles;

/// How profiles begin.
pub(crate) const BEGIN: &str = "{\"st_tool_profile\":";
/// An expert that fewer of the tokens choose is rarely used: the report's own limit.
const RARE: f64 = 0.14;
/// Experts that so many of the tokens choose are busy, as the report has it.
const BUSY: [f64; 2] = [0.4, 0.6];
/// Sizes of the cache that are replayed.
const SIZES: usize = 12;

/// A profile, as `profile.json` has it.
#[derive(Debug, Serialize)]
pub(crate) struct Profile {
    pub(crate) st_tool_profile: u32,
    pub(crate) model: String,
    pub(crate) layers: usize,
    pub(crate) experts: usize,
    pub(crate) experts_used: usize,
    pub(crate) neurons: usize,
    pub(crate) expert_bytes: u64,
    /// What the forecast of tokens per second is made of; none where this machine was not measured.
    pub(crate) forecast: bool,
    pub(crate) texts: Vec<TextProfile>,
}

/// One text.
#[derive(Debug, Serialize)]
pub(crate) struct TextProfile {
    pub(crate) name: String,
    pub(crate) tokens: u64,
    /// By layer and expert, the share of tokens that chose it.
    pub(crate) frequency: Vec<Vec<f64>>,
    /// By layer, the share of a chosen expert's neurons that are 0, over all tokens and experts chosen.
    pub(crate) sparsity: Vec<Quartiles>,
    /// The share of a token's experts that the token so many places before it chose, too, over all layers.
    pub(crate) locality: Vec<Locality>,
    /// By layer, how even the load of its experts is.
    pub(crate) load: Vec<Load>,
    /// What the report says of its models, of this text.
    pub(crate) statements: Statements,
    /// Caches of several sizes, once they are warm: each token as if it had been made after the one before it.
    pub(crate) caches: Vec<Cache>,
}

/// How choices follow each other.
#[derive(Debug, Serialize)]
pub(crate) struct Locality {
    pub(crate) distance: usize,
    pub(crate) share: f64,
}

/// How even the load of a layer's experts is.
#[derive(Debug, Serialize)]
pub(crate) struct Load {
    /// The busiest expert's load, of the mean.
    pub(crate) largest: f64,
    /// Entropy of the load, of what it would be if all were alike.
    pub(crate) evenness: f64,
}

/// Statements of the report, recomputed.
#[derive(Debug, Serialize)]
pub(crate) struct Statements {
    /// Share of experts that fewer than 0.14 of the tokens choose.
    pub(crate) rarely_used: f64,
    /// Share of experts that 0.4 to 0.6 of the tokens choose.
    pub(crate) busy: f64,
    /// Median sparsity of the layer where it is least.
    pub(crate) least_median_sparsity: f64,
    /// Mean sparsity over all layers.
    pub(crate) mean_sparsity: f64,
}

/// What a cache would do.
#[derive(Debug, Serialize)]
pub(crate) struct Cache {
    pub(crate) slots: usize,
    /// The `--memory` that gives so many slots.
    pub(crate) memory_bytes: u64,
    pub(crate) hit_rate: f64,
    /// What a cache that knew the future would find.
    pub(crate) best_hit_rate: f64,
    pub(crate) bytes_read_per_token: f64,
    pub(crate) tokens_per_second: Option<f64>,
}

impl TextProfile {
    /// The figures of what was counted; caches are still to be replayed.
    pub(crate) fn of(name: String, watch: &Watch) -> Self {
        let tokens = watch.tokens.max(1) as f64;
        let frequency: Vec<Vec<f64>> = watch
            .chosen
            .chunks(watch.n_experts)
            .map(|layer| layer.iter().map(|&count| count as f64 / tokens).collect())
            .collect();
        let sparsity: Vec<Quartiles> = (0..watch.n_layers).map(|layer| watch.sparsity(layer)).collect();
        let experts = || frequency.iter().flatten();
        let share = |holds: &dyn Fn(f64) -> bool| {
            experts().filter(|&&frequency| holds(frequency)).count() as f64 / experts().count().max(1) as f64
        };
        let statements = Statements {
            rarely_used: share(&|frequency| frequency < RARE),
            busy: share(&|frequency| (BUSY[0]..=BUSY[1]).contains(&frequency)),
            least_median_sparsity: sparsity.iter().map(|q| q.median).fold(1.0, f64::min),
            mean_sparsity: sparsity.iter().map(|q| q.mean).sum::<f64>() / sparsity.len().max(1) as f64,
        };
        let locality = DISTANCES.iter().zip(watch.repeats());
        Self {
            name,
            tokens: watch.tokens,
            load: frequency.iter().map(|layer| Load::of(layer)).collect(),
            locality: locality.map(|(&distance, share)| Locality { distance, share }).collect(),
            frequency,
            sparsity,
            statements,
            caches: Vec::new(),
        }
    }

    /// Replays the text's routing with caches of several sizes; `other` is what a run takes beside its cache, `speed` says how fast tokens
    /// are where this share of experts is found.
    pub(crate) fn replay(
        &mut self,
        watch: &Watch,
        header: TraceHeader,
        other: u64,
        speed: &dyn Fn(f64) -> Option<f64>,
    ) {
        let mut trace = RoutingTrace::new(header);
        for (token, layers) in watch.trace.chunks(watch.n_layers * watch.n_used).enumerate() {
            for (layer, ids) in layers.chunks(watch.n_used).enumerate() {
                let ids: Vec<u32> = ids.iter().map(|&id| u32::from(id)).collect();
                trace.push(token as u64, layer as u32, &ids, Use::Keep);
            }
        }
        if watch.trace.is_empty() {
            return;
        }
        let replay = Replay::new(&trace);
        let n = replay.n_experts_in_all();
        let mut sizes: Vec<usize> = (1..=SIZES).map(|i| (n * i / SIZES).max(replay.min_slots())).collect();
        sizes.dedup();
        // Each expert is read once, however large the cache is, which says nothing of one that is warm.
        let lookups = replay.simulate(Policy::default(), n).generated;
        let first = lookups.misses() as f64 / lookups.lookups.max(1) as f64;
        let cache = |slots: usize| {
            let warm = |hit_rate: f64| (hit_rate + first * slots as f64 / n as f64).min(1.0);
            let hit_rate = warm(replay.simulate(Policy::default(), slots).generated.hit_rate());
            let per_token = (watch.n_layers * watch.n_used) as f64;
            Cache {
                slots,
                memory_bytes: st_model::MemoryPlan::budget_for(other + slots as u64 * header.expert_bytes),
                hit_rate,
                best_hit_rate: warm(replay.belady(slots).generated.hit_rate()).max(hit_rate),
                bytes_read_per_token: (1.0 - hit_rate) * per_token * header.expert_bytes as f64,
                tokens_per_second: speed(hit_rate),
            }
        };
        self.caches = sizes.into_iter().map(cache).collect();
    }
}

impl Load {
    fn of(frequency: &[f64]) -> Self {
        let total: f64 = frequency.iter().sum();
        let n = frequency.len().max(1) as f64;
        if total <= 0.0 {
            return Self { largest: 0.0, evenness: 0.0 };
        }
        let entropy: f64 = frequency.iter().filter(|&&f| f > 0.0).map(|f| -(f / total) * (f / total).ln()).sum();
        Self {
            largest: frequency.iter().copied().fold(0.0, f64::max) / (total / n),
            evenness: if n > 1.0 { entropy / n.ln() } else { 1.0 },
        }
    }
}
