//! Which expert gives up its slot: the policies behind one trait.
//!
//! A policy orders only slots that may be evicted. A pinned slot is taken out by [`Eviction::hold`] and comes back through
//! [`Eviction::release`]; so a policy can never name a victim that is in use, whatever it computes.

use crate::list::{NONE, SlotList};
use crate::place::Use;

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
    /// The layer of the expert `key` is computed next, for tokens that are used as `how` says.
    fn begin(&mut self, _key: u32, _how: Use) {}
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
    fn begin(&mut self, key: u32, how: Use) {
        (**self).begin(key, how);
    }

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
    /// What is expected to be used last goes first. On a trained model's routing and on synthetic routing it reads 3 to 12 % less than
    /// frequency and recency together for one conversation, and half as much for eight in one pass (`st-tool cache-sim`).
    #[default]
    NextUse,
}

impl Policy {
    /// Every policy, in the order in which reports list them.
    pub const ALL: [Policy; 2] = [Policy::Lru, Policy::NextUse];

    /// The name that reports print.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Lru => "lru",
            Policy::NextUse => "next-use",
        }
    }

    /// An empty order for `n_slots` slots; `layer_of` tells each expert's layer.
    pub fn build(self, n_slots: usize, layer_of: Vec<u32>) -> Box<dyn Eviction> {
        match self {
            Policy::Lru => Box::new(Lru::new(n_slots)),
            Policy::NextUse => Box::new(NextUse::new(n_slots, layer_of)),
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

/// Passes over which the two averages of an expert's use forget: which texts use it, and which it was used by just now.
const MEMORIES: [f32; 2] = [32.0, 1.5];
/// What either counts.
const WEIGHTS: [f32; 2] = [0.8, 0.2];
/// After so many passes an expert's past counts no more.
const FORGOTTEN: usize = 512;

/// Latest expected next use. Layers take turns, so an expert cannot be needed before its layer comes again, and that is a whole pass away
/// for the layer which has just been computed; how many passes it then waits follows from how often it was used lately. The
/// least recently used is the wrong victim here as soon as one pass asks for more experts than there are slots: it is the one
/// that is needed next. Several conversations in one pass are soon there.
///
/// A victim is found by looking at all slots that may be given up, which is short beside the read that it makes room for.
#[derive(Debug, Clone)]
pub struct NextUse {
    /// Slots that may be given up, in no order, and per slot where it stands there.
    order: Vec<u32>,
    place_of: Vec<u32>,
    /// Per slot: the expert in it, and whether it was only swept through.
    key_of: Vec<u32>,
    cold: Vec<bool>,
    /// Per expert: its layer.
    layer_of: Vec<u32>,
    /// Per expert: the averages of its use when it was last used, and the pass of that.
    rates: Vec<[f32; 2]>,
    last_use: Vec<u32>,
    /// Per layer: how often tokens have come to it.
    passes: Vec<u32>,
    /// The layer that is computed.
    layer: u32,
    /// What is left of the averages after so many passes.
    decay: Vec<[f32; 2]>,
}

impl NextUse {
    /// An empty order for `n_slots` slots; `layer_of` tells each expert's layer.
    pub fn new(n_slots: usize, layer_of: Vec<u32>) -> Self {
        let n_layers = layer_of.iter().max().map_or(0, |&last| last as usize + 1);
        let keeps = |passes: usize| MEMORIES.map(|memory| (1.0 - 1.0 / memory).powi(passes as i32));
        Self {
            order: Vec::with_capacity(n_slots),
            place_of: vec![NONE; n_slots],
            key_of: vec![0; n_slots],
            cold: vec![false; n_slots],
            rates: vec![[0.0; 2]; layer_of.len()],
            last_use: vec![0; layer_of.len()],
            layer_of,
            passes: vec![0; n_layers],
            layer: 0,
            decay: (0..FORGOTTEN).map(keeps).collect(),
        }
    }

    /// How often the tokens that come to `key`'s layer use it now, each average by itself.
    fn rates(&self, key: usize) -> [f32; 2] {
        let passes = self.passes[self.layer_of[key] as usize].wrapping_sub(self.last_use[key]) as usize;
        let decay = self.decay.get(passes).unwrap_or(&[0.0; 2]);
        std::array::from_fn(|i| self.rates[key][i] * decay[i])
    }

    /// Layers until `slot`'s expert is expected to be used.
    fn distance(&self, slot: u32) -> f32 {
        /// An expert that was only swept through waits longer than any other.
        const LONGEST: f32 = 1e12;
        let key = self.key_of[slot as usize] as usize;
        let n_layers = self.passes.len() as u32;
        let to_its_layer = (self.layer_of[key] + n_layers - self.layer - 1) % n_layers + 1;
        let rate = self.rates(key).iter().zip(WEIGHTS).map(|(rate, weight)| rate * weight).sum::<f32>();
        let passes = if self.cold[slot as usize] { LONGEST } else { 1.0 / rate.max(1e-6) - 1.0 };
        passes * n_layers as f32 + to_its_layer as f32
    }

    fn remove(&mut self, slot: u32) {
        let place = std::mem::replace(&mut self.place_of[slot as usize], NONE);
        self.order.swap_remove(place as usize);
        if let Some(&moved) = self.order.get(place as usize) {
            self.place_of[moved as usize] = place;
        }
    }
}

impl Eviction for NextUse {
    fn begin(&mut self, key: u32, how: Use) {
        self.layer = self.layer_of[key as usize];
        if how == Use::Keep {
            let passes = &mut self.passes[self.layer as usize];
            *passes = passes.wrapping_add(1);
        }
    }

    fn release(&mut self, slot: u32, key: u32, warmth: Warmth) {
        let (at, expert) = (slot as usize, key as usize);
        self.key_of[at] = key;
        self.cold[at] = warmth == Warmth::Cold;
        if warmth == Warmth::Warm {
            let rates = self.rates(expert);
            self.rates[expert] = std::array::from_fn(|i| rates[i] + 1.0 / MEMORIES[i]);
            self.last_use[expert] = self.passes[self.layer_of[expert] as usize];
        }
        self.place_of[at] = self.order.len() as u32;
        self.order.push(slot);
    }

    fn hold(&mut self, slot: u32, _key: u32) {
        self.remove(slot);
    }

    fn evict(&mut self) -> Option<u32> {
        let further = |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0);
        let (_, slot) = self.order.iter().map(|&slot| (self.distance(slot), slot)).max_by(further)?;
        self.remove(slot);
        Some(slot)
    }

    fn len(&self) -> usize {
        self.order.len()
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

    /// One pass over two layers of four experts: those of `uses`, by key, are used, and each has the slot of its number.
    fn pass(order: &mut NextUse, uses: &[u32]) {
        for layer in [0, 1] {
            order.begin(layer * 4, Use::Keep);
            for &key in uses.iter().filter(|&&key| key / 4 == layer) {
                if order.place_of[key as usize] != NONE {
                    order.hold(key, key);
                }
                order.release(key, key, Warmth::Warm);
            }
        }
    }

    fn two_layers() -> NextUse {
        NextUse::new(8, (0..8).map(|key| key / 4).collect())
    }

    #[test]
    fn among_equals_the_layer_that_comes_last_gives_way() {
        let mut order = two_layers();
        (0..9).for_each(|_| pass(&mut order, &[0, 1, 4, 5]));
        // Layer 1 has just been computed: layer 0 is next.
        assert!(drain(&mut order.clone())[..2].iter().all(|&slot| slot >= 4));
        order.begin(0, Use::Keep);
        assert!(drain(&mut order)[..2].iter().all(|&slot| slot < 4));
    }

    #[test]
    fn what_is_used_often_stays_and_what_was_used_long_ago_goes() {
        let mut order = two_layers();
        for n in 0..12 {
            pass(&mut order, if n % 4 == 0 { &[0, 1, 4] } else { &[0, 4] });
        }
        assert_eq!(order.evict(), Some(1));
        // What another text uses takes its place as time goes by.
        (0..40).for_each(|_| pass(&mut order, &[2, 4]));
        assert_eq!(order.evict(), Some(0));
    }

    #[test]
    fn what_was_swept_through_goes_before_all_others() {
        let mut order = two_layers();
        pass(&mut order, &[0, 4]);
        order.release(7, 7, Warmth::Cold);
        (0..600).for_each(|_| pass(&mut order, &[4]));
        assert_eq!(drain(&mut order), [7, 0, 4]);
    }

    proptest! {
        /// Whatever the sequence, a policy gives back exactly the slots that were released and not held, each once.
        #[test]
        fn policies_neither_lose_nor_invent_slots(ops in prop::collection::vec((0u8..3, 0u32..5, 0u32..9), 0..300)) {
            for policy in Policy::ALL {
                let mut order = policy.build(5, (0..9).map(|key| key / 3).collect());
                let mut inside = [None; 5];
                for &(op, slot, key) in &ops {
                    order.begin(key, if op == 0 { Use::Keep } else { Use::Sweep });
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
