//! How fast this machine reads memory.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// Bytes per second that `threads` threads read from memory with a plain loop: the best of a few passes over memory that
/// no cache holds. With a budget, at most a quarter of it is used.
pub(crate) fn read_bandwidth(threads: usize, budget: Option<u64>) -> f64 {
    const WANTED: u64 = 256 << 20;
    const LEAST: u64 = 1 << 20;
    let bytes = budget.map_or(WANTED, |budget| (budget / 4).min(WANTED)).max(LEAST);
    // Written once, so that each page is real.
    let memory: Vec<u64> = (0..bytes / 8).collect();
    let share = memory.len().div_ceil(threads.max(1));
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        thread::scope(|scope| {
            for part in memory.chunks(share) {
                let read = move || black_box(part.iter().fold(0u64, |sum, &word| sum.wrapping_add(word)));
                // A thread that cannot be had reads nothing at the same time.
                if thread::Builder::new().spawn_scoped(scope, read).is_err() {
                    read();
                }
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    bytes as f64 / best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_bytes_by_seconds() {
        // Between a disk's and that of a cache of many cores.
        let rate = read_bandwidth(2, Some(64 << 20));
        assert!((1e8..1e13).contains(&rate), "{rate}");
    }
}
