//! Alone or in company: a row's logits do not depend on the rows that it is computed with, bit for bit.

use std::ops::ControlFlow;
use std::sync::Arc;

use st_convert::{Layout, WeightType};
use st_model::{Batch, BatchKind, Engine, LoadOptions, ModelError, Observer, Sequence, Session, Workspace};

use crate::common::{self, Dice};

/// The logits after every token of `text`, run alone.
fn alone(engine: &Arc<Engine>, text: &[u32]) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    let mut session = Session::new(engine).expect("a session");
    let keep = |_: usize, row: &[f32]| {
        rows.push(row.to_vec());
        Ok(())
    };
    session.run_all(text, &mut (), keep).expect("a forward pass");
    rows
}

/// Several texts of one model and the logits that each has alone.
struct Company {
    texts: Vec<Vec<u32>>,
    expected: Vec<Vec<Vec<f32>>>,
}

impl Company {
    fn new(resident: &Arc<Engine>, ids: &[u32]) -> Self {
        let texts: Vec<Vec<u32>> =
            (0..4).map(|n| ids.iter().copied().cycle().skip(11 * n).take(90 + 10 * n).collect()).collect();
        let expected = texts.iter().map(|text| alone(resident, text)).collect();
        Self { texts, expected }
    }

    /// Runs all texts in batches of rows drawn by `dice`: one token of each of some, many of one beside them, cut back and
    /// forked now and then. Every row's logits that are asked for are those it has alone.
    fn mixed(&self, engine: &Arc<Engine>, dice: &mut Dice) {
        let mut sequences: Vec<Sequence> = self.texts.iter().map(|_| engine.sequence()).collect();
        let mut workspace = engine.workspace().expect("a workspace");
        for round in 0.. {
            let kind = [BatchKind::Prompt, BatchKind::Decode, BatchKind::Verify][dice.below(3)];
            let mut batch = Batch::new(kind);
            let mut wanted = Vec::new();
            for (n, text) in self.texts.iter().enumerate() {
                let (start, left) = (sequences[n].len(), text.len() - sequences[n].len());
                let rows = [0, 1, 1, 1, 2, 5, 30][dice.below(7)].min(left);
                for (at, &token) in text.iter().enumerate().skip(start).take(rows) {
                    if wanted.len() < engine.max_logits() && (at + 1 == start + rows || dice.below(4) == 0) {
                        assert_eq!(batch.push_with_logits(n, token), wanted.len());
                        wanted.push((n, at));
                    } else {
                        batch.push(n, token);
                    }
                }
            }
            if batch.is_empty() {
                if sequences.iter().zip(&self.texts).all(|(sequence, text)| sequence.len() == text.len()) {
                    return;
                }
                continue;
            }
            let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
            engine.forward(&batch, &mut all, &mut workspace, &mut ()).expect("a forward pass");
            for (i, &(n, at)) in wanted.iter().enumerate() {
                assert!(workspace.logits(i) == self.expected[n][at], "round {round}, text {n}, token {at}, {kind:?}");
            }
            let n = dice.below(self.texts.len());
            match dice.below(6) {
                // A draft that was refused.
                0 if sequences[n].len() > 3 => {
                    let keep = sequences[n].len() - 1 - dice.below(3);
                    let kept = sequences[n].truncate(keep);
                    assert!(kept == keep || kept == 0);
                }
                // A copy goes another way for a while, and comes to nothing.
                1 if !sequences[n].is_empty() => {
                    let mut copy = sequences[n].fork();
                    assert_eq!(copy.tokens(), sequences[n].tokens());
                    let mut aside = Batch::new(BatchKind::Decode);
                    (0..4.min(engine.ctx() - copy.len())).for_each(|i| aside.push(0, 7 + i as u32));
                    engine.forward(&aside, &mut [&mut copy], &mut workspace, &mut ()).expect("a forward pass");
                    // The copy may be the one that lives on.
                    copy.truncate(sequences[n].len());
                    if copy.len() == sequences[n].len() && dice.below(2) == 0 {
                        sequences[n] = copy;
                    }
                }
                _ => {}
            }
        }
    }
}

#[test]
fn a_row_gives_what_it_gives_alone() {
    for golden in common::goldens().iter().filter(|golden| ["long_mixed", "mini-21b_golden_0"].contains(&&*golden.name))
    {
        for ty in [WeightType::Q4_0, WeightType::Q8_0, WeightType::F16] {
            let load = |layout, options: &LoadOptions| common::engine(golden.gguf(ty, layout), options);
            let resident = load(Layout::Gguf, &LoadOptions { threads: 2, ..LoadOptions::default() });
            let company = Company::new(&resident, &golden.ids);
            let c = resident.config();
            for (seed, layout, slots, threads) in [
                (1, Layout::Gguf, None, 2),
                (2, Layout::Gguf, Some(2 * c.n_experts_used), 2),
                (3, Layout::Offload, Some(2 * c.n_experts_used + 1), 1),
                (4, Layout::Offload, Some(c.n_layers * c.n_experts_used), 2),
            ] {
                let engine = load(layout, &LoadOptions { threads, slots, ..LoadOptions::default() });
                company.mixed(&engine, &mut Dice(seed));
                assert!(slots.is_none() || engine.store_stats().evictions > 0, "{seed}: no eviction");
            }
        }
    }
}

/// Runs the next token of a text after each layer of somebody else's pass.
struct Within<'a> {
    engine: &'a Engine,
    text: &'a [u32],
    expected: &'a [Vec<f32>],
    sequence: Sequence,
    workspace: Workspace,
}

