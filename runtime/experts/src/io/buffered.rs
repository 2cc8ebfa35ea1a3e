//! Reads through the page cache, and reads from bytes that are in memory anyway.

use super::ExpertIo;
use st_gguf::ReadAt;
use st_sys::Advice;
use std::fs::File;
use std::io;
use std::ops::Range;
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
            st_sys::advise(&io.file, 0..0, Advice::Random);
        }
        Ok(io)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Takes `range` out of the page cache, as far as it is clean and in nobody's use.
    pub(super) fn forget(&self, range: Range<u64>) {
        st_sys::advise(&self.file, range, Advice::DontNeed);
    }
}

impl ExpertIo for BufferedIo {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        st_sys::read_at(&self.file, buf, offset)
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
