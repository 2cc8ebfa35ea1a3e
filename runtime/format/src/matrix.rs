//! The three matrices of an expert.

/// One of an expert's three matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Matrix {
    /// `n_ff` rows of `n_embd`; its ReLU decides which neurons live.
    Gate,
    /// `n_ff` rows of `n_embd`.
    Up,
    /// `n_embd` rows of `n_ff`.
    Down,
}

impl Matrix {
    /// All three, in the order in which they are needed and stored.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// `gate`, `up` or `down`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}
