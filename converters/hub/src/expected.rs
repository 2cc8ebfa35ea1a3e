//! What a file that was fetched from the hub should contain, as far as the disk knows.
//!
//! Three places tell: the name of a blob in the cache, the listing kept beside a snapshot that holds files and not
//! links, and the notes of a plain folder. Nothing here reads the file itself.

use std::fs;
use std::path::Path;

use crate::api::Digest;
use crate::cache::recorded_etag;
use crate::names::{is_commit, is_hex};
use crate::trees;

/// The SHA-256 that the hub states for a file of its cache or of a folder that was downloaded into, in hexadecimal.
///
/// `path` is the file or a link to it. `None` where nothing is known: for a file from elsewhere, for one that was changed
/// after it was fetched, and for a small one, of which the hub states git's hash instead.
pub fn expected_sha256(path: &Path) -> Option<String> {
    let real = fs::canonicalize(path).ok()?;
    of_blob(&real).or_else(|| of_snapshot(&real)).or_else(|| of_plain_folder(&real)).filter(|hex| is_hex(hex, 64))
}

/// `models--OWNER--NAME/blobs/HASH`.
fn of_blob(path: &Path) -> Option<String> {
    let blobs = path.parent().filter(|folder| folder.ends_with("blobs"))?;
    let is_repository = blobs.parent()?.file_name()?.to_str()?.starts_with("models--");
    path.file_name()?.to_str().filter(|_| is_repository).map(str::to_owned)
}

/// `models--OWNER--NAME/snapshots/COMMIT/PATH`, on a file system without links.
fn of_snapshot(path: &Path) -> Option<String> {
    path.ancestors().skip(1).find_map(|folder| {
        let commit = folder.file_name()?.to_str().filter(|name| is_commit(name))?;
        let repository = folder.parent().filter(|parent| parent.ends_with("snapshots"))?.parent()?;
        let entries = trees::read(repository, commit)?;
        match &entries.get(path.strip_prefix(folder).ok()?.to_str()?)?.digest {
            Digest::Sha256(hex) => Some(hex.clone()),
            Digest::GitSha1(_) => None,
        }
    })
}

/// A file in, or somewhere under, a folder with notes.
fn of_plain_folder(path: &Path) -> Option<String> {
    path.ancestors().skip(1).find_map(|folder| recorded_etag(folder, path.strip_prefix(folder).ok()?.to_str()?))
}
