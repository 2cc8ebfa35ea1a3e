//! Rows that go through the layers together: which sequence each goes on with, and with which token.
//!
//! A batch decides what is computed and never what it gives: a row's logits are those it would have alone.

use std::ops::Range;

use st_experts::Use;

/// What rows are, which decides what the expert cache keeps and guesses; it changes no bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BatchKind {
    /// Texts that are read. Experts that are touched for them alone are the first to leave the cache.
    #[default]
    Prompt,
    /// The next token of each of some conversations.
    Decode,
    /// Tokens that were drafted, to be compared with what the model makes of them.
    Verify,
}

impl BatchKind {
    /// Whether experts that are read for such rows are worth keeping.
    pub fn use_of_experts(self) -> Use {
        match self {
            Self::Prompt => Use::Sweep,
            Self::Decode | Self::Verify => Use::Keep,
        }
    }
}

/// Rows, in the order in which each sequence takes them.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    kind: BatchKind,
    sequences: Vec<usize>,
    tokens: Vec<u32>,
    wants_logits: Vec<usize>,
}

impl Batch {
    /// A batch without rows.
    pub fn new(kind: BatchKind) -> Self {
        Self { kind, ..Self::default() }
    }

    /// Takes all rows out; what was allocated stays.
    pub fn clear(&mut self, kind: BatchKind) {
        self.kind = kind;
        self.sequences.clear();
        self.tokens.clear();
        self.wants_logits.clear();
    }

    /// Adds a row: `token` goes on with the sequence of that index, after its earlier rows. Its place in the text is the
    /// sequence's own business, so nobody can name a wrong one.
    pub fn push(&mut self, sequence: usize, token: u32) {
        self.sequences.push(sequence);
        self.tokens.push(token);
    }

    /// Adds a row whose logits are wanted. Returns which of the batch's logits they are.
    pub fn push_with_logits(&mut self, sequence: usize, token: u32) -> usize {
        self.wants_logits.push(self.len());
        self.push(sequence, token);
        self.wants_logits.len() - 1
    }

    /// What the rows are.
    pub fn kind(&self) -> BatchKind {
        self.kind
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Token of each row.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Sequence of each row.
    pub fn sequences(&self) -> &[usize] {
        &self.sequences
    }

    /// Rows whose logits are wanted, ascending.
    pub fn wants_logits(&self) -> &[usize] {
        &self.wants_logits
    }
}

/// Rows of a batch that follow each other in one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) sequence: usize,
    pub(crate) rows: Range<usize>,
    /// Place of the first row in the text.
    pub(crate) position: usize,
}

impl Batch {
    /// Cuts the rows into runs, sequences being as long as `len_of` says, in the place of what `runs` held.
    pub(crate) fn cut(&self, len_of: impl Fn(usize) -> usize, runs: &mut Vec<Run>) {
        runs.clear();
        for (row, &sequence) in self.sequences.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.sequence == sequence => run.rows.end += 1,
                _ => {
                    let before: usize =
                        runs.iter().filter(|run| run.sequence == sequence).map(|run| run.rows.len()).sum();
                    runs.push(Run { sequence, rows: row..row + 1, position: len_of(sequence) + before });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_on_where_their_sequence_stands() {
        let mut batch = Batch::new(BatchKind::Decode);
        for (sequence, token) in [(1, 7), (1, 8), (0, 9), (1, 10)] {
            batch.push(sequence, token);
        }
        assert_eq!((batch.push_with_logits(0, 11), batch.wants_logits()), (0, &[4][..]));
        let mut runs = vec![];
        batch.cut(|sequence| 100 * (sequence + 1), &mut runs);
        let runs: Vec<_> = runs.into_iter().map(|run| (run.sequence, run.rows, run.position)).collect();
        assert_eq!(runs, [(1, 0..2, 200), (0, 2..3, 100), (1, 3..4, 202), (0, 4..5, 101)]);
    }
}
