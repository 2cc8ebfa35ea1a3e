//! Zeroed memory on cache-line boundaries.

use std::ops::{Deref, DerefMut};

mod sealed {
    /// Types for which any bytes are a value, zero included.
    pub trait Plain: Copy + Send + Sync + 'static {}
    impl Plain for u8 {}
    impl Plain for i8 {}
    impl Plain for u16 {}
    impl Plain for i32 {}
    impl Plain for f32 {}
}
pub(crate) use sealed::Plain;

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// A fixed-length, zero-initialised buffer of plain numbers (`u8, i8, u16, i32, f32`), aligned to 64 bytes. Derefs to a slice.
#[derive(Clone)]
pub struct AlignedBuf<T> {
    lines: Vec<Line>,
    len: usize,
    _type: std::marker::PhantomData<T>,
}

impl<T: Plain> AlignedBuf<T> {
    /// `len` zeros. Large buffers come from the system as untouched zero pages.
    ///
    /// # Panics
    /// If the size overflows.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("buffer size overflows");
        let n = bytes.div_ceil(64);
        let layout = std::alloc::Layout::array::<Line>(n).expect("buffer size overflows");
        let lines = if n == 0 {
            Vec::new()
        } else {
            // SAFETY: the layout is not empty; the memory holds `n` lines, all zero, which is a valid `Line`, and a `Vec`
            // frees with the same layout.
            unsafe {
                let p = std::alloc::alloc_zeroed(layout).cast::<Line>();
                if p.is_null() {
                    std::alloc::handle_alloc_error(layout);
                }
                Vec::from_raw_parts(p, n, n)
            }
        };
        Self { lines, len, _type: std::marker::PhantomData }
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
        // SAFETY: the lines hold at least `len` values of T, aligned to 64, and any bytes are a T (`Plain`).
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and any T leaves valid bytes.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
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
        let mut b = AlignedBuf::<f32>::zeroed(100);
        assert_eq!(b.as_ptr() as usize % 64, 0);
        assert!(b.len() == 100 && b.iter().all(|&v| v == 0.0));
        b[99] = 1.0;
        assert_eq!(b.clone()[99], 1.0);
        assert!(AlignedBuf::<i8>::zeroed(0).is_empty());
    }
}
