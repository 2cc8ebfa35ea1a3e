//! Conversions that do not come to their end: stopped, killed, out of space. What stands under the output's name is whole, or
//! what was there before.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use tempfile::{TempDir, tempdir};

use crate::common::repo;
use crate::program::{Run, arg, names, program};

/// How often each kind of work is stopped by each signal.
const STOPS: u32 = 8;
const LAYERS: usize = 6;
const EXPERTS: usize = 16;
/// Width of the residual stream, and of an expert.
const WIDTH: usize = 256;
const VOCABULARY: usize = 4096;

/// A checkpoint of 40 MB: large enough to be stopped on the way.
static CHECKPOINT: LazyLock<TempDir> = LazyLock::new(|| {
    let (folder, shapes) = begin_checkpoint(VOCABULARY, WIDTH);
    // Numbers between -1 and 1 that do not repeat soon; all tensors are cut from one piece.
    let weights: Vec<u8> = (0..VOCABULARY * WIDTH)
        .flat_map(|i| (((i * 7919 % 10_007) as f32 / 5003.0 - 1.0).to_bits() >> 16).to_le_bytes()[..2].to_vec())
        .collect();
    let views = shapes.into_iter().map(|(name, shape)| {
        let bytes = 2 * shape.iter().product::<usize>();
        (name, TensorView::new(Dtype::BF16, shape, &weights[..bytes]).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).expect("written");
    folder
});

/// A folder with the configuration of a model, and the shapes of the weights that belong beside it.
fn begin_checkpoint(vocabulary: usize, width: usize) -> (TempDir, BTreeMap<String, Vec<usize>>) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let config = fs::read(repo("tests/golden/mini-4b/config.json")).expect("read");
    let mut config: Json = serde_json::from_slice(&config).expect("JSON");
    for (key, value) in [
        ("hidden_size", width),
        ("moe_ffn_hidden_size", width),
        ("moe_num_primary_experts", EXPERTS),
        ("num_hidden_layers", LAYERS),
        ("vocab_size", vocabulary),
    ] {
        config[key] = json!(value);
    }
    config["rope_layout"] = json!(vec![1; LAYERS]);
    config["sliding_window_layout"] = json!(vec![0; LAYERS]);
    fs::write(folder.path().join("config.json"), config.to_string()).expect("written");

    let mut shapes = BTreeMap::new();
    shapes.insert("model.embed_tokens.weight".to_owned(), vec![vocabulary, width]);
    shapes.insert("model.norm.weight".to_owned(), vec![width]);
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.insert(format!("model.layers.{layer}.{name}.weight"), shape.to_vec());
        };
        add("input_layernorm", &[width]);
        add("post_attention_layernorm", &[width]);
        add("self_attn.q_proj", &[128, width]);
        add("self_attn.k_proj", &[64, width]);
        add("self_attn.v_proj", &[64, width]);
        add("self_attn.o_proj", &[width, 128]);
        add("block_sparse_moe.primary_router", &[EXPERTS, width]);
        for expert in 0..EXPERTS {
            for matrix in ["gate", "up", "down"] {
                add(&format!("block_sparse_moe.experts.{expert}.{matrix}"), &[width, width]);
            }
        }
    }
    (folder, shapes)
}

/// One kind of work: the arguments before the output.
struct Work {
    before: Vec<String>,
    after: Vec<String>,
    /// What it makes when nothing stops it, and how long that takes.
    whole: Vec<u8>,
    takes: Duration,
}

impl Work {
    fn new(before: &[&str], after: &[&str]) -> Self {
        let own = |args: &[&str]| args.iter().map(|&arg| arg.to_owned()).collect();
        let mut work = Self { before: own(before), after: own(after), whole: Vec::new(), takes: Duration::ZERO };
        let folder = tempdir().expect("a folder");
        let output = folder.path().join("out.gguf");
        let start = Instant::now();
        Run::of(&mut work.command(&output)).ok();
        work.takes = start.elapsed();
        work.whole = fs::read(output).expect("read");
        work
    }

    fn command(&self, output: &Path) -> Command {
        let mut command = program();
        command.args(&self.before).arg(output).args(&self.after);
        command
    }

    /// Starts the work, sends it `signal` after `delay`, and checks what it leaves; whether it was stopped.
    fn stop(&self, output: &Path, signal: &str, delay: Duration) -> bool {
        let folder = output.parent().expect("a folder");
        let mut command = self.command(output);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        std::thread::sleep(delay);
        let sent =
            Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).stderr(Stdio::null()).status();
        sent.expect("kill runs");
        let ended = child.wait_with_output().expect("it ends");
        // Whoever is killed after the name was given has done its work, too.
        if ended.status.success() || (ended.status.code().is_none() && output.exists()) {
            assert!(fs::read(output).expect("the output") == self.whole, "{signal} after {delay:?}: another file");
            fs::remove_file(output).expect("removed");
            return false;
        }
        let left = names(folder);
        // A process that was just born does not listen yet, and none can listen to KILL: those end as the system ends them.
        match ended.status.signal() {
            Some(_) => assert!(left.is_empty() || left == [".out.gguf.partial"], "{signal} after {delay:?}: {left:?}"),
            None => {
                let run = Run::checked(ended);
                let status = if signal == "INT" { 130 } else { 143 };
                assert_eq!((run.status, run.stdout.as_str(), run.stderr.lines().count()), (status, "", 1));
                assert!(run.stderr.starts_with("error: interrupted"), "{}", run.stderr);
                assert!(left.is_empty(), "{signal} after {delay:?}: {left:?}");
            }
        }
        true
    }
}

