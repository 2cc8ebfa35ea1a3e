//! What a server promises, whoever else asks and however badly.

use std::io::{BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};
use st_gguf::GgufFile;
use st_grammar::{Grammars, Source};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{Constraint, Engine, GenerateOptions, LoadOptions, Session, generate_within};

use crate::common::{Dice, other_isa, repo};
use crate::http::{Answer, Server, request};
use crate::program::patiently;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// The bundled model in this process, to say what an answer is alone.
fn alone() -> Arc<Engine> {
    let file = GgufFile::open(repo("models/tiny/tiny-q4_0.gguf")).expect("the bundled model");
    Engine::load(file, &LoadOptions { threads: 2, ..LoadOptions::default() }).expect("a model")
}

/// A request for a text, and what it is answered alone.
struct Request {
    prompt: Vec<u32>,
    seed: u64,
    temperature: f32,
    n: usize,
    penalty: f32,
    /// What it has to fit.
    schema: Option<Value>,
}

impl Request {
    /// Any of many: some begin alike, some are long.
    fn any(dice: &mut Dice, words: &[u32]) -> Self {
        let begin = [0, 0, 7, 300][dice.below(4)];
        let length = 1 + [3, 20, 100, 400, 900][dice.below(5)] + dice.below(50);
        let mut prompt: Vec<u32> = words.iter().copied().cycle().skip(begin).take(length).collect();
        if dice.below(2) == 0 {
            prompt.push(dice.below(300) as u32);
        }
        let temperature = [0.0, 0.8, 1.5][dice.below(3)];
        let penalty = [0.0, 0.0, 0.7][dice.below(3)];
        let schema = match dice.below(8) {
            0 => Some(
                json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "kind": {"enum": ["cat", "dog"]}},
                "required": ["name", "kind"], "additionalProperties": false}),
            ),
            1 => Some(
                json!({"type": "array", "items": {"oneOf": [{"type": "integer"}, {"const": "none"}]}, "maxItems": 5}),
            ),
            _ => None,
        };
        Self { prompt, seed: dice.below(5) as u64, temperature, n: 1 + dice.below(40), penalty, schema }
    }

    fn body(&self, stream: bool) -> Value {
        let schema = |schema| json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        json!({
            "prompt": self.prompt, "seed": self.seed, "temperature": self.temperature, "max_tokens": self.n,
            "presence_penalty": self.penalty, "stream": stream, "response_format": self.schema.as_ref().map(schema),
        })
    }

    fn expected(&self, engine: &Arc<Engine>, grammars: &Grammars) -> String {
        let options = SamplerOptions {
            seed: self.seed,
            temperature: self.temperature,
            presence_penalty: self.penalty,
            ..SamplerOptions::default()
        };
        let mut sampler = Sampler::new(options).expect("valid");
        let mut session = Session::new(engine).expect("a session");
        let limits = GenerateOptions { max_tokens: Some(self.n), ..GenerateOptions::default() };
        let go_on = &mut |_: &str| std::ops::ControlFlow::Continue(());
        let grammar = self.schema.clone().map(|schema| grammars.compile(&Source::Schema(schema)).expect("a grammar"));
        let constraint = grammar.map(|grammar| Box::new(grammar.constraint()) as Box<dyn Constraint>);
        let answer = generate_within(&mut session, &self.prompt, &mut sampler, &limits, constraint, &mut (), go_on);
        answer.expect("an answer").text
    }
}

/// A request whose answer ends at its limit alone: no token that ends answers is likely enough.
pub(crate) fn endless(server: &Server, mut body: Value) -> Value {
    for text in ["<|im_end|>", "<|endoftext|>"] {
        let ids = server.ask("/tokenize", &json!({"content": text, "parse_special": true}))["tokens"].clone();
        assert_eq!(ids.as_array().map(Vec::len), Some(1), "{text}");
        body["logit_bias"][ids[0].to_string()] = json!(-100);
    }
    body
}

fn text_of(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().expect("text")
}

/// Rounds of requests; `ST_TEST_ROUNDS` asks for more.
fn rounds() -> usize {
    std::env::var("ST_TEST_ROUNDS").map_or(4, |rounds| rounds.parse().expect("a number"))
}

