//! The expert store: experts' weights in a fixed number of memory slots, read from the model file when they are needed.
//!
//! A router names experts; [`ExpertStore::prefetch`] begins to read the missing ones, [`ExpertStore::acquire`] pins all of
//! them and returns a [`Lease`] whose matrices can be used as they land. With a slot for every expert nothing is ever
//! evicted and a slot's memory is taken when its expert is first needed; with fewer, an eviction policy decides who goes.
//! Both are the same code.
//!
//! This crate owns the slots' memory, the cache's state machine and all expert I/O. It does not know what is in a slot: how
//! canonical matrices become a slot's bytes is injected ([`SlotFormat`]), so the crate computes nothing and imports only
//! the file format. Memory decides how fast an expert is there and never what its bytes are: every byte handed out is what
//! the file holds, or the waiter gets a typed error.
//!
//! ```
//! use std::{ops::Range, sync::Arc};
//! use st_experts::{ExpertStore, Matrix, SlotFormat, StoreOptions};
//! use st_gguf::{ExpertIndex, GgufFile, ReadAt as _};
//!
//! /// Experts in slots as they are in the file.
//! #[derive(Debug)]
//! struct AsStored(ExpertIndex);
//! # impl SlotFormat for AsStored {
//! #     fn slot_bytes(&self) -> usize { self.record_bytes(0) }
//! #     fn record_bytes(&self, layer: usize) -> usize { self.region(layer, Matrix::Down).end }
//! #     fn region(&self, layer: usize, matrix: Matrix) -> Range<usize> {
//! #         let bytes = self.canonical_bytes(layer, matrix);
//! #         matrix as usize * bytes..(matrix as usize + 1) * bytes
//! #     }
//! #     fn canonical_bytes(&self, layer: usize, matrix: Matrix) -> usize { self.0.matrix(layer, 0, matrix).len as usize }
//! #     fn fill(&self, _: usize, _: Matrix, canonical: &[u8], region: &mut [u8]) { region.copy_from_slice(canonical) }
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = GgufFile::open("../../models/tiny/tiny-q4_0.gguf")?;
//! let index = ExpertIndex::from_header(&file.header, &file.header.model_shape()?)?;
//! let range = index.matrix(1, 5, Matrix::Up);
//!
//! // Room for 8 experts of all that there are.
//! let options = StoreOptions { n_slots: 8, top_k: 2, ..StoreOptions::default() };
//! let store = ExpertStore::new(file.source.clone(), index.clone(), Arc::new(AsStored(index)), options)?;
//! store.prefetch(1, &[3, 5]);
//! let lease = store.acquire(1, &[3, 5])?;
//! let mut read = vec![0; range.len as usize];
//! file.source.read_exact_at(&mut read, range.offset)?;
//! assert_eq!(lease.wait(1, Matrix::Up)?, read);
//! # Ok(())
//! # }
//! ```
//!
//! Unsafe code stands in the slab, the buffers and the one place that hands a piece of a slot to a thread; each block says
//! which rule of the state machine makes it sound.

mod buffer;
pub mod cache_sim;
mod error;
mod eviction;
#[cfg(test)]
mod fixture;
mod guess;
mod hot;
mod inflight;
pub mod io;
mod lease;
mod list;
mod options;
mod place;
mod reader;
mod shared;
mod slots;
mod stats;
mod store;
mod table;
mod trace;
mod waves;

pub use buffer::{AlignedBuf, PAGE};
pub use error::StoreError;
pub use eviction::{Eviction, Lru, NextUse, Policy, Warmth};
pub use hot::{Hot, HotError};
pub use io::IoMode;
pub use lease::{Landing, Lease};
pub use options::{ALL_EXPERTS, MAX_LEASE, StoreMemory, StoreOptions};
pub use place::Use;
pub use st_gguf::Matrix;
pub use stats::StoreStats;
pub use store::ExpertStore;
pub use trace::{RoutingTrace, TraceError, TraceHeader, TraceRow, TraceWriter};
pub use waves::Waves;

use std::ops::Range;

/// What a slot holds, and how the canonical matrices of a file in the `gguf` layout become that; layers may differ.
///
/// A record of the `offload` layout is a slot's bytes already: there the format only says where the matrices lie, and
/// [`SlotFormat::fill`] is not called.
pub trait SlotFormat: Send + Sync + std::fmt::Debug {
    /// Bytes of one slot: as many as the largest record of any layer has.
    fn slot_bytes(&self) -> usize;
    /// Bytes that an expert of `layer` takes of a slot; in the `offload` layout exactly the record's.
    fn record_bytes(&self, layer: usize) -> usize;
    /// Where a matrix lies within a slot. The three follow each other as gate, up, down and do not overlap.
    fn region(&self, layer: usize, matrix: Matrix) -> Range<usize>;
    /// Bytes of a matrix as the `gguf` layout stores it.
    fn canonical_bytes(&self, layer: usize, matrix: Matrix) -> usize;
    /// Turns `canonical` (of [`SlotFormat::canonical_bytes`] bytes) into `region` (as long as [`SlotFormat::region`]). It
    /// writes every byte of the region and gives the same bytes every time; it runs on I/O threads, on every cache miss.
    fn fill(&self, layer: usize, matrix: Matrix, canonical: &[u8], region: &mut [u8]);
}
