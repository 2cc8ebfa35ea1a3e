//! Writing a GGUF file, tensor by tensor, in bounded memory; what passes is summed up for the checksums.
//!
//! Owns the order and the padding of what is written; [`OutputFile`] owns the file and its name.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::Metadata;
use crate::checksums;
use crate::crc32c;
use crate::encode::{Plan, TensorSpec, encode};
use crate::error::{GgufError, Result};
use crate::output::{Kind, OutputFile};

const BUFFER_BYTES: usize = 1 << 20;
/// How much is handed to the disk at a time while writing goes on.
const WRITEBACK_BYTES: u64 = 8 << 20;
/// How far behind the end pages are given back: by then the disk has usually taken them.
const RELEASE_LAG: u64 = 64 << 20;

/// How to write a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Every tensor starts at a multiple of this: a power of two.
    pub alignment: u64,
    /// Whether an existing GGUF file is replaced; otherwise it is an error. A file of another kind never is.
    pub overwrite: bool,
}

impl Default for WriteOptions {
    /// Aligned to 4096 bytes, so that tensors start on pages; existing files stay.
    fn default() -> Self {
        Self { alignment: 4096, overwrite: false }
    }
}

/// A file being written. Dropping it without [`finish`](Self::finish) removes what was written.
#[derive(Debug)]
pub struct GgufWriter {
    stream: Option<TensorStream<BufWriter<OutputFile>>>,
    plan: Plan,
    tensors: Vec<TensorSpec>,
    options: WriteOptions,
    path: PathBuf,
    /// Up to where the kernel was asked to write to the disk.
    handed_over: u64,
}