/// All moments of the work are met, and each run finds what the one before it left.
fn stopped_anywhere(work: &Work) {
    let folder = tempdir().expect("a folder");
    let output = folder.path().join("out.gguf");
    let mut seed = u64::from(std::process::id());
    for signal in ["INT", "TERM", "KILL"] {
        let stopped = (0..STOPS).filter(|&i| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let within = (seed >> 40) as f64 / f64::from(1 << 24);
            work.stop(&output, signal, work.takes.mul_f64((f64::from(i) + within) / f64::from(STOPS)))
        });
        assert!(stopped.count() > 0, "{signal} always came too late");
    }
    Run::of(&mut work.command(&output)).ok();
    assert!(fs::read(&output).expect("read") == work.whole);
    assert_eq!(names(folder.path()), ["out.gguf"]);
}

fn checkpoint() -> &'static str {
    arg(CHECKPOINT.path())
}

#[test]
fn quantize_is_stopped_at_any_moment() {
    stopped_anywhere(&Work::new(&["quantize", "-q", checkpoint(), "--f32", "--threads", "1", "-o"], &[]));
}

#[test]
fn layout_is_stopped_at_any_moment() {
    let folder = tempdir().expect("a folder");
    let input = folder.path().join("in.gguf");
    Run::of(program().args(["quantize", checkpoint(), "--f32", "-o", arg(&input)])).ok();
    stopped_anywhere(&Work::new(&["layout", "-q", arg(&input)], &["--to", "offload", "--threads", "1"]));
}

#[test]
fn a_file_that_was_there_outlives_a_stop() {
    let work = Work::new(&["quantize", "-q", checkpoint(), "--q8_0", "--force", "-o"], &[]);
    let folder = tempdir().expect("a folder");
    let output = folder.path().join("out.gguf");
    for signal in ["INT", "KILL"] {
        fs::write(&output, "GGUF precious").expect("written");
        let mut child = work.command(&output).stderr(Stdio::null()).spawn().expect("the program starts");
        std::thread::sleep(work.takes / 3);
        let sent = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status();
        sent.expect("kill runs");
        if child.wait().expect("it ends").success() {
            continue;
        }
        assert_eq!(fs::read(&output).expect("read"), b"GGUF precious", "{signal}");
    }
}

/// What writes much, with `{out}` for its output.
fn writers() -> [Vec<String>; 3] {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect();
    let tiny = repo("models/tiny/tiny-q4_0.gguf");
    [
        words(&format!("quantize {} --f32 -o {{out}}", checkpoint())),
        words(&format!("layout {} {{out}} --to offload", tiny.display())),
        words(&format!("logits tiny -o {{out}} --token-ids {}", vec!["5"; 600].join(","))),
    ]
}

#[test]
fn a_limit_of_file_sizes_is_one_error() {
    for writer in writers() {
        let folder = tempdir().expect("a folder");
        let output = folder.path().join("out.gguf");
        let mut command = program();
        let mut limited = Command::new("sh");
        limited.args(["-c", "ulimit -f 2000; exec \"$0\" \"$@\""]).arg(command.get_program());
        for (name, value) in command.stdin(Stdio::null()).get_envs() {
            if let Some(value) = value {
                limited.env(name, value);
            }
        }
        limited.args(writer.iter().map(|word| word.replace("{out}", arg(&output))));
        let failed = Run::of(&mut limited).fails(&["out.gguf", "File too large"]);
        assert!(failed.hint().contains("ulimit -f"));
        assert!(names(folder.path()).is_empty(), "{writer:?}");
    }
}

/// What follows a write that finds no room. The C library stands in for the disk (where it is not a part of the program), which
/// takes no rights: the tests below have a real one, where they may.
#[test]
#[cfg(all(target_os = "linux", target_pointer_width = "64", not(target_feature = "crt-static")))]
fn a_full_disk_is_one_error() {
    /// Has all files of a process together take no more than 1 MB, as a disk would that is full then.
    const FULL_DISK: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_long room = 1000000;

static int full(int file, size_t bytes) {
    struct stat status;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) return 0;
    if (atomic_fetch_sub(&room, bytes) >= (long)bytes) return 0;
    errno = ENOSPC;
    return 1;
}

ssize_t write(int file, const void *data, size_t bytes) {
    return full(file, bytes) ? -1 : syscall(SYS_write, file, data, bytes);
}

