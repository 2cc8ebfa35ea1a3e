//! What a server does step by step, seen from outside: one read serves all, prompts are read in pieces between others' tokens, a read
//! that fails is told, and a second signal ends it.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::http::Server;
use crate::program::{arg, patiently, run};
use crate::promises::endless;

const TEXT: &str = "/v1/completions";

/// The least memory that the bundled model can be served in, in bytes.
fn least(args: &[&str]) -> u64 {
    let refused = run(["serve", "tiny", "--port", "0", "--memory", "1MiB"].iter().chain(args));
    let refused = refused.fails(&["needs at least"]);
    let bytes = refused.stderr.split("needs at least ").nth(1).and_then(|rest| rest.split(' ').next());
    bytes.expect("bytes").parse().expect("a number")
}

/// Some numbers of one page of `/metrics`.
fn numbers<const N: usize>(server: &Server, names: [&str; N]) -> [f64; N] {
    let page = server.get("/metrics").text();
    names.map(|name| {
        let value = page.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        value.unwrap_or_else(|| panic!("{name} is not in\n{page}")).parse().expect("a number")
    })
}

#[test]
fn one_read_serves_all_who_wait_for_it() {
    // Drafts make several tokens of one step, more for one alone.
    let made = |n: usize| {
        // Each text takes all of its context's memory at once, so that experts have as little in either case.
        let parallel = n.to_string();
        let args = ["--ctx", "256", "--parallel", &parallel, "--draft", "off"];
        let memory = least(&args).to_string();
        let server = Server::start(&[&args[..], &["--memory", &memory]].concat());
        let body = json!({"prompt": "One day, ", "max_tokens": 60, "temperature": 0, "n": n});
        let answer = server.ask(TEXT, &endless(&server, body));
        let texts: Vec<Value> =
            answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].clone()).collect();
        // The last step counts when its answers have ended.
        patiently(|| server.metric("st_conversations") == 0.0);
        let names =
            ["st_steps_total", "st_completion_tokens_total", "st_expert_read_bytes_total", "st_expert_evictions_total"];
        (texts, numbers(&server, names))
    };
    let (alone, [steps, tokens, bytes, evictions]) = made(1);
    assert!(evictions > 0.0 && bytes > 0.0);
    let (together, [steps_of_all, tokens_of_all, bytes_of_all, _]) = made(4);
    assert!(together.iter().all(|text| *text == alone[0]));
    // Four go through the layers as one does, and what one reads is there for all.
    assert_eq!((steps_of_all, tokens_of_all), (steps, 4.0 * tokens));
    assert!(bytes_of_all < 1.5 * bytes, "{bytes_of_all} of {bytes}");
}

#[test]
fn a_long_prompt_is_read_between_the_tokens_of_others() {
    // As many tokens at a time as is said, or as many as is well.
    for (args, piece) in [(&["--prompt-piece", "16"][..], 16.0), (&[][..], 256.0)] {
        let server = Server::start(args);
        let long = json!({"prompt": "One day, ", "max_tokens": 1900, "stream": true});
        let mut stream = server.stream(TEXT, &endless(&server, long));
        (0..3).for_each(|_| drop(stream.next()));
        let names = ["st_steps_total", "st_completion_tokens_total", "st_prompt_tokens_read_total"];
        let before = numbers(&server, names);
        let prompt: Vec<usize> = (0..900).map(|i| 10 + i * 7 % 400).collect();
        server.ask(TEXT, &json!({"prompt": prompt, "max_tokens": 1}));
        let after = numbers(&server, names);
        let [steps, made, read] = std::array::from_fn(|i| after[i] - before[i]);
        assert_eq!(read, 900.0);
        // Each piece is a pass, and in each the other has a token at least.
        assert!(steps >= 900.0 / piece, "{steps} steps");
        assert!(made >= (900.0_f64 / piece).floor(), "{made} tokens in {steps} steps");
    }
}

#[test]
fn a_read_that_fails_is_told_without_its_folder_and_the_next_goes_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    fs::copy(crate::common::repo("models/tiny/tiny-q4_0.gguf"), &path).expect("copied");
    let bytes = fs::read(&path).expect("read");
    let memory = least(&["--ctx", "256"]).to_string();
    let mut command = crate::program::program();
    command.args(["serve", arg(&path), "--port", "0", "--ctx", "256", "--memory", &memory]);
    let server = Server::of(&mut command);
    let body = json!({"prompt": "One day, ", "max_tokens": 40, "seed": 1});
    let good = server.ask(TEXT, &body);
    let file = fs::OpenOptions::new().write(true).open(&path).expect("opened");
    file.set_len(bytes.len() as u64 / 4).expect("cut");
    let error = server.post(TEXT, &json!({"prompt": "The end of ", "max_tokens": 40})).fails(500, None);
    let message = error["message"].as_str().expect("a text");
    assert!(message.contains("model.gguf"), "{message}");
    fs::write(&path, &bytes).expect("written");
    assert_eq!(server.ask(TEXT, &body)["choices"], good["choices"]);
    // No address tells where on the disk anything is.
    let hidden = folder.path().file_name().expect("a name").to_string_lossy().into_owned();
    assert!(!message.contains(&hidden), "{message}");
    for address in ["/v1/models", "/v1/models/model", "/props", "/slots", "/metrics", "/health", "/openapi.json"] {
        let answer = server.get(address);
        assert!(answer.status == 200 && !answer.text().contains(&hidden), "{address}: {}", answer.text());
    }
}

#[test]
fn a_second_signal_of_any_kind_ends_it_at_once() {
    for (first, second, status) in [("INT", "TERM", 143), ("TERM", "INT", 130), ("TERM", "TERM", 143)] {
        let mut server = Server::start(&["--grace", "1000"]);
        let long = json!({"prompt": "One day, ", "max_tokens": 1900, "stream": true, "logprobs": 20, "n": 4});
        let mut stream = server.stream(TEXT, &endless(&server, long));
        stream.next();
        server.signal(first);
        patiently(|| {
            TcpStream::connect(&server.address).and_then(|mut to| to.write_all(b"GET / HTTP/1.1\r\n\r\n")).is_err()
        });
        assert!(server.child.try_wait().expect("a process").is_none(), "nobody reads, so nothing ends");
        server.signal(second);
        assert_eq!(server.child.wait().expect("ended").code(), Some(status), "{first}, {second}");
    }
}
