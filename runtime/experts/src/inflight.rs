//! Loads on their way: an expert is read in pieces, each piece by one thread, and every piece lands on its own.
//!
//! [`Pieces`] is the geometry (which bytes make a piece, which matrix needs which pieces), [`Load`] one expert's progress and
//! [`Queue`] what waits for a thread. No I/O and no locks here; the table drives these under the store's mutex.

use crate::buffer::PAGE;
use st_gguf::crc32c;
use std::collections::VecDeque;
use std::ops::Range;

/// An expert is read in at most this many pieces.
pub(crate) const MAX_PIECES: usize = 3;

/// Every matrix of an expert, as a mask over `Matrix as usize`.
pub(crate) const ALL_MATRICES: u8 = 0b111;

/// How one expert's bytes are split into pieces, the same for every expert of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Pieces {
    n: usize,
    /// Bytes of the slot that each piece fills.
    ranges: [Range<usize>; MAX_PIECES],
    /// Per matrix (gate, up, down): the mask of pieces that hold a part of it.
    need: [u8; 3],
    /// Whether each piece has a checksum of its own; otherwise all of them together have one.
    sum_each: bool,
}

impl Pieces {
    /// One piece per matrix, each filling its region of the slot.
    pub(crate) fn per_matrix(regions: [Range<usize>; 3]) -> Self {
        Self { n: 3, ranges: regions, need: [0b001, 0b010, 0b100], sum_each: true }
    }

    /// A record that lies in the file as it lies in the slot, cut at the first page boundary after gate and after up.
    /// `whole` leaves it in one piece.
    pub(crate) fn of_record(regions: &[Range<usize>; 3], record_bytes: usize, whole: bool) -> Self {
        let mut pieces = Self { n: 0, ranges: [0..0, 0..0, 0..0], need: [0; 3], sum_each: false };
        let mut start = 0;
        for end in [regions[0].end, regions[1].end, record_bytes] {
            let end = if whole { record_bytes } else { end.next_multiple_of(PAGE).min(record_bytes) };
            if end > start {
                pieces.ranges[pieces.n] = start..end;
                pieces.n += 1;
                start = end;
            }
        }
        for (need, region) in pieces.need.iter_mut().zip(regions) {
            for (piece, range) in pieces.ranges[..pieces.n].iter().enumerate() {
                if range.start < region.end && region.start < range.end {
                    *need |= 1 << piece;
                }
            }
        }
        pieces
    }

    pub(crate) fn range(&self, piece: u8) -> Range<usize> {
        self.ranges[piece as usize].clone()
    }

    /// The mask of all pieces.
    pub(crate) fn all(&self) -> u8 {
        (1 << self.n) - 1
    }

    /// The mask of matrices that are whole once the pieces `landed` are there.
    pub(crate) fn ready(&self, landed: u8) -> u8 {
        (0..3).filter(|&m| self.need[m] & !landed == 0).fold(0, |mask, m| mask | 1 << m)
    }

    /// Checksums that an expert has.
    pub(crate) fn n_sums(&self) -> usize {
        if self.sum_each { self.n } else { 1 }
    }

    /// The checksum that covers a piece, and the mask of all pieces that it covers.
    fn sum_of(&self, piece: u8) -> (usize, u8) {
        if self.sum_each { (piece as usize, 1 << piece) } else { (0, self.all()) }
    }

    /// The checksum of the bytes of the pieces in `mask` one after the other, from the checksum of each.
    fn combine(&self, mask: u8, crcs: &[u32; MAX_PIECES]) -> u32 {
        let mut pieces = (0..self.n).filter(|piece| mask & 1 << piece != 0);
        // Combining takes tens of microseconds, and this runs under the store's lock.
        let first = pieces.next().map_or(0, |piece| crcs[piece]);
        pieces.fold(first, |crc, piece| crc32c::crc32c_combine(crc, crcs[piece], self.ranges[piece].len()))
    }
}

/// The pieces of every expert of a file.
#[derive(Debug, Clone)]
pub(crate) struct FilePieces {
    /// Per layer; there is one at least.
    layers: Vec<Pieces>,
    n_experts: usize,
}

impl FilePieces {
    /// Those of the layers of a file, each of `n_experts` experts.
    pub(crate) fn new(layers: Vec<Pieces>, n_experts: usize) -> Self {
        Self { layers, n_experts }
    }

    /// The pieces of the expert `key`.
    pub(crate) fn of(&self, key: u32) -> &Pieces {
        &self.layers[key as usize / self.n_experts]
    }

    /// Checksums that an expert of any layer has.
    pub(crate) fn n_sums(&self) -> usize {
        self.layers.first().map_or(1, Pieces::n_sums)
    }
}

/// A piece for an I/O thread to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) slot: u32,
    /// The expert, `layer × n_experts + expert`.
    pub(crate) key: u32,
    pub(crate) piece: u8,
    /// Whether the piece's checksum is wanted.
    pub(crate) verify: bool,
    /// Which load of the slot this belongs to; a queued job of an earlier one is void.
    generation: u32,
}

