//! Which slot is given to an expert that has none.

use super::{Intent, PROMISE_LASTS, Place, Table};
use crate::eviction::Eviction;
use crate::list::NONE;

impl<E: Eviction> Table<E> {
    /// A slot for an expert that is needed now: whatever is neither pinned nor loading can be had.
    pub(super) fn vacate_for_request(&mut self) -> Option<u32> {
        self.vacate_for_prefetch().or_else(|| {
            let at = self.promised.pop_front()?;
            Some(self.evict(at))
        })
    }

    /// A slot for a router's choice: not one that is promised to another choice, unless that was abandoned.
    pub(super) fn vacate_for_prefetch(&mut self) -> Option<u32> {
        if let Some(at) = self.free.pop() {
            return Some(at);
        }
        if let Some(at) = self.promised.front()
            && self.slots[at as usize].promised_at + PROMISE_LASTS < self.requests
        {
            self.promised.remove(at);
            return Some(self.evict(at));
        }
        let at = self.policy.evict().or_else(|| self.guessed.pop_front())?;
        Some(self.evict(at))
    }

    /// A slot for a guess: the place of an older guess that nobody came for, or one within the guesses' share.
    pub(super) fn vacate_for_guess(&mut self) -> Option<u32> {
        if let Some(at) = self.guessed.pop_front() {
            return Some(self.evict(at));
        }
        if self.n_guesses >= self.max_guesses {
            return None;
        }
        self.free.pop().or_else(|| {
            let at = self.policy.evict()?;
            Some(self.evict(at))
        })
    }

    /// Forgets the expert in a slot that was just taken out of its list.
    pub(super) fn evict(&mut self, at: u32) -> u32 {
        let slot = &mut self.slots[at as usize];
        self.slot_of[slot.key as usize] = NONE;
        if slot.intent == Intent::Guess {
            slot.intent = Intent::Used;
            self.n_guesses -= 1;
        }
        slot.place = Place::Free;
        self.stats.evictions += 1;
        at
    }
}
