//! Running the program as a person would, and what every run must keep to.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// The program, in a clean environment: nothing of the machine's hub cache, no network.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_st-tool"));
    for name in ["HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "NO_COLOR", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    // No folder can be made there.
    command.env("ST_TOOL_HOME", "/dev/null/st-tool");
    command.env("HF_HOME", "/nonexistent/hf").env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
    command
}

/// Runs the program and checks what holds for every run: it ended by itself, without a panic, and coloured nothing
/// that is not a terminal.
pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    Run::of(program().args(args))
}

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Run {
    /// Exit status.
    pub(crate) status: i32,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Run {
    /// Runs a prepared command.
    pub(crate) fn of(command: &mut Command) -> Self {
        Self::checked(command.output().expect("the program starts"))
    }

    /// Checks what a run gave.
    pub(crate) fn checked(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        let status = output.status.code().unwrap_or_else(|| panic!("ended by a signal: {}\n{stderr}", output.status));
        assert!(!stderr.contains("panicked"), "{stderr}");
        assert!(!stderr.contains('\x1b') && !stdout.contains('\x1b'), "colours without a terminal: {stderr}");
        Self { status, stdout, stderr }
    }

    /// It worked; the output.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.status, 0, "{}", self.stderr);
        self.stdout
    }

    /// It failed with exit status 1, one line of error that contains all of `parts`, perhaps one hint, and no output.
    #[track_caller]
    pub(crate) fn fails(self, parts: &[&str]) -> Self {
        assert_eq!(self.status, 1, "{}{}", self.stdout, self.stderr);
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let [error] = errors.as_slice() else { panic!("not one error:\n{}", self.stderr) };
        for line in self.stderr.lines() {
            let known = ["error: ", "hint: ", "note: ", "memory: "].iter().any(|prefix| line.starts_with(prefix));
            assert!(known, "{line:?}");
        }
        for part in parts {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
        assert_eq!(self.stdout, "", "an error is no output");
        self
    }

    /// The arguments were wrong: exit status 2 and clap's message.
    #[track_caller]
    pub(crate) fn misused(self, part: &str) {
        assert_eq!(self.status, 2, "{}{}", self.stdout, self.stderr);
        assert!(self.stderr.contains(part), "{:?} lacks {part:?}", self.stderr);
        assert_eq!(self.stdout, "");
    }

    /// The hint.
    #[track_caller]
    pub(crate) fn hint(&self) -> &str {
        let hint = self.stderr.lines().find_map(|line| line.strip_prefix("hint: "));
        hint.unwrap_or_else(|| panic!("no hint: {}", self.stderr))
    }
}

/// A `--memory` little above the least that works for `model`.
pub(crate) fn little_memory(model: &str) -> String {
    little_memory_for(&["run", model, "-p", "x"])
}

/// Options for a run of a short text with so little memory that experts come and go: its context has none to lend.
pub(crate) fn short_of_memory(model: &str) -> Vec<String> {
    let memory = little_memory_for(&["run", model, "-p", "x", "--ctx", "256"]);
    ["--ctx", "256", "--memory", &memory].map(str::to_owned).to_vec()
}

fn little_memory_for(args: &[&str]) -> String {
    let refused = run([args, &["--memory", "1MiB"]].concat()).fails(&["needs at least"]);
    let least = refused.stderr.split("needs at least ").nth(1).and_then(|rest| rest.split(' ').next());
    (least.expect("bytes").parse::<u64>().expect("a number") + (1 << 19)).to_string()
}

/// Asks until it is so, in short steps, so that a pause of the whole machine counts as one.
#[track_caller]
pub(crate) fn patiently(mut is_so: impl FnMut() -> bool) {
    let step = Duration::from_millis(5);
    assert!(
        (0..60_000).any(|_| is_so() || {
            std::thread::sleep(step);
            false
        }),
        "it never was"
    );
}

/// The names in a folder, sorted, hidden ones too.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
