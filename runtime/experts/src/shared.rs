//! What I/O threads and computing threads share: the state under its mutex, and how they wait for each other.
//!
//! One mutex guards all state and two condition variables wait on it: `work` (I/O threads, when nothing is queued) and
//! `landed` (computing threads, when something is missing). Nobody holds the lock while reading, filling or computing.

use crate::buffer::AlignedBuf;
use crate::error::StoreError;
use crate::guess::{GuessGate, Payoff};
use crate::inflight::Job;
use crate::place::{Finish, Held};
use crate::reader::{Cost, Reader};
use crate::table::Table;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a computing thread watches for an expert before it sleeps. A processor that went to sleep takes tens of
/// microseconds to come back, in a virtual machine more, and that for every layer of every token; threads that have work
/// get the processor meanwhile.
const PATIENCE: Duration = Duration::from_millis(2);

/// Memory that is taken from the system in one go: a large page.
const TAKEN_AT_ONCE: usize = 2 << 20;

/// What I/O threads and computing threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) reader: Reader,
    state: Mutex<State>,
    /// Signalled when pieces are queued or the store closes.
    pub(crate) work: Condvar,
    /// Signalled when a piece has landed and somebody waits.
    landed: Condvar,
    /// Counts what `landed` signals; changed under the lock, watched without it.
    events: AtomicU64,
    /// Whether guesses are followed now, to be looked at without the lock.
    pub(crate) following: AtomicBool,
}

/// Everything the mutex guards.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) table: Table,
    pub(crate) gate: GuessGate,
    pub(crate) payoff: Payoff,
    pub(crate) closing: bool,
    /// I/O threads asleep on `work`.
    idle: usize,
    /// Computing threads asleep on `landed`, and since when there has been one.
    waiting: usize,
    pub(crate) waiting_since: Option<Instant>,
    /// I/O threads in a read, and since when there has been one.
    reading: usize,
    pub(crate) reading_since: Option<Instant>,
    /// Emptied pin lists, to be used again.
    pub(crate) spare: Vec<Vec<Held>>,
    /// What of the slots has no memory yet, and whether a thread is taking some.
    untaken: Range<usize>,
    taking: bool,
}

impl Shared {
    /// Around a table of which nothing is known yet.
    pub(crate) fn new(reader: Reader, table: Table, gate: GuessGate, resident: bool) -> Self {
        // Where every expert has a slot, memory is taken for those alone that are used.
        let untaken = if resident { 0..0 } else { 0..reader.slab.bytes() };
        let state = State {
            table,
            gate,
            payoff: Payoff::new(),
            closing: false,
            idle: 0,
            waiting: 0,
            waiting_since: None,
            reading: 0,
            reading_since: None,
            spare: Vec::new(),
            untaken,
            taking: false,
        };
        Self {
            reader,
            state: Mutex::new(state),
            work: Condvar::new(),
            landed: Condvar::new(),
            events: AtomicU64::new(0),
            following: AtomicBool::new(true),
        }
    }

    /// The state. A panic while it was locked would be a bug of the table's; the state is used on, so that the other threads
    /// end in order.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes as many I/O threads as there are new pieces and sleepers.
    pub(crate) fn wake_readers(&self, state: MutexGuard<'_, State>, queued: usize) {
        let wake = queued.min(state.idle);
        drop(state);
        (0..wake).for_each(|_| self.work.notify_one());
    }

