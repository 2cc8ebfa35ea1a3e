//! The I/O threads' work: one piece of one expert from the file into its slot, in either layout.

#![allow(unsafe_code)]

use crate::SlotFormat;
use crate::buffer::{AlignedBuf, PAGE};
use crate::error::{StoreError, matrix_name};
use crate::inflight::{FilePieces, Job, Pieces};
use crate::io::{ExpertIo, bounce_bytes, read_covering, read_into};
use crate::slots::Slab;
use st_gguf::{ByteRange, ExpertIndex, Layout, Matrix, crc32c};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Everything that reading a piece takes; shared by the I/O threads, changed by none.
#[derive(Debug)]
pub(crate) struct Reader {
    io: Box<dyn ExpertIo>,
    /// Whether slots are made of the file's pages; then nobody ever writes to one.
    maps: bool,
    index: ExpertIndex,
    format: Arc<dyn SlotFormat>,
    pub(crate) pieces: FilePieces,
    pub(crate) slab: Slab,
}

/// What reading one piece cost.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) bytes: u64,
    pub(crate) reads: u64,
    pub(crate) retries: u64,
    pub(crate) reading: Duration,
    pub(crate) filling: Duration,
}

impl Reader {
    /// Checks that the file's experts and the slot format agree about every size.
    pub(crate) fn new(
        io: Box<dyn ExpertIo>,
        index: ExpertIndex,
        format: Arc<dyn SlotFormat>,
        slab: Slab,
    ) -> Result<Self, StoreError> {
        let maps = io.mappable().is_some() && records_on_pages(&index);
        let pieces = check_format(&index, format.as_ref(), maps)?;
        Ok(Self { io, maps, index, format, pieces, slab })
    }

    #[cfg(test)]
    pub(crate) fn io(&self) -> &dyn ExpertIo {
        self.io.as_ref()
    }

    pub(crate) fn index(&self) -> &ExpertIndex {
        &self.index
    }

    /// Buffers for [`Reader::read`], one for each of `n` threads. Their pages are taken from the system when first needed.
    pub(crate) fn bounce_buffers(&self, n: usize, huge_pages: bool) -> io::Result<Vec<AlignedBuf>> {
        AlignedBuf::several(n, self.bounce_bytes(), huge_pages)
    }

    /// Bytes of one of [`Reader::bounce_buffers`].
    pub(crate) fn bounce_bytes(&self) -> usize {
        bounce_bytes_for(&self.index, self.format.as_ref())
    }

    /// The bytes of slot `slot` that hold `matrix` of the expert `key`.
    ///
    /// # Safety
    /// The matrix has landed and the slot stays pinned while the slice lives.
    pub(crate) unsafe fn region(&self, slot: u32, key: u32, matrix: Matrix) -> &[u8] {
        // SAFETY: passed on to the caller.
        unsafe { self.slab.read(slot, self.format.region(self.expert(key).0, matrix)) }
    }

    /// The bytes of its slot that the job's piece fills.
    fn slot_range(&self, job: &Job) -> Range<usize> {
        self.pieces.of(job.key).range(job.piece)
    }

    /// Reads the job's piece into its slot; a read that fails is made once more. Returns the piece's checksum where the job
    /// wants it (0 otherwise).
    ///
    /// # Safety
    /// The job was handed out by the table and is not finished: until it is, nobody else touches the piece's bytes.
    pub(crate) unsafe fn read(&self, job: &Job, bounce: &mut AlignedBuf, cost: &mut Cost) -> Result<u32, StoreError> {
        let file_range = self.file_range(job);
        let mut once = |cost: &mut Cost| match self.io.mappable().filter(|_| self.maps) {
            // SAFETY: as the caller promises; pieces are whole slots where the store maps.
            Some(file) => unsafe { self.map_once(job, &file_range, file, cost) },
            // SAFETY: as the caller promises.
            None => unsafe { self.read_once(job, &file_range, bounce, cost) },
        };
        let mut attempt = once(cost);
        if let Err(error) = &attempt {
            tracing::debug!(offset = file_range.start, %error, "a read failed and is made once more");
            cost.retries += 1;
            attempt = once(cost);
        }
        let crc = attempt.map_err(|cause| self.failure(job, cause))?;
        self.io.done_with(file_range);
        Ok(crc)
    }

