//! What the server counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that threads share.
#[derive(Debug, Default)]
pub(crate) struct Number(AtomicU64);

impl Number {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// Adds a time, in nanoseconds.
    pub(crate) fn add_time(&self, time: Duration) {
        self.add(time.as_nanos() as u64);
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.get() as f64 / 1e9
    }
}

/// What is counted since the server began.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Requests by the hundreds of their status.
    pub(crate) responses: [Number; 6],
    /// Jobs that were refused for want of room.
    pub(crate) refused: Number,
    /// Answers whose client had gone.
    pub(crate) hung_up: Number,
    /// Tokens of the prompts of jobs that began.
    pub(crate) prompt_tokens: Number,
    /// Of them, tokens that were not run again.
    pub(crate) cached_tokens: Number,
    /// Jobs that began with tokens that were not run again.
    pub(crate) prefix_hits: Number,
    /// Tokens of prompts that were run.
    pub(crate) read_tokens: Number,
    pub(crate) made_tokens: Number,
    /// Tokens that were drafted and run, and those of them that were right.
    pub(crate) drafted: Number,
    pub(crate) accepted: Number,
    pub(crate) steps: Number,
    /// Tokens of prompts that are read at once while others are answered.now.
    pub(crate) piece: Number,
    /// Time in steps.
    pub(crate) busy: Number,
    pub(crate) kv_pages: Number,
    pub(crate) prefixes: Number,
    pub(crate) connections: Number,
    pub(crate) snapshots: Number,
    pub(crate) snapshot_bytes: Number,
}
