//! Who is in which slot, and what may happen to it next: the store's state machine, pure and single-threaded.
//!
//! The store keeps one [`Table`] under its mutex; no I/O, no clock and no lock is in here, so the tests walk through every
//! reachable state of a small table. A slot is in exactly one [`Place`]:
//!
//! ```text
//!   Free ──load──> Loading ──last piece──> Pinned ⇄ Ordered     (evictable, in the policy's order)
//!     ^               │          │
//!     │               │          ├──> Promised                  (prefetched for a router's choice, not yet used)
//!     │               │          └──> Guessed                   (prefetched on a guess, not yet used)
//!     └──── Failed <──┘   (until the last pin is gone)
//! ```
//!
//! Invariants: an expert has at most one live slot; pinned and loading slots are never victims; a matrix is shown only
//! when every piece it needs is in and no piece of the slot that overlaps it can be written again before the slot is freed.

mod ahead;
mod victims;

use crate::error::StoreError;
use crate::eviction::{Eviction, Warmth};
use crate::inflight::{ALL_MATRICES, Arrival, FilePieces, Job, Load, Queue};
use crate::list::{NONE, SlotList};
use crate::place::{Blocked, Finish, Held, Place, Use};
use crate::stats::StoreStats;

/// A prefetched expert that nobody came for is given up first after this many further requests.
const PROMISE_LASTS: u64 = 64;

/// What becomes of a slot when it is whole and nobody holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intent {
    Promise,
    Guess,
    Used,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Slot {
    /// The expert in it; meaningless where free.
    key: u32,
    pins: u32,
    place: Place,
    intent: Intent,
    warmth: Warmth,
    /// Whether a lease has had this expert since it was loaded.
    used: bool,
    /// Whether its pieces stand in the slow lane.
    is_slow: bool,
    /// Whether a prefetch (not a guess) had it read; cleared once that is counted as useful.
    prefetched: bool,
    /// The matrices that may be used, as a mask.
    ready: u8,
    load: Load,
    /// The request count when it was promised.
    promised_at: u64,
    error: Option<StoreError>,
}

/// The state machine, with `E` to order the victims.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Table<E = Box<dyn Eviction>> {
    /// Per expert: its live slot, or NONE.
    slot_of: Vec<u32>,
    slots: Vec<Slot>,
    /// Slots that may be used; the others are withheld.
    usable: usize,
    /// Free slots; the last is taken first.
    free: Vec<u32>,
    policy: E,
    promised: SlotList,
    guessed: SlotList,
    /// Slots with intent Guess, loading ones included, and how many there may be.
    n_guesses: usize,
    max_guesses: usize,
    queue: Queue,
    pieces: FilePieces,
    /// Per expert: the checksums of its record or matrices; empty where the file has none.
    checksums: Vec<u32>,
    /// Per expert: in the cache once already.
    seen: Vec<bool>,
    /// Per expert: its checksums were found right.
    verified: Vec<bool>,
    /// Per expert: the last request that named it, to find duplicates and what a request will hit.
    mark: Vec<u64>,
    requests: u64,
    pub(crate) stats: StoreStats,
    /// Per expert: how often it was held, and how often it was read; both wrap around.
    pub(crate) uses: Vec<u32>,
    pub(crate) reads: Vec<u32>,
}

/// One more for `key`.
fn count(counts: &mut [u32], key: u32) {
    counts[key as usize] = counts[key as usize].wrapping_add(1);
}

