//! The contract of the command line: what goes where, exit statuses, names of models, every option that does something.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::tempdir;

use crate::common::{f32s, goldens, repo};
use crate::golden::{INT8_TRAINED, within};
use crate::program::{Run, arg, little_memory, names, patiently, program, run, short_of_memory};

const VERBS: [&str; 17] = [
    "download",
    "quantize",
    "layout",
    "run",
    "bench",
    "cache-sim",
    "logits",
    "inspect",
    "perplexity",
    "plan",
    "profile",
    "verify",
    "tokenize",
    "list",
    "rm",
    "completions",
    "man",
];
const QUESTION: &str = "What is 27 + 45?";
const ANSWER: &str = "27 + 45 = 72";

fn checkpoint() -> String {
    repo("models/tiny/checkpoint").display().to_string()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Greedy, with nothing on stderr.
fn quiet<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["run", "-q", "--temp", "0"], args].concat()
}

#[test]
fn help_and_version_are_output() {
    assert!(run(["--version"]).ok().starts_with("st-tool "));
    assert!(run(["--version"]).ok().contains("instruction sets: scalar"));
    assert_eq!(run(["-V"]).ok().lines().count(), 1);
    for command in VERBS {
        assert!(run(["--help"]).ok().contains(command));
        assert!(run([command, "--help"]).ok().contains("Usage: st-tool"));
    }
}

#[test]
fn every_shell_completes_every_verb() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = run(["completions", shell]).ok();
        assert!(VERBS.into_iter().all(|verb| script.contains(verb)), "{shell}");
    }
    run(["completions", "tcsh"]).misused("bash");
}

#[test]
fn every_verb_has_a_manual_page_that_replaces_only_manual_pages() {
    let dir = tempdir().unwrap();
    let pages = dir.path().join("man1");
    let [folder] = [arg(&pages)];
    for _ in 0..2 {
        run(["man", folder]).ok();
    }
    for verb in VERBS {
        let page = fs::read_to_string(pages.join(format!("st-tool-{verb}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS") && page.contains(".SH OPTIONS"), "{verb}: {page}");
    }
    assert!(fs::read_to_string(pages.join("st-tool.1")).unwrap().contains("perplexity"));
    fs::write(pages.join("st-tool-run.1"), "a text of mine").unwrap();
    fs::write(pages.join("st-tool.1"), ".old page").unwrap();
    run(["man", folder]).fails(&["manual page", "st-tool-run.1"]);
    assert_eq!(fs::read_to_string(pages.join("st-tool-run.1")).unwrap(), "a text of mine");
    assert_eq!(fs::read_to_string(pages.join("st-tool.1")).unwrap(), ".old page");
}

#[test]
fn wrong_arguments_are_exit_status_2() {
    run::<&str>([]).misused("Usage");
    run(["nonsense"]).misused("unrecognized subcommand");
    run(["quantize", "x"]).misused("--q4_0");
    run(["quantize", "x", "--q4_0", "--f16"]).misused("cannot be used with");
    run(["quantize", "x", "--q4_0", "--layout", "x"]).misused("invalid value");
    run(["quantize", "x", "--q4_0", "--compare", "y", "-o", "z"]).misused("cannot be used with");
    run(["layout", "x", "y"]).misused("--to");
    run(["layout", "x", "--to", "gguf"]).misused("OUT.gguf");
    run(["layout", "x", "y", "--to", "gguf", "--compare", "z"]).misused("cannot be used with");
    run(["run", "--memory", "1GB"]).misused("1GiB");
    for verb in [
        &["run", "-p", "x"][..],
        &["bench"],
        &["quantize", "x", "--q4_0"],
        &["layout", "x", "y", "--to", "gguf"],
        &["logits", "tiny", "--token-ids", "1", "-o", "x"],
        &["perplexity", "tiny", "-f", "x"],
    ] {
        run([verb, &["--threads", "0"]].concat()).misused("at least 1");
        for many in ["1025", "4294967296", "9223372036854775808", "18446744073709551615", "18446744073709551616"] {
            run([verb, &["--threads", many]].concat()).misused("invalid value");
        }
    }
    // A number below 0 is a value, not an option that does not exist.
    for option in ["--ctx", "--threads", "-n", "--seed", "--top-k", "--memory", "--reads"] {
        run(["run", option, "-2"]).misused("invalid value '-2'");
    }
    run(["bench", "-p", "-1"]).misused("whole number from 0");
    for unknown in ["-1", "--nonsense"] {
        let refused = run(["run", unknown]);
        assert!(!refused.stderr.contains("as a value"), "{}", refused.stderr);
        refused.misused("unexpected argument");
    }
    run(["run", "--ctx", "0"]).misused("at least 1");
    run(["run", "-p", "x", "-f", "y"]).misused("cannot be used with");
    run(["run", "--raw", "--system", "x"]).misused("cannot be used with");
    run(["run", "--kv-type", "q5"]).misused("invalid value");
    run(["bench", "--isa", "x"]).misused("avx2");
    run(["logits", "tiny", "--token-ids", "1"]).misused("--output");
    run(["download"]).misused("MODEL");
    run(["perplexity", "tiny"]).misused("--file");
}

#[test]
fn settings_outside_their_range_are_errors() {
    run(["run", "-p", "x", "--temp", "nan"]).fails(&["temperature is NaN"]);
    run(["run", "-p", "x", "--top-p", "0"]).fails(&["top-p is 0", "above 0"]);
    run(["run", "-p", "x", "--min-p", "2"]).fails(&["min-p is 2"]);
    run(["run", "-p", "x", "--repeat-penalty", "0"]).fails(&["repeat penalty is 0"]);
}

#[test]
fn an_answer_is_output_and_everything_else_is_not() {
    let plain = run(["run", "-p", QUESTION, "--temp", "0", "--stats"]);
    assert_eq!(plain.stdout, format!("{ANSWER}\n"));
    assert!(plain.stderr.contains("note: no MODEL is given"));
    for word in ["prompt: ", "generation: ", "tokens/s", "GB/s", "resident"] {
        assert!(plain.stderr.contains(word), "{}", plain.stderr);
    }
    let memory = little_memory("tiny");
    let streamed = run(["run", "tiny", "-p", QUESTION, "--temp", "0", "--stats", "--memory", &memory]);
    for part in ["| experts ", "| prompt ", "| generation ", "| read per token |", "| hidden |", "| rereads |"] {
        assert!(streamed.stderr.contains(part), "{}", streamed.stderr);
    }
    let quiet = run(["run", "tiny", "-p", QUESTION, "--temp", "0", "--quiet"]);
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), (plain.stdout.as_str(), ""));
}

