//! What the store counts. Every field says what it means, so that figures from different runs can be compared.

/// Counters since the store was made. Take two and [`StoreStats::since`] gives what happened between them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StoreStats {
    /// Experts that `acquire` was asked for.
    pub lookups: u64,
    /// Lookups for which nothing had to be read, because the expert was in the cache from an earlier use (or another lease
    /// was having it read). `lookups - hits` are misses, whether or not a prefetch had them read in time.
    pub hits: u64,
    /// Experts whose read was begun, by whoever asked.
    pub loads: u64,
    /// Loads of an expert that had been in the cache before and was evicted.
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
    /// Bytes that reads have delivered, the rest of covering pages and repeated reads included.
    pub bytes_read: u64,
    /// Reads that were issued (a piece read in two parts counts once).
    pub reads: u64,
    /// Reads that failed, or whose checksum was wrong, and were repeated.
    pub retries: u64,
    /// Loads that failed for good.
    pub failures: u64,
    /// Records whose checksum was verified.
    pub verified: u64,
    /// Wall time in which at least one compute thread was blocked waiting for an expert, in seconds.
    pub stall_seconds: f64,
    /// Wall time in which at least one read was under way, in seconds.
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

    /// The share of I/O time in which computing went on, from 0 to 1; 1 where nothing was read.
    pub fn hidden_share(&self) -> f64 {
        if self.io_seconds <= 0.0 { 1.0 } else { (1.0 - self.stall_seconds / self.io_seconds).clamp(0.0, 1.0) }
    }

    /// Bytes per second while at least one read was under way; 0 where nothing was read.
    pub fn read_throughput(&self) -> f64 {
        if self.io_seconds <= 0.0 { 0.0 } else { self.bytes_read as f64 / self.io_seconds }
    }

    /// What was counted after `earlier`, a snapshot of the same store.
    pub fn since(&self, earlier: &StoreStats) -> StoreStats {
        StoreStats {
            lookups: self.lookups - earlier.lookups,
            hits: self.hits - earlier.hits,
            loads: self.loads - earlier.loads,
            rereads: self.rereads - earlier.rereads,
            evictions: self.evictions - earlier.evictions,
            prefetch_issued: self.prefetch_issued - earlier.prefetch_issued,
            prefetch_useful: self.prefetch_useful - earlier.prefetch_useful,
            prefetch_dropped: self.prefetch_dropped - earlier.prefetch_dropped,
            guess_issued: self.guess_issued - earlier.guess_issued,
            guess_useful: self.guess_useful - earlier.guess_useful,
            guess_judged: self.guess_judged - earlier.guess_judged,
            guess_right: self.guess_right - earlier.guess_right,
            bytes_read: self.bytes_read - earlier.bytes_read,
            reads: self.reads - earlier.reads,
            retries: self.retries - earlier.retries,
            failures: self.failures - earlier.failures,
            verified: self.verified - earlier.verified,
            stall_seconds: self.stall_seconds - earlier.stall_seconds,
            io_seconds: self.io_seconds - earlier.io_seconds,
            read_thread_seconds: self.read_thread_seconds - earlier.read_thread_seconds,
            fill_thread_seconds: self.fill_thread_seconds - earlier.fill_thread_seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_defined_where_nothing_happened() {
        let none = StoreStats::default();
        assert_eq!((none.hit_rate(), none.hidden_share(), none.read_throughput()), (1.0, 1.0, 0.0));
        let some = StoreStats { lookups: 4, hits: 1, io_seconds: 2.0, stall_seconds: 0.5, bytes_read: 10, ..none };
        assert_eq!((some.misses(), some.hit_rate(), some.hidden_share(), some.read_throughput()), (3, 0.25, 0.75, 5.0));
        assert_eq!(some.since(&some), none);
    }
}
