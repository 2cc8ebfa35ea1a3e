//! Anonymous pages: reserved at once, backed as they are first touched.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use crate::os;

/// The alignment of files, buffers and lengths that reads past the page cache are given.
pub const PAGE: usize = 4096;

/// A page as the system itself has it, which is larger than [`PAGE`] on some AArch64 machines: 16 or 64 KiB.
pub fn system_page() -> usize {
    os::system_page()
}

/// Large pages are asked for at this alignment.
pub const LARGE_PAGE: usize = 2 << 20;

/// Zeroed memory in whole pages.
///
/// It owns the memory and nothing else: who may read or write which part is decided by its user.
#[derive(Debug)]
pub struct Pages {
    base: NonNull<u8>,
    /// Usable bytes from `base`.
    len: usize,
    /// Kept for its drop.
    _reserved: os::Reserved,
}

// SAFETY: the memory belongs to this value alone; access goes through raw pointers whose users state their own rules.
unsafe impl Send for Pages {}
// SAFETY: as above; no method of `Pages` itself reads or writes the memory.
unsafe impl Sync for Pages {}

impl Pages {
    /// Reserves `len` bytes, rounded up to whole pages. With `large` they begin at 2 MiB and the system is asked for large pages,
    /// which it may refuse; the length is then rounded up to 2 MiB.
    ///
    /// # Errors
    /// Where there is no such amount of address space.
    pub fn new(len: usize, large: bool) -> io::Result<Self> {
        let len = Self::footprint(len, large).ok_or(io::ErrorKind::OutOfMemory)?;
        Self::reserve(len, if large { LARGE_PAGE } else { PAGE }, if large { len } else { 0 })
    }

    /// Reserves `len` bytes that begin at 2 MiB, and asks for large pages for all whole ones among them: one at the end would take more
    /// memory than `len`.
    ///
    /// # Errors
    /// As [`Pages::new`].
    pub fn exact(len: usize) -> io::Result<Self> {
        Self::reserve(len.max(1), LARGE_PAGE, len / LARGE_PAGE * LARGE_PAGE)
    }

    fn reserve(len: usize, align: usize, large: usize) -> io::Result<Self> {
        let (base, reserved) = os::Reserved::new(len, align, large)?;
        Ok(Self { base, len, _reserved: reserved })
    }

    /// The memory that `len` bytes take once all of them have been touched; `None` where that overflows.
    pub fn footprint(len: usize, large: bool) -> Option<usize> {
        len.max(1).checked_next_multiple_of(if large { LARGE_PAGE } else { PAGE })
    }

    /// Usable bytes: what was asked for, rounded up to what is taken.
    #[allow(clippy::len_without_is_empty, reason = "there is always at least one byte")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The first byte; valid for `len()` bytes as long as this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Has the system give the memory of `len` bytes from `at` on now, which it would give when they are first written to. That takes
    /// as long as zeroing it does, and changes nothing that is there.
    ///
    /// # Errors
    /// What the system reports, `Unsupported` where it gives memory no earlier.
    ///
    /// # Panics
    /// If the range is no whole number of pages of this memory.
    pub fn take(&self, at: usize, len: usize) -> io::Result<()> {
        let inside = at.is_multiple_of(PAGE) && at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{len} bytes at {at} of {} in memory", self.len);
        // The system takes no address inside of a page of its own; memory begins at one.
        let before = at % system_page();
        // SAFETY: the range is part of this memory.
        unsafe { os::take(self.as_ptr().add(at - before), len + before) }
    }

    /// Gives the memory of `len` bytes from `at` on back to the system; the addresses stay. What is read there afterwards is undefined until
    /// it is written, and writing takes memory again. Where the system's pages are larger than [`PAGE`], those stay that only begin or end in
    /// the range.
    ///
    /// # Errors
    /// What the system reports; then the memory is still taken.
    ///
    /// # Panics
    /// If the range is no whole number of pages of this memory.
    ///
    /// # Safety
    /// While this runs nobody touches these bytes, and nobody relies on what they were.
    pub unsafe fn give_back(&self, at: usize, len: usize) -> io::Result<()> {
        let inside = at.is_multiple_of(PAGE) && at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{len} bytes at {at} of {} in memory", self.len);
        let whole = whole_pages(at..at + len, system_page());
        if whole.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is part of this memory; the caller excludes others.
        unsafe { os::give_back(self.as_ptr().add(whole.start), whole.len()) }
    }

    /// Puts the `len` bytes of `file` from `offset` on, as whole pages of the page cache, in the place of the memory from `at` on, and
    /// waits until they are there. From then on they can only be read.
    ///
    /// # Errors
    /// `UnexpectedEof` where the file ends before, `Unsupported` where the system cannot wait or its pages are larger than [`PAGE`]; otherwise
    /// what it reports, `EFAULT` for what cannot be read.
    ///
    /// # Panics
    /// If the range is no whole number of pages of this memory.
    ///
    /// # Safety
    /// While this runs nobody touches these pages, and nobody writes to them afterwards.
    pub unsafe fn map_file(&self, at: usize, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let inside = at.is_multiple_of(PAGE) && at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "a mapping of {len} bytes at {at} in {}", self.len);
        if !PAGE.is_multiple_of(system_page()) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if file.metadata()?.len() < offset.saturating_add(len as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: `at` lies inside the memory; the range is part of it, which stays the owner of its addresses; the caller excludes others.
        unsafe { os::map_file(self.as_ptr().add(at), len, file, offset) }
    }
}

