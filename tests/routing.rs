//! Recorded routing, and what replaying it says.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::Value;
use st_convert::{Layout, WeightType};
use st_experts::cache_sim::{Replay, Tally};
use st_experts::{Policy, RoutingTrace, TraceHeader, TraceWriter};
use st_model::{Batch, BatchKind, Engine, LoadOptions, ModelError, Observer, Routing, Session, StoreStats};
use tempfile::tempdir;

use crate::common;
use crate::program::{Run, arg, names, run, short_of_memory};

/// Records the routing in memory.
struct Recording {
    writer: TraceWriter<Vec<u8>>,
    /// Tokens before the batch that runs, and with it.
    first: u64,
    tokens: u64,
}

impl Observer for Recording {
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        if layer == 0 {
            self.first = self.tokens;
            self.tokens += routing.n_tokens() as u64;
        }
        (self.first..)
            .zip(routing.ids().chunks(routing.n_used()))
            .try_for_each(|(token, ids)| self.writer.record(token, layer, ids, batch.kind().use_of_experts()))
    }
}

/// An empty recording of what `engine` runs.
fn recording(engine: &Engine) -> Recording {
    let (config, plan) = (engine.config(), engine.plan());
    let header = TraceHeader {
        n_layers: config.n_layers as u32,
        n_experts: config.n_experts as u32,
        expert_bytes: plan.slot,
        other_bytes: None,
    };
    Recording { writer: TraceWriter::new(Vec::new(), &header).expect("written"), first: 0, tokens: 0 }
}

/// Two prompts, each with some tokens after it: the trace, and what the store counted for prompts and for tokens.
fn conversation(engine: &Arc<Engine>, prompts: [&[u32]; 2]) -> (RoutingTrace, [StoreStats; 2]) {
    let mut trace = recording(engine);
    let mut session = Session::new(engine).expect("a session");
    let mut counted = [StoreStats::default(); 2];
    let mut before = engine.store_stats();
    let mut count = |part: usize| {
        let now = engine.store_stats();
        counted[part] = counted[part].plus(&now.since(&before));
        before = now;
    };
    for prompt in prompts {
        session.run(prompt, &mut trace).expect("a forward pass");
        count(0);
        for _ in 0..24 {
            let best = common::argmax(session.logits());
            session.run(&[best], &mut trace).expect("a forward pass");
        }
        count(1);
    }
    (RoutingTrace::read(&trace.writer.finish().expect("written")[..]).expect("a trace"), counted)
}

/// Replayed with the store's policy and slots, a trace gives the store's own hits and misses: for prompts and for tokens, in
/// both layouts, whatever the threads do. Guesses are not replayed: what they evict depends on which came in time.
#[test]
fn a_replay_counts_what_the_store_counted() {
    let goldens = common::goldens();
    let golden = |name: &str| goldens.iter().find(|golden| golden.name == name).expect(name);
    let (long, short) = (golden("long_mixed"), golden("chat_sum"));
    for layout in [Layout::Gguf, Layout::Offload] {
        for slots in [8, 9, 13, 24, 32, 50, 100, 127, 128] {
            let options = LoadOptions { threads: 2, slots: Some(slots), guess: false, ..LoadOptions::default() };
            let engine = common::engine(long.gguf(WeightType::Q4_0, layout), &options);
            let (trace, counted) = conversation(&engine, [&long.ids, &short.ids]);
            let replay = Replay::new(&trace);
            assert_eq!((replay.n_experts_in_all(), replay.min_slots()), (128, 8));
            let row = replay.simulate(Policy::default(), slots);
            for (part, tally, stats) in [("prompts", row.prompt, counted[0]), ("tokens", row.generated, counted[1])] {
                let Tally { lookups, hits, .. } = tally;
                assert_eq!((lookups, hits), (stats.lookups, stats.hits), "{part}, {layout:?}, {slots} slots");
            }
            let tokens = (row.prompt.tokens, row.generated.tokens);
            assert_eq!(tokens, ((long.ids.len() + short.ids.len()) as u64, 48));
        }
    }
}

