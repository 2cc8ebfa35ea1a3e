//! The listing of a commit on disk, `trees/<commit>.json`: what tells a whole snapshot from a part, offline.
//!
//! The format is `huggingface_hub`'s (its version 1): each reads what the other wrote.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::HubError;
use crate::api::{Digest, Entry};
use crate::files::write_atomically;

/// The only version there is.
const FORMAT_VERSION: u64 = 1;

#[derive(Serialize, Deserialize)]
struct Tree {
    format_version: u64,
    files: BTreeMap<String, TreeFile>,
}

#[derive(Serialize, Deserialize)]
struct TreeFile {
    size: u64,
    blob_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    xet_hash: Option<String>,
}

fn path(folder: &Path, commit: &str) -> PathBuf {
    folder.join("trees").join(format!("{commit}.json"))
}

/// The listing kept under `folder`; `None` where there is none or where it is of no use.
pub(crate) fn read(folder: &Path, commit: &str) -> Option<BTreeMap<String, Entry>> {
    let text = fs::read(path(folder, commit)).ok()?;
    let tree: Tree = serde_json::from_slice(&text).ok()?;
    if tree.format_version != FORMAT_VERSION {
        return None;
    }
    let entry = |(path, file): (String, TreeFile)| {
        let lfs = file.lfs_sha256.map(|sha256| (sha256, file.lfs_size.unwrap_or(file.size)));
        Some((path.clone(), Entry::checked(path, file.size, file.blob_id, lfs, file.xet_hash)?))
    };
    tree.files.into_iter().map(entry).collect()
}

/// Keeps the listing under `folder`, unless it is there already.
pub(crate) fn write(folder: &Path, commit: &str, entries: &BTreeMap<String, Entry>) -> Result<(), HubError> {
    if read(folder, commit).as_ref() == Some(entries) {
        return Ok(());
    }
    let file = |entry: &Entry| {
        let lfs_sha256 = match &entry.digest {
            Digest::Sha256(hex) => Some(hex.clone()),
            Digest::GitSha1(_) => None,
        };
        TreeFile {
            size: entry.size,
            blob_id: entry.blob_id.clone(),
            lfs_size: lfs_sha256.as_ref().map(|_| entry.size),
            lfs_sha256,
            xet_hash: entry.xet_hash.clone(),
        }
    };
    let files = entries.iter().map(|(path, entry)| (path.clone(), file(entry))).collect();
    let target = path(folder, commit);
    let failed = HubError::io("write", &target);
    let text = serde_json::to_vec_pretty(&Tree { format_version: FORMAT_VERSION, files });
    write_atomically(&target, &text.map_err(|e| failed(e.into()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_nonsense_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let commit = "0123456789012345678901234567890123456789";
        assert_eq!(read(folder.path(), commit), None);
        let (sha1, sha256) = ("a".repeat(40), "b".repeat(64));
        let entries: BTreeMap<_, _> = [
            Entry::checked("c.json".into(), 3, sha1.clone(), None, None),
            Entry::checked("m.safetensors".into(), 130, sha1, Some((sha256.clone(), 9)), Some(sha256)),
        ]
        .into_iter()
        .map(|e| e.unwrap())
        .map(|e| (e.path.clone(), e))
        .collect();
        write(folder.path(), commit, &entries).unwrap();
        assert_eq!(read(folder.path(), commit), Some(entries));
        let file = path(folder.path(), commit);
        for nonsense in [
            "",
            "{\"format_version\":2,\"files\":{}}",
            "{\"format_version\":1,\"files\":{\"x\":{\"size\":1,\"blob_id\":\"../../x\"}}}",
        ] {
            fs::write(&file, nonsense).unwrap();
            assert_eq!(read(folder.path(), commit), None, "{nonsense}");
        }
    }
}
