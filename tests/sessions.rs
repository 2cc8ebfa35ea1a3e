//! Conversations that are cut, stopped and gone on with give what a new one would.

use std::ops::ControlFlow;

use st_convert::{Layout, WeightType};
use st_model::{Engine, LoadOptions, Session};

use crate::common;

/// Tokens that go through the layers together under a budget; a window's ring of 64 + 512 positions has room for 768.
const BATCH: usize = 512;

/// The bundled model, which has windows, and a text of 1800 tokens.
fn engine_and_text() -> (Engine, Vec<u32>) {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "long_mixed").expect("a golden");
    let options = LoadOptions { threads: 2, memory: Some(1 << 30), ..LoadOptions::default() };
    let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
    (engine, golden.ids.iter().copied().cycle().take(1800).collect())
}

fn logits_after(engine: &Engine, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(engine).expect("a session");
    session.forward(tokens).expect("a forward pass");
    session.logits().to_vec()
}

#[test]
fn a_prompt_that_is_stopped_in_a_batch_is_gone_on_with() {
    let (engine, text) = engine_and_text();
    let expected = logits_after(&engine, &text);
    for at in [1, 300, BATCH, BATCH + 1, 1100, 1799] {
        let mut session = Session::new(&engine).expect("a session");
        let mut calls = 0;
        let flow = session.feed(&text, &mut |done| {
            calls += 1;
            if done >= at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(flow.expect("no error").is_break());
        assert!(calls <= engine.config().n_layers * at.div_ceil(BATCH), "{at}: it was asked to stop earlier");
        assert_eq!(session.len(), (at - 1) / BATCH * BATCH, "{at}: whole batches");
        session.forward(&text[session.len()..]).expect("a forward pass");
        assert!(session.logits() == expected, "{at}");
    }
}

/// What a ring has overwritten does not come back, however often the conversation is cut.
#[test]
fn a_conversation_is_cut_again_and_again() {
    let (engine, text) = engine_and_text();
    let mut session = Session::new(&engine).expect("a session");
    session.forward(&text).expect("a forward pass");
    for (keep, kept) in [(1799, 1799), (1500, 1500), (1100, 1100), (1000, 0), (990, 990), (700, 700), (20, 0), (10, 10)]
    {
        let tokens = [&text[..keep], &[7, 8, 9]].concat();
        assert_eq!(session.keep_prefix(&tokens), kept, "{keep}");
        session.forward(&tokens[kept..]).expect("a forward pass");
        assert!(session.logits() == logits_after(&engine, &tokens), "{keep}");
    }
}
