//! `st-tool serve` as clients meet it: real connections, the bundled model.

use serde_json::{Value, json};

use crate::http::Server;
use crate::program::{program, run};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A request for a chat that ends within `n` tokens.
fn chat(question: &str, n: usize) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": question}], "max_tokens": n, "seed": 7})
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("text")
}

#[test]
fn a_chat_is_answered_at_once_or_as_it_is_made() {
    let server = Server::start(&[]);
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    let body = chat("Tell me a story.", 40);
    let answer = server.ask(CHAT, &body);
    assert_eq!(
        (&answer["object"], &answer["model"], &answer["seed"]),
        (&json!("chat.completion"), &json!("tiny"), &json!(7))
    );
    assert!(content(&answer).len() > 20, "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 40);
    let prompt = answer["usage"]["prompt_tokens"].as_u64().expect("a number");
    assert_eq!(answer["usage"]["total_tokens"], prompt + 40);

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = server.stream(CHAT, &streamed).all();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, content(&answer));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let (last, usage) = (&chunks[chunks.len() - 2], &chunks[chunks.len() - 1]);
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(40)));
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["seed"] == 7));
    assert!(last["usage"].is_null());

    // The command line says the same.
    let same = ["run", "tiny", "-p", "Tell me a story.", "-n", "40", "--seed", "7", "--json"];
    let alone: Value = serde_json::from_str(&run(same).ok()).expect("JSON");
    assert_eq!(alone["text"], content(&answer));
}

#[test]
fn a_text_is_gone_on_with() {
    let server = Server::start(&[]);
    let ids = server.ask("/tokenize", &json!({"content": "Once upon a time"}))["tokens"].clone();
    assert_eq!(server.ask("/detokenize", &json!({"tokens": ids}))["content"], "Once upon a time");
    let ask = |prompt: Value| server.ask(TEXT, &json!({"prompt": prompt, "max_tokens": 12, "seed": 1}));
    let text = ask(json!("Once upon a time"));
    assert_eq!(text["choices"][0]["text"], ask(ids.clone())["choices"][0]["text"]);
    let both = ask(json!(["Once upon a time", "The end"]));
    assert_eq!(both["choices"][0]["text"], text["choices"][0]["text"]);
    assert_eq!(both["choices"].as_array().map(Vec::len), Some(2));
    let streamed = json!({"prompt": ids, "max_tokens": 12, "seed": 1, "stream": true});
    let chunks = server.stream(TEXT, &streamed).all();
    let joined: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(joined, text["choices"][0]["text"].as_str().expect("text"));
    // A forgotten limit is no endless text.
    assert_eq!(
        server.ask(TEXT, &json!({"prompt": "One"}))["usage"]["completion_tokens"].as_u64().map(|n| n <= 16),
        Some(true)
    );
}

