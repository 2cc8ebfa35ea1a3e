//! Drafts: whatever is run ahead, the answer is the one that comes without, and so is everything that it leaves behind.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde_json::{Value, json};
use st_convert::{Layout, WeightType};
use st_grammar::{Grammars, Source};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{
    Constraint, Draft, DraftLimit, Engine, FinishReason, GenerateOptions, LoadOptions, ModelError, Session,
    generate_within,
};

use crate::common::{self, Dice};
use crate::http::Server;
use crate::program::run;

/// Drafts what is known to come, with mistakes: two tokens of three are right.
#[derive(Debug)]
struct MostlyRight(Vec<u32>);

impl Draft for MostlyRight {
    fn propose(&mut self, text: &[u32], most: usize, out: &mut Vec<u32>) -> Result<(), ModelError> {
        let spoiled = |(place, &token): (usize, &u32)| if place % 3 == 2 { token ^ 1 } else { token };
        out.extend(self.0.iter().enumerate().skip(text.len()).take(most).map(spoiled));
        Ok(())
    }
}

/// What an answer is, and what it leaves.
#[derive(Debug, PartialEq)]
struct Made {
    ids: Vec<u32>,
    text: String,
    /// As it was shown.
    shown: Vec<String>,
    finish_reason: FinishReason,
    generated: usize,
    tokens: Vec<u32>,
    snapshot: Vec<u8>,
}

/// How an answer is made.
struct How<'a> {
    sampler: SamplerOptions,
    limits: GenerateOptions,
    schema: Option<&'a st_grammar::Grammar>,
    /// The caller stops when so many tokens were shown.
    stops_at: usize,
}

impl How<'_> {
    fn new(sampler: SamplerOptions, n: usize) -> Self {
        let limits = GenerateOptions { max_tokens: Some(n), ..GenerateOptions::default() };
        Self { sampler, limits, schema: None, stops_at: usize::MAX }
    }

    fn make(&self, mut session: Session, prompt: &[u32]) -> (Made, u64) {
        let mut sampler = Sampler::new(self.sampler).expect("a sampler");
        let mut shown = Vec::new();
        let mut on_text = |text: &str| {
            shown.push(text.to_owned());
            if shown.len() == self.stops_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let constraint = self.schema.map(|grammar| Box::new(grammar.constraint()) as Box<dyn Constraint>);
        let answer =
            generate_within(&mut session, prompt, &mut sampler, &self.limits, constraint, &mut (), &mut on_text)
                .expect("an answer");
        let mut snapshot = Vec::new();
        session.engine().save(session.sequence(), &mut snapshot).expect("saved");
        let made = Made {
            ids: answer.ids,
            text: answer.text,
            shown,
            finish_reason: answer.finish_reason,
            generated: answer.stats.generated_tokens,
            tokens: session.tokens().to_vec(),
            snapshot,
        };
        (made, answer.stats.drafts.accepted)
    }

    /// The answer without drafts, which all that are drafted are compared with; returns how many drafts were accepted.
    fn compare(&self, engine: &Arc<Engine>, prompt: &[u32], limits: &[DraftLimit]) -> u64 {
        let session = || Session::new(engine).expect("a session");
        let (plain, _) = self.make(session().drafted(DraftLimit::Off), prompt);
        let known: Vec<u32> = prompt.iter().chain(&plain.ids).copied().collect();
        let mut accepted = 0;
        for &limit in limits {
            let (drafted, right) = self.make(session().drafted(limit), prompt);
            assert_eq!(drafted, plain, "{limit:?}");
            let by = session().drafted(limit).drafted_by(Box::new(MostlyRight(known.clone())));
            let (by_other, more) = self.make(by, prompt);
            assert_eq!(by_other, plain, "{limit:?}");
            accepted += right + more;
        }
        accepted
    }
}

fn sampled(seed: u64) -> SamplerOptions {
    SamplerOptions { seed, ..SamplerOptions::default() }
}

fn penalized(seed: u64) -> SamplerOptions {
    SamplerOptions { repeat_penalty: 1.1, frequency_penalty: 0.2, presence_penalty: 0.1, ..sampled(seed) }
}

const LIMITS: [DraftLimit; 4] = [DraftLimit::Auto, DraftLimit::Most(1), DraftLimit::Most(3), DraftLimit::Most(7)];

