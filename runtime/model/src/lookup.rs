//! What followed the last time: the latest tokens of a text, found again earlier in it.
//!
//! Owns the text and an index of its pairs of tokens. Whoever repeats what was said (a function with one change, a document that is
//! quoted, a form) is drafted from it; the longest match speaks.

/// No place.
const NONE: u32 = u32::MAX;
/// Earlier places of a pair that are looked at, the latest first.
const LOOKS: usize = 16;
/// A longer match says no more.
const LONGEST: usize = 64;

/// A text and where each of its pairs was before.
#[derive(Debug, Default)]
pub(crate) struct Lookup {
    text: Vec<u32>,
    /// For each place, the latest place before it where a pair with the same hash ends.
    before: Vec<u32>,
    /// For each hash, the latest place where such a pair ends; as many as there are places, about.
    latest: Vec<u32>,
}

impl Lookup {
    /// Bytes for a text of `tokens`, at most.
    pub(crate) fn bytes(tokens: usize) -> usize {
        // Vectors grow by doubling.
        tokens.saturating_mul(2 * 3 * size_of::<u32>())
    }

    /// The text.
    pub(crate) fn text(&self) -> &[u32] {
        &self.text
    }

    /// Makes `text` the text; what it begins with already is not looked at again.
    pub(crate) fn begin(&mut self, text: &[u32]) {
        if !text.starts_with(&self.text) {
            self.text.clear();
            self.before.clear();
            self.latest.fill(NONE);
        }
        text[self.text.len()..].iter().for_each(|&token| self.push(token));
    }

    /// Adds a token to the text.
    pub(crate) fn push(&mut self, token: u32) {
        self.text.push(token);
        if self.text.len() > self.latest.len() {
            self.latest = vec![NONE; self.text.len().next_power_of_two().max(64)];
            self.before.clear();
            (0..self.text.len()).for_each(|place| self.index(place));
        } else {
            self.index(self.text.len() - 1);
        }
    }

    fn index(&mut self, place: usize) {
        let before = match place {
            0 => NONE,
            _ => {
                let hash = hash(self.text[place - 1], self.text[place]) & (self.latest.len() - 1);
                std::mem::replace(&mut self.latest[hash], place as u32)
            }
        };
        self.before.push(before);
    }

    /// Appends to `out` what followed the longest match of the text's end, `most` tokens at most. Returns the match's length, 0 where
    /// there is none.
    pub(crate) fn propose(&self, most: usize, out: &mut Vec<u32>) -> usize {
        let Some(last) = self.text.len().checked_sub(1) else { return 0 };
        let (mut longest, mut at) = (1, NONE);
        let mut place = self.before[last];
        for _ in 0..LOOKS {
            if place == NONE {
                break;
            }
            let end = place as usize + 1;
            let ends = self.text[..end].iter().rev().zip(self.text.iter().rev());
            let len = ends.take(LONGEST).take_while(|(a, b)| a == b).count();
            if len > longest {
                (longest, at) = (len, place);
            }
            place = self.before[place as usize];
        }
        if at == NONE {
            return 0;
        }
        // Where the match reaches the end, what follows it is what was proposed just now.
        let period = last - at as usize;
        let start = out.len();
        for i in 0..most {
            out.push(if i < period { self.text[at as usize + 1 + i] } else { out[start + i - period] });
        }
        longest
    }
}

/// A hash of a pair.
fn hash(a: u32, b: u32) -> usize {
    let mixed = (u64::from(a) << 32 | u64::from(b)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposed(text: &[u32], most: usize) -> (usize, Vec<u32>) {
        let (mut lookup, mut out) = (Lookup::default(), vec![]);
        lookup.begin(text);
        let len = lookup.propose(most, &mut out);
        (len, out)
    }

    #[test]
    fn the_longest_match_speaks_and_the_latest_of_equals() {
        assert_eq!(proposed(&[], 4), (0, vec![]));
        assert_eq!(proposed(&[1, 2, 3], 4), (0, vec![]));
        // One token is no match.
        assert_eq!(proposed(&[1, 2, 3, 1], 4), (0, vec![]));
        assert_eq!(proposed(&[1, 2, 3, 4, 1, 2], 2), (2, vec![3, 4]));
        // 7 1 2 was followed by 5, the later 1 2 by 6.
        assert_eq!(proposed(&[7, 1, 2, 5, 9, 1, 2, 6, 8, 7, 1, 2], 1), (3, vec![5]));
        assert_eq!(proposed(&[1, 2, 5, 9, 1, 2, 6, 8, 1, 2], 1), (2, vec![6]));
        // What repeats goes on repeating.
        assert_eq!(proposed(&[1, 2, 3, 1, 2, 3, 1, 2], 7), (5, vec![3, 1, 2, 3, 1, 2, 3]));
        assert_eq!(proposed(&[4, 4, 4], 3), (2, vec![4, 4, 4]));
    }

    #[test]
    fn long_texts_are_found_in_and_a_text_is_begun_anew_or_gone_on_with() {
        let text: Vec<u32> = (0..1000).chain(400..420).collect();
        let mut lookup = Lookup::default();
        let mut out = vec![];
        lookup.begin(&text[..1010]);
        assert_eq!(lookup.propose(3, &mut out), 10);
        lookup.begin(&text);
        assert_eq!((lookup.propose(3, &mut out), lookup.text()), (20, &text[..]));
        assert_eq!(out, [410, 411, 412, 420, 421, 422]);
        lookup.begin(&[1, 2, 400, 401]);
        out.clear();
        assert_eq!((lookup.propose(3, &mut out), &out[..]), (0, &[][..]));
    }
}
