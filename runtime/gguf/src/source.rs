//! Where bytes come from: a file, or memory. Positioned reads only, so that one
//! source serves many threads without a cursor to share.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{GgufError, Result};

/// Bytes that can be read at any position, from any thread.
pub trait ReadAt: Send + Sync + fmt::Debug {
    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// `UnexpectedEof` where the source ends before; otherwise what the system reports.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Length in bytes, as of when the source was opened.
    fn len(&self) -> u64;

    /// Whether there is not a single byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file behind it, if it is one.
    fn path(&self) -> Option<&Path> {
        None
    }

    /// The files behind it: one, or all parts of a split file in order.
    fn parts(&self) -> Vec<Part<'_>> {
        self.path().map(|path| Part { path, start: 0 }).into_iter().collect()
    }
}

/// A file that a source consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// Its path.
    pub path: &'a Path,
    /// Where it starts among the offsets of the source.
    pub start: u64,
}

/// What to call `source` in a message: its path, or that it is in memory.
pub(crate) fn name_of(source: &dyn ReadAt) -> String {
    source.parts().first().map_or_else(|| "GGUF data in memory".to_owned(), |part| part.path.display().to_string())
}

/// A regular file, read with `pread`.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    len: u64,
}

impl FileSource {
    /// Opens the regular file `path` for reading.
    ///
    /// # Errors
    /// [`GgufError::Io`] where it cannot be opened, [`GgufError::NotAFile`] for a directory, pipe or device.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fail = |source| GgufError::io(path.display(), "open the file", source);
        // Asked before opening: opening a pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(GgufError::NotAFile { file: path.display().to_string() });
        }
        let file = File::open(path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        Ok(Self { file, path: path.to_owned(), len })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl ReadAt for FileSource {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        st_sys::read_exact_at(&self.file, buf, offset)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }
}

/// Bytes in memory, such as those embedded in the binary.
#[derive(Clone, Copy)]
pub struct MemorySource<B>(pub B);

impl<B: AsRef<[u8]>> fmt::Debug for MemorySource<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemorySource({} bytes)", self.0.as_ref().len())
    }
}

impl<B: AsRef<[u8]> + Send + Sync> ReadAt for MemorySource<B> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.0.as_ref().get(start..start.checked_add(buf.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.as_ref().len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_of_memory_stay_inside() {
        let source = MemorySource(b"abcdef");
        let mut buf = [0; 3];
        source.read_exact_at(&mut buf, 3).unwrap();
        assert_eq!(&buf, b"def");
        for offset in [4, 6, 7, u64::MAX] {
            let error = source.read_exact_at(&mut buf, offset).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_directory_and_a_missing_file_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = FileSource::open(dir.path()).unwrap_err();
        assert!(matches!(error, GgufError::NotAFile { .. }), "{error}");
        let missing = dir.path().join("no.gguf");
        let error = FileSource::open(&missing).unwrap_err();
        assert!(error.to_string().contains("no.gguf"), "{error}");
    }
}
