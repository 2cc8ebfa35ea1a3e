//! What an answer may be made to fit: a schema, a grammar. This crate knows no such language; it asks a [`Constraint`].

/// What the tokens of one answer must fit.
///
/// The driver of an answer tells each token that was chosen and, before it chooses the next, takes those that cannot be otherwise
/// and then the set of those that can. An implementation works that out beside the layers that run meanwhile.
pub trait Constraint: std::fmt::Debug + Send {
    /// Token `id` was chosen among those allowed.
    ///
    /// # Errors
    /// Why the answer cannot go on.
    fn accept(&mut self, id: u32) -> Result<(), String>;

    /// Tokens that must come next, in order; they need not be accepted. At the end of what can be said, an end token is among them.
    /// Empty where there is a choice.
    ///
    /// # Errors
    /// Why the answer cannot go on.
    fn forced(&mut self) -> Result<Vec<u32>, String>;

    /// Tokens that may come after all that was accepted and forced, one bit each, as [`Allowed`](crate::sampler::Allowed) has them;
    /// end tokens where the answer may end.
    ///
    /// # Errors
    /// Why there is none.
    fn allowed(&mut self) -> Result<&[u32], String>;
}