#[test]
fn prompts_come_from_arguments_files_pipes_and_ids() {
    let expected = format!("{ANSWER}\n");
    let folder = tempdir().expect("a folder");
    let file = folder.path().join("prompt.txt");
    fs::write(&file, format!("{QUESTION}\n")).expect("written");
    assert_eq!(run(quiet(&["-f", arg(&file)])).ok(), expected);

    let piped = |args: &[&str]| {
        let mut command = program();
        command.args(quiet(args)).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        writeln!(stdin, "{QUESTION}").expect("written");
        drop(stdin);
        Run::checked(child.wait_with_output().expect("it ends")).ok()
    };
    assert_eq!(piped(&[]), expected);
    assert_eq!(piped(&["-f", "-"]), expected);
    assert_eq!(piped(&["-p", "-"]), expected);

    let answer = json(&run(quiet(&["-p", QUESTION, "--json"])).ok());
    let ids: Vec<String> = answer["prompt_ids"].as_array().expect("ids").iter().map(Value::to_string).collect();
    assert_eq!(run(quiet(&["--token-ids", &ids.join(",")])).ok(), expected);
    fs::write(&file, ids.join("\n")).expect("written");
    assert_eq!(run(quiet(&["--token-ids", &format!("@{}", file.display())])).ok(), expected);
}

#[test]
fn json_is_one_object_with_everything() {
    let little = short_of_memory("tiny");
    let [.., memory] = little.as_slice() else { panic!("{little:?}") };
    let little: Vec<&str> = little.iter().map(String::as_str).collect();
    let text = run(quiet(&[&["-p", QUESTION, "--json"], &little[..]].concat())).ok();
    assert_eq!(text.lines().count(), 1);
    let answer = json(&text);
    assert_eq!(answer["text"], ANSWER);
    assert_eq!(answer["finish_reason"], "stop");
    // The end token is the last id, and not part of the text.
    assert_eq!(answer["ids"].as_array().and_then(|ids| ids.last()).expect("ids"), 2047);
    let stats = &answer["stats"];
    assert_eq!(stats["prompt_tokens"], answer["prompt_ids"].as_array().expect("ids").len());
    assert!(stats["peak_resident_bytes"].as_u64().expect("bytes") <= memory.parse().expect("bytes"));
    for part in ["prompt", "generation"] {
        let of = |key: &str| stats["experts"][part][key].as_f64().unwrap_or_else(|| panic!("{part} {key}: {stats}"));
        assert_eq!(of("hit_rate"), of("hits") / (of("hits") + of("misses")));
        assert!((0.0..=1.0).contains(&of("hidden_share")) && of("stall_seconds") >= 0.0);
        assert!(of("rereads") <= of("misses") && of("misses") <= of("loads"));
        assert!((of("bytes_read") == 0.0) == (of("loads") == 0.0));
        assert!(of("evictions") > 0.0, "{stats}");
    }
}

