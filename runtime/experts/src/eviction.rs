//! Which expert gives up its slot: the policies behind one trait, every operation O(1) (amortized where that is said).
//!
//! A policy orders only slots that may be evicted. A pinned slot is taken out by [`Eviction::hold`] and comes back through
//! [`Eviction::release`]; so a policy can never name a victim that is in use, whatever it computes.

use crate::list::SlotList;

/// How an expert comes back from its use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warmth {
    /// It was chosen by a router for a token: worth keeping.
    Warm,
    /// It was swept through once (a prompt's wave): the first to go.
    Cold,
}

/// The order in which loaded, unpinned slots are given up.
///
/// The caller guarantees that a slot is released only when it is not in the order, and held or evicted only when it is.
pub trait Eviction: Send + std::fmt::Debug {
    /// `slot`, which holds expert `key`, may be evicted from now on.
    fn release(&mut self, slot: u32, key: u32, warmth: Warmth);
    /// `slot` is in use: it must not be a victim until it is released again.
    fn hold(&mut self, slot: u32, key: u32);
    /// Takes the next victim out of the order.
    fn evict(&mut self) -> Option<u32>;
    /// How many slots could be evicted now.
    fn len(&self) -> usize;
    /// True where nothing can be evicted.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Eviction for Box<dyn Eviction> {
    fn release(&mut self, slot: u32, key: u32, warmth: Warmth) {
        (**self).release(slot, key, warmth);
    }

    fn hold(&mut self, slot: u32, key: u32) {
        (**self).hold(slot, key);
    }

    fn evict(&mut self) -> Option<u32> {
        (**self).evict()
    }

    fn len(&self) -> usize {
        (**self).len()
    }
}

/// The policies to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Least recently used goes first.
    Lru,
    /// Least frequently used goes first, counts halved every so often; equals go in order of recency.
    LfuAging,
    /// Least frequent recently used: a privileged part ordered by recency, the rest by frequency. It missed less than the least
    /// recently used on a trained model's routing at every size (`st-tool cache-sim`), and on synthetic routing wherever the
    /// cache holds more than two tokens' choices.
    #[default]
    Lfru,
}

impl Policy {
    /// Every policy, in the order in which reports list them.
    pub const ALL: [Policy; 3] = [Policy::Lru, Policy::LfuAging, Policy::Lfru];

    /// The name that reports print.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Lru => "lru",
            Policy::LfuAging => "lfu-aging",
            Policy::Lfru => "lfru",
        }
    }

    /// An empty order for `n_slots` slots and `n_keys` experts.
    pub fn build(self, n_slots: usize, n_keys: usize) -> Box<dyn Eviction> {
        match self {
            Policy::Lru => Box::new(Lru::new(n_slots)),
            Policy::LfuAging => Box::new(LfuAging::new(n_slots, n_keys)),
            Policy::Lfru => Box::new(Lfru::new(n_slots, n_keys)),
        }
    }
}

/// Least recently used.
#[derive(Debug, Clone)]
pub struct Lru {
    pub(crate) order: SlotList,
}

impl Lru {
    /// An empty order for `n_slots` slots.
    pub fn new(n_slots: usize) -> Self {
        Self { order: SlotList::new(n_slots) }
    }
}

impl Eviction for Lru {
    fn release(&mut self, slot: u32, _key: u32, warmth: Warmth) {
        match warmth {
            Warmth::Warm => self.order.push_back(slot),
            Warmth::Cold => self.order.push_front(slot),
        }
    }

    fn hold(&mut self, slot: u32, _key: u32) {
        self.order.remove(slot);
    }

