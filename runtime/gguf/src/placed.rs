//! Writing a GGUF file whose data comes in any order, and going on with what an earlier process wrote of it.
//!
//! Owns places and nothing else: what is written and what is not is the caller's to know. The bytes of a finished file are
//! those that [`GgufWriter`](crate::GgufWriter) makes of the same data.

use std::path::{Path, PathBuf};

use crate::checksums;
use crate::encode::{Plan, TensorSpec, encode};
use crate::error::{GgufError, Result};
use crate::output::{Kind, OutputFile};
use crate::writer::write_error;
use crate::{Metadata, WriteOptions};

/// A file being written at its planned places. Dropped before it is finished, it keeps what was written for the next one,
/// unless it is [discarded](Self::discard).
#[derive(Debug)]
pub struct PlacedWriter {
    file: OutputFile,
    plan: Plan,
    tensors: Vec<TensorSpec>,
    options: WriteOptions,
    path: PathBuf,
    goes_on: bool,
}

impl PlacedWriter {
    /// Begins the file `path` with `metadata`, in which room for checksums is [reserved](crate::reserve_checksums), and
    /// `tensors`. With `go_on` what an earlier writer of the same file left counts as written; otherwise it is emptied.
    ///
    /// # Errors
    /// As [`GgufWriter::create`](crate::GgufWriter::create).
    pub fn open(
        path: &Path,
        metadata: &Metadata,
        tensors: &[TensorSpec],
        options: WriteOptions,
        go_on: bool,
    ) -> Result<Self> {
        let (header, plan) = encode(metadata, tensors, options.alignment)?;
        let file = OutputFile::go_on(path, Kind::GGUF, options.overwrite)?;
        let left = file.file().metadata().map_or(0, |metadata| metadata.len());
        let goes_on = go_on && left == plan.total;
        let writer = Self { file, plan, tensors: tensors.to_vec(), options, path: path.to_owned(), goes_on };
        let begun = writer.file.file();
        let emptied = if goes_on { Ok(()) } else { begun.set_len(0) };
        emptied.map_err(|source| writer.write_error(source))?;
        let needed = writer.missing_space();
        if let Some(available) = st_sys::free_space(writer.file.folder()).ok().flatten()
            && available < needed
        {
            return Err(GgufError::NoSpace { path: path.to_owned(), needed, available: Some(available), source: None });
        }
        // What is not written yet, padding among it, is zero.
        let begun = begun.set_len(writer.plan.total).and_then(|()| st_sys::write_all_at(begun, &header, 0));
        begun.map_err(|source| writer.write_error(source))?;
        Ok(writer)
    }

    /// Whether there was something to go on with.
    pub fn goes_on(&self) -> bool {
        self.goes_on
    }

    /// Where everything goes.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Bytes that the disk still has to have room for.
    pub fn missing_space(&self) -> u64 {
        self.plan.total.saturating_sub(self.file.allocated())
    }

    /// Writes data of the tensor with this number, from its byte `start` on.
    ///
    /// # Errors
    /// [`GgufError::DataSize`] where it leaves the tensor; [`GgufError::NoSpace`], [`GgufError::Io`].
    pub fn write_at(&self, tensor: usize, start: u64, data: &[u8]) -> Result<()> {
        let (offset, size) = match (self.plan.offsets.get(tensor), self.plan.sizes.get(tensor)) {
            (Some(&offset), Some(&size)) => (offset, size),
            _ => (0, 0),
        };
        let end = start.saturating_add(data.len() as u64);
        if end > size {
            return Err(GgufError::DataSize { file: self.path.display().to_string(), expected: size, got: end });
        }
        st_sys::write_all_at(self.file.file(), data, offset + start).map_err(|source| self.write_error(source))
    }

    /// Has everything that was written on the disk.
    ///
    /// # Errors
    /// [`GgufError::NoSpace`], [`GgufError::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.file().sync_data().map_err(|source| self.write_error(source))
    }

    /// Completes the file: with `sums`, one for each part in the order of the file, in the room of `metadata`, on the disk and
    /// under its final name.
    ///
    /// # Errors
    /// [`GgufError::Malformed`] where the header would change its size; as [`OutputFile::finish`].
    pub fn finish(self, mut metadata: Metadata, sums: &[u32]) -> Result<()> {
        checksums::state(&mut metadata, &self.tensors, sums);
        let (header, plan) = encode(&metadata, &self.tensors, self.options.alignment)?;
        if plan != self.plan {
            let (new, old) = (plan.header_bytes, self.plan.header_bytes);
            let problem = format!("makes the header {new} bytes long, where {old} were written");
            return Err(GgufError::malformed(self.path.display(), "the finished metadata", problem));
        }
        st_sys::write_all_at(self.file.file(), &header, 0).map_err(|source| self.write_error(source))?;
        self.file.finish()
    }

    /// Removes what was written.
    pub fn discard(self) {
        self.file.discard();
    }

    fn write_error(&self, source: std::io::Error) -> GgufError {
        let free = st_sys::free_space(self.file.folder()).ok().flatten();
        write_error(&self.path, self.missing_space(), free, source)
    }
}
