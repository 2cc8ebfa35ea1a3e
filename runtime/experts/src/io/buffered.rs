//! Reads through the page cache, and reads from bytes that are in memory anyway.

#![allow(unsafe_code)]

use super::ExpertIo;
use st_gguf::ReadAt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file read through the page cache.
#[derive(Debug)]
pub struct BufferedIo {
    file: File,
    path: PathBuf,
    /// Whether what was read is dropped from the page cache at once.
    leave_nothing: bool,
}

impl BufferedIo {
    /// Opens `path`. With `leave_nothing` the page cache is not left with what was read: under a budget it would compete
    /// with the expert cache for the same memory.
    ///
    /// # Errors
    /// What the system reports.
    pub fn open(path: &Path, leave_nothing: bool) -> io::Result<Self> {
        let io = Self { file: File::open(path)?, path: path.to_owned(), leave_nothing };
        if leave_nothing {
            // Without this the kernel reads ahead of every matrix, into pages that are dropped unused.
            io.advise(0..0, Advice::Random);
        }
        Ok(io)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Takes `range` out of the page cache, as far as it is clean and in nobody's use.
    pub(super) fn forget(&self, range: Range<u64>) {
        self.advise(range, Advice::DontNeed);
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn advise(&self, range: Range<u64>, advice: Advice) {
        use std::os::fd::AsRawFd;
        let advice = match advice {
            Advice::Random => libc::POSIX_FADV_RANDOM,
            Advice::DontNeed => libc::POSIX_FADV_DONTNEED,
        };
        if let (Ok(start), Ok(len)) = (range.start.try_into(), (range.end - range.start).try_into()) {
            // SAFETY: the descriptor is open as long as `self.file` lives, and the call touches no memory of ours. It is
            // advice: a refusal changes nothing.
            unsafe { libc::posix_fadvise(self.file.as_raw_fd(), start, len, advice) };
        }
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn advise(&self, _range: Range<u64>, _advice: Advice) {}
}

/// What the page cache is told. An empty range means the whole file.
enum Advice {
    Random,
    DontNeed,
}

impl ExpertIo for BufferedIo {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn done_with(&self, range: Range<u64>) {
        if self.leave_nothing {
            self.forget(range);
        }
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn name(&self) -> &'static str {
        "buffered"
    }
}

/// Any source of a GGUF file: bytes inside the binary, or a file where nothing better could be opened.
#[derive(Debug)]
pub struct SourceIo(pub Arc<dyn ReadAt>);

impl ExpertIo for SourceIo {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(self.0.len().saturating_sub(offset)).unwrap_or(usize::MAX);
        let n = rest.min(buf.len());
        self.0.read_exact_at(&mut buf[..n], offset)?;
        Ok(n)
    }

    fn path(&self) -> Option<&Path> {
        self.0.path()
    }

    fn name(&self) -> &'static str {
        if self.0.path().is_some() { "buffered" } else { "memory" }
    }
}
