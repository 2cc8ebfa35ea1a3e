//! From measurements, plan and routing to tokens per second.

use st_model::{MemoryPlan, Residency};

use super::{Disk, LayerSpeed, Machine, Routing, Weights};

/// The share of neurons of chosen experts that live, which is not known before a model runs. The authors report a median sparsity
/// above 0.6 in every layer.
pub(crate) const LIVE: f64 = 0.35;
/// What is not read takes no time.
const NO_DISK: Disk = Disk { sustained: f64::INFINITY, burst: f64::INFINITY };
/// Rows of a prompt that a forecast is made for.
const PROMPT: usize = 512;

/// A number, and what it lies between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Between {
    /// If less goes well.
    pub(crate) low: f64,
    /// What is expected.
    pub(crate) expected: f64,
    /// If more does.
    pub(crate) high: f64,
}

/// What a model will do with a plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Forecast {
    /// Tokens per second of a prompt of some hundred tokens.
    pub(crate) prompt: Between,
    /// Tokens per second while an answer is made, at the beginning of a context.
    pub(crate) generation: Between,
    /// The share of experts that a token of an answer finds in memory.
    pub(crate) found: f64,
    /// Experts that it has to read.
    pub(crate) misses: f64,
    /// Bytes that it has to read.
    pub(crate) bytes: f64,
}

/// What is not known exactly.
#[derive(Clone, Copy)]
struct Assumed {
    live: f64,
    /// How fast this machine computes and reads, of what was measured.
    speed: f64,
    /// The share of experts that are missing, of what the routing says.
    missing: f64,
}

const EXPECTED: Assumed = Assumed { live: LIVE, speed: 1.0, missing: 1.0 };
const LOW: Assumed = Assumed { live: 0.5, speed: 0.85, missing: 1.25 };
const HIGH: Assumed = Assumed { live: 0.2, speed: 1.05, missing: 0.75 };

impl Forecast {
    /// The forecast of a model that is run by `plan`. Without a disk that was measured, only what needs none.
    pub(crate) fn of(
        weights: &Weights,
        plan: &MemoryPlan,
        machine: &Machine,
        layer: &LayerSpeed,
        routing: &Routing,
    ) -> Option<Self> {
        let found = match plan.residency {
            Residency::All => 1.0,
            // A conversation that begins has hardly a page of its context: experts use the others'.
            Residency::Cached { slots } => routing.found(slots + plan.lent, plan.n_experts_total),
        };
        let disk = match (machine.disk, found < 1.0) {
            (Some(disk), _) => disk,
            (None, false) => NO_DISK,
            (None, true) => return None,
        };
        let model = Speeds { weights, machine, layer, disk, found };
        let all = |of: &dyn Fn(Assumed) -> f64| Between { low: of(LOW), expected: of(EXPECTED), high: of(HIGH) };
        let misses = (1.0 - found) * plan.token_cycle as f64;
        Some(Self {
            prompt: all(&|assumed| model.prompt(plan, assumed)),
            generation: all(&|assumed| model.generation(assumed)),
            found,
            misses,
            bytes: misses * weights.read,
        })
    }
}

/// Tokens per second of an answer whose tokens find this share of their experts in memory, and where so many neurons live; `None` where this
/// machine, or its disk, was not measured.
pub(crate) fn speed_at(weights: &Weights, machine: &Machine, found: f64, live: f64) -> Option<f64> {
    let layer = machine.known_layer(&weights.shape)?;
    let disk = if found < 1.0 { machine.disk? } else { NO_DISK };
    Some(Speeds { weights, machine, layer, disk, found }.generation(Assumed { live, ..EXPECTED }))
}

struct Speeds<'a> {
    weights: &'a Weights,
    machine: &'a Machine,
    layer: &'a LayerSpeed,
    disk: Disk,
    found: f64,
}

impl Speeds<'_> {
    /// Seconds that a thread takes to arrange an expert that was read.
    fn arranging(&self, assumed: Assumed) -> f64 {
        match self.weights.is_arranged {
            true => self.weights.read / (self.layer.arranging * assumed.speed),
            false => 0.0,
        }
    }

    /// Tokens per second of an answer. In a layer the missing experts are read and arranged while attention and the others are computed,
    /// and the last of them is computed when it is there.
    fn generation(&self, assumed: Assumed) -> f64 {
        let weights = self.weights;
        let used = weights.shape.n_experts_used;
        let rate = self.layer.generation * assumed.speed;
        let (layer, expert) = (weights.layer(assumed.live) / rate, weights.expert(assumed.live) / rate);
        let missing = ((1.0 - self.found) * assumed.missing).clamp(0.0, 1.0);
        let read = weights.read / (self.disk.burst * assumed.speed);
        let arranging = self.arranging(assumed);
        let of_layer: f64 = (0..=used)
            .map(|k| {
                let time = match k {
                    0 => layer,
                    _ => (layer - k as f64 * expert).max(k as f64 * (read + arranging)) + expert,
                };
                binomial(used, k, missing) * time
            })
            .sum();
        let head = weights.head / (self.machine.bandwidth * assumed.speed);
        let n_layers = weights.shape.n_layers as f64;
        let bytes = missing * used as f64 * n_layers * weights.read;
        1.0 / (of_layer * n_layers + head).max(bytes / (self.disk.sustained * assumed.speed))
    }

    /// Tokens per second of a prompt, whose batches touch nearly every expert once: the missing ones are read while others are arranged and
    /// computed.
    fn prompt(&self, plan: &MemoryPlan, assumed: Assumed) -> f64 {
        let n_layers = self.weights.shape.n_layers as f64;
        let computed = self.layer.prompt / assumed.speed * n_layers * PROMPT as f64;
        let missing = plan.n_experts_total.saturating_sub(plan.n_slots() + plan.lent) as f64;
        let read = missing * self.weights.read / (self.disk.sustained * assumed.speed);
        let arranged = missing * self.arranging(assumed) / self.machine.threads as f64;
        PROMPT as f64 / (computed + arranged).max(read)
    }
}

/// The probability of `k` of `n`.
fn binomial(n: usize, k: usize, p: f64) -> f64 {
    let ways = (0..k).fold(1.0, |ways, i| ways * (n - i) as f64 / (i + 1) as f64);
    ways * p.powi(k as i32) * (1.0 - p).powi((n - k) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one() {
        for p in [0.0, 0.3, 1.0] {
            let sum: f64 = (0..=6).map(|k| binomial(6, k, p)).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{p}: {sum}");
        }
        assert!((binomial(4, 2, 0.5) - 0.375).abs() < 1e-12);
    }
}
