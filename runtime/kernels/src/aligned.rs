//! Zeroed memory on cache-line boundaries.

use std::alloc::Layout;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use st_sys::Pages;

mod sealed {
    /// Types for which any bytes are a value, zero included.
    pub trait Plain: Copy + Send + Sync + 'static {}
    impl Plain for u8 {}
    impl Plain for i8 {}
    impl Plain for u16 {}
    impl Plain for i32 {}
    impl Plain for f32 {}
    impl Plain for [i16; 2] {}
}
pub(crate) use sealed::Plain;

const ALIGN: usize = 64;
/// From here on memory is mapped: it is zero without being touched, and may have large pages.
const MAP_BYTES: usize = 1 << 20;
/// Address space of an arena; memory is taken as it is used.
const ARENA_BYTES: usize = 64 << 20;

/// A fixed-length, zero-initialised buffer of plain numbers (`u8, i8, u16, i32, f32`, pairs of `i16`), aligned to 64 bytes. Derefs to a slice.
pub struct AlignedBuf<T> {
    data: NonNull<u8>,
    len: usize,
    /// Kept for its drop.
    #[allow(dead_code)]
    memory: Memory,
    _type: PhantomData<T>,
}

/// Where a buffer's memory is from; dropping it gives the memory back.
enum Memory {
    None,
    Heap { data: NonNull<u8>, layout: Layout },
    Pages { _pages: Arc<Pages> },
}

// SAFETY: the buffer owns its memory, and its values are `Send` and `Sync` (`Plain`).
unsafe impl<T: Plain> Send for AlignedBuf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Plain> Sync for AlignedBuf<T> {}

impl<T: Plain> AlignedBuf<T> {
    /// `len` zeros. A large buffer takes memory from the system as it is first written, in large pages where the system has
    /// them.
    ///
    /// # Panics
    /// If the size overflows.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("buffer size overflows");
        let (data, memory) = if bytes == 0 {
            (NonNull::<Line>::dangling().cast(), Memory::None)
        } else {
            own_map(bytes).unwrap_or_else(|| heap(bytes))
        };
        Self { data, len, memory, _type: PhantomData }
    }

    /// Like [`Self::zeroed`], for weights: buffers made this way lie side by side, so that ones too small for a large page of
    /// their own get large pages too. Their memory is given back when all the neighbours are dropped.
    ///
    /// # Panics
    /// If the size overflows.
    pub fn zeroed_in_arena(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("buffer size overflows");
        match arena(bytes) {
            Some((data, memory)) => Self { data, len, memory, _type: PhantomData },
            None => Self::zeroed(len),
        }
    }
}

#[repr(align(64))]
struct Line;

fn heap(bytes: usize) -> (NonNull<u8>, Memory) {
    let layout = Layout::from_size_align(bytes, ALIGN).expect("buffer size overflows");
    // SAFETY: the layout is not empty.
    match NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }) {
        Some(data) => (data, Memory::Heap { data, layout }),
        None => std::alloc::handle_alloc_error(layout),
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Heap { data, layout } = self {
            // SAFETY: allocated by `heap` with this layout, and the buffer that used it is being dropped.
            unsafe { std::alloc::dealloc(data.as_ptr(), *layout) };
        }
    }
}

fn own_map(bytes: usize) -> Option<(NonNull<u8>, Memory)> {
    if bytes < MAP_BYTES {
        return None;
    }
    let pages = Pages::exact(bytes).ok()?;
    Some((NonNull::new(pages.as_ptr())?, Memory::Pages { _pages: Arc::new(pages) }))
}

/// What is left of the pages that buffers are being placed in side by side.
struct Arena {
    pages: Arc<Pages>,
    used: usize,
}

/// A part of the current arena for buffers of middling size; `None` for others.
fn arena(bytes: usize) -> Option<(NonNull<u8>, Memory)> {
    static CURRENT: Mutex<Option<Arena>> = Mutex::new(None);
    if !(ARENA_BYTES / 4096..=ARENA_BYTES / 4).contains(&bytes) {
        return None;
    }
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let fits = |arena: &Arena| ARENA_BYTES - arena.used >= bytes;
    // Nobody else holds an arena that all its buffers have left: a new one is zero again.
    if !current.as_ref().is_some_and(|arena| fits(arena) && Arc::strong_count(&arena.pages) > 1) {
        *current = Some(Arena { pages: Arc::new(Pages::exact(ARENA_BYTES).ok()?), used: 0 });
    }
    let arena = current.as_mut()?;
    // SAFETY: used + bytes <= ARENA_BYTES, the length of the pages; parts do not overlap, since `used` only grows.
    let data = NonNull::new(unsafe { arena.pages.as_ptr().add(arena.used) })?;
    arena.used = (arena.used + bytes).next_multiple_of(ALIGN).min(ARENA_BYTES);
    Some((data, Memory::Pages { _pages: Arc::clone(&arena.pages) }))
}

impl<T: Plain> Clone for AlignedBuf<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Plain> Default for AlignedBuf<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Plain> Deref for AlignedBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the memory holds `len` values of T, aligned to 64, initialised, and any bytes are a T (`Plain`).
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().cast(), self.len) }
    }
}

impl<T> std::fmt::Debug for AlignedBuf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zero_and_writable() {
        for len in [1, 100, 300_000, 3_000_000] {
            let neighbour = AlignedBuf::<f32>::zeroed_in_arena(len);
            for mut b in [AlignedBuf::<f32>::zeroed(len), AlignedBuf::zeroed_in_arena(len)] {
                assert_eq!(b.as_ptr() as usize % 64, 0);
                assert!(b.len() == len && b.iter().all(|&v| v == 0.0));
                b[len - 1] = 1.0;
                assert_eq!(b.clone()[len - 1], 1.0);
                assert_eq!(neighbour[len - 1], 0.0);
            }
        }
        assert!(AlignedBuf::<i8>::zeroed(0).is_empty());
        assert_eq!(AlignedBuf::<i8>::zeroed(0).as_ptr() as usize % 64, 0);
    }
}
