//! The compute threads: a fork-join pool for work that is measured in microseconds.
//!
//! [`Pool::run`] costs about a microsecond when calls follow each other closely: workers wait by spinning, then by yielding
//! to whoever else wants the core, and park when nothing has come for a few milliseconds, so an idle pool costs nothing.
//! The calling thread is worker 0. `split.rs` shares buffers among the threads.

mod split;

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

pub use split::RowSplit;

/// Rounds of `spin_loop` before a waiting thread starts to yield: some tens of microseconds, the usual gap between two calls.
const SPIN_ROUNDS: u32 = 2_000;
/// How long a waiting thread yields before it parks.
const YIELD_TIME: Duration = Duration::from_millis(2);

type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// A value on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Padded<T>(T);

struct Worker {
    /// Set by the worker before it parks.
    parked: Padded<AtomicBool>,
    /// `2 * epoch` while the worker's part of that job waits to be taken, `2 * epoch + 1` once it is: by the worker, or by the
    /// caller where the worker has not been given a core in time.
    part: Padded<AtomicUsize>,
}

impl Worker {
    fn take_part(&self, epoch: usize) -> bool {
        let waiting = epoch.wrapping_mul(2);
        self.part.0.compare_exchange(waiting, waiting | 1, AcqRel, Relaxed).is_ok()
    }
}

/// Indices of a loop that one thread begins with and others help with: `start << 32 | end` of those nobody has taken.
#[derive(Default)]
struct Share(AtomicU64);

impl Share {
    /// # Panics
    /// If there are more than fit.
    fn set(&self, indices: Range<usize>) {
        assert!(u32::try_from(indices.end).is_ok(), "a loop of {} tasks", indices.end);
        self.0.store((indices.start as u64) << 32 | indices.end as u64, Relaxed);
    }

    /// Takes some of the first indices left: as many as `want` makes of their number, at least one.
    fn take(&self, want: impl Fn(usize) -> usize) -> Option<Range<usize>> {
        let mut now = self.0.load(Relaxed);
        loop {
            let (start, end) = ((now >> 32) as usize, now as u32 as usize);
            if start >= end {
                return None;
            }
            let taken = start..start + want(end - start).clamp(1, end - start);
            let left = (taken.end as u64) << 32 | end as u64;
            match self.0.compare_exchange_weak(now, left, Relaxed, Relaxed) {
                Ok(_) => return Some(taken),
                Err(other) => now = other,
            }
        }
    }
}

struct Shared {
    /// Counts jobs; a change tells the workers that `job` is set.
    epoch: Padded<AtomicUsize>,
    /// Parts of the current job, besides the caller's own, that are not finished.
    pending: Padded<AtomicUsize>,
    stop: AtomicBool,
    /// The current job, valid from the store to `epoch` until `pending` is 0.
    job: UnsafeCell<Option<*const Job<'static>>>,
    workers: Vec<Worker>,
    /// What is left of each thread's share of a loop.
    shares: Vec<Padded<Share>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the thread that holds `Pool::busy` while no part is taken and unfinished (`pending` is 0), and
// read by workers only after they took a part, which was offered after the write. The job itself is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is never owned; see above for who may follow it.
unsafe impl Send for Shared {}

/// A fixed set of threads that run one closure together.
///
/// Thread-safe; calls from several threads, or from within a job, do not mix: the later one runs on its own thread alone.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
    /// Held during a job.
    busy: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("n_threads", &self.n_threads()).finish()
    }
}

