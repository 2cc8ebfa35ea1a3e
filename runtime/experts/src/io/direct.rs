//! Reads past the page cache (`O_DIRECT`): what the drive delivers goes straight into the caller's aligned memory.

use super::ExpertIo;
use crate::buffer::{AlignedBuf, PAGE};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A file opened for direct reads.
#[derive(Debug)]
pub struct DirectIo {
    file: File,
    path: PathBuf,
}

impl DirectIo {
    /// Opens `path` and makes one read to be sure that the file system means it.
    ///
    /// # Errors
    /// What the system reports where the file cannot be opened or direct I/O is refused.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = st_sys::open_uncached(path)?;
        let io = Self { file, path: path.to_owned() };
        // Some file systems accept the flag and refuse the first read.
        io.read_at(AlignedBuf::new(PAGE)?.as_mut_slice(), 0)?;
        Ok(io)
    }
}

impl ExpertIo for DirectIo {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        st_sys::read_at(&self.file, buf, offset)
    }

    fn alignment(&self) -> usize {
        PAGE
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn name(&self) -> &'static str {
        "direct"
    }
}
