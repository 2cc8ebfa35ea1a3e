//! Which way of reading to use: what was demanded, what the file system offers, and, under a budget, what is faster here.
//!
//! Direct reads win where the model far exceeds memory and lose on some drives and file systems, so `auto` measures: a few
//! matrices from all over the file, read by as many threads as will read later, each way on ranges of its own that are
//! taken out of the page cache first. Without a budget every expert is read once and the page cache is there to be used:
//! the next start finds the file in it. Records that are what a slot holds need not be read at all: the slot is made of the
//! page cache's own pages.

use super::mapped::MappedIo;
use super::{BufferedIo, DirectIo, ExpertIo, IoMode, SourceIo, bounce_bytes, read_covering};
use crate::buffer::{AlignedBuf, PAGE};
use crate::error::StoreError;
use st_gguf::ReadAt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Ranges read per way of reading.
const SAMPLES: usize = 16;

/// Buffered reads are taken only where they are faster by more than this factor: they cost a copy, and the page cache's
/// memory while they are under way.
const BUFFERED_MARGIN: f64 = 1.15;

/// What the probe measured, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    /// Past the page cache.
    pub(crate) direct: f64,
    /// Through the page cache, not cached before.
    pub(crate) buffered: f64,
}

/// Opens `source`'s file for reading experts. `samples` are ranges that will be read later, to measure with; `threads` is how
/// many reads will be under way at once, `huge_pages` into what memory. `mappable` says that nothing will be evicted and that
/// records are whole pages.
///
/// # Errors
/// [`StoreError::DirectRefused`] where direct I/O is demanded and not possible, [`StoreError::Open`] where the file is gone.
pub(crate) fn open(
    source: &Arc<dyn ReadAt>,
    mode: IoMode,
    budgeted: bool,
    mappable: bool,
    samples: &[Range<u64>],
    threads: usize,
    huge_pages: bool,
) -> Result<(Box<dyn ExpertIo>, Option<Measured>), StoreError> {
    let Some(path) = source.path() else {
        return Ok((Box::new(SourceIo(Arc::clone(source))), None));
    };
    let opened = |cause: io::Error| StoreError::Open { path: path.to_owned(), cause: Arc::new(cause) };
    let direct = || {
        let io = DirectIo::open(path)?;
        check_same_file(source.as_ref(), &io)?;
        Ok(io)
    };
    match mode {
        IoMode::Direct => match direct() {
            Ok(io) => Ok((Box::new(io), None)),
            Err(cause) => Err(StoreError::DirectRefused { path: path.to_owned(), cause: Arc::new(cause) }),
        },
        IoMode::Auto if budgeted => {
            let buffered = open_buffered(source, path, true).map_err(opened)?;
            let direct = match direct() {
                Ok(io) => io,
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "direct I/O is not possible, reading through the page cache");
                    return Ok((Box::new(buffered), None));
                }
            };
            let measured = measure(&direct, &buffered, samples, threads, huge_pages);
            tracing::debug!(?measured, "probed I/O");
            let io: Box<dyn ExpertIo> = match measured {
                Some(Measured { direct: d, buffered: b }) if b > d * BUFFERED_MARGIN => Box::new(buffered),
                _ => Box::new(direct),
            };
            Ok((io, measured))
        }
        IoMode::Auto | IoMode::Buffered => {
            let buffered = open_buffered(source, path, budgeted).map_err(opened)?;
            let io: Box<dyn ExpertIo> = match (mode, mappable) {
                (IoMode::Auto, true) => match MappedIo::over(buffered) {
                    Ok(mapped) => Box::new(mapped),
                    Err(buffered) => Box::new(buffered),
                },
                _ => Box::new(buffered),
            };
            Ok((io, None))
        }
    }
}

/// How fast experts would be read from a file, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReadSpeed {
    /// One read after the other, always as many at once.
    pub sustained: f64,
    /// A few at once and then none for a while, as layers ask for them.
    pub burst: f64,
}

