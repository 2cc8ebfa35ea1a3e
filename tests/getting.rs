//! Models that are named and not here: their types, the store, what is asked before anything is fetched, and removing them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::Command;

use pty_process::blocking::open;
use serde_json::Value as Json;
use st_convert::{Layout, WeightType};
use tempfile::{TempDir, tempdir};

use crate::common::{converted, repo};
use crate::hub::server::{RepoFile, Server, Settings};
use crate::program::{Run, names, program};

const GGUF: &str = "Tiiny/SmallThinker-4BA0.6B-Instruct-GGUF";
const CHECKPOINT: &str = "Tiiny/SmallThinker-4BA0.6B-Instruct";
const QUESTION: [&str; 4] = ["-p", "What is 27 + 45?", "--temp", "0"];

/// A hub with one repository, and a home.
struct World {
    server: Server,
    home: TempDir,
}

impl World {
    fn new(name: &str, files: impl IntoIterator<Item = (String, RepoFile)>) -> Self {
        let settings = Settings { repo: name.to_owned(), files: files.into_iter().collect(), ..Settings::default() };
        Self { server: Server::start(settings), home: tempdir().expect("a folder") }
    }

    /// The authors' GGUF files: the bundled model in two types, and one for another engine.
    fn of_gguf() -> Self {
        let tiny = repo("models/tiny/checkpoint");
        let file = |ty| RepoFile::large(fs::read(converted(&tiny, ty, Layout::Gguf)).expect("read"));
        Self::new(
            GGUF,
            [
                ("SmallThinker-4B-A0.6B-Instruct.Q4_0.gguf".to_owned(), file(WeightType::Q4_0)),
                ("SmallThinker-4B-A0.6B-Instruct.Q8_0.gguf".to_owned(), file(WeightType::Q8_0)),
                ("SmallThinker-4B-A0.6B-Instruct.Q4_0.powerinfer.gguf".to_owned(), RepoFile::large("no model")),
                ("README.md".to_owned(), RepoFile::small("read me")),
            ],
        )
    }

    fn of_checkpoint() -> Self {
        let folder = repo("models/tiny/checkpoint");
        let files = names(&folder).into_iter().map(|name| {
            let content = fs::read(folder.join(&name)).expect("read");
            let file = if name.ends_with(".safetensors") { RepoFile::large(content) } else { RepoFile::small(content) };
            (name, file)
        });
        Self::new(CHECKPOINT, files)
    }

    fn program(&self) -> Command {
        let mut command = program();
        command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", self.server.endpoint()).current_dir(self.home.path());
        command.env("HF_HOME", self.home.path().join("hf")).env("ST_TOOL_HOME", self.home.path().join("st"));
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::of(self.program().args(args))
    }

    fn offline(&self, args: &[&str]) -> Run {
        Run::of(self.program().env("HF_HUB_OFFLINE", "1").args(args))
    }

    /// What `list` knows, by file.
    fn list(&self) -> BTreeMap<String, Json> {
        let object: Json = serde_json::from_str(&self.offline(&["list", "--json"]).ok()).expect("JSON");
        let models = object["models"].as_array().expect("a list").iter();
        models.map(|model| (model["file"].as_str().unwrap_or_default().to_owned(), model.clone())).collect()
    }
}

#[test]
fn nobody_is_asked_before_it_is_allowed() {
    let world = World::of_gguf();
    for model in ["4b", "4b:q8_0", GGUF, CHECKPOINT] {
        let refused = world.run(&[&["run", model], &QUESTION[..]].concat()).fails(&["is not here"]);
        assert!(refused.hint().contains("--yes"), "{}", refused.stderr);
    }
    assert!(world.server.log().is_empty(), "the network was used");
    assert_eq!(names(world.home.path()), [""; 0], "something was written");
}

