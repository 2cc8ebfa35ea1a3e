//! The model's operations on candle tensors, computed by the kernels.
//!
//! Every operation writes into a tensor that was allocated before (candle's in-place operations), so that a token in
//! steady state allocates nothing. Shapes are checked here; how work is cut for the threads is decided here; what is
//! computed is the kernels' matter.

mod attention;
mod elementwise;
mod head;
mod linear;

use candle_core::{CpuStorage, Layout, Tensor};
use st_kernels::{Kernels, Pool};

use crate::error::ModelError;

pub(crate) use attention::{Attention, AttentionScratch};
pub(crate) use elementwise::{RmsNorm, Rope, add, add_experts};
pub use head::HeadStats;
pub(crate) use head::SparseHead;
pub(crate) use linear::{ActsScratch, Linear, embed};

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

/// The f32 values of a contiguous tensor.
pub(crate) fn with_slice<R>(
    tensor: &Tensor,
    look: impl FnOnce(&[f32]) -> Result<R, ModelError>,
) -> Result<R, ModelError> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => look(slice(storage, layout)?),
        _ => Err(candle_core::Error::Msg("the tensor is not in CPU memory".into()).into()),
    }
}

/// The values of a source operand.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(not_contiguous)?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// The values of a destination operand.
fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(not_contiguous)?;
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => Err(candle_core::Error::Msg("the destination is not f32".into())),
    }
}

fn not_contiguous() -> candle_core::Error {
    candle_core::Error::Msg("an operand is not contiguous".into())
}

/// An operation that writes one tensor from another, as candle wants it.
struct InPlace<F> {
    name: &'static str,
    compute: F,
}

impl<F> candle_core::InplaceOp2 for InPlace<F>
where
    F: Fn(&mut [f32], &[f32]) -> candle_core::Result<()>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<()> {
        (self.compute)(slice_mut(out, out_layout)?, slice(x, x_layout)?)
    }
}

/// Writes `out` from `x`.
fn in_place(
    name: &'static str,
    out: &Tensor,
    x: &Tensor,
    compute: impl Fn(&mut [f32], &[f32]) -> candle_core::Result<()>,
) -> Result<(), ModelError> {
    Ok(out.inplace_op2(x, &InPlace { name, compute })?)
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
