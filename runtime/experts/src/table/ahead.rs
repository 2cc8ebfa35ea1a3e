//! Experts that are read before they are asked for: chosen, guessed, or most used.

use super::{Intent, Place, Table};
use crate::eviction::Eviction;
use crate::list::NONE;
use crate::place::Certainty;

/// Slots that stay free when a cache is warmed: three waves of a prompt.
const KEPT_FREE: usize = 24;

impl<E: Eviction> Table<E> {
    /// Begins reading the experts that are missing, as far as slots can be had without taking what is in use, promised, or
    /// (for guesses) anything beyond the guesses' share. Returns how many pieces were queued.
    pub(crate) fn prefetch(&mut self, keys: impl Iterator<Item = u32> + Clone, certainty: Certainty) -> usize {
        let mut queued = 0;
        match certainty {
            // What is here first, so that it does not give way to what is missing.
            Certainty::Chosen => {
                for key in keys.clone() {
                    let at = self.slot_of[key as usize];
                    if at != NONE {
                        queued += self.promise_cached(at);
                    }
                }
            }
            Certainty::Guess => self.drop_stale_guesses(),
        }
        queued + keys.map(|key| self.prefetch_missing(key, certainty)).sum::<usize>()
    }

    /// Gives up the guesses of which nothing was read yet: whoever guesses anew knows better.
    fn drop_stale_guesses(&mut self) {
        for _ in 0..self.queue.n_guesses() {
            let Some(job) = self.queue.pop_guess() else { break };
            let slot = &mut self.slots[job.slot as usize];
            if !slot.load.wants(&job) {
                continue;
            }
            if slot.intent == Intent::Guess && slot.load.is_untouched(self.pieces.of(slot.key)) {
                // Makes its other pieces in the queue void, too.
                slot.load.todo = 0;
                self.slot_of[slot.key as usize] = NONE;
                self.clear(job.slot);
            } else {
                self.queue.push_guess(job);
            }
        }
    }

    fn prefetch_missing(&mut self, key: u32, certainty: Certainty) -> usize {
        if self.slot_of[key as usize] != NONE {
            return 0;
        }
        let slot = match certainty {
            Certainty::Chosen => self.vacate_for_prefetch(),
            Certainty::Guess => self.vacate_for_guess(),
        };
        let Some(slot) = slot else {
            self.stats.prefetch_dropped += 1;
            return 0;
        };
        match certainty {
            Certainty::Chosen => {
                self.stats.prefetch_issued += 1;
                self.begin(slot, key, Intent::Promise, true)
            }
            Certainty::Guess => {
                self.stats.guess_issued += 1;
                self.begin(slot, key, Intent::Guess, false)
            }
        }
    }

    /// A router has chosen an expert that is here or coming: keep it for the request that follows.
    fn promise_cached(&mut self, at: u32) -> usize {
        let slot = &mut self.slots[at as usize];
        match (slot.place, slot.intent) {
            (Place::Ordered, _) => {
                let key = slot.key;
                self.policy.hold(at, key);
                self.promise(at);
                0
            }
            (Place::Guessed, _) => {
                self.guessed.remove(at);
                self.confirm_guess(at);
                self.promise(at);
                0
            }
            (Place::Loading, Intent::Guess) => {
                self.confirm_guess(at);
                self.slots[at as usize].intent = Intent::Promise;
                self.hurry(at)
            }
            (Place::Loading, _) => self.hurry(at),
            _ => 0,
        }
    }

    /// Begins to read experts that nobody has asked for yet: of `keys`, the most wanted first, as many as there are free slots for
    /// beside those that prompts go through. They are read as they lie in the file, after everything that somebody asks for.
    /// Returns how many pieces were queued.
    pub(crate) fn warm(&mut self, keys: impl Iterator<Item = u32>) -> usize {
        let room = self.free.len().saturating_sub(KEPT_FREE.min(self.slots.len() / 4));
        let mut keys: Vec<u32> = keys.filter(|&key| !self.is_cached(key)).take(room).collect();
        keys.sort_unstable();
        keys.dedup();
        let mut queued = 0;
        for key in keys {
            let Some(at) = self.free.pop() else { break };
            queued += self.begin(at, key, Intent::Used, false);
            // Whoever finds it here has not had it read.
            self.slots[at as usize].used = true;
        }
        queued
    }
}
