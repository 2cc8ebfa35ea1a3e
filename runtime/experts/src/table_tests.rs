//! Every reachable state of small tables, walked breadth first. Since the store changes its table only under one mutex, the
//! interleavings of threads are the orders of these operations: this walk covers what a model checker for locks would.

use super::*;
use crate::eviction::Lru;
use crate::inflight::{MAX_PIECES, Pieces};
use crate::place::Certainty;
use st_gguf::crc32c;
use std::collections::{HashSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// A table, what its users hold, and a shadow of what is in the slots' memory.
#[derive(Clone)]
struct World {
    table: Table<Lru>,
    leases: Vec<Vec<Held>>,
    reading: Vec<Job>,
    /// Per slot and piece: what its bytes are.
    memory: Vec<[Bytes; MAX_PIECES]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bytes {
    /// Never written, or being written.
    Garbage,
    /// The expert's.
    Of(u32),
    /// The expert's, damaged on the way.
    Damaged(u32),
}

#[derive(Clone, Copy)]
struct Config {
    n_slots: usize,
    /// Of those, slots whose memory may be asked for.
    lent: usize,
    n_keys: u32,
    n_pieces: usize,
    /// Verify checksums, so that pieces may come damaged.
    verify: bool,
    max_guesses: usize,
    max_leases: usize,
    max_per_lease: usize,
    /// Reads may fail.
    failures: bool,
    /// I/O threads.
    max_reading: usize,
}

#[derive(Debug, Clone)]
enum Op {
    Prefetch(u32, Certainty),
    Acquire(Vec<u32>, Use),
    Release(usize),
    UseSlots(usize),
    Take,
    Finish(usize),
    FinishDamaged(usize),
    Fail(usize),
}

const PIECE: usize = 4096;

fn pieces(n: usize) -> Pieces {
    match n {
        1 => Pieces::of_record(&[0..PIECE, PIECE..2 * PIECE, 2 * PIECE..3 * PIECE], 3 * PIECE, true),
        // A matrix each, with a checksum each.
        3 => Pieces::per_matrix([0..PIECE, PIECE..2 * PIECE, 2 * PIECE..3 * PIECE]),
        // Up lies in both pieces.
        _ => Pieces::of_record(&[0..PIECE - 9, PIECE - 8..2 * PIECE, 2 * PIECE - 8..2 * PIECE], 2 * PIECE, false),
    }
}

/// [`pieces`] for every one of `n_keys` experts.
fn file_pieces(n: usize, n_keys: usize) -> FilePieces {
    FilePieces::new(vec![pieces(n)], n_keys)
}

/// A piece's checksum: right or wrong for expert `key`.
fn crc(key: u32, piece: u8, right: bool) -> u32 {
    let bytes = [key as u8, piece, u8::from(right)];
    crc32c::crc32c(&bytes)
}

/// The checksums that the file states of expert `key`.
fn sums(pieces: &Pieces, n: usize, key: u32) -> Vec<u32> {
    if pieces.n_sums() == n {
        return (0..n as u8).map(|p| crc(key, p, true)).collect();
    }
    let combine = |all, p| crc32c::crc32c_combine(all, crc(key, p, true), pieces.range(p).len());
    vec![(0..n as u8).fold(0, combine)]
}

/// Whether an expert is in it, however far.
fn is_live(slot: &Slot) -> bool {
    !matches!(slot.place, Place::Free | Place::Withheld)
}

fn error() -> StoreError {
    let cause = Arc::new(io::Error::other("no"));
    StoreError::Read { path: PathBuf::new(), layer: 0, expert: 0, offset: 0, cause }
}

impl World {
    fn new(config: &Config) -> Self {
        let pieces = pieces(config.n_pieces);
        let of = |key| sums(&pieces, config.n_pieces, key);
        let checksums = if config.verify { (0..config.n_keys).flat_map(of).collect() } else { Vec::new() };
        let policy = Lru::new(config.n_slots);
        let n_keys = config.n_keys as usize;
        let pieces = file_pieces(config.n_pieces, n_keys);
        let table = Table::new(config.n_slots, n_keys, policy, config.max_guesses, pieces, checksums);
        let memory = vec![[Bytes::Garbage; MAX_PIECES]; config.n_slots];
        World { table, leases: Vec::new(), reading: Vec::new(), memory }
    }

    fn ops(&self, config: &Config) -> Vec<Op> {
        let mut ops = Vec::new();
        for key in 0..config.n_keys {
            ops.push(Op::Prefetch(key, Certainty::Chosen));
            if config.max_guesses > 0 {
                ops.push(Op::Prefetch(key, Certainty::Guess));
            }
        }
        if self.leases.len() < config.max_leases {
            for a in 0..config.n_keys {
                ops.push(Op::Acquire(vec![a], Use::Keep));
                if config.max_per_lease > 1 {
                    ops.extend((0..a).map(|b| Op::Acquire(vec![a, b], Use::Sweep)));
                }
            }
        }
        ops.extend((0..self.leases.len()).map(Op::Release));
        if config.lent > 0 {
            ops.extend((config.n_slots - config.lent..=config.n_slots).map(Op::UseSlots));
        }
        if self.reading.len() < config.max_reading {
            ops.push(Op::Take);
        }
        for i in 0..self.reading.len() {
            ops.push(Op::Finish(i));
            if config.verify && self.reading[i].verify {
                ops.push(Op::FinishDamaged(i));
            }
            if config.failures {
                ops.push(Op::Fail(i));
            }
        }
        ops
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Prefetch(key, certainty) => {
                let stale = |slot: &Slot| {
                    slot.intent == Intent::Guess && slot.load.is_untouched(self.table.pieces.of(slot.key))
                };
                let before =
                    self.table.slots.iter().map(|slot| (slot.key, slot.place, stale(slot))).collect::<Vec<_>>();
                self.table.prefetch(std::iter::once(*key), *certainty);
                // A prefetch takes nothing that is in use or promised, and a guess nothing warm beyond its share. An older
                // guess of which nothing was read yet gives way to a newer one.
                for (at, &(key, place, stale)) in before.iter().enumerate() {
                    let unchanged = self.table.slots[at].key == key || *certainty == Certainty::Guess && stale;
                    let taken = matches!(place, Place::Pinned | Place::Loading | Place::Failed | Place::Promised);
                    assert!(unchanged || !taken, "{op:?} took a slot that is {place:?}");
                }
                assert!(self.table.n_guesses <= self.table.max_guesses);
            }
            Op::Acquire(keys, how) => {
                let mut held = Vec::new();
                let before: Vec<u32> = keys.iter().map(|&key| self.table.slot_of[key as usize]).collect();
                match self.table.acquire(keys, *how, &mut held) {
                    Ok(_) => {
                        // What was here is not read again.
                        assert!(before.iter().zip(&held).all(|(&at, now)| at == NONE || at == now.slot));
                        assert!(held.iter().map(|h| h.key).eq(keys.iter().copied()));
                        self.leases.push(held);
                    }
                    Err(blocked) => {
                        assert!(held.is_empty());
                        self.check_blocked(keys, blocked);
                    }
                }
            }
            Op::Release(i) => {
                let mut held = self.leases.remove(*i);
                self.table.release_all(&mut held);
            }
            Op::UseSlots(n) => {
                let before = self.table.usable();
                let busy = |slot: &Slot| matches!(slot.place, Place::Loading | Place::Pinned | Place::Failed);
                let is_busy = self.table.slots[*n..].iter().any(busy);
                assert_eq!(self.table.use_slots(*n).is_err(), is_busy);
                assert_eq!(self.table.usable(), if is_busy { before } else { *n });
                // Their memory is somebody else's now.
                self.memory[self.table.usable()..].fill([Bytes::Garbage; MAX_PIECES]);
            }
            Op::Take => {
                if let Some(job) = self.table.next_job() {
                    self.memory[job.slot as usize][job.piece as usize] = Bytes::Garbage;
                    self.reading.push(job);
                }
            }
            Op::Finish(i) | Op::FinishDamaged(i) => {
                let right = matches!(op, Op::Finish(_));
                let job = self.reading.remove(*i);
                let bytes = if right { Bytes::Of(job.key) } else { Bytes::Damaged(job.key) };
                self.memory[job.slot as usize][job.piece as usize] = bytes;
                if let Finish::Corrupt(_) = self.table.finish(&job, crc(job.key, job.piece, right)) {
                    self.table.fail(&job, error());
                }
            }
            Op::Fail(i) => {
                let job = self.reading.remove(*i);
                self.table.fail(&job, error());
            }
        }
    }

    /// The reason for not serving a request at once must be true, and waiting must be of use.
    fn check_blocked(&self, keys: &[u32], blocked: Blocked) {
        let available = |slot: &&Slot| {
            is_live(slot) && !matches!(slot.place, Place::Pinned | Place::Failed | Place::Loading)
                || slot.place == Place::Free
        };
        let asked = |slot: &&Slot| is_live(slot) && slot.error.is_none() && keys.contains(&slot.key);
        let free = self.table.slots.iter().filter(|s| available(s) && !asked(s)).count();
        let missing = keys.iter().filter(|&&key| !self.table.is_cached(key)).count();
        assert!(free < missing);
        let coming = self.table.slots.iter().any(|s| s.place == Place::Loading && s.pins == 0 && !asked(&s));
        match blocked {
            Blocked::OnLoads => assert!(coming),
            Blocked::OnPins { needed, free: said } => assert!(!coming && needed == missing && said == free),
        }
    }

    fn check(&self, config: &Config) {
        let table = &self.table;
        let mut live = HashSet::new();
        let mut pins = vec![0; config.n_slots];
        for held in self.leases.iter().flatten() {
            pins[held.slot as usize] += 1;
            // What a lease is shown is the expert's bytes, at the time of acquiring and ever after.
            if let Ok(ready) = table.ready(held.slot) {
                assert_eq!(table.slots[held.slot as usize].key, held.key);
                assert_eq!(held.ready & !ready, 0);
                for piece in (0..config.n_pieces as u8).filter(|&piece| self.shown(ready, piece)) {
                    assert_eq!(self.memory[held.slot as usize][piece as usize], Bytes::Of(held.key));
                }
            } else {
                assert_eq!(held.ready & !table.slots[held.slot as usize].ready, 0);
            }
        }
        for (at, slot) in table.slots.iter().enumerate() {
            assert_eq!(slot.pins, pins[at]);
            let reading = self.reading.iter().filter(|job| job.slot as usize == at).fold(0, |m, j| m | 1 << j.piece);
            assert_eq!(slot.load.reading, reading);
            let at = at as u32;
            let whole_and_unpinned = slot.pins == 0 && slot.ready == ALL_MATRICES;
            assert_eq!(table.free.contains(&at), slot.place == Place::Free);
            assert_eq!(table.policy.order.contains(at), slot.place == Place::Ordered);
            assert_eq!(table.promised.contains(at), slot.place == Place::Promised);
            assert_eq!(table.guessed.contains(at), slot.place == Place::Guessed);
            match slot.place {
                Place::Free | Place::Withheld => {
                    assert!(slot.pins == 0 && slot.error.is_none() && slot.load.is_over());
                    assert_eq!(slot.place == Place::Withheld, at as usize >= table.usable());
                }
                Place::Loading => assert!(!slot.load.is_over()),
                Place::Pinned => assert!(slot.pins > 0 && slot.ready == ALL_MATRICES && slot.load.is_over()),
                Place::Failed => assert!(slot.pins > 0 && slot.error.is_some() && slot.load.is_over()),
                Place::Ordered | Place::Promised => assert!(whole_and_unpinned && slot.load.is_over()),
                Place::Guessed => assert!(whole_and_unpinned && slot.intent == Intent::Guess),
            }
            if is_live(slot) && slot.error.is_none() {
                assert!(live.insert(slot.key), "an expert has two slots");
                assert_eq!(table.slot_of[slot.key as usize], at);
            }
        }
        assert_eq!(table.slot_of.iter().filter(|&&at| at != NONE).count(), live.len());
        let guesses = table.slots.iter().filter(|s| is_live(s) && s.intent == Intent::Guess).count();
        assert_eq!(table.n_guesses, guesses);
        self.check_progress(config);
    }

    /// Whether a set of ready matrices shows a piece's bytes.
    fn shown(&self, ready: u8, piece: u8) -> bool {
        let pieces = self.table.pieces.of(0);
        let without = pieces.all() & !(1 << piece);
        ready & !pieces.ready(without) != 0
    }

    /// From here, I/O alone brings every lease to an answer, and giving the leases back makes every slot available.
    fn check_progress(&self, config: &Config) {
        let mut world = self.clone();
        loop {
            world.apply(&Op::Take);
            if world.reading.is_empty() {
                break;
            }
            world.apply(&Op::Finish(0));
        }
        for held in world.leases.iter().flatten() {
            assert!(world.table.ready(held.slot).map_or(true, |ready| ready == ALL_MATRICES));
        }
        while !world.leases.is_empty() {
            world.apply(&Op::Release(0));
        }
        let keys: Vec<u32> = (0..world.table.usable().min(config.n_keys as usize) as u32).collect();
        world.table.acquire(&keys, Use::Keep, &mut Vec::new()).unwrap();
    }

    /// Everything that decides what can happen next; counters and what is stale are left out.
    fn fingerprint(&self) -> Vec<u8> {
        let table = &self.table;
        let mut print = Vec::with_capacity(128);
        for (slot, memory) in table.slots.iter().zip(&self.memory) {
            if !is_live(slot) {
                print.push(if slot.place == Place::Free { 0xff } else { 0xfe });
                continue;
            }
            let flags = [slot.used, slot.prefetched, slot.error.is_some(), slot.warmth == Warmth::Warm];
            let flags = flags.iter().fold(0, |bits, &flag| bits << 1 | u8::from(flag));
            let again = slot.load.again();
            print.extend([slot.key as u8, slot.pins as u8, slot.place as u8, slot.intent as u8, slot.ready, flags]);
            print.extend([slot.load.todo, slot.load.reading, slot.load.landed, again]);
            print.extend(memory.map(|bytes| match bytes {
                Bytes::Garbage => 0,
                Bytes::Of(key) => 1 + key as u8,
                Bytes::Damaged(key) => 101 + key as u8,
            }));
        }
        let mut list = |tag: u8, slots: &mut dyn Iterator<Item = u32>| {
            print.push(200 + tag);
            print.extend(slots.map(|slot| slot as u8));
        };
        // Which of several free slots is taken makes no difference to anybody.
        list(0, &mut table.policy.order.iter());
        list(1, &mut table.promised.iter());
        list(2, &mut table.guessed.iter());
        list(3, &mut table.verified.iter().map(|&is| u32::from(is)));
        print.push(204);
        for (certain, job) in table.queue.iter() {
            if table.slots[job.slot as usize].load.wants(job) {
                print.extend([u8::from(certain), job.slot as u8, job.piece]);
            }
        }
        for lease in &self.leases {
            print.push(205);
            print.extend(lease.iter().flat_map(|held| [held.slot as u8, held.ready]));
        }
        print
    }
}

/// Visits every reachable state; returns how many there are.
fn walk(config: &Config) -> usize {
    let start = World::new(config);
    let mut seen = HashSet::from([start.fingerprint()]);
    let mut frontier = VecDeque::from([start]);
    while let Some(world) = frontier.pop_front() {
        for op in world.ops(config) {
            let mut next = world.clone();
            next.apply(&op);
            if seen.insert(next.fingerprint()) {
                next.check(config);
                frontier.push_back(next);
            }
        }
    }
    seen.len()
}

const BASE: Config = Config {
    n_slots: 2,
    lent: 0,
    n_keys: 3,
    n_pieces: 1,
    verify: false,
    max_guesses: 0,
    max_leases: 2,
    max_per_lease: 1,
    failures: true,
    max_reading: 2,
};

#[test]
fn every_state_with_failing_reads_is_sound() {
    assert!(walk(&BASE) > 3_000);
}

#[test]
fn every_state_with_pieces_is_sound() {
    assert!(walk(&Config { n_pieces: 2, max_leases: 1, max_per_lease: 2, ..BASE }) > 40_000);
}

#[test]
fn every_state_with_damaged_records_is_sound() {
    assert!(walk(&Config { n_pieces: 2, verify: true, n_keys: 2, max_leases: 1, failures: false, ..BASE }) > 10_000);
}

#[test]
fn every_state_with_damaged_matrices_is_sound() {
    assert!(
        walk(&Config { n_slots: 1, n_pieces: 3, verify: true, n_keys: 2, max_leases: 1, failures: false, ..BASE })
            > 3_000
    );
}

#[test]
fn every_state_with_guesses_is_sound() {
    assert!(
        walk(&Config { n_slots: 3, max_guesses: 1, max_leases: 1, max_reading: 1, failures: false, ..BASE }) > 20_000
    );
}

#[test]
fn every_state_with_lent_slots_is_sound() {
    assert!(walk(&Config { n_slots: 3, lent: 2, max_guesses: 1, max_leases: 1, max_reading: 1, ..BASE }) > 20_000);
}

/// Reads everything that is queued.
fn drain(table: &mut Table<Lru>) {
    while let Some(job) = table.next_job() {
        table.finish(&job, 0);
    }
}

fn small_table(n_slots: usize, max_guesses: usize) -> Table<Lru> {
    Table::new(n_slots, 200, Lru::new(n_slots), max_guesses, file_pieces(1, 200), Vec::new())
}

fn use_once(table: &mut Table<Lru>, key: u32, how: Use) -> bool {
    let hits = table.stats.hits;
    let mut held = Vec::new();
    table.acquire(&[key], how, &mut held).unwrap();
    drain(table);
    table.release_all(&mut held);
    table.stats.hits > hits
}

#[test]
fn an_abandoned_promise_is_the_first_to_go() {
    let mut table = small_table(4, 0);
    table.prefetch([0, 1].into_iter(), Certainty::Chosen);
    drain(&mut table);
    for key in 10..30 {
        use_once(&mut table, key, Use::Keep);
    }
    assert!(table.is_cached(0) && table.is_cached(1), "a promise holds against many requests");
    for _ in 0..PROMISE_LASTS {
        use_once(&mut table, 29, Use::Keep);
    }
    use_once(&mut table, 30, Use::Keep);
    assert!(!table.is_cached(0) && table.is_cached(1) && table.is_cached(29));
}

#[test]
fn a_prefetch_takes_no_slot_from_its_own_experts() {
    let mut table = small_table(4, 0);
    for key in 0..4 {
        use_once(&mut table, key, Use::Keep);
    }
    // Expert 0 would be the first to go.
    table.prefetch([9, 0].into_iter(), Certainty::Chosen);
    assert!(table.is_cached(0) && table.is_cached(9) && !table.is_cached(1));
}

#[test]
fn a_sweep_leaves_what_is_warm() {
    let mut table = small_table(4, 0);
    for key in 0..3 {
        use_once(&mut table, key, Use::Keep);
    }
    for key in 10..40 {
        assert!(!use_once(&mut table, key, Use::Sweep));
    }
    assert!((0..3).all(|key| use_once(&mut table, key, Use::Sweep)));
    assert_eq!(table.stats.rereads, 0);
    for key in 50..53 {
        use_once(&mut table, key, Use::Keep);
    }
    assert!(!table.is_cached(0));
}

#[test]
fn guesses_stay_within_their_share_and_come_last() {
    let mut table = small_table(4, 2);
    for key in 0..4 {
        use_once(&mut table, key, Use::Keep);
    }
    table.prefetch(10..16, Certainty::Guess);
    assert!(table.is_cached(2) && table.is_cached(3), "only two slots are for guesses");
    table.prefetch(20..21, Certainty::Chosen);
    assert_eq!(table.next_job().map(|job| job.key), Some(20));
    // A guess that turns out right joins the fast lane, and its share is free again.
    table.prefetch(11..12, Certainty::Chosen);
    assert_eq!(table.next_job().map(|job| job.key), Some(11));
    assert_eq!((table.stats.guess_issued, table.stats.guess_useful, table.n_guesses), (2, 1, 1));
    // So does one that a lease is waiting for.
    table.acquire(&[10], Use::Keep, &mut Vec::new()).unwrap();
    table.prefetch(21..22, Certainty::Chosen);
    let order: Vec<u32> = std::iter::from_fn(|| table.next_job()).map(|job| job.key).collect();
    assert_eq!(order, [10, 21]);
}

#[test]
fn a_load_that_failed_is_not_read_on() {
    let mut table = Table::new(2, 2, Lru::new(2), 0, file_pieces(2, 2), Vec::new());
    let mut held = Vec::new();
    table.acquire(&[0], Use::Keep, &mut held).unwrap();
    let job = table.next_job().unwrap();
    table.fail(&job, error());
    assert_eq!(table.next_job(), None);
    assert!(table.ready(held[0].slot).is_err());
    // Whoever asks now begins anew, beside those who still have to be told.
    table.acquire(&[0], Use::Keep, &mut Vec::new()).unwrap();
    assert!(table.next_job().is_some_and(|again| again.key == 0 && again.slot != job.slot));
}

#[test]
fn counters_tell_hits_from_prefetched_misses() {
    let mut table = small_table(2, 0);
    table.prefetch([5].into_iter(), Certainty::Chosen);
    drain(&mut table);
    assert!(!use_once(&mut table, 5, Use::Keep), "it had to be read, if ahead of time");
    assert!(use_once(&mut table, 5, Use::Keep));
    for key in 6..8 {
        use_once(&mut table, key, Use::Keep);
    }
    assert!(!use_once(&mut table, 5, Use::Keep));
    let stats = &table.stats;
    assert_eq!((stats.lookups, stats.hits, stats.loads, stats.rereads), (5, 1, 4, 1));
    assert_eq!((stats.prefetch_issued, stats.prefetch_useful, stats.evictions), (1, 1, 2));
}

#[test]
fn a_warmed_cache_is_read_in_the_order_of_the_file_after_what_somebody_wants() {
    let mut table = small_table(16, 0);
    // A quarter of the slots stays free; what is wanted least has none.
    let most_wanted = [150, 3, 77, 20, 90, 100, 8, 60, 61, 62, 63, 64, 199, 198];
    table.warm(most_wanted.into_iter());
    assert!(table.is_cached(64) && !table.is_cached(199) && table.free.len() == 4);
    let mut held = Vec::new();
    table.acquire(&[120, 77], Use::Keep, &mut held).unwrap();
    let mut order: Vec<u32> = Vec::new();
    while let Some(job) = table.next_job() {
        table.finish(&job, 0);
        order.push(job.key);
    }
    order.dedup();
    // What is wanted comes first, and of that what was on its way.
    assert_eq!(order, [77, 120, 3, 8, 20, 60, 61, 62, 63, 64, 90, 100, 150]);
    table.release_all(&mut held);
    assert!(use_once(&mut table, 3, Use::Keep) && !use_once(&mut table, 199, Use::Keep));
    // Twice does nothing more, and names that come twice are read once.
    assert_eq!(table.warm([3, 3, 8].into_iter()), 0);
}
