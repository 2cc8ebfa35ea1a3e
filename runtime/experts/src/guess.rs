//! Whether guessing pays: how often an expert that was guessed while it was missing was then really chosen, layer by layer.
//!
//! A right guess reads an expert while the layer before it computes; a wrong one keeps the drive busy for nothing. So every
//! guess is judged when the router has spoken, and only where most were right lately are guesses read ahead at all.

/// The share of right guesses from which on reading ahead wins.
const WORTH: f32 = 2.0 / 3.0;
/// What one verdict counts against all before it; from nothing known, some twenty right ones open the gate.
const WEIGHT: f32 = 1.0 / 16.0;

/// Judges guesses and decides which are followed.
#[derive(Debug)]
pub(crate) struct GuessGate {
    /// Per layer: the share of right guesses, late ones counting more.
    right: Vec<f32>,
    /// The layer that was guessed for last, and the missing experts that were named.
    layer: usize,
    named: Vec<u32>,
}

/// What became of guesses.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verdicts {
    pub(crate) judged: u64,
    pub(crate) right: u64,
}

impl GuessGate {
    pub(crate) fn new(n_layers: usize) -> Self {
        Self { right: vec![0.0; n_layers], layer: 0, named: Vec::new() }
    }

    /// Takes down the missing experts that a guess names for `layer`; returns whether to begin reading them.
    pub(crate) fn guess(&mut self, layer: usize, missing: impl Iterator<Item = u32>) -> bool {
        self.layer = layer;
        self.named.clear();
        self.named.extend(missing);
        self.right[layer] >= WORTH
    }

    /// The router of `layer` has chosen: judges what was guessed for it.
    pub(crate) fn reveal(&mut self, layer: usize, chosen: impl Fn(u32) -> bool) -> Verdicts {
        let mut verdicts = Verdicts::default();
        if layer == self.layer {
            for key in self.named.drain(..) {
                let right = chosen(key);
                let share = &mut self.right[layer];
                *share += WEIGHT * (f32::from(u8::from(right)) - *share);
                verdicts.judged += 1;
                verdicts.right += u64::from(right);
            }
        }
        verdicts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guesses expert 7 for layer 1 `n` times; returns how often that was worth reading.
    fn guess(gate: &mut GuessGate, n: usize, right: bool) -> usize {
        (0..n)
            .filter(|_| {
                let worth = gate.guess(1, [7].into_iter());
                let verdicts = gate.reveal(1, |_| right);
                assert_eq!(verdicts, Verdicts { judged: 1, right: u64::from(right) });
                worth
            })
            .count()
    }

    #[test]
    fn only_what_was_right_lately_is_read() {
        let mut gate = GuessGate::new(2);
        assert_eq!(guess(&mut gate, 100, false), 0);
        assert_eq!(guess(&mut gate, 100, true), 100 - 18);
        // One that is wrong now and then does not close it; half of them wrong do.
        guess(&mut gate, 1, false);
        assert_eq!(guess(&mut gate, 10, true), 10);
        for i in 0..40 {
            guess(&mut gate, 1, i % 2 == 0);
        }
        assert_eq!(guess(&mut gate, 1, true), 0);
    }

    #[test]
    fn layers_are_judged_apart_and_a_guess_once() {
        let mut gate = GuessGate::new(3);
        guess(&mut gate, 100, true);
        assert!(!gate.guess(2, [1].into_iter()));
        assert_eq!(gate.reveal(0, |_| true), Verdicts::default());
        assert_eq!(gate.reveal(2, |_| false), Verdicts { judged: 1, right: 0 });
        assert_eq!(gate.reveal(2, |_| false), Verdicts::default());
        assert!(gate.guess(1, [1].into_iter()));
    }
}
