//! Replays a routing trace against caches of several sizes and policies: how often an expert would have been there, and how
//! much would have been read.
//!
//! The online policies run through the store's own table, so a figure here is what the store does with that routing. Belady's
//! bound knows the future: no cache that loads only on demand can hit more often.

use crate::eviction::Policy;
use crate::inflight::Pieces;
use crate::table::{Table, Use};
use crate::trace::RoutingTrace;
use std::collections::{BTreeSet, HashMap};

/// The name under which reports list the offline bound.
pub const BELADY: &str = "belady";

/// What one cache would have done with a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct SimRow {
    /// The policy's name, or [`BELADY`].
    pub policy: &'static str,
    /// Experts that the cache holds.
    pub n_slots: usize,
    /// Their bytes; 0 where the trace does not say how large an expert is.
    pub cache_bytes: u64,
    /// Experts that were asked for.
    pub lookups: u64,
    /// Of those, experts that were there.
    pub hits: u64,
    /// Tokens in the trace.
    pub tokens: u64,
    /// Bytes of one expert; 0 where the trace does not say.
    pub expert_bytes: u64,
}

impl SimRow {
    /// Hits per lookup, from 0 to 1.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.lookups.max(1) as f64
    }

    /// Experts read per token.
    pub fn misses_per_token(&self) -> f64 {
        (self.lookups - self.hits) as f64 / self.tokens.max(1) as f64
    }

    /// Bytes read per token; 0 where the trace does not say how large an expert is.
    pub fn bytes_per_token(&self) -> f64 {
        self.misses_per_token() * self.expert_bytes as f64
    }
}

/// A trace with its experts numbered densely, ready to be replayed.
#[derive(Debug)]
pub struct Replay {
    /// Experts of all rows, one after the other.
    keys: Vec<u32>,
    /// Where each row ends in `keys`.
    ends: Vec<usize>,
    n_keys: usize,
    widest_row: usize,
    tokens: u64,
    expert_bytes: u64,
    n_experts_in_all: usize,
}

impl Replay {
    /// Prepares a trace.
    pub fn new(trace: &RoutingTrace) -> Self {
        let mut numbers = HashMap::new();
        let (mut keys, mut ends, mut widest_row) = (Vec::new(), Vec::new(), 0);
        for row in trace.rows() {
            for &id in row.ids {
                let next = numbers.len() as u32;
                keys.push(*numbers.entry((row.layer, id)).or_insert(next));
            }
            ends.push(keys.len());
            widest_row = widest_row.max(row.ids.len());
        }
        let header = trace.header();
        let stated = header.map_or(0, |h| u64::from(h.n_layers) * u64::from(h.n_experts));
        Self {
            n_keys: numbers.len(),
            n_experts_in_all: usize::try_from(stated).unwrap_or(0).max(numbers.len()),
            keys,
            ends,
            widest_row,
            tokens: trace.n_tokens(),
            expert_bytes: header.map_or(0, |h| h.expert_bytes),
        }
    }

    /// Experts that the model has, or that the trace names where it does not say.
    pub fn n_experts_in_all(&self) -> usize {
        self.n_experts_in_all
    }

    /// The smallest cache that can be replayed: twice the experts of the widest row, as the store demands.
    pub fn min_slots(&self) -> usize {
        (2 * self.widest_row).min(self.n_keys).max(1)
    }

    /// How many experts a cache of `bytes` holds; `None` where the trace does not say how large they are.
    pub fn slots_for(&self, bytes: u64) -> Option<usize> {
        usize::try_from(bytes.checked_div(self.expert_bytes)?).ok()
    }

    /// Ten sizes from a tenth of the experts to all of them, as far as they can be replayed.
    pub fn default_slots(&self) -> Vec<usize> {
        let mut slots: Vec<_> =
            (1..=10).map(|tenth| (self.n_experts_in_all * tenth / 10).max(self.min_slots())).collect();
        slots.dedup();
        slots
    }

    /// Every policy and Belady's bound for every size; sizes below [`Replay::min_slots`] count as that.
    pub fn sweep(&self, slots: &[usize]) -> Vec<SimRow> {
        let rows = |&n_slots: &usize| {
            let online = Policy::ALL.map(|policy| self.simulate(policy, n_slots));
            online.into_iter().chain([self.belady(n_slots)])
        };
        slots.iter().flat_map(rows).collect()
    }

    /// One online policy with one size.
    pub fn simulate(&self, policy: Policy, n_slots: usize) -> SimRow {
        // More slots than experts are not needed, and a caller's number must not decide how much is allocated.
        let usable = n_slots.max(self.min_slots()).min(self.n_keys);
        let order = policy.build(usable, self.n_keys);
        let pieces = Pieces::of_record(&[0..1, 1..2, 2..3], 3, true);
        let mut table = Table::new(usable, self.n_keys, order, 0, pieces, Vec::new());
        let mut held = Vec::new();
        for keys in self.rows() {
            // Nothing else holds a slot and a row fits twice, so this cannot be refused.
            if table.acquire(keys, Use::Keep, &mut held).is_ok() {
                while let Some(job) = table.next_job() {
                    table.finish(&job, 0);
                }
            }
            table.release_all(&mut held);
        }
        self.row(policy.name(), n_slots, table.stats.hits)
    }

