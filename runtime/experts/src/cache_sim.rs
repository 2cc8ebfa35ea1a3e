//! Replays a routing trace against caches of several sizes and policies: how often an expert would have been there, and how
//! much would have been read.
//!
//! The online policies run through the store's own table, and a batch of tokens in the store's own waves, so a figure here is
//! what the store does with that routing where it does not guess: what a guess evicts depends on time. Belady's bound knows
//! the future: no cache that loads only on demand can hit more often.

use crate::eviction::Policy;
use crate::inflight::{FilePieces, Pieces};
use crate::options::MAX_LEASE;
use crate::place::{Certainty, Use};
use crate::table::Table;
use crate::trace::{RoutingTrace, TraceRow};
use crate::waves::{cached_first, wave_len};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

/// The name under which reports list the offline bound.
pub const BELADY: &str = "belady";

/// What was asked of a cache, and what it had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tokens run.
    pub tokens: u64,
    /// Experts asked for: each that a token chose, or each that a batch touched in a layer, once.
    pub lookups: u64,
    /// Of those, experts that were there.
    pub hits: u64,
}

impl Tally {
    /// Experts that had to be read.
    pub fn misses(&self) -> u64 {
        self.lookups - self.hits
    }

    /// Hits per lookup, from 0 to 1; 1 where nothing was looked up.
    pub fn hit_rate(&self) -> f64 {
        if self.lookups == 0 { 1.0 } else { self.hits as f64 / self.lookups as f64 }
    }

    /// Experts read per token.
    pub fn misses_per_token(&self) -> f64 {
        self.misses() as f64 / self.tokens.max(1) as f64
    }
}

/// What one cache would have done with a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimRow {
    /// The policy's name, or [`BELADY`].
    pub policy: &'static str,
    /// Experts that the cache holds.
    pub n_slots: usize,
    /// Tokens that were read.
    pub prompt: Tally,
    /// Tokens that were made, alone or with those of other conversations.
    pub generated: Tally,
}

/// A trace with its experts numbered densely, ready to be replayed.
#[derive(Debug)]
pub struct Replay {
    /// Experts of all steps, one after the other.
    keys: Vec<u32>,
    steps: Vec<Step>,
    n_keys: usize,
    /// Per expert: its layer.
    layer_of: Vec<u32>,
    widest_row: usize,
    n_experts_in_all: usize,
    /// Tokens alone; lookups and hits are counted by each replay.
    prompt: Tally,
    generated: Tally,
}

/// Experts that are asked for together: one token's in one layer, or, each once, those of all tokens of a batch.
#[derive(Debug)]
struct Step {
    /// Where they are in `keys`.
    range: Range<usize>,
    how: Use,
}

impl Replay {
    /// Prepares a trace.
    pub fn new(trace: &RoutingTrace) -> Self {
        let rows: Vec<TraceRow<'_>> = trace.rows().collect();
        // Lines of one layer and kind that follow each other are a batch; those that state no kind are a prompt's if there are several. A
        // model of one layer leaves no such mark: there every line counts for itself.
        let one_layer = rows.iter().all(|row| row.layer == rows[0].layer);
        let mut numbers = HashMap::new();
        let (mut keys, mut layer_of) = (Vec::new(), Vec::new());
        let (mut steps, mut ids) = (Vec::new(), Vec::<u32>::new());
        let mut tokens = [HashSet::new(), HashSet::new()];
        for together in rows.chunk_by(|a, b| (a.layer, a.how) == (b.layer, b.how) && !one_layer) {
            let how = together[0].how.unwrap_or(if together.len() > 1 { Use::Sweep } else { Use::Keep });
            ids.clear();
            ids.extend(together.iter().flat_map(|row| row.ids));
            if together.len() > 1 {
                // The model takes a batch's experts in ascending order.
                ids.sort_unstable();
                ids.dedup();
            }
            let start = keys.len();
            for &id in &ids {
                let (layer, next) = (together[0].layer, numbers.len() as u32);
                keys.push(*numbers.entry((layer, id)).or_insert_with(|| {
                    layer_of.push(layer);
                    next
                }));
            }
            steps.push(Step { range: start..keys.len(), how });
            tokens[usize::from(how == Use::Sweep)].extend(together.iter().map(|row| row.token));
        }
        // Layers by their order: a trace may name any numbers.
        let mut layers = layer_of.clone();
        layers.sort_unstable();
        layers.dedup();
        for layer in &mut layer_of {
            *layer = layers.partition_point(|other| other < layer) as u32;
        }
        let [generated, prompt] =
            tokens.map(|tokens: HashSet<u64>| Tally { tokens: tokens.len() as u64, ..Tally::default() });
        let stated = trace.header().map_or(0, |h| u64::from(h.n_layers) * u64::from(h.n_experts));
        Self {
            n_keys: numbers.len(),
            layer_of,
            n_experts_in_all: usize::try_from(stated).unwrap_or(0).max(numbers.len()),
            keys,
            steps,
            widest_row: rows.iter().map(|row| row.ids.len()).max().unwrap_or(0),
            prompt,
            generated,
        }
    }

