//! Measures on the running model what a synthetic checkpoint was made to show: which experts tokens choose and how many
//! neurons stay silent.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use st_gguf::GgufFile;
use st_model::{Engine, LoadOptions, Session, Work};

use super::rng::Rng;

/// What was counted over a run of tokens.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Tokens run.
    pub tokens: usize,
    /// Per layer: share of choices that went to the layer's most chosen quarter of experts.
    pub popular_share: Vec<f64>,
    /// Per layer: share of a token's experts that its predecessor also chose.
    pub repeat_share: Vec<f64>,
    /// Share of neurons inside chosen experts whose activation was zero, over all layers.
    pub zero_share: f64,
    /// Different tokens among those run.
    pub distinct: usize,
}

impl Measured {
    /// Mean over layers.
    pub fn mean(values: &[f64]) -> f64 {
        values.iter().sum::<f64>() / values.len().max(1) as f64
    }
}

/// Runs `n` scattered token ids as a prompt, then `n` tokens greedily from there; returns what was counted in each.
///
/// # Errors
/// Files that are no model, and contexts too short for 2 `n` tokens.
pub fn measure(path: &Path, n: usize, threads: usize, seed: u64) -> Result<[Measured; 2]> {
    ensure!(n >= 2, "there is nothing to compare in fewer than two tokens");
    let file = GgufFile::open(path)?;
    let options = LoadOptions { threads, ctx: Some(2 * n), ..LoadOptions::default() };
    let engine = Engine::load(file, &options).with_context(|| format!("cannot load {}", path.display()))?;
    let mut session = Session::new(&engine)?;
    let mut rng = Rng::for_row(seed, "measure.tokens", 0);
    let prompt: Vec<u32> = (0..n).map(|_| rng.below(engine.n_vocab()) as u32).collect();

    let mut before = session.work();
    let mut next = 0;
    let mut choices = Choices::new(&engine);
    for &token in &prompt {
        next = argmax(&run_one(&mut session, token, &mut |layer, ids| choices.add(layer, ids))?);
    }
    let random = choices.summarize(&engine, &prompt, session.work().since(&before));

    before = session.work();
    choices = Choices::new(&engine);
    let mut generated = Vec::with_capacity(n);
    for _ in 0..n {
        generated.push(next);
        next = argmax(&run_one(&mut session, next, &mut |layer, ids| choices.add(layer, ids))?);
    }
    let greedy = choices.summarize(&engine, &generated, session.work().since(&before));
    Ok([random, greedy])
}

/// Runs one token (batches do not count their neurons); returns its logits.
fn run_one(session: &mut Session<'_>, token: u32, on_layer: &mut dyn FnMut(usize, &[u32])) -> Result<Vec<f32>> {
    session.forward_traced(
        &[token],
        &mut |layer, _, routing| {
            on_layer(layer, routing.ids());
            Ok(())
        },
        |_, _| Ok(()),
    )?;
    Ok(session.logits().to_vec())
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}

/// Chosen experts of each layer, token after token.
struct Choices(Vec<Vec<u32>>);

impl Choices {
    fn new(engine: &Engine) -> Self {
        Self(vec![Vec::new(); engine.config().n_layers])
    }

    fn add(&mut self, layer: usize, ids: &[u32]) {
        self.0[layer].extend_from_slice(ids);
    }

    fn summarize(&self, engine: &Engine, tokens: &[u32], work: Work) -> Measured {
        let config = engine.config();
        let mut distinct = tokens.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        Measured {
            tokens: tokens.len(),
            popular_share: self.0.iter().map(|ids| popular_share(ids, config.n_experts)).collect(),
            repeat_share: self.0.iter().map(|ids| repeat_share(ids, config.n_experts_used)).collect(),
            zero_share: 1.0 - work.live_neurons as f64 / work.neurons.max(1) as f64,
            distinct: distinct.len(),
        }
    }
}

fn popular_share(ids: &[u32], n_experts: usize) -> f64 {
    let mut counts = vec![0_usize; n_experts];
    for &id in ids {
        counts[id as usize] += 1;
    }
    counts.sort_unstable_by(|a, b| b.cmp(a));
    counts[..(n_experts / 4).max(1)].iter().sum::<usize>() as f64 / ids.len().max(1) as f64
}

fn repeat_share(ids: &[u32], n_used: usize) -> f64 {
    let tokens: Vec<&[u32]> = ids.chunks_exact(n_used).collect();
    let repeated: usize = tokens.windows(2).map(|w| w[1].iter().filter(|id| w[0].contains(id)).count()).sum();
    repeated as f64 / ((tokens.len().max(2) - 1) * n_used) as f64
}

#[cfg(test)]
mod tests {
    use super::super::gguf::write_gguf;
    use super::super::recipe::{Recipe, Statistics};
    use super::super::shape::Shape;
    use super::*;
    use st_gguf::Layout;

    #[test]
    fn shares_are_counted_right() {
        let ids = [0, 1, 1, 2, 2, 1, 3, 0];
        assert!((repeat_share(&ids, 2) - 3.0 / 6.0).abs() < 1e-12);
        assert!((popular_share(&ids, 4) - 3.0 / 8.0).abs() < 1e-12);
    }

    /// A small model in both layouts does what it was made for, and the same in each.
    #[test]
    fn a_synthetic_model_runs_as_planned() {
        let mut shape = Shape {
            n_layers: 8,
            n_embd: 256,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            n_experts: 32,
            n_ff: 64,
            vocab: 4000,
            ..Shape::preset_4b()
        };
        shape.set_period(0);
        let statistics =
            Statistics { sparsity: 0.65, early_sparsity: 0.92, popular_share: 0.6, repeat_share: 0.5, seed: 5 };
        let recipe = Recipe::new(shape, &statistics).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let run = |layout: Layout| {
            let path = dir.path().join(layout.name());
            write_gguf(&recipe, layout, &path, false, &|_| ()).unwrap();
            measure(&path, 200, 1, 1).unwrap()
        };
        let [random, greedy] = run(Layout::Gguf);
        // Layer 0 sees no topic yet, so nothing there is repeated but by popularity.
        let later = |m: &Measured| Measured::mean(&m.repeat_share[1..]);
        assert!((later(&random) - 0.5).abs() < 0.1, "{random:?}");
        assert!((Measured::mean(&random.popular_share) - 0.6).abs() < 0.1, "{random:?}");
        assert!((random.zero_share - (0.92 + 7.0 * 0.65) / 8.0).abs() < 0.04, "{random:?}");
        assert!(greedy.distinct > 20, "{greedy:?}");
        let offload = run(Layout::Offload);
        assert_eq!(format!("{offload:?}"), format!("{:?}", [random, greedy]));
    }
}
