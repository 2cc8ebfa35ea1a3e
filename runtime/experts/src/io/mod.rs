//! Where expert bytes come from, behind [`ExpertIo`], and how one piece of an expert gets from there into its slot.
//!
//! An engine may deliver fewer bytes than asked for and may demand alignment; `read_covering` makes whole reads out of
//! that. Engines hold no buffers: memory that the kernel writes to belongs to the thread that waits for it.

mod buffered;
mod direct;
mod mapped;
mod noop;
mod probe;

pub use buffered::{BufferedIo, SourceIo};
pub use direct::DirectIo;
pub use noop::{Fault, FaultyIo};
pub(crate) use probe::open;
pub use probe::{ReadSpeed, read_speed};

use crate::buffer::{AlignedBuf, PAGE};
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// How to read experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoMode {
    /// Measure under a budget; otherwise records as the page cache has them, without a copy, or through it.
    #[default]
    Auto,
    /// Past the page cache; an error where the file system does not offer it.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A way to read the model file at any position, from any thread.
pub trait ExpertIo: Send + Sync + Debug {
    /// Reads at most `buf.len()` bytes from `offset` on and says how many came; 0 is the end of the file. Where
    /// [`ExpertIo::alignment`] is not 1, the buffer's address, its length and `offset` are multiples of it.
    ///
    /// # Errors
    /// What the system reports. A call that is interrupted is made again.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// What buffers, lengths and offsets have to be multiples of: 1 or [`PAGE`].
    fn alignment(&self) -> usize {
        1
    }

    /// Called when all of `range` has been read and will not be wanted again soon.
    fn done_with(&self, _range: Range<u64>) {}

    /// The file whose pages may take the place of a slot's, where records lie on pages, instead of being read into it.
    fn mappable(&self) -> Option<&File> {
        None
    }

    /// The file, for messages.
    fn path(&self) -> Option<&Path> {
        None
    }

    /// What to call this way of reading: `direct`, `buffered`, `mapped`, `memory`.
    fn name(&self) -> &'static str;
}

impl<I: ExpertIo + ?Sized> ExpertIo for Arc<I> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        (**self).read_at(buf, offset)
    }

    fn alignment(&self) -> usize {
        (**self).alignment()
    }

    fn done_with(&self, range: Range<u64>) {
        (**self).done_with(range);
    }

    fn mappable(&self) -> Option<&File> {
        (**self).mappable()
    }

    fn path(&self) -> Option<&Path> {
        (**self).path()
    }

    fn name(&self) -> &'static str {
        (**self).name()
    }
}

/// Reads until `needed` bytes of `buf` are there, completing short reads. `buf` may be longer than needed, as aligned reads
/// at the end of a file are. Returns how many bytes the reads delivered.
fn read_full(io: &dyn ExpertIo, buf: &mut [u8], offset: u64, needed: usize) -> io::Result<usize> {
    let alignment = io.alignment();
    let (mut have, mut delivered) = (0, 0);
    while have < needed {
        // Where alignment is demanded, a short read is continued from the last boundary that it passed.
        let from = have / alignment * alignment;
        match io.read_at(&mut buf[from..], offset + from as u64) {
            Ok(n) if from + n > have => {
                have = from + n;
                delivered += n;
            }
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(delivered)
}

/// Reads `range` by way of `bounce`, covering whole units of the engine's alignment, and returns the slice of `bounce` that
/// holds it, and how many bytes were read. `bounce` has at least two pages more than the range.
pub(crate) fn read_covering<'a>(
    io: &dyn ExpertIo,
    bounce: &'a mut AlignedBuf,
    range: Range<u64>,
) -> io::Result<(&'a [u8], usize)> {
    let alignment = io.alignment() as u64;
    let start = range.start / alignment * alignment;
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "the read does not fit its buffer");
    let skip = (range.start - start) as usize;
    let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| too_long())?;
    let needed = skip.checked_add(len).ok_or_else(too_long)?;
    let covering = needed.checked_next_multiple_of(alignment as usize).ok_or_else(too_long)?;
    let buf = bounce.as_mut_slice().get_mut(..covering).ok_or_else(too_long)?;
    let delivered = read_full(io, buf, start, needed)?;
    Ok((&buf[skip..needed], delivered))
}

/// Reads `range` right into `dest` where the engine's alignment allows it, otherwise by way of `bounce`.
pub(crate) fn read_into(
    io: &dyn ExpertIo,
    bounce: &mut AlignedBuf,
    range: Range<u64>,
    dest: &mut [u8],
) -> io::Result<usize> {
    let alignment = io.alignment();
    let aligned = range.start.is_multiple_of(alignment as u64)
        && dest.len().is_multiple_of(alignment)
        && dest.as_ptr().align_offset(alignment) == 0;
    if aligned {
        return read_full(io, dest, range.start, dest.len());
    }
    let (bytes, delivered) = read_covering(io, bounce, range)?;
    dest.copy_from_slice(bytes);
    Ok(delivered)
}

/// What a bounce buffer for pieces of up to `max_len` bytes has to hold.
pub(crate) fn bounce_bytes(max_len: usize) -> usize {
    max_len.saturating_add(2 * PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Delivers at most `most` bytes a time and insists on its alignment.
    #[derive(Debug)]
    struct Dribble {
        data: Vec<u8>,
        most: usize,
        alignment: usize,
    }

    impl ExpertIo for Dribble {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            assert!(offset.is_multiple_of(self.alignment as u64) && buf.len().is_multiple_of(self.alignment));
            assert_eq!(buf.as_ptr().align_offset(self.alignment), 0);
            let rest = self.data.get(offset as usize..).unwrap_or_default();
            let n = rest.len().min(buf.len()).min(self.most);
            buf[..n].copy_from_slice(&rest[..n]);
            Ok(n)
        }
        fn alignment(&self) -> usize {
            self.alignment
        }
        fn name(&self) -> &'static str {
            "dribble"
        }
    }

    #[test]
    fn short_reads_are_completed_and_ends_are_errors() {
        let data: Vec<u8> = (0..20_000u32).map(|i| (i * 7) as u8).collect();
        let mut bounce = AlignedBuf::new(bounce_bytes(20_000)).unwrap();
        for (alignment, most) in [(1, 1 << 20), (1, 999), (PAGE, 1 << 20), (PAGE, PAGE), (PAGE, 5000)] {
            let io = Dribble { data: data.clone(), most, alignment };
            for range in [0..20_000u64, 1..2, 4095..4097, 8192..12_288, 19_999..20_000, 5..5] {
                let want = &data[range.start as usize..range.end as usize];
                let (got, delivered) = read_covering(&io, &mut bounce, range.clone()).unwrap();
                assert_eq!(got, want);
                assert!(delivered >= want.len());
                let mut dest = vec![0; want.len()];
                read_into(&io, &mut bounce, range, &mut dest).unwrap();
                assert_eq!(dest, want);
            }
            let error = read_covering(&io, &mut bounce, 19_999..20_001).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            let error = read_covering(&io, &mut bounce, 0..u64::MAX).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