/// Requests of all kinds at once, some of which are hung up on; every answer is the one that it is alone.
fn mixed(server: &Server, engine: &Arc<Engine>, seed: u64, clients: usize, rounds: usize) {
    let words = engine.tokenizer().expect("a tokenizer").encode(&"Lily saw a big red ball. ".repeat(60), false);
    let words = words.expect("tokens");
    let grammars = Grammars::new(engine).expect("tokens");
    thread::scope(|scope| {
        for client in 0..clients {
            let (words, engine, grammars) = (&words, engine, &grammars);
            scope.spawn(move || {
                let mut dice = Dice(seed * 1000 + client as u64);
                for round in 0..rounds {
                    let one = Request::any(&mut dice, words);
                    let expected = one.expected(engine, grammars);
                    let got = match dice.below(4) {
                        0 => {
                            let mut stream = server.stream(TEXT, &one.body(true));
                            (0..dice.below(4)).for_each(|_| drop(stream.next()));
                            continue;
                        }
                        1 => {
                            let chunks = server.stream(TEXT, &one.body(true)).all();
                            chunks.iter().map(text_of).collect()
                        }
                        _ => text_of(&server.ask(TEXT, &one.body(false))).to_owned(),
                    };
                    assert_eq!(got, expected, "client {client}, round {round}: {}", one.body(false));
                }
            });
        }
    });
}

#[test]
fn an_answer_is_the_same_alone_and_in_company() {
    let engine = alone();
    for (seed, args) in [
        (1, vec!["--parallel", "4"]),
        (2, vec!["--parallel", "3", "--prompt-piece", "17", "--threads", "1", "--isa", other_isa().name()]),
        (3, vec!["--parallel", "2", "--prompt-piece", "5", "--draft", "off"]),
    ] {
        let server = Server::start(&args);
        mixed(&server, &engine, seed, 6, rounds());
        assert!(server.metric("st_prompt_tokens_cached_total") > 0.0);
        assert!(server.metric("st_requests_hung_up_total") > 0.0);
        patiently(|| server.metric("st_conversations") == 0.0 && server.metric("st_queue_length") == 0.0);
    }
}

#[test]
fn a_budget_holds_with_everyone_on_board() {
    let engine = alone();
    // The least that works with four conversations, and the program's own measure of it.
    let refused = crate::program::run(["serve", "tiny", "--port", "0", "--memory", "1MiB", "--ctx", "1024"]);
    let refused = refused.fails(&["needs at least"]);
    let least = refused.stderr.split("needs at least ").nth(1).and_then(|rest| rest.split(' ').next());
    let budget = (least.expect("bytes").parse::<u64>().expect("a number") + (2 << 20)).to_string();
    for (seed, more) in [(4, vec![]), (5, vec!["--draft", "off", "--isa", other_isa().name()])] {
        let mut args = vec!["--memory", &budget, "--ctx", "1024"];
        args.extend(more);
        let server = Server::start(&args);
        patiently(|| server.said().contains("4 × 1024 tokens"));
        mixed(&server, &engine, seed, 6, rounds());
        assert!(server.metric("st_kv_pages") <= server.metric("st_kv_pages_most"));
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).expect("a process");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        let most: u64 = budget.parse().expect("bytes");
        assert!(peak * 1024 <= most, "{peak} KiB of {} KiB", most / 1024);
    }
}

#[test]
fn nothing_is_computed_for_nobody() {
    let server = Server::start(&["--parallel", "2"]);
    let long = endless(&server, json!({"prompt": "One day, ", "max_tokens": 1900, "stream": true}));
    let mut stream = server.stream(TEXT, &long);
    (0..3).for_each(|_| drop(stream.next()));
    drop(stream);
    patiently(|| server.metric("st_conversations") == 0.0);
    let made = server.metric("st_completion_tokens_total");
    assert!(made < 1900.0 && server.metric("st_requests_hung_up_total") == 1.0);
    // One that waits for the whole, and one that is still being read.
    for prompt in ["One day, ".to_owned(), "and then ".repeat(600)] {
        let body = json!({"prompt": prompt, "max_tokens": 1000}).to_string();
        let mut connection = server.connect();
        connection.write_all(&request("POST", TEXT, "", body.as_bytes())).expect("sent");
        patiently(|| server.metric("st_prompt_tokens_total") > 0.0);
        connection.shutdown(Shutdown::Both).expect("hung up");
        drop(connection);
    }
    patiently(|| server.metric("st_conversations") == 0.0 && server.metric("st_queue_length") == 0.0);
    assert!(server.metric("st_completion_tokens_total") < made + 2000.0);
}

