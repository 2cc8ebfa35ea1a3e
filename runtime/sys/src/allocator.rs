//! Memory that is not to be had: what happens then is for the program to say.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, which tells `refused` how many bytes the system did not give. Where `refused` returns, whoever
/// asked for them gets none, and most who ask end the process with a signal.
#[derive(Debug)]
pub struct Allocator {
    refused: fn(usize),
}

impl Allocator {
    /// `refused` is called in the midst of anything, by any thread, and has to do without memory.
    pub const fn new(refused: fn(usize)) -> Self {
        Self { refused }
    }

    fn checked(&self, memory: *mut u8, bytes: usize) -> *mut u8 {
        if memory.is_null() {
            (self.refused)(bytes);
        }
        memory
    }
}

// SAFETY: every call is handed on to the system's allocator as it is, and so is what that returns.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: what the caller promises of the layout is what the system's allocator asks for.
        self.checked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        self.checked(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as above; all memory comes from the system's allocator.
        self.checked(unsafe { System.realloc(memory, layout, bytes) }, bytes)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_is_refused_is_told_and_the_rest_is_the_systems() {
        static REFUSED: AtomicUsize = AtomicUsize::new(0);
        let allocator = Allocator::new(|bytes| REFUSED.store(bytes, Ordering::Relaxed));
        let (small, huge) = (Layout::new::<[u64; 4]>(), Layout::array::<u8>(isize::MAX as usize - 64).unwrap());
        // SAFETY: neither layout is empty, and what is given back was given.
        unsafe {
            let memory = allocator.alloc_zeroed(small);
            assert_eq!(memory.read(), 0);
            let memory = allocator.realloc(memory, small, 64);
            allocator.dealloc(memory, Layout::from_size_align(64, small.align()).unwrap());
            assert_eq!(REFUSED.load(Ordering::Relaxed), 0);
            // Hidden from the compiler, which takes an allocation that nobody uses for one that succeeds.
            assert!(std::hint::black_box(allocator.alloc(huge)).is_null());
        }
        assert_eq!(REFUSED.load(Ordering::Relaxed), huge.size());
    }
}
