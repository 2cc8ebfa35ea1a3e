//! The slab: one slot per cached expert, all in one piece of anonymous memory that is reserved once.
//!
//! Memory is taken from the system when a slot is first written, so a slab with a slot for every expert costs only what
//! was touched. The slab knows nothing of who uses a slot: the table decides, and the two unsafe accessors state what it
//! has to guarantee.

#![allow(unsafe_code)]

use st_sys::{PAGE, Pages};
use std::fs::File;
use std::io;
use std::ops::Range;

/// `n_slots` page-aligned slots of equal size.
#[derive(Debug)]
pub(crate) struct Slab {
    pages: Pages,
    /// Bytes from one slot to the next: the slot's size in whole pages.
    stride: usize,
    n_slots: usize,
}

impl Slab {
    /// Reserves the slab; `huge_pages` asks for large pages, which the kernel may refuse.
    pub(crate) fn new(n_slots: usize, slot_bytes: usize, huge_pages: bool) -> io::Result<Self> {
        let stride = slot_bytes.checked_next_multiple_of(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let total = stride.checked_mul(n_slots).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { pages: Pages::new(total, huge_pages)?, stride, n_slots })
    }

    /// Bytes that the slab takes once every slot has been filled, large pages included.
    pub(crate) fn bytes(&self) -> usize {
        self.pages.len()
    }

    /// Has the system give the memory of the bytes `part`, whole pages, before somebody writes to them.
    ///
    /// # Errors
    /// As [`Pages::take`].
    pub(crate) fn take(&self, part: Range<usize>) -> io::Result<()> {
        self.pages.take(part.start, part.len())
    }

    /// Bytes of the slots before `slot`.
    pub(crate) fn bytes_before(&self, slot: usize) -> usize {
        slot * self.stride
    }

    /// Gives the memory of `slots` back to the system.
    ///
    /// # Errors
    /// As [`Pages::give_back`].
    ///
    /// # Safety
    /// As for [`Slab::write`], for all bytes of these slots, and nobody reads one before it is written again.
    pub(crate) unsafe fn give_back(&self, slots: Range<usize>) -> io::Result<()> {
        // SAFETY: passed on to the caller; slots are whole pages and do not overlap.
        unsafe { self.pages.give_back(slots.start * self.stride, slots.len() * self.stride) }
    }

    fn ptr(&self, slot: u32, range: &Range<usize>) -> *mut u8 {
        let slot = slot as usize;
        assert!(
            slot < self.n_slots && range.start <= range.end && range.end <= self.stride,
            "slot range out of bounds"
        );
        // SAFETY: slot < n_slots and range.start <= stride, so the offset is within the pages: n_slots × stride bytes.
        unsafe { self.pages.as_ptr().add(slot * self.stride + range.start) }
    }

    /// The bytes `range` of `slot`.
    ///
    /// # Safety
    /// While the slice lives nobody writes to these bytes: their matrix has landed, and the slot is pinned.
    pub(crate) unsafe fn read(&self, slot: u32, range: Range<usize>) -> &[u8] {
        // SAFETY: `ptr` checked the bounds; the memory is initialised (zeroed by the kernel); the caller excludes writers.
        unsafe { std::slice::from_raw_parts(self.ptr(slot, &range), range.len()) }
    }

    /// Puts the first `len` bytes of `file` from `offset` on in the place of the slot's.
    ///
    /// # Errors
    /// As [`Pages::map_file`].
    ///
    /// # Safety
    /// As for [`Slab::write`], and nobody writes to the slot afterwards.
    pub(crate) unsafe fn map(&self, slot: u32, len: usize, file: &File, offset: u64) -> io::Result<()> {
        assert!((slot as usize) < self.n_slots && len <= self.stride, "slot out of bounds");
        // SAFETY: passed on to the caller; slots are whole pages and do not overlap.
        unsafe { self.pages.map_file(slot as usize * self.stride, len, file, offset) }
    }

    /// The bytes `range` of `slot`, to be filled.
    ///
    /// # Safety
    /// While the slice lives nobody else reads or writes these bytes: the caller owns the piece of the load that covers
    /// them, and that piece has not landed.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn write(&self, slot: u32, range: Range<usize>) -> &mut [u8] {
        // SAFETY: as in `read`, with the caller excluding every other access.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(slot, &range), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap() {
        let slab = Slab::new(3, 5000, false).unwrap();
        assert_eq!(slab.bytes(), 3 * 8192);
        for slot in 0..3u32 {
            // SAFETY: single-threaded, and no other slice is alive.
            unsafe { slab.write(slot, 0..5000) }.fill(slot as u8 + 1);
        }
        for slot in 0..3u32 {
            // SAFETY: nothing writes any more.
            let bytes = unsafe { slab.read(slot, 0..5000) };
            assert!(bytes.iter().all(|&b| b == slot as u8 + 1));
        }
    }

    #[test]
    #[should_panic(expected = "slot range out of bounds")]
    fn a_range_outside_a_slot_is_refused() {
        let slab = Slab::new(1, 100, false).unwrap();
        // SAFETY: never reached; the bounds check panics first.
        let _ = unsafe { slab.read(0, 0..4097) };
    }

    #[test]
    fn overflowing_sizes_are_errors() {
        assert!(Slab::new(usize::MAX, 4096, false).is_err());
        assert!(Slab::new(2, usize::MAX, false).is_err());
    }
}
