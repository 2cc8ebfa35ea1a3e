//! Answers made to fit a schema or a grammar: what comes back always parses, whatever threads and instruction sets compute it.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde_json::{Value, json};
use st_convert::{Layout, WeightType};
use st_grammar::{Grammar, GrammarError, Grammars, Source};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{
    Answer, Constraint, Engine, FinishReason, GenerateOptions, LoadOptions, Next, Session, generate_within,
};

use crate::common;
use crate::program::{arg, run};

fn tiny(threads: usize) -> Arc<Engine> {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &LoadOptions { threads, ..LoadOptions::default() })
}

fn sampler(seed: u64) -> Sampler {
    let mut sampler =
        Sampler::new(SamplerOptions { seed, temperature: 1.0, ..SamplerOptions::default() }).expect("valid");
    sampler.begin(&[]);
    sampler
}

fn prompt(engine: &Engine) -> Vec<u32> {
    engine.tokenizer().expect("a tokenizer").encode("Tell me about a cat: ", false).expect("ids")
}

/// The answer of one pass for all tokens that are forced.
fn answer(engine: &Arc<Engine>, grammar: &Grammar, seed: u64, most: usize) -> (String, Vec<u32>, FinishReason) {
    let mut session = Session::new(engine).expect("a session");
    let options = GenerateOptions { max_tokens: Some(most), ..GenerateOptions::default() };
    let constraint: Option<Box<dyn Constraint>> = Some(Box::new(grammar.constraint()));
    let mut on_text = |_: &str| ControlFlow::Continue(());
    let made =
        generate_within(&mut session, &prompt(engine), &mut sampler(seed), &options, constraint, &mut (), &mut on_text);
    let made = made.expect("an answer");
    (made.text, made.ids, made.finish_reason)
}

/// The same where each token is run alone.
fn one_by_one(engine: &Arc<Engine>, grammar: &Grammar, seed: u64, most: usize) -> (String, Vec<u32>, FinishReason) {
    let mut session = Session::new(engine).expect("a session");
    let prompt = prompt(engine);
    session.forward(&prompt).expect("a pass");
    let options = GenerateOptions { max_tokens: Some(most), ..GenerateOptions::default() };
    let room = session.ctx() - prompt.len();
    let mut answer = Answer::new(engine, &options, room).within(Some(Box::new(grammar.constraint())));
    let mut sampler = sampler(seed);
    sampler.begin(&prompt);
    loop {
        match answer.next(session.logits(), &mut sampler).expect("a token") {
            Next::Token(id) => session.forward(&[id]).expect("a pass"),
            Next::Finish(reason) => return (answer.text().to_owned(), answer.ids().to_vec(), reason),
        }
    }
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog", "a very small elephant that lives in the garden behind the house"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": false,
    })
}

#[test]
fn what_comes_back_parses_and_is_the_same_in_one_pass_and_in_many() {
    let engine = tiny(2);
    let grammars = Grammars::new(&engine).expect("tokens");
    let grammar = grammars.compile(&Source::Schema(person())).expect("a grammar");
    for seed in 0..8 {
        let (text, ids, reason) = answer(&engine, &grammar, seed, 400);
        assert_eq!(reason, FinishReason::Stop, "{text}");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let fields = value.as_object().expect("an object");
        assert_eq!(fields.keys().collect::<Vec<_>>(), ["name", "age", "kind", "tags"], "{text}");
        assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 12), "{text}");
        assert!(value["age"].as_u64().is_some_and(|age| age <= 120), "{text}");
        assert!(person()["properties"]["kind"]["enum"].as_array().expect("a list").contains(&value["kind"]), "{text}");
        assert!(value["tags"].as_array().is_some_and(|tags| tags.len() <= 3), "{text}");
        assert_eq!((text, ids, reason), one_by_one(&engine, &grammar, seed, 400));
    }
    // The limit of tokens cuts both at the same place.
    for most in 1..12 {
        assert_eq!(answer(&engine, &grammar, 3, most), one_by_one(&engine, &grammar, 3, most));
    }
    let alone = tiny(1);
    let grammar_alone = Grammars::new(&alone).expect("tokens").compile(&Source::Schema(person())).expect("a grammar");
    assert_eq!(answer(&engine, &grammar, 5, 400), answer(&alone, &grammar_alone, 5, 400));
}

