//! Files: reads and writes at a position, without the page cache, and what a system knows of names and disks.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::os;

/// What the page cache is told about a part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// It is read in no order: reading ahead is wasted.
    Random,
    /// It is not needed again: clean pages may go, dirty ones start on their way to the disk.
    DontNeed,
}

/// Reads at `offset` without moving a cursor; returns how many bytes came, 0 at the end of the file.
///
/// # Errors
/// What the system reports.
pub fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    os::read_at(file, buf, offset)
}

/// Fills `buf` from `offset` on.
///
/// # Errors
/// `UnexpectedEof` where the file ends before; otherwise what the system reports.
pub fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match os::read_at(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `buf` at `offset`.
///
/// # Errors
/// `WriteZero` where the system takes no more; otherwise what it reports.
pub fn write_all_at(file: &File, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match os::write_at(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                buf = &buf[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Opens `path` for reads past the page cache. Offsets, lengths and memory have to be whole pages then ([`crate::PAGE`]).
///
/// # Errors
/// `Unsupported` where the system has no such reads; otherwise what it reports. Some file systems accept the flag and refuse
/// the first read.
pub fn open_uncached(path: &Path) -> io::Result<File> {
    os::open_uncached(path)
}

/// Tells the page cache about `range` of `file`; an empty range is the whole file. It is a hint: nothing happens where it is refused.
pub fn advise(file: &File, range: Range<u64>, advice: Advice) {
    os::advise(file, range, advice);
}

/// Whether both are the same file, under whatever names. Where the system cannot tell they are taken for different ones.
pub fn same_file(a: &File, b: &File) -> bool {
    os::same_file(a, b)
}

/// Bytes that an ordinary user can still write to the file system of the folder `dir`; `None` where it does not say.
///
/// # Errors
/// What the system reports, such as that `dir` does not exist.
pub fn free_space(dir: &Path) -> io::Result<Option<u64>> {
    os::free_space(dir)
}

/// Bytes that a file takes on the disk, holes not counted; `None` where the system does not say.
pub fn allocated(file: &File) -> Option<u64> {
    os::allocated(file)
}

/// Renames `from` to `to`, but never over something that exists.
///
/// # Errors
/// `AlreadyExists` where the name is taken; otherwise what the system reports.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    if os::rename_new(from, to)? {
        return Ok(());
    }
    // Between the look and the rename somebody may take the name: the best that is left.
    if std::fs::symlink_metadata(to).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    std::fs::rename(from, to)
}

/// Makes a folder, and those above it, where they are not there: for its owner alone, where the system knows owners.
///
/// # Errors
/// What the system says.
pub fn create_private_folder(dir: &Path) -> io::Result<()> {
    os::create_private_folder(dir)
}

/// Makes the names in the folder `dir` survive a power failure, as far as its file system can.
///
/// # Errors
/// What the system reports of a disk that fails.
pub fn sync_folder(dir: &Path) -> io::Result<()> {
    os::sync_folder(dir)
}

/// Makes `link` a link to `target`, a path as seen from the folder that `link` is in.
///
/// # Errors
/// `AlreadyExists` where the name is taken, `Unsupported` where there are no such links; otherwise what the system reports.
pub fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    os::symlink(target, link)
}

/// What is behind `prefix` in a text of the system's own encoding.
pub fn strip_prefix<'a>(text: &'a OsStr, prefix: &str) -> Option<&'a OsStr> {
    os::strip_prefix(text, prefix)
}

/// The path next to `path` whose name has `prefix` and `suffix` around it, for what is to become `path`.
///
/// Names have at most 255 bytes, on encrypted file systems 143. Where that may be too few, the end of the name gives way to a
/// number made of all of it, the same in every build.
pub fn beside(path: &Path, prefix: &str, suffix: &str) -> PathBuf {
    const LONGEST: usize = 143;
    let name = path.file_name().unwrap_or_default();
    if prefix.len() + name.len() + suffix.len() <= LONGEST {
        let mut whole = OsString::from(prefix);
        whole.push(name);
        whole.push(suffix);
        return path.with_file_name(whole);
    }
    // FNV-1a.
    let bytes = name.as_encoded_bytes().iter();
    let number =
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    let suffix = format!("-{number:016x}{suffix}");
    let name = name.to_string_lossy();
    let room = name.floor_char_boundary(LONGEST.saturating_sub(prefix.len() + suffix.len()));
    path.with_file_name(format!("{prefix}{}{suffix}", &name[..room]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_at_a_place_is_read_there_and_the_end_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        write_all_at(&file, b"abcdef", 10).unwrap();
        let mut buf = [0; 6];
        read_exact_at(&file, &mut buf, 10).unwrap();
        assert_eq!(&buf, b"abcdef");
        assert_eq!(read_exact_at(&file, &mut buf, 12).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(read_at(&file, &mut buf, 12).unwrap(), 4);
        assert_eq!(read_at(&file, &mut buf, 99).unwrap(), 0);
    }

    #[test]
    fn names_beside_others_are_never_too_long_and_never_the_same() {
        assert_eq!(beside(Path::new("a/b.gguf"), ".", ".partial"), Path::new("a/.b.gguf.partial"));
        let dir = tempfile::tempdir().unwrap();
        for name in ["a".repeat(255), format!("{}b", "a".repeat(254)), "é".repeat(127), "a".repeat(247)] {
            let beside = beside(&dir.path().join(&name), ".", ".partial");
            let text = beside.file_name().unwrap().to_str().unwrap();
            assert!(text.len() <= 143 && text.starts_with('.') && text.ends_with(".partial"), "{text}");
            File::create_new(&beside).unwrap();
        }
    }

    #[test]
    fn a_rename_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&b, "b").unwrap();
        assert_eq!(rename_new(&a, &b).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&b).unwrap(), b"b");
        rename_new(&a, &c).unwrap();
        assert!(!a.exists() && c.exists());
        sync_folder(dir.path()).unwrap();
        assert_eq!(rename_new(&a, &dir.path().join("d")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn advice_and_free_space_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 10_000]).unwrap();
        let file = File::open(&path).unwrap();
        for range in [0..0, 0..10_000, 4096..8192, 5..u64::MAX] {
            advise(&file, range.clone(), Advice::Random);
            advise(&file, range, Advice::DontNeed);
        }
        let mut buf = vec![0; 10_000];
        read_exact_at(&file, &mut buf, 0).unwrap();
        assert!(buf.iter().all(|&b| b == 7));
        assert!(free_space(&dir.path().join("missing")).is_err() || cfg!(not(unix)));
        assert!(free_space(dir.path()).unwrap().is_none_or(|bytes| bytes > 0));
    }

    #[cfg(unix)]
    #[test]
    fn one_file_is_one_file_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, other, link] = ["a", "b", "other", "link"].map(|name| dir.path().join(name));
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&other, "a").unwrap();
        std::fs::hard_link(&a, &b).unwrap();
        std::os::unix::fs::symlink(&a, &link).unwrap();
        let open = |path| File::open(path).unwrap();
        assert!(same_file(&open(&a), &open(&b)) && same_file(&open(&a), &open(&link)));
        assert!(!same_file(&open(&a), &open(&other)));
    }
}