#[test]
fn one_command_goes_from_nothing_to_an_answer() {
    let world = World::of_gguf();
    let first = world.run(&[&["run", "4b", "--yes"], &QUESTION[..]].concat());
    for part in ["Q4_0.gguf of Tiiny/", "to fetch", "free in", "memory"] {
        assert!(first.stderr.contains(part), "{}", first.stderr);
    }
    assert_eq!(first.ok(), "27 + 45 = 72\n");
    // From here on it is here, by every name.
    for model in ["4b", "4B:Q40", GGUF, "PowerInfer/SmallThinker-4BA0.6B-Instruct-GGUF:q4-0"] {
        let again = world.offline(&[&["run", model], &QUESTION[..]].concat());
        assert!(again.stderr.contains("note: ") && again.stderr.contains("Q4_0.gguf"), "{}", again.stderr);
        assert_eq!(again.ok(), "27 + 45 = 72\n", "{model}");
    }
}

#[test]
fn types_are_chosen_by_name() {
    let world = World::of_gguf();
    let listed = world.run(&["download", "4b:q8-0", "--dry-run"]).ok();
    assert!(listed.contains("Q8_0.gguf") && !listed.contains("Q4_0.gguf"), "{listed}");
    let path = world.run(&["download", "4b:q8-0", "-q"]).ok();
    assert!(path.ends_with("SmallThinker-4B-A0.6B-Instruct.Q8_0.gguf\n"), "{path}");
    assert!(world.server.ranges("SmallThinker-4B-A0.6B-Instruct.Q4_0.gguf").is_empty());
    world.offline(&[&["run", "4b:Q8_0"], &QUESTION[..]].concat()).ok();
    // What is here serves where no type is named.
    world.offline(&[&["run", "4b"], &QUESTION[..]].concat()).ok();
    world.offline(&["run", "4b:q4_0", "-p", "x"]).fails(&["4b:q4_0 is not here"]).hint();
    for args in [&["run", "4b:q5_k_m", "--yes", "-p", "x"][..], &["download", "4b:q5_k_m"]] {
        let refused = world.run(args).fails(&["q5_k_m", "Instruct.Q4_0", "Instruct.Q8_0"]);
        assert!(!refused.stderr.contains("powerinfer"), "{}", refused.stderr);
        refused.hint();
    }
    let refused = world.run(&["download", &format!("{GGUF}:q4 0")]).fails(&["q4 0"]);
    refused.hint();
    // A repository of many files does not come as a whole, unless somebody wants that.
    let path = world.run(&["download", GGUF, "-q"]).ok();
    assert!(path.ends_with("Q4_0.gguf\n"), "{path}");
    assert!(world.run(&["download", GGUF, "--include", "*.md", "-q"]).ok().contains("/snapshots/"));
}

#[test]
fn what_is_here_is_listed_and_removed() {
    let world = World::of_gguf();
    let nothing = world.run(&["list"]);
    assert!(nothing.stderr.contains("no model is here"), "{}", nothing.stderr);
    assert_eq!(nothing.ok(), "");
    world.run(&["download", "4b:q4_0", "-q"]).ok();
    world.run(&["download", "4b:q8_0", "-q"]).ok();
    let list = world.list();
    let q8_0 = &list["SmallThinker-4B-A0.6B-Instruct.Q8_0.gguf"];
    assert_eq!((q8_0["type"].as_str(), q8_0["place"].as_str()), (Some("Q8_0"), Some("hub")));
    assert!(q8_0["bytes"].as_u64() > list["SmallThinker-4B-A0.6B-Instruct.Q4_0.gguf"]["bytes"].as_u64());
    let table = world.run(&["list"]).ok();
    assert!(table.contains("hub cache") && table.contains("Q8_0") && table.contains("now"), "{table}");

    let refused = world.run(&["rm", "4b:q8_0"]).fails(&["would be removed"]);
    assert!(refused.hint().contains("--yes"));
    let blobs = |world: &World| {
        let cache = world.home.path().join("hf/hub/models--Tiiny--SmallThinker-4BA0.6B-Instruct-GGUF/blobs");
        names(&cache).len()
    };
    assert_eq!(blobs(&world), 2);
    world.run(&["rm", "4b:q8_0", "--yes"]).ok();
    assert_eq!((blobs(&world), world.list().len()), (1, 1));
    world.run(&["rm", "4b:q8_0", "--yes"]).fails(&["nothing of 4b:q8_0"]).hint();
    world.run(&["rm", "4b", "--yes"]).ok();
    assert_eq!(names(&world.home.path().join("hf/hub")).iter().filter(|name| name.starts_with("models--")).count(), 0);
    for model in ["tiny", "m.gguf"] {
        world.run(&["rm", model, "--yes"]).fails(&[]).hint();
    }
}