/// Measures how fast `threads` threads read from the file at `path` in pieces of `piece` bytes from all over it, past the page cache where
/// the file system offers that; `None` for a file of too few pieces.
///
/// # Errors
/// What opening and reading meet.
pub fn read_speed(path: &Path, piece: usize, threads: usize) -> io::Result<Option<ReadSpeed>> {
    const SUSTAINED: u64 = 96;
    const BURSTS: u64 = 12;
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(4);
    let piece = (piece.max(1) as u64).next_multiple_of(PAGE as u64);
    let n = std::fs::metadata(path)?.len() / piece;
    let in_bursts = BURSTS * threads.max(1) as u64;
    if n < 2 * in_bursts {
        return Ok(None);
    }
    // Pieces of either kind lie between those of the other.
    let ranges = |count: u64, shift: u64| -> Vec<Range<u64>> {
        (0..count).map(|i| (i * (n - 1) / count + shift).min(n - 1) * piece).map(|at| at..at + piece).collect()
    };
    let (many, few) = (ranges(SUSTAINED.min(n / 2), 0), ranges(in_bursts, 1));
    let (direct, buffered) = (DirectIo::open(path), BufferedIo::open(path, true)?);
    let io: &dyn ExpertIo = match &direct {
        Ok(direct) => direct,
        Err(_) => {
            many.iter().chain(&few).for_each(|range| buffered.forget(range.clone()));
            &buffered
        }
    };
    let (mut bytes, mut seconds) = (0.0, 0.0);
    for burst in few.chunks(threads.max(1)) {
        std::thread::sleep(PAUSE);
        let read = (burst.len() as u64 * piece) as f64;
        (bytes, seconds) = (bytes + read, seconds + read / throughput(io, burst, threads, true)?);
    }
    let sustained = throughput(io, &many, threads, true)?;
    Ok(Some(ReadSpeed { sustained, burst: (bytes / seconds).max(sustained) }))
}

fn open_buffered(source: &Arc<dyn ReadAt>, path: &Path, leave_nothing: bool) -> io::Result<BufferedIo> {
    let io = BufferedIo::open(path, leave_nothing)?;
    check_same_file(source.as_ref(), &io)?;
    Ok(io)
}

/// The file is opened a second time, by its name: refuse another one that has taken its place meanwhile.
fn check_same_file(source: &dyn ReadAt, io: &dyn ExpertIo) -> io::Result<()> {
    let len = source.len();
    let mut bounce = AlignedBuf::new(bounce_bytes(PAGE))?;
    let mut expected = [0; PAGE];
    for start in [0, len.saturating_sub(PAGE as u64)] {
        let end = len.min(start + PAGE as u64);
        let expected = &mut expected[..(end - start) as usize];
        source.read_exact_at(expected, start)?;
        let (got, _) = read_covering(io, &mut bounce, start..end)?;
        if got != expected {
            return Err(io::Error::new(io::ErrorKind::StaleNetworkFileHandle, "the file has been replaced"));
        }
    }
    Ok(())
}

/// Reads half of the samples each way, in two rounds that take turns, and keeps the better round of each: a neighbour's
/// burst of I/O must not decide. `None` where there are too few samples or a read fails.
fn measure(
    direct: &DirectIo,
    buffered: &BufferedIo,
    samples: &[Range<u64>],
    threads: usize,
    huge_pages: bool,
) -> Option<Measured> {
    const TURNS: usize = 4;
    if samples.len() < 2 * SAMPLES {
        return None;
    }
    // Every turn gets ranges from all over the file, and none gets another's.
    let turn = |turn: usize| {
        let picked = (turn..2 * SAMPLES).step_by(TURNS).map(|i| samples[i * samples.len() / (2 * SAMPLES)].clone());
        picked.collect::<Vec<_>>()
    };
    let mut measured = Measured { direct: 0.0, buffered: 0.0 };
    for round in 0..TURNS / 2 {
        let ranges = turn(2 * round);
        measured.direct = measured.direct.max(throughput(direct, &ranges, threads, huge_pages).ok()?);
        let ranges = turn(2 * round + 1);
        ranges.iter().for_each(|range| buffered.forget(range.clone()));
        measured.buffered = measured.buffered.max(throughput(buffered, &ranges, threads, huge_pages).ok()?);
    }
    Some(measured)
}