/// Tokens of several conversations that are made together are no prompt, neither for the store nor for a replay.
#[test]
fn tokens_of_several_conversations_are_replayed_as_made() {
    let goldens = common::goldens();
    let golden = goldens.iter().find(|golden| golden.name == "long_mixed").expect("a golden");
    let texts = [&golden.ids[..20], &golden.ids[30..50], &golden.ids[60..80]];
    for slots in [8, 13, 24, 50, 127] {
        let options = LoadOptions { threads: 2, slots: Some(slots), guess: false, ..LoadOptions::default() };
        let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
        let mut sequences = texts.map(|_| engine.sequence());
        let mut workspace = engine.workspace().expect("a workspace");
        let mut trace = recording(&engine);
        let mut counted = Vec::new();
        for (kind, tokens) in [(BatchKind::Prompt, 0..12), (BatchKind::Decode, 12..20)] {
            let before = engine.store_stats();
            // A prompt goes in as one batch, what is made goes token by token.
            let steps = if kind == BatchKind::Prompt { vec![tokens] } else { tokens.map(|at| at..at + 1).collect() };
            for step in steps {
                let mut batch = Batch::new(kind);
                for (n, text) in texts.iter().enumerate() {
                    text[step.clone()].iter().for_each(|&token| batch.push(n, token));
                }
                let mut all: Vec<_> = sequences.iter_mut().collect();
                engine.forward(&batch, &mut all, &mut workspace, &mut trace).expect("a forward pass");
            }
            counted.push(engine.store_stats().since(&before));
        }
        let replay = Replay::new(&RoutingTrace::read(&trace.writer.finish().expect("written")[..]).expect("a trace"));
        let row = replay.simulate(Policy::default(), slots);
        for (tally, stats) in [row.prompt, row.generated].iter().zip(&counted) {
            assert_eq!((tally.lookups, tally.hits), (stats.lookups, stats.hits), "{slots} slots");
        }
        assert_eq!((row.prompt.tokens, row.generated.tokens), (36, 24));
        assert!(counted[1].evictions > 0 || slots > 50, "{slots} slots: {:?}", counted[1]);
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The program end to end: what `run` counted under a budget is what `cache-sim` says for its policy with as many slots.
#[test]
fn cache_sim_says_what_run_counted() {
    let folder = tempdir().expect("a folder");
    let trace = folder.path().join("trace.txt");
    fs::write(&trace, "# routing n_layers=1 of an earlier run").expect("written");
    let story = ["run", "tiny", "-p", "Tell me a story.", "--temp", "0", "-n", "40", "--record-routing", arg(&trace)];
    let free = run(story);
    assert!(free.stderr.contains("trace.txt: routing of "), "{}", free.stderr);
    let resident = fs::read_to_string(&trace).expect("a trace");
    // So little that experts come and go.
    let little = short_of_memory("tiny");
    let little: Vec<&str> = little.iter().map(String::as_str).collect();
    let ran = run([&story[..], &little[..], &["--no-guess", "--json", "-q"]].concat());
    assert_eq!(ran.stderr, "");
    let experts = json(&ran.ok())["stats"]["experts"].clone();
    assert!(experts["generation"]["evictions"].as_u64().expect("a number") > 0, "{experts}");
    let slots = experts["slots"].to_string();
    let streamed = fs::read_to_string(&trace).expect("a trace");
    let rows = |text: &str| text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(rows(&streamed), rows(&resident), "memory changes no choice");
    assert!(streamed.starts_with("# routing n_layers=8 n_experts=16 expert_bytes="), "{streamed}");
    assert_eq!(names(folder.path()), ["trace.txt"]);

    let object = json(&run(["cache-sim", arg(&trace), "--slots", &slots, "--json"]).ok());
    assert_eq!(object["sizes"][0]["policies"].as_array().expect("policies").len(), 3);
    let policies = object["sizes"][0]["policies"].as_array().expect("policies");
    let own = policies.iter().find(|row| row["policy"] == Policy::default().name()).expect("the store's own policy");
    for part in ["prompt", "generation"] {
        for key in ["hits", "misses"] {
            assert_eq!(own[part][key], experts[part][key], "{part} {key}");
        }
    }

    // Sizes as budgets of the whole process: more memory, no fewer hits; and what --memory says can be asked for again.
    let object = json(&run(["cache-sim", arg(&trace), "--slots", "8,60,128", "--json"]).ok());
    let hits = |size: usize| object["sizes"][size]["policies"][0]["generation"]["hits"].as_u64().expect("a number");
    assert!(hits(0) < hits(1) && hits(1) <= hits(2));
    let budgets: Vec<String> = (0..3).map(|i| object["sizes"][i]["memory_bytes"].to_string()).collect();
    let again = json(&run(["cache-sim", arg(&trace), "--memory", &budgets.join(","), "--json"]).ok());
    assert_eq!(again["sizes"], object["sizes"]);

    let table = run(["cache-sim", arg(&trace)]).ok();
    for part in ["generation: ", "prompt: ", "| slots ", "| --memory ", "next-use |", "belady |", "| 128 "] {
        assert!(table.contains(part), "{table}");
    }
}

#[test]
fn bench_records_every_repetition() {
    let folder = tempdir().expect("a folder");
    let trace = folder.path().join("t");
    run(["bench", "-p", "8", "-n", "4", "-d", "2", "-r", "2", "--record-routing", arg(&trace)]).ok();
    let object = json(&run(["cache-sim", arg(&trace), "--json"]).ok());
    // One more than asked for, each with the tokens that come before.
    assert_eq!(object["prompt_tokens"], 3 * (2 + 8 + 3));
    assert_eq!(object["generation_tokens"], 3 * 4);
}

#[test]
fn a_trace_that_cannot_be_written_is_one_error_and_leaves_nothing() {
    let folder = tempdir().expect("a folder");
    for path in [folder.path().join("no/such/trace"), folder.path().to_owned(), "/dev/null".into()] {
        for command in [["run", "-p", "x"], ["bench", "-n", "1"]] {
            run(command.into_iter().chain(["--record-routing", arg(&path)])).fails(&["cannot write", arg(&path)]);
        }
    }
    // Work that fails leaves what was there.
    let trace = folder.path().join("trace");
    fs::write(&trace, "# routing n_layers=1 of mine").expect("written");
    run(["run", "-p", "x", "--ctx", "2", "--record-routing", arg(&trace)]).fails(&["context"]);
    assert_eq!(fs::read(&trace).expect("read"), b"# routing n_layers=1 of mine");
    assert_eq!(names(folder.path()), ["trace"]);
}

/// A file that may not grow as large as the trace stands for a full disk.
#[test]
fn a_trace_that_outgrows_the_disk_is_one_error_and_leaves_nothing() {
    let folder = tempdir().expect("a folder");
    let trace = folder.path().join("trace");
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 4; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_st-tool")]);
    limited.args(["run", "tiny", "-p", "Tell me a story.", "--temp", "0", "-n", "100", "--json"]);
    let failed = Run::of(limited.args(["--record-routing", arg(&trace)]));
    failed.fails(&["the routing could not be recorded", "cannot write", arg(&trace), "too large"]);
    assert_eq!(names(folder.path()), [""; 0]);
}

/// Fails once, in the first layer of the second batch; the next look is at the first layer again.
struct FailOnce {
    layers: usize,
}

impl Observer for FailOnce {
    fn routing(&mut self, layer: usize, _: &Batch, routing: &Routing) -> io::Result<()> {
        assert_eq!((layer, routing.n_used()), (self.layers % 8, 4));
        self.layers += 1;
        if self.layers == 9 {
            self.layers = 0;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

/// Whoever looks at the routing may fail; the conversation goes on as if that batch had never been.
#[test]
fn a_look_at_the_routing_that_fails_ends_the_run_and_not_the_conversation() {
    let golden = &common::goldens()[0];
    let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &LoadOptions::default());
    let mut session = Session::new(&engine).expect("a session");
    let mut watch = FailOnce { layers: 0 };
    let (first, rest) = golden.ids.split_at(golden.ids.len() / 2);
    session.run(first, &mut watch).expect("a forward pass");
    assert!(matches!(session.run(rest, &mut watch), Err(ModelError::Observer { what: "routing", .. })));
    assert_eq!(session.tokens(), first);
    session.run(rest, &mut watch).expect("a forward pass");
    let expected = common::all_logits(&engine, &golden.ids);
    assert!(expected.ends_with(session.logits()));
}

#[test]
fn what_is_no_trace_is_one_error() {
    let folder = tempdir().expect("a folder");
    let path = folder.path().join("trace");
    let sim = |content: &[u8], options: &[&str]| {
        fs::write(&path, content).expect("written");
        run([&["cache-sim", arg(&path)], options].concat())
    };
    const HEADER: &str = "# routing n_layers=2 n_experts=4 expert_bytes=4096 other_bytes=1000000\n";
    for (content, problem) in [
        ("", "is empty"),
        (HEADER, "is empty"),
        ("Once upon a time\n", "line 1 of the routing trace"),
        ("GGUF\u{3}\0\0\0", "line 1 of the routing trace"),
        ("# routing n_layers=2\n0 0 1\n", "line 1 of the routing trace is not"),
        (
            "# routing n_layers=4000000000 n_experts=4000000000 expert_bytes=1\n0 0 1\n",
            "line 1 of the routing trace is not",
        ),
        (&format!("{HEADER}0 0 1,2\n0 1 1"), "line 3 of the routing trace is cut off"),
        (&format!("{HEADER}0 2 1\n"), "line 2 of the routing trace names a layer"),
        (&format!("{HEADER}0 0 4\n"), "line 2 of the routing trace names an expert"),
        (&format!("{HEADER}0 0 1,1\n"), "names an expert twice"),
        (&format!("{HEADER}0 0 99999999999999999999\n"), "has no valid list of experts"),
    ] {
        assert!(sim(content.as_bytes(), &[]).fails(&[arg(&path), problem]).hint().contains("--record-routing"));
    }
    sim(b"\xff\xfe\n", &[]).fails(&["is not text"]);
    run(["cache-sim", arg(folder.path())]).fails(&["cannot read"]);
    run(["cache-sim", "/nonexistent/trace"]).fails(&["cannot read /nonexistent/trace"]);

    let good = format!("{HEADER}0 0 1,2\n0 1 1,3\n1 0 3,0\n1 1 1,3\n");
    assert!(sim(good.as_bytes(), &[]).ok().contains("generation: 2 tokens"));
    assert!(sim(good.as_bytes(), &["--slots", "3"]).fails(&["too small"]).hint().contains("--slots 4"));
    let least = sim(good.as_bytes(), &["--memory", "8MiB"]).fails(&["leave no room"]);
    let size = least.hint().split_whitespace().nth(1).expect("a size").to_owned();
    sim(good.as_bytes(), &["--memory", &size]).ok();
    // Sizes without bound, and a header that states impossible ones, cost nothing.
    sim(good.as_bytes(), &["--slots", "18446744073709551615"]).ok();
    sim(good.replace("=4096", "=18446744073709551615").as_bytes(), &[]).ok();
    sim(good.replace("=4", "=65536").as_bytes(), &[]).ok();
    let bare = "0 0 1,2\n0 1 1,3\n1 0 3,0\n1 1 1,3\n";
    assert!(!sim(bare.as_bytes(), &[]).ok().contains("MiB"));
    sim(bare.as_bytes(), &["--memory", "1GiB"]).fails(&["does not say how much memory"]);
    run(["cache-sim", "x", "--slots", "0"]).misused("at least 1");
    run(["cache-sim", "x", "--slots", "1", "--memory", "1GiB"]).misused("cannot be used with");
    run(["cache-sim"]).misused("FILE");
    assert!(Path::new(&path).exists());
}
