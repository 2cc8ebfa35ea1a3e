//! A cache that is filled before the first token: the same tokens, fewer reads for them, and no trust in lists of others.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use st_convert::{Layout, WeightType};
use st_model::{Hot, LoadOptions};

use crate::common;
use crate::program::{Run, program};

#[test]
fn a_warm_start_changes_no_token_and_finds_its_experts() {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    for layout in [Layout::Gguf, Layout::Offload] {
        let load = |hot: Option<&Hot>| {
            let hot = hot.cloned().map(Arc::new);
            let options = LoadOptions { threads: 2, slots: Some(28), hot, ..LoadOptions::default() };
            common::engine(golden.gguf(WeightType::Q4_0, layout), &options)
        };
        let cold = load(None);
        let expected = common::greedy(&cold, &golden.ids, 8, 24);
        let hot = cold.hot().expect("experts were used");
        assert_eq!(Hot::parse(hot.to_json().as_bytes()).as_ref(), Ok(&hot));
        let warm = load(Some(&hot));
        assert_eq!(common::greedy(&warm, &golden.ids, 8, 24), expected);
        // The experts that a model with a few slots is warmed with are read once and not for a token.
        let hits = |engine: &st_model::Engine| engine.store_stats().hits;
        assert!(hits(&warm) > hits(&cold), "{} {}", hits(&warm), hits(&cold));
        // Another model's list, and one of another shape, do nothing.
        let other = Hot::new("0123456789ab", vec![vec![1; 8]; 4]);
        let short = Hot::new(cold.fingerprint(), vec![vec![1; 2]; 2]);
        for list in [other, short] {
            let engine = load(Some(&list));
            assert_eq!(engine.store_stats().loads, 0);
            assert_eq!(common::greedy(&engine, &golden.ids, 8, 24), expected);
        }
        // Where every expert has a slot there is nothing to choose.
        let options = LoadOptions { hot: Some(Arc::new(hot)), ..LoadOptions::default() };
        let resident = common::engine(golden.gguf(WeightType::Q4_0, layout), &options);
        assert!(resident.hot().is_none() && resident.store_stats().loads == 0);
    }
}

#[test]
fn a_run_leaves_the_next_what_it_has_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    fs::copy(common::converted(&golden.checkpoint, WeightType::Q4_0, Layout::Gguf), &model).expect("copied");
    let home = folder.path().join("home");
    let run = |with: &[&str]| -> Value {
        let mut command = program();
        command.env("ST_TOOL_HOME", &home).arg("run").arg(&model).args(["-p", "Tell me a story.", "-n", "12"]);
        command.args(["--seed", "1", "--json", "--memory", &smallest(&model)]).args(with);
        serde_json::from_str(&Run::of(&mut command).ok()).expect("JSON")
    };
    let lists = || -> Vec<_> {
        let folder = fs::read_dir(home.join("hot")).into_iter().flatten().flatten();
        folder.map(|entry| entry.path()).collect()
    };
    let cold = run(&["--no-hot"]);
    let [list] = &lists()[..] else { panic!("one list") };
    let hot = Hot::parse(&fs::read(list).expect("read")).expect("a list");
    let warm = run(&[]);
    assert_eq!(warm["ids"], cold["ids"]);
    // Whatever lies there instead is not believed, and replaced where it is a list.
    fs::write(list, "{\"hot_experts\":1,").expect("written");
    assert_eq!(run(&[])["ids"], cold["ids"]);
    assert!(Hot::parse(&fs::read(list).expect("read")).is_ok());
    fs::write(list, "mine").expect("written");
    assert_eq!(run(&[])["ids"], cold["ids"]);
    assert_eq!(fs::read(list).expect("read"), b"mine");
    // One beside the model comes first.
    fs::write(model.with_extension("hot.json"), hot.to_json()).expect("written");
    assert_eq!(run(&[])["ids"], cold["ids"]);
}

#[test]
fn a_profile_leaves_a_list_beside_the_model_that_it_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, text) = (folder.path().join("model.gguf"), folder.path().join("text.txt"));
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    fs::copy(common::converted(&golden.checkpoint, WeightType::Q4_0, Layout::Gguf), &model).expect("copied");
    fs::write(&text, "Once upon a time there was a cat. ".repeat(5)).expect("written");
    let profile = |hot: &Path| {
        let mut command = program();
        command.arg("profile").arg(&model).arg("-f").arg(&text).arg("-o").arg(folder.path().join("out"));
        Run::of(command.arg("--write-hot").arg(hot))
    };
    profile(&model).ok();
    let hot = Hot::parse(&fs::read(model.with_extension("hot.json")).expect("written")).expect("a list");
    let engine = common::engine(
        st_gguf::GgufFile::open(&model).expect("a file"),
        &LoadOptions { threads: 1, ..LoadOptions::default() },
    );
    assert!(hot.is_of(&engine.fingerprint(), engine.config().n_layers, engine.config().n_experts));
    assert!(!hot.order().is_empty());
    // What lies there and is no list stays, and so does everything where there is no model.
    fs::write(model.with_extension("hot.json"), "mine").expect("written");
    assert!(profile(&model).stderr.starts_with("error: "));
    assert_eq!(fs::read(model.with_extension("hot.json")).expect("read"), b"mine");
    assert!(profile(&text).stderr.starts_with("error: "));
    let other = common::goldens().into_iter().find(|other| other.name.starts_with("mini-21b")).expect("a golden");
    let other = common::converted(&other.checkpoint, WeightType::Q4_0, Layout::Gguf);
    assert!(profile(&other).stderr.contains("hint: --write-hot names"));
}

/// The smallest budget that a model runs in, as the refusal names it.
fn smallest(model: &Path) -> String {
    let mut command = program();
    let refused = Run::of(command.arg("run").arg(model).args(["-p", "x", "--memory", "1MiB"])).stderr;
    let hint = refused.lines().find(|line| line.starts_with("hint: ")).expect("a hint");
    let word = hint.split_whitespace().find(|word| word.ends_with("iB")).expect("a size");
    word.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}
