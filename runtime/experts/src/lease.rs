//! A lease: experts pinned for one use, readable matrix by matrix as they land.

#![allow(unsafe_code)]

use crate::error::StoreError;
use crate::inflight::ALL_MATRICES;
use crate::options::MAX_LEASE;
use crate::place::Held;
use crate::shared::Shared;
use st_gguf::Matrix;

/// Pinned experts, addressed by rank: their place in the request. Any thread may wait for any matrix. Dropping the lease
/// unpins them; the matrices' slices cannot outlive it.
#[derive(Debug)]
pub struct Lease<'a> {
    shared: &'a Shared,
    held: Vec<Held>,
    /// Key of expert 0 of the layer.
    first_key: u32,
}

impl<'a> Lease<'a> {
    pub(crate) fn new(shared: &'a Shared, held: Vec<Held>, first_key: u32) -> Self {
        Self { shared, held, first_key }
    }

    /// Number of experts.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there are no experts.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The expert at `rank`, by its number in the layer.
    pub fn id(&self, rank: usize) -> u32 {
        self.held[rank].key - self.first_key
    }

    /// Whether a matrix can be used without waiting. False also where its load has failed.
    pub fn is_ready(&self, rank: usize, matrix: Matrix) -> bool {
        self.get(rank, matrix).is_some()
    }

    /// A matrix's bytes in the slot's format, where they are there.
    pub fn get(&self, rank: usize, matrix: Matrix) -> Option<&[u8]> {
        let held = self.held[rank];
        let ready = held.ready | if held.ready == ALL_MATRICES { 0 } else { self.ready_now(held) };
        // SAFETY: the table says that the matrix has landed, and this lease pins the slot as long as `self` is borrowed.
        (ready & 1 << matrix as usize != 0).then(|| unsafe { self.shared.reader.region(held.slot, held.key, matrix) })
    }

    /// A matrix's bytes in the slot's format, once they are there.
    ///
    /// # Errors
    /// Where the expert could not be read: [`StoreError::Read`] or [`StoreError::Corrupt`].
    pub fn wait(&self, rank: usize, matrix: Matrix) -> Result<&[u8], StoreError> {
        let held = self.held[rank];
        let bit = 1 << matrix as usize;
        if held.ready & bit == 0 {
            let mut state = self.shared.lock();
            while state.table.ready(held.slot).map_err(Clone::clone)? & bit == 0 {
                state = self.shared.wait_for_landing(state);
            }
        }
        // SAFETY: as in `get`.
        Ok(unsafe { self.shared.reader.region(held.slot, held.key, matrix) })
    }

    /// Every rank once: first those whose `matrix` is there, then each as its `matrix` lands.
    pub fn as_they_land(&self, matrix: Matrix) -> Landing<'_, 'a> {
        let mut remaining = [0; MAX_LEASE / 64];
        for rank in 0..self.len() {
            remaining[rank / 64] |= 1 << (rank % 64);
        }
        Landing { lease: self, matrix, remaining }
    }

    fn ready_now(&self, held: Held) -> u8 {
        self.shared.lock().table.ready(held.slot).unwrap_or(0)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.shared.release(std::mem::take(&mut self.held));
    }
}

/// The ranks of a lease in the order in which a matrix of theirs is there; see [`Lease::as_they_land`].
#[derive(Debug)]
pub struct Landing<'l, 'a> {
    lease: &'l Lease<'a>,
    matrix: Matrix,
    /// The ranks not yet given out, as a bit set.
    remaining: [u64; MAX_LEASE / 64],
}

impl Landing<'_, '_> {
    /// Appends to `batch` every rank that is there and was not given out before, waiting for one where there is none.
    /// Appends nothing when all have been given out.
    ///
    /// # Errors
    /// Where an expert that is still to come could not be read. Asking again goes on with the others.
    pub fn next_batch(&mut self, batch: &mut Vec<usize>) -> Result<(), StoreError> {
        self.take(batch, usize::MAX)
    }

    fn take(&mut self, batch: &mut Vec<usize>, at_most: usize) -> Result<(), StoreError> {
        let before = batch.len();
        let bit = 1 << self.matrix as usize;
        // What was there when the lease was made needs no lock.
        for rank in ranks(self.remaining) {
            if batch.len() - before < at_most && self.lease.held[rank].ready & bit != 0 {
                self.give_out(rank, batch);
            }
        }
        if batch.len() > before || self.remaining == [0; MAX_LEASE / 64] {
            return Ok(());
        }
        let mut state = self.lease.shared.lock();
        loop {
            for rank in ranks(self.remaining) {
                match state.table.ready(self.lease.held[rank].slot) {
                    Ok(ready) if ready & bit == 0 => {}
                    Ok(_) if batch.len() - before < at_most => self.give_out(rank, batch),
                    Ok(_) => {}
                    Err(_) if batch.len() > before => {}
                    Err(error) => {
                        self.remaining[rank / 64] &= !(1 << (rank % 64));
                        return Err(error.clone());
                    }
                }
            }
            if batch.len() > before {
                return Ok(());
            }
            state = self.lease.shared.wait_for_landing(state);
        }
    }

    fn give_out(&mut self, rank: usize, batch: &mut Vec<usize>) {
        self.remaining[rank / 64] &= !(1 << (rank % 64));
        batch.push(rank);
    }
}

/// The set bits, in order.
fn ranks(set: [u64; MAX_LEASE / 64]) -> impl Iterator<Item = usize> {
    set.into_iter().enumerate().flat_map(|(word, mut bits)| {
        std::iter::from_fn(move || {
            let bit = bits.trailing_zeros() as usize;
            (bits != 0).then(|| {
                bits &= bits - 1;
                word * 64 + bit
            })
        })
    })
}
