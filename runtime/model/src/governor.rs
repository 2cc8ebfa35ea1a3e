//! How many drafted tokens are worth a row: what passes cost here and now, and how often drafts of a kind are right.
//!
//! Owns the arithmetic of that and nothing else. Costs are times, so whatever a row costs is in them: products, memory, and under a
//! budget the experts that are read for it and waited for. Drafts are judged whether they were run or not, so that one who is
//! never right is never run; a pass with drafts has to promise more tokens per second than one without.

use std::time::Duration;

/// Rows of a pass that are the business of a governor, at most: more are no longer few.
pub(crate) const MOST_ROWS: usize = 8;
/// What a row beside the first costs as a share of the first, until it is known.
const ROW: f64 = 0.38;
/// What drafts have to gain at least: estimates err.
const GAIN: f64 = 1.03;
/// The share of a new time in a mean.
const NEW: f64 = 0.125;
/// Passes with drafts in a row, at most: what one without costs is learned anew.
const IN_A_ROW: u32 = 64;

/// What passes of few rows cost.
#[derive(Clone, Debug, Default)]
pub struct Governor {
    /// Seconds of a pass of 1, 2, … rows, and how many were seen.
    costs: [(f64, u32); MOST_ROWS],
    in_a_row: u32,
}

impl Governor {
    /// A pass of `rows` rows took `time`; `drafted` of them were drafts.
    pub fn ran(&mut self, rows: usize, drafted: usize, time: Duration) {
        self.in_a_row = if drafted > 0 { self.in_a_row + 1 } else { 0 };
        let Some((cost, seen)) = rows.checked_sub(1).and_then(|i| self.costs.get_mut(i)) else { return };
        *seen = seen.saturating_add(1);
        let new = NEW.max(1.0 / f64::from(*seen));
        *cost += (time.as_secs_f64() - *cost) * new;
    }

    /// Seconds of a pass of `rows` rows; those that were not seen follow from those that were.
    fn cost(&self, rows: usize) -> f64 {
        let known = |rows: usize| self.costs.get(rows - 1).filter(|(_, seen)| *seen > 0).map(|&(cost, _)| cost);
        if let Some(cost) = known(rows) {
            return cost;
        }
        let below = (1..rows).rev().find_map(|n| Some((n, known(n)?)));
        let above = (rows + 1..=MOST_ROWS).find_map(|n| Some((n, known(n)?)));
        let line = |n: usize| 1.0 + ROW * (n - 1) as f64;
        match (below, above) {
            (Some((a, low)), Some((b, high))) => low + (high - low) * (rows - a) as f64 / (b - a) as f64,
            (Some((a, low)), None) => {
                // As steep as it was before, where that is known.
                let first = (1..a).find_map(|n| Some((n, known(n)?)));
                let step = first.map_or(ROW * low / line(a), |(n, first)| (low - first).max(0.0) / (a - n) as f64);
                low + step * (rows - a) as f64
            }
            (None, Some((b, high))) => high * line(rows) / line(b),
            (None, None) => line(rows),
        }
    }

    /// How many drafts are added to a pass of `rows` rows that makes `tokens` tokens, of drafts that give another token with the
    /// chances `chances`, descending, and take `seconds` each to be made.
    pub(crate) fn worth(&self, rows: usize, tokens: f64, chances: &[f64], seconds: f64) -> usize {
        if rows == 0 || rows >= MOST_ROWS || self.in_a_row >= IN_A_ROW {
            return 0;
        }
        let rate = |tokens: f64, drafts: usize| tokens / (self.cost(rows + drafts) + seconds * drafts as f64);
        let (mut best, mut drafts, mut tokens) = (rate(tokens, 0) * GAIN, 0, tokens);
        for (i, chance) in chances.iter().enumerate().take(MOST_ROWS - rows) {
            tokens += chance;
            if rate(tokens, i + 1) > best {
                (best, drafts) = (rate(tokens, i + 1), i + 1);
            }
        }
        drafts
    }
}

/// How often drafts of a kind are right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chance {
    right: f64,
    judged: f64,
}

/// What of the past counts after each judgement.
const REMEMBERED: f64 = 0.96;
/// Judgements that the expectation before the first stands for.
const EXPECTED: f64 = 2.0;

impl Chance {
    /// Before any was judged.
    pub(crate) fn expected(chance: f64) -> Self {
        Self { right: chance * EXPECTED, judged: EXPECTED }
    }

    /// One was judged.
    pub(crate) fn judge(&mut self, is_right: bool) {
        self.right = self.right * REMEMBERED + f64::from(u8::from(is_right));
        self.judged = self.judged * REMEMBERED + 1.0;
    }

    /// The chance of the next.
    pub(crate) fn next(self) -> f64 {
        self.right / self.judged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chances(chance: f64) -> Vec<f64> {
        (1..8).map(|i| chance.powi(i)).collect()
    }

    fn seen(costs: &[(usize, u64)]) -> Governor {
        let mut governor = Governor::default();
        costs.iter().for_each(|&(rows, time)| governor.ran(rows, 0, Duration::from_millis(time)));
        governor
    }

    #[test]
    fn drafts_run_where_they_pay_and_nowhere_else() {
        let cheap = seen(&[(1, 100), (8, 120)]);
        let worth = |governor: &Governor, rows: usize, chance| governor.worth(rows, rows as f64, &chances(chance), 0.0);
        assert_eq!(worth(&cheap, 1, 0.95), 7);
        assert_eq!(worth(&cheap, 1, 0.01), 0);
        // Rows that cost what passes do are worth nothing, however likely.
        let dear = seen(&[(1, 100), (2, 200), (8, 800)]);
        assert_eq!(worth(&dear, 1, 0.99), 0);
        // Before anything is known.
        assert_eq!(worth(&Governor::default(), 1, 0.2), 0);
        assert!(worth(&Governor::default(), 1, 0.95) >= 4);
        // Rows of others leave less room.
        assert_eq!(worth(&cheap, 6, 1.0), 2);
        assert_eq!((worth(&cheap, 8, 1.0), worth(&cheap, 0, 1.0)), (0, 0));
        // Drafts that take as long as a pass do not pay.
        assert_eq!(cheap.worth(1, 1.0, &chances(0.95), 0.1), 0);
    }

    #[test]
    fn what_was_not_seen_follows_from_what_was() {
        let governor = seen(&[(1, 100), (4, 160)]);
        let near = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-9, "{got} {expected}");
        near(governor.cost(2), 0.12);
        near(governor.cost(8), 0.24);
        near(seen(&[(1, 100)]).cost(3), 0.1 * (1.0 + 2.0 * ROW));
        assert!(seen(&[(4, 100)]).cost(1) < 0.1);
    }

    #[test]
    fn the_price_of_a_pass_without_drafts_is_learned_anew() {
        let mut governor = seen(&[(1, 100), (8, 120)]);
        let worth = |governor: &Governor| governor.worth(1, 1.0, &chances(0.95), 0.0);
        for _ in 0..IN_A_ROW {
            assert_eq!(worth(&governor), 7);
            governor.ran(8, 7, Duration::from_millis(120));
        }
        assert_eq!(worth(&governor), 0);
        governor.ran(1, 0, Duration::from_millis(100));
        assert_eq!(worth(&governor), 7);
    }

    #[test]
    fn chances_follow_what_was_right() {
        let mut chance = Chance::expected(0.5);
        assert_eq!(chance.next(), 0.5);
        (0..100).for_each(|_| chance.judge(true));
        assert!(chance.next() > 0.98);
        (0..100).for_each(|_| chance.judge(false));
        assert!(chance.next() < 0.05);
    }
}
