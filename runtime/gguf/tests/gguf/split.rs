//! Files in parts are read as one, whichever part is named, or the one that is missing is.

use std::path::{Path, PathBuf};

use st_gguf::{GgmlType, GgufError, GgufFile, Metadata, Value};

use crate::common::{counting, spec, write};

/// Writes part `number` of `count` with one tensor of `bytes` bytes.
fn part(dir: &Path, number: u16, count: u16, bytes: u64) -> PathBuf {
    let path = dir.join(format!("m-{number:05}-of-{count:05}.gguf"));
    let mut metadata = Metadata::new();
    if number == 1 {
        metadata.insert("general.architecture", "smallthinker");
        metadata.insert("split.tensors.count", i32::from(count));
    }
    metadata.insert("split.no", number - 1);
    metadata.insert("split.count", count);
    write(&path, &metadata, &[spec(&format!("t{number}"), &[bytes], GgmlType::I8)], 32);
    path
}

fn refused(path: &Path, parts: &[&str]) {
    let message = GgufFile::open(path).unwrap_err().to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
}

#[test]
fn any_part_opens_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (1..=3).map(|number| part(dir.path(), number, 3, 100 + u64::from(number))).collect();
    for path in &paths {
        let file = GgufFile::open(path).unwrap();
        assert_eq!(file.header.metadata.str("general.architecture").unwrap(), Some("smallthinker"));
        assert!(file.header.metadata.get("split.count").is_none(), "what was joined is no part");
        let starts: Vec<u64> = file.source.parts().iter().map(|part| part.start).collect();
        assert_eq!((starts.len(), starts[0], starts[1] % 4096), (3, 0, 0));
        assert_eq!(file.header.file_len, file.source.len());
        for number in 1..=3 {
            let tensor = file.header.tensor(&format!("t{number}")).unwrap();
            assert_eq!(file.read_tensor(tensor).unwrap(), counting(100 + number), "t{number}");
        }
        let mut all = vec![0xff; file.source.len() as usize];
        file.source.read_exact_at(&mut all, 0).unwrap();
        assert_eq!((&all[..4], &all[starts[1] as usize..][..4]), (&b"GGUF"[..], &b"GGUF"[..]), "across the parts");
    }
}

#[test]
fn a_part_without_the_others_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let first = part(dir.path(), 1, 2, 8);
    refused(&first, &["part 1 of 2", "m-00002-of-00002.gguf is not there"]);
    let renamed = dir.path().join("renamed.gguf");
    std::fs::rename(&first, &renamed).unwrap();
    refused(&renamed, &["part 1 of 2"]);
    // Who reads a part by other ways is told when a model is looked for.
    let bytes = std::fs::read(&renamed).unwrap().leak();
    let error = GgufFile::from_static(bytes).unwrap().header.model_shape().unwrap_err();
    assert!(matches!(error, GgufError::SplitPart { number: 1, count: 2, .. }), "{error}");
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (part(dir.path(), 1, 2, 8), part(dir.path(), 2, 2, 8));
    std::fs::copy(&first, &second).unwrap();
    refused(&first, &["m-00002-of-00002.gguf", "is not part 2 of 2"]);

    let mut metadata = Metadata::new();
    metadata.insert("split.no", Value::U16(1));
    metadata.insert("split.count", Value::U16(2));
    write(&second, &metadata, &[spec("t1", &[8], GgmlType::I8)], 32);
    refused(&first, &["tensor `t1` appears twice"]);
    write(&second, &metadata, &[spec("a", &[8], GgmlType::I8), spec("b", &[8], GgmlType::I8)], 32);
    refused(&first, &["hold 3 tensors", "says 2"]);
}
