//! A whole file mapped for reading, with advice about what is needed next and what no longer.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapOptions};

use crate::{Advice, advise, os};

/// A read-only mapping of a file.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
    /// Kept for advice about its pages.
    file: File,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// What the system reports.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the mapping is read-only and its bytes are only ever read as plain integers, so a writer changing the
        // file meanwhile yields other numbers, never an invalid value. A file that another process truncates while it is
        // read raises SIGBUS, as with every mapped file; inputs are not modified while they are converted.
        let map = unsafe { MmapOptions::new().map(&file) }?;
        Ok(Self { path: path.into(), map, file })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Asks the system to start reading `range`.
    pub fn will_need(&self, range: Range<usize>) {
        os::will_need(&self.map, range);
    }

    /// Takes `range` out of the resident set and lets the system use its pages for what is read next. Who reads
    /// every byte once would otherwise push out what others need, and under a hypervisor pages that are used again
    /// are several times cheaper than fresh ones.
    pub fn release(&self, range: Range<usize>) {
        os::release(&self.map, range.clone());
        advise(&self.file, range.start as u64..range.end as u64, Advice::DontNeed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_files_after_any_advice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![9; 20_000]).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        mapped.will_need(0..20_000);
        mapped.release(4096..12_288);
        assert!(mapped.bytes().len() == 20_000 && mapped.bytes().iter().all(|&b| b == 9));
        assert_eq!(mapped.path(), path);
        assert!(MappedFile::open(&dir.path().join("missing")).is_err());
    }
}
