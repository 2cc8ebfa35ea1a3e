//! The memory of this process, as the system counts it.

use crate::os;

/// Resident memory of this process now, in bytes; `None` where the system does not tell.
pub fn resident() -> Option<u64> {
    os::resident()
}

/// The largest resident memory of this process so far, in bytes; `None` where the system does not tell.
pub fn peak_resident() -> Option<u64> {
    os::peak_resident()
}

/// Memory that programs can have now without anything being pushed out, in bytes; `None` where the system does not tell.
pub fn available_memory() -> Option<u64> {
    let here = os::available_memory()?;
    Some(os::memory_limit().map_or(here, |limit| limit.min(here)))
}

/// Lets [`peak_resident`] begin anew, where the system can. Without it the figure is merely too high.
pub fn reset_peak_resident() {
    os::reset_peak_resident();
}

/// The most memory that the container of this process lets it have, in bytes: a cgroup's limit, or a job's. `None` where there is none, or the
/// system does not tell.
pub fn memory_limit() -> Option<u64> {
    os::memory_limit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_memory_shows() {
        let Some(before) = resident() else { return };
        let memory = vec![1u8; 32 << 20];
        let (now, peak) = (resident().unwrap(), peak_resident().unwrap());
        assert!(now >= before + (24 << 20), "{before} -> {now}");
        assert!(peak >= now, "{peak} < {now}");
        assert_eq!(std::hint::black_box(&memory)[5], 1);
        drop(memory);
    }
}
