//! From the hub to an answer, as a person types it: the bundled checkpoint served as `4b` by a hub on loopback.

use std::fs;
use std::process::Command;

use tempfile::{TempDir, tempdir};

use crate::common::repo;
use crate::program::{Run, names, program};
use server::{Fault, RepoFile, Server, Settings};

#[path = "../converters/tests/hub/server.rs"]
#[allow(dead_code, reason = "the hub's own tests use more of it")]
mod server;

const REPO: &str = "PowerInfer/SmallThinker-4BA0.6B-Instruct";

/// A hub, and a folder that is home and place of work.
struct World {
    server: Server,
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        let checkpoint = repo("models/tiny/checkpoint");
        let files = names(&checkpoint).into_iter().map(|name| {
            let content = fs::read(checkpoint.join(&name)).expect("read");
            let file = if name.ends_with(".safetensors") { RepoFile::large(content) } else { RepoFile::small(content) };
            (name, file)
        });
        let settings = Settings { repo: REPO.to_owned(), files: files.collect(), ..Settings::default() };
        Self { server: Server::start(settings), folder: tempdir().expect("a folder") }
    }

    fn program(&self) -> Command {
        let mut command = program();
        command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", self.server.endpoint()).current_dir(self.folder.path());
        command.env("HF_HOME", self.folder.path().join("hf"));
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::of(self.program().args(args))
    }
}

#[test]
fn download_quantize_run() {
    let world = World::new();
    let listed = world.run(&["download", "4b", "--dry-run"]).ok();
    assert!(listed.contains("model.safetensors") && listed.contains("12.1 MiB"), "{listed}");
    assert_eq!(names(world.folder.path()), [""; 0], "a dry run writes nothing");

    let fetched = world.run(&["download", "4b"]);
    assert!(fetched.stderr.contains("model.safetensors: 12.1 MiB"), "{}", fetched.stderr);
    let folder = fetched.ok();
    let folder = folder.strip_suffix('\n').expect("one line");
    assert!(folder.contains("/snapshots/"), "{folder}");
    assert!(names(folder.as_ref()).contains(&"config.json".to_owned()));
    let again = world.run(&["download", "4b", "-q"]);
    assert_eq!((again.stdout.trim_end(), again.stderr.as_str()), (folder, ""));

    assert_eq!(world.run(&["quantize", "4b", "--q4_0"]).ok(), "");
    assert_eq!(names(world.folder.path()), ["SmallThinker-4BA0.6B-Instruct-q4_0.gguf", "hf"]);
    let answer = world.run(&["run", "4b", "-p", "What is 27 + 45?", "--temp", "0"]);
    assert!(answer.stderr.contains("SmallThinker-4BA0.6B-Instruct-q4_0.gguf"), "{}", answer.stderr);
    assert_eq!(answer.ok(), "27 + 45 = 72\n");
}

#[test]
fn quantize_fetches_what_it_needs_but_not_for_a_dry_run_or_a_refused_output() {
    let world = World::new();
    world.run(&["quantize", "4b", "--q4_0", "--dry-run"]).fails(&["not downloaded"]).hint();
    fs::write(world.folder.path().join("mine.gguf"), "mine").expect("written");
    world.run(&["quantize", "4b", "--q4_0", "-o", "mine.gguf"]).fails(&["exists"]);
    assert_eq!(names(world.folder.path()), ["mine.gguf"]);
    world.run(&["quantize", "4b", "--q4_0", "-q", "-o", "new.gguf"]).ok();
    assert_eq!(names(world.folder.path()), ["hf", "mine.gguf", "new.gguf"]);
}

#[test]
fn what_the_hub_refuses_is_one_error_with_advice() {
    let world = World::new();
    world.run(&["download", "owner/unknown"]).fails(&["owner/unknown"]).hint();
    world.run(&["download", "4b", "--revision", "nosuch"]).fails(&["nosuch"]).hint();
    world.run(&["download", "4b", "--include", "*.nosuch"]).fails(&["*.nosuch"]).hint();
    world.server.spoil("config.json", Fault::status(403));
    world.run(&["download", "4b", "-q"]).fails(&["403"]).hint();
    world.server.change(|settings| settings.token = Some("secret".to_owned()));
    world.run(&["download", "4b"]).fails(&[]).hint();
    Run::of(world.program().env("HF_TOKEN", "secret").args(["download", "4b", "-q"])).ok();
    Run::of(world.program().args(["download", "4b", "-q", "--token", "secret"])).ok();
}

#[test]
fn plain_files_go_where_they_are_wanted() {
    let world = World::new();
    let printed = world.run(&["download", "4b", "-q", "--local-dir", "plain", "--include", "*.json"]).ok();
    assert!(printed.trim_end().ends_with("plain"), "{printed}");
    let plain = names(&world.folder.path().join("plain"));
    assert!(plain.contains(&"config.json".to_owned()) && !plain.contains(&"model.safetensors".to_owned()), "{plain:?}");
}