impl<E: Eviction> Table<E> {
    /// A table without a single expert loaded. `checksums` is empty or has as many entries per expert as `pieces`
    /// says.
    pub(crate) fn new(
        n_slots: usize,
        n_keys: usize,
        policy: E,
        max_guesses: usize,
        pieces: FilePieces,
        checksums: Vec<u32>,
    ) -> Self {
        let slot = || Slot {
            key: NONE,
            pins: 0,
            place: Place::Free,
            intent: Intent::Used,
            warmth: Warmth::Warm,
            used: false,
            is_slow: false,
            prefetched: false,
            ready: 0,
            load: Load::default(),
            promised_at: 0,
            error: None,
        };
        Self {
            slot_of: vec![NONE; n_keys],
            slots: (0..n_slots).map(|_| slot()).collect(),
            usable: n_slots,
            free: (0..n_slots as u32).rev().collect(),
            policy,
            promised: SlotList::new(n_slots),
            guessed: SlotList::new(n_slots),
            n_guesses: 0,
            max_guesses,
            queue: Queue::with_capacity(n_slots),
            pieces,
            checksums,
            seen: vec![false; n_keys],
            verified: vec![false; n_keys],
            mark: vec![0; n_keys],
            requests: 0,
            stats: StoreStats::default(),
            uses: vec![0; n_keys],
            reads: vec![0; n_keys],
        }
    }

    /// Slots that may be used.
    pub(crate) fn usable(&self) -> usize {
        self.usable
    }

    /// Lets the first `n` slots be used and no others: the experts in those are forgotten.
    pub(crate) fn use_slots(&mut self, n: usize) -> Result<(), Blocked> {
        let n = n.min(self.slots.len());
        let busy = |slot: &Slot| matches!(slot.place, Place::Loading | Place::Pinned | Place::Failed);
        if self.slots.iter().skip(n).any(busy) {
            return Err(Blocked::OnLoads);
        }
        for at in n as u32..self.usable as u32 {
            let Slot { place, key, .. } = self.slots[at as usize];
            match place {
                Place::Ordered => self.policy.hold(at, key),
                Place::Promised => drop(self.promised.remove(at)),
                Place::Guessed => drop(self.guessed.remove(at)),
                Place::Free | Place::Withheld | Place::Loading | Place::Pinned | Place::Failed => {}
            }
            if self.is_evictable(at) {
                self.evict(at);
            }
            self.slots[at as usize].place = Place::Withheld;
        }
        self.free.retain(|&at| (at as usize) < n);
        for at in self.usable as u32..n as u32 {
            self.slots[at as usize].place = Place::Free;
            self.free.push(at);
        }
        self.usable = n;
        Ok(())
    }

    /// Whether an expert is in the cache, loading included.
    pub(crate) fn is_cached(&self, key: u32) -> bool {
        self.slot_of[key as usize] != NONE
    }

    /// The matrices of a held slot that may be used, or the error that ended its load.
    pub(crate) fn ready(&self, slot: u32) -> Result<u8, &StoreError> {
        let slot = &self.slots[slot as usize];
        slot.error.as_ref().map_or(Ok(slot.ready), Err)
    }

    /// Puts what is left to be read of a slot in the slow lane into the fast one; returns how many pieces were queued.
    fn hurry(&mut self, at: u32) -> usize {
        let slot = &mut self.slots[at as usize];
        if std::mem::take(&mut slot.is_slow) { self.queue.push(at, slot.key, &slot.load, true) } else { 0 }
    }

    fn promise(&mut self, at: u32) {
        let slot = &mut self.slots[at as usize];
        slot.place = Place::Promised;
        slot.promised_at = self.requests;
        self.promised.push_back(at);
    }

    fn confirm_guess(&mut self, at: u32) {
        self.n_guesses -= 1;
        self.stats.guess_useful += 1;
        self.slots[at as usize].intent = Intent::Used;
    }