    /// The checksum of the job's piece as it lies in the slot, where the job wants it.
    ///
    /// # Safety
    /// The piece is this thread's, which writes no more to it.
    unsafe fn sum_in_slot(&self, job: &Job) -> u32 {
        // SAFETY: passed on to the caller.
        let sum = || crc32c::crc32c(unsafe { self.slab.read(job.slot, self.slot_range(job)) });
        if job.verify { sum() } else { 0 }
    }

    /// # Safety
    /// As for [`Reader::read`], and the job's piece is the whole slot, to which nobody ever writes.
    unsafe fn map_once(&self, job: &Job, file_range: &Range<u64>, file: &File, cost: &mut Cost) -> io::Result<u32> {
        let started = Instant::now();
        cost.reads += 1;
        let len = self.slot_range(job).len();
        // SAFETY: the table hands a load to one thread and shows it to readers only when it is finished.
        let mapped = unsafe { self.slab.map(job.slot, len, file, file_range.start) };
        cost.reading += started.elapsed();
        mapped?;
        cost.bytes += len as u64;
        // SAFETY: the piece is this thread's until the job is finished.
        Ok(unsafe { self.sum_in_slot(job) })
    }

    /// # Safety
    /// As for [`Reader::read`].
    unsafe fn read_once(
        &self,
        job: &Job,
        file_range: &Range<u64>,
        bounce: &mut AlignedBuf,
        cost: &mut Cost,
    ) -> io::Result<u32> {
        let started = Instant::now();
        cost.reads += 1;
        // SAFETY: the table hands each piece of a load to one thread and shows it to readers only when it is finished; the
        // ranges of different pieces do not overlap.
        let dest = unsafe { self.slab.write(job.slot, self.slot_range(job)) };
        match self.index.layout() {
            Layout::Offload => {
                let delivered = read_into(self.io.as_ref(), bounce, file_range.clone(), dest);
                cost.reading += started.elapsed();
                cost.bytes += delivered? as u64;
                // SAFETY: `dest` is used no more, and the piece is this thread's until the job is finished.
                Ok(unsafe { self.sum_in_slot(job) })
            }
            Layout::Gguf => {
                let read = read_covering(self.io.as_ref(), bounce, file_range.clone());
                cost.reading += started.elapsed();
                let (canonical, delivered) = read?;
                cost.bytes += delivered as u64;
                let started = Instant::now();
                // Summed up first: what this brings into the processor's cache is what filling reads.
                let crc = if job.verify { crc32c::crc32c(canonical) } else { 0 };
                self.format.fill(self.expert(job.key).0, Matrix::ALL[job.piece as usize], canonical, dest);
                cost.filling += started.elapsed();
                Ok(crc)
            }
        }
    }

    /// Layer and expert of a key.
    pub(crate) fn expert(&self, key: u32) -> (usize, usize) {
        let n_experts = self.index.n_experts();
        (key as usize / n_experts, key as usize % n_experts)
    }

