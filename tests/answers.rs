//! Answers that fail or are stopped on the way, what an observer sees of neurons, and models that are quantized before they are run.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use st_convert::{Layout, WeightType};
use st_gguf::{GgufFile, GgufWriter, TensorSpec, WriteOptions};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{
    Batch, Engine, FinishReason, GenerateOptions, Generation, LoadOptions, ModelError, Observer, Routing, Session,
    generate,
};

use crate::common;

fn golden() -> common::Golden {
    common::goldens().into_iter().find(|golden| golden.name == "long_mixed").expect("a golden")
}

fn bundled() -> Arc<Engine> {
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    common::engine(golden().gguf(WeightType::Q4_0, Layout::Gguf), &options)
}

/// A greedy answer of 40 tokens at most.
fn answer(
    engine: &Arc<Engine>,
    prompt: &[u32],
    observer: &mut dyn Observer,
) -> Result<Generation, st_model::GenerateError> {
    let mut session = Session::new(engine).expect("a session");
    let mut sampler = Sampler::new(SamplerOptions::greedy()).expect("a sampler");
    let options = GenerateOptions { max_tokens: Some(40), ..GenerateOptions::default() };
    generate(&mut session, prompt, &mut sampler, &options, observer, &mut |_| ControlFlow::Continue(()))
}

/// Fails when so many tokens have been generated.
struct FailsAfter(usize);

impl Observer for FailsAfter {
    fn routing(&mut self, layer: usize, batch: &Batch, _: &Routing) -> io::Result<()> {
        if layer > 0 || batch.len() > 1 {
            return Ok(());
        }
        self.0 = self.0.checked_sub(1).ok_or_else(|| io::Error::other("the disk is full"))?;
        Ok(())
    }
}

#[test]
fn an_answer_that_fails_keeps_the_text_made_so_far() {
    let engine = bundled();
    let prompt = &golden().ids[..50];
    let whole = answer(&engine, prompt, &mut ()).expect("an answer");
    assert!(whole.ids.len() > 20 && !whole.text.is_empty(), "{whole:?}");
    for tokens in [0, 1, 7, 20] {
        let failure = answer(&engine, prompt, &mut FailsAfter(tokens)).expect_err("a failure");
        assert!(matches!(failure.error(), ModelError::Observer { .. }), "{failure}");
        let part = failure.answer();
        assert_eq!(part.finish_reason, FinishReason::Error);
        assert_eq!(part.ids, whole.ids[..=tokens], "the token that could not be run was made");
        assert!(whole.text.starts_with(&part.text), "{:?} of {:?}", part.text, whole.text);
        assert!(tokens < 20 || !part.text.is_empty());
        assert_eq!((part.stats.prompt_tokens, part.stats.generated_tokens), (50, tokens));
    }
}

/// Stops once so many tokens are done.
struct StopsAt(usize);

impl Observer for StopsAt {
    fn progress(&mut self, done: usize, _: usize) -> ControlFlow<()> {
        if done >= self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn a_prompt_that_is_stopped_counts_what_was_run() {
    let golden = golden();
    // Batches of 512 tokens.
    let options = LoadOptions { threads: 2, slots: Some(120), ..LoadOptions::default() };
    let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
    let prompt: Vec<u32> = golden.ids.iter().copied().cycle().take(1300).collect();
    for (at, run) in [(1, 0), (700, 512), (1299, 1024)] {
        let stopped = answer(&engine, &prompt, &mut StopsAt(at)).expect("an answer that was stopped");
        assert_eq!(stopped.finish_reason, FinishReason::Cancelled);
        assert!(stopped.ids.is_empty() && stopped.text.is_empty());
        assert_eq!(stopped.stats.prompt_tokens, run, "stopped at {at}");
    }
}

/// For each layer, expert and position of one text: which neurons live.
#[derive(Default)]
struct Neurons {
    live: BTreeMap<(usize, u32, usize), Vec<u32>>,
    first: usize,
}

impl Observer for Neurons {
    fn watches_neurons(&self) -> bool {
        true
    }

    fn neurons(&mut self, layer: usize, expert: u32, rows: &[u32], live: &[u32]) -> io::Result<()> {
        for (&row, live) in rows.iter().zip(live.chunks(live.len() / rows.len())) {
            let before = self.live.insert((layer, expert, self.first + row as usize), live.to_vec());
            assert!(before.is_none(), "an expert is shown once for a row");
        }
        Ok(())
    }
}

#[test]
fn neurons_are_seen_alike_however_many_rows_go_together() {
    let engine = bundled();
    let ids = &golden().ids[..48];
    let seen = |at_once: usize| {
        let mut session = Session::new(&engine).expect("a session");
        let mut neurons = Neurons::default();
        for piece in ids.chunks(at_once) {
            session.run(piece, &mut neurons).expect("a forward pass");
            neurons.first += piece.len();
        }
        (neurons.live, session.work())
    };
    let (alone, work) = seen(1);
    let config = engine.config();
    assert_eq!(alone.len(), ids.len() * config.n_layers * config.n_experts_used);
    let count = |live: &BTreeMap<_, Vec<u32>>| live.values().flatten().map(|mask| mask.count_ones()).sum::<u32>();
    let live = count(&alone);
    assert!(live > 0 && u64::from(live) <= work.live_neurons && work.live_neurons < work.neurons);
    for at_once in [3, 8, 48] {
        let (together, _) = seen(at_once);
        assert!(together == alone, "{at_once} together");
    }
}

/// A file that says less than it might: where layers have no pattern of their own, readers agree on what that means.
#[test]
fn a_model_that_is_converted_first_is_the_same_model() {
    let source =
        GgufFile::open(common::converted(&golden().checkpoint, WeightType::F32, Layout::Gguf)).expect("a file");
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let ids = &golden().ids[..60];
    for without in [&[][..], &["rope.layer_pattern"], &["rope.layer_pattern", "attention.sliding_window_pattern"]] {
        let mut metadata = source.header.metadata.clone();
        for key in without {
            assert!(metadata.remove(&format!("smallthinker.{key}")).is_some(), "{key}");
        }
        let path = dir.path().join(format!("without-{}.gguf", without.len()));
        let tensors: Vec<TensorSpec> = (source.header.tensors.iter())
            .map(|tensor| TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), ty: tensor.ty })
            .collect();
        let options = WriteOptions { alignment: source.header.alignment, ..WriteOptions::default() };
        let mut writer = GgufWriter::create(&path, &metadata, &tensors, options).expect("a file");
        for tensor in &source.header.tensors {
            writer.write(&source.read_tensor(tensor).expect("a tensor")).expect("written");
        }
        writer.finish().expect("a file");
        let converted = common::converted(&path, WeightType::F32, Layout::Offload);
        let logits = [path, converted].map(|path| {
            let file = GgufFile::open(path).expect("a file");
            common::all_logits(&common::engine(file, &LoadOptions::default()), ids)
        });
        assert!(logits[0] == logits[1], "without {without:?}");
    }
}
