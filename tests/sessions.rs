//! Conversations that are cut, stopped and gone on with give what a new one would.

use std::ops::ControlFlow;
use std::sync::Arc;

use st_convert::{Layout, WeightType};
use st_model::chat::{Message, Role};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{Chat, Engine, GenerateOptions, Generation, LoadOptions, ModelError, Observer, Prompt, Session};

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

fn chat(engine: &Arc<Engine>) -> Chat {
    Chat::over(Session::new(engine).expect("a session"), Sampler::new(SamplerOptions::greedy()).expect("a sampler"))
}

fn ask(chat: &mut Chat, prompt: Prompt<'_>) -> Generation {
    let options = GenerateOptions { max_tokens: Some(30), ..GenerateOptions::default() };
    chat.ask_within(prompt, &options, None, &mut (), &mut |_| ControlFlow::Continue(())).expect("an answer")
}

/// Each turn runs what is new, and answers as if all were.
#[test]
fn a_turn_of_a_chat_runs_what_is_new_and_answers_the_same() {
    let (engine, _) = engine_and_text();
    let mut whole = chat(&engine);
    whole.set_system(Some("Be brief."));
    let first = ask(&mut whole, Prompt::Message("Tell me a story about a fox."));
    let before = whole.messages().to_vec();
    let mut copy = whole.fork().expect("a copy");
    let second = ask(&mut whole, Prompt::Message("And then?"));
    assert!(second.stats.prompt_tokens < first.stats.prompt_tokens, "{:?}", second.stats);
    let roles: Vec<Role> = whole.messages().iter().map(|message| message.role).collect();
    assert_eq!(roles, [Role::System, Role::User, Role::Assistant, Role::User, Role::Assistant]);
    // A copy, and whoever begins with the messages alone, go on alike.
    let mut anew = chat(&engine);
    *anew.messages_mut() = before;
    for (other, runs_all) in [(&mut copy, false), (&mut anew, true)] {
        let answer = ask(other, Prompt::Message("And then?"));
        assert_eq!(answer.ids, second.ids);
        assert_eq!(answer.stats.prompt_tokens > second.stats.prompt_tokens, runs_all);
        assert_eq!(other.messages(), whole.messages());
    }
    whole.clear();
    assert_eq!(whole.messages(), [Message::new(Role::System, "Be brief.")]);
    assert_eq!(ask(&mut whole, Prompt::Message("Tell me a story about a fox.")).ids, first.ids);
    whole.set_system(None);
    assert!(whole.messages().iter().all(|message| message.role != Role::System));
}

#[test]
fn texts_and_tokens_are_continued_as_they_are() {
    let (engine, _) = engine_and_text();
    let ids = engine.tokenizer().expect("a tokenizer").encode("Once upon a time", true).expect("tokens");
    let mut one = chat(&engine);
    ask(&mut one, Prompt::Message("Hello."));
    let text = ask(&mut one, Prompt::Text("Once upon a time"));
    let mut other = chat(&engine);
    assert_eq!(ask(&mut other, Prompt::Ids(&ids)).ids, text.ids);
    assert_eq!((one.messages().len(), other.messages().len()), (4, 0));
}

#[test]
fn a_message_that_is_refused_or_stopped_is_not_part_of_the_chat() {
    let (engine, _) = engine_and_text();
    let mut chat = chat(&engine);
    let options = GenerateOptions::default();
    let long = "Once upon a time. ".repeat(200_000);
    let refused = chat.ask(&long, &options, &mut (), &mut |_| ControlFlow::Continue(())).expect_err("refused");
    assert!(matches!(refused.error(), ModelError::ContextFull { .. }), "{refused}");
    assert!(chat.messages().is_empty() && chat.session().is_empty());
    let mut stop = StopAtOnce;
    let stopped = chat.ask("Hello.", &options, &mut stop, &mut |_| ControlFlow::Continue(())).expect("an answer");
    assert!(stopped.is_cut_off() && chat.messages().is_empty());
    let begun = chat.ask("Hello.", &options, &mut (), &mut |text| match text.is_empty() {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    });
    assert_eq!(chat.messages()[1].content, begun.expect("an answer").text);
}

struct StopAtOnce;

impl Observer for StopAtOnce {
    fn progress(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        ControlFlow::Break(())
    }
}
