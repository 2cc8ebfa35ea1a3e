//! The walls between the crates: each imports what DESIGN.md says, and nothing else of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

use crate::common::repo;

type Arrows = BTreeMap<String, BTreeSet<String>>;

/// What the manifests say: dependencies of the crates themselves, not of their tests.
fn imported() -> Arrows {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let manifest = repo("Cargo.toml");
    let args = ["metadata", "--offline", "--no-deps", "--format-version", "1", "--manifest-path"];
    let output = Command::new(cargo).args(args).arg(&manifest).output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let packages = list(&metadata["packages"]);
    let ours: BTreeSet<String> = packages.iter().map(name).collect();
    let arrows = |package: &Value| {
        let normal = list(&package["dependencies"]).into_iter().filter(|dependency| dependency["kind"].is_null());
        normal.map(|dependency| name(&dependency)).filter(|dependency| ours.contains(dependency)).collect()
    };
    packages.iter().map(|package| (name(package), arrows(package))).collect()
}

/// What the map in DESIGN.md says, in lines like `st-gguf: imports st-sys`.
fn designed() -> Arrows {
    let design = std::fs::read_to_string(repo("DESIGN.md")).expect("read");
    let is_name = |word: &&str| word.starts_with("st-") && word.len() > 3;
    let words = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').filter(is_name).map(str::to_owned).collect()
    };
    let line = |line: &str| {
        let (crates, imports) = line.split_once(": imports ")?;
        let name = crates.split_whitespace().last()?.to_owned();
        // What follows a semicolon is about something else.
        Some((name, words(imports.split(';').next()?)))
    };
    design.lines().filter_map(line).collect()
}

#[test]
fn crates_import_what_the_design_says() {
    let (imported, designed) = (imported(), designed());
    for (name, imports) in &designed {
        assert_eq!(imported.get(name), Some(imports), "{name}: left are the manifests, right is DESIGN.md");
    }
    for (name, imports) in
        imported.iter().filter(|(name, imports)| !designed.contains_key(*name) && !imports.is_empty())
    {
        // The program and the workbench may import all.
        assert!(
            ["st-tool", "st-bench"].contains(&name.as_str()),
            "DESIGN.md does not say that {name} imports {imports:?}"
        );
    }
}

#[test]
fn nobody_but_the_program_pays_for_the_hub() {
    for (name, imports) in imported().iter().filter(|(name, _)| *name != "st-tool") {
        assert!(!imports.contains("st-hub"), "{name}");
    }
}