#[test]
fn who_reads_slowly_waits_alone() {
    let server = Server::start(&["--parallel", "3"]);
    // More than all buffers on the way hold: two answers with twenty likely tokens beside each of theirs.
    let long = json!({"prompt": "One day, ", "max_tokens": 1800, "stream": true, "logprobs": 20, "n": 2, "seed": 3});
    let long = endless(&server, long);
    let slow = server.stream(TEXT, &long);
    let mut made = 0.0;
    // It comes to a stop, since nobody reads.
    patiently(|| {
        let before = std::mem::replace(&mut made, server.metric("st_completion_tokens_total"));
        thread::sleep(std::time::Duration::from_millis(50));
        made > 300.0 && before == made
    });
    for seed in 0..3 {
        let quick = json!({"prompt": "One day, ", "max_tokens": 20, "seed": seed});
        assert!(!text_of(&server.ask(TEXT, &quick)).is_empty());
    }
    let chunks = slow.all();
    let reasons = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).count();
    assert_eq!(reasons, 2);
}

#[test]
fn who_waits_is_told_so_each_second_and_who_comes_too_late_when_to_come_back() {
    let server = Server::start(&["--parallel", "1", "--queue", "1"]);
    let long = json!({"prompt": "One day, ", "max_tokens": 1900, "stream": true, "logprobs": 20});
    let long = endless(&server, long);
    let first = server.stream(TEXT, &long);
    patiently(|| server.metric("st_conversations") == 1.0);
    let short = json!({"prompt": "One day, ", "max_tokens": 3, "stream": true});
    let mut second = server.stream(TEXT, &short);
    patiently(|| server.metric("st_queue_length") == 1.0 || server.metric("st_conversations") == 0.0);
    let third = server.post(TEXT, &short);
    if third.status != 200 {
        third.fails(429, None);
        assert!(third.headers.contains("retry-after: "), "{}", third.headers);
    }
    let mut events = Vec::new();
    while let Some(event) = second.next() {
        events.push(event);
    }
    assert!(events.iter().all(|event| event.starts_with("data: ") || event == ": at work"));
    assert_eq!(events.last().map(String::as_str), Some("data: [DONE]"));
    drop(first);
}

#[test]
fn what_was_said_before_is_not_read_again() {
    let server = Server::start(&[]);
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
    let long = "Lily had a red ball and a blue box. ".repeat(30);
    let mut body = json!({
        "messages": [{"role": "system", "content": long}, {"role": "user", "content": "What color is the ball?"}],
        "max_tokens": 20, "seed": 2,
    });
    let cold = server.ask(CHAT, &body);
    let warm = server.ask(CHAT, &body);
    assert_eq!((cached(&cold), &warm["choices"]), (0, &cold["choices"]));
    assert_eq!(cached(&warm), warm["usage"]["prompt_tokens"].as_u64().expect("a number") - 1);
    // The next turn begins with this one.
    let said = cold["choices"][0]["message"].clone();
    let messages = body["messages"].as_array_mut().expect("messages");
    messages.extend([said, json!({"role": "user", "content": "And the box?"})]);
    let next = server.ask(CHAT, &body);
    assert!(cached(&next) > 200, "{next}");
    let fresh = Server::start(&[]).ask(CHAT, &body);
    assert_eq!((cached(&fresh), &fresh["choices"]), (0, &next["choices"]));
    // Another question after the same beginning: at the second time the place where they part is known.
    for (question, least) in [("Who has a ball?", 0), ("Where is Lily?", 200)] {
        let other = json!({
            "messages": [{"role": "system", "content": long}, {"role": "user", "content": question}], "max_tokens": 9, "seed": 2,
        });
        let answer = server.ask(CHAT, &other);
        assert!(cached(&answer) >= least, "{answer}");
    }
}