#[test]
fn json_objects_and_grammars_hold_whatever_is_drawn() {
    let engine = tiny(2);
    let grammars = Grammars::new(&engine).expect("tokens");
    let any = grammars.compile(&Source::JsonObject).expect("a grammar");
    for seed in 0..6 {
        let (text, _, reason) = answer(&engine, &any, seed, 300);
        assert!(text.starts_with('{'), "{text}");
        if reason == FinishReason::Stop {
            assert!(serde_json::from_str::<Value>(&text).expect("JSON").is_object());
        }
    }
    let lark = "start: \"é: \" WORD (\", \" WORD){0,3} \"!\"\nWORD: /[a-z]{2,6}/";
    let list = grammars.compile(&Source::Lark(lark.to_owned())).expect("a grammar");
    for seed in 0..6 {
        let (text, ids, reason) = answer(&engine, &list, seed, 300);
        let words = text.strip_prefix("é: ").and_then(|text| text.strip_suffix('!')).expect("what the grammar says");
        assert!(words.split(", ").all(|word| (2..=6).contains(&word.len())), "{text}");
        assert_eq!((text, ids, reason), one_by_one(&engine, &list, seed, 300));
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_by_name() {
    let engine = tiny(1);
    let grammars = Grammars::new(&engine).expect("tokens");
    let refused = |schema: Value| match grammars.compile(&Source::Schema(schema)) {
        Err(GrammarError::Source(why)) => why,
        other => panic!("{other:?}"),
    };
    for (schema, named) in [
        (json!({"type": "string", "not": {"const": "a"}}), "not"),
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (json!({"type": "text"}), "text"),
        (json!({"$ref": "#/$defs/nothing"}), "nothing"),
        (json!({"$ref": "https://example.com/schema"}), "example.com"),
        (json!({"enum": []}), ""),
        (json!(7), "object"),
        (json!({"type": "string", "maxLength": 100_000}), "maxLength"),
        (
            json!({"properties": (0..1001).map(|i| (i.to_string(), json!({}))).collect::<serde_json::Map<_, _>>()}),
            "1000",
        ),
    ] {
        let why = refused(schema.clone());
        assert!(why.contains(named) && !why.contains("backtrace") && why.len() < 500, "{schema}: {why}");
    }
    for lark in ["", "  ", "start: undefined", "start: /(/", "{\"grammars\": 7}"] {
        let outcome = grammars.compile(&Source::Lark(lark.to_owned()));
        assert!(matches!(outcome, Err(GrammarError::Source(_))), "{lark:?}: {outcome:?}");
    }
}

#[test]
fn hostile_sources_are_bounded() {
    let engine = tiny(1);
    let grammars = Grammars::new(&engine).expect("tokens");
    let nested =
        |levels: usize, of: &dyn Fn(Value) -> Value| (0..levels).fold(json!({"type": "null"}), |inner, _| of(inner));
    let array = |inner: Value| json!({"type": "array", "items": inner});
    let all_of = |inner: Value| json!({"allOf": [inner.clone(), inner]});
    let wide =
        |n: usize| -> serde_json::Map<String, Value> { (0..n).map(|i| (format!("p{i}"), json!(true))).collect() };
    let list: Vec<String> = (0..7000).map(|i| format!("{}{i}", "x".repeat(i % 30))).collect();
    let sources = [
        Source::Schema(nested(30, &array)),
        Source::Schema(nested(100, &array)),
        Source::Schema(nested(12, &all_of)),
        Source::Schema(json!({"allOf": [{"$ref": "#"}]})),
        Source::Schema(json!({"$ref": "#"})),
        Source::Schema(
            json!({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}},
            "$ref": "#/$defs/a"}),
        ),
        Source::Schema(json!({"type": "object", "properties": wide(1001)})),
        Source::Schema(json!({"type": "object", "properties": wide(300)})),
        Source::Schema(json!({"enum": list})),
        Source::Schema(json!({"type": "string", "pattern": "^(a|b|ab)*c{1000}(x{1,500}){1,500}$"})),
        Source::Schema(json!({"type": "string", "pattern": "(".repeat(5000)})),
        Source::Schema(json!({"type": "string", "pattern": format!("{}a{}", "(".repeat(5000), ")".repeat(5000))})),
        Source::Schema(json!({"type": "array", "minItems": 4000, "items": {"type": "string", "minLength": 4000}})),
        Source::Schema(json!({"x-guidance": {"whitespace_flexible": true, "lenient": true}, "type": "object"})),
        Source::Lark("start: a\na: a a | \"x\"".to_owned()),
        Source::Lark(format!("start: {}\"x\"{}", "(".repeat(200), ")".repeat(200))),
        Source::Lark(format!("start: /{}a{}/", "(".repeat(20_000), ")".repeat(20_000))),
        Source::Lark(format!("start: {}", "\"x\" ".repeat(60_000))),
    ];
    for source in sources {
        let shown: String = format!("{source:?}").chars().take(120).collect();
        // Refused or compiled: no panic, no overflow. What is compiled makes text, or says why it does not.
        if let Ok(grammar) = grammars.compile(&source) {
            let mut fit = grammar.constraint();
            for _ in 0..40 {
                let Ok(forced) = fit.forced() else { break };
                if forced.iter().any(|id| engine.end_ids().contains(id)) {
                    break;
                }
                let Ok(allowed) = fit.allowed() else { break };
                let word = allowed.iter().position(|&word| word != 0).unwrap_or_else(|| panic!("no token: {shown}"));
                let id = word as u32 * 32 + allowed[word].trailing_zeros();
                if engine.end_ids().contains(&id) || fit.accept(id).is_err() {
                    break;
                }
            }
        }
    }
}