impl Pool {
    /// A pool of `n_threads` (at least 1), counting the calling thread: `n_threads - 1` threads are spawned.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn new(n_threads: usize) -> io::Result<Self> {
        let n = n_threads.max(1);
        let shared = Arc::new(Shared {
            epoch: Padded::default(),
            pending: Padded::default(),
            stop: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            workers: (1..n).map(|_| Worker { parked: Padded::default(), part: Padded(AtomicUsize::new(1)) }).collect(),
            shares: (0..n).map(|_| Padded::default()).collect(),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, handles: Vec::new(), threads: Vec::new(), busy: Mutex::new(()) };
        for i in 1..n {
            let shared = Arc::clone(&pool.shared);
            let handle = std::thread::Builder::new().name(format!("compute-{i}")).spawn(move || shared.work(i))?;
            pool.threads.push(handle.thread().clone());
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Number of threads that take part in a job, the caller included.
    pub fn n_threads(&self) -> usize {
        self.shared.workers.len() + 1
    }

    /// Runs `job(part)` once for each part `0..n_threads()` and returns when all are done. Parts usually run on a thread each; one
    /// whose thread is kept from a core by other programs runs on the calling thread.
    ///
    /// # Panics
    /// With the first panic of a job, after all threads are done with it.
    pub fn run(&self, job: &Job<'_>) {
        match self.lock() {
            Some(_guard) => self.run_locked(|| (), job),
            None => (0..self.n_threads()).for_each(job),
        }
    }

    /// Runs `job(i)` once for each `i` in `0..n`. Each thread starts with a contiguous share of its own and then helps
    /// the others, so consecutive indices should be consecutive in memory and worth at least a few microseconds each.
    ///
    /// # Panics
    /// As [`Self::run`].
    fn for_each(&self, n: usize, job: &Job<'_>) {
        self.share_out(n, &|_| 1, || (), &|range| range.for_each(job));
    }

    /// Runs `job` for ranges that make up `0..n`, each index in one of them, while the calling thread first runs `own`. Each thread
    /// begins with a contiguous share of its own and takes half of what is left of it at a time, then of the others': long runs while
    /// there is much to do, short ones at the end, where threads would wait for each other.
    fn for_ranges_while(&self, n: usize, own: impl FnOnce(), job: &(dyn Fn(Range<usize>) + Sync)) {
        self.share_out(n, &|left| left / 2, own, job);
    }

    /// `0..n` in ranges of as many indices as `want` makes of what is left of a share; all at once where there is one thread.
    fn share_out(
        &self,
        n: usize,
        want: &(dyn Fn(usize) -> usize + Sync),
        own: impl FnOnce(),
        job: &(dyn Fn(Range<usize>) + Sync),
    ) {
        let threads = self.n_threads();
        let guard = if threads == 1 || n <= 1 { None } else { self.lock() };
        let Some(_guard) = guard else {
            own();
            job(0..n);
            return;
        };
        for (thread, share) in self.shared.shares.iter().enumerate() {
            share.0.set(n * thread / threads..n * (thread + 1) / threads);
        }
        self.run_locked(own, &|thread| {
            for victim in (thread..threads).chain(0..thread) {
                while let Some(range) = self.shared.shares[victim].0.take(want) {
                    job(range);
                }
            }
        });
    }

    fn lock(&self) -> Option<std::sync::MutexGuard<'_, ()>> {
        match self.busy.try_lock() {
            Ok(guard) => Some(guard),
            // A job panicked: the pool was left in order all the same.
            Err(TryLockError::Poisoned(e)) => Some(PoisonError::into_inner(e)),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// `own`, then the caller's part of `job`, while the workers run theirs.
    fn run_locked(&self, own: impl FnOnce(), job: &Job<'_>) {
        let shared = &*self.shared;
        if shared.workers.is_empty() {
            own();
            job(0);
            return;
        }
        // SAFETY: only the lifetime changes; `Finish` below keeps this call from ending, by return or by panic, before
        // every part of the job is done.
        let job_static = unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job) };
        // SAFETY: `busy` is held and the previous job has ended (`pending` was seen as 0), so nobody reads `job` now.
        unsafe { *shared.job.get() = Some(job_static) };
        shared.pending.0.store(shared.workers.len(), Relaxed);
        let epoch = shared.epoch.0.load(Relaxed).wrapping_add(1);
        for worker in &shared.workers {
            worker.part.0.store(epoch.wrapping_mul(2), Release);
        }
        shared.epoch.0.store(epoch, SeqCst);
        for (worker, thread) in shared.workers.iter().zip(&self.threads) {
            if worker.parked.0.load(SeqCst) {
                thread.unpark();
            }
        }
        {
            let _finish = Finish { shared, epoch, job };
            own();
            job(0);
        }
        let payload = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.shared.epoch.0.fetch_add(1, SeqCst);
        for thread in &self.threads {
            thread.unpark();
        }
        for handle in self.handles.drain(..) {
            // A worker catches the panics of its jobs, so there is nothing to report here.
            let _ = handle.join();
        }
    }
}

/// Sees a job through when dropped, also while the caller's own part of it unwinds.
struct Finish<'a> {
    shared: &'a Shared,
    epoch: usize,
    job: &'a Job<'a>,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        // A worker that has not begun may be waiting for a core behind another program; its part is done here rather than
        // waited for. (After `for_each` there is usually nothing left to do in it.)
        for (i, worker) in self.shared.workers.iter().enumerate() {
            if worker.take_part(self.epoch) {
                self.shared.run_part(self.job, i + 1);
            }
        }
        let mut rounds = 0u32;
        while self.shared.pending.0.load(Acquire) != 0 {
            if rounds < SPIN_ROUNDS {
                rounds += 1;
                spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(index, seen);
            if self.stop.load(Relaxed) {
                return;
            }
            if !self.workers[index - 1].take_part(seen) {
                continue;
            }
            // SAFETY: the part was offered after `job` was set, and the job stays valid until this part is counted out of
            // `pending`.
            if let Some(job) = unsafe { (*self.job.get()).map(|job| &*job) } {
                self.run_part(job, index);
            }
        }
    }