#[test]
fn guesses_are_counted_and_shown_as_none_where_none_is_made() {
    // Little more than the least, so that some experts that are guessed are missing.
    let little = short_of_memory("tiny");
    let little: Vec<&str> = little.iter().map(String::as_str).collect();
    let story = [&["-p", "Tell me a story.", "--json"], &little[..]].concat();
    let generated =
        |args: &[&str]| json(&run(quiet(&[&story[..], args].concat())).ok())["stats"]["experts"]["generation"].clone();
    let experts = generated(&[]);
    let count = |key: &str| experts[key].as_u64().unwrap_or_else(|| panic!("{key}: {experts}"));
    assert!(count("guesses_right") <= count("guesses") && count("guesses") > 0, "{experts}");
    let share = count("guesses_right") as f64 / count("guesses") as f64;
    assert_eq!(experts["guess_right_share"].as_f64(), Some(share));

    let experts = generated(&["--no-guess"]);
    assert_eq!((&experts["guesses"], &experts["guess_right_share"]), (&Value::from(0), &Value::Null));
    let memory = little_memory("tiny");
    let table = run(["bench", "tiny", "-p", "0", "-n", "8", "-r", "1", "--memory", &memory, "--no-guess"]).ok();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
    let head = rows.iter().position(|row| row.contains(&"guesses right")).unwrap_or_else(|| panic!("{table}"));
    let column = rows[head].iter().position(|cell| *cell == "guesses right").expect("it is there");
    assert_eq!(rows[head + 2][column], "–", "{table}");
}

#[test]
fn answers_end_where_they_are_told_to() {
    let answer = |args: &[&str]| json(&run(quiet(&[&["-p", "Tell me a story.", "--json"], args].concat())).ok());
    let whole = answer(&[]);
    assert_eq!(whole["finish_reason"], "stop");
    let text = whole["text"].as_str().expect("text");

    let five = answer(&["-n", "5"]);
    assert_eq!(five["ids"].as_array().expect("ids").len(), 5);
    assert_eq!(five["finish_reason"], "length");
    assert!(text.starts_with(five["text"].as_str().expect("text")));

    let stop: String = text.chars().skip(20).take(4).collect();
    let stopped = answer(&["--stop", "@@never@@", &stop]);
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().expect("text"), text.split(&stop).next().expect("a part"));

    // Options after a list of texts are options.
    let dashed = answer(&["--stop=--", "--stop", "@@never@@", "--max-tokens", "3"]);
    assert_eq!(dashed["finish_reason"], "length");
    let swallowed = run(["run", "-p", "x", "--stop", "END", "tiny"]).fails(&["\"tiny\" is taken as a text for --stop"]);
    assert!(swallowed.hint().contains("MODEL first"));

    // Until the context is full.
    let full = answer(&["--ctx", "32"]);
    assert_eq!(full["finish_reason"], "length");
    assert_eq!(full["stats"]["ctx"], 32);
}

#[test]
fn seeds_repeat_and_differ() {
    let story =
        |seed: &str| run(["run", "-q", "-p", "Tell me a story.", "-n", "40", "--temp", "1", "--seed", seed]).ok();
    assert_eq!(story("1"), story("1"));
    assert_ne!(story("1"), story("2"));
}

#[test]
fn minus_one_is_no_limit_and_any_seed() {
    let whole = run(quiet(&["-p", QUESTION])).ok();
    assert_eq!(
        run(quiet(&["-p", QUESTION, "-n", "-1", "--seed", "-1", "--threads", "-1", "--top-k", "-1"])).ok(),
        whole
    );
}

#[test]
fn settings_at_the_ends_of_their_range_give_an_answer() {
    let story = ["run", "-q", "-p", "Tell me a story.", "-n", "12", "--seed", "1", "--temp"];
    for extreme in [
        &["1", "--repeat-penalty", "1e-38"][..],
        &["1", "--repeat-penalty", "3e38"],
        &["1e-38"],
        &["3e38", "--top-k", "18446744073709551615", "--top-p", "1e-38", "--min-p", "1"],
    ] {
        assert!(!run([&story, extreme].concat()).ok().is_empty());
    }
    for too_much in [["-d", "18446744073709551615"], ["-n", "18446744073709551615"], ["-p", "18446744073709551615"]] {
        run(["bench", "-r", "1"].iter().chain(&too_much)).fails(&["18446744073709551615", "2048"]);
    }
    run(["run", "-p", "x", "--ctx", "18446744073709551615"]).fails(&["18446744073709551615", "2048"]);
}

