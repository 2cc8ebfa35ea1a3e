//! `--memory` is a promise about the whole process, checked from outside: the peak of its resident memory as the system
//! counts it.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;
use st_bench::synth::gguf::write_gguf;
use st_bench::synth::mix::Mix;
use st_bench::synth::recipe::{Recipe, Statistics};
use st_bench::synth::shape::Shape;
use st_gguf::{GgmlType, Layout, ModelShape};
use st_model::{Engine, LoadOptions, ModelError, Session};
use tempfile::tempdir;

use crate::common::repo;
use crate::program::{Run, arg, program, run};

const MIB: u64 = 1 << 20;

/// A model whose experts take far more than everything else: 40 MiB of about 45.
fn write_model(mix: &Mix, layout: Layout, path: &Path) {
    let model = ModelShape {
        n_layers: 6,
        n_embd: 256,
        n_heads: 2,
        n_kv_heads: 1,
        n_experts: 32,
        n_ff: 512,
        n_vocab: 4000,
        context_length: 2048,
        ..ModelShape::published_4b()
    };
    let mut shape = Shape::of("small", model);
    shape.set_period(0);
    let statistics = Statistics { sparsity: 0.65, early_sparsity: 0.9, popular_share: 0.6, repeat_share: 0.5, seed: 1 };
    let recipe = Recipe::new(shape, &statistics).expect("the shape is possible");
    write_gguf(&recipe, mix, layout, path, false, &|_| ()).expect("the model can be written");
}

/// Runs the program and looks at it until it ends: what it gave, and the peak of its resident memory in bytes.
fn watched(args: &[&str]) -> (Run, u64) {
    let mut command = program();
    let mut child =
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    // The system's own high-water mark, so nothing between two looks is missed. What it writes fits its pipes.
    while child.try_wait().expect("it can be waited for").is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) * 1024);
        sleep(Duration::from_millis(2));
    }
    (Run::checked(child.wait_with_output().expect("it has ended")), peak)
}

