//! Whether guessing pays, asked twice: were guesses right, and were tokens faster for them.
//!
//! A right guess reads an expert while the layer before it computes; a wrong one keeps the drive busy for nothing. So every
//! guess is judged when the router has spoken, layer by layer, and only where most were right lately are guesses read ahead.
//! But a right guess, too, takes a slot from another expert, the drive from a certain read, and a core from computing, and
//! saves only the wait that there would have been ([`GuessGate`] cannot know). So [`Payoff`] does without guesses in turn, and goes on
//! the way that was the faster one.

use std::time::{Duration, Instant};

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

/// Layers of tokens that are timed together, each way in turn.
const EPOCH: u32 = 256;
/// Epochs of each way before it is decided; the middle one counts, so that a pause of the machine does not.
const ROUNDS: usize = 3;
/// Epochs that the decision lasts.
const LASTS: u32 = 48;
/// What guesses have to save to be followed, as a share of a token's time: less is noise.
const SAVES: f64 = 0.01;

/// Finds out which way tokens are faster: by following guesses, or without.
#[derive(Debug)]
pub(crate) struct Payoff {
    following: bool,
    /// The layer that was begun last, and when.
    begun: Option<(usize, Instant)>,
    /// Layers and time of the epoch that runs.
    layers: u32,
    time: Duration,
    /// Time of each epoch of the trial that runs, without guesses and with.
    trial: [Vec<Duration>; 2],
    /// Epochs until the next trial; 0 while one runs.
    rest: u32,
}

impl Payoff {
    /// Begins with a trial, and that with guesses.
    pub(crate) fn new() -> Self {
        let epochs = || Vec::with_capacity(ROUNDS);
        let trial = [epochs(), epochs()];
        Self { following: true, begun: None, layers: 0, time: Duration::ZERO, trial, rest: 0 }
    }

    /// Whether guesses are followed now.
    pub(crate) fn is_following(&self) -> bool {
        self.following
    }

    /// A token's router has chosen in `layer`: the time since the layer before is what that took. What lies between two
    /// tokens is nobody's.
    pub(crate) fn begin_layer(&mut self, layer: usize, now: Instant) {
        if let Some((before, since)) = self.begun.replace((layer, now))
            && before + 1 == layer
        {
            self.time += now - since;
            self.layers += 1;
            if self.layers == EPOCH {
                self.layers = 0;
                let took = std::mem::take(&mut self.time);
                self.end_epoch(took);
            }
        }
    }

    fn end_epoch(&mut self, took: Duration) {
        if self.rest > 0 {
            self.rest -= 1;
            return;
        }
        self.trial[usize::from(self.following)].push(took);
        self.following = !self.following;
        if self.trial.iter().any(|epochs| epochs.len() < ROUNDS) {
            return;
        }
        let [without, with] = self.trial.each_mut().map(|epochs| {
            epochs.sort_unstable();
            let middle = epochs[ROUNDS / 2].as_secs_f64();
            epochs.clear();
            middle
        });
        self.following = with < without * (1.0 - SAVES);
        self.rest = LASTS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `n` epochs pass, layers taking what `takes` says of whether guesses are followed; returns in which they were.
    fn pass(payoff: &mut Payoff, now: &mut Instant, n: usize, takes: impl Fn(bool) -> u64) -> Vec<bool> {
        let epoch = |payoff: &mut Payoff, now: &mut Instant| {
            let following = payoff.is_following();
            for layer in 0..EPOCH as usize {
                *now += Duration::from_micros(takes(following));
                // Tokens of 17 layers: between two of them nothing is timed.
                let pause = Duration::from_secs(u64::from(layer % 16 == 0));
                if layer % 16 == 0 {
                    *now += pause;
                    payoff.begin_layer(0, *now);
                    *now += Duration::from_micros(takes(following));
                }
                payoff.begin_layer(layer % 16 + 1, *now);
            }
            following
        };
        (0..n).map(|_| epoch(payoff, now)).collect()
    }

    #[test]
    fn the_faster_way_is_gone_and_tried_again() {
        for (with, pays) in [(80, true), (99, false), (100, false), (120, false)] {
            let (mut payoff, mut now) = (Payoff::new(), Instant::now());
            let takes = |following| if following { with } else { 101 };
            let trial = pass(&mut payoff, &mut now, 2 * ROUNDS, takes);
            assert_eq!(trial, [true, false].repeat(ROUNDS));
            let pays = pays || with == 99;
            assert!(
                pass(&mut payoff, &mut now, LASTS as usize, takes).iter().all(|&followed| followed == pays),
                "{with}"
            );
            // The disk has changed meanwhile.
            let takes = |following| if following == pays { 150 } else { 100 };
            pass(&mut payoff, &mut now, 2 * ROUNDS, takes);
            assert_eq!(payoff.is_following(), !pays);
        }
    }

    #[test]
    fn one_pause_decides_nothing() {
        let (mut payoff, mut now) = (Payoff::new(), Instant::now());
        pass(&mut payoff, &mut now, 1, |_| 100_000);
        pass(&mut payoff, &mut now, 2 * ROUNDS - 1, |following| if following { 80 } else { 100 });
        assert!(payoff.is_following());
    }

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
