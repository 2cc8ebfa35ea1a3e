//! How many tokens of prompts are read at once while others are answered: so many that nobody waits long for a layer of them to end, by
//! what layers have taken so far. What a row computes does not depend on it.
//!
//! A smaller piece is taken where it makes layers shorter. Where it does not (experts are read from the disk for a few tokens as for
//! many), reading would only take longer, for everybody.

use std::time::Duration;

/// Sizes that are tried.
const SIZES: [usize; 6] = [8, 16, 32, 64, 128, 256];
/// The one to begin with.
const FIRST: usize = 2;
/// A layer of this many seconds is short enough.
const SHORT: f64 = 0.05;
/// The next smaller piece is worth it where its layer takes this share of the time, at most. A half is all that can be had.
const WORTH: f64 = 0.7;
/// Pieces of one size differ by this factor without a reason.
const CHANCE: f64 = 1.2;
/// One piece of so many may be larger than is known to be well.
const TRY: usize = 8;
/// What the latest piece counts for beside those before it.
const LATEST: f64 = 0.3;

/// The size of pieces.
pub(crate) struct Pieces {
    /// As the operator wants it.
    fixed: Option<usize>,
    /// Seconds of a layer of a piece of each size; none where it was not tried.
    seconds: [Option<f64>; SIZES.len()],
    /// Pieces so far.
    tried: usize,
}

impl Pieces {
    /// Pieces of that size, or of one that is found.
    pub(crate) fn new(fixed: Option<usize>) -> Self {
        Self { fixed, seconds: Default::default(), tried: 0 }
    }

    /// Tokens of the next piece.
    pub(crate) fn size(&self) -> usize {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        let mut at = SIZES.len() - 1;
        while at > 0 && self.expected(at) > SHORT && self.expected(at - 1) <= WORTH * self.expected(at) {
            at -= 1;
        }
        // Whether a larger one would do is known by trying it.
        let is_unknown = |at: usize| self.seconds.get(at).is_some_and(Option::is_none);
        if self.tried % TRY == TRY - 1 && !is_unknown(at) && is_unknown(at + 1) {
            at += 1;
        }
        SIZES[at]
    }

    /// A layer of a piece of so many tokens took so long.
    pub(crate) fn took(&mut self, tokens: usize, time: Duration) {
        let Some(at) = SIZES.iter().position(|&size| size == tokens) else { return };
        self.tried += 1;
        let before = self.seconds[at].unwrap_or(time.as_secs_f64());
        let now = before + LATEST * (time.as_secs_f64() - before);
        self.seconds[at] = Some(now);
        // More tokens take longer, and no longer than their number: what was found at other times and is not so is forgotten.
        for (other, seconds) in self.seconds.iter_mut().enumerate() {
            let by_number = now * SIZES[other] as f64 / tokens as f64;
            let may_be = now.min(by_number) / CHANCE..=now.max(by_number) * CHANCE;
            *seconds = seconds.filter(|seconds| may_be.contains(seconds));
        }
    }

    /// Seconds that a layer of a piece of a size takes: as was found; on the line through what was found for others; below all of
    /// those, by the number of tokens.
    fn expected(&self, at: usize) -> f64 {
        let found = |at: usize| self.seconds[at].map(|seconds| (SIZES[at] as f64, seconds));
        let mut below = (0..=at).rev().filter_map(found);
        let mut above = (at..SIZES.len()).filter_map(found);
        let size = SIZES[at] as f64;
        let on_line = |(a, at_a): (f64, f64), (b, at_b): (f64, f64)| at_a + (at_b - at_a) * (size - a) / (b - a);
        match (below.next(), above.next()) {
            (Some((at_size, seconds)), _) if at_size == size => seconds,
            (Some(one), Some(other)) => on_line(one, other),
            (Some((last, seconds)), None) => match below.next() {
                Some(before) => on_line(before, (last, seconds)),
                None => seconds * size / last,
            },
            (None, Some((first, seconds))) => seconds * size / first,
            (None, None) => SHORT * size / SIZES[FIRST] as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size after some steps that take as long as `seconds` says, and the longest of the later ones.
    fn settles(pieces: &mut Pieces, seconds: impl Fn(f64) -> f64) -> (usize, f64) {
        let mut longest: f64 = 0.0;
        for step in 0..60 {
            let size = pieces.size();
            let took = seconds(size as f64);
            pieces.took(size, Duration::from_secs_f64(took));
            longest = if step < 40 { 0.0 } else { longest.max(took) };
        }
        (pieces.size(), longest)
    }

    #[test]
    fn layers_become_short_where_they_can() {
        let mut pieces = Pieces::new(None);
        assert_eq!(pieces.size(), 32);
        // Seconds that any piece takes, and those of a token.
        for (fixed, token) in [(0.01, 0.001), (0.02, 0.001), (0.005, 0.0001), (0.04, 0.008), (0.01, 0.001)] {
            let (size, longest) = settles(&mut pieces, |n| fixed + token * n);
            assert!(longest <= (SHORT / WORTH).max(fixed + token * 8.0), "{fixed} {token}: {size} {longest}");
            assert!(size == 256 || 2.0 * (fixed + token * size as f64) > SHORT, "{fixed} {token}: {size}");
        }
    }

    #[test]
    fn pieces_stay_large_where_their_size_costs_nothing() {
        let mut pieces = Pieces::new(None);
        // The same experts are read for every piece.
        assert_eq!(settles(&mut pieces, |n| 1.0 + 0.001 * n).0, 256);
        // They are in memory from now on.
        assert!(settles(&mut pieces, |n| 0.01 + 0.001 * n).0 <= 32);
        assert_eq!(settles(&mut pieces, |n| 1.0 + 0.001 * n).0, 256);
    }

    #[test]
    fn who_says_a_size_has_it() {
        let mut pieces = Pieces::new(Some(17));
        assert_eq!(settles(&mut pieces, |n| n).0, 17);
    }
}