#[test]
fn drafts_change_no_answer_and_leave_nothing_behind() {
    let mut accepted = 0;
    for name in ["chat_story", "long_mixed", "mini-4b_golden_0", "mini-21b_golden_0"] {
        let golden = common::goldens().into_iter().find(|golden| golden.name == name).expect("a golden");
        for (layout, slots) in [(Layout::Gguf, None), (Layout::Gguf, Some(24)), (Layout::Offload, Some(17))] {
            let options = LoadOptions { threads: 2, slots, ..LoadOptions::default() };
            let engine = common::engine(golden.gguf(WeightType::Q4_0, layout), &options);
            for sampler in [SamplerOptions::greedy(), sampled(3), penalized(5)] {
                accepted += How::new(sampler, 40).compare(&engine, &golden.ids, &LIMITS);
            }
        }
    }
    assert!(accepted > 1000, "{accepted} drafts accepted");
}

/// A context that ends in the middle of what is drafted; windows that have given pages back.
#[test]
fn the_end_of_the_context_is_where_it_was() {
    for name in ["long_mixed", "mini-21b_golden_0"] {
        let golden = common::goldens().into_iter().find(|golden| golden.name == name).expect("a golden");
        let prompt: Vec<u32> = golden.ids.iter().copied().cycle().take(600).collect();
        for ctx in [601, 604, 633] {
            let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &LoadOptions::default());
            let ctx = ctx.min(engine.config().context_length);
            let options = LoadOptions { ctx: Some(ctx), threads: 2, ..LoadOptions::default() };
            let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
            let prompt = &prompt[..prompt.len().min(ctx - 1)];
            How::new(SamplerOptions::greedy(), 1000).compare(&engine, prompt, &LIMITS);
        }
    }
}

#[test]
fn limits_stop_strings_and_callers_end_an_answer_where_they_would() {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
    let whole = How::new(SamplerOptions::greedy(), 48);
    let (plain, _) = whole.make(Session::new(&engine).expect("a session").drafted(DraftLimit::Off), &golden.ids);
    for n in 0..20 {
        How::new(sampled(1), n).compare(&engine, &golden.ids, &[DraftLimit::Most(7)]);
        let how = How { stops_at: n + 1, ..How::new(sampled(1), 48) };
        how.compare(&engine, &golden.ids, &[DraftLimit::Most(7)]);
    }
    let words: Vec<&str> = plain.text.split(' ').collect();
    for word in words.iter().filter(|word| word.len() > 2).take(12) {
        let limits = GenerateOptions {
            max_tokens: Some(48),
            stop: vec![(*word).to_owned(), "never".to_owned()],
            ..GenerateOptions::default()
        };
        let how = How { limits, ..How::new(SamplerOptions::greedy(), 48) };
        how.compare(&engine, &golden.ids, &[DraftLimit::Most(2), DraftLimit::Most(7)]);
    }
}