/// The progress of filling one slot.
#[derive(Debug, Default, Clone)]
pub(crate) struct Load {
    generation: u32,
    /// Pieces that no thread has taken yet.
    pub(crate) todo: u8,
    /// Pieces that a thread is reading into the slot now.
    pub(crate) reading: u8,
    /// Pieces that are in the slot.
    pub(crate) landed: u8,
    verify: bool,
    /// Pieces whose checksum was right.
    checked: u8,
    /// Pieces that are read for the second time, since their checksum was wrong.
    again: u8,
    crcs: [u32; MAX_PIECES],
}

/// What the arrival of a piece means for its load.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// The matrices in the mask may be used.
    Ready(u8),
    /// The checksum was wrong for the first time: the pieces that it covers are to be read again.
    ReadAgain,
    /// The checksum was wrong twice: this is what came.
    Corrupt(u32),
}

impl Load {
    /// Begins a load of every piece; `verify` holds back each matrix until the checksums of what it lies in are right.
    pub(crate) fn begin(&mut self, pieces: &Pieces, verify: bool) {
        let generation = self.generation.wrapping_add(1);
        *self = Load { generation, todo: pieces.all(), verify, ..Load::default() };
    }

    /// Whether `job` belongs to this load and is still to be read.
    pub(crate) fn wants(&self, job: &Job) -> bool {
        self.generation == job.generation && self.todo & 1 << job.piece != 0
    }

    /// Marks the piece as being read, where it still is to be read.
    pub(crate) fn take(&mut self, job: &Job) -> bool {
        let wanted = self.wants(job);
        if wanted {
            self.todo &= !(1 << job.piece);
            self.reading |= 1 << job.piece;
        }
        wanted
    }

    /// Whether no piece was taken by a thread yet.
    pub(crate) fn is_untouched(&self, pieces: &Pieces) -> bool {
        self.todo == pieces.all()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.todo == 0 && self.reading == 0
    }

    /// A piece came; `expected` are the expert's checksums, used where the load verifies.
    pub(crate) fn arrive(&mut self, pieces: &Pieces, piece: u8, crc: u32, expected: &[u32]) -> Arrival {
        self.reading &= !(1 << piece);
        self.landed |= 1 << piece;
        self.crcs[piece as usize] = crc;
        if !self.verify {
            return Arrival::Ready(pieces.ready(self.landed));
        }
        let (sum, covered) = pieces.sum_of(piece);
        if self.landed & covered != covered {
            return Arrival::Ready(pieces.ready(self.checked));
        }
        match pieces.combine(covered, &self.crcs) {
            got if expected.get(sum) == Some(&got) => {
                self.checked |= covered;
                Arrival::Ready(pieces.ready(self.checked))
            }
            got if self.again & covered != 0 => Arrival::Corrupt(got),
            _ => {
                self.again |= covered;
                self.landed &= !covered;
                self.todo |= covered;
                Arrival::ReadAgain
            }
        }
    }
}

/// Pieces waiting for a thread: what a router has chosen first, guesses after.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Queue {
    certain: VecDeque<Job>,
    guesses: VecDeque<Job>,
}

impl Queue {
    pub(crate) fn with_capacity(n_slots: usize) -> Self {
        Self { certain: VecDeque::with_capacity(n_slots.min(1024) * MAX_PIECES), guesses: VecDeque::new() }
    }

    /// Queues the pieces of `load` that no thread has taken, in order; returns how many. Queueing a piece twice (a guess
    /// that became certain) is harmless: whoever comes second finds it taken.
    pub(crate) fn push(&mut self, slot: u32, key: u32, load: &Load, certain: bool) -> usize {
        let queue = if certain { &mut self.certain } else { &mut self.guesses };
        let Load { generation, todo, verify, .. } = *load;
        for piece in (0..MAX_PIECES as u8).filter(|piece| todo & 1 << piece != 0) {
            queue.push_back(Job { slot, key, piece, verify, generation });
        }
        todo.count_ones() as usize
    }

    /// Pieces in the slow lane, void ones included.
    pub(crate) fn n_guesses(&self) -> usize {
        self.guesses.len()
    }

    /// Takes the first piece out of the slow lane, void or not.
    pub(crate) fn pop_guess(&mut self) -> Option<Job> {
        self.guesses.pop_front()
    }

    /// Puts a piece back at the end of the slow lane.
    pub(crate) fn push_guess(&mut self, job: Job) {
        self.guesses.push_back(job);
    }

    /// The next piece to read: the first that `take` accepts; what it refuses is void and forgotten.
    pub(crate) fn pop(&mut self, mut take: impl FnMut(&Job) -> bool) -> Option<Job> {
        loop {
            let job = self.certain.pop_front().or_else(|| self.guesses.pop_front())?;
            if take(&job) {
                return Some(job);
            }
        }
    }
}

