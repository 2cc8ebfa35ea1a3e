//! The tests' hub on loopback as a program of its own, for comparing with other clients.
//!
//! `hub_server [MIB [FILES]]` serves `Tiiny/SmallThinker-4BA0.6B-Instruct` with FILES weight files (2) of MIB
//! MiB each (1), prints its endpoint, and logs every request to stderr. It runs until its standard input ends.
#![allow(clippy::print_stdout, reason = "a program for scripts, which read the endpoint from stdout")]

use std::io::Read;

#[allow(dead_code, unreachable_pub, missing_docs, reason = "the tests use more of it")]
#[path = "../tests/hub/server.rs"]
mod server;

use server::{RepoFile, Server, Settings, pattern};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<u64>().expect("a number"));
    let mib = arguments.next().unwrap_or(1);
    let count = arguments.next().unwrap_or(2);
    let mut files = vec![
        ("config.json".to_owned(), RepoFile::small(r#"{"architectures": ["SmallThinkerForCausalLM"]}"#)),
        ("tokenizer.json".to_owned(), RepoFile::small(pattern(100_000, 1))),
        ("chat_template.jinja".to_owned(), RepoFile::small("{{ messages }}")),
    ];
    let mut weight_map = serde_json::Map::new();
    // Sizes that differ, so that contents do, and that are no multiples of anything.
    for n in 1..=count {
        let name = format!("model-{n:05}-of-{count:05}.safetensors");
        weight_map.insert(format!("t{n}"), name.clone().into());
        files.push((name, RepoFile::huge((mib << 20) - n)));
    }
    let index = serde_json::json!({ "weight_map": weight_map }).to_string();
    files.push(("model.safetensors.index.json".to_owned(), RepoFile::small(index)));
    let settings = Settings {
        repo: "Tiiny/SmallThinker-4BA0.6B-Instruct".to_owned(),
        files: files.into_iter().collect(),
        echo: true,
        ..Settings::default()
    };
    let server = Server::start(settings);
    println!("{}", server.endpoint());
    let mut rest = Vec::new();
    // Ends when whoever started this closes the pipe.
    let _ = std::io::stdin().read_to_end(&mut rest);
}