/// The pages of `page` bytes that lie in `range` as a whole.
fn whole_pages(range: Range<usize>, page: usize) -> Range<usize> {
    let end = range.end / page * page;
    range.start.next_multiple_of(page).min(end)..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_only_begin_or_end_in_a_range_are_not_of_it() {
        const KIB: usize = 1 << 10;
        for (range, page, whole) in [
            (4..44, 4, 4..44),
            (4..44, 16, 16..32),
            (16..48, 16, 16..48),
            (4..28, 16, 16..16),
            (20..28, 16, 16..16),
            (60..200, 64, 64..192),
            (4..60, 64, 0..0),
        ] {
            let found = whole_pages(range.start * KIB..range.end * KIB, page * KIB);
            assert_eq!(found.len(), (whole.end - whole.start) * KIB, "{range:?} {page}");
            assert!(found.is_empty() || found.start == whole.start * KIB, "{range:?} {page}");
        }
    }

    /// Writes to every page and reads it back.
    fn touch(pages: &Pages) {
        // SAFETY: the pages are this test's alone, zeroed, and `len` bytes long.
        let bytes = unsafe { std::slice::from_raw_parts_mut(pages.as_ptr(), pages.len()) };
        assert!(bytes.iter().step_by(PAGE).all(|&byte| byte == 0));
        bytes.fill(7);
        assert_eq!(bytes[bytes.len() - 1], 7);
    }

    #[test]
    fn pages_are_aligned_zeroed_and_writable() {
        for len in [0, 1, PAGE, PAGE + 1, 3 << 20] {
            let pages = Pages::new(len, false).unwrap();
            assert!(pages.len() >= len && pages.len().is_multiple_of(PAGE));
            assert_eq!(pages.as_ptr().align_offset(PAGE), 0);
            touch(&pages);
        }
        let large = Pages::new(5 << 20, true).unwrap();
        assert_eq!((large.as_ptr().align_offset(LARGE_PAGE), large.len()), (0, 6 << 20));
        touch(&large);
        let exact = Pages::exact((5 << 20) + 3).unwrap();
        assert_eq!((exact.as_ptr().align_offset(LARGE_PAGE), exact.len()), (0, (5 << 20) + 3));
        touch(&exact);
    }

    #[test]
    fn memory_can_be_had_before_it_is_used() {
        let pages = Pages::new(4 << 20, true).unwrap();
        // SAFETY: the page is this test's alone.
        unsafe { *pages.as_ptr().add(3) = 7 };
        let taken = pages.take(0, 4 << 20);
        assert!(taken.is_ok() || cfg!(not(target_os = "linux")), "{taken:?}");
        // SAFETY: as above.
        unsafe {
            assert_eq!([*pages.as_ptr().add(3), *pages.as_ptr().add(4)], [7, 0]);
            *pages.as_ptr().add(3) = 0;
        }
        touch(&pages);
    }

    #[test]
    fn memory_that_is_given_back_is_no_longer_resident_and_can_be_used_again() {
        const BYTES: usize = 64 << 20;
        let pages = Pages::new(BYTES, true).unwrap();
        touch(&pages);
        let before = crate::resident();
        // SAFETY: the pages are this test's alone.
        unsafe { pages.give_back(BYTES / 2, BYTES / 2) }.unwrap();
        if let (Some(before), Some(after)) = (before, crate::resident()) {
            assert!(after + (BYTES as u64 / 4) < before, "{after} of {before} bytes");
        }
        // SAFETY: as above; the first half was not given back.
        assert_eq!(unsafe { *pages.as_ptr().add(BYTES / 2 - 1) }, 7);
        // A page of ours between two others, which keep what they have whatever the system's pages are.
        let at = BYTES / 4 + PAGE;
        pages.take(at, PAGE).or_else(|error| if cfg!(target_os = "linux") { Err(error) } else { Ok(()) }).unwrap();
        // SAFETY: as above.
        unsafe {
            pages.give_back(at, PAGE).unwrap();
            assert_eq!([*pages.as_ptr().add(at - 1), *pages.as_ptr().add(at + PAGE)], [7, 7]);
        }
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(pages.as_ptr(), BYTES) }.fill(9);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(Pages::new(usize::MAX - 5, true).is_err());
        assert!(Pages::new(usize::MAX, false).is_err());
        assert!(Pages::new(1 << 60, false).is_err());
        assert!(Pages::exact(usize::MAX).is_err());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_takes_the_place_of_pages_and_its_end_is_an_error() {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[3; 3 * PAGE]).unwrap();
        let pages = Pages::new(4 * PAGE, false).unwrap();
        // SAFETY: the pages are this test's alone and not written to afterwards.
        unsafe {
            let mapped = pages.map_file(PAGE, 2 * PAGE, &file, PAGE as u64);
            if system_page() > PAGE {
                assert_eq!(mapped.unwrap_err().kind(), io::ErrorKind::Unsupported);
                return;
            }
            mapped.unwrap();
            assert_eq!(*pages.as_ptr().add(PAGE), 3);
            assert_eq!(*pages.as_ptr(), 0);
            let past = pages.map_file(0, 2 * PAGE, &file, 2 * PAGE as u64).unwrap_err();
            assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
