//! Plans and forecasts: what they say holds, as far as it is not a matter of time.

use std::fs;
use std::process::Command;

use serde_json::Value;
use st_convert::{Layout, WeightType};
use tempfile::{TempDir, tempdir};

use crate::common::{converted, repo};
use crate::hub::server::{RepoFile, Server, Settings};
use crate::program::{Run, arg, little_memory, names, program, run};

/// A place to keep what is measured.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempdir().expect("a folder"))
    }

    fn program(&self) -> Command {
        let mut command = program();
        command.env("ST_TOOL_HOME", self.0.path().join("st"));
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::of(self.program().args(args))
    }

    fn json(&self, args: &[&str]) -> Value {
        let said = self.run(args).ok();
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn a_plan_holds_together_and_more_memory_never_makes_it_slower() {
    let home = Home::new();
    let model = converted(&repo("models/tiny/checkpoint"), WeightType::Q4_0, Layout::Gguf);
    let plan = home.json(&["plan", "-q", arg(&model), "--json"]);
    let budgets = plan["budgets"].as_array().expect("a ladder");
    assert!(budgets.len() >= 2, "{plan}");
    let mut before = [0.0; 3];
    for rung in budgets {
        if let Some(memory) = rung["memory"].as_f64() {
            assert!(number(&rung["plan"]["total"]) <= memory, "{rung}");
            assert!(memory >= number(&plan["smallest_memory"]));
        }
        let parts: f64 =
            ["weights", "keys_and_values", "buffers", "template", "program", "beside", "experts", "reserve"]
                .iter()
                .map(|part| number(&rung["plan"][part]))
                .sum();
        assert_eq!(parts, number(&rung["plan"]["total"]), "{rung}");
        let forecast = &rung["forecast"];
        for kind in ["prompt_tokens_per_second", "generation_tokens_per_second"] {
            let [low, expected, high] = ["low", "expected", "high"].map(|end| number(&forecast[kind][end]));
            assert!(0.0 < low && low <= expected && expected <= high, "{kind}: {forecast}");
        }
        let now = [
            number(&forecast["hit_rate"]),
            number(&forecast["generation_tokens_per_second"]["expected"]),
            number(&rung["slots"]),
        ];
        assert!(before.iter().zip(&now).all(|(before, now)| before <= now), "{before:?} -> {now:?}");
        before = now;
    }
    assert_eq!(number(&budgets.last().expect("the last")["forecast"]["experts_read_per_token"]), 0.0);
    assert!(!plan["advice"].as_str().expect("advice").is_empty());
    // What was measured is kept, and nothing else.
    assert_eq!(names(&home.0.path().join("st")), ["machine.json"]);
    let text = home.run(&["plan", arg(&model), "--memory", "1GiB", "2GiB"]).ok();
    for part in ["memory:", "measured:", "routing:", "| --memory", "1.00 GiB", "2.00 GiB"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn the_smallest_budget_is_one_that_works() {
    let home = Home::new();
    let plan = home.json(&["plan", "-q", "tiny", "--json", "--ctx", "256"]);
    // What the program itself takes differs a little from run to run.
    let least = (number(&plan["smallest_memory"]) as u64 + (2 << 20)).to_string();
    run(["run", "tiny", "-q", "-p", "Hi", "-n", "2", "--ctx", "256", "--memory", &least]).ok();
    let too_little = (number(&plan["smallest_memory"]) as u64 - (6 << 20)).to_string();
    run(["run", "tiny", "-q", "-p", "Hi", "-n", "2", "--ctx", "256", "--memory", &too_little])
        .fails(&["needs at least"]);
    home.run(&["plan", "-q", "tiny", "--memory", "1MiB"]).fails(&["needs at least"]);
    home.run(&["plan", "-q", "tiny", "--ctx", "1000000"]).fails(&["context"]);
}

/// The forecast of what is read, beside what is read: the bundled model's routing is what forecasts are made of.
#[test]
fn the_forecast_of_misses_is_near_the_fact() {
    let home = Home::new();
    home.run(&["plan", "-q", "tiny"]).ok();
    let little: u64 = little_memory("tiny").parse().expect("a number");
    for more in [1u64 << 20, 2 << 20, 3 << 20] {
        let memory = (little + more).to_string();
        let answer = home.json(&[
            "run",
            "tiny",
            "-q",
            "-p",
            "Tell me a story about a dog and a river.",
            "-n",
            "300",
            "--seed",
            "11",
            "--memory",
            &memory,
            "--no-guess",
            "--json",
        ]);
        let stats = &answer["stats"];
        let tokens = number(&stats["generated_tokens"]);
        let [forecast, fact] =
            [&stats["forecast"]["hit_rate"], &stats["experts"]["generation"]["hit_rate"]].map(number);
        assert!(
            tokens > 30.0 && (forecast - fact).abs() < 0.12,
            "{forecast} was forecast, {fact} came in {memory} bytes"
        );
        let [forecast, fact] =
            [&stats["forecast"]["bytes_read_per_token"], &stats["experts"]["generation"]["bytes_read_per_token"]]
                .map(number);
        // Each miss is a record of whole pages.
        assert!((forecast - fact).abs() < 0.15 * 32.0 * 45e3, "{forecast} bytes were forecast, {fact} came");
    }
}

/// A trace that is given is what the forecast is made by, and says so.
#[test]
fn a_recorded_trace_is_the_forecasts_routing() {
    let home = Home::new();
    let folder = tempdir().expect("a folder");
    let trace = folder.path().join("trace");
    run(["run", "tiny", "-q", "-p", "Hello.", "-n", "60", "--record-routing", arg(&trace)]).ok();
    let plan = home.json(&["plan", "-q", "tiny", "--routing", arg(&trace), "--json"]);
    assert_eq!(plan["routing"], "as recorded");
    let simulated = home.json(&["cache-sim", arg(&trace), "--json"]);
    let all = simulated["sizes"].as_array().and_then(|sizes| sizes.last()).expect("sizes");
    assert_eq!(all["slots"], plan["budgets"].as_array().and_then(|all| all.last()).expect("rungs")["slots"]);
    home.run(&["plan", "tiny", "--routing", arg(&repo("README.md"))]).fails(&["routing trace"]);
}

#[test]
fn a_model_that_is_not_here_is_planned_for_by_its_header() {
    let home = Home::new();
    let tiny = repo("models/tiny/checkpoint");
    let gguf = fs::read(converted(&tiny, WeightType::Q4_0, Layout::Gguf)).expect("read");
    let serve = |name: &str, files: Vec<(String, RepoFile)>| {
        Server::start(Settings { repo: name.to_owned(), files: files.into_iter().collect(), ..Settings::default() })
    };
    let ask = |server: &Server| {
        let mut command = home.program();
        command
            .env("HF_HUB_OFFLINE", "0")
            .env("HF_ENDPOINT", server.endpoint())
            .env("HF_HOME", home.0.path().join("hf"));
        let said = Run::of(command.args(["plan", "-q", "4b", "--json"])).ok();
        serde_json::from_str::<Value>(&said).expect("JSON")
    };
    let here = home.json(&["plan", "-q", "tiny", "--json"]);
    let weights = |plan: &Value| number(&plan["budgets"][0]["plan"]["weights"]);
    let published = serve(
        "Tiiny/SmallThinker-4BA0.6B-Instruct-GGUF",
        vec![("M.Q4_0.gguf".to_owned(), RepoFile::large(gguf.clone()))],
    );
    let plan = ask(&published);
    assert_eq!((number(&plan["fetch_bytes"]), weights(&plan)), (gguf.len() as f64, weights(&here)), "{plan}");
    assert!(plan["disk_free_bytes"].is_u64());
    let files = names(&tiny).into_iter().map(|name| {
        let content = fs::read(tiny.join(&name)).expect("read");
        let file = if name.ends_with(".safetensors") { RepoFile::large(content) } else { RepoFile::small(content) };
        (name, file)
    });
    let checkpoint = serve("Tiiny/SmallThinker-4BA0.6B-Instruct", files.collect());
    let plan = ask(&checkpoint);
    assert_eq!(weights(&plan), weights(&here), "{plan}");
    assert!(plan["source"].as_str().expect("text").contains("converted to Q4_0 while it is fetched"));
    assert!(!home.0.path().join("hf").exists(), "something was fetched and kept");
    // A folder is planned for by its config.json.
    assert_eq!(weights(&home.json(&["plan", "-q", arg(&tiny), "--json"])), weights(&here));
}
