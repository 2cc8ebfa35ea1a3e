//! Why there is no grammar, in one line.

/// Why there is no grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The model's file has no tokenizer, or names no token that ends an answer.
    #[error("the model's file has no tokenizer or no end token: its answers cannot be made to fit")]
    NoTokens,
    /// The tokenizer's tokens cannot be used.
    #[error("the tokenizer's tokens cannot be used: {0}")]
    Tokens(String),
    /// The schema or grammar is wrong, or asks for what cannot be enforced.
    #[error("this cannot be enforced: {0}")]
    Source(String),
    /// There is no thread to work on.
    #[error("cannot start a thread for the grammar: {0}")]
    Thread(std::io::ErrorKind),
}

/// An error's text without what only its authors need.
pub(crate) fn plain(error: &dyn std::fmt::Display) -> String {
    first_lines(&error.to_string())
}

/// The lines up to where a trace begins, in one, short enough to be shown.
pub(crate) fn first_lines(text: &str) -> String {
    let lines = text.lines().take_while(|line| !line.starts_with('<') && !line.trim().is_empty()).take(4);
    let text = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    text.chars().take(400).collect()
}
