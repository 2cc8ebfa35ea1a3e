//! The store itself: what it is made of, and what callers ask of it. A request whose experts are all there takes the lock of what
//! is shared once and returns it once.

use crate::SlotFormat;
use crate::buffer::AlignedBuf;
use crate::error::StoreError;
use crate::eviction::Policy;
use crate::guess::GuessGate;
use crate::io::{self, ExpertIo};
use crate::lease::Lease;
use crate::options::{MAX_IO_THREADS, MAX_LEASE, StoreMemory, StoreOptions, count_experts};
use crate::place::{Blocked, Certainty, Use};
use crate::reader::{Reader, records_on_pages};
use crate::shared::{Shared, State};
use crate::slots::Slab;
use crate::stats::StoreStats;
use crate::table::Table;
use st_gguf::{ExpertIndex, Matrix, ReadAt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

/// The experts of one model file, as many in memory as there are slots. Shared by all sessions of an engine.
#[derive(Debug)]
pub struct ExpertStore {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    n_slots: usize,
    /// Slots beyond those, at most.
    lent: usize,
    resident: bool,
    capacity: usize,
    prefetch: bool,
    guesses: bool,
    memory: StoreMemory,
}

impl ExpertStore {
    /// A store over the experts that `index` found in `source`. Reserves the slots, chooses the way of reading (which may
    /// take a few reads) and starts the I/O threads; no expert is read yet.
    ///
    /// # Errors
    /// [`StoreError::TooFewSlots`], [`StoreError::Format`] where file and format disagree about a size,
    /// [`StoreError::DirectRefused`], [`StoreError::Open`], [`StoreError::Reserve`], [`StoreError::Thread`].
    pub fn new(
        source: Arc<dyn ReadAt>,
        index: ExpertIndex,
        format: Arc<dyn SlotFormat>,
        options: StoreOptions,
    ) -> Result<Self, StoreError> {
        let n_experts = count_experts(&index)?;
        let samples: Vec<_> = (0..n_experts)
            .map(|key| index.matrix(key / index.n_experts(), key % index.n_experts(), Matrix::Gate))
            .map(|range| range.offset..range.end())
            .collect();
        let (resident, threads) = (options.is_resident(n_experts), options.io_threads.clamp(1, MAX_IO_THREADS));
        let mappable = resident && records_on_pages(&index);
        let (io, _) = io::open(&source, options.io, !resident, mappable, &samples, threads, options.huge_pages)?;
        Self::with_io(io, index, format, options)
    }

    /// As [`ExpertStore::new`], with an engine of the caller's; `options.io` is not looked at.
    ///
    /// # Errors
    /// As [`ExpertStore::new`], but for those of opening the file.
    pub fn with_io(
        io: Box<dyn ExpertIo>,
        index: ExpertIndex,
        format: Arc<dyn SlotFormat>,
        options: StoreOptions,
    ) -> Result<Self, StoreError> {
        let n_keys = count_experts(&index)?;
        let (n_slots, resident) = (options.n_slots.min(n_keys), options.is_resident(n_keys));
        let minimum = options.top_k.max(1).saturating_mul(2).min(n_keys);
        if n_slots < minimum {
            return Err(StoreError::TooFewSlots { minimum, got: n_slots });
        }
        let lent = if resident { 0 } else { options.lent.min(n_keys - n_slots) };
        // Half of the slots for one request leaves the other half for the next, which may be loading meanwhile.
        let capacity = if resident { n_slots } else { n_slots / 2 }.min(MAX_LEASE);
        let memory = StoreMemory::of(&index, format.as_ref(), &options);
        let slot_bytes = format.slot_bytes();
        let slab = Slab::new(n_slots + lent, slot_bytes, options.huge_pages)
            .map_err(|e| StoreError::Reserve { bytes: slot_bytes.saturating_mul(n_slots), cause: Arc::new(e) })?;
        let of = |key: usize| index.checksums(key / index.n_experts(), key % index.n_experts());
        let checksums = (0..n_keys).flat_map(of).copied().collect();
        let layer_of = (0..n_keys).map(|key| (key / index.n_experts()) as u32).collect();
        let gate = GuessGate::new(index.n_layers());
        let reader = Reader::new(io, index, format, slab)?;
        let guess_slots = options.guess_slots.min(n_slots.saturating_sub(minimum));
        let guesses = options.prefetch && guess_slots > 0 && !resident;
        let table = Table::new(
            n_slots + lent,
            n_keys,
            Policy::default().build(n_slots + lent, layer_of),
            guess_slots,
            reader.pieces.clone(),
            checksums,
        );
        let shared = Arc::new(Shared::new(reader, table, gate, resident));
        let prefetch = options.prefetch;
        let threads = Vec::new();
        let mut store = Self { shared, threads, n_slots, lent, resident, capacity, prefetch, guesses, memory };
        let n_threads = options.io_threads.clamp(1, MAX_IO_THREADS);
        let bytes = store.memory.io_buffer_bytes;
        let buffers = store.shared.reader.bounce_buffers(n_threads, options.huge_pages);
        let buffers = buffers.map_err(|e| StoreError::Reserve { bytes, cause: Arc::new(e) })?;
        for (i, buffer) in buffers.into_iter().enumerate() {
            // Should a later one fail, dropping the store ends those that run.
            store.threads.push(spawn_io_thread(&store.shared, i, buffer)?);
        }
        Ok(store)
    }

    /// Begins to read the missing ones among the experts that a router has chosen for tokens one after the other, and keeps
    /// those that are here for the request that follows. Advisory: it never waits, never fails, and changes no byte that
    /// anybody gets to see. What finds no slot is dropped.
    pub fn prefetch(&self, layer: usize, ids: &[u32]) {
        if self.guesses {
            let now = Instant::now();
            let payoff = &mut self.shared.lock().payoff;
            payoff.begin_layer(layer, now);
            self.shared.following.store(payoff.is_following(), Ordering::Relaxed);
        }
        self.read_ahead(layer, ids);
    }

    /// [`ExpertStore::prefetch`] for any work.
    pub(crate) fn read_ahead(&self, layer: usize, ids: &[u32]) {
        if let Some(keys) = self.prefetchable(layer, ids) {
            let mut state = self.shared.lock();
            let verdicts = state.gate.reveal(layer, |key| keys.clone().any(|chosen| chosen == key));
            state.table.stats.guess_judged += verdicts.judged;
            state.table.stats.guess_right += verdicts.right;
            let queued = state.table.prefetch(keys, Certainty::Chosen);
            self.shared.wake_readers(state, queued);
        }
    }

    /// Begins to fill the cache with experts that are likely to be asked for, as (layer, expert), the likeliest first: as many as have a
    /// slot, in the order of the file. Advisory, as [`ExpertStore::prefetch`], and without effect where each has a slot of its own.
    pub fn warm(&self, experts: impl Iterator<Item = (usize, u32)>) {
        if self.resident {
            return;
        }
        let keys = experts.filter_map(|(layer, expert)| self.prefetchable(layer, &[expert])?.next());
        let mut state = self.shared.lock();
        let queued = state.table.warm(keys);
        self.shared.wake_readers(state, queued);
    }

    /// Has as many slots beyond [`ExpertStore::n_slots`] as `lent` says, and no more than [`StoreOptions::lent`]. The memory of the
    /// others is the system's when this returns. It waits for leases and loads in slots that are asked for: a thread must hold no
    /// lease.
    ///
    /// # Errors
    /// Where the system takes no memory back; the slots are not used then.
    pub fn set_lent(&self, lent: usize) -> std::io::Result<()> {
        let usable = self.n_slots + lent.min(self.lent);
        let mut state = self.shared.lock();
        let before = state.table.usable();
        if usable < before {
            state.keep_untaken_before(self.shared.reader.slab.bytes_before(usable));
        }
        while state.is_taking() || state.table.use_slots(usable).is_err() {
            state = self.shared.wait_for_landing(state);
        }
        if usable >= before {
            return Ok(());
        }
        #[allow(unsafe_code)]
        // SAFETY: these slots are withheld, no lease and no load has one, and none gets one as long as the state is locked.
        unsafe {
            self.shared.reader.slab.give_back(usable..before)
        }
    }

    /// Slots that are used now: [`ExpertStore::n_slots`] and what is lent.
    pub fn usable_slots(&self) -> usize {
        self.shared.lock().table.usable()
    }

    /// As [`ExpertStore::prefetch`] for experts that are only guessed: read after everything that is certain, into the
    /// slots set aside for guesses, and only in layers where guesses were mostly right lately. A guess replaces the one
    /// before it, as far as nothing was read for that.
    pub fn prefetch_guess(&self, layer: usize, ids: &[u32]) {
        if let (true, Some(keys)) = (self.guesses(), self.prefetchable(layer, ids)) {
            let mut state = self.shared.lock();
            let State { table, gate, .. } = &mut *state;
            if gate.guess(layer, keys.clone().filter(|&key| !table.is_cached(key))) {
                let queued = table.prefetch(keys, Certainty::Guess);
                self.shared.wake_readers(state, queued);
            }
        }
    }

    /// Whether [`ExpertStore::prefetch_guess`] can do anything now: where some experts have no slot, and as long as tokens are
    /// the faster for it.
    pub fn guesses(&self) -> bool {
        self.guesses && self.shared.following.load(Ordering::Relaxed)
    }

    /// The keys of those of `ids` that exist, where prefetching is on.
    fn prefetchable<'i>(&self, layer: usize, ids: &'i [u32]) -> Option<impl Iterator<Item = u32> + Clone + use<'i>> {
        let (n_layers, n_experts) = (self.index().n_layers(), self.index().n_experts());
        let known = ids.iter().filter(move |&&id| (id as usize) < n_experts);
        (self.prefetch && layer < n_layers).then(|| known.map(move |&id| (layer * n_experts) as u32 + id))
    }

    /// Pins the experts `ids` (distinct, at most [`ExpertStore::capacity`]) of `layer` and begins to read what is missing.
    /// Waits only where loads that nobody holds occupy the slots.
    ///
    /// # Errors
    /// [`StoreError::UnknownExpert`], [`StoreError::Duplicate`], [`StoreError::LeaseTooLarge`]; [`StoreError::SlotsPinned`]
    /// where other leases hold too many slots, which cannot happen while at most one other lease is alive. Failed reads
    /// are reported by the lease.
    pub fn acquire(&self, layer: usize, ids: &[u32]) -> Result<Lease<'_>, StoreError> {
        self.pin(layer, ids, Use::Keep, false)
    }

    /// As [`ExpertStore::acquire`], saying whether what is read for it is worth keeping, and waiting for other threads' leases
    /// where those hold the slots: for callers that hold none themselves, of which there may be any number.
    ///
    /// # Errors
    /// As [`ExpertStore::acquire`], but for [`StoreError::SlotsPinned`].
    pub fn acquire_for(&self, layer: usize, ids: &[u32], how: Use) -> Result<Lease<'_>, StoreError> {
        self.pin(layer, ids, how, true)
    }

    fn pin(&self, layer: usize, ids: &[u32], how: Use, waits: bool) -> Result<Lease<'_>, StoreError> {
        let (n_layers, n_experts) = (self.index().n_layers(), self.index().n_experts());
        if ids.len() > self.capacity {
            return Err(StoreError::LeaseTooLarge { asked: ids.len(), capacity: self.capacity });
        }
        let mut keys = [0; MAX_LEASE];
        for (rank, (key, &id)) in keys.iter_mut().zip(ids).enumerate() {
            if layer >= n_layers || id as usize >= n_experts {
                let (n_layers, n_experts) = (n_layers as u32, n_experts as u32);
                return Err(StoreError::UnknownExpert { layer: layer as u32, expert: id, n_layers, n_experts });
            }
            if ids[..rank].contains(&id) {
                return Err(StoreError::Duplicate { layer: layer as u32, expert: id });
            }
            *key = (layer * n_experts) as u32 + id;
        }
        let keys = &keys[..ids.len()];
        let mut state = self.shared.lock();
        let mut held = state.spare.pop().unwrap_or_default();
        loop {
            match state.table.acquire(keys, how, &mut held) {
                Ok(queued) => {
                    self.shared.wake_readers(state, queued);
                    return Ok(Lease::new(&self.shared, held, (layer * n_experts) as u32));
                }
                Err(Blocked::OnLoads) => state = self.shared.wait_for_landing(state),
                Err(Blocked::OnPins { .. }) if waits => state = self.shared.wait_for_landing(state),
                Err(Blocked::OnPins { needed, free }) => {
                    state.spare.push(held);
                    return Err(StoreError::SlotsPinned { asked: needed, free, n_slots: self.n_slots });
                }
            }
        }
    }

    /// For each of `ids` of `layer`: whether it is in the cache (or being read).
    pub(crate) fn cached(&self, layer: usize, ids: &[u32]) -> Vec<bool> {
        let n_experts = self.index().n_experts();
        let state = self.shared.lock();
        let in_range = |id: u32| layer < self.index().n_layers() && (id as usize) < n_experts;
        ids.iter().map(|&id| in_range(id) && state.table.is_cached((layer * n_experts) as u32 + id)).collect()
    }

    /// The most experts that one lease may hold: half of the slots, so that the next request can be loading meanwhile; all of
    /// them where there is a slot for every expert.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Slots that are there for certain, each for one expert.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Whether there is a slot for every expert, so that nothing is ever evicted.
    pub fn is_resident(&self) -> bool {
        self.resident
    }

    /// Bytes of all slots; they are taken from the system as slots are first filled.
    pub fn slab_bytes(&self) -> usize {
        self.shared.reader.slab.bytes()
    }

    /// Bytes of the I/O threads' buffers once each has been used.
    pub fn io_buffer_bytes(&self) -> usize {
        self.memory.io_buffer_bytes
    }

    /// What is counted since the store was made.
    pub fn stats(&self) -> StoreStats {
        let state = self.shared.lock();
        let mut stats = state.table.stats;
        let since = |start: Option<Instant>| start.map_or(0.0, |start| start.elapsed().as_secs_f64());
        stats.stall_seconds += since(state.waiting_since);
        stats.io_seconds += since(state.reading_since);
        stats
    }

    /// For each expert how often it was held, and how often it was read from the disk; `[n_layers, n_experts]`, layer by layer.
    /// The counts wrap around.
    pub fn activity(&self) -> (Vec<u32>, Vec<u32>) {
        let state = self.shared.lock();
        (state.table.uses.clone(), state.table.reads.clone())
    }

    /// How experts are read: `direct`, `buffered` or `memory`.
    #[cfg(test)]
    pub(crate) fn io_name(&self) -> &'static str {
        self.shared.reader.io().name()
    }

    /// Where the experts lie in the file.
    pub fn index(&self) -> &ExpertIndex {
        self.shared.reader.index()
    }
}

impl Drop for ExpertStore {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // An I/O thread catches panics of what it calls; there is nothing left to report here.
            let _ = thread.join();
        }
    }
}

fn spawn_io_thread(shared: &Arc<Shared>, i: usize, bounce: AlignedBuf) -> Result<JoinHandle<()>, StoreError> {
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name(format!("expert-io-{i}"))
        .spawn(move || {
            st_sys::prefer_this_thread();
            shared.serve(bounce);
        })
        .map_err(|e| StoreError::Thread { cause: Arc::new(e) })
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
