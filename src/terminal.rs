//! The terminal as it was found, to be given back by a process that ends while a line is being typed.
//!
//! Editing a line takes echo and line breaks from the terminal and has it mark pasted text. A line that is complete
//! ends that; a process that ends before has to.

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr, ttyname};

/// Pasted text is marked no longer, and what comes next begins on a new line.
const LEAVE: &[u8] = b"\x1b[?2004l\n";

/// A terminal and its settings.
#[derive(Debug)]
pub(crate) struct Terminal {
    device: OwnedFd,
    settings: Termios,
}

impl Terminal {
    /// The terminal that lines are typed at, as it is now; `None` where there is none.
    pub(crate) fn remember() -> Option<Self> {
        // One that was told to hold its output must not hold up the end.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // The one that line editing takes: that of the session, else the input.
        let device = open("/dev/tty", flags, Mode::empty())
            .or_else(|_| open(ttyname(std::io::stdin(), Vec::new())?, flags, Mode::empty()))
            .ok()?;
        let settings = tcgetattr(&device).ok()?;
        Some(Self { device, settings })
    }

    /// Gives it back. Where it has gone meanwhile, there is nothing to put right.
    pub(crate) fn restore(&self) {
        // In the background it is somebody else's, and touching it would stop this process.
        if tcgetpgrp(&self.device).is_ok_and(|group| group != getpgrp()) {
            return;
        }
        let _ = tcsetattr(&self.device, OptionalActions::Now, &self.settings);
        let _ = rustix::io::write(&self.device, LEAVE);
    }
}
