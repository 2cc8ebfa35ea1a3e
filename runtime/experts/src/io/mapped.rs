//! The page cache's own pages in the slots' place: nothing is read twice, copied, or held in memory twice.
//!
//! Only where nothing is ever evicted: the page cache decides what of it stays in memory.

#![allow(unsafe_code)]

use super::{BufferedIo, ExpertIo};
use st_sys::{PAGE, Pages};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// A file whose records are mapped; all else is read through the page cache.
#[derive(Debug)]
pub(crate) struct MappedIo(BufferedIo);

impl MappedIo {
    /// The file of `io`, where this system maps any page of it and can wait for it; otherwise `io` again.
    pub(crate) fn over(io: BufferedIo) -> Result<Self, BufferedIo> {
        let tried = Pages::new(PAGE, false).and_then(|memory| {
            // SAFETY: nobody else knows of this memory, and it is gone after this.
            unsafe { memory.map_file(0, PAGE, io.file(), PAGE as u64) }
        });
        match tried {
            Ok(()) => Ok(Self(io)),
            Err(error) => {
                tracing::debug!(%error, "the file cannot be mapped, reading it through the page cache");
                Err(io)
            }
        }
    }
}

impl ExpertIo for MappedIo {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn done_with(&self, range: Range<u64>) {
        self.0.done_with(range);
    }

    fn mappable(&self) -> Option<&File> {
        Some(self.0.file())
    }

    fn path(&self) -> Option<&Path> {
        self.0.path()
    }

    fn name(&self) -> &'static str {
        "mapped"
    }
}
