//! Intrusive doubly linked lists over slot numbers: every operation is O(1) and none allocates.
//!
//! A slot may be in any number of lists but at most once in each; what a list means is its owner's business.

/// "No slot".
pub(crate) const NONE: u32 = u32::MAX;

/// A list of slot numbers below a fixed bound, from the front (next to leave) to the back (last to leave).
#[derive(Debug, Clone)]
pub(crate) struct SlotList {
    /// Per slot: (previous, next); a slot that is not in the list points at itself.
    links: Vec<(u32, u32)>,
    front: u32,
    back: u32,
    len: usize,
}

impl SlotList {
    /// An empty list for the slots `0..n_slots`.
    pub(crate) fn new(n_slots: usize) -> Self {
        let links = (0..n_slots as u32).map(|slot| (slot, slot)).collect();
        Self { links, front: NONE, back: NONE, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn front(&self) -> Option<u32> {
        (self.front != NONE).then_some(self.front)
    }

    #[cfg(test)]
    pub(crate) fn contains(&self, slot: u32) -> bool {
        // A linked slot never points at itself: its neighbours are other slots or NONE.
        self.links[slot as usize].0 != slot
    }

    pub(crate) fn push_back(&mut self, slot: u32) {
        self.links[slot as usize] = (self.back, NONE);
        match self.back {
            NONE => self.front = slot,
            back => self.links[back as usize].1 = slot,
        }
        self.back = slot;
        self.len += 1;
    }

    pub(crate) fn push_front(&mut self, slot: u32) {
        self.links[slot as usize] = (NONE, self.front);
        match self.front {
            NONE => self.back = slot,
            front => self.links[front as usize].0 = slot,
        }
        self.front = slot;
        self.len += 1;
    }

    /// Takes `slot` out; does nothing where it is not in the list.
    pub(crate) fn remove(&mut self, slot: u32) -> bool {
        let (prev, next) = self.links[slot as usize];
        if prev == slot {
            return false;
        }
        match prev {
            NONE => self.front = next,
            prev => self.links[prev as usize].1 = next,
        }
        match next {
            NONE => self.back = prev,
            next => self.links[next as usize].0 = prev,
        }
        self.links[slot as usize] = (slot, slot);
        self.len -= 1;
        true
    }

    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let slot = self.front()?;
        self.remove(slot);
        Some(slot)
    }

    /// From the front to the back.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let mut at = self.front;
        std::iter::from_fn(move || {
            let slot = (at != NONE).then_some(at)?;
            at = self.links[slot as usize].1;
            Some(slot)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn behaves_like_a_deque(ops in prop::collection::vec((0u8..4, 0u32..6), 0..60)) {
            let (mut list, mut model) = (SlotList::new(6), VecDeque::new());
            for (op, slot) in ops {
                match op {
                    0 if !model.contains(&slot) => { list.push_back(slot); model.push_back(slot); }
                    1 if !model.contains(&slot) => { list.push_front(slot); model.push_front(slot); }
                    2 => prop_assert_eq!(list.pop_front(), model.pop_front()),
                    3 => {
                        prop_assert_eq!(list.remove(slot), model.contains(&slot));
                        model.retain(|&s| s != slot);
                    }
                    _ => {}
                }
                prop_assert_eq!(list.len(), model.len());
                prop_assert_eq!(list.front(), model.front().copied());
                prop_assert!(list.iter().eq(model.iter().copied()));
                for s in 0..6 { prop_assert_eq!(list.contains(s), model.contains(&s)); }
            }
        }
    }
}
