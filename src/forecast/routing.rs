//! How many experts a cache of some size would have held: by a trace of the model itself, or by the routing of the bundled one.

use std::ops::ControlFlow;
use std::sync::Arc;

use st_experts::cache_sim::Replay;
use st_experts::{Policy, RoutingTrace, TraceHeader, Use};
use st_model::sampler::SamplerOptions;
use st_model::{Batch, Chat, Engine, GenerateOptions, LoadOptions, Observer};

use crate::tiny::TINY;

/// Shares of a model's experts for which the bundled model's routing is replayed.
const SHARES: usize = 16;
/// Tokens of each of its texts.
const TOKENS: usize = 160;
const PROMPTS: [&str; 3] = ["Tell me a story.", "What is 27 + 45?", "讲一个故事。"];

/// Routing that a forecast is made by.
#[derive(Debug)]
pub(crate) enum Routing {
    /// A recorded trace.
    Recorded(Replay),
    /// Experts found in memory with caches of these shares of all experts.
    Curve(Vec<(f64, f64)>),
}

impl Routing {
    /// Whether it was recorded of a model of so many experts.
    pub(crate) fn fits(&self, n_experts: usize) -> bool {
        matches!(self, Self::Recorded(replay) if replay.n_experts_in_all() == n_experts)
    }

    /// The share of experts that a token finds in a cache of `slots` of `n_experts`, once it is warm. A trace of a model of another size is
    /// replayed with a cache of the same share.
    pub(crate) fn found(&self, slots: usize, n_experts: usize) -> f64 {
        let share = (slots as f64 / n_experts.max(1) as f64).min(1.0);
        match self {
            Self::Recorded(_) if slots >= n_experts => 1.0,
            Self::Recorded(replay) => {
                let slots = match self.fits(n_experts) {
                    true => slots,
                    false => (share * replay.n_experts_in_all() as f64).round() as usize,
                };
                let row = replay.simulate(Policy::default(), slots.max(replay.min_slots()));
                let tally = if row.generated.tokens > 0 { row.generated } else { row.prompt };
                tally.hit_rate()
            }
            Self::Curve(curve) => {
                let above = curve.iter().position(|&(at, _)| at >= share).unwrap_or(curve.len());
                let (x0, y0) = above.checked_sub(1).and_then(|i| curve.get(i)).copied().unwrap_or((0.0, 0.0));
                let (x1, y1) = curve.get(above).copied().unwrap_or((1.0, 1.0));
                if x1 > x0 { y0 + (y1 - y0) * (share - x0) / (x1 - x0) } else { y1 }
            }
        }
    }
}

/// Runs the bundled model, and replays its routing: experts found by the share of them that a cache holds, from none to all.
///
/// # Errors
/// Where it cannot be run.
pub(crate) fn builtin(stop: &dyn Fn() -> ControlFlow<()>) -> anyhow::Result<Vec<(f64, f64)>> {
    let file = st_gguf::GgufFile::from_static(TINY)?;
    let engine = Engine::load(file, &LoadOptions::default())?;
    let config = engine.config();
    let header = TraceHeader {
        n_layers: config.n_layers as u32,
        n_experts: config.n_experts as u32,
        expert_bytes: engine.plan().slot,
        other_bytes: None,
    };
    let mut trace = Recorded { trace: RoutingTrace::new(header), token: 0 };
    for (seed, prompt) in (0..).zip(PROMPTS) {
        answer(&engine, prompt, seed, &mut trace, stop)?;
    }
    let replay = Replay::new(&trace.trace);
    let n = replay.n_experts_in_all();
    let at = |i: usize| {
        let slots = (n * i / SHARES).max(replay.min_slots());
        let hit_rate = replay.simulate(Policy::default(), slots).generated.hit_rate();
        (slots as f64 / n as f64, hit_rate)
    };
    // What every cache has to read once says nothing of one that is warm.
    let cold = 1.0 - at(SHARES).1;
    let mut curve = vec![(0.0, 0.0)];
    for (share, hit_rate) in (1..=SHARES).map(at) {
        // More memory is never worse, though a policy may be a little unlucky with some size.
        let least = curve.last().map_or(0.0, |last: &(f64, f64)| last.1);
        curve.push((share, (hit_rate + cold * share).clamp(least, 1.0)));
    }
    Ok(curve)
}

fn answer(
    engine: &Arc<Engine>,
    prompt: &str,
    seed: u64,
    trace: &mut Recorded,
    stop: &dyn Fn() -> ControlFlow<()>,
) -> anyhow::Result<()> {
    let mut chat = Chat::new(engine, SamplerOptions { seed, ..SamplerOptions::default() })?;
    let limits = GenerateOptions { max_tokens: Some(TOKENS), ..GenerateOptions::default() };
    chat.ask(prompt, &limits, trace, &mut |_| stop())?;
    Ok(())
}

/// Every token as if it had been made.
struct Recorded {
    trace: RoutingTrace,
    token: u64,
}

impl Observer for Recorded {
    fn routing(&mut self, layer: usize, _: &Batch, routing: &st_model::Routing) -> std::io::Result<()> {
        // Prompts go through layer by layer: only what was made has the order of tokens.
        if routing.n_tokens() == 1 {
            self.token += u64::from(layer == 0);
            self.trace.push(self.token, layer as u32, routing.ids(), Use::Keep);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_cache_finds_more() {
        let curve = builtin(&|| ControlFlow::Continue(())).expect("the bundled model runs");
        assert!(curve.is_sorted_by(|a, b| a.0 <= b.0), "{curve:?}");
        let routing = Routing::Curve(curve);
        let found: Vec<f64> = (0..=20).map(|i| routing.found(i * 50, 1000)).collect();
        assert!(found.windows(2).all(|pair| pair[1] >= pair[0] - 0.02), "{found:?}");
        assert!(found[0] == 0.0 && found[20] > 0.99 && found[10] > 0.4, "{found:?}");
    }
}
