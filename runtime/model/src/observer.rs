//! What a caller may watch while rows go through the layers, and how it stops them.

use std::io;
use std::ops::ControlFlow;

use crate::batch::Batch;
use crate::router::Routing;

/// Follows a forward pass. Every method may be left as it is, and nothing is computed for what nobody watches.
///
/// `()` watches nothing.
pub trait Observer {
    /// A router has spoken: the choices of all rows of `batch` in one layer. Layers come in order, batch after batch.
    ///
    /// # Errors
    /// What it fails with ends the pass.
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        let _ = (layer, batch, routing);
        Ok(())
    }

    /// Whether [`Observer::neurons`] is to be called, which costs a look at every hidden value.
    fn watches_neurons(&self) -> bool {
        false
    }

    /// What one expert did in a layer: for each of `rows` (indices into the batch), one bit for each of its neurons, set where
    /// the neuron's value is not 0; 32 neurons a word, the words of a row together.
    ///
    /// # Errors
    /// What it fails with ends the pass.
    fn neurons(&mut self, layer: usize, expert: u32, rows: &[u32], live: &[u32]) -> io::Result<()> {
        let _ = (layer, expert, rows, live);
        Ok(())
    }

    /// Whether [`Observer::inputs`] is to be called.
    fn watches_inputs(&self) -> bool {
        false
    }

    /// What matrices of a layer are multiplied with: as many rows as `rows` has, one after the other.
    ///
    /// # Errors
    /// What it fails with ends the pass.
    fn inputs(&mut self, layer: usize, of: Inputs<'_>, rows: &[f32]) -> io::Result<()> {
        let _ = (layer, of, rows);
        Ok(())
    }

    /// The residual stream after a layer; `[rows, n_embd]`.
    ///
    /// # Errors
    /// What it fails with ends the pass.
    fn residual(&mut self, layer: usize, batch: &Batch, x: &[f32]) -> io::Result<()> {
        let _ = (layer, batch, x);
        Ok(())
    }

    /// Whether answers may be drafted while it follows them. Then it is shown rows that are taken back when their pass is over.
    fn takes_drafts(&self) -> bool {
        false
    }

    /// Called after each layer: so many of `of` tokens are done (as many as the layers that are done make). A break ends the
    /// pass with [`ModelError::Cancelled`](crate::ModelError::Cancelled).
    fn progress(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        let _ = (done, of);
        ControlFlow::Continue(())
    }
}

impl Observer for () {
    fn takes_drafts(&self) -> bool {
        true
    }
}

/// The matrices that are multiplied with some rows.
#[derive(Clone, Copy, Debug)]
pub enum Inputs<'a> {
    /// Queries, keys and values, for all rows of the batch.
    Attention,
    /// The projection of the heads back to the residual stream, for all rows of the batch.
    AttentionOutput,
    /// Gate and up of the experts that each row of the batch chose.
    Experts(&'a Routing),
    /// Down of this expert, for the rows that chose it.
    Down(u32),
}
