//! Bits that flip after a file was written: whatever reads them says so, and what nobody reads harms nobody.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use st_convert::{Layout, WeightType};
use st_gguf::{ExpertIndex, GgufFile, Matrix};
use tempfile::{TempDir, tempdir};

use crate::common::{converted, repo};
use crate::program::{Run, arg, names, run};

/// Some bits to flip, and what an error about them says.
struct Flips {
    offsets: Vec<u64>,
    says: &'static str,
}

/// The bundled model's file of a type and layout with bits flipped, in a folder of its own.
fn flipped(ty: WeightType, layout: Layout, offsets: &[u64]) -> (TempDir, PathBuf) {
    let mut bytes = fs::read(converted(&repo("models/tiny/checkpoint"), ty, layout)).expect("a model");
    for &offset in offsets {
        bytes[offset as usize] ^= 0x10;
    }
    let folder = tempdir().expect("a folder");
    let path = folder.path().join("m.gguf");
    fs::write(&path, bytes).expect("written");
    (folder, path)
}

fn header(ty: WeightType, layout: Layout) -> (GgufFile, ExpertIndex) {
    let file = GgufFile::open(converted(&repo("models/tiny/checkpoint"), ty, layout)).expect("a model");
    let index = ExpertIndex::from_header(&file.header, &file.header.model_shape().expect("a shape")).expect("experts");
    (file, index)
}

/// A byte `at` bytes into a tensor.
fn in_tensor(file: &GgufFile, name: &str, at: u64) -> Vec<u64> {
    vec![file.header.tensor(name).expect("a tensor").offset + at]
}

/// One flip in each kind of region of a file. Of layer 0 every expert has its flip, so that any prompt meets one.
fn kinds(ty: WeightType, layout: Layout) -> Vec<Flips> {
    let (file, index) = header(ty, layout);
    let mut kinds = vec![
        Flips { offsets: in_tensor(&file, "token_embd.weight", 70_000), says: "`token_embd.weight`" },
        Flips { offsets: in_tensor(&file, "blk.7.attn_k.weight", 1), says: "`blk.7.attn_k.weight`" },
        Flips { offsets: in_tensor(&file, "output_norm.weight", 4), says: "`output_norm.weight`" },
    ];
    // A scale comes first in a block, its weights after it.
    for (matrix, at, says) in
        [(Matrix::Gate, 0, "gate matrix"), (Matrix::Up, 5, "up matrix"), (Matrix::Down, 1000, "down matrix")]
    {
        let offsets = (0..16).map(|expert| index.matrix(0, expert, matrix).offset + at).collect();
        let says = if layout == Layout::Gguf { says } else { "of layer 0" };
        kinds.push(Flips { offsets, says });
    }
    kinds
}

fn answers(path: &Path, options: &[&str]) -> Run {
    run([&["run", arg(path), "--raw", "-p", "Once upon a time", "-n", "2", "--temp", "0", "-q"], options].concat())
}

#[test]
fn whoever_reads_a_flipped_bit_names_it() {
    for layout in [Layout::Gguf, Layout::Offload] {
        for Flips { offsets, says } in kinds(WeightType::Q4_0, layout) {
            let (folder, path) = flipped(WeightType::Q4_0, layout, &offsets);
            for options in [&[][..], &["--memory", "48MiB"]] {
                let said = answers(&path, options).fails(&["m.gguf", "damaged", "at byte", says]);
                assert!(said.hint().contains("again"));
            }
            let out = folder.path().join("l.safetensors");
            let reference = run(["logits", arg(&path), "--token-ids", "1", "--reference", "-o", arg(&out)]);
            assert!(reference.fails(&["m.gguf", "damaged", "at byte"]).hint().contains("again"));
            let (out, to) = match layout {
                Layout::Gguf => ("o.gguf", "offload"),
                Layout::Offload => ("g.gguf", "gguf"),
            };
            let out = folder.path().join(out);
            assert!(run(["layout", arg(&path), arg(&out), "--to", to]).fails(&["damaged"]).hint().contains("again"));
            let checked = run(["inspect", "--check", arg(&path)]).fails(&["m.gguf", "damaged"]);
            assert!(checked.hint().contains("again"));
            let listed = run(["inspect", "--check", "--json", arg(&path)]);
            assert_eq!(listed.status, 1);
            let listed: Value = serde_json::from_str(&listed.stdout).expect("JSON");
            let damaged = listed["check"]["checksums"]["damaged"].as_array().expect("a list");
            assert_eq!(damaged.len(), offsets.len());
            assert_eq!(names(folder.path()), ["m.gguf"]);
        }
    }
}

