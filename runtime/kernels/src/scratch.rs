//! Per-thread scratch memory, so that kernels called many times per token do not allocate.

use std::cell::Cell;

use crate::activations::Sums;
use crate::aligned::{AlignedBuf, Plain};

thread_local! {
    static FLOATS: Cell<AlignedBuf<f32>> = Cell::default();
    static BYTES: Cell<AlignedBuf<u8>> = Cell::default();
    static SUMS: Cell<AlignedBuf<Sums>> = Cell::default();
}

/// Runs `f` with `len` floats of this thread's scratch; their contents are left from before.
pub(crate) fn with_floats<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    FLOATS.with(|cell| with(cell, len, f))
}

/// Runs `f` with `len` bytes of this thread's scratch; their contents are left from before.
pub(crate) fn with_bytes<R>(len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    BYTES.with(|cell| with(cell, len, f))
}

/// Runs `f` with the sums of `len` blocks in this thread's scratch; their contents are left from before.
pub(crate) fn with_sums<R>(len: usize, f: impl FnOnce(&mut [Sums]) -> R) -> R {
    SUMS.with(|cell| with(cell, len, f))
}

fn with<T: Plain, R>(cell: &Cell<AlignedBuf<T>>, len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    // A nested use finds an empty buffer and gets one of its own.
    let mut buf = cell.take();
    if buf.len() < len {
        buf = AlignedBuf::zeroed(len);
    }
    let result = f(&mut buf[..len]);
    cell.set(buf);
    result
}