    /// Runs a part that was taken and counts it out.
    fn run_part(&self, job: &Job<'_>, index: usize) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(index))) {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        self.pending.0.fetch_sub(1, Release);
    }

    /// Waits until the epoch differs from `seen` and returns it.
    fn wait(&self, index: usize, seen: usize) -> usize {
        for _ in 0..SPIN_ROUNDS {
            let epoch = self.epoch.0.load(Acquire);
            if epoch != seen {
                return epoch;
            }
            spin_loop();
        }
        let start = Instant::now();
        while start.elapsed() < YIELD_TIME {
            for _ in 0..16 {
                let epoch = self.epoch.0.load(Acquire);
                if epoch != seen {
                    return epoch;
                }
                std::thread::yield_now();
            }
        }
        let parked = &self.workers[index - 1].parked.0;
        parked.store(true, SeqCst);
        loop {
            // The order matters: either this load sees the new epoch, or the caller sees `parked`.
            let epoch = self.epoch.0.load(SeqCst);
            if epoch != seen {
                parked.store(false, Relaxed);
                return epoch;
            }
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_once_and_every_index_once() {
        for n in [1, 2, 3] {
            let pool = Pool::new(n).unwrap();
            for round in 0..200 {
                let threads = AtomicUsize::new(0);
                pool.run(&|t| {
                    threads.fetch_add(1 << (8 * t), SeqCst);
                });
                assert_eq!(threads.into_inner(), (0..n).map(|t| 1 << (8 * t)).sum::<usize>());
                let counts: Vec<_> = (0..round % 17).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(counts.len(), &|i| {
                    counts[i].fetch_add(1, SeqCst);
                });
                assert!(counts.iter().all(|c| c.load(SeqCst) == 1));
            }
        }
    }

    #[test]
    fn parked_workers_wake_up() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            std::thread::sleep(YIELD_TIME * 3);
            let n = AtomicUsize::new(0);
            pool.run(&|_| {
                n.fetch_add(1, SeqCst);
            });
            assert_eq!(n.into_inner(), 2);
        }
    }

    #[test]
    fn panics_reach_the_caller_and_leave_the_pool_usable() {
        let pool = Pool::new(2).unwrap();
        for bad in 0..2 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(&|t| assert!(t != bad, "thread {bad}"))));
            assert!(result.is_err());
        }
        let mut out = vec![0; 10];
        pool.run_chunks(&mut out, 3, &|i, chunk| chunk.fill(i));
        assert_eq!(out, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]);
    }

    #[test]
    fn a_job_may_use_the_pool_itself() {
        let pool = Pool::new(2).unwrap();
        let n = AtomicUsize::new(0);
        pool.for_each(4, &|_| {
            pool.for_each(5, &|_| {
                n.fetch_add(1, SeqCst);
            });
        });
        assert_eq!(n.into_inner(), 20);
    }

    #[test]
    fn the_callers_own_work_runs_once_beside_the_others() {
        for (threads, n) in [(1, 4), (2, 1), (2, 100), (3, 0)] {
            let pool = Pool::new(threads).unwrap();
            let (mut own, done) = (0, AtomicUsize::new(0));
            let caller = std::thread::current().id();
            let beside = || {
                assert_eq!(std::thread::current().id(), caller);
                // A loop within goes alone.
                pool.for_each(3, &|_| assert_eq!(std::thread::current().id(), caller));
                own += 1;
            };
            pool.for_ranges_while(n, beside, &|range| {
                done.fetch_add(range.len(), SeqCst);
            });
            assert_eq!((own, done.into_inner()), (1, n));
        }
    }
}