    fn evict(&mut self) -> Option<u32> {
        self.order.pop_front()
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}

/// Uses are counted up to here; one list of slots per count.
const MAX_COUNT: usize = 63;

/// Least frequently used with aging. Counts belong to experts and outlive their stay in a slot; all of them are halved
/// after as many uses as eight sweeps over the slots make, so that a change of subject is noticed.
#[derive(Debug, Clone)]
pub struct LfuAging {
    /// Per expert: how often it was used, aged, at most [`MAX_COUNT`].
    counts: Vec<u8>,
    /// Per slot: the list that it stands in (the count at its release).
    bucket_of: Vec<u8>,
    /// Slots by count, each ordered by recency.
    buckets: Vec<SlotList>,
    len: usize,
    uses_until_aging: usize,
    aging_period: usize,
}

impl LfuAging {
    /// An empty order for `n_slots` slots and `n_keys` experts.
    pub fn new(n_slots: usize, n_keys: usize) -> Self {
        let aging_period = (8 * n_slots).max(64);
        Self {
            counts: vec![0; n_keys],
            bucket_of: vec![0; n_slots],
            buckets: (0..=MAX_COUNT).map(|_| SlotList::new(n_slots)).collect(),
            len: 0,
            uses_until_aging: aging_period,
            aging_period,
        }
    }

    fn count_use(&mut self, key: u32) {
        let count = &mut self.counts[key as usize];
        *count = (*count + 1).min(MAX_COUNT as u8);
        self.uses_until_aging -= 1;
        if self.uses_until_aging == 0 {
            self.uses_until_aging = self.aging_period;
            // Amortized O(1): n_keys and n_slots steps once in 8 × n_slots uses.
            self.counts.iter_mut().for_each(|count| *count /= 2);
            for count in 1..=MAX_COUNT {
                while let Some(slot) = self.buckets[count].pop_front() {
                    self.bucket_of[slot as usize] = (count / 2) as u8;
                    self.buckets[count / 2].push_back(slot);
                }
            }
        }
    }

    fn push(&mut self, slot: u32, key: u32, warmth: Warmth) {
        let bucket = match warmth {
            Warmth::Warm => self.counts[key as usize],
            Warmth::Cold => 0,
        };
        self.bucket_of[slot as usize] = bucket;
        match warmth {
            Warmth::Warm => self.buckets[bucket as usize].push_back(slot),
            Warmth::Cold => self.buckets[bucket as usize].push_front(slot),
        }
        self.len += 1;
    }

    fn remove(&mut self, slot: u32) -> bool {
        let removed = self.buckets[self.bucket_of[slot as usize] as usize].remove(slot);
        self.len -= usize::from(removed);
        removed
    }
}

impl Eviction for LfuAging {
    fn release(&mut self, slot: u32, key: u32, warmth: Warmth) {
        if warmth == Warmth::Warm {
            self.count_use(key);
        }
        self.push(slot, key, warmth);
    }

    fn hold(&mut self, slot: u32, _key: u32) {
        self.remove(slot);
    }

    fn evict(&mut self) -> Option<u32> {
        let slot = self.buckets.iter_mut().find_map(SlotList::pop_front)?;
        self.len -= 1;
        Some(slot)
    }

    fn len(&self) -> usize {
        self.len
    }
}

/// Least frequent recently used: an expert seen again moves to a privileged part (three quarters of the slots) that is
/// ordered by recency; what falls out of it, and what was seen once, is ordered by frequency and goes first.
#[derive(Debug, Clone)]
pub struct Lfru {
    privileged: SlotList,
    rest: LfuAging,
    /// Per slot: the expert in it, for demotion.
    key_of: Vec<u32>,
    n_privileged: usize,
}

impl Lfru {
    /// An empty order for `n_slots` slots and `n_keys` experts.
    pub fn new(n_slots: usize, n_keys: usize) -> Self {
        Self {
            privileged: SlotList::new(n_slots),
            rest: LfuAging::new(n_slots, n_keys),
            key_of: vec![0; n_slots],
            n_privileged: n_slots * 3 / 4,
        }
    }
}

impl Eviction for Lfru {
    fn release(&mut self, slot: u32, key: u32, warmth: Warmth) {
        self.key_of[slot as usize] = key;
        if warmth == Warmth::Cold {
            return self.rest.push(slot, key, warmth);
        }
        self.rest.count_use(key);
        if self.rest.counts[key as usize] < 2 || self.n_privileged == 0 {
            return self.rest.push(slot, key, warmth);
        }
        self.privileged.push_back(slot);
        if self.privileged.len() > self.n_privileged
            && let Some(demoted) = self.privileged.pop_front()
        {
            self.rest.push(demoted, self.key_of[demoted as usize], Warmth::Warm);
        }
    }

