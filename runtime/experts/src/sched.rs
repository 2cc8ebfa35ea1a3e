//! Asks the scheduler to run I/O threads at once when they have something to do.

#![allow(unsafe_code)]

/// Asks for a short time slice for the calling thread: from Linux 6.12 on, a thread with a shorter slice that wakes up takes
/// the processor from one with a longer slice. I/O threads run for microseconds at a time, and the drive idles while they
/// wait behind a computing thread. Where the system does not know this, nothing happens.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn prefer_this_thread() {
    /// The shortest slice there is, in nanoseconds.
    const SLICE: u64 = 100_000;
    let size = size_of::<libc::sched_attr>() as u32;
    let mut attr = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: `attr` has the size that is stated, is written by the first call and read by the second; thread 0 is the
    // caller. What else is set (a nice value) is handed back as it was read, and a refusal leaves everything as it is.
    unsafe {
        let known = libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) == 0;
        if known && attr.sched_policy == libc::SCHED_OTHER as u32 {
            attr.sched_runtime = SLICE;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0);
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn prefer_this_thread() {}
