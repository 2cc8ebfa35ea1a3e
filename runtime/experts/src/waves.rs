//! Many experts of one layer, in waves that fit the cache: while one wave is computed, the next one loads.

use crate::error::StoreError;
use crate::lease::Lease;
use crate::place::Use;
use crate::store::ExpertStore;

/// The most experts in a wave, where there are fewer slots than experts (and at most a quarter of the slots). Small waves
/// keep a prompt from sweeping the cache and let computing begin early; this many reads are enough to keep a drive busy.
const WAVE: usize = 8;

/// A layer's experts in the order in which they should be computed; see [`ExpertStore::waves`].
#[derive(Debug)]
pub struct Waves<'a> {
    store: &'a ExpertStore,
    layer: usize,
    /// Cached ones first.
    ids: Vec<u32>,
    /// Experts handed out.
    done: usize,
    wave: usize,
    how: Use,
}

/// Experts of a wave where there are `n_slots` slots, fewer than experts.
pub(crate) fn wave_len(n_slots: usize) -> usize {
    (n_slots / 4).clamp(1, WAVE)
}

/// The order of a batch's experts: those that are in the cache first, otherwise as they are given; and how many are cached.
pub(crate) fn cached_first(ids: &[u32], cached: &[bool]) -> (Vec<u32>, usize) {
    let pick = |want: bool| ids.iter().zip(cached).filter(move |&(_, &is)| is == want).map(|(&id, _)| id);
    (pick(true).chain(pick(false)).collect(), pick(true).count())
}

impl ExpertStore {
    /// Arranges the experts `ids` (distinct, any number) of `layer` in waves, those that are in the cache first, and begins
    /// to read the first wave. Make it as soon as the router has chosen, and walk through it when the experts are needed. `how`
    /// says whether what is read for it is worth keeping; where nothing is ever evicted everything is kept.
    pub fn waves(&self, layer: usize, ids: &[u32], how: Use) -> Waves<'_> {
        let (ids, n_cached) = cached_first(ids, &self.cached(layer, ids));
        let wave = if self.is_resident() { self.capacity() } else { wave_len(self.n_slots()) };
        // What is here already is promised to this request, so that its own loads do not push it out.
        self.read_ahead(layer, &ids[..n_cached]);
        let how = if self.is_resident() { Use::Keep } else { how };
        let waves = Waves { store: self, layer, ids, done: 0, wave, how };
        waves.prefetch_from(0);
        waves
    }
}

impl<'a> Waves<'a> {
    /// The next wave, or `None` when every expert has been handed out. Begins to read the wave after it. The caller holds no
    /// other lease, but perhaps the wave before.
    ///
    /// # Errors
    /// As [`ExpertStore::acquire_for`].
    pub fn next_wave(&mut self) -> Result<Option<Lease<'a>>, StoreError> {
        let end = (self.done + self.wave).min(self.ids.len());
        if self.done == end {
            return Ok(None);
        }
        let lease = self.store.acquire_for(self.layer, &self.ids[self.done..end], self.how)?;
        self.done = end;
        self.prefetch_from(end);
        Ok(Some(lease))
    }

    /// The experts in the order in which the waves hand them out.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    fn prefetch_from(&self, start: usize) {
        let end = (start + self.wave).min(self.ids.len());
        self.store.read_ahead(self.layer, &self.ids[start..end]);
    }
}
