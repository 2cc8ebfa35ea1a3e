//! How a conversion tells its caller how far it is, and how the caller tells it to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::ConvertError;

/// Receives progress, counted in bytes of input. Called from the thread that runs the conversion.
pub trait Progress: Send + Sync {
    /// Work begins; `total_bytes` will be read.
    fn start(&self, total_bytes: u64);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
    /// Everything is written.
    fn finish(&self);
}

/// Progress that nobody watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
}

/// A request to stop, shared with whoever may make it (a signal handler, another thread).
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A request that was not made yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The request as a flag, for work that knows no other type; raising it is asking.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }

    /// Asks the work to stop at its next step. Safe to call from a signal handler.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// `Err(Cancelled)` once somebody asked.
    pub(crate) fn check(&self) -> Result<(), ConvertError> {
        if self.is_cancelled() { Err(ConvertError::Cancelled) } else { Ok(()) }
    }
}