    /// Pins every expert of `keys` (distinct) into `out`, loading those that are missing; all of them or none. Returns how
    /// many pieces were queued.
    pub(crate) fn acquire(&mut self, keys: &[u32], how: Use, out: &mut Vec<Held>) -> Result<usize, Blocked> {
        self.requests += 1;
        if let Some(&first) = keys.first() {
            self.policy.begin(first, how);
        }
        let (mut missing, mut hits_in_reach) = (0, 0);
        for &key in keys {
            self.mark[key as usize] = self.requests;
            match self.slot_of[key as usize] {
                NONE => missing += 1,
                at => hits_in_reach += usize::from(self.is_evictable(at)),
            }
        }
        let free = self.free.len() + self.policy.len() + self.promised.len() + self.guessed.len() - hits_in_reach;
        if missing > free {
            let unheld_load = |slot: &Slot| {
                let asked_for = self.mark[slot.key as usize] == self.requests && slot.error.is_none();
                slot.place == Place::Loading && slot.pins == 0 && !asked_for
            };
            let coming = self.slots.iter().filter(|slot| slot.place == Place::Loading).any(unheld_load);
            return Err(if coming { Blocked::OnLoads } else { Blocked::OnPins { needed: missing, free } });
        }
        // Hits first, so that none of them becomes a victim of this very request.
        for &key in keys {
            let at = self.slot_of[key as usize];
            if at != NONE {
                self.pin(at, how);
            }
        }
        let mut queued = 0;
        for &key in keys {
            let mut at = self.slot_of[key as usize];
            if at == NONE {
                let Some(vacated) = self.vacate_for_request() else {
                    // The count above says that there is one; were it ever wrong, nothing may stay pinned.
                    self.release_all(out);
                    return Err(Blocked::OnPins { needed: missing, free });
                };
                at = vacated;
                queued += self.begin(at, key, Intent::Used, true);
                let slot = &mut self.slots[at as usize];
                slot.warmth = if how == Use::Keep { Warmth::Warm } else { Warmth::Cold };
                slot.pins = 1;
                slot.used = true;
            }
            out.push(Held { slot: at, key, ready: self.slots[at as usize].ready });
            count(&mut self.uses, key);
        }
        self.stats.lookups += keys.len() as u64;
        Ok(queued)
    }

    fn is_evictable(&self, at: u32) -> bool {
        matches!(self.slots[at as usize].place, Place::Ordered | Place::Promised | Place::Guessed)
    }

    /// Pins a slot whose expert is here or coming.
    fn pin(&mut self, at: u32, how: Use) {
        let slot = &mut self.slots[at as usize];
        slot.pins += 1;
        match (slot.used, how) {
            (_, Use::Keep) => slot.warmth = Warmth::Warm,
            (false, Use::Sweep) => slot.warmth = Warmth::Cold,
            (true, Use::Sweep) => {}
        }
        self.stats.hits += u64::from(slot.used);
        slot.used = true;
        self.stats.prefetch_useful += u64::from(std::mem::take(&mut slot.prefetched));
        let (place, intent, key) = (slot.place, slot.intent, slot.key);
        match place {
            Place::Ordered => self.policy.hold(at, key),
            Place::Promised => {
                self.promised.remove(at);
            }
            Place::Guessed => {
                self.guessed.remove(at);
            }
            Place::Loading | Place::Pinned | Place::Free | Place::Withheld | Place::Failed => {}
        }
        if intent == Intent::Guess {
            self.confirm_guess(at);
        }
        let slot = &mut self.slots[at as usize];
        slot.intent = Intent::Used;
        if place == Place::Loading {
            self.hurry(at);
        } else {
            slot.place = Place::Pinned;
        }
    }

    /// Unpins everything in `held` and empties it.
    pub(crate) fn release_all(&mut self, held: &mut Vec<Held>) {
        for Held { slot, .. } in held.drain(..) {
            self.unpin(slot);
        }
    }

    fn unpin(&mut self, at: u32) {
        let slot = &mut self.slots[at as usize];
        slot.pins -= 1;
        if slot.pins > 0 {
            return;
        }
        match slot.place {
            Place::Pinned => {
                slot.place = Place::Ordered;
                self.policy.release(at, slot.key, slot.warmth);
            }
            Place::Failed => self.clear(at),
            // Loading: it is settled when its last piece has landed.
            Place::Loading | Place::Free | Place::Withheld | Place::Ordered | Place::Promised | Place::Guessed => {}
        }
    }

    /// The next piece for an I/O thread, which has to [`Table::finish`] it.
    pub(crate) fn next_job(&mut self) -> Option<Job> {
        let slots = &mut self.slots;
        self.queue.pop(|job| slots[job.slot as usize].load.take(job))
    }

