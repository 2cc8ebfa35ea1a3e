//! How a model is loaded and run: what the caller chooses, and what follows from it at once.

use std::sync::Arc;

use st_experts::io::ExpertIo;
use st_experts::{ALL_EXPERTS, Hot, IoMode, StoreOptions};
use st_kernels::{Isa, Kernels, KvType};

use crate::error::ModelError;
use crate::plan::Residency;
use crate::predictor::Predictor;

/// How to load and run a model.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Compute threads.
    pub threads: usize,
    /// Context length in tokens; `None` takes the model's own, or what the budget allows.
    pub ctx: Option<usize>,
    /// Conversations that the memory plan has room for at once; each may fill the context.
    pub sequences: usize,
    /// How keys and values are kept; `None` is as exact as the weights call for: BF16 where they are quantized, otherwise F16.
    pub kv_type: Option<KvType>,
    /// The most memory that the process may use, in bytes.
    pub memory: Option<u64>,
    /// What the process will take beside the model and its conversations, in bytes: a server's connections, tables of grammars.
    pub beside: u64,
    /// At most this many experts in the cache, whatever the memory allows; `None` takes what the plan gives.
    pub slots: Option<usize>,
    /// How experts are read.
    pub io: IoMode,
    /// What to read experts through, whatever `io` says: other storage than the file, or one that fails on purpose. The
    /// offsets are those of the file.
    pub expert_io: Option<Arc<dyn ExpertIo>>,
    /// Whether reads of chosen experts start before attention.
    pub prefetch: bool,
    /// Whether the next layer's experts are guessed and read ahead, where guesses prove right.
    pub guess: bool,
    /// What the cache is filled with before anybody asks, where not every expert has a slot; of another model it has no effect.
    pub hot: Option<Arc<Hot>>,
    /// Expert reads in flight at once; `None` lets the store choose.
    pub io_threads: Option<usize>,
    /// Kernels to use; `None` takes the best that the CPU has.
    pub isa: Option<Isa>,
    /// Compute only some rows of the LM head; `None` computes all.
    pub sparse_head: Option<SparseHead>,
}

/// An LM head of which only the rows are computed that a predictor expects to matter: faster, and approximate.
#[derive(Clone, Debug)]
pub struct SparseHead {
    /// Rows that score no more are -inf; the best-scored one is always computed.
    pub threshold: f32,
    /// Who scores; `None` takes the predictor that the model's file holds.
    pub predictor: Option<Predictor>,
    /// Compute all rows, too, and count how often the likeliest token is lost.
    pub check: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            threads: 1,
            ctx: None,
            sequences: 1,
            kv_type: None,
            memory: None,
            beside: 0,
            slots: None,
            io: IoMode::Auto,
            expert_io: None,
            prefetch: true,
            guess: true,
            hot: None,
            io_threads: None,
            isa: None,
            sparse_head: None,
        }
    }
}

impl LoadOptions {
    /// The kernels that pack and compute.
    ///
    /// # Errors
    /// [`ModelError::Isa`] where the CPU lacks the instruction set that is asked for.
    pub(crate) fn kernels(&self) -> Result<Kernels, ModelError> {
        match self.isa {
            Some(isa) => Kernels::for_isa(isa).ok_or(ModelError::Isa { name: isa.name() }),
            None => Ok(Kernels::detect()),
        }
    }

    /// How keys and values of a model are kept, whose experts are quantized in some matrix or in none.
    pub(crate) fn kv_type_for(&self, is_quantized: bool) -> KvType {
        self.kv_type.unwrap_or(if is_quantized { KvType::Bf16 } else { KvType::F16 })
    }

    /// What of it concerns the expert store, where `residency` says what that holds.
    pub(crate) fn store(&self, residency: Residency) -> StoreOptions {
        let defaults = StoreOptions::default();
        let io_threads = self.io_threads.unwrap_or(defaults.io_threads);
        let n_slots = match residency {
            Residency::All => ALL_EXPERTS,
            Residency::Cached { slots } => slots,
        };
        let huge_pages = residency.reads_again();
        StoreOptions { n_slots, io: self.io, io_threads, prefetch: self.prefetch, huge_pages, ..defaults }
    }
}