#[test]
fn an_answer_that_has_to_fit_fits_as_it_does_without() {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
    let schema = json!({"type": "array", "minItems": 3, "maxItems": 3, "items": {
        "type": "object",
        "properties": {"name": {"enum": ["the cat", "the dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"], "additionalProperties": false,
    }});
    let grammar = Grammars::new(&engine).expect("tokens").compile(&Source::Schema(schema)).expect("a grammar");
    for sampler in [SamplerOptions::greedy(), sampled(2), penalized(9)] {
        for n in [5, 200] {
            let how = How { schema: Some(&grammar), ..How::new(sampler, n) };
            how.compare(&engine, &golden.ids, &LIMITS);
        }
    }
}

/// Two hundred prompts with the bundled model, in turn greedy and sampled, with all experts in memory and with few, in both layouts.
#[test]
fn two_hundred_prompts_are_answered_as_without_drafts() {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    let engine = |layout, slots| {
        let options = LoadOptions { threads: 2, slots, ..LoadOptions::default() };
        common::engine(golden.gguf(WeightType::Q4_0, layout), &options)
    };
    let engines = [
        engine(Layout::Gguf, None),
        engine(Layout::Offload, None),
        engine(Layout::Gguf, Some(20)),
        engine(Layout::Offload, Some(20)),
    ];
    let tokenizer = engines[0].tokenizer().expect("a tokenizer");
    let mut dice = Dice(11);
    let (who, what) =
        (["Lily", "the dog", "Tom and his cat", "a little bird"], ["a red ball", "the big tree", "17 + 25"]);
    let mut accepted = 0;
    for n in 0..200 {
        let (a, b) = (who[dice.below(who.len())], what[dice.below(what.len())]);
        let said = format!("{a} saw {b}. ").repeat(1 + dice.below(3));
        let prompt = tokenizer.encode(&format!("{said}Number {n}: {a} "), false).expect("ids");
        let sampler = if n % 2 == 0 { SamplerOptions::greedy() } else { sampled(n as u64) };
        let limit = [DraftLimit::Auto, DraftLimit::Most(1 + n % 7)][n / 4 % 2];
        accepted += How::new(sampler, 12).compare(&engines[n % 4], &prompt, &[limit]);
    }
    assert!(accepted > 200, "{accepted}");
}

/// A model that drafts for itself is always right, at any temperature; one with other tokens is refused.
#[test]
fn a_smaller_model_drafts_and_changes_no_token() {
    let ask = |with: &[&str]| -> Value {
        let args = ["run", "tiny", "-p", "Tell me a story.", "-n", "30", "--seed", "4", "--json"];
        serde_json::from_str(&run(args.iter().chain(with)).ok()).expect("JSON")
    };
    let plain = ask(&["--draft", "off"]);
    for with in [&["--draft", "3", "--draft-model", "tiny"][..], &["--draft-model", "tiny", "--memory", "512MiB"]] {
        let drafted = ask(with);
        assert_eq!((&drafted["ids"], &drafted["text"]), (&plain["ids"], &plain["text"]), "{with:?}");
    }
    let drafted = ask(&["--draft", "3", "--draft-model", "tiny"]);
    let stats = &drafted["stats"];
    assert!(stats["drafted_tokens"].as_u64() > Some(15), "{stats}");
    assert_eq!(stats["accepted_tokens"], stats["drafted_tokens"], "{stats}");
    let mini = common::converted(&common::repo("tests/golden/mini-4b"), WeightType::Q4_0, Layout::Gguf);
    let mini = mini.to_str().expect("UTF-8");
    run(["run", "tiny", "-p", "x", "--draft-model", mini]).fails(&["other tokens"]);
    run(["run", "tiny", "-p", "x", "--draft-model", "/no/such.gguf"]).fails(&["/no/such.gguf"]);
}

/// In company, over HTTP: the same texts and the same logprobs.
#[test]
fn conversations_that_are_drafted_together_say_what_each_says_alone() {
    let story = "Lily had a red ball. Tom had a red ball. ".repeat(6);
    let ask = |n: usize| json!({"prompt": format!("{story}{n} had a red"), "max_tokens": 30, "seed": n, "temperature": n % 2, "logprobs": 2});
    let alone: Vec<Value> = {
        let server = Server::start(&["--draft", "off"]);
        (0..4).map(|n| server.ask("/v1/completions", &ask(n))["choices"].clone()).collect()
    };
    for draft in ["auto", "2", "7"] {
        let server = Server::start(&["--draft", draft]);
        let together: Vec<Value> = std::thread::scope(|scope| {
            let server = &server;
            let one = |n: usize| scope.spawn(move || server.ask("/v1/completions", &ask(n))["choices"].clone());
            (0..4).map(one).collect::<Vec<_>>().into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(together, alone, "{draft}");
        if draft != "auto" {
            let (drafted, right) =
                (server.metric("st_drafted_tokens_total"), server.metric("st_drafted_tokens_accepted_total"));
            assert!(drafted >= right && drafted > 0.0, "{draft}: {right} of {drafted}");
        }
    }
}

#[test]
fn the_command_line_drafts_as_it_is_told() {
    let ask = |draft: &str| -> Value {
        let prompt = "Lily had a red ball. Tom had a red ball. Lily had a red ball. Tom had";
        let args = ["run", "tiny", "--raw", "-p", prompt, "-n", "30", "--temp", "0", "--json", "--draft", draft];
        serde_json::from_str(&run(args).ok()).expect("JSON")
    };
    let (off, some) = (ask("off"), ask("4"));
    assert_eq!((&off["ids"], &off["text"]), (&some["ids"], &some["text"]));
    assert_eq!(off["stats"]["drafted_tokens"], 0);
    let (drafted, right) = (&some["stats"]["drafted_tokens"], &some["stats"]["accepted_tokens"]);
    assert!(right.as_u64() > Some(0) && drafted.as_u64() >= right.as_u64(), "{some}");
    run(["run", "tiny", "-p", "x", "--draft", "much"]).misused("auto, off or a number");
    let bench = ["bench", "tiny", "-p", "0", "-n", "16", "-r", "1", "--draft-accept", "0.9", "-o", "json"];
    for memory in [&[][..], &["--memory", "160MiB"]] {
        let bench: Value = serde_json::from_str(&run(bench.iter().chain(memory)).ok()).expect("JSON");
        assert!(bench["tests"][1]["test"].as_str().is_some_and(|name| name.contains("accepted")), "{bench}");
    }
    run(["bench", "tiny", "--draft-accept", "1.5"]).misused("from 0 to 1");
}