#[test]
fn a_dash_is_stdin_for_all_that_is_read() {
    let folder = tempdir().expect("a folder");
    let piped = |input: &[u8], args: &[&str]| {
        let mut command = program();
        command.current_dir(folder.path()).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        // It may have been refused before it reads.
        let _ = child.stdin.take().expect("a pipe").write_all(input);
        Run::checked(child.wait_with_output().expect("it ends"))
    };
    let text = "Once upon a time there was a small fox. ".repeat(40);
    assert!(piped(text.as_bytes(), &["perplexity", "tiny", "-f", "-", "-q"]).ok().starts_with("perplexity "));
    let ids = ["run", "tiny", "-q", "--temp", "0", "-n", "3", "--token-ids"];
    let listed = run([&ids[..], &["1,2,3"]].concat()).ok();
    assert_eq!(piped(b"1,2,3", &[&ids[..], &["@-"]].concat()).ok(), listed);
    run(["run", "-q", "-p", "x", "-n", "4", "--record-routing", arg(&folder.path().join("t"))]).ok();
    let trace = fs::read(folder.path().join("t")).expect("read");
    assert!(piped(&trace, &["cache-sim", "-"]).ok().contains("generation: "));
    // A model is read here and there.
    let checkpoint = checkpoint();
    for command in [
        &["run", "-", "-p", "x"][..],
        &["inspect", "-"],
        &["quantize", "-", "--q4_0"],
        &["layout", "-", "x.gguf", "--to", "gguf"],
        &["layout", "tiny", "--to", "offload", "--compare", "-"],
        &["quantize", &checkpoint, "--q4_0", "--compare", "-"],
    ] {
        piped(b"", command).fails(&["not read from stdin"]).hint();
    }
    assert_eq!(names(folder.path()), ["t"]);
}

/// A path is bytes: what is no UTF-8 is shown with a mark, and works.
#[test]
#[cfg(target_os = "linux")]
fn names_that_are_not_utf_8_work() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let folder = tempdir().expect("a folder");
    let name = |end: &str| [b"caf\xe9".as_slice(), end.as_bytes()].concat();
    fs::copy(repo("models/tiny/tiny-q4_0.gguf"), folder.path().join(OsStr::from_bytes(&name(".gguf"))))
        .expect("copied");
    let here = |words: &[&[u8]]| {
        Run::of(program().current_dir(folder.path()).args(words.iter().map(|word| OsStr::from_bytes(word))))
    };
    let model = name(".gguf");
    let answer = here(&[b"run", &model, b"-q", b"--temp", b"0", b"-p", QUESTION.as_bytes()]);
    assert_eq!(answer.ok(), format!("{ANSWER}\n"));
    assert!(here(&[b"inspect", &model]).ok().starts_with("caf\u{fffd}.gguf: "));
    let written = here(&[b"layout", &model, &name("-o.gguf"), b"--to", b"offload"]);
    assert!(written.stderr.contains("caf\u{fffd}-o.gguf"), "{}", written.stderr);
    written.ok();
    here(&[b"quantize", checkpoint().as_bytes(), b"--q4_0", b"-o", &name("-q4_0.gguf")]).ok();
    here(&[b"logits", &model, b"--token-ids", b"1", b"-o", &name(".logits")]).ok();
    here(&[b"run", &model, b"-p", b"x", b"-n", b"2", b"--record-routing", &name(".trace")]).ok();
    here(&[b"cache-sim", &name(".trace")]).ok();
    here(&[b"run", &name("-no.gguf"), b"-p", b"x"]).fails(&["caf\u{fffd}-no.gguf"]);
    assert_eq!(names(folder.path()).len(), 5);
}

/// What a session allows the first thread does not limit the work.
#[test]
#[cfg(target_os = "linux")]
fn a_small_stack_is_enough() {
    for verb in ["run tiny -q -p x -n 2", "inspect tiny", "--help", "run --nonsense"] {
        let mut limited = Command::new("sh");
        limited.args(["-c", "ulimit -s 128; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_st-tool")]);
        let run = Run::of(limited.args(verb.split(' ')));
        assert_eq!(run.status, if verb.contains("nonsense") { 2 } else { 0 }, "{verb}: {}", run.stderr);
    }
}

/// However little memory a session allows, there is an answer or one error.
#[test]
#[cfg(target_os = "linux")]
fn memory_that_is_not_to_be_had_is_one_error() {
    let limited = |kib: u64, words: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -v {kib}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_st-tool")]);
        command.args(words.split(' ')).output().expect("it runs")
    };
    // Below that there is not even a program.
    let steps = || std::iter::successors(Some(20_000), |kib| Some(kib * 9 / 8)).take_while(|&kib| kib < 4_000_000);
    let starts = steps().find(|&kib| limited(kib, "--version").status.success()).expect("it starts");
    let folder = tempdir().expect("a folder");
    let [tiny, checkpoint, out] =
        [repo("models/tiny/tiny-q4_0.gguf"), repo("models/tiny/checkpoint"), folder.path().join("out")]
            .map(|path| path.display().to_string());
    let mut failed = 0;
    for words in [
        "run tiny -q -p x -n 2 --temp 0 --threads 2".to_owned(),
        "bench tiny -p 2 -n 2 -r 1 --threads 2".to_owned(),
        format!("quantize {checkpoint} --q4_0 -o {out} --force -q --threads 8"),
        format!("layout {tiny} {out} --to offload --force -q --threads 8"),
    ] {
        for kib in steps().filter(|&kib| kib >= starts) {
            let output = limited(kib, &words);
            if is_end_of_a_library(&output.stderr) {
                continue;
            }
            let run = Run::checked(output);
            if run.status == 0 {
                break;
            }
            run.fails(&[]).hint();
            failed += 1;
        }
    }
    assert!(failed > 0, "the least that it starts with is enough");
}

