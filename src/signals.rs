//! Ctrl-C and termination requests as flags that the work looks at.
//!
//! The first signal asks the running work to stop cleanly; a second one of the same kind ends the process at once.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use st_convert::Cancel;

use crate::terminal::Terminal;

/// What the signal thread and the work share.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The signal that arrived, 0 for none.
    signal: AtomicI32,
    /// Set while nothing is running that would look at a flag: end at once on SIGTERM and SIGHUP.
    idle: Mutex<Option<Idle>>,
    cancel: Cancel,
    flag: AtomicBool,
}

/// Waiting for a line to be typed, at a terminal that wants its settings back.
#[derive(Debug)]
struct Idle {
    terminal: Option<Terminal>,
}

impl Interrupt {
    /// Begins to listen.
    pub(crate) fn install() -> std::io::Result<Self> {
        let interrupt = Self::default();
        // Where it is listened to, a write past the largest size that files may have is an error like any other.
        flag::register(SIGXFSZ, Arc::default())?;
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let shared = Arc::clone(&interrupt.shared);
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                shared.receive(signal);
            }
        })?;
        Ok(interrupt)
    }

    /// Whether the work should stop.
    pub(crate) fn raised(&self) -> bool {
        self.shared.flag.load(Ordering::Relaxed)
    }

    /// The request as conversions and downloads take it.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.shared.cancel
    }

    /// Exit status of work that was stopped: 130 for Ctrl-C, as shells have it.
    pub(crate) fn exit_status(&self) -> u8 {
        match self.shared.signal.load(Ordering::Relaxed) {
            0 => 128 + SIGINT as u8,
            signal => 128u8.wrapping_add(signal as u8),
        }
    }

    /// Whether the process was asked to end, rather than an answer to stop.
    pub(crate) fn terminating(&self) -> bool {
        matches!(self.shared.signal.load(Ordering::Relaxed), SIGTERM | SIGHUP)
    }

    /// Forgets a Ctrl-C that was acted on.
    pub(crate) fn clear(&self) {
        if !self.terminating() {
            self.shared.signal.store(0, Ordering::Relaxed);
            self.shared.flag.store(false, Ordering::Relaxed);
        }
    }

    /// Runs `wait`, which waits for a line to be typed and looks at no flag; `None` where the process was asked to end
    /// before that began.
    pub(crate) fn while_idle<T>(&self, wait: impl FnOnce() -> T) -> Option<T> {
        let set_idle = |idle| *self.shared.idle.lock().unwrap_or_else(PoisonError::into_inner) = idle;
        set_idle(Some(Idle { terminal: Terminal::remember() }));
        // A request that came before that was left to whoever looks at the flag.
        let result = (!self.terminating()).then(wait);
        set_idle(None);
        result
    }
}

impl Shared {
    fn receive(&self, signal: i32) {
        let before = self.signal.swap(signal, Ordering::Relaxed);
        // Held to the end, so that a line that is complete at this moment changes nothing any more.
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // Work that does not look at the flag, or waits at a prompt, would never end.
        if before == signal || (idle.is_some() && signal != SIGINT) {
            if let Some(Idle { terminal: Some(terminal) }) = &*idle {
                terminal.restore();
            }
            std::process::exit(128 + signal);
        }
        self.flag.store(true, Ordering::Relaxed);
        self.cancel.cancel();
    }
}
