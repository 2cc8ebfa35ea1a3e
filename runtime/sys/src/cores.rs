//! Cores, and who of the threads goes first.

use std::thread;

use crate::os;

/// Processors that this process may run on, as affinity and cgroup limits leave them; at least 1.
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get())
}

/// Physical cores among them: two threads of one core share its arithmetic units and its bandwidth.
pub fn physical_cores() -> usize {
    let threads = available_threads();
    os::physical_cores().map_or(threads, |cores| cores.clamp(1, threads))
}

/// Asks that the calling thread, which does little at a time, runs at once when it has something to do. An I/O thread runs for
/// microseconds, and the drive idles while it waits behind a computing thread. A hint: where the system does not know this, nothing happens.
pub fn prefer_this_thread() {
    os::prefer_this_thread();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_more_cores_than_threads() {
        assert!((1..=available_threads()).contains(&physical_cores()));
        prefer_this_thread();
    }
}
