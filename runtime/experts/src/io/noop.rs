//! An engine that misbehaves on purpose, for tests here and in the crates that build on the store.

use super::ExpertIo;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// One kind of misbehaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The read takes this much longer.
    Delay(Duration),
    /// The read delivers at most this many bytes (never fewer than the engine's alignment, so that reading goes on).
    Short(usize),
    /// The first read at an offset fails, later ones succeed.
    FailOnce,
    /// Reads at the offset always fail.
    Fail,
    /// The first read at an offset delivers a wrong byte, later ones are right.
    CorruptOnce,
    /// Reads at the offset always deliver a wrong byte.
    Corrupt,
    /// The read panics.
    Panic,
}

/// Wraps an engine and applies to each read the faults that a plan chooses for its offset.
pub struct FaultyIo<I> {
    inner: I,
    plan: Box<dyn Fn(u64) -> Vec<Fault> + Send + Sync>,
    /// Reads so far, by offset.
    seen: Mutex<HashMap<u64, u32>>,
}

impl<I: ExpertIo> FaultyIo<I> {
    /// `plan` says what goes wrong with reads at an offset in the file. It is asked again for every read.
    pub fn new(inner: I, plan: impl Fn(u64) -> Vec<Fault> + Send + Sync + 'static) -> Self {
        Self { inner, plan: Box::new(plan), seen: Mutex::default() }
    }
}

impl<I: ExpertIo> std::fmt::Debug for FaultyIo<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyIo").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<I: ExpertIo> ExpertIo for FaultyIo<I> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let first = {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let count = seen.entry(offset).or_default();
            *count += 1;
            *count == 1
        };
        let (mut most, mut corrupt) = (buf.len(), false);
        for fault in (self.plan)(offset) {
            match fault {
                Fault::Delay(time) => std::thread::sleep(time),
                Fault::Short(bytes) => {
                    let unit = self.alignment();
                    most = most.min(bytes.max(unit).next_multiple_of(unit));
                }
                Fault::FailOnce if !first => {}
                Fault::FailOnce | Fault::Fail => return Err(io::Error::other("injected failure")),
                Fault::CorruptOnce => corrupt |= first,
                Fault::Corrupt => corrupt = true,
                Fault::Panic => panic!("injected panic"),
            }
        }
        let n = self.inner.read_at(&mut buf[..most], offset)?;
        if corrupt && n > 0 {
            buf[n / 2] ^= 0x10;
        }
        Ok(n)
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn done_with(&self, range: Range<u64>) {
        self.inner.done_with(range);
    }

    fn path(&self) -> Option<&Path> {
        self.inner.path()
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}
