//! What a process is asked to do from outside.

use std::io;

use crate::os;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C: stop what is being done.
    Interrupt,
    /// End, please.
    Terminate,
    /// The terminal has gone.
    HangUp,
}

impl Signal {
    /// The exit status of a process that ends for it, as shells have it.
    pub fn exit_status(self) -> u8 {
        128 + match self {
            Self::HangUp => 1,
            Self::Interrupt => 2,
            Self::Terminate => 15,
        }
    }
}

/// Has `act` called for every request, on a thread of its own, instead of what the system does otherwise. A write past the largest
/// size that files may have is an error like any other from then on. Where a system has no such requests, it ends the process.
///
/// # Errors
/// Where they cannot be listened to, or there is no thread.
pub fn listen(act: impl Fn(Signal) + Send + 'static) -> io::Result<()> {
    os::listen(act)
}
