//! The terminal as it was found, to be given back by a process that ends while a line is being typed.
//!
//! Editing a line takes echo and line breaks from the terminal and has it mark pasted text. A line that is complete
//! ends that; a process that ends before has to.

use crate::os;

/// A terminal and its settings.
#[derive(Debug)]
pub struct Terminal(os::Terminal);

impl Terminal {
    /// The terminal that lines are typed at, as it is now; `None` where there is none, or the system puts it right by itself.
    pub fn remember() -> Option<Self> {
        os::Terminal::remember().map(Self)
    }

    /// Gives it back. Where it has gone meanwhile, or is somebody else's, nothing happens.
    pub fn restore(&self) {
        self.0.restore();
    }
}

/// Rows and columns of the terminal that standard error is; `None` where it is none, or the system does not tell.
pub fn terminal_size() -> Option<(u16, u16)> {
    os::terminal_size()
}

/// Forgets what was typed on standard input and not read.
pub fn discard_typed() {
    os::discard_typed();
}

/// Has the console take what is written as UTF-8, and escape sequences as such, for as long as this lives. Elsewhere terminals do so anyway.
#[derive(Debug)]
pub struct Utf8Output {
    /// Kept for its drop.
    _was: os::Utf8Output,
}

impl Utf8Output {
    /// Begins it.
    #[allow(clippy::new_without_default, reason = "it changes something outside")]
    pub fn new() -> Self {
        Self { _was: os::Utf8Output::new() }
    }
}