impl GgufWriter {
    /// Starts the file `path` with `metadata` and `tensors`, whose data [`write`](Self::write) then takes.
    /// `general.alignment` is set to `options.alignment`.
    ///
    /// # Errors
    /// As [`plan`](crate::plan()) and [`OutputFile::create`]; [`GgufError::NoSpace`] before the first byte is written;
    /// [`GgufError::Io`].
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorSpec], options: WriteOptions) -> Result<Self> {
        let (header, plan) = encode(metadata, tensors, options.alignment)?;
        let file = OutputFile::create(path, Kind::GGUF, options.overwrite)?;
        let mut writer = Self {
            stream: Some(TensorStream::new(
                BufWriter::with_capacity(BUFFER_BYTES, file),
                plan.sizes.iter().copied().zip(tensors.iter().map(checksums::checksum_parts)).collect(),
                options.alignment,
            )),
            plan,
            tensors: tensors.to_vec(),
            options,
            path: path.to_owned(),
            handed_over: 0,
        };
        let needed = writer.plan.total;
        if let Some(available) = writer.free_space()
            && available < needed
        {
            let (path, available) = (path.to_owned(), Some(available));
            return Err(GgufError::NoSpace { path, needed, available, source: None });
        }
        let written = writer.stream_mut().sink.write_all(&header);
        written.map_err(|source| writer.write_error(source))?;
        writer.stream_mut().position = header.len() as u64;
        Ok(writer)
    }

    /// Where everything goes.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Appends tensor data: one stream over all tensors in the order they were announced, cut anywhere.
    /// The padding between tensors is added here.
    ///
    /// # Errors
    /// [`GgufError::DataSize`] for more data than was announced; [`GgufError::NoSpace`], [`GgufError::Io`].
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        match self.stream_mut().write(data) {
            Ok(()) => {
                self.hand_over();
                Ok(())
            }
            Err(StreamError::TooMuch { expected, got }) => {
                Err(GgufError::DataSize { file: self.path.display().to_string(), expected, got })
            }
            Err(StreamError::Io(source)) => Err(self.write_error(source)),
        }
    }

    /// Replaces the metadata that [`create`](Self::create) wrote, for values that are known only once the
    /// data is, such as checksums. The header must keep its size: same keys, values of the same length.
    ///
    /// # Errors
    /// [`GgufError::Malformed`] where the header would change its size; [`GgufError::NoSpace`],
    /// [`GgufError::Io`].
    pub fn replace_metadata(&mut self, metadata: &Metadata) -> Result<()> {
        let (header, plan) = encode(metadata, &self.tensors, self.options.alignment)?;
        // The data stays where it is as long as the plan does.
        if plan != self.plan {
            let (new, old) = (plan.header_bytes, self.plan.header_bytes);
            let problem = format!("makes the header {new} bytes long, where {old} were written");
            return Err(GgufError::malformed(self.path.display(), "replaced metadata", problem));
        }
        let sink = &mut self.stream_mut().sink;
        let written = sink.flush().and_then(|()| st_sys::write_all_at(sink.get_ref().file(), &header, 0));
        written.map_err(|source| self.write_error(source))
    }

    /// Puts the checksums of what was written into the room that [`reserve_checksums`](crate::reserve_checksums) made in
    /// `metadata`, and `metadata` in the place of what [`create`](Self::create) wrote.
    ///
    /// # Errors
    /// [`GgufError::DataSize`] where tensor data is missing; as [`replace_metadata`](Self::replace_metadata).
    pub fn state_checksums(&mut self, mut metadata: Metadata) -> Result<()> {
        self.check_complete()?;
        let sums = std::mem::take(&mut self.stream_mut().sums);
        checksums::state(&mut metadata, &self.tensors, &sums);
        self.replace_metadata(&metadata)
    }

    /// Completes the file: everything is on the disk and under its final name when this returns.
    ///
    /// # Errors
    /// [`GgufError::DataSize`] where tensor data is missing; [`GgufError::NoSpace`]; as [`OutputFile::finish`]. Nothing is
    /// left behind then.
    pub fn finish(mut self) -> Result<()> {
        self.check_complete()?;
        let sink = &mut self.stream_mut().sink;
        let synced = sink.flush().and_then(|()| sink.get_ref().file().sync_all());
        synced.map_err(|source| self.write_error(source))?;
        match self.stream.take() {
            Some(stream) => stream.sink.into_parts().0.finish(),
            None => Ok(()),
        }
    }

    fn check_complete(&mut self) -> Result<()> {
        let stream = self.stream_mut();
        let (expected, got) = (stream.announced(), stream.received);
        if expected == got {
            return Ok(());
        }
        Err(GgufError::DataSize { file: self.path.display().to_string(), expected, got })
    }

    /// Keeps the disk busy while more is computed, so that the sync at the end has little left to wait for, and gives
    /// back the pages that it has taken: under a hypervisor, pages that are used again are several times cheaper than
    /// fresh ones. Advice only: where the system takes none, nothing is lost but time.
    fn hand_over(&mut self) {
        let Some(stream) = &self.stream else { return };
        let end = self.plan.header_bytes + stream.position;
        while end >= self.handed_over + WRITEBACK_BYTES + BUFFER_BYTES as u64 {
            for start in [Some(self.handed_over), self.handed_over.checked_sub(RELEASE_LAG)].into_iter().flatten() {
                let written = start..start + WRITEBACK_BYTES;
                st_sys::advise(stream.sink.get_ref().file(), written, st_sys::Advice::DontNeed);
            }
            self.handed_over += WRITEBACK_BYTES;
        }
    }

    fn stream_mut(&mut self) -> &mut TensorStream<BufWriter<OutputFile>> {
        // `finish` takes the stream away and consumes the writer, so no method can meet it empty.
        self.stream.as_mut().expect("a writer that was not finished has its stream")
    }

    fn free_space(&self) -> Option<u64> {
        let output = self.stream.as_ref()?.sink.get_ref();
        st_sys::free_space(output.folder()).ok().flatten()
    }

    fn write_error(&self, source: io::Error) -> GgufError {
        let free = self.free_space();
        // What was written so far is given back, so it counts as free.
        let written = self.stream.as_ref().map_or(0, |stream| stream.position);
        write_error(&self.path, self.plan.total, free.map(|free| free.saturating_add(written)), source)
    }
}

impl Drop for GgufWriter {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take() {
            // Taken apart, so that what is still in the buffer is not written for nothing.
            drop(stream.sink.into_parts());
        }
    }
}

/// An error of writing, with a full disk or an exhausted quota told apart.
pub(crate) fn write_error(path: &Path, needed: u64, available: Option<u64>, source: io::Error) -> GgufError {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    if matches!(source.kind(), StorageFull | QuotaExceeded) {
        // Under a quota the file system may have enough free: that figure would mislead.
        let available = available.filter(|&bytes| bytes < needed);
        return GgufError::NoSpace { path: path.to_owned(), needed, available, source: Some(source) };
    }
    GgufError::io(path.display(), "write", source)
}

