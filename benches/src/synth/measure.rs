//! Measures on the running model what a synthetic checkpoint was made to show: which experts tokens choose and how many
//! neurons stay silent.

use std::io;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use st_gguf::GgufFile;
use st_model::{Batch, Engine, LoadOptions, Observer, Routing, Session, Work};

use super::rng::Rng;

/// What was counted over a run of tokens.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Tokens run.
    pub tokens: usize,
    /// Different tokens among them.
    pub distinct: usize,
    /// What each layer did.
    pub layers: Vec<Shares>,
}

/// What one layer did, or several on average.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shares {
    /// Share of neurons inside chosen experts whose activation was zero.
    pub zeros: f64,
    /// Share of choices that went to the layer's most chosen quarter of experts.
    pub popular: f64,
    /// Share of a token's experts that its predecessor also chose.
    pub repeated: f64,
}

impl Measured {
    /// Mean over some layers, `None` for none.
    pub fn mean(&self, layers: Range<usize>) -> Option<Shares> {
        let layers = &self.layers[layers];
        let mean = |share: fn(&Shares) -> f64| layers.iter().map(share).sum::<f64>() / layers.len() as f64;
        (!layers.is_empty()).then(|| Shares {
            zeros: mean(|layer| layer.zeros),
            popular: mean(|layer| layer.popular),
            repeated: mean(|layer| layer.repeated),
        })
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

    let mut next = 0;
    let mut counts = Counts::new(&session);
    for &token in &prompt {
        session.run(&[token], &mut counts)?;
        next = argmax(session.logits());
    }
    let scattered = counts.summarize(&session, &prompt);

    counts = Counts::new(&session);
    let mut generated = Vec::with_capacity(n);
    for _ in 0..n {
        generated.push(next);
        session.run(&[next], &mut counts)?;
        next = argmax(session.logits());
    }
    let greedy = counts.summarize(&session, &generated);
    Ok([scattered, greedy])
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}

/// What is counted of one run.
struct Counts {
    /// Chosen experts of each layer, token after token.
    choices: Vec<Vec<u32>>,
    /// What the layers had done before.
    before: Vec<Work>,
}

impl Counts {
    fn new(session: &Session) -> Self {
        let before = session.layer_work().to_vec();
        Self { choices: vec![Vec::new(); before.len()], before }
    }

    fn summarize(&self, session: &Session, tokens: &[u32]) -> Measured {
        let config = session.engine().config();
        let mut distinct = tokens.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let layers = self.choices.iter().zip(session.layer_work().iter().zip(&self.before));
        let shares = |(ids, (after, before)): (&Vec<u32>, (&Work, &Work))| {
            let work = after.since(before);
            Shares {
                zeros: 1.0 - work.live_neurons as f64 / work.neurons.max(1) as f64,
                popular: popular_share(ids, config.n_experts),
                repeated: repeat_share(ids, config.n_experts_used),
            }
        };
        Measured { tokens: tokens.len(), distinct: distinct.len(), layers: layers.map(shares).collect() }
    }
}

impl Observer for Counts {
    fn routing(&mut self, layer: usize, _: &Batch, routing: &Routing) -> io::Result<()> {
        self.choices[layer].extend_from_slice(routing.ids());
        Ok(())
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
    use super::super::mix::Mix;
    use super::super::recipe::{Recipe, Statistics};
    use super::super::shape::Shape;
    use super::*;
    use st_gguf::{GgmlType, Layout, ModelShape};

    #[test]
    fn shares_are_counted_right() {
        let ids = [0, 1, 1, 2, 2, 1, 3, 0];
        assert!((repeat_share(&ids, 2) - 3.0 / 6.0).abs() < 1e-12);
        assert!((popular_share(&ids, 4) - 3.0 / 8.0).abs() < 1e-12);
    }

    /// Makes a small model and measures it.
    fn run(statistics: &Statistics, layout: Layout) -> [Measured; 2] {
        let model = ModelShape {
            n_layers: 8,
            n_embd: 256,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            n_experts: 32,
            n_ff: 64,
            n_vocab: 4000,
            ..ModelShape::published_4b()
        };
        let mut shape = Shape::of("small", model);
        shape.set_period(0);
        let recipe = Recipe::new(shape, statistics).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        write_gguf(&recipe, &Mix::pure(GgmlType::Q4_0), layout, &path, false, &|_| ()).unwrap();
        measure(&path, 200, 1, 1).unwrap()
    }

    const STATISTICS: Statistics =
        Statistics { sparsity: 0.65, early_sparsity: 0.92, popular_share: 0.6, repeat_share: 0.5, seed: 5 };

    #[test]
    fn a_model_made_without_zeros_has_none() {
        for measured in run(&Statistics { sparsity: 0.0, early_sparsity: 0.0, ..STATISTICS }, Layout::Gguf) {
            assert!(measured.layers.iter().all(|layer| layer.zeros < 0.001), "{measured:?}");
        }
    }

    /// A small model in both layouts does what it was made for, and the same in each.
    #[test]
    fn a_synthetic_model_runs_as_planned() {
        let [scattered, greedy] = run(&STATISTICS, Layout::Gguf);
        for (what, measured) in [("scattered", &scattered), ("greedy", &greedy)] {
            let (early, later) = (measured.mean(0..1).unwrap(), measured.mean(1..8).unwrap());
            assert!((early.zeros - 0.92).abs() < 0.03, "{what}: {measured:?}");
            assert!((later.zeros - 0.65).abs() < 0.04, "{what}: {measured:?}");
            assert!((later.popular - 0.6).abs() < 0.1, "{what}: {measured:?}");
            assert!((later.repeated - 0.5).abs() < 0.1, "{what}: {measured:?}");
        }
        // Before the first attention there is only the token itself, which repeats nothing where tokens are scattered.
        assert!(scattered.layers[0].repeated < 0.3, "{scattered:?}");
        // Greedy text does repeat something; how much differs with the last bits of the arithmetic, which change the text.
        assert!(greedy.layers[0].repeated > 1.3 * scattered.layers[0].repeated, "{greedy:?}");
        assert!(greedy.distinct > 100, "{greedy:?}");
        let offload = run(&STATISTICS, Layout::Offload);
        assert_eq!(format!("{offload:?}"), format!("{:?}", [scattered, greedy]));
    }
}