ssize_t pwrite64(int file, const void *data, size_t bytes, off64_t at) {
    return full(file, bytes) ? -1 : syscall(SYS_pwrite64, file, data, bytes, at);
}
"#;

    let tools = tempdir().expect("a folder");
    let [source, library] = ["full.c", "full.so"].map(|name| tools.path().join(name));
    fs::write(&source, FULL_DISK).expect("written");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o", arg(&library), arg(&source)]).status();
    assert!(compiled.expect("there is a C compiler").success());
    for writer in writers() {
        let folder = tempdir().expect("a folder");
        let output = folder.path().join("out.gguf");
        let words = writer.iter().map(|word| word.replace("{out}", arg(&output)));
        Run::of(program().env("LD_PRELOAD", &library).args(words)).fails(&["out.gguf", "No space left on device"]);
        assert!(names(folder.path()).is_empty(), "{writer:?}");
    }
}

/// Runs `script` with a small file system at `$1`. Where that takes more rights than there are, it says so on stderr, past
/// the test runner, and gives nothing.
fn on_a_small_disk(size: &str, script: &str, output: &str) -> Option<Run> {
    let folder = tempdir().expect("a folder");
    let disk = arg(folder.path()).to_owned();
    let mut quantize = program();
    quantize
        .args(["quantize", "-q", checkpoint(), "--f32", "--threads", "1", "-o"])
        .arg(PathBuf::from(&disk).join(output));
    let mut command = Command::new("unshare");
    let script = format!("mount -t tmpfs -o size={size} none \"$0\" 2>/dev/null || exit 99\n{script}");
    command.args(["--map-root-user", "--mount", "sh", "-c", &script, &disk]);
    command.arg(quantize.get_program()).args(quantize.get_args());
    let refused = match command.output() {
        Err(error) => format!("unshare: {error}"),
        Ok(ended) => match Run::checked(ended) {
            run if run.status == 99 => "mount: it is not allowed".to_owned(),
            run if run.stderr.starts_with("unshare:") => run.stderr,
            run => return Some(run),
        },
    };
    // What `eprintln!` prints is shown for tests that fail only.
    let (thread, refused) = (std::thread::current(), refused.trim());
    let test = thread.name().unwrap_or("a test");
    let _ = writeln!(io::stderr(), "SKIPPED {test}: no small disk can be made here: {refused}");
    None
}

#[test]
fn a_disk_that_fills_up_on_the_way_is_one_error() {
    // When the first bytes are written, the work is held until somebody else has taken the rest of the disk.
    let script = "
        disk=$0
        \"$@\" & worker=$!
        while [ ! -s \"$disk/.out.gguf.partial\" ] && kill -0 $worker; do sleep 0.005; done
        kill -STOP $worker
        cat /dev/zero > \"$disk/other\" 2>/dev/null
        kill -CONT $worker
        wait $worker; status=$?
        [ \"$(ls -A \"$disk\")\" = other ] || { ls -A \"$disk\" >&2; exit 98; }
        exit $status";
    if let Some(run) = on_a_small_disk("90m", script, "out.gguf") {
        let failed = run.fails(&["out.gguf: not enough disk space", "No space left on device"]);
        assert!(failed.hint().contains("free some space"));
    }
}

#[test]
fn a_disk_that_is_too_small_is_noticed_before_the_first_byte() {
    let script = "disk=$0; \"$@\"; status=$?; [ -z \"$(ls -A \"$disk\")\" ] || exit 98; exit $status";
    if let Some(run) = on_a_small_disk("20m", script, "out.gguf") {
        let failed = run.fails(&["out.gguf: not enough disk space", "are needed", "are free"]);
        assert!(failed.hint().contains("free some space"));
    }
}

/// The same with whatever disk there is, and a checkpoint that takes no room itself: nothing is in it.
#[test]
fn a_model_larger_than_the_disk_is_refused_before_the_first_byte() {
    let folder = tempdir().expect("a folder");
    let disk = rustix::fs::statvfs(folder.path()).expect("a file system");
    // As f32 half as large again as what is free, in rows so long that the vocabulary of no disk is beyond the largest allowed.
    let width = 16 * WIDTH;
    let vocabulary = (disk.f_bavail * disk.f_frsize) as usize / 8 * 3 / width + VOCABULARY;
    let (checkpoint, shapes) = begin_checkpoint(vocabulary, width);
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::to_vec(&header).expect("JSON");
    let mut file = fs::File::create(checkpoint.path().join("model.safetensors")).expect("a file");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("written");
    file.write_all(&header).expect("written");
    file.set_len(8 + header.len() as u64 + end).expect("a file full of holes");

    let output = folder.path().join("out.gguf");
    let refused = Run::of(program().args(["quantize", arg(checkpoint.path()), "--f32", "-o", arg(&output)])).fails(&[
        "out.gguf: not enough disk space",
        "are needed",
        "are free",
    ]);
    assert!(refused.hint().contains("free some space"));
    assert!(names(folder.path()).is_empty());
}