    fn hold(&mut self, slot: u32, _key: u32) {
        if !self.privileged.remove(slot) {
            self.rest.remove(slot);
        }
    }

    fn evict(&mut self) -> Option<u32> {
        self.rest.evict().or_else(|| self.privileged.pop_front())
    }

    fn len(&self) -> usize {
        self.privileged.len() + self.rest.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(policy: &mut dyn Eviction) -> Vec<u32> {
        std::iter::from_fn(|| policy.evict()).collect()
    }

    #[test]
    fn lru_gives_up_the_oldest_and_the_cold_first() {
        let mut lru = Lru::new(4);
        for slot in 0..3 {
            lru.release(slot, slot, Warmth::Warm); // 0 1 2
        }
        lru.release(3, 3, Warmth::Cold); // 3 0 1 2
        lru.hold(0, 0);
        lru.release(0, 0, Warmth::Warm); // 3 1 2 0
        assert_eq!(drain(&mut lru), [3, 1, 2, 0]);
    }

    #[test]
    fn lfu_keeps_the_frequent_and_forgets_with_age() {
        let mut lfu = LfuAging::new(2, 2);
        for _ in 0..10 {
            lfu.release(0, 0, Warmth::Warm);
            lfu.hold(0, 0);
        }
        lfu.release(0, 0, Warmth::Warm);
        lfu.release(1, 1, Warmth::Warm);
        assert_eq!(drain(&mut lfu), [1, 0]);
        // Expert 1 is used alone for long enough, and expert 0's past stops protecting it.
        for _ in 0..400 {
            lfu.release(1, 1, Warmth::Warm);
            lfu.hold(1, 1);
        }
        lfu.release(1, 1, Warmth::Warm);
        lfu.release(0, 0, Warmth::Warm);
        assert_eq!(drain(&mut lfu), [0, 1]);
    }

    #[test]
    fn lfru_protects_what_was_seen_twice() {
        let mut lfru = Lfru::new(4, 8);
        lfru.release(0, 0, Warmth::Warm);
        lfru.hold(0, 0);
        lfru.release(0, 0, Warmth::Warm); // privileged
        lfru.release(1, 1, Warmth::Warm);
        lfru.release(2, 2, Warmth::Warm);
        assert_eq!(drain(&mut lfru), [1, 2, 0]);
    }

    proptest! {
        /// Whatever the sequence, a policy gives back exactly the slots that were released and not held, each once.
        #[test]
        fn policies_neither_lose_nor_invent_slots(ops in prop::collection::vec((0u8..3, 0u32..5, 0u32..9), 0..300)) {
            for policy in Policy::ALL {
                let mut order = policy.build(5, 9);
                let mut inside = [None; 5];
                for &(op, slot, key) in &ops {
                    let at = slot as usize;
                    match (op, inside[at]) {
                        (0 | 2, None) => {
                            inside[at] = Some(key);
                            order.release(slot, key, if op == 0 { Warmth::Warm } else { Warmth::Cold });
                        }
                        (0, Some(key)) => { inside[at] = None; order.hold(slot, key); }
                        (1, _) => match order.evict() {
                            Some(victim) => prop_assert!(inside[victim as usize].take().is_some()),
                            None => prop_assert!(inside.iter().all(Option::is_none)),
                        },
                        _ => {}
                    }
                    prop_assert_eq!(order.len(), inside.iter().flatten().count());
                }
            }
        }
    }
}
