//! What a file that is written needs of the system: who may write where, what a name stands for, permissions that are handed on.

use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

use crate::os;

/// Whether both names are one file, by links of either sort too. Where the system cannot tell they are taken for different ones.
pub fn same_path(a: &Path, b: &Path) -> bool {
    os::same_path(a, b)
}

/// Whether `path` itself, and not what a link there leads to, is the file that is open as `file`.
///
/// # Errors
/// `NotFound` where nothing is there; otherwise what the system reports.
pub fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    os::is_named(file, path)
}

/// Whether files can be made in `folder`, as far as that can be told beforehand.
///
/// # Errors
/// What is in the way.
pub fn may_write_into(folder: &Path) -> io::Result<()> {
    os::may_write_into(folder)
}

/// Whether the system shows devices, or processes and their open files, in `folder`: links there are no files.
pub fn shows_processes(folder: &Path) -> bool {
    os::shows_processes(folder)
}

/// Opens `path` for reading and writing, created where it is missing, not emptied. A link in its place is refused where the system can
/// tell, so that what is written goes nowhere else, and a pipe does not hold it up. What replaces `existing` is never open to more
/// people than that.
///
/// # Errors
/// What the system reports.
pub fn create_claimable(path: &Path, existing: Option<&Metadata>) -> io::Result<File> {
    let file = os::create_claimable(path, existing)?;
    if let Some(existing) = existing {
        os::restrict(&file, existing)?;
    }
    Ok(file)
}

/// Gives `file` the permissions of the one that it replaces, and its owner where that is allowed.
///
/// # Errors
/// What the system reports.
pub fn inherit(file: &File, existing: &Metadata) -> io::Result<()> {
    os::inherit(file, existing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_from_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
        let file = create_claimable(&a, None).unwrap();
        assert!(is_named(&file, &a).unwrap() && same_path(&a, &a));
        assert_eq!(is_named(&file, &b).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&b, "b").unwrap();
        assert!(!is_named(&file, &b).unwrap() && !same_path(&a, &b));
        may_write_into(dir.path()).unwrap();
        assert!(!shows_processes(dir.path()));
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_written_through_and_permissions_are_handed_on() {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};

        let dir = tempfile::tempdir().unwrap();
        let [a, link, new] = ["a", "link", "new"].map(|name| dir.path().join(name));
        std::fs::write(&a, "a").unwrap();
        symlink(&a, &link).unwrap();
        assert!(create_claimable(&link, None).is_err());
        assert!(same_path(&a, &link) && !is_named(&File::open(&a).unwrap(), &link).unwrap());
        std::fs::set_permissions(&a, PermissionsExt::from_mode(0o640)).unwrap();
        std::fs::write(&new, "").unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o666)).unwrap();
        let existing = a.metadata().unwrap();
        let file = create_claimable(&new, Some(&existing)).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o640);
        std::fs::set_permissions(&a, PermissionsExt::from_mode(0o604)).unwrap();
        inherit(&file, &a.metadata().unwrap()).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o604);
        assert_eq!(std::fs::read(&a).unwrap(), b"a");
    }
}
