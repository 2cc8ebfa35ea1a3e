//! The model's operations on candle's storage, computed by the kernels.
//!
//! Every operation writes in place, into what was allocated before, so that a token in steady state allocates nothing. Shapes are checked here; how work is cut for the threads is decided here; what is
//! computed is the kernels' matter.

mod attention;
mod elementwise;
mod embedding;
mod head;
mod linear;

use candle_core::Error;
use st_kernels::{Kernels, Pool};

use crate::activations::Rows;
use crate::error::ModelError;

pub(crate) use attention::{Attention, AttentionScratch};
pub(crate) use elementwise::{RmsNorm, Rope, add, add_experts};
pub(crate) use embedding::{Embedding, embed};
pub use head::HeadStats;
pub(crate) use head::SparseHead;
pub(crate) use linear::{ActsScratch, Linear};

/// What computes: an instruction set and threads.
#[derive(Debug)]
pub(crate) struct Compute {
    /// The kernels in use.
    pub(crate) kernels: Kernels,
    /// The threads in use.
    pub(crate) pool: Pool,
}

impl Compute {
    /// `kernels` on `threads` threads.
    ///
    /// # Errors
    /// [`ModelError::Threads`] where threads cannot be started.
    pub(crate) fn new(threads: usize, kernels: Kernels) -> Result<Self, ModelError> {
        let pool = Pool::new(threads).map_err(|cause| ModelError::Threads { threads, cause })?;
        Ok(Self { kernels, pool })
    }
}

/// The values of an operation's operands: `x` with rows of `n_in` values, `out` with as many rows of `n_out`.
fn operands<'a>(
    op: &'static str,
    x: &'a Rows,
    n_in: usize,
    out: &'a mut Rows,
    n_out: usize,
) -> Result<(&'a [f32], &'a mut [f32]), ModelError> {
    let rows = x.dims().0;
    expect(op, x, (rows, n_in))?;
    expect(op, out, (rows, n_out))?;
    Ok((x.values()?, out.values_mut()?))
}

/// Refuses an operand of another shape.
fn expect(op: &'static str, operand: &Rows, dims: (usize, usize)) -> Result<(), ModelError> {
    if operand.dims() == dims {
        return Ok(());
    }
    Err(Error::ShapeMismatchBinaryOp { lhs: dims.into(), rhs: operand.dims().into(), op }.into())
}

/// Buffers that the operations need besides their operands.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Quantized inputs.
    pub(crate) acts: ActsScratch,
    /// The router's, which speaks while others are in use.
    pub(crate) router_acts: ActsScratch,
    /// Attention's.
    pub(crate) attention: AttentionScratch,
}