    /// Waits until something has landed. The time in which anybody waits here is the stall.
    pub(crate) fn wait_for_landing<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if state.waiting == 0 {
            state.waiting_since = Some(Instant::now());
        }
        state.waiting += 1;
        state = self.watch(state);
        state.waiting -= 1;
        if state.waiting == 0
            && let Some(since) = state.waiting_since.take()
        {
            state.table.stats.stall_seconds += since.elapsed().as_secs_f64();
        }
        state
    }

    /// Returns when something has happened since `state` was locked, or perhaps a little earlier.
    fn watch<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let seen = self.events.load(Ordering::Relaxed);
        drop(state);
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if self.events.load(Ordering::Relaxed) != seen {
                return self.lock();
            }
            std::thread::yield_now();
        }
        let state = self.lock();
        if self.events.load(Ordering::Relaxed) != seen {
            return state;
        }
        self.landed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait that something has happened, whether they watch or sleep.
    fn announce(&self, state: &State) {
        self.events.fetch_add(1, Ordering::Relaxed);
        if state.waiting > 0 {
            self.landed.notify_all();
        }
    }

    /// Unpins a lease's experts.
    pub(crate) fn release(&self, mut held: Vec<Held>) {
        let mut state = self.lock();
        state.table.release_all(&mut held);
        state.spare.push(held);
        // A request may be waiting for slots.
        self.announce(&state);
    }

    /// An I/O thread: takes pieces as long as there are any, and sleeps.
    pub(crate) fn serve(&self, mut bounce: AlignedBuf) {
        let mut state = self.lock();
        while !state.closing {
            let Some(job) = state.table.next_job() else {
                if let Some(part) = state.next_untaken() {
                    drop(state);
                    let taken = self.reader.slab.take(part);
                    state = self.lock();
                    state.taking = false;
                    self.announce(&state);
                    if taken.is_err() {
                        state.untaken = 0..0;
                    }
                    continue;
                }
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            if state.reading == 0 {
                state.reading_since = Some(Instant::now());
            }
            state.reading += 1;
            drop(state);

            let mut cost = Cost::default();
            // A panic in the engine or the format must reach the waiter as an error: nobody else would wake it.
            let read = AssertUnwindSafe(|| self.read(&job, &mut bounce, &mut cost));
            let panicked = || std::io::Error::other("reading the expert panicked");
            let result = catch_unwind(read).unwrap_or_else(|_| Err(self.reader.failure(&job, panicked())));

            state = self.lock();
            state.reading -= 1;
            if state.reading == 0
                && let Some(since) = state.reading_since.take()
            {
                state.table.stats.io_seconds += since.elapsed().as_secs_f64();
            }
            state.count(&cost);
            let mut more = 0;
            match result {
                Ok(crc) => match state.table.finish(&job, crc) {
                    Finish::Done => {}
                    Finish::ReadAgain => more = state.idle,
                    Finish::Corrupt(got) => state.table.fail(&job, self.reader.corruption(&job, got)),
                },
                Err(error) => {
                    tracing::warn!(%error, "an expert could not be read");
                    state.table.fail(&job, error);
                }
            }
            (0..more).for_each(|_| self.work.notify_one());
            self.announce(&state);
        }
    }

    #[allow(unsafe_code)]
    fn read(&self, job: &Job, bounce: &mut AlignedBuf, cost: &mut Cost) -> Result<u32, StoreError> {
        // SAFETY: `serve` took this job from the table and finishes it after this call, on the same thread.
        unsafe { self.reader.read(job, bounce, cost) }
    }
}

impl State {
    /// A part of the slots that a thread which has nothing to read takes memory for, so that no read has to wait until the system has
    /// zeroed it. One thread does so at a time: the others wait for reads.
    fn next_untaken(&mut self) -> Option<Range<usize>> {
        if self.taking || self.untaken.is_empty() {
            return None;
        }
        let end = (self.untaken.start + TAKEN_AT_ONCE).min(self.untaken.end);
        self.taking = true;
        Some(std::mem::replace(&mut self.untaken.start, end)..end)
    }

    /// Whether a thread is taking memory for slots.
    pub(crate) fn is_taking(&self) -> bool {
        self.taking
    }

    /// Leaves the slots from the byte `end` on without memory.
    pub(crate) fn keep_untaken_before(&mut self, end: usize) {
        self.untaken.end = self.untaken.end.min(end / TAKEN_AT_ONCE * TAKEN_AT_ONCE).max(self.untaken.start);
    }

    fn count(&mut self, cost: &Cost) {
        let stats = &mut self.table.stats;
        stats.bytes_read += cost.bytes;
        stats.reads += cost.reads;
        stats.retries += cost.retries;
        stats.read_thread_seconds += cost.reading.as_secs_f64();
        stats.fill_thread_seconds += cost.filling.as_secs_f64();
    }
}