#[test]
fn control_tokens_in_messages_are_letters() {
    let server = Server::start(&[]);
    let prompt = |text: &str| {
        let body = json!({"messages": [{"role": "user", "content": text}], "max_tokens": 1});
        server.ask(CHAT, &body)["usage"]["prompt_tokens"].as_u64().expect("a number")
    };
    let letters = server.ask("/tokenize", &json!({"content": "<|im_end|>"}))["tokens"].as_array().expect("ids").len();
    let control = json!({"content": "<|im_end|>", "parse_special": true});
    assert_eq!(server.ask("/tokenize", &control)["tokens"].as_array().map(Vec::len), Some(1));
    assert!(letters > 1);
    assert!(prompt("a <|im_end|>") > prompt("a ") + 1);
    let rendered = server.ask("/apply-template", &json!({"messages": [{"role": "user", "content": "<|im_end|>"}]}));
    assert!(rendered["prompt"].as_str().expect("text").contains("<|im_end|><|im_end|>"), "{rendered}");
}

#[test]
fn web_pages_of_others_may_not_ask() {
    let server = Server::start(&["--cors", "https://chat.example"]);
    let status = |headers: &str| server.send("GET", "/v1/models", headers, b"").status;
    for host in ["localhost:1", "127.0.0.1", "[::1]:8080", "st-tool"] {
        assert_eq!(status(&format!("host: {host}\r\n")), 200, "{host}");
    }
    for host in ["evil.example", "127.0.0.1.evil.example:8080"] {
        server.send("GET", "/v1/models", &format!("host: {host}\r\n"), b"").fails(403, None);
    }
    assert_eq!(status("origin: http://localhost\r\n"), 200);
    for origin in ["https://evil.example", "null", "http://localhost:1"] {
        let answer = server.send("GET", "/v1/models", &format!("origin: {origin}\r\n"), b"");
        answer.fails(403, None);
        assert!(!answer.headers.contains("access-control-allow-origin"));
    }
    let allowed = server.send("GET", "/v1/models", "origin: https://chat.example\r\n", b"");
    assert_eq!(allowed.status, 200);
    assert!(allowed.headers.contains("access-control-allow-origin: https://chat.example"));
    let asks = "origin: https://chat.example\r\naccess-control-request-method: POST\r\naccess-control-request-headers: x-a\r\n";
    let preflight = server.send("OPTIONS", CHAT, asks, b"");
    assert_eq!((preflight.status, preflight.headers.contains("access-control-allow-headers: x-a")), (204, true));
}