    /// The bound: the expert that is not needed for the longest time goes first.
    pub fn belady(&self, n_slots: usize) -> SimRow {
        let usable = n_slots.max(self.min_slots()).min(self.n_keys);
        // Per lookup: the row in which its expert is needed again.
        let mut next_row = vec![usize::MAX; self.keys.len()];
        let mut later = vec![usize::MAX; self.n_keys];
        for (row, range) in self.row_ranges().enumerate().collect::<Vec<_>>().into_iter().rev() {
            for i in range {
                next_row[i] = std::mem::replace(&mut later[self.keys[i] as usize], row);
            }
        }
        // The cached experts by when they are needed next, and that time per expert.
        let mut by_need = BTreeSet::new();
        let mut need = vec![None; self.n_keys];
        let mut hits = 0;
        for range in self.row_ranges() {
            let keys = &self.keys[range.clone()];
            let mut room = usable - by_need.len();
            let mut missing = 0;
            for &key in keys {
                match need[key as usize].take() {
                    // Taken out while in use, so that it is no victim of its own row.
                    Some(at) => hits += u64::from(by_need.remove(&(at, key))),
                    None => missing += 1,
                }
            }
            while room < missing {
                let Some((_, victim)) = by_need.pop_last() else { break };
                need[victim as usize] = None;
                room += 1;
            }
            for i in range {
                need[self.keys[i] as usize] = Some(next_row[i]);
                by_need.insert((next_row[i], self.keys[i]));
            }
        }
        self.row(BELADY, n_slots, hits)
    }

    fn row_ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| start..end)
    }

    fn rows(&self) -> impl Iterator<Item = &[u32]> {
        self.row_ranges().map(|range| &self.keys[range])
    }

    fn row(&self, policy: &'static str, n_slots: usize, hits: u64) -> SimRow {
        SimRow {
            policy,
            n_slots,
            cache_bytes: (n_slots as u64).saturating_mul(self.expert_bytes),
            lookups: self.keys.len() as u64,
            hits,
            tokens: self.tokens,
            expert_bytes: self.expert_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn replay(rows: &[(u32, Vec<u32>)]) -> Replay {
        let mut text = String::from("# routing n_layers=4 n_experts=8 expert_bytes=1000\n");
        for (token, (layer, ids)) in rows.iter().enumerate() {
            let ids = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            text.push_str(&format!("{token} {layer} {ids}\n"));
        }
        Replay::new(&RoutingTrace::read(text.as_bytes()).unwrap())
    }

    #[test]
    fn a_cycle_larger_than_the_cache_defeats_lru_and_not_belady() {
        let rows: Vec<_> = (0..40).map(|token| (0, vec![token % 5])).collect();
        let replay = replay(&rows);
        let (lru, bound) = (replay.simulate(Policy::Lru, 4), replay.belady(4));
        assert_eq!((lru.hits, lru.lookups, lru.tokens), (0, 40, 40));
        // Of every five lookups one must miss; with hindsight a miss costs only one of the four others per round.
        assert!(bound.hits > 24, "{}", bound.hits);
        assert_eq!(replay.simulate(Policy::Lru, 5).hits, 35);
        assert_eq!((lru.bytes_per_token(), lru.cache_bytes), (1000.0, 4000));
    }

    #[test]
    fn a_row_never_evicts_its_own_experts() {
        let rows = vec![(0, vec![0, 1]), (0, vec![2, 3]), (0, vec![3, 0]), (0, vec![0, 2])];
        let replay = replay(&rows);
        assert_eq!(replay.min_slots(), 4);
        for row in replay.sweep(&[1, 4, 100]) {
            assert_eq!(row.hits, 4, "{row:?}");
        }
    }

    /// The best that any demand-loading cache can do, by trying everything.
    fn best(rows: &[Vec<u32>], n_slots: usize, cached: &[u32]) -> u64 {
        let Some((row, rest)) = rows.split_first() else { return 0 };
        let hits = row.iter().filter(|key| cached.contains(key)).count() as u64;
        let others: Vec<u32> = cached.iter().copied().filter(|key| !row.contains(key)).collect();
        let room = n_slots - row.len();
        let mut most = 0;
        for subset in 0..1u32 << others.len() {
            if subset.count_ones() as usize == room.min(others.len()) {
                let kept = (0..others.len()).filter(|i| subset & 1 << i != 0).map(|i| others[i]);
                let cached: Vec<u32> = row.iter().copied().chain(kept).collect();
                most = most.max(best(rest, n_slots, &cached));
            }
        }
        hits + most
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn belady_is_the_optimum_and_bounds_every_policy(keys in prop::collection::vec((0u32..6, 0u32..5), 1..9)) {
            let rows: Vec<Vec<u32>> = keys.iter().map(|&(a, step)| vec![a, (a + 1 + step) % 6]).collect();
            let replay = replay(&rows.iter().map(|ids| (0, ids.clone())).collect::<Vec<_>>());
            for n_slots in replay.min_slots()..=6 {
                let bound = replay.belady(n_slots).hits;
                prop_assert_eq!(bound, best(&rows, n_slots.min(replay.n_keys), &[]));
                for policy in Policy::ALL {
                    prop_assert!(replay.simulate(policy, n_slots).hits <= bound);
                }
            }
        }
    }
}
