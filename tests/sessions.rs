//! Conversations that are cut, stopped and gone on with give what a new one would.

use std::ops::ControlFlow;
use std::sync::Arc;

use st_convert::{Layout, WeightType};
use st_model::{Engine, LoadOptions, ModelError, Observer, Session};

use crate::common;

/// Tokens that go through the layers together where experts are read again and again.
const BATCH: usize = 512;

/// The bundled model, which has windows, and a text of 1800 tokens.
fn engine_and_text() -> (Arc<Engine>, Vec<u32>) {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "long_mixed").expect("a golden");
    let options = LoadOptions { threads: 2, slots: Some(120), ..LoadOptions::default() };
    let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
    (engine, golden.ids.iter().copied().cycle().take(1800).collect())
}

fn logits_after(engine: &Arc<Engine>, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(engine).expect("a session");
    session.forward(tokens).expect("a forward pass");
    session.logits().to_vec()
}

/// Counts the layers, and stops once `at` tokens are done.
struct StopAt {
    at: usize,
    calls: usize,
}

impl Observer for StopAt {
    fn progress(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        self.calls += 1;
        assert_eq!(of, 1800);
        if done >= self.at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn a_prompt_that_is_stopped_in_a_batch_is_gone_on_with() {
    let (engine, text) = engine_and_text();
    let expected = logits_after(&engine, &text);
    for at in [1, 300, BATCH, BATCH + 1, 1100, 1799] {
        let mut session = Session::new(&engine).expect("a session");
        let mut stop = StopAt { at, calls: 0 };
        assert!(matches!(session.run(&text, &mut stop), Err(ModelError::Cancelled)));
        assert!(stop.calls <= engine.config().n_layers * at.div_ceil(BATCH), "{at}: it was asked to stop earlier");
        assert_eq!(session.len(), (at - 1) / BATCH * BATCH, "{at}: whole batches");
        session.forward(&text[session.len()..]).expect("a forward pass");
        assert!(session.logits() == expected, "{at}");
    }
}

/// What a window layer has given back does not come back, however often the conversation is cut; where the latest batch began
/// can always be gone back to.
#[test]
fn a_conversation_is_cut_again_and_again() {
    let (engine, text) = engine_and_text();
    let mut session = Session::new(&engine).expect("a session");
    session.forward(&text).expect("a forward pass");
    for (keep, kept) in
        [(1799, 1799), (1500, 0), (1100, 1100), (1000, 0), (990, 990), (700, 0), (512, 512), (20, 0), (10, 10)]
    {
        let tokens = [&text[..keep], &[7, 8, 9]].concat();
        assert_eq!(session.keep_prefix(&tokens), kept, "{keep}");
        session.forward(&tokens[kept..]).expect("a forward pass");
        assert!(session.logits() == logits_after(&engine, &tokens), "{keep}");
    }
}

/// Window layers hold the pages that a window and the latest batch see, and give them back; copies share theirs.
#[test]
fn memory_of_a_long_conversation_does_not_grow_in_window_layers() {
    let (engine, text) = engine_and_text();
    let windows = engine.config().windows.iter().filter(|window| window.is_some()).count();
    let full = engine.config().n_layers - windows;
    assert!(windows > 0 && full > 0);
    let mut session = Session::new(&engine).expect("a session");
    session.forward(&text[..1024]).expect("a forward pass");
    for &token in &text[1024..1400] {
        session.forward(&[token]).expect("a forward pass");
    }
    // Positions up to 1399 are six pages; a window of 64 sees one of them.
    assert_eq!(engine.kv_pages().0, 6 * full + windows);
    let mut copy = session.sequence().fork();
    assert_eq!(engine.kv_pages().0, 6 * full + windows);
    session.forward(&text[1400..1401]).expect("a forward pass");
    assert_eq!(engine.kv_pages().0, 6 * full + windows + engine.config().n_layers);
    assert_eq!(copy.truncate(1399), 1399);
    drop(copy);
    assert_eq!(engine.kv_pages().0, 6 * full + windows);
    drop(session);
    assert_eq!(engine.kv_pages().0, 0);
}