/// Whether a thread had no memory for the stack of its signals, for its own variables or for what ends those. The standard library and libc end the process
/// for that before a line of ours runs in the thread; with memory that just suffices it is a matter of the order in which threads start.
pub(crate) fn is_end_of_a_library(stderr: &[u8]) -> bool {
    let said = String::from_utf8_lossy(stderr);
    [
        "sys/pal/unix/stack_overflow.rs",
        "cannot allocate memory for thread-local data",
        "failed to register TLS destructor",
    ]
    .iter()
    .any(|message| said.contains(message))
}

#[test]
fn raw_text_goes_past_the_template() {
    let text = "<|im_start|>user\nWhat is 27 + 45?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(run(quiet(&["--raw", "-p", text])).ok(), format!("{ANSWER}\n"));
    let ids = |args: &[&str]| json(&run(quiet(&[args, &["--json", "-n", "1"]].concat())).ok())["prompt_ids"].clone();
    let with_system = ids(&["-p", "Hi", "--system", "Be kind."]);
    let text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(with_system, ids(&["--raw", "-p", text]));
}

#[test]
fn streamed_text_is_the_text_of_the_object() {
    let prompt = "用中文写一个小故事。";
    let object = json(&run(quiet(&["-p", prompt, "--json"])).ok());
    assert_eq!(run(quiet(&["-p", prompt])).ok(), format!("{}\n", object["text"].as_str().expect("text")));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut command = program();
    command.args(quiet(&["--raw", "-p", "Once", "-n", "1500", "--stop", "@@never@@"]));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut byte = [0];
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut byte).expect("a first byte");
    drop(stdout);
    let run = Run::checked(child.wait_with_output().expect("it ends"));
    assert_eq!((run.status, run.stderr.as_str()), (0, ""));
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = program().args(quiet(&["-p", QUESTION])).stdout(full).output().expect("the program starts");
    Run::checked(output).fails(&["cannot write to standard output"]);
    for words in [&["--help"][..], &["--version"], &["run", "--help"], &["inspect", "tiny"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let output = program().args(words).stdout(full).output().expect("the program starts");
        Run::checked(output).fails(&["cannot write to standard output"]);
    }
}

#[test]
#[cfg(unix)]
fn signals_end_the_work_cleanly() {
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        let folder = tempdir().expect("a folder");
        let mut command = program();
        command.args(["bench", "-q", "-p", "0", "-n", "2000", "-r", "100000", "--record-routing", "trace"]);
        command.current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("the program starts");
        // Tokens run once their routing is on its way to the file.
        patiently(|| fs::metadata(folder.path().join(".trace.partial")).is_ok_and(|trace| trace.len() > 0));
        let killed = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status();
        assert!(killed.expect("kill runs").success());
        let run = Run::checked(child.wait_with_output().expect("it ends"));
        assert_eq!((run.status, run.stderr.as_str(), run.stdout.as_str()), (status, "error: interrupted\n", ""));
        assert_eq!(names(folder.path()), ["trace"]);
    }
}

#[test]
fn a_budget_that_is_too_small_names_one_that_works() {
    let refused = run(["run", "tiny", "-p", QUESTION, "--temp", "0", "--memory", "1MiB"]).fails(&["not enough"]);
    let hint = refused.hint().to_owned();
    let size = hint.split_whitespace().find(|word| word.ends_with("MiB")).expect("a size");
    let answered = run(["run", "tiny", "-p", QUESTION, "--temp", "0", "--memory", size]);
    assert!(answered.stderr.contains("memory: "), "the plan is shown: {}", answered.stderr);
    assert_eq!(answered.ok(), format!("{ANSWER}\n"));
}

#[test]
fn models_are_named_found_and_explained() {
    let file = repo("models/tiny/tiny-q4_0.gguf");
    assert_eq!(run(quiet(&[arg(&file), "-p", QUESTION])).ok(), format!("{ANSWER}\n"));
    run(["run", "no/such.gguf", "-p", "x"]).fails(&["no/such.gguf"]);
    run(["run", "nonsense", "-p", "x"]).fails(&["nonsense"]);
    let folder = run(["run", &checkpoint(), "-p", "x"]).fails(&["is a folder"]);
    assert!(folder.hint().contains("st-tool quantize"));
    let missing = run(["run", "4b", "-p", "x"]).fails(&["Tiiny/SmallThinker-4BA0.6B-Instruct"]);
    assert!(missing.hint().contains("st-tool quantize 4b --q4_0"));
    run(["quantize", "21b", "--q4_0"]).fails(&["offline", "SmallThinker-21BA3B-Instruct"]).hint();
    let looked = run(["quantize", "21b", "--q4_0", "--dry-run"]).fails(&["not downloaded"]);
    assert!(looked.hint().contains("st-tool download 21b"));
    run(["quantize", "tiny", "--q4_0"]).fails(&["converted already"]);
}