    /// Experts that the model has, or that the trace names where it does not say.
    pub fn n_experts_in_all(&self) -> usize {
        self.n_experts_in_all
    }

    /// The smallest cache that can be replayed: twice the experts of the widest line, as the store demands.
    pub fn min_slots(&self) -> usize {
        (2 * self.widest_row).min(self.n_keys).max(1)
    }

    /// Ten sizes from a tenth of the experts to all of them, as far as they can be replayed.
    pub fn default_slots(&self) -> Vec<usize> {
        let mut slots: Vec<_> =
            (1..=10).map(|tenth| (self.n_experts_in_all * tenth / 10).max(self.min_slots())).collect();
        slots.dedup();
        slots
    }

    /// Every policy and Belady's bound with one size.
    pub fn all_policies(&self, n_slots: usize) -> Vec<SimRow> {
        let online = Policy::ALL.map(|policy| self.simulate(policy, n_slots));
        online.into_iter().chain([self.belady(n_slots)]).collect()
    }

    /// One online policy with one size; below [`Replay::min_slots`] counts as that.
    pub fn simulate(&self, policy: Policy, n_slots: usize) -> SimRow {
        let usable = self.usable(n_slots);
        let order = policy.build(usable, self.layer_of.clone());
        let pieces = Pieces::of_record(&[0..1, 1..2, 2..3], 3, true);
        let pieces = FilePieces::new(vec![pieces], self.n_keys);
        let mut table = Table::new(usable, self.n_keys, order, 0, pieces, Vec::new());
        let mut held = Vec::new();
        let mut request = |table: &mut Table, keys: &[u32], how: Use, next: &[u32]| {
            // Nothing else holds a slot, and a line's experts (or two waves) fit, so this cannot be refused.
            if table.acquire(keys, how, &mut held).is_ok() {
                table.prefetch(next.iter().copied(), Certainty::Chosen);
                while let Some(job) = table.next_job() {
                    table.finish(&job, 0);
                }
            }
            table.release_all(&mut held);
        };
        let capacity = if usable < self.n_keys { usable / 2 } else { usable }.min(MAX_LEASE);
        self.tally(policy.name(), n_slots, |keys, how| {
            let before = table.stats.hits;
            if how == Use::Sweep || keys.len() > capacity {
                // As `ExpertStore::waves` does it.
                let cached: Vec<bool> = keys.iter().map(|&key| table.is_cached(key)).collect();
                let (keys, n_cached) = cached_first(keys, &cached);
                let len = wave_len(usable);
                table.prefetch(keys[..n_cached].iter().copied(), Certainty::Chosen);
                table.prefetch(keys.iter().take(len).copied(), Certainty::Chosen);
                for (n, wave) in keys.chunks(len).enumerate() {
                    request(&mut table, wave, how, keys.chunks(len).nth(n + 1).unwrap_or_default());
                }
            } else {
                table.prefetch(keys.iter().copied(), Certainty::Chosen);
                request(&mut table, keys, Use::Keep, &[]);
            }
            table.stats.hits - before
        })
    }