impl Observer for Within<'_> {
    fn progress(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        let at = self.sequence.len();
        if let Some(&token) = self.text.get(at) {
            let mut batch = Batch::new(BatchKind::Decode);
            batch.push_with_logits(0, token);
            let ran = self.engine.forward(&batch, &mut [&mut self.sequence], &mut self.workspace, &mut ());
            ran.expect("a forward pass");
            assert!(self.workspace.logits(0) == self.expected[at], "token {at}");
        }
        ControlFlow::Continue(())
    }
}

/// Between the layers of one text's pass another text goes through all layers: each has the bits that it has alone.
#[test]
fn a_pass_within_a_pass_changes_neither() {
    for golden in common::goldens().iter().filter(|golden| ["long_mixed", "mini-21b_golden_0"].contains(&&*golden.name))
    {
        let resident = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &LoadOptions::default());
        let company = Company::new(&resident, &golden.ids);
        let (outer, inner) = (&company.texts[3], &company.texts[0]);
        let top = resident.config().n_experts_used;
        for slots in [None, Some(2 * top), Some(4 * top)] {
            let options = LoadOptions { threads: 2, slots, ..LoadOptions::default() };
            let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Offload), &options);
            let (sequence, workspace) = (engine.sequence(), engine.workspace().expect("a workspace"));
            let (text, expected) = (inner.as_slice(), company.expected[0].as_slice());
            let mut within = Within { engine: &engine, text, expected, sequence, workspace };
            let (mut sequence, mut workspace) = (engine.sequence(), engine.workspace().expect("a workspace"));
            for piece in outer.chunks(30) {
                let mut batch = Batch::new(BatchKind::Prompt);
                let (&last, others) = piece.split_last().expect("tokens");
                others.iter().for_each(|&token| batch.push(0, token));
                batch.push_with_logits(0, last);
                engine.forward(&batch, &mut [&mut sequence], &mut workspace, &mut within).expect("a forward pass");
                assert!(workspace.logits(0) == company.expected[3][sequence.len() - 1], "{slots:?}");
            }
            assert!(within.sequence.len() > 8, "{slots:?}");
        }
    }
}

/// Two conversations on two threads with one engine: each says what it says alone.
#[test]
fn threads_share_an_engine() {
    let goldens = common::goldens();
    let golden = |name: &str| goldens.iter().find(|golden| golden.name == name).expect(name);
    let (long, short) = (golden("long_mixed"), golden("chat_sum"));
    for slots in [None, Some(8), Some(40)] {
        let options = LoadOptions { threads: 2, slots, ..LoadOptions::default() };
        let engine = common::engine(long.gguf(WeightType::Q4_0, Layout::Gguf), &options);
        let texts = [long, short, golden("chat_story"), golden("chat_zh")];
        let expected = texts.map(|golden| common::greedy(&engine, &golden.ids, golden.ids.len(), 24));
        for _ in 0..3 {
            let got = std::thread::scope(|scope| {
                let run = |golden: &'_ common::Golden| {
                    let (engine, ids) = (&engine, golden.ids.clone());
                    scope.spawn(move || common::greedy(engine, &ids, ids.len(), 24))
                };
                texts.map(run).map(|thread| thread.join().expect("no panic"))
            });
            assert_eq!(got, expected, "{slots:?} slots");
        }
    }
}

#[test]
fn batches_that_make_no_sense_are_refused_and_change_nothing() {
    let golden = &common::goldens()[0];
    let options = LoadOptions { ctx: Some(4), ..LoadOptions::default() };
    let load = || common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
    let (engine, other) = (load(), load());
    let (mut sequence, mut workspace) = (engine.sequence(), engine.workspace().expect("a workspace"));
    let rows = |rows: &[(usize, u32)]| {
        let mut batch = Batch::default();
        rows.iter().for_each(|&(sequence, token)| batch.push(sequence, token));
        batch
    };
    let mut many_logits = Batch::default();
    (0..=engine.max_logits()).for_each(|_| {
        many_logits.push_with_logits(0, 1);
    });
    let mut run = |batch: &Batch| engine.forward(batch, &mut [&mut sequence], &mut workspace, &mut ());
    assert!(matches!(run(&rows(&[])), Err(ModelError::EmptyPrompt)));
    assert!(matches!(run(&rows(&[(0, u32::MAX)])), Err(ModelError::TokenId { .. })));
    assert!(matches!(run(&rows(&[(1, 1)])), Err(ModelError::NoSequence { index: 1, n: 1 })));
    assert!(matches!(run(&rows(&[(0, 1); 5])), Err(ModelError::ContextFull { needed: 5, ctx: 4 })));
    assert!(matches!(run(&many_logits), Err(ModelError::LogitRows { .. })));
    assert!(matches!(run(&rows(&vec![(0, 1); engine.max_rows() + 1])), Err(ModelError::BatchRows { .. })));
    assert!(run(&rows(&[(0, 1); 4])).is_ok());
    assert!(matches!(run(&rows(&[(0, 1)])), Err(ModelError::ContextFull { needed: 5, ctx: 4 })));
    let foreign = other.forward(&rows(&[(0, 1)]), &mut [&mut sequence], &mut other.workspace().unwrap(), &mut ());
    assert!(matches!(foreign, Err(ModelError::Foreign { what: "sequence" })));
    let foreign = other.forward(&rows(&[(0, 1)]), &mut [&mut other.sequence()], &mut workspace, &mut ());
    assert!(matches!(foreign, Err(ModelError::Foreign { what: "workspace" })));
    assert_eq!(sequence.tokens(), [1; 4]);
}