/// A hub cache with the mini checkpoint as `owner/mini`.
fn cache(folder: &Path) -> std::path::PathBuf {
    let repo_folder = folder.join("hub/models--owner--mini");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = repo_folder.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::create_dir_all(repo_folder.join("refs")).expect("a folder");
    fs::write(repo_folder.join("refs/main"), commit).expect("written");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(repo("tests/golden/mini-4b").join(name), snapshot.join(name)).expect("copied");
    }
    snapshot
}

#[test]
fn the_shared_hub_cache_is_used() {
    let folder = tempdir().expect("a folder");
    let snapshot = cache(folder.path());
    let work = tempdir().expect("a folder");
    let here = |args: &[&str]| Run::of(program().env("HF_HOME", folder.path()).current_dir(work.path()).args(args));

    assert_eq!(here(&["download", "owner/mini", "--offline"]).ok(), format!("{}\n", snapshot.display()));
    let hint = here(&["run", "owner/mini", "--token-ids", "1"]).fails(&["owner/mini is downloaded, but not converted"]);
    assert!(hint.hint().starts_with("st-tool quantize owner/mini --q4_0"));
    assert_eq!(here(&["quantize", "owner/mini", "--q4_0"]).ok(), "");
    assert_eq!(names(work.path()), ["mini-q4_0.gguf"]);

    // A file without a tokenizer takes and gives ids.
    let ids = here(&["run", "owner/mini", "--token-ids", "1,2,3", "-n", "4", "--temp", "0", "-q"]).ok();
    let ids: Vec<u32> = ids.trim_end().split(',').map(|id| id.parse().expect("an id")).collect();
    assert_eq!(ids.len(), 4);
    here(&["run", "owner/mini", "-p", "x"]).fails(&["no tokenizer"]).hint();
    here(&["download", "owner/other", "--offline"]).fails(&["owner/other"]).hint();
    here(&["download", "not a name"]).fails(&["not a name"]).hint();
}

#[test]
fn quantize_writes_the_same_bytes_and_never_over_a_file_unasked() {
    let folder = tempdir().expect("a folder");
    let here = |args: &[&str]| Run::of(program().current_dir(folder.path()).args(args));
    let tiny = fs::read(repo("models/tiny/tiny-q4_0.gguf")).expect("the bundled model");

    assert_eq!(here(&["quantize", &checkpoint(), "--q4_0", "--threads", "1", "-o", "a.gguf"]).ok(), "");
    assert_eq!(here(&["quantize", &checkpoint(), "--q4_0", "--threads", "2"]).ok(), "");
    assert_eq!(names(folder.path()), ["a.gguf", "checkpoint-q4_0.gguf"]);
    for name in names(folder.path()) {
        assert!(fs::read(folder.path().join(name)).expect("read") == tiny, "the bundled model is another");
    }

    fs::write(folder.path().join("a.gguf"), "GGUF of mine").expect("written");
    let refused = here(&["quantize", &checkpoint(), "--q4_0", "-o", "a.gguf"]).fails(&["a.gguf", "exists"]);
    assert!(refused.hint().contains("--force"));
    assert_eq!(fs::read(folder.path().join("a.gguf")).expect("read"), b"GGUF of mine");
    here(&["quantize", &checkpoint(), "--q4_0", "-o", "a.gguf", "--force"]).ok();
    assert!(fs::read(folder.path().join("a.gguf")).expect("read") == tiny);

    for command in [
        &["quantize", &checkpoint(), "--q4_0", "-o", "no/such/x.gguf"][..],
        // Before anything is downloaded.
        &["quantize", "4b", "--q4_0", "-o", "no/such/x.gguf"],
        &["layout", "a.gguf", "no/such/x.gguf", "--to", "offload"],
        &["logits", "tiny", "--token-ids", "1", "-o", "no/such/x.gguf"],
    ] {
        let refused = here(command).fails(&["no/such/x.gguf", "the folder no/such does not exist"]);
        assert_eq!(refused.hint(), "`mkdir -p no/such` makes it");
    }
    assert_eq!(names(folder.path()), ["a.gguf", "checkpoint-q4_0.gguf"]);
}

