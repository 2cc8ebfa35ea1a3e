//! Tells the program which commit it was built from.

use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-env-changed=ST_TOOL_COMMIT");
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    println!("cargo::rerun-if-changed=build.rs");
    let told = env::var("ST_TOOL_COMMIT").ok().filter(|commit| !commit.is_empty());
    let release = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = match told.or_else(packaged).or_else(checked_out) {
        Some(commit) => format!("{release} ({})", commit.get(..10).unwrap_or(&commit)),
        None => release,
    };
    println!("cargo::rustc-env=ST_TOOL_VERSION={version}");
}

/// The commit that `cargo package` wrote into the crate.
fn packaged() -> Option<String> {
    let info = fs::read_to_string(".cargo_vcs_info.json").ok()?;
    let (_, rest) = info.split_once("\"sha1\": \"")?;
    rest.split('"').next().map(String::from)
}

/// The commit of this checkout: a repository around an unpacked archive is not ours.
fn checked_out() -> Option<String> {
    let root = fs::canonicalize(git(&["rev-parse", "--show-toplevel"])?).ok()?;
    let here = fs::canonicalize(env::var_os("CARGO_MANIFEST_DIR")?).ok()?;
    if root == here { git(&["rev-parse", "HEAD"]) } else { None }
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}
