//! Page-aligned buffers: what direct reads write to.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use st_sys::PAGE;
use st_sys::Pages;

/// A page-aligned buffer of one thread.
#[derive(Debug)]
pub struct AlignedBuf {
    pages: Arc<Pages>,
    /// This buffer's part of the pages, shared with no other buffer.
    part: Range<usize>,
}

impl AlignedBuf {
    /// At least `len` zeroed bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// Where there is no such amount of memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let mut buffers = Self::several(1, len, false)?;
        buffers.pop().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// `n` such buffers side by side, where `huge_pages` asks for large pages: a direct read into memory that is contiguous
    /// for the drive as well takes fewer requests (measured: up to twice the throughput).
    ///
    /// # Errors
    /// Where there is no such amount of memory.
    pub fn several(n: usize, len: usize, huge_pages: bool) -> io::Result<Vec<Self>> {
        let len = len.checked_next_multiple_of(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let total = len.checked_mul(n).ok_or(io::ErrorKind::OutOfMemory)?;
        let pages = Arc::new(Pages::new(total, huge_pages)?);
        Ok((0..n).map(|i| Self { pages: Arc::clone(&pages), part: i * len..(i + 1) * len }).collect())
    }

    /// The whole buffer.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `part` lies within the pages' initialised (zeroed) bytes; the parts of different buffers are disjoint
        // and `&mut self` makes this the only access to this one.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_ptr().add(self.part.start), self.part.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_writable() {
        for len in [0, 1, PAGE, PAGE + 1, 3 << 20] {
            let mut buf = AlignedBuf::new(len).unwrap();
            let slice = buf.as_mut_slice();
            assert!(slice.len() >= len && slice.len().is_multiple_of(PAGE));
            assert_eq!(slice.as_ptr().align_offset(PAGE), 0);
            assert!(slice.iter().all(|&b| b == 0));
            slice.fill(7);
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(AlignedBuf::new(usize::MAX).is_err());
        assert!(AlignedBuf::several(usize::MAX / 2, PAGE, false).is_err());
    }

    #[test]
    fn several_buffers_do_not_overlap() {
        let mut buffers = AlignedBuf::several(3, PAGE + 1, true).unwrap();
        for (i, buf) in buffers.iter_mut().enumerate() {
            buf.as_mut_slice().fill(i as u8);
        }
        for (i, buf) in buffers.iter_mut().enumerate() {
            let slice = buf.as_mut_slice();
            assert_eq!((slice.len(), slice.as_ptr().align_offset(PAGE)), (2 * PAGE, 0));
            assert!(slice.iter().all(|&b| b == i as u8));
        }
    }
}
