//! Small things done with files: folders above them, sizes, and contents that appear at once.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::HubError;

/// Free bytes on the disk that `path` is on or will be created on; `None` where the system does not say.
pub(crate) fn free_space(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists()).filter(|p| !p.as_os_str().is_empty());
    st_sys::free_space(existing.unwrap_or(Path::new("."))).ok().flatten()
}

/// Whether there is a file of that size. Links are followed.
pub(crate) fn has_size(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == size)
}

pub(crate) fn create_parent(path: &Path) -> Result<(), HubError> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(HubError::io("create", folder)),
        None => Ok(()),
    }
}

/// Writes a small file so that readers see the old or the new one, never a part.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), HubError> {
    create_parent(path)?;
    let beside = beside(path);
    let write = || {
        File::create(&beside)?.write_all(content)?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&beside);
        HubError::Io { action: "write", path: path.to_owned(), source }
    })
}

/// A name next to `path` that no other process and no other thread uses.
pub(crate) fn beside(path: &Path) -> PathBuf {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    st_sys::beside(path, "", &format!(".{}-{number}.tmp", std::process::id()))
}
