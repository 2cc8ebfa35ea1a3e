//! A token in steady state allocates nothing: neither one alone, nor one of each of several conversations.

#![allow(unsafe_code)]

#[allow(dead_code)]
mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use st_convert::WeightType;
use st_model::{Batch, BatchKind, Engine, LoadOptions, Sequence};

/// Counts what is allocated, in all threads.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(data, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs tokens of `n` conversations together; returns what the later ones of them allocated.
fn allocated(engine: &Engine, n: usize) -> u64 {
    let mut sequences: Vec<Sequence> = (0..n).map(|_| engine.sequence()).collect();
    let mut workspace = engine.workspace().expect("a workspace");
    let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
    let mut batch = Batch::default();
    let mut step = |i: usize| {
        batch.clear(BatchKind::Decode);
        (0..n).for_each(|sequence| {
            batch.push_with_logits(sequence, (i * 31 + sequence * 7) as u32 % 1000);
        });
        engine.forward(&batch, &mut all, &mut workspace, &mut ()).expect("a pass");
    };
    // Buffers grow to their sizes first; a page of keys and values has room for 256 tokens, and the list of tokens by then, too.
    (0..130).for_each(&mut step);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (130..250).for_each(&mut step);
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn a_token_in_steady_state_allocates_nothing() {
    let checkpoint = common::repo("models/tiny/checkpoint");
    for ty in [WeightType::Q4_0, WeightType::Q8_0, WeightType::F16] {
        let path = common::converted(&checkpoint, ty, st_convert::Layout::Gguf);
        for slots in [None, Some(40)] {
            for threads in [1, 2] {
                let options = LoadOptions { threads, slots, guess: false, ..LoadOptions::default() };
                let engine = Engine::open(&path, &options).expect("a model");
                for n in [1, 2, 8] {
                    // What each token allocated would be 120; a list of the cache may still grow once.
                    let got = allocated(&engine, n);
                    assert!(got <= 20, "{ty:?}, {n} conversations, {slots:?} slots, {threads} threads: {got}");
                }
            }
        }
    }
}
