//! How the loading of a model tells its caller how far it is, and how the caller tells it to stop.

use std::ops::ControlFlow;

use crate::plan::MemoryPlan;

/// Follows the loading of a model.
pub trait LoadProgress: Sync {
    /// The memory plan, before the first weight is read. The plain f32 path has none.
    fn planned(&self, _plan: &MemoryPlan) {}

    /// Some rows of a matrix, or a whole one, are about to be read; a break ends the loading with
    /// [`ModelError::Cancelled`](crate::ModelError::Cancelled). Called from several threads.
    fn reading(&self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// So many bytes of weights, beyond those told of before, are where they belong; all of them are the plan's dense weights,
    /// about. Called from several threads.
    fn loaded(&self, _bytes: u64) {}
}

/// Progress that nobody watches.
pub(crate) struct NoProgress;

impl LoadProgress for NoProgress {}
