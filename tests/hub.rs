//! From the hub to an answer, as a person types it: the bundled checkpoint served as `4b` by a hub on loopback.

use std::ffi::OsStr;
use std::fs;
#[cfg(unix)]
use std::os::unix::ffi::OsStrExt as _;
use std::process::Command;

use tempfile::{TempDir, tempdir};

use crate::cli::is_end_of_a_library;
use crate::common::repo;
use crate::program::{Run, names, program};
use server::{Fault, RepoFile, Server, Settings};

#[path = "../converters/hub/tests/hub/server.rs"]
#[allow(dead_code, reason = "the hub's own tests use more of it")]
pub(crate) mod server;

const REPO: &str = "Tiiny/SmallThinker-4BA0.6B-Instruct";

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

/// However little memory a session allows, a transfer is done or ends in one error.
#[test]
#[cfg(target_os = "linux")]
fn threads_that_do_not_start_are_one_error() {
    let world = World::new();
    let limited = |kib: u64, args: &[&str]| {
        let of = world.program();
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("ulimit -v {kib}; exec \"$0\" \"$@\"")]).arg(of.get_program());
        limited.envs(of.get_envs().filter_map(|(key, value)| Some((key, value?))));
        limited.args(args).output().expect("it runs")
    };
    // Below that there is not even a program.
    let steps = || std::iter::successors(Some(20_000), |kib| Some(kib * 10 / 9)).take_while(|&kib| kib < 1_000_000);
    let starts = steps().find(|&kib| limited(kib, &["--version"]).status.success()).expect("it starts");
    let mut failed = 0;
    for kib in steps().filter(|&kib| kib >= starts) {
        let output = limited(kib, &["download", "4b", "-q"]);
        if is_end_of_a_library(&output.stderr) {
            continue;
        }
        let run = Run::checked(output);
        if run.status == 0 {
            break;
        }
        run.fails(&[]);
        failed += 1;
    }
    assert!(failed > 0, "the least that it starts with is enough");
}

#[test]
fn quantize_fetches_what_it_needs_but_not_for_a_dry_run_or_a_refused_output() {
    let world = World::new();
    world.run(&["quantize", "4b", "--q4_0", "--dry-run"]).fails(&["not downloaded"]).hint();
    fs::write(world.folder.path().join("mine.gguf"), "mine").expect("written");
    world.run(&["quantize", "4b", "--q4_0", "-o", "mine.gguf"]).fails(&["exists"]);
    assert_eq!(names(world.folder.path()), ["mine.gguf"]);
    world.run(&["quantize", "4b", "--q4_0", "-q", "-o", "new.gguf"]).ok();
    assert_eq!(names(world.folder.path()), ["mine.gguf", "new.gguf"]);
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

#[test]
#[cfg(unix)]
fn a_token_with_odd_characters_is_what_the_error_is_about() {
    let world = World::new();
    let home = world.folder.path().join("hf");
    let of_variable = |value: &[u8]| {
        Run::of(world.program().env("HF_TOKEN", OsStr::from_bytes(value)).args(["download", "4b", "--dry-run"]))
    };
    for value in ["\u{201c}hf_abc\u{201d}".as_bytes(), b"'hf_abc'", b"hf_abc\xe9"] {
        let refused = of_variable(value).fails(&["the token of HF_TOKEN"]);
        assert!(
            refused.hint().contains("copy the token again") && !refused.stderr.contains("abc"),
            "{}",
            refused.stderr
        );
    }
    Run::of(world.program().args(["download", "4b", "--token", "hf abc"])).fails(&["the token of --token"]).hint();
    fs::create_dir(&home).expect("a folder");
    fs::write(home.join("token"), "\u{feff}\"hf_abc\"\r\n").expect("written");
    world.run(&["download", "4b"]).fails(&["the token of", "hf/token", "U+0022"]).hint();

    // What editors and shells add is no part of it.
    world.server.change(|settings| settings.token = Some("hf_abc".to_owned()));
    fs::write(home.join("token"), "\u{feff}hf_abc\r\n\r\n").expect("written");
    world.run(&["download", "4b", "--dry-run"]).ok();
    assert!(world.server.log().iter().all(|seen| seen.authorization.as_deref() == Some("Bearer hf_abc")));
}

#[test]
fn passwords_in_addresses_are_shown_nowhere() {
    let world = World::new();
    let endpoint = world.server.endpoint().replace("://", "://reader:Passw0rd@");
    let secret = |run: Run| {
        assert!(!run.stderr.contains("Passw0rd") && !run.stdout.contains("Passw0rd"), "{}", run.stderr);
        run
    };
    let download = |args: &[&str], name: &str, value: &str| {
        secret(Run::of(
            world.program().env("HF_ENDPOINT", &endpoint).env(name, value).args(["download", "4b"]).args(args),
        ))
    };
    download(&["-vv"], "HF_TOKEN", "hf_abc").ok();
    world.server.change(|settings| settings.gated = true);
    for flags in [&[][..], &["-v"], &["-vv"]] {
        assert_eq!(download(flags, "HF_TOKEN", "hf_abc").status, 1);
    }
    download(&[], "HF_ENDPOINT", "reader:Passw0rd@mirror").fails(&["mirror"]).hint();
    download(&["-vv"], "http_proxy", "http://reader:Passw0rd@127.0.0.1:1");
    download(&[], "HTTP_PROXY", "gopher://reader:Passw0rd@proxy").fails(&["HTTP_PROXY is not"]).hint();
}

#[test]
#[cfg(unix)]
fn a_cache_may_have_any_name_and_one_that_cannot_be_is_an_error_with_advice() {
    let world = World::new();
    let odd = world.folder.path().join(OsStr::from_bytes(b"caf\xe9"));
    let printed = world.program().env("HF_HOME", &odd).args(["download", "4b", "-q"]).output().expect("it runs");
    let path = printed.stdout.strip_suffix(b"\n").expect("one line");
    assert!(std::path::Path::new(OsStr::from_bytes(path)).join("config.json").exists(), "{printed:?}");
    fs::write(world.folder.path().join("file"), "").expect("written");
    let home = world.folder.path().join("file/hf");
    let refused = Run::of(world.program().env("HF_HOME", home).args(["download", "4b", "-q"])).fails(&["file/hf"]);
    assert!(refused.hint().contains("HF_HOME") && refused.hint().contains("--local-dir"));
}

#[test]
fn a_model_that_was_fetched_under_its_former_name_is_found_by_its_alias() {
    let world = World::new();
    let former = "PowerInfer/SmallThinker-4BA0.6B-Instruct";
    world.server.change(|settings| settings.repo = former.to_owned());
    let folder = world.run(&["download", "4b", "-q"]).ok();
    world.server.change(|settings| {
        settings.repo = REPO.to_owned();
        settings.former = vec![former.to_owned()];
    });
    for model in ["4b", REPO, former] {
        assert_eq!(world.run(&["download", model, "-q"]).ok(), folder);
        assert_eq!(world.run(&["download", model, "-q", "--offline"]).ok(), folder);
    }
    let missing = world.run(&["run", former, "-p", "x"]).fails(&["is downloaded, but not converted"]);
    assert!(missing.hint().starts_with("st-tool quantize 4b --q4_0"));
}
