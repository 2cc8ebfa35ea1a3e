//! What can go wrong with experts, each with what a person needs to act on it.

use st_gguf::Matrix;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;

/// An error of the expert store. It ends the answer that met it and leaves the store usable.
#[derive(Debug, Clone, Error)]
pub enum StoreError {
    /// A read failed twice.
    #[error("cannot read expert {expert} of layer {layer} at byte {offset} of {}", path.display())]
    Read {
        /// The model file.
        path: PathBuf,
        /// The layer.
        layer: u32,
        /// The expert within its layer.
        expert: u32,
        /// Where the read began, in bytes from the start of the file.
        offset: u64,
        /// What the system said.
        #[source]
        cause: Arc<io::Error>,
    },
    /// A record, or a matrix of the `gguf` layout, did not match its checksum, and neither did a second read of it.
    #[error(
        "{}expert {expert} of layer {layer} at byte {offset} of {} is damaged: crc32c is {got:#010x}, the file states {expected:#010x}",
        matrix.map_or_else(String::new, |matrix| format!("the {} of ", matrix_name(matrix))),
        path.display()
    )]
    Corrupt {
        /// The model file.
        path: PathBuf,
        /// The layer.
        layer: u32,
        /// The expert within its layer.
        expert: u32,
        /// Its matrix; `None` for a record.
        matrix: Option<Matrix>,
        /// Where the record or matrix begins, in bytes from the start of the file.
        offset: u64,
        /// The checksum that the file's header states.
        expected: u32,
        /// The checksum of what was read.
        got: u32,
    },
    /// The model file could not be opened for reading experts.
    #[error("cannot open {} for reading experts", path.display())]
    Open {
        /// The model file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: Arc<io::Error>,
    },
    /// Direct I/O was demanded and the file system does not offer it.
    #[error("direct I/O is not possible on {}", path.display())]
    DirectRefused {
        /// The model file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: Arc<io::Error>,
    },
    /// The cache's memory could not be reserved.
    #[error("cannot reserve {bytes} bytes for the expert cache")]
    Reserve {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        #[source]
        cause: Arc<io::Error>,
    },
    /// A thread for reading could not be started.
    #[error("cannot start an I/O thread")]
    Thread {
        /// What the system said.
        #[source]
        cause: Arc<io::Error>,
    },
    /// The cache was given too few slots to compute a single token in.
    #[error("the expert cache needs at least {minimum} slots, got {got}")]
    TooFewSlots {
        /// The smallest number that works.
        minimum: usize,
        /// What the options asked for.
        got: usize,
    },
    /// More experts than any model has, which a damaged header may claim.
    #[error("{got} experts are more than the {limit} that the expert cache keeps track of")]
    TooManyExperts {
        /// Experts in all layers together.
        got: usize,
        /// The most that are accepted.
        limit: usize,
    },
    /// The file's experts do not have the size that the slot format expects.
    #[error("experts' {what} has {got} bytes in the file, the slot format expects {expected}")]
    Format {
        /// Which part: a matrix or the record.
        what: &'static str,
        /// Bytes that the slot format expects.
        expected: u64,
        /// Bytes that the file holds.
        got: u64,
    },
    /// A layer or expert that the model does not have.
    #[error("no expert {expert} in layer {layer}: the model has {n_layers} layers of {n_experts} experts")]
    UnknownExpert {
        /// The layer asked for.
        layer: u32,
        /// The expert asked for.
        expert: u32,
        /// Layers in the file.
        n_layers: u32,
        /// Experts per layer.
        n_experts: u32,
    },
    /// The same expert twice in one request.
    #[error("expert {expert} of layer {layer} was asked for twice in one request")]
    Duplicate {
        /// The layer.
        layer: u32,
        /// The expert within its layer.
        expert: u32,
    },
    /// More experts at once than the cache can hold beside the next request's.
    #[error("{asked} experts were asked for at once, the cache serves at most {capacity}")]
    LeaseTooLarge {
        /// Experts in the request.
        asked: usize,
        /// What `ExpertStore::capacity` says.
        capacity: usize,
    },
    /// Other leases hold so many slots that the request can never be served while they live.
    #[error("{asked} experts were asked for, and all but {free} of {n_slots} slots are in use by other leases")]
    SlotsPinned {
        /// Slots that the request still needs.
        asked: usize,
        /// Slots that could be given.
        free: usize,
        /// Slots in all.
        n_slots: usize,
    },
}

/// The name of a matrix in an error.
pub(crate) fn matrix_name(matrix: Matrix) -> &'static str {
    match matrix {
        Matrix::Gate => "gate matrix",
        Matrix::Up => "up matrix",
        Matrix::Down => "down matrix",
    }
}