/// Bytes per second over all `ranges`, read by `threads` threads.
fn throughput(io: &dyn ExpertIo, ranges: &[Range<u64>], threads: usize, huge_pages: bool) -> io::Result<f64> {
    let next = AtomicUsize::new(0);
    let longest = ranges.iter().map(|range| range.end - range.start).max().unwrap_or(0);
    let longest = usize::try_from(longest).map_err(|_| io::ErrorKind::OutOfMemory)?;
    // The same kind of memory as later, and touched before the clock starts.
    let mut buffers = AlignedBuf::several(threads.max(1), bounce_bytes(longest), huge_pages)?;
    buffers.iter_mut().for_each(|buffer| buffer.as_mut_slice().fill(1));
    let started = Instant::now();
    let next = &next;
    let read_some = move |mut bounce: AlignedBuf| -> io::Result<()> {
        while let Some(range) = ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
            read_covering(io, &mut bounce, range.clone())?;
            io.done_with(range.clone());
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let start = |bounce| std::thread::Builder::new().spawn_scoped(scope, move || read_some(bounce));
        let threads = buffers.into_iter().map(start).collect::<io::Result<Vec<_>>>()?;
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
    })?;
    let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    Ok(bytes as f64 / started.elapsed().as_secs_f64().max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;
    use st_gguf::{FileSource, MemorySource};
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn every_mode_reads_the_same_bytes() {
        let data: Vec<u8> = (0..(100 * PAGE + 77)).map(|i| (i % 251) as u8).collect();
        let file = file(&data);
        let source: Arc<dyn ReadAt> = Arc::new(FileSource::open(file.path()).unwrap());
        let samples: Vec<_> = (0..40u64).map(|i| i * 10_000..i * 10_000 + 9_000).collect();
        let mut bounce = AlignedBuf::new(bounce_bytes(10_000)).unwrap();
        for mode in [IoMode::Auto, IoMode::Buffered, IoMode::Direct] {
            for budgeted in [false, true] {
                let (io, measured) = match open(&source, mode, budgeted, false, &samples, 2, true) {
                    Ok(opened) => opened,
                    // Some file systems for temporary files offer no direct I/O; then it must be this error.
                    Err(StoreError::DirectRefused { .. }) if mode == IoMode::Direct => continue,
                    Err(error) => panic!("{error}"),
                };
                assert_eq!(io.path(), Some(file.path()));
                assert!(
                    measured.is_none_or(|m| budgeted && mode == IoMode::Auto && m.direct > 0.0 && m.buffered > 0.0)
                );
                for range in [0..10u64, 4095..9000, 409_000..409_677] {
                    let (got, _) = read_covering(io.as_ref(), &mut bounce, range.clone()).unwrap();
                    assert_eq!(got, &data[range.start as usize..range.end as usize]);
                    io.done_with(range);
                }
            }
        }
    }

    #[test]
    fn a_replaced_file_is_refused_and_memory_is_read_as_it_is() {
        let file = file(&[1; 9000]);
        let source: Arc<dyn ReadAt> = Arc::new(FileSource::open(file.path()).unwrap());
        std::fs::rename(self::file(&[2; 9000]).into_temp_path().keep().unwrap(), file.path()).unwrap();
        let error = open(&source, IoMode::Buffered, false, false, &[], 1, false).unwrap_err();
        assert!(matches!(&error, StoreError::Open { path, .. } if path == file.path()), "{error}");

        let source: Arc<dyn ReadAt> = Arc::new(MemorySource(b"embedded"));
        let (io, _) = open(&source, IoMode::Direct, true, false, &[], 1, false).unwrap();
        assert_eq!((io.name(), io.alignment()), ("memory", 1));
    }
}