#[test]
fn a_conversion_refuses_a_flipped_bit() {
    for Flips { offsets, .. } in kinds(WeightType::Q8_0, Layout::Gguf) {
        let (folder, path) = flipped(WeightType::Q8_0, Layout::Gguf, &offsets);
        for layout in ["gguf", "offload"] {
            let out = folder.path().join("o.gguf");
            let refused = run(["quantize", arg(&path), "--q4_0", "--layout", layout, "-o", arg(&out)]);
            assert!(refused.fails(&["m.gguf", "damaged", "at byte"]).hint().contains("again"));
        }
        assert_eq!(names(folder.path()), ["m.gguf"]);
    }
}

#[test]
fn a_whole_file_is_right_and_padding_is_nobodys() {
    for layout in [Layout::Gguf, Layout::Offload] {
        let (file, _) = header(WeightType::Q4_0, layout);
        let ends = file.header.tensors.iter().map(|tensor| tensor.offset + tensor.n_bytes);
        let padding: Vec<u64> = ends.filter(|end| end % 4096 != 0).collect();
        assert!(!padding.is_empty());
        let (_folder, path) = flipped(WeightType::Q4_0, layout, &padding);
        let right = run(["inspect", "--check", arg(&path)]).ok();
        let parts = if layout == Layout::Gguf { 58 + 8 * 3 * 16 } else { 58 + 8 * 16 };
        assert!(right.contains(&format!("checksums: {parts} of {parts} parts are right")), "{right}");
        assert_eq!(answers(&path, &[]).ok(), answers(Path::new("tiny"), &[]).ok());
    }
}

/// Files of other programs have no checksums. They run as they are, and `inspect --check` says that it cannot tell.
#[test]
fn a_file_without_checksums_is_taken_as_it_is() {
    let (_folder, path) = crate::reject::altered_without_checksums();
    assert_eq!(answers(&path, &[]).ok(), answers(Path::new("tiny"), &[]).ok());
    run(["inspect", "--check", arg(&path)]).fails(&["cannot be checked", "no checksums"]).hint();
    // One that is made of it has some.
    let out = path.with_file_name("o.gguf");
    run(["layout", arg(&path), arg(&out), "--to", "offload"]).ok();
    run(["inspect", "--check", arg(&out)]).ok();
}

/// What the hub's cache calls a file is the SHA-256 of its content.
#[test]
fn a_file_of_the_hubs_cache_is_compared_with_the_hubs_sum() {
    use sha2::{Digest as _, Sha256};
    let (_folder, plain) = crate::reject::altered_without_checksums();
    let bytes = fs::read(&plain).expect("a model");
    let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let cache = tempdir().expect("a folder");
    let blobs = cache.path().join("models--owner--name").join("blobs");
    fs::create_dir_all(&blobs).expect("created");
    let path = blobs.join(&sum);
    fs::write(&path, &bytes).expect("written");
    assert!(run(["inspect", "--check", arg(&path)]).ok().contains(&format!("SHA-256 {sum} is the hub's")));
    let mut flipped = bytes;
    *flipped.last_mut().expect("bytes") ^= 1;
    fs::write(&path, &flipped).expect("written");
    run(["inspect", "--check", arg(&path)]).fails(&["is damaged", "the hub states", &sum]).hint();
}