    fn file_range(&self, job: &Job) -> Range<u64> {
        let (layer, expert) = self.expert(job.key);
        match self.index.record(layer, expert) {
            Some(record) => {
                let piece = self.slot_range(job);
                record.offset + piece.start as u64..record.offset + piece.end as u64
            }
            None => {
                let matrix = self.index.matrix(layer, expert, Matrix::ALL[job.piece as usize]);
                matrix.offset..matrix.end()
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.io.path().map_or_else(|| PathBuf::from("the model in memory"), PathBuf::from)
    }

    /// The error of a piece that cannot be had.
    pub(crate) fn failure(&self, job: &Job, cause: io::Error) -> StoreError {
        let (layer, expert) = self.expert(job.key);
        let offset = self.file_range(job).start;
        StoreError::Read {
            path: self.path(),
            layer: layer as u32,
            expert: expert as u32,
            offset,
            cause: Arc::new(cause),
        }
    }

    /// The error of a record or matrix whose checksum is wrong.
    pub(crate) fn corruption(&self, job: &Job, got: u32) -> StoreError {
        let (layer, expert) = self.expert(job.key);
        let (matrix, sum, place) = match self.index.record(layer, expert) {
            Some(record) => (None, 0, record),
            None => {
                let matrix = Matrix::ALL[job.piece as usize];
                (Some(matrix), job.piece as usize, self.index.matrix(layer, expert, matrix))
            }
        };
        StoreError::Corrupt {
            path: self.path(),
            layer: layer as u32,
            expert: expert as u32,
            matrix,
            offset: place.offset,
            expected: self.index.checksums(layer, expert).get(sum).copied().unwrap_or_default(),
            got,
        }
    }
}

/// What a thread's bounce buffer has to hold: a matrix in canonical form and what its pages cover beyond it; nothing for
/// records that lie on pages, since they are read right into their slots.
pub(crate) fn bounce_bytes_for(index: &ExpertIndex, format: &dyn SlotFormat) -> usize {
    match index.layout() {
        Layout::Offload if records_on_pages(index) => 0,
        Layout::Offload => bounce_bytes(format.slot_bytes()),
        Layout::Gguf => {
            let of = |layer| Matrix::ALL.map(|matrix| format.canonical_bytes(layer, matrix));
            bounce_bytes((0..index.n_layers()).flat_map(of).max().unwrap_or(0))
        }
    }
}

/// Whether every expert is a record of whole pages.
pub(crate) fn records_on_pages(index: &ExpertIndex) -> bool {
    let page = PAGE as u64;
    let on_page = |record: ByteRange| record.offset.is_multiple_of(page) && record.len.is_multiple_of(page);
    (0..index.n_layers()).all(|layer| index.record(layer, 0).is_some_and(on_page))
}

/// Compares the index with the format and splits the experts of each layer into pieces.
fn check_format(index: &ExpertIndex, format: &dyn SlotFormat, whole: bool) -> Result<FilePieces, StoreError> {
    let layers = (0..index.n_layers()).map(|layer| layer_pieces(index, format, layer, whole));
    Ok(FilePieces::new(layers.collect::<Result<_, _>>()?, index.n_experts()))
}

fn layer_pieces(index: &ExpertIndex, format: &dyn SlotFormat, layer: usize, whole: bool) -> Result<Pieces, StoreError> {
    let mismatch = |what, expected: usize, got: u64| {
        let expected = expected as u64;
        if expected == got { Ok(()) } else { Err(StoreError::Format { what, expected, got }) }
    };
    let (regions, record_bytes) = (Matrix::ALL.map(|matrix| format.region(layer, matrix)), format.record_bytes(layer));
    if record_bytes > format.slot_bytes() {
        let (expected, got) = (format.slot_bytes() as u64, record_bytes as u64);
        return Err(StoreError::Format { what: "slot", expected, got });
    }
    let mut end = 0;
    for (matrix, region) in Matrix::ALL.into_iter().zip(&regions) {
        if region.start < end || region.end < region.start || region.end > record_bytes {
            let (expected, got) = (record_bytes as u64, region.end as u64);
            return Err(StoreError::Format { what: matrix_name(matrix), expected, got });
        }
        end = region.end;
    }
    match index.record(layer, 0) {
        Some(record) => {
            mismatch("record", record_bytes, record.len)?;
            for (matrix, region) in Matrix::ALL.into_iter().zip(&regions) {
                let start = index.matrix(layer, 0, matrix).offset.wrapping_sub(record.offset);
                mismatch(offset_name(matrix), region.start, start)?;
            }
            Ok(Pieces::of_record(&regions, record_bytes, whole))
        }
        None => {
            for matrix in Matrix::ALL {
                let canonical = format.canonical_bytes(layer, matrix);
                mismatch(matrix_name(matrix), canonical, index.matrix(layer, 0, matrix).len)?;
            }
            Ok(Pieces::per_matrix(regions))
        }
    }
}

fn offset_name(matrix: Matrix) -> &'static str {
    match matrix {
        Matrix::Gate => "record before the gate matrix",
        Matrix::Up => "record before the up matrix",
        Matrix::Down => "record before the down matrix",
    }
}