#[cfg(test)]
impl Load {
    pub(crate) fn again(&self) -> u8 {
        self.again
    }
}

#[cfg(test)]
impl Queue {
    /// The queued jobs in the order in which they would be popped, void ones included, each with its lane.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (bool, &Job)> {
        self.certain.iter().map(|job| (true, job)).chain(self.guesses.iter().map(|job| (false, job)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_cut_at_pages_and_matrices_wait_for_every_page_of_theirs() {
        // Page-aligned regions: one piece each, each matrix on its own.
        let aligned = Pieces::of_record(&[0..4096, 4096..12288, 12288..16384], 16384, false);
        assert_eq!((aligned.n, aligned.need), (3, [0b001, 0b010, 0b100]));
        // Unaligned: the second piece begins inside up's first page, so up needs two of them.
        let odd = Pieces::of_record(&[0..5000, 5056..9000, 9024..12000], 12288, false);
        assert_eq!(&odd.ranges, &[0..8192, 8192..12288, 0..0]);
        assert_eq!((odd.n, odd.need), (2, [0b01, 0b11, 0b10]));
        assert_eq!((odd.ready(0b01), odd.ready(0b10), odd.ready(0b11)), (0b001, 0b100, 0b111));
        // A tiny expert is one piece.
        let tiny = Pieces::of_record(&[0..64, 64..128, 128..192], 4096, false);
        assert_eq!((tiny.n, tiny.need), (1, [1, 1, 1]));
        let whole = Pieces::of_record(&[0..4096, 4096..12288, 12288..16384], 16384, true);
        assert_eq!((whole.n, whole.range(0)), (1, 0..16384));
    }

    #[test]
    fn a_verified_load_shows_nothing_until_its_checksum_is_right() {
        let data: Vec<u8> = (0..12288u32).map(|i| i as u8).collect();
        let pieces = Pieces::of_record(&[0..4096, 4096..8192, 8192..12288], 12288, false);
        let expected = crc32c::crc32c(&data);
        let crcs: Vec<u32> = (0..3).map(|p| crc32c::crc32c(&data[pieces.range(p)])).collect();
        let mut load = Load::default();
        load.begin(&pieces, true);
        load.todo = 0;
        let expected = &[expected];
        assert_eq!(load.arrive(&pieces, 2, crcs[2], expected), Arrival::Ready(0));
        assert_eq!(load.arrive(&pieces, 0, crcs[0], expected), Arrival::Ready(0));
        assert_eq!(load.arrive(&pieces, 1, 1, expected), Arrival::ReadAgain);
        assert_eq!((load.todo, load.landed), (0b111, 0));
        load.todo = 0;
        for (piece, &crc) in crcs.iter().enumerate() {
            let want = if piece == 2 { Arrival::Ready(ALL_MATRICES) } else { Arrival::Ready(0) };
            assert_eq!(load.arrive(&pieces, piece as u8, crc, expected), want);
        }
        load.begin(&pieces, true);
        load.again = 0b111;
        for piece in 0..3 {
            let arrival = load.arrive(&pieces, piece, 0, expected);
            assert_eq!(matches!(arrival, Arrival::Corrupt(_)), piece == 2);
        }
    }

    #[test]
    fn a_matrix_with_a_checksum_of_its_own_waits_for_no_other() {
        let pieces = Pieces::per_matrix([0..1, 1..2, 2..3]);
        let mut load = Load::default();
        load.begin(&pieces, true);
        load.todo = 0;
        let expected = &[10, 11, 12];
        assert_eq!(load.arrive(&pieces, 2, 12, expected), Arrival::Ready(0b100));
        assert_eq!(load.arrive(&pieces, 1, 9, expected), Arrival::ReadAgain);
        assert_eq!((load.todo, load.landed), (0b010, 0b100));
        assert_eq!(load.arrive(&pieces, 0, 10, expected), Arrival::Ready(0b101));
        load.todo = 0;
        assert_eq!(load.clone().arrive(&pieces, 1, 9, expected), Arrival::Corrupt(9));
        assert_eq!(load.arrive(&pieces, 1, 11, expected), Arrival::Ready(ALL_MATRICES));
    }

    #[test]
    fn guesses_wait_and_a_promoted_guess_is_read_once() {
        let pieces = Pieces::per_matrix([0..1, 1..2, 2..3]);
        let mut loads = [Load::default(), Load::default()];
        let mut queue = Queue::with_capacity(2);
        loads.iter_mut().for_each(|load| load.begin(&pieces, false));
        queue.push(0, 10, &loads[0], false);
        queue.push(1, 11, &loads[1], true);
        queue.push(0, 10, &loads[0], true);
        let mut order = Vec::new();
        while let Some(job) = queue.pop(|job| loads[job.slot as usize].take(job)) {
            order.push((job.key, job.piece));
        }
        assert_eq!(order, [(11, 0), (11, 1), (11, 2), (10, 0), (10, 1), (10, 2)]);
    }
}
