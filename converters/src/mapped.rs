//! A weight file mapped into memory, with advice to the kernel about what is needed next and what no longer.
//!
//! The only place of this crate that is unsafe. Advice is best effort: where the system has none, nothing is lost
//! but speed and a small resident set.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapOptions};
use st_gguf::Placeholder;

use crate::error::ConvertError;

/// A read-only file mapping.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
    /// Kept for advice about its pages.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "only Linux takes advice about files"))]
    file: File,
}

impl MappedFile {
    /// Maps a whole file.
    pub(crate) fn open(path: &Path) -> Result<Self, ConvertError> {
        let fail = |source| ConvertError::Io { path: path.into(), source };
        let file = File::open(path).map_err(fail)?;
        // SAFETY: the mapping is read-only and its bytes are only ever read as plain integers, so a writer changing the
        // file meanwhile yields other weights, never an invalid value. A file that another process truncates while it is
        // being converted raises SIGBUS, as with every mapped file; inputs are not modified while they are converted.
        let map = unsafe { MmapOptions::new().map(&file) }.map_err(fail)?;
        if let Some(what) = Placeholder::of(&map[..map.len().min(Placeholder::PREFIX_BYTES)]) {
            return Err(ConvertError::Placeholder { path: path.into(), what });
        }
        Ok(Self { path: path.into(), map, file })
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Asks the kernel to start reading `range`.
    #[cfg(unix)]
    pub(crate) fn will_need(&self, range: Range<usize>) {
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
    }

    /// Takes `range` out of the resident set and lets the kernel use its pages for what is read next. A conversion reads
    /// every byte once: keeping them would push out what others need, and under a hypervisor pages that are used again
    /// are several times cheaper than fresh ones.
    #[cfg(unix)]
    pub(crate) fn release(&self, range: Range<usize>) {
        // SAFETY: the mapping is shared and file-backed and nobody writes through it, so dropping its pages loses
        // nothing: the next access brings the same bytes back from the file.
        let _ =
            unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        #[cfg(target_os = "linux")]
        {
            let (start, length) = (range.start as u64, std::num::NonZeroU64::new(range.len() as u64));
            let _ = rustix::fs::fadvise(&self.file, start, length, rustix::fs::Advice::DontNeed);
        }
    }

    /// Without `madvise` there is nothing to ask.
    #[cfg(not(unix))]
    pub(crate) fn will_need(&self, _range: Range<usize>) {}

    /// Without `madvise` there is nothing to release.
    #[cfg(not(unix))]
    pub(crate) fn release(&self, _range: Range<usize>) {}
}