/// Tensor data on its way into `sink`: knows how much of which tensor has passed, sums it up, and pads.
#[derive(Debug)]
struct TensorStream<W> {
    sink: W,
    /// Bytes of each tensor, and how many equal parts of it have a checksum.
    sizes: Vec<(u64, u64)>,
    alignment: u64,
    /// The tensor being filled, and how much of it is.
    tensor: usize,
    filled: u64,
    /// CRC-32C of the part being filled, and of all before it.
    sum: u32,
    sums: Vec<u32>,
    /// Data bytes received, and bytes put into the sink, padding and header included.
    received: u64,
    position: u64,
}

#[derive(Debug)]
enum StreamError {
    TooMuch { expected: u64, got: u64 },
    Io(io::Error),
}

impl<W: Write> TensorStream<W> {
    fn new(sink: W, sizes: Vec<(u64, u64)>, alignment: u64) -> Self {
        Self { sink, sizes, alignment, tensor: 0, filled: 0, sum: 0, sums: Vec::new(), received: 0, position: 0 }
    }

    fn announced(&self) -> u64 {
        self.sizes.iter().map(|(size, _)| size).sum()
    }

    fn write(&mut self, mut data: &[u8]) -> Result<(), StreamError> {
        while !data.is_empty() {
            let Some(&(size, parts)) = self.sizes.get(self.tensor) else {
                let expected = self.announced();
                return Err(StreamError::TooMuch { expected, got: expected + data.len() as u64 });
            };
            let part = size / parts;
            let n = (part - self.filled % part).min(data.len() as u64);
            let (now, later) = data.split_at(n as usize);
            self.sum = crc32c::crc32c_append(self.sum, now);
            self.sink.write_all(now).map_err(StreamError::Io)?;
            data = later;
            self.filled += n;
            if self.filled.is_multiple_of(part) {
                self.sums.push(std::mem::take(&mut self.sum));
            }
            self.received += n;
            self.position += n;
            if self.filled == size {
                self.pad(size.next_multiple_of(self.alignment) - size)?;
                self.tensor += 1;
                self.filled = 0;
            }
        }
        Ok(())
    }

    fn pad(&mut self, mut n: u64) -> Result<(), StreamError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        self.position += n;
        while n > 0 {
            let now = n.min(ZEROS.len() as u64);
            self.sink.write_all(&ZEROS[..now as usize]).map_err(StreamError::Io)?;
            n -= now;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `room` bytes, then fails like a full disk.
    struct Full {
        room: usize,
        kind: io::ErrorKind,
    }

    impl Write for Full {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(self.kind.into());
            }
            let n = data.len().min(self.room);
            self.room -= n;
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn fail(room: usize, kind: io::ErrorKind) -> GgufError {
        let mut stream = TensorStream::new(Full { room, kind }, vec![(100, 1); 2], 64);
        match stream.write(&[1; 200]) {
            Err(StreamError::Io(source)) => write_error(Path::new("out.gguf"), 256, Some(room as u64), source),
            other => panic!("expected a failing write, got {other:?}"),
        }
    }

    #[test]
    fn a_full_disk_in_data_and_in_padding_says_what_is_needed() {
        for room in [0, 50, 110, 130, 199] {
            let error = fail(room, io::ErrorKind::StorageFull);
            assert_eq!(
                error.to_string(),
                format!("out.gguf: not enough disk space: 256 bytes are needed, {room} are free")
            );
        }
        assert!(matches!(fail(0, io::ErrorKind::QuotaExceeded), GgufError::NoSpace { .. }));
        assert!(matches!(fail(0, io::ErrorKind::PermissionDenied), GgufError::Io { .. }));
    }

    #[test]
    fn the_system_calls_a_full_device_by_its_name() {
        let file = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut stream = TensorStream::new(file, vec![(10, 1)], 32);
        let Err(StreamError::Io(source)) = stream.write(&[1; 10]) else { panic!("/dev/full took data") };
        let error = write_error(Path::new("out.gguf"), 4096, None, source);
        assert_eq!(error.to_string(), "out.gguf: not enough disk space: 4096 bytes are needed");
    }

    #[test]
    fn padding_follows_each_tensor() {
        let mut stream = TensorStream::new(Vec::new(), vec![(3, 1), (64, 2), (1, 1)], 64);
        stream.write(&[7; 68]).unwrap();
        assert_eq!(stream.sink.len(), 192);
        assert_eq!((stream.received, stream.position), (68, 192));
        assert_eq!(stream.sums, [3, 32, 32, 1].map(|n| crc32c::crc32c(&vec![7; n])));
        let set: Vec<usize> = (0..192).filter(|&i| stream.sink[i] == 7).collect();
        assert_eq!(set, (0..3).chain(64..129).collect::<Vec<_>>());
    }
}
