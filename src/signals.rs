//! Ctrl-C and termination requests as flags that the work looks at.
//!
//! The first signal asks the running work to stop cleanly; a second one of the same kind ends the process at once. A server ends at
//! once at a second one of any kind.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use st_convert::Cancel;
use st_sys::{Signal, Terminal};

use crate::report::{self, Interrupted};

/// What the signal thread and the work share.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The signals that arrived and were not acted on, a bit each.
    seen: AtomicU64,
    /// Whether a second signal ends the process whatever the first one was.
    any_second: AtomicBool,
    /// Set while nothing is running that would look at a flag: end at once.
    idle: Mutex<Option<Idle>>,
    cancel: Cancel,
}

/// What is waited for.
#[derive(Debug)]
enum Idle {
    /// A line to be typed, at a terminal that wants its settings back. Ctrl-C is a key like others there.
    Line(Option<Terminal>),
    /// Input that may never come.
    Input,
}

impl Interrupt {
    /// Begins to listen.
    pub(crate) fn install() -> std::io::Result<Self> {
        let interrupt = Self::default();
        let shared = Arc::clone(&interrupt.shared);
        st_sys::listen(move |signal| shared.receive(signal))?;
        Ok(interrupt)
    }

    /// Whether the work should stop.
    pub(crate) fn raised(&self) -> bool {
        self.shared.seen.load(Ordering::Relaxed) != 0
    }

    /// An error where the work should stop.
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        if self.raised() { Err(Interrupted) } else { Ok(()) }
    }

    /// A break where the work should stop.
    pub(crate) fn flow(&self) -> ControlFlow<()> {
        if self.raised() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// The request as conversions and downloads take it.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.shared.cancel
    }

    /// Exit status of work that was stopped, as shells have it: 130 for Ctrl-C, unless the process was asked to end as well.
    pub(crate) fn exit_status(&self) -> u8 {
        self.request_to_end().unwrap_or(Signal::Interrupt).exit_status()
    }

    /// Whether the process was asked to end, rather than an answer to stop.
    pub(crate) fn terminating(&self) -> bool {
        self.request_to_end().is_some()
    }

    fn request_to_end(&self) -> Option<Signal> {
        let seen = self.shared.seen.load(Ordering::Relaxed);
        [Signal::Terminate, Signal::HangUp].into_iter().find(|&signal| seen & bit(signal) != 0)
    }

    /// From now on a second signal ends the process, whatever the first one was.
    pub(crate) fn end_at_any_second(&self) {
        self.shared.any_second.store(true, Ordering::Relaxed);
    }

    /// Forgets a Ctrl-C that was acted on.
    pub(crate) fn clear(&self) {
        self.shared.seen.fetch_and(!bit(Signal::Interrupt), Ordering::Relaxed);
    }

    /// Runs `wait`, which waits for a line to be typed and looks at no flag; `None` where the process was asked to end
    /// before that began.
    pub(crate) fn while_idle<T>(&self, wait: impl FnOnce() -> T) -> Option<T> {
        let set_idle = |idle| self.shared.set_idle(idle);
        set_idle(Some(Idle::Line(Terminal::remember())));
        // A request that came before that was left to whoever looks at the flag.
        let result = (!self.terminating()).then(wait);
        set_idle(None);
        result
    }

    /// Runs `read`, which waits for input and looks at no flag: a request to stop ends the process meanwhile.
    pub(crate) fn while_reading<T>(&self, read: impl FnOnce() -> T) -> Result<T, Interrupted> {
        self.shared.set_idle(Some(Idle::Input));
        let result = self.check().map(|()| read());
        self.shared.set_idle(None);
        result
    }
}

impl Shared {
    fn set_idle(&self, idle: Option<Idle>) {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = idle;
    }

    fn receive(&self, signal: Signal) {
        let before = self.seen.fetch_or(bit(signal), Ordering::Relaxed);
        // Held to the end, so that a line that is complete at this moment changes nothing any more.
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let at_once = match &*idle {
            // Work that does not look at the flag would never end.
            None if self.any_second.load(Ordering::Relaxed) => before != 0,
            None => before & bit(signal) != 0,
            Some(Idle::Line(_)) => signal != Signal::Interrupt || before & bit(signal) != 0,
            Some(Idle::Input) => true,
        };
        if at_once {
            match &*idle {
                Some(Idle::Line(Some(terminal))) => terminal.restore(),
                Some(Idle::Input) => report::print(&Interrupted.into(), false),
                _ => {}
            }
            std::process::exit(signal.exit_status().into());
        }
        self.cancel.cancel();
    }
}

fn bit(signal: Signal) -> u64 {
    1 << signal as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_to_end_outlives_a_ctrl_c() {
        let interrupt = Interrupt::default();
        assert!(interrupt.check().is_ok() && interrupt.flow().is_continue());
        interrupt.shared.receive(Signal::Interrupt);
        assert!(interrupt.raised() && interrupt.flow().is_break());
        assert_eq!((interrupt.terminating(), interrupt.exit_status()), (false, 130));
        interrupt.clear();
        assert!(!interrupt.raised());
        interrupt.shared.receive(Signal::Terminate);
        interrupt.shared.receive(Signal::Interrupt);
        interrupt.clear();
        assert!(interrupt.check().is_err());
        assert_eq!((interrupt.terminating(), interrupt.exit_status()), (true, 143));
    }
}