    /// The bound: the expert that is not needed for the longest time goes first. A batch may take its experts in any order,
    /// so of those nothing has to stay.
    pub fn belady(&self, n_slots: usize) -> SimRow {
        let usable = self.usable(n_slots);
        // Per lookup: the step in which its expert is needed again.
        let mut next_step = vec![usize::MAX; self.keys.len()];
        let mut later = vec![usize::MAX; self.n_keys];
        for (n, step) in self.steps.iter().enumerate().rev() {
            for i in step.range.clone() {
                next_step[i] = std::mem::replace(&mut later[self.keys[i] as usize], n);
            }
        }
        // The cached experts by when they are needed next, and that time per expert.
        let mut by_need = BTreeSet::new();
        let mut need = vec![None; self.n_keys];
        let shrink = |by_need: &mut BTreeSet<(usize, u32)>, need: &mut [Option<usize>], len: usize| {
            while by_need.len() > len
                && let Some((_, victim)) = by_need.pop_last()
            {
                need[victim as usize] = None;
            }
        };
        let mut seen = 0;
        self.tally(BELADY, n_slots, |keys, how| {
            let range = seen..seen + keys.len();
            seen = range.end;
            let mut hits = 0;
            for &key in keys {
                // Taken out while in use, so that it is no victim of its own step.
                if let Some(at) = need[key as usize].take() {
                    hits += u64::from(by_need.remove(&(at, key)));
                }
            }
            // What is more than there is room for comes in waves, in any order.
            if how == Use::Keep && keys.len() <= usable {
                shrink(&mut by_need, &mut need, usable.saturating_sub(keys.len()));
            }
            for (&key, &next) in keys.iter().zip(&next_step[range]) {
                need[key as usize] = Some(next);
                by_need.insert((next, key));
            }
            shrink(&mut by_need, &mut need, usable);
            hits
        })
    }

    /// Slots that make a difference: more than there are experts are not needed, and a caller's number must not decide how
    /// much is allocated.
    fn usable(&self, n_slots: usize) -> usize {
        n_slots.max(self.min_slots()).min(self.n_keys)
    }

