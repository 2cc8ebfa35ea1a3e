//! Jobs that wait for a place, in the order in which they came.
//!
//! Owns the bound: a job that finds the queue full is refused at once, with a guess of when to come back. Jobs whose clients have
//! gone give up their places.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;

use crate::job::{Event, Failure, Job, JobHandle};

/// A job and where its events go.
pub(crate) struct Waiting {
    pub(crate) job: Job,
    pub(crate) events: Sender<Event>,
    pub(crate) since: Instant,
}

/// Why a job is not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// All places are taken; to be tried again after so many seconds, about.
    Full { seconds: u64 },
    /// The server ends.
    Ending,
}

/// The jobs that wait.
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// Jobs that may wait.
    most: usize,
    parallel: usize,
}

struct State {
    waiting: VecDeque<Waiting>,
    /// Conversations that could begin at once.
    idle: usize,
    closed: bool,
    /// How long answers took lately, in seconds.
    lately: f64,
}

impl Queue {
    /// A queue for `most` jobs beside those that `parallel` conversations are at.
    pub(crate) fn new(most: usize, parallel: usize) -> Self {
        let state = State { waiting: VecDeque::new(), idle: parallel, closed: false, lately: 1.0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), most, parallel }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all of `jobs`, or none.
    ///
    /// # Errors
    /// Where there is no room, or the server ends.
    pub(crate) fn submit(&self, jobs: Vec<Job>) -> Result<Vec<JobHandle>, Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Ending);
        }
        state.waiting.retain(|waiting| !waiting.events.is_closed());
        if state.waiting.len() + jobs.len() > self.most + state.idle {
            let rounds = (state.waiting.len() + jobs.len()).div_ceil(self.parallel);
            return Err(Refused::Full { seconds: (state.lately * rounds as f64).ceil().clamp(1.0, 600.0) as u64 });
        }
        let since = Instant::now();
        let handles = jobs.into_iter().map(|job| {
            let (handle, events) = JobHandle::new();
            state.waiting.push_back(Waiting { job, events, since });
            handle
        });
        let handles = handles.collect();
        self.changed.notify_all();
        Ok(handles)
    }

    /// The first job that `may_begin`, where there is one.
    pub(crate) fn take(&self, mut may_begin: impl FnMut(&Job) -> bool) -> Option<Waiting> {
        let mut state = self.lock();
        state.waiting.retain(|waiting| !waiting.events.is_closed());
        let first = state.waiting.iter().position(|waiting| may_begin(&waiting.job))?;
        state.idle = state.idle.saturating_sub(1);
        state.waiting.remove(first)
    }

    /// A conversation is over that took so long; another may begin.
    pub(crate) fn leave(&self, took: Duration) {
        let mut state = self.lock();
        state.idle = (state.idle + 1).min(self.parallel);
        state.lately = 0.8 * state.lately + 0.2 * took.as_secs_f64();
    }

    /// Waits until something was submitted, the queue is closed, or for `time`.
    pub(crate) fn wait(&self, time: Duration) {
        let state = self.lock();
        if state.waiting.is_empty() && !state.closed {
            drop(self.changed.wait_timeout(state, time));
        }
    }

    /// Takes no more jobs, and tells those that wait.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for waiting in state.waiting.drain(..) {
            // Who has gone need not be told.
            let _ = waiting.events.try_send(Event::Failed(Failure::Ending));
        }
        self.changed.notify_all();
    }

    /// Jobs that wait.
    pub(crate) fn len(&self) -> usize {
        self.lock().waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use st_model::GenerateOptions;
    use st_model::sampler::{Sampler, SamplerOptions};

    use super::*;

    fn jobs(n: usize) -> Vec<Job> {
        let job = || Job {
            prompt: vec![1],
            sampler: Sampler::new(SamplerOptions::greedy()).expect("valid"),
            limits: GenerateOptions::default(),
            logprobs: None,
            grammar: None,
            settings: None,
        };
        (0..n).map(|_| job()).collect()
    }

    #[test]
    fn a_full_queue_refuses_and_who_leaves_makes_room() {
        let queue = Queue::new(1, 2);
        let first = queue.submit(jobs(2)).expect("two may begin");
        assert!(queue.take(|_| true).is_some() && queue.take(|_| true).is_some() && queue.take(|_| true).is_none());
        let waiting = queue.submit(jobs(1)).expect("one may wait");
        assert!(matches!(queue.submit(jobs(1)), Err(Refused::Full { seconds: 1.. })));
        // Who hangs up while waiting gives up the place.
        drop(waiting);
        let _waiting = queue.submit(jobs(1)).expect("room again");
        assert!(queue.submit(jobs(1)).is_err());
        drop(first);
        queue.leave(Duration::from_secs(1));
        assert!(queue.submit(jobs(2)).is_err(), "all or none");
        let _more = queue.submit(jobs(1)).expect("one conversation is idle");
        assert_eq!(queue.len(), 2);
        queue.close();
        assert_eq!((queue.len(), queue.submit(jobs(1)).unwrap_err()), (0, Refused::Ending));
    }
}
