//! Page-aligned anonymous memory: what direct reads write to, and what the slab is cut from.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// The alignment of files, buffers and lengths that direct I/O is given: one page.
pub const PAGE: usize = 4096;

/// Huge pages are asked for at this alignment.
const HUGE_PAGE: usize = 2 << 20;

/// Anonymous zeroed memory, reserved at once and backed page by page as it is first touched.
///
/// It owns the mapping and nothing else: who may read or write which part is decided by its user.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    /// Usable bytes from `base`.
    len: usize,
    /// What was mapped, `base` included.
    mapped: (NonNull<libc::c_void>, usize),
}

// SAFETY: the mapping is plain memory that belongs to this value alone; access goes through raw pointers whose users
// state their own rules.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method of `Mapping` itself reads or writes the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes, aligned to a page, or to 2 MiB where `huge_pages` asks the kernel for large pages.
    pub(crate) fn new(len: usize, huge_pages: bool) -> io::Result<Self> {
        let slack = if huge_pages { HUGE_PAGE } else { 0 };
        let len = Self::footprint(len, huge_pages).ok_or(io::ErrorKind::OutOfMemory)?;
        let total = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous private mapping at an address of the kernel's choosing touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), total, prot, flags | libc::MAP_NORESERVE, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        let skip = if huge_pages { start.cast::<u8>().align_offset(HUGE_PAGE) } else { 0 };
        // SAFETY: `skip` is below 2 MiB, which `total` has to spare, so the pointer stays inside the mapping.
        let base = unsafe { start.cast::<u8>().add(skip) };
        #[cfg(target_os = "linux")]
        if huge_pages {
            // SAFETY: the range lies inside the mapping made above. The advice is a hint: a refusal changes nothing.
            unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
        Ok(Self { base, len, mapped: (start, total) })
    }

    /// The memory that a mapping for `len` bytes takes once all of it has been touched.
    pub(crate) fn footprint(len: usize, huge_pages: bool) -> Option<usize> {
        len.max(1).checked_next_multiple_of(if huge_pages { HUGE_PAGE } else { PAGE })
    }

    /// Usable bytes: what was asked for, rounded up to what is taken.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts the `len` bytes of `file` from `offset` on, as whole pages of the page cache, in the place of the memory from `at` on, and
    /// waits until they are there. From then on they can only be read.
    ///
    /// # Errors
    /// `UnexpectedEof` where the file ends before; otherwise what the system reports, `EFAULT` for what cannot be read.
    ///
    /// # Safety
    /// While this runs nobody touches these pages, and nobody writes to them afterwards.
    pub(crate) unsafe fn map_file(&self, at: usize, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let inside = at.is_multiple_of(PAGE) && at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "a mapping of {len} bytes at {at} in {}", self.len);
        if file.metadata()?.len() < offset.saturating_add(len as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_FIXED);
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is part of this mapping, which stays the owner of its addresses; the caller excludes others.
        let start = unsafe {
            let start = self.as_ptr().add(at).cast();
            libc::mmap(start, len, prot, flags, file.as_raw_fd(), offset)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range was mapped just now.
        unsafe { populate(start, len) }
    }

    /// The first byte; valid for `len()` bytes as long as the mapping lives.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

/// Waits until all pages of a file's mapping are there. Touching one that cannot be read would be a signal; this is an error.
///
/// # Safety
/// The range is mapped.
#[cfg(target_os = "linux")]
unsafe fn populate(start: *mut libc::c_void, len: usize) -> io::Result<()> {
    // SAFETY: the caller's promise; the one is a hint to read ahead, the other brings pages in, and neither changes a byte.
    let refused = unsafe {
        libc::madvise(start, len, libc::MADV_WILLNEED);
        libc::madvise(start, len, libc::MADV_POPULATE_READ)
    };
    if refused == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
unsafe fn populate(_start: *mut libc::c_void, _len: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the range that `new` mapped, and no borrow of it can outlive `self`.
        unsafe { libc::munmap(self.mapped.0.as_ptr(), self.mapped.1) };
    }
}

/// A page-aligned buffer of one thread.
#[derive(Debug)]
pub struct AlignedBuf {
    mapping: Arc<Mapping>,
    /// This buffer's part of the mapping, shared with no other buffer.
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
        let mapping = Arc::new(Mapping::new(total, huge_pages)?);
        Ok((0..n).map(|i| Self { mapping: Arc::clone(&mapping), part: i * len..(i + 1) * len }).collect())
    }

    /// The whole buffer.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `part` lies within the mapping's initialised (zeroed) bytes; the parts of different buffers are disjoint
        // and `&mut self` makes this the only access to this one.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr().add(self.part.start), self.part.len()) }
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
        assert_eq!(Mapping::new(5 << 20, true).unwrap().as_ptr().align_offset(HUGE_PAGE), 0);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(AlignedBuf::new(usize::MAX).is_err());
        assert!(Mapping::new(usize::MAX - 5, true).is_err());
        assert!(Mapping::new(1 << 60, false).is_err());
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