    /// Walks through the trace; `hits` says for a step's experts, and how they are used, how many are there.
    fn tally(&self, policy: &'static str, n_slots: usize, mut hits: impl FnMut(&[u32], Use) -> u64) -> SimRow {
        let mut row = SimRow { policy, n_slots, prompt: self.prompt, generated: self.generated };
        for step in &self.steps {
            let tally = if step.how == Use::Sweep { &mut row.prompt } else { &mut row.generated };
            tally.lookups += step.range.len() as u64;
            tally.hits += hits(&self.keys[step.range.clone()], step.how);
        }
        row
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

    /// Batches, each in its only layer: token after token.
    fn batches(batches: &[Vec<Vec<u32>>]) -> Replay {
        let (mut text, mut token) = (String::new(), 0);
        for (n, batch) in batches.iter().enumerate() {
            for ids in batch {
                let ids = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
                text.push_str(&format!("{token} 0 {ids}\n"));
                token += 1;
            }
            // Ends the batch: a layer with one expert, which is always there after its first use.
            text.push_str(&format!("{} 1 0\n", 1000 + n));
        }
        Replay::new(&RoutingTrace::read(text.as_bytes()).unwrap())
    }

    #[test]
    fn a_cycle_larger_than_the_cache_defeats_lru_and_not_belady() {
        let rows: Vec<_> = (0..40).map(|token| (0, vec![token % 5])).collect();
        let replay = replay(&rows);
        let (lru, bound) = (replay.simulate(Policy::Lru, 4).generated, replay.belady(4).generated);
        assert_eq!(lru, Tally { tokens: 40, lookups: 40, hits: 0 });
        assert_eq!((lru.misses_per_token(), replay.n_experts_in_all()), (1.0, 32));
        // Of every five lookups one must miss; with hindsight a miss costs only one of the four others per round.
        assert!(bound.hits > 24, "{}", bound.hits);
        assert_eq!(replay.simulate(Policy::Lru, 5).generated.hits, 35);
    }

    #[test]
    fn a_row_never_evicts_its_own_experts() {
        let rows = vec![(0, vec![0, 1]), (0, vec![2, 3]), (0, vec![3, 0]), (0, vec![0, 2])];
        let replay = replay(&rows);
        assert_eq!(replay.min_slots(), 4);
        for n_slots in [1, 4, 100] {
            for row in replay.all_policies(n_slots) {
                assert_eq!((row.generated.hits, row.prompt), (4, Tally::default()), "{row:?}");
            }
        }
    }

    #[test]
    fn a_batch_asks_for_each_expert_once() {
        // Six experts of ten choices, then two of them and a new one.
        let first = vec![vec![5, 4], vec![0, 1], vec![4, 5], vec![2, 3], vec![0, 3]];
        let replay = batches(&[first, vec![vec![0, 5], vec![6, 5]]]);
        for row in replay.all_policies(100) {
            assert_eq!(row.prompt, Tally { tokens: 7, lookups: 9, hits: 2 }, "{row:?}");
            assert_eq!(row.generated, Tally { tokens: 2, lookups: 2, hits: 1 }, "{row:?}");
        }
        // A batch of more experts than slots is no reason to fail.
        for row in replay.all_policies(4) {
            assert_eq!(row.prompt.lookups, 9);
        }
    }

    /// The best that any demand-loading cache can do, by trying everything; with each row whether it is a batch's, of which
    /// nothing has to stay.
    fn best(rows: &[(Vec<u32>, bool)], n_slots: usize) -> u64 {
        // Every possible content of the cache, as a bit set, with the most hits on a way there.
        let mut caches = HashMap::from([(0u32, 0)]);
        for (row, batch) in rows {
            let asked = row.iter().fold(0, |set, key| set | 1 << key);
            let mut next = HashMap::new();
            for (cache, hits) in caches {
                let (hits, union) = (hits + u64::from((cache & asked).count_ones()), cache | asked);
                let len = union.count_ones().min(n_slots as u32);
                let possible =
                    |kept: &u32| kept & !union == 0 && kept.count_ones() == len && (*batch || kept & asked == asked);
                for kept in (0..=union).filter(possible) {
                    let most = next.entry(kept).or_insert(0);
                    *most = hits.max(*most);
                }
            }
            caches = next;
        }
        caches.into_values().max().unwrap_or(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn belady_is_the_optimum_and_bounds_every_policy(keys in prop::collection::vec((0u32..6, 0u32..5), 1..9)) {
            let rows: Vec<Vec<u32>> = keys.iter().map(|&(a, step)| vec![a, (a + 1 + step) % 6]).collect();
            let replay = replay(&rows.iter().map(|ids| (0, ids.clone())).collect::<Vec<_>>());
            let rows: Vec<_> = rows.into_iter().map(|ids| (ids, false)).collect();
            for n_slots in replay.min_slots()..=6 {
                let bound = replay.belady(n_slots).generated.hits;
                prop_assert_eq!(bound, best(&rows, n_slots.min(replay.n_keys)));
                for policy in Policy::ALL {
                    prop_assert!(replay.simulate(policy, n_slots).generated.hits <= bound);
                }
            }
        }

        #[test]
        fn so_it_is_with_batches(touched in prop::collection::vec(prop::collection::btree_set(0u32..7, 2..7), 1..6)) {
            let one_each = |ids: &std::collections::BTreeSet<u32>| ids.iter().map(|&id| vec![id]).collect();
            let replay = batches(&touched.iter().map(one_each).collect::<Vec<_>>());
            // After each batch the expert of the layer that ends it.
            let rows = touched.iter().flat_map(|ids| [(ids.iter().copied().collect(), true), (vec![7], false)]);
            let rows: Vec<_> = rows.collect();
            let hits = |row: SimRow| row.prompt.hits + row.generated.hits;
            for n_slots in replay.min_slots()..=8 {
                let bound = hits(replay.belady(n_slots));
                prop_assert_eq!(bound, best(&rows, n_slots.min(replay.n_keys)));
                for policy in Policy::ALL {
                    prop_assert!(hits(replay.simulate(policy, n_slots)) <= bound);
                }
            }
        }
    }
}