#[test]
fn bad_clients_harm_nobody() {
    let server = Server::start(&["--max-body", "64KiB"]);
    let large = json!({"prompt": "x".repeat(100 << 10)});
    server.post(TEXT, &large).fails(413, None);
    // Without a length, it is found out on the way.
    let mut connection = server.connect();
    connection
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        .expect("sent");
    let chunk = [format!("{:x}\r\n", 20 << 10).as_bytes(), &[b' '; 20 << 10], b"\r\n"].concat();
    (0..5).for_each(|_| drop(connection.write_all(&chunk)));
    let _ = connection.write_all(b"0\r\n\r\n");
    Answer::read(&mut BufReader::new(connection)).fails(413, None);
    // Heads that never end, bodies that never come, words that are no HTTP.
    let mut endless = server.connect();
    let _ = endless.write_all(b"GET / HTTP/1.1\r\n");
    for _ in 0..200 {
        if endless.write_all(&[b"x: ", [b'y'; 1000].as_slice(), b"\r\n"].concat()).is_err() {
            break;
        }
    }
    let mut idle: Vec<_> = (0..20).map(|_| server.connect()).collect();
    for connection in &mut idle {
        connection
            .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 50000\r\n\r\n{")
            .expect("sent");
    }
    let mut nonsense = server.connect();
    nonsense.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").expect("sent");
    let mut rest = Vec::new();
    let _ = nonsense.shutdown(Shutdown::Write);
    let _ = nonsense.read_to_end(&mut rest);
    let answer = server.ask(TEXT, &json!({"prompt": "One", "max_tokens": 3}));
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    drop(idle);
    patiently(|| server.metric("st_connections") <= 2.0);
}

#[test]
#[cfg(unix)]
fn it_ends_well() {
    // Nothing to do: at once.
    let mut server = Server::start(&[]);
    server.signal("TERM");
    assert!(server.child.wait().expect("ended").success());
    // An answer under way is given its time, and a new one refused.
    let mut server = Server::start(&["--grace", "100"]);
    let long = endless(&server, json!({"prompt": "One day, ", "max_tokens": 1500, "stream": true, "temperature": 0}));
    let mut stream = server.stream(TEXT, &long);
    stream.next();
    server.signal("INT");
    let chunks = stream.all();
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    assert!(server.child.wait().expect("ended").success());
    // Without any time, what there is of it ends properly.
    let mut server = Server::start(&["--grace", "0"]);
    let mut stream = server.stream(TEXT, &long);
    stream.next();
    server.signal("TERM");
    let chunks = stream.all();
    assert!(chunks.last().expect("chunks")["choices"][0]["finish_reason"].is_string());
    assert!(server.child.wait().expect("ended").success());
}

/// What was computed is there after a restart, whole or not at all; with another instruction set, too.
#[test]
#[cfg(unix)]
fn a_restart_forgets_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("cache");
    let args = ["--cache-dir", cache.to_str().expect("UTF-8")];
    let long = "Lily had a red ball and a blue box. ".repeat(30);
    let body = json!({
        "messages": [{"role": "system", "content": long}, {"role": "user", "content": "What color is the ball?"}],
        "max_tokens": 20, "seed": 2,
    });
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
    let snapshots = || -> Vec<std::path::PathBuf> {
        std::fs::read_dir(&cache).expect("a folder").map(|entry| entry.expect("an entry").path()).collect()
    };
    let ends = |mut server: Server| {
        server.signal("TERM");
        assert!(server.child.wait().expect("ended").success());
    };
    let server = Server::start(&args);
    let cold = server.ask(CHAT, &body);
    let prompt = cold["usage"]["prompt_tokens"].as_u64().expect("a number");
    ends(server);
    assert!(!snapshots().is_empty());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&cache).expect("a folder").permissions());
    assert_eq!(mode & 0o777, 0o700);
    let server = Server::start(&[&args[..], &["--isa", other_isa().name(), "--threads", "1"]].concat());
    let warm = server.ask(CHAT, &body);
    assert_eq!((cached(&warm), &warm["choices"]), (prompt - 1, &cold["choices"]));
    ends(server);
    // Damage is noticed, and what is no snapshot stays.
    for path in snapshots() {
        let mut bytes = std::fs::read(&path).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).expect("written");
    }
    std::fs::write(cache.join("note.stkv"), "mine").expect("written");
    let server = Server::start(&args);
    let again = server.ask(CHAT, &body);
    assert_eq!((cached(&again), &again["choices"]), (0, &cold["choices"]));
    ends(server);
    assert_eq!(std::fs::read(cache.join("note.stkv")).expect("still there"), b"mine");
    // The size is kept.
    let server = Server::start(&[&args[..], &["--cache-size", "5MiB"]].concat());
    for seed in 0..6 {
        let text = format!("{seed} {long}");
        server.ask(TEXT, &json!({"prompt": text, "max_tokens": 2}));
    }
    ends(server);
    let bytes: u64 = snapshots().iter().map(|path| path.metadata().expect("a file").len()).sum();
    assert!(bytes > 0 && bytes <= 5 << 20, "{bytes}");
}

/// Records of requests and answers have numbers, and neither what was said nor a key.
#[test]
fn the_log_tells_no_secrets() {
    let server = Server::start(&["--log-json", "--api-key", "s3cret-key"]);
    let key = "x-api-key: s3cret-key\r\n";
    let body = json!({"prompt": "Once s3cret-text", "max_tokens": 3}).to_string();
    assert_eq!(server.send("POST", TEXT, key, body.as_bytes()).status, 200);
    server.send("GET", "/s3cret-path?key=s3cret-query", "x-api-key: s3cret-other\r\n", b"").fails(401, None);
    patiently(|| server.said().lines().filter(|line| line.contains("\"event\":\"request\"")).count() >= 2);
    let said = server.said();
    assert!(!said.contains("s3cret"), "{said}");
    let records: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let answer = records.iter().find(|record| record["event"] == "answer").expect("a record");
    assert_eq!((&answer["completion_tokens"], &answer["ending"]), (&json!(3), &json!("length")));
    let request = records.iter().find(|record| record["event"] == "request").expect("a record");
    assert_eq!((&request["path"], &request["status"]), (&json!(TEXT), &json!(200)));
}