#[test]
fn sampling_does_as_it_is_told() {
    let server = Server::start(&[]);
    let with = |name: &str, value: Value| {
        let mut body = chat("Tell me a story.", 24);
        body[name] = value;
        server.ask(CHAT, &body)
    };
    let plain = with("user", json!("me"));
    // A seed that is drawn is told, and repeats the answer.
    let drawn = with("seed", Value::Null);
    let again = with("seed", drawn["seed"].clone());
    assert_eq!(content(&drawn), content(&again));
    assert_ne!(content(&with("seed", json!(8))), content(&plain));
    // Several answers: each is that of its own seed.
    let three = with("n", json!(3));
    for index in 0..3 {
        let choice = &three["choices"][index];
        assert_eq!((&choice["index"], &choice["seed"]), (&json!(index), &json!(7 + index)));
        assert_eq!(choice["message"]["content"], content(&with("seed", json!(7 + index))));
    }
    assert_eq!(three["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"]);
    // Stop strings are no part of the answer.
    let text = content(&plain).to_owned();
    let word = text.split(' ').nth(3).expect("a word");
    let stopped = with("stop", json!([word, "never"]));
    assert_eq!(content(&stopped), &text[..text.find(word).expect("there")]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    // A token that is made certain is all there is.
    let ids = server.ask("/tokenize", &json!({"content": "fox"}))["tokens"].clone();
    let id = ids[0].as_u64().expect("an id").to_string();
    let mut body = chat("x", 5);
    body["logit_bias"] = json!({&id: 100});
    body["temperature"] = json!(0);
    let forced = server.ask(CHAT, &body);
    let piece = server.ask("/detokenize", &json!({"tokens": [ids[0]]}))["content"].as_str().expect("text").repeat(5);
    assert_eq!(content(&forced), piece);
}

#[test]
fn likely_tokens_are_told_of() {
    let server = Server::start(&[]);
    let mut body = chat("Tell me a story.", 6);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(3);
    body["temperature"] = json!(0);
    let answer = server.ask(CHAT, &body);
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().expect("a list").clone();
    assert_eq!(tokens.len(), 6);
    let text: Vec<u8> = tokens
        .iter()
        .flat_map(|token| {
            token["bytes"].as_array().expect("bytes").iter().map(|byte| byte.as_u64().expect("a byte") as u8)
        })
        .collect();
    assert_eq!(String::from_utf8(text).expect("UTF-8"), content(&answer));
    for token in &tokens {
        let top = token["top_logprobs"].as_array().expect("a list");
        assert_eq!((top.len(), &top[0]["token"], &top[0]["logprob"]), (3, &token["token"], &token["logprob"]));
        let all: f64 = top.iter().map(|one| one["logprob"].as_f64().expect("a number").exp()).sum();
        assert!(all <= 1.0001 && top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
    body["stream"] = json!(true);
    let streamed: Vec<Value> = server
        .stream(CHAT, &body)
        .all()
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(streamed, tokens);
    let text = server.ask(TEXT, &json!({"prompt": "One", "max_tokens": 4, "logprobs": 2, "temperature": 0}));
    let logprobs = &text["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(4));
    assert_eq!(logprobs["text_offset"][0], 0);
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let server = Server::start(&[]);
    let with = |name: &str, value: Value| {
        let mut body = chat("x", 3);
        body[name] = value;
        server.post(CHAT, &body)
    };
    for (name, value, param) in [
        ("temperature", json!(-1), "temperature"),
        ("messages", json!([]), "messages"),
        ("messages", json!("x"), "messages"),
        ("messages", json!([{"role": "wizard", "content": "x"}]), "messages[0].role"),
        ("messages", json!([{"role": "user"}]), "messages[0].content"),
        ("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0].type"),
        ("max_tokens", json!("x"), "max_tokens"),
        ("n", json!(1000), "n"),
        ("top_logprobs", json!(3), "top_logprobs"),
        ("mirostat", json!(2), "mirostat"),
        ("audio", json!({"voice": "x"}), "audio"),
        ("stream_options", json!(3), "stream_options"),
    ] {
        with(name, value.clone()).fails(400, Some(param));
    }
    with("model", json!("gpt-4")).fails(404, Some("model"));
    let long = "a b ".repeat(4000);
    let error = with("messages", json!([{"role": "user", "content": long}])).fails(400, Some("messages"));
    assert_eq!(error["code"], "context_length_exceeded");
    for body in ["", "{", "[]", "null", "\u{ff}", &"[".repeat(100_000)] {
        server.send("POST", CHAT, "", body.as_bytes()).fails(400, None);
    }
    server.post(TEXT, &json!({"prompt": ""})).fails(400, Some("prompt"));
    server.post(TEXT, &json!({"prompt": [99_999_999]})).fails(400, Some("prompt"));
    server.post(TEXT, &json!({"prompt": "x", "echo": true})).fails(400, Some("echo"));
    server.post(TEXT, &json!({"prompt": "x", "suffix": "y"})).fails(400, Some("suffix"));
    assert!(server.get("/nowhere").headers.contains("content-type: application/json"));
    assert!(server.metric("st_http_responses_total{status=\"4xx\"}") > 20.0);
    server.get("/nowhere").fails(404, None);
    server.get(CHAT).fails(405, None);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "tiny");
    assert_eq!(server.get("/v1/models/tiny").json()["meta"]["n_ctx"], 2048);
    server.get("/v1/models/other").fails(404, Some("model"));
    // Everything is still well.
    assert_eq!(server.ask(CHAT, &chat("x", 3))["usage"]["completion_tokens"], 3);
}

#[test]
#[cfg(unix)]
fn a_server_for_others_needs_a_key() {
    run(["serve", "tiny", "--host", "0.0.0.0", "--port", "0"]).fails(&["0.0.0.0", "no key"]);
    run(["serve", "tiny", "--api-key", " ", "--port", "0"]).fails(&["no key"]);
    run(["serve", "tiny", "--api-key", "x", "--no-auth"]).misused("cannot be used with");
    let mut command = program();
    command.args(["serve", "tiny", "--port", "0"]).env("ST_TOOL_API_KEY", "s3cret");
    let mut server = Server::of(&mut command);
    assert_eq!(server.get("/health").status, 200);
    for headers in ["", "authorization: Bearer wrong\r\n", "authorization: s3cret\r\n", "x-api-key: s3cre\r\n"] {
        server.send("GET", "/v1/models", headers, b"").fails(401, None);
    }
    for headers in ["authorization: Bearer s3cret\r\n", "authorization: bearer s3cret\r\n", "x-api-key: s3cret\r\n"] {
        assert_eq!(server.send("GET", "/v1/models", headers, b"").status, 200, "{headers}");
    }
    assert!(!server.said().contains("s3cret"));
    server.signal("TERM");
    assert!(server.child.wait().expect("ended").success());
}
