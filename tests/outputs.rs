//! What the program writes, and what it must never write over.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use tempfile::tempdir;

use crate::common::repo;
use crate::program::{Run, arg, names, program, run};

/// Every verb that writes a file, with all that lets it replace one; `{out}` is the file.
fn writers() -> Vec<Vec<String>> {
    let tiny = repo("models/tiny/tiny-q4_0.gguf");
    [
        format!("quantize {} --q4_0 --force -o {{out}}", repo("models/tiny/checkpoint").display()),
        format!("layout {} {{out}} --to offload --force", tiny.display()),
        "logits tiny --token-ids 1,2 --force -o {out}".to_owned(),
        "run tiny -p x -n 2 --record-routing {out}".to_owned(),
        "run --record-routing {out} -p x -n 2".to_owned(),
        "bench tiny -p 2 -n 2 -r 1 --record-routing {out}".to_owned(),
    ]
    .iter()
    .map(|line| line.split(' ').map(str::to_owned).collect())
    .collect()
}

fn write(writer: &[String], output: &Path) -> Run {
    run(writer.iter().map(|word| word.replace("{out}", arg(output))))
}

#[test]
fn a_file_of_another_kind_is_never_replaced() {
    let folder = tempdir().expect("a folder");
    let file = folder.path().join("file");
    let checkpoint = repo("models/tiny/checkpoint");
    let weights = names(&checkpoint).into_iter().find(|name| name.ends_with(".safetensors")).expect("weights");
    let kinds = [
        b"some text".to_vec(),
        b"{\"messages\": []}".to_vec(),
        fs::read(repo("models/tiny/tiny-q4_0.gguf")).expect("read"),
        fs::read(checkpoint.join(weights)).expect("read"),
    ];
    for writer in writers() {
        for content in &kinds {
            if content.starts_with(b"GGUF") && ["quantize", "layout"].contains(&writer[0].as_str()) {
                continue;
            }
            fs::write(&file, content).expect("written");
            let refused = write(&writer, &file).fails(&[arg(&file), "exists and is not", "left as it is"]);
            assert!(refused.hint().contains("another file"), "{writer:?}");
            assert!(fs::read(&file).expect("read") == *content, "{writer:?}");
        }
        // One of its own kind may be, and keeps who may read it; so may an empty one.
        fs::write(&file, "").expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set");
        for _ in 0..2 {
            write(&writer, &file).ok();
            assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600, "{writer:?}");
        }
        assert_eq!(names(folder.path()), ["file"]);
        fs::remove_file(&file).expect("removed");
    }
}

#[test]
fn what_is_no_file_of_its_own_is_no_output() {
    let folder = tempdir().expect("a folder");
    let [link, dash, fifo] = ["link", "-", "fifo"].map(|name| folder.path().join(name));
    symlink("/proc/self/fd/1", &link).expect("a link");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    for writer in writers() {
        write(&writer, Path::new("-")).fails(&["not to stdout"]).hint();
        write(&writer, Path::new("/dev/null")).fails(&["/dev/null", "not a regular file"]);
        write(&writer, folder.path()).fails(&["not a regular file"]);
        write(&writer, &fifo).fails(&["fifo", "not a regular file"]);
        // Where stdout is a file, the link leads to one.
        let stdout = fs::File::create(folder.path().join("stdout")).expect("a file");
        let words = writer.iter().map(|word| word.replace("{out}", arg(&link)));
        Run::of(program().args(words).stdout(stdout)).fails(&["open file of a process"]);
        assert!(link.is_symlink());
    }
    assert!(!dash.exists());
    assert_eq!(names(folder.path()), ["fifo", "link", "stdout"]);
}

#[test]
fn long_names_and_what_a_killed_process_left() {
    let folder = tempdir().expect("a folder");
    for writer in writers() {
        for name in ["n".repeat(255), "n".repeat(247)] {
            write(&writer, &folder.path().join(&name)).ok();
            assert_eq!(names(folder.path()), [name.as_str()]);
            fs::remove_file(folder.path().join(name)).expect("removed");
        }
        fs::write(folder.path().join(".out.partial"), "half of something").expect("written");
        write(&writer, &folder.path().join("out")).ok();
        assert_eq!(names(folder.path()), ["out"], "{writer:?}");
        fs::remove_file(folder.path().join("out")).expect("removed");
    }
}

#[test]
fn the_input_is_no_output() {
    let folder = tempdir().expect("a folder");
    let [file, hard, soft] = ["file.gguf", "hard.gguf", "soft.gguf"].map(|name| folder.path().join(name));
    fs::copy(repo("models/tiny/tiny-q4_0.gguf"), &file).expect("copied");
    fs::hard_link(&file, &hard).expect("a link");
    symlink("file.gguf", &soft).expect("a link");
    let before = fs::read(&file).expect("read");
    for output in [&file, &hard, &soft] {
        run(["layout", arg(&file), arg(output), "--to", "offload", "--force"]).fails(&["is the file that is read"]);
        run(["quantize", arg(&file), "--q8_0", "-o", arg(output), "--force"]).fails(&["is the file that is read"]);
    }
    assert!(fs::read(&file).expect("read") == before);
}