/// A prompt of several batches and some tokens after it stay within every budget that is not refused.
fn stays_within(model: &str, extra_mib: &[u64]) {
    let ids: Vec<String> = (0..700).map(|i| (i * 7919 % 2000).to_string()).collect();
    let ids = ids.join(",");
    let within = |memory: &str| {
        // The text fills the context, so that experts get nothing of its memory in the end.
        ["run", model, "--token-ids", &ids, "-n", "24", "--ctx", "724", "--temp", "0", "--json", "-q"]
            .into_iter()
            .chain(["--memory", memory])
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let refused = run(within("1MiB")).fails(&["not enough"]);
    let least = refused.hint().split_whitespace().nth(1).expect("a size").trim_end_matches("MiB").to_owned();
    let least: u64 = least.parse().expect("a number");
    let mut evictions = Vec::new();
    for extra in extra_mib {
        let args = within(&format!("{}MiB", least + extra));
        let (ran, peak) = watched(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let stats: Value = serde_json::from_str::<Value>(&ran.ok()).expect("JSON")["stats"].clone();
        let own = stats["peak_resident_bytes"].as_u64().expect("bytes");
        let budget = (least + extra) * MIB;
        assert!(peak <= budget && own <= budget, "{model}: {peak} and {own} bytes of {budget}");
        // It was looked at until near its end.
        assert!(peak >= own / 10 * 9, "{model}: {peak} of {own}");
        let of = |part: &str| stats["experts"][part]["evictions"].as_u64().expect("a number");
        evictions.push(of("prompt") + of("generation"));
    }
    assert!(evictions[0] > 0, "the smallest budget holds every expert");
}

#[test]
fn the_tiny_model_stays_within_its_budget() {
    let folder = tempdir().expect("a folder");
    let offload = folder.path().join("o.gguf");
    run(["layout", arg(&repo("models/tiny/tiny-q4_0.gguf")), arg(&offload), "--to", "offload"]).ok();
    for model in ["tiny", arg(&repo("models/tiny/tiny-q4_0.gguf")), arg(&offload)] {
        stays_within(model, &[0, 1, 2, 16]);
    }
}

#[test]
fn a_model_of_many_experts_stays_within_its_budget() {
    let folder = tempdir().expect("a folder");
    for layout in [Layout::Gguf, Layout::Offload] {
        let path = folder.path().join(layout.name());
        let path = path.with_extension("gguf");
        write_model(&Mix::pure(GgmlType::Q4_0), layout, &path);
        stays_within(arg(&path), &[0, 5, 12, 25, 60]);
        // Layers whose experts differ in size: a slot holds the largest.
        let mixed = path.with_extension("mixed.gguf");
        write_model(&Mix::named("q4_k_m").expect("a mix"), layout, &mixed);
        stays_within(arg(&mixed), &[0, 12]);
    }
}

/// A context that is not used yet holds experts; a text that grows takes their place and changes no bit.
#[test]
fn an_unused_context_is_lent_to_experts_and_taken_back() {
    let folder = tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    write_model(&Mix::pure(GgmlType::Q4_0), Layout::Gguf, &path);
    let options = LoadOptions { threads: 2, ctx: Some(2048), ..LoadOptions::default() };
    let resident = Engine::open(&path, &options).expect("the model");
    // What the process takes moves while other tests run in it.
    let streamed = (0..50).find_map(|_| {
        let within = |memory| Engine::open(&path, &LoadOptions { memory: Some(memory), ..options.clone() });
        let Err(ModelError::Budget { minimum, .. }) = within(MIB) else { panic!("1 MiB is too little") };
        within(minimum + 8 * MIB).ok().filter(|engine| engine.plan().lent > 8)
    });
    let streamed = streamed.expect("a budget that holds some of the experts");
    let all = streamed.plan().n_slots() + streamed.plan().lent;
    assert_eq!(streamed.expert_slots(), all);
    let ids: Vec<u32> = (0..1600).map(|i| i * 7919 % 2000).collect();
    let [mut own, mut lent] = [&resident, &streamed].map(|engine| Session::new(engine).expect("a session"));
    let mut before = all;
    for part in ids.chunks(400) {
        for session in [&mut own, &mut lent] {
            session.run(part, &mut ()).expect("it runs");
            for _ in 0..3 {
                let next = session.logits().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).expect("logits").0;
                session.run(&[next as u32], &mut ()).expect("it runs");
            }
        }
        assert!(own.logits() == lent.logits());
        assert!(streamed.expert_slots() < before, "the text took no memory");
        before = streamed.expert_slots();
    }
    assert!(before >= streamed.plan().n_slots());
    drop(lent);
    assert_eq!(streamed.expert_slots(), all);
}

/// The promise holds with several conversations at once, each with a text of several batches.
#[test]
fn many_conversations_stay_within_one_budget() {
    let folder = tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    write_model(&Mix::pure(GgmlType::Q4_0), Layout::Gguf, &path);
    let mut least_of = Vec::new();
    for n in ["1", "2", "8"] {
        let within = |memory: &str| {
            ["bench", arg(&path), "-p", "0", "-n", "24", "-d", "700", "-r", "1", "-o", "json", "-q", "--parallel", n]
                .into_iter()
                .chain(["--memory", memory])
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let refused = run(within("1MiB")).fails(&["not enough"]);
        let least = refused.hint().split_whitespace().nth(1).expect("a size").trim_end_matches("MiB").to_owned();
        let least: u64 = least.parse().expect("a number");
        for extra in [0, 6, 30] {
            let args = within(&format!("{}MiB", least + extra));
            let (ran, peak) = watched(&args.iter().map(String::as_str).collect::<Vec<_>>());
            let stats: Value = serde_json::from_str(&ran.ok()).expect("JSON");
            let own = stats["peak_resident_bytes"].as_u64().expect("bytes");
            let budget = (least + extra) * MIB;
            assert!(peak <= budget && own <= budget, "{n} at {extra}: {peak} and {own} bytes of {budget}");
            let evictions = stats["tests"].as_array().expect("tests")[0]["experts"]["evictions"].as_u64();
            assert!(extra > 0 || evictions > Some(0), "{n}: the smallest budget holds every expert");
        }
        least_of.push(least);
    }
    assert!(least_of.is_sorted() && least_of[0] < least_of[2], "{least_of:?}");
}