    /// A piece has been read, and its checksum is `crc` (where the job asked for it).
    pub(crate) fn finish(&mut self, job: &Job, crc: u32) -> Finish {
        let slot = &mut self.slots[job.slot as usize];
        if slot.error.is_some() {
            // Another piece of the same load has failed meanwhile.
            slot.load.reading &= !(1 << job.piece);
            self.settle(job.slot);
            return Finish::Done;
        }
        let n = self.pieces.n_sums();
        let expected = self.checksums.get(slot.key as usize * n..).and_then(|sums| sums.get(..n)).unwrap_or(&[]);
        match slot.load.arrive(self.pieces.of(slot.key), job.piece, crc, expected) {
            Arrival::Ready(matrices) => {
                slot.ready |= matrices;
                if job.verify && slot.ready == ALL_MATRICES {
                    self.verified[slot.key as usize] = true;
                    self.stats.verified += 1;
                }
                self.settle(job.slot);
                Finish::Done
            }
            Arrival::ReadAgain => {
                self.stats.retries += 1;
                self.queue.push(job.slot, slot.key, &slot.load, slot.intent != Intent::Guess);
                Finish::ReadAgain
            }
            Arrival::Corrupt(got) => Finish::Corrupt(got),
        }
    }

    /// The piece could not be read, or it is damaged: ends the load. Whoever holds the slot is told; others who ask
    /// for the expert from now on begin a new load.
    pub(crate) fn fail(&mut self, job: &Job, error: StoreError) {
        let slot = &mut self.slots[job.slot as usize];
        slot.load.reading &= !(1 << job.piece);
        if slot.error.is_none() {
            slot.load.todo = 0;
            slot.error = Some(error);
            self.slot_of[slot.key as usize] = NONE;
            self.stats.failures += 1;
        }
        self.settle(job.slot);
    }

    /// Decides what becomes of a slot whose load may be over.
    fn settle(&mut self, at: u32) {
        let slot = &mut self.slots[at as usize];
        if slot.place != Place::Loading || !slot.load.is_over() {
            return;
        }
        let failed = slot.error.is_some();
        if !failed {
            count(&mut self.reads, slot.key);
        }
        match (slot.pins, slot.intent) {
            (0, _) if failed => self.clear(at),
            (1.., _) => slot.place = if failed { Place::Failed } else { Place::Pinned },
            (0, Intent::Promise) => self.promise(at),
            (0, Intent::Guess) => {
                slot.place = Place::Guessed;
                self.guessed.push_back(at);
            }
            (0, Intent::Used) => {
                slot.place = Place::Ordered;
                self.policy.release(at, slot.key, slot.warmth);
            }
        }
    }

    /// Makes a slot that is in no list free.
    fn clear(&mut self, at: u32) {
        let slot = &mut self.slots[at as usize];
        if slot.intent == Intent::Guess {
            self.n_guesses -= 1;
        }
        slot.place = Place::Free;
        slot.intent = Intent::Used;
        slot.error = None;
        slot.ready = 0;
        self.free.push(at);
    }

    /// Begins to load `key` into a vacated slot, in the fast lane or in the slow one; returns how many pieces were queued.
    fn begin(&mut self, at: u32, key: u32, intent: Intent, fast: bool) -> usize {
        let verify = !self.checksums.is_empty() && !self.verified[key as usize];
        self.stats.loads += 1;
        self.stats.rereads += u64::from(std::mem::replace(&mut self.seen[key as usize], true));
        self.n_guesses += usize::from(intent == Intent::Guess);
        self.slot_of[key as usize] = at;
        let slot = &mut self.slots[at as usize];
        slot.load.begin(self.pieces.of(key), verify);
        slot.key = key;
        slot.pins = 0;
        slot.place = Place::Loading;
        slot.intent = intent;
        slot.warmth = Warmth::Warm;
        slot.used = false;
        slot.prefetched = intent == Intent::Promise;
        slot.ready = 0;
        slot.error = None;
        slot.is_slow = !fast;
        self.queue.push(at, key, &slot.load, fast)
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
