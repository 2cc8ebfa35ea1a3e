//! What the store counts. Every field says what it means, so that figures from different runs can be compared.

/// Counters since the store was made. Take two and [`StoreStats::since`] gives what happened between them;
/// [`StoreStats::plus`] adds up several such stretches.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StoreStats {
    /// Experts that `acquire` was asked for: for a token each that its router chose, for a batch of tokens each that the
    /// batch touches in a layer, once.
    pub lookups: u64,
    /// Lookups for which nothing had to be read, because the expert was in the cache from an earlier use (or another lease
    /// was having it read). `lookups - hits` are misses, whether or not a prefetch had them read in time.
    pub hits: u64,
    /// Experts whose read was begun, by whoever asked.
    pub loads: u64,
    /// Of those, loads of an expert that had been in the cache before and was evicted: what more memory would save.
    pub rereads: u64,
    /// Experts that gave up their slot to another.
    pub evictions: u64,
    /// Loads begun by `prefetch` because a router had chosen the expert.
    pub prefetch_issued: u64,
    /// Of those, experts that were then acquired before they were evicted.
    pub prefetch_useful: u64,
    /// Prefetches that were dropped for want of a slot.
    pub prefetch_dropped: u64,
    /// Loads begun on a guess.
    pub guess_issued: u64,
    /// Of those, experts that were then acquired or prefetched before they were evicted.
    pub guess_useful: u64,
    /// Experts that were guessed while they were missing, whether or not they were then read, once the router had chosen.
    pub guess_judged: u64,
    /// Of those, experts that the router chose.
    pub guess_right: u64,
    /// Bytes that reads have delivered, whoever asked for them; the rest of covering pages and repeated reads included.
    pub bytes_read: u64,
    /// Reads that were issued (a piece read in two parts counts once).
    pub reads: u64,
    /// Reads that failed, or whose checksum was wrong, and were repeated.
    pub retries: u64,
    /// Loads that failed for good.
    pub failures: u64,
    /// Records whose checksum was verified.
    pub verified: u64,
    /// Wall time in which at least one computing thread was blocked waiting for an expert, in seconds.
    pub stall_seconds: f64,
    /// Wall time in which at least one I/O thread was at work (reading, verifying or rearranging an expert), in seconds.
    pub io_seconds: f64,
    /// Time that I/O threads spent in reads, summed over threads, in seconds.
    pub read_thread_seconds: f64,
    /// Time that I/O threads spent rearranging canonical matrices into slots, summed over threads, in seconds.
    pub fill_thread_seconds: f64,
}

impl StoreStats {
    /// Lookups that were not hits.
    pub fn misses(&self) -> u64 {
        self.lookups - self.hits
    }

    /// Hits per lookup, from 0 to 1; 1 where nothing was looked up.
    pub fn hit_rate(&self) -> f64 {
        if self.lookups == 0 { 1.0 } else { self.hits as f64 / self.lookups as f64 }
    }

    /// The share of I/O time that hid behind computing, from 0 to 1: that in which no computing thread was blocked. 1 where
    /// nothing was read.
    pub fn hidden_share(&self) -> f64 {
        if self.io_seconds <= 0.0 { 1.0 } else { (1.0 - self.stall_seconds / self.io_seconds).clamp(0.0, 1.0) }
    }

    /// The share of judged guesses that were right, from 0 to 1; `None` where none was judged.
    pub fn guess_right_share(&self) -> Option<f64> {
        (self.guess_judged > 0).then(|| self.guess_right as f64 / self.guess_judged as f64)
    }

    /// What was counted after `earlier`, a snapshot of the same store.
    pub fn since(&self, earlier: &StoreStats) -> StoreStats {
        self.combine(earlier, |now, then| now - then, |now, then| now - then)
    }

    /// Both together.
    pub fn plus(&self, more: &StoreStats) -> StoreStats {
        self.combine(more, |a, b| a + b, |a, b| a + b)
    }

    fn combine(&self, other: &StoreStats, n: impl Fn(u64, u64) -> u64, time: impl Fn(f64, f64) -> f64) -> StoreStats {
        StoreStats {
            lookups: n(self.lookups, other.lookups),
            hits: n(self.hits, other.hits),
            loads: n(self.loads, other.loads),
            rereads: n(self.rereads, other.rereads),
            evictions: n(self.evictions, other.evictions),
            prefetch_issued: n(self.prefetch_issued, other.prefetch_issued),
            prefetch_useful: n(self.prefetch_useful, other.prefetch_useful),
            prefetch_dropped: n(self.prefetch_dropped, other.prefetch_dropped),
            guess_issued: n(self.guess_issued, other.guess_issued),
            guess_useful: n(self.guess_useful, other.guess_useful),
            guess_judged: n(self.guess_judged, other.guess_judged),
            guess_right: n(self.guess_right, other.guess_right),
            bytes_read: n(self.bytes_read, other.bytes_read),
            reads: n(self.reads, other.reads),
            retries: n(self.retries, other.retries),
            failures: n(self.failures, other.failures),
            verified: n(self.verified, other.verified),
            stall_seconds: time(self.stall_seconds, other.stall_seconds),
            io_seconds: time(self.io_seconds, other.io_seconds),
            read_thread_seconds: time(self.read_thread_seconds, other.read_thread_seconds),
            fill_thread_seconds: time(self.fill_thread_seconds, other.fill_thread_seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_defined_where_nothing_happened() {
        let none = StoreStats::default();
        assert_eq!((none.hit_rate(), none.hidden_share()), (1.0, 1.0));
        let some = StoreStats { lookups: 4, hits: 1, io_seconds: 2.0, stall_seconds: 0.5, bytes_read: 10, ..none };
        assert_eq!((some.misses(), some.hit_rate(), some.hidden_share()), (3, 0.25, 0.75));
        assert_eq!(none.guess_right_share(), None);
        let guessed = |guess_judged, guess_right| StoreStats { guess_judged, guess_right, ..none };
        assert_eq!(guessed(4, 3).guess_right_share(), Some(0.75));
        assert_eq!(guessed(4, 3).plus(&guessed(4, 0)).since(&guessed(0, 1)).guess_right_share(), Some(0.25));
        assert_eq!((some.since(&some), some.since(&none), none.plus(&some)), (none, some, some));
    }
}
