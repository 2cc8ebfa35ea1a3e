//! How a store works and what memory that takes, decided before anything is opened.

use crate::SlotFormat;
use crate::error::StoreError;
use crate::io::IoMode;
use crate::reader::bounce_bytes_for;
use st_gguf::ExpertIndex;
use st_sys::{PAGE, Pages};

/// As `n_slots`: a slot for every expert, and nothing is ever evicted.
pub const ALL_EXPERTS: usize = usize::MAX;

/// The most experts in one lease, whatever the number of slots.
pub const MAX_LEASE: usize = 256;

/// The most experts of all layers together; far above any model, and little memory.
const MAX_EXPERTS: usize = 1 << 20;

/// The most reads in flight.
pub(crate) const MAX_IO_THREADS: usize = 8;

/// How a store works. `StoreOptions::default()` holds every expert and prefetches.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Slots, each for one expert; [`ALL_EXPERTS`], or anything above what the model has, means one for each.
    pub n_slots: usize,
    /// Slots beyond those, whose memory is lent and may be asked for ([`ExpertStore::set_lent`](crate::ExpertStore::set_lent)).
    pub lent: usize,
    /// Experts that one token needs in one layer; fewer than twice as many slots are refused.
    pub top_k: usize,
    /// How to read.
    pub io: IoMode,
    /// Reads in flight, each on a thread of its own; from 1 to 8 (anything else is brought into that range).
    pub io_threads: usize,
    /// Whether [`ExpertStore::prefetch`](crate::ExpertStore::prefetch) and the waves' look-ahead do anything.
    pub prefetch: bool,
    /// Slots that guesses ([`ExpertStore::prefetch_guess`](crate::ExpertStore::prefetch_guess)) may take from the cache; 0 for no guesses.
    pub guess_slots: usize,
    /// Ask for large pages for slots and buffers. Direct reads into them take fewer requests (measured, 650 KiB reads, four
    /// in flight: 1.8 GB/s against 1.3), at the price of up to 2 MiB that a slab's last page wastes.
    pub huge_pages: bool,
}

impl StoreOptions {
    /// Whether each of `n_experts` experts has a slot, so that nothing is ever evicted.
    pub(crate) fn is_resident(&self, n_experts: usize) -> bool {
        self.n_slots >= n_experts
    }
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            n_slots: ALL_EXPERTS,
            lent: 0,
            top_k: 1,
            io: IoMode::Auto,
            io_threads: 4,
            prefetch: true,
            guess_slots: 0,
            huge_pages: true,
        }
    }
}

/// The memory that a store takes, in bytes, once every slot and buffer has been used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreMemory {
    /// All slots; they are taken from the system as slots are first filled.
    pub slab_bytes: usize,
    /// The I/O threads' buffers.
    pub io_buffer_bytes: usize,
}

impl StoreMemory {
    /// What a store with these options will take, so that a budget can be planned before anything is opened.
    pub fn of(index: &ExpertIndex, format: &dyn SlotFormat, options: &StoreOptions) -> Self {
        let n_keys = index.n_layers().saturating_mul(index.n_experts());
        let footprint = |bytes: usize| Pages::footprint(bytes, options.huge_pages).unwrap_or(usize::MAX);
        let stride = format.slot_bytes().checked_next_multiple_of(PAGE).unwrap_or(usize::MAX);
        let bounce_bytes = bounce_bytes_for(index, format).saturating_mul(options.io_threads.clamp(1, MAX_IO_THREADS));
        Self {
            slab_bytes: footprint(stride.saturating_mul(options.n_slots.min(n_keys))),
            io_buffer_bytes: if bounce_bytes == 0 { 0 } else { footprint(bounce_bytes) },
        }
    }

    /// Both together.
    pub fn total(&self) -> usize {
        self.slab_bytes.saturating_add(self.io_buffer_bytes)
    }
}

/// Experts in all layers.
pub(crate) fn count_experts(index: &ExpertIndex) -> Result<usize, StoreError> {
    let got = index.n_layers().saturating_mul(index.n_experts());
    if got > MAX_EXPERTS { Err(StoreError::TooManyExperts { got, limit: MAX_EXPERTS }) } else { Ok(got) }
}