#[test]
fn run_takes_schemas_and_grammars() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path
    };
    let schema = file(
        "schema.json",
        r#"{"type":"object","properties":{"ok":{"type":"boolean"}},"required":["ok"],"additionalProperties":false}"#,
    );
    let schema = arg(&schema);
    let written = r#"{"const": {"a": [1, "b"]}}"#;
    let answers = ["{\"ok\":true}\n", "{\"ok\":false}\n"];
    assert!(answers.contains(&run(["run", "tiny", "-p", "Hello", "--schema", schema, "--quiet"]).ok().as_str()));
    assert_eq!(run(["run", "tiny", "-p", "Hello", "--schema", written, "--quiet"]).ok(), "{\"a\":[1,\"b\"]}\n");
    let grammar = file("words.lark", "start: \"yes\" | \"no\"");
    let grammar = arg(&grammar);
    let said = run(["run", "tiny", "--raw", "-p", "Hello", "--grammar", grammar, "--quiet"]).ok();
    assert!(["yes\n", "no\n"].contains(&said.as_str()), "{said}");
    for (args, named) in [
        (["--schema", r#"{"type": "text"}"#], "text"),
        (["--schema", r#"{"type"#], "not JSON"),
        (["--schema", "/nonexistent.json"], "nonexistent"),
        (["--grammar", schema], "grammar"),
    ] {
        let failed = run(["run", "tiny", "-p", "Hello", "--quiet"].iter().chain(&args));
        assert_eq!(failed.status, 1, "{failed:?}");
        assert!(failed.stderr.contains(named) && failed.stdout.is_empty(), "{failed:?}");
    }
}
