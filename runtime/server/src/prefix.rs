//! Texts that were run before, so that what a new one shares with any of them is not run again.
//!
//! Owns which are kept: those that were of use last, in the pages that the memory plan counts and conversations do not need. A
//! text that goes on with a kept one shares its pages; its logits are, bit for bit, those of a run from the beginning.
//!
//! A model with windows cannot be cut back anywhere, so copies are also taken where texts were found to part.

use st_model::Sequence;

/// Texts that are kept, at most.
const MOST: usize = 128;

/// The texts that are kept.
pub(crate) struct Prefixes {
    entries: Vec<Entry>,
    /// Counts uses.
    clock: u64,
    /// Tokens of all texts together, at most.
    most_tokens: usize,
}

struct Entry {
    sequence: Sequence,
    used: u64,
    /// Whether it is on disk, or need not be.
    saved: bool,
}

/// What a new text shares with those that are kept.
pub(crate) struct Hit {
    /// The beginning of the new text that need not be run, where there is any.
    pub(crate) sequence: Option<Sequence>,
    /// How far the new text goes along with any of them, though more could not be kept.
    pub(crate) parts_at: usize,
}

impl Prefixes {
    /// A cache of at most so many tokens.
    pub(crate) fn new(most_tokens: usize) -> Self {
        Self { entries: Vec::new(), clock: 0, most_tokens }
    }

    /// The longest beginning of `prompt`, all but its last token at most, that was run already, for a kept text or one of
    /// `under_way`.
    pub(crate) fn find<'s>(&mut self, prompt: &[u32], under_way: impl Iterator<Item = &'s Sequence>) -> Hit {
        let most = prompt.len().saturating_sub(1);
        let (mut best, mut kept, mut parts_at) = (None, 0, 0);
        for entry in &mut self.entries {
            let common = common(entry.sequence.tokens(), prompt).min(most);
            parts_at = parts_at.max(common);
            let keeps = entry.sequence.keeps(common);
            if keeps > kept {
                kept = keeps;
                self.clock += 1;
                entry.used = self.clock;
                best = Some(&entry.sequence);
            }
        }
        for sequence in under_way {
            let common = common(sequence.tokens(), prompt).min(most);
            parts_at = parts_at.max(common);
            if sequence.keeps(common) > kept {
                kept = sequence.keeps(common);
                best = Some(sequence);
            }
        }
        let cut = |sequence: &Sequence| {
            let mut sequence = sequence.fork();
            sequence.truncate(kept);
            sequence
        };
        Hit { sequence: best.map(cut), parts_at }
    }

    /// How much of `prompt` [`Self::find`] would find.
    pub(crate) fn keeps<'s>(&'s self, prompt: &[u32], under_way: impl Iterator<Item = &'s Sequence>) -> usize {
        let most = prompt.len().saturating_sub(1);
        let all = self.entries.iter().map(|entry| &entry.sequence).chain(under_way);
        all.map(|sequence| sequence.keeps(common(sequence.tokens(), prompt).min(most))).max().unwrap_or(0)
    }

    /// How far `prompt` goes along with any text that is kept.
    pub(crate) fn shared(&self, prompt: &[u32]) -> usize {
        self.entries.iter().map(|entry| common(entry.sequence.tokens(), prompt)).max().unwrap_or(0)
    }

    /// Keeps a text.
    pub(crate) fn keep(&mut self, sequence: Sequence) {
        self.add(sequence, false);
    }

    /// Keeps a text that is on disk.
    pub(crate) fn keep_saved(&mut self, sequence: Sequence) {
        self.add(sequence, true);
    }

    fn add(&mut self, sequence: Sequence, saved: bool) {
        if sequence.is_empty() || sequence.len() > self.most_tokens {
            return;
        }
        self.clock += 1;
        let serves = |longer: &Sequence, shorter: &Sequence| {
            longer.tokens().starts_with(shorter.tokens()) && longer.shortest_cut() <= shorter.shortest_cut()
        };
        if let Some(entry) = self.entries.iter_mut().find(|entry| serves(&entry.sequence, &sequence)) {
            entry.used = self.clock;
            return;
        }
        self.entries.retain(|entry| !serves(&sequence, &entry.sequence));
        self.entries.push(Entry { sequence, used: self.clock, saved });
        while self.entries.len() > MOST || self.tokens() > self.most_tokens {
            self.forget_one();
        }
    }

    /// A text that was not saved, the latest first; from now on it counts as saved.
    pub(crate) fn next_unsaved(&mut self) -> Option<&Sequence> {
        let unsaved = self.entries.iter_mut().filter(|entry| !entry.saved);
        let latest = unsaved.max_by_key(|entry| entry.used)?;
        latest.saved = true;
        Some(&latest.sequence)
    }

    /// Whether there is one.
    pub(crate) fn has_unsaved(&self) -> bool {
        self.entries.iter().any(|entry| !entry.saved)
    }

    fn tokens(&self) -> usize {
        self.entries.iter().map(|entry| entry.sequence.len()).sum()
    }

    /// Forgets the text that was of no use for the longest time; whether there was one.
    pub(crate) fn forget_one(&mut self) -> bool {
        let oldest = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.used).map(|(index, _)| index);
        oldest.map(|index| self.entries.swap_remove(index)).is_some()
    }

    /// Texts that are kept.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// Tokens at the beginning of both.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
