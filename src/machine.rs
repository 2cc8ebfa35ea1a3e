//! What this machine has: cores, and the memory this process uses.

use std::collections::HashSet;
use std::fs;
use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// Processors this process may run on, as affinity and cgroup limits leave them.
pub(crate) fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get())
}

/// Physical cores among them: two threads of one core share its arithmetic units and its bandwidth.
pub(crate) fn physical_cores() -> usize {
    let threads = available_threads();
    let cores: HashSet<(String, String)> = (0..1024)
        .map_while(|cpu| {
            let topology = format!("/sys/devices/system/cpu/cpu{cpu}/topology");
            let read = |name: &str| fs::read_to_string(format!("{topology}/{name}")).ok();
            Some((read("physical_package_id")?, read("core_id")?))
        })
        .collect();
    match cores.len() {
        0 => threads,
        cores => cores.min(threads),
    }
}

/// The largest resident memory of this process so far, in bytes, where the system says.
pub(crate) fn peak_resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Lets [`peak_resident`] begin anew, where the system can.
pub(crate) fn reset_peak_resident() {
    // Without it the figure is merely too high.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

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
    fn the_machine_has_cores() {
        assert!((1..=available_threads()).contains(&physical_cores()));
    }

    #[test]
    fn a_bandwidth_is_bytes_by_seconds() {
        // Between a disk's and that of a cache of many cores.
        let rate = read_bandwidth(2, Some(64 << 20));
        assert!((1e8..1e13).contains(&rate), "{rate}");
    }

    /// The other tests of this process take no such amount, and none would be counted as less.
    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_of_resident_memory_counts_what_was_touched() {
        const BYTES: usize = 96 << 20;
        let before = peak_resident().expect("the system says");
        let touched = black_box(vec![1u8; before as usize + BYTES]);
        let peak = peak_resident().expect("the system says");
        assert!(peak >= touched.len() as u64, "{peak} after {before}");
    }
}