#[test]
fn a_checkpoint_is_converted_into_the_store() {
    let world = World::of_checkpoint();
    let first = world.run(&[&["run", "4b", "--yes"], &QUESTION[..]].concat());
    assert!(first.stderr.contains("converted to q4_0"), "{}", first.stderr);
    assert_eq!(first.ok(), "27 + 45 = 72\n");
    let list = world.list();
    let made = &list["SmallThinker-4BA0.6B-Instruct-q4_0.gguf"];
    assert_eq!(made["place"].as_str(), Some("store"));
    let path = PathBuf::from(made["path"].as_str().expect("a path"));
    assert!(path.starts_with(world.home.path().join("st")));
    let expected = converted(&repo("models/tiny/checkpoint"), WeightType::Q4_0, Layout::Gguf);
    assert!(fs::read(&path).expect("read") == fs::read(expected).expect("read"));
    assert_eq!(names(path.parent().expect("a folder")).len(), 1, "only the file is left");
    assert_eq!(world.offline(&[&["run", "4b:q4_0"], &QUESTION[..]].concat()).ok(), "27 + 45 = 72\n");
    // What was cut off is shown, and goes too.
    let partial = path.with_file_name(".SmallThinker-4BA0.6B-Instruct-f16.gguf.partial");
    fs::write(&partial, [1; 4096]).expect("written");
    assert_eq!(world.list()["SmallThinker-4BA0.6B-Instruct-f16.gguf"]["type"].as_str(), Some("not whole"));
    world.offline(&["rm", "4b", "--yes"]).ok();
    assert!(!path.exists() && !partial.exists() && world.list().is_empty());
}

#[test]
fn a_person_is_asked_once() {
    let world = World::of_gguf();
    for (answer, fetched) in [("n\n", false), ("\n", true)] {
        let (mut terminal, programs_end) = open().expect("a terminal");
        let mut command = world.program();
        command.args(["run", "4b", "-q"]).args(QUESTION);
        let mut child = pty_process::blocking::Command::from(command).spawn(programs_end).expect("it starts");
        let mut seen = Vec::new();
        let mut piece = [0; 1024];
        while !String::from_utf8_lossy(&seen).contains("[Y/n]") {
            let n = terminal.read(&mut piece).expect("it is written");
            seen.extend_from_slice(&piece[..n]);
        }
        terminal.write_all(answer.as_bytes()).expect("it is typed");
        // Reading a terminal whose other end is closed is an error.
        while let Ok(n @ 1..) = terminal.read(&mut piece) {
            seen.extend_from_slice(&piece[..n]);
        }
        let seen = String::from_utf8_lossy(&seen).into_owned();
        assert!(seen.contains("to fetch") && seen.contains("free in"), "{seen}");
        assert_eq!(child.wait().expect("it ends").success(), fetched, "{seen}");
        assert_eq!(seen.contains("27 + 45 = 72"), fetched, "{seen}");
    }
}

#[test]
fn text_becomes_ids_and_ids_text() {
    let run = |args: &[&str]| Run::of(program().args(["tokenize", "tiny"]).args(args)).ok();
    let ids = run(&["-p", "Once upon a time<|im_end|>"]);
    assert!(ids.ends_with(",2046\n") || ids.contains(','), "{ids}");
    assert_eq!(run(&["--decode", "-p", ids.trim()]), "Once upon a time<|im_end|>");
    let tokens: Json = serde_json::from_str(&run(&["--json", "-p", "Once upon"])).expect("JSON");
    let text: String = tokens["tokens"].as_array().expect("a list").iter().filter_map(|t| t["text"].as_str()).collect();
    assert_eq!(text, "Once upon");
    // As text like any other, the mark is several tokens.
    assert!(run(&["--plain", "-p", "<|im_end|>"]).split(',').count() > 1);
    assert_eq!(run(&["-p", "<|im_end|>"]).split(',').count(), 1);
    Run::of(program().args(["tokenize", "tiny", "--decode", "-p", "2048"])).fails(&["no token 2048"]).hint();
    Run::of(program().args(["tokenize", "tiny", "--decode", "-p", "x"])).fails(&["no token id"]).hint();
}