#[test]
fn quantize_dry_run_and_compare_write_nothing() {
    let folder = tempdir().expect("a folder");
    let here = |args: &[&str]| Run::of(program().current_dir(folder.path()).args(args));
    let table = here(&["quantize", &checkpoint(), "--q4_0", "--output-type", "q8_0", "--dry-run"]).ok();
    assert!(table.lines().any(|line| line.starts_with("token_embd.weight") && line.contains("Q8_0")), "{table}");
    assert!(table.lines().any(|line| line.starts_with("blk.7.ffn_down_exps.weight") && line.contains("64 x 192 x 16")));
    let tiny = repo("models/tiny/tiny-q4_0.gguf");
    assert_eq!(here(&["quantize", &checkpoint(), "--q4_0", "--compare", arg(&tiny)]).ok(), "");
    let other = here(&["quantize", &checkpoint(), "--q8_0", "--compare", arg(&tiny)]);
    assert_eq!(other.status, 1);
    assert!(other.stdout.contains("token_embd.weight: type Q4_0, expected Q8_0"), "{}", other.stdout);
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn layouts_turn_into_each_other_bit_for_bit_and_answer_alike() {
    let folder = tempdir().expect("a folder");
    let here = |args: &[&str]| Run::of(program().current_dir(folder.path()).args(args));
    let tiny = repo("models/tiny/tiny-q4_0.gguf");
    here(&["layout", arg(&tiny), "o.gguf", "--to", "offload"]).ok();
    here(&["layout", "o.gguf", "g.gguf", "--to", "gguf"]).ok();
    here(&["quantize", &checkpoint(), "--q4_0", "--layout", "offload"]).ok();
    let read = |name: &str| fs::read(folder.path().join(name)).expect("read");
    assert!(read("g.gguf") == fs::read(&tiny).expect("read"));
    assert!(read("checkpoint-q4_0-offload.gguf") == read("o.gguf"));
    here(&["layout", "o.gguf", "--to", "gguf", "--compare", arg(&tiny)]).ok();
    here(&["layout", "g.gguf", "--to", "offload", "--compare", "o.gguf"]).ok();
    let mut damaged = read("o.gguf");
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    fs::write(folder.path().join("d.gguf"), damaged).expect("written");
    let differs = here(&["layout", "g.gguf", "--to", "offload", "--compare", "d.gguf"]);
    assert_eq!(differs.status, 1);
    assert!(differs.stdout.starts_with("blk.7.ffn_exps.packed: 1 of "), "{}", differs.stdout);
    let other = here(&["layout", "g.gguf", "--to", "offload", "--compare", "g.gguf"]);
    assert!(other.stdout.contains("blk.0.ffn_exps.packed: missing from the file"), "{}", other.stdout);
    here(&["layout", arg(&tiny), "o.gguf", "--to", "offload"]).fails(&["exists"]).hint();

    let answer = |args: &[&str]| {
        let all = [&["run", "o.gguf", "-q", "--temp", "0", "-p", "Tell me a story.", "--json"], args].concat();
        json(&here(&all).ok())
    };
    let expected = json(&run(quiet(&["-p", "Tell me a story.", "--json"])).ok())["text"].clone();
    assert_eq!(answer(&[])["text"], expected);
    let little = short_of_memory(arg(&folder.path().join("o.gguf")));
    let little: Vec<&str> = little.iter().map(String::as_str).collect();
    for args in [&[][..], &["--no-prefetch", "--io", "buffered"]] {
        let streamed = answer(&[&little[..], args].concat());
        assert_eq!(streamed["text"], expected, "{args:?}");
        let evictions = &streamed["stats"]["experts"]["generation"]["evictions"];
        assert!(evictions.as_u64().expect("a number") > 0, "{args:?}");
    }
}

#[test]
fn logits_are_a_safetensors_file() {
    let folder = tempdir().expect("a folder");
    let here = |args: &[&str]| Run::of(program().current_dir(folder.path()).args(args));
    let golden = goldens().into_iter().find(|golden| golden.name == "chat_sum").expect("a golden");
    let ids = golden.ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    here(&["logits", "tiny", "--token-ids", &ids, "-o", "a.safetensors", "--layers"]).ok();
    here(&["logits", "tiny", "--token-ids", &ids, "-o", "b.safetensors", "--layers", "--reference"]).ok();
    let read = |name: &str| fs::read(folder.path().join(name)).expect("read");
    let (fast, reference) = (read("a.safetensors"), read("b.safetensors"));
    let (fast, reference) =
        (SafeTensors::deserialize(&fast).expect("valid"), SafeTensors::deserialize(&reference).expect("valid"));
    let logits = |file: &SafeTensors<'_>| {
        let logits = file.tensor("logits").expect("logits");
        assert_eq!((logits.dtype(), logits.shape()), (Dtype::F32, &[golden.ids.len(), 2048][..]));
        f32s(file, "logits")
    };
    within("logits", &logits(&fast), &logits(&reference), 2048, &INT8_TRAINED);
    for file in [&fast, &reference] {
        assert_eq!(file.len(), 1 + 3 * 8);
        assert_eq!(file.tensor("layer.7.output").expect("there").shape(), [golden.ids.len(), 192]);
        assert_eq!(file.tensor("layer.7.topk_ids").expect("there").dtype(), Dtype::I32);
        let weights = f32s(file, "layer.0.topk_weights");
        assert!((weights[..4].iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }

    here(&["logits", "tiny", "--token-ids", "1", "-o", "a.safetensors"]).fails(&["exists"]).hint();
    here(&["logits", "tiny", "--token-ids", "1", "-o", "a.safetensors", "--force"]).ok();
    here(&["logits", "tiny", "--token-ids", "", "-o", "c.safetensors"]).fails(&["no token ids"]);
    here(&["logits", "tiny", "--token-ids", "2048", "-o", "c.safetensors"]).fails(&["2048"]);
    assert_eq!(names(folder.path()), ["a.safetensors", "b.safetensors"]);
}

#[test]
fn inspect_shows_a_file() {
    let table = run(["inspect", "tiny", "--tensors"]).ok();
    for part in ["smallthinker.block_count", "layout gguf", "Q4_0     57 tensors", "blk.7.ffn_down_exps.weight"] {
        assert!(table.contains(part), "{table}");
    }
    assert!(!run(["inspect", "tiny"]).ok().contains("blk.7"));
    let object = json(&run(["inspect", "tiny", "--json", "--tensors"]).ok());
    assert_eq!(object["metadata"]["general.architecture"], "smallthinker");
    assert_eq!(object["layout"], "gguf");
    assert_eq!(object["tensors"].as_array().expect("tensors").len(), 82);
}

#[test]
fn a_text_to_be_scored_ends_somewhere() {
    let zeros = ["perplexity", "tiny", "-f", "/dev/zero"];
    run(zeros).fails(&["/dev/zero", "longer than 256 MiB"]);
    run([&zeros[..], &["--memory", "64MiB"]].concat()).fails(&["/dev/zero", "longer than 256 KiB", "this budget"]);
}

#[test]
fn addresses_are_no_models_and_their_passwords_are_not_shown() {
    for address in ["https://me:Passw0rd@hub.example/a/b", "https://me:Passw0rd@hub.example/m.gguf?token=Passw0rd"] {
        let refused = run(["run", address, "-p", "x"]).fails(&["hub.example", "is an address"]);
        assert!(!refused.stderr.contains("Passw0rd") && refused.hint().contains("owner/name"), "{}", refused.stderr);
        let refused = run(["download", address]).fails(&["hub.example", "does not name a model"]);
        assert!(!refused.stderr.contains("Passw0rd"), "{}", refused.stderr);
    }
    let refused = run(["run", "me:Passw0rd@hub/a/b", "-p", "x"]).fails(&["hub/a/b"]);
    assert!(!refused.stderr.contains("Passw0rd"), "{}", refused.stderr);
}

#[test]
fn perplexity_of_a_text_the_model_knows_is_low() {
    let folder = tempdir().expect("a folder");
    let file = folder.path().join("text.txt");
    let text = fs::read_to_string(repo("models/tiny/heldout.txt")).expect("read");
    fs::write(&file, text.chars().take(6000).collect::<String>()).expect("written");
    let line = run(["perplexity", "tiny", "-f", arg(&file), "--ctx", "256", "-q"]).ok();
    assert!(line.starts_with("perplexity ") && line.contains(" ± "), "{line}");
    let object = json(&run(["perplexity", "tiny", "-f", arg(&file), "--ctx", "256", "--json"]).ok());
    let perplexity = object["perplexity"].as_f64().expect("a number");
    assert!((1.0..5.0).contains(&perplexity), "{perplexity}");
    fs::write(&file, "a").expect("written");
    run(["perplexity", "tiny", "-f", arg(&file)]).fails(&["none can be scored"]);
}

#[test]
fn bench_measures_both_kinds_of_work() {
    let object = json(&run(["bench", "-p", "32", "-n", "8", "-d", "16", "-r", "2", "-o", "json"]).ok());
    let tests = object["tests"].as_array().expect("tests");
    assert_eq!(tests.len(), 2);
    for test in tests {
        let speed = |key: &str| test["tokens_per_second"][key].as_f64().expect("a number");
        assert!(0.0 < speed("min") && speed("min") <= speed("median") && speed("median") <= speed("max"));
    }
    let table = run(["bench", "tiny", "-p", "0", "-n", "8", "-r", "1", "--memory", "64MiB"]).ok();
    assert!(table.contains("| generation 8 |") && table.contains("| experts "), "{table}");
    let object = json(&run(["bench", "-p", "32", "-n", "8", "-r", "1", "--memory", "64MiB", "-o", "json"]).ok());
    assert_eq!(object["cache"]["experts"], 128);
    // One by one, each token asks for four experts in each of eight layers.
    let experts = &object["tests"][1]["experts"];
    let count = |key: &str| experts[key].as_u64().expect("a number");
    assert_eq!(count("hits") + count("misses"), 8 * 8 * 4);
    let portable = json(&run(["bench", "-p", "8", "-n", "0", "-r", "1", "--isa", "scalar", "-o", "json"]).ok());
    assert_eq!(portable["isa"], "scalar");
    let foreign = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon-dotprod" };
    let refused = run(["bench", "--isa", foreign]).fails(&["this CPU", foreign]);
    assert!(refused.hint().contains("without --isa"));
    run(["bench", "-p", "0", "-n", "0"]).fails(&["nothing to measure"]);
    run(["bench", "-p", "4000"]).fails(&["4000", "2048"]);
}
