//! Units of work done by many threads, handed on in order, with a bounded number in flight.
//!
//! The order of results, and which failure is reported, never depend on the number of threads. Buffers are reused, so
//! memory is bounded by the window whatever the number of units.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

/// A finished unit: its bytes and what came with them, or why it failed.
type Outcome<T, E> = Result<(Vec<u8>, T), E>;

/// What the threads share.
struct State<T, E> {
    /// The next unit that nobody has taken.
    next: usize,
    /// Units handed on; workers stay less than a window ahead of it.
    consumed: usize,
    /// Finished units, at their index modulo the window.
    ready: Vec<Option<Outcome<T, E>>>,
    spare: Vec<Vec<u8>>,
    stop: bool,
}

struct Shared<T, E> {
    state: Mutex<State<T, E>>,
    /// There is room in the window.
    room: Condvar,
    /// A unit was finished.
    finished: Condvar,
}

impl<T, E> Shared<T, E> {
    fn lock(&self) -> MutexGuard<'_, State<T, E>> {
        // The state is consistent whenever the lock is released, even by a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops the others when the thread that holds it leaves for any reason but the end of the work.
struct StopOnDrop<'a, T, E> {
    shared: &'a Shared<T, E>,
    armed: bool,
}

impl<T, E> Drop for StopOnDrop<'_, T, E> {
    fn drop(&mut self) {
        if self.armed {
            self.shared.lock().stop = true;
            self.shared.room.notify_all();
            self.shared.finished.notify_all();
        }
    }
}

/// Runs `produce` for units `0..n` on `threads` threads, each with its own state from `local`, and `consume` for each
/// result, in order, on the calling thread. At most `window` results exist at a time. Ends with the first failure in
/// order of units.
pub(crate) fn run_ordered<L, T: Send, E: Send>(
    n: usize,
    threads: usize,
    window: usize,
    local: impl Fn() -> L + Sync,
    produce: impl Fn(&mut L, usize, &mut Vec<u8>) -> Result<T, E> + Sync,
    mut consume: impl FnMut(usize, &[u8], T) -> Result<(), E>,
) -> Result<(), E> {
    let window = window.clamp(1, n.max(1));
    let ready = (0..window).map(|_| None).collect();
    let state = State { next: 0, consumed: 0, ready, spare: Vec::new(), stop: false };
    let shared = Shared { state: Mutex::new(state), room: Condvar::new(), finished: Condvar::new() };

    let work = || {
        let mut guard = StopOnDrop { shared: &shared, armed: true };
        let mut local = local();
        loop {
            let mut state = shared.lock();
            while !state.stop && state.next < n && state.next >= state.consumed + window {
                state = shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stop || state.next >= n {
                guard.armed = false;
                return;
            }
            let unit = state.next;
            state.next += 1;
            let mut buffer = state.spare.pop().unwrap_or_default();
            drop(state);

            buffer.clear();
            let result = produce(&mut local, unit, &mut buffer).map(|extra| (buffer, extra));
            shared.lock().ready[unit % window] = Some(result);
            shared.finished.notify_one();
        }
    };

    std::thread::scope(|scope| {
        let start = |_: &usize| Builder::new().spawn_scoped(scope, work).is_ok();
        let started = (0..threads.clamp(1, window)).take_while(start).count();
        if started == 0 {
            // Where no thread can be had, this one does it all.
            let (mut local, mut buffer) = (local(), Vec::new());
            return (0..n).try_for_each(|unit| {
                buffer.clear();
                let extra = produce(&mut local, unit, &mut buffer)?;
                consume(unit, &buffer, extra)
            });
        }
        // Whatever ends this thread, the workers must not wait for room that never comes.
        let _stop = StopOnDrop { shared: &shared, armed: true };
        for unit in 0..n {
            let mut state = shared.lock();
            let result = loop {
                if let Some(result) = state.ready[unit % window].take() {
                    break result;
                }
                if state.stop {
                    // A worker panicked: leaving the scope passes its panic on.
                    return Ok(());
                }
                state = shared.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let (buffer, extra) = result?;
            consume(unit, &buffer, extra)?;
            let mut state = shared.lock();
            state.consumed = unit + 1;
            state.spare.push(buffer);
            drop(state);
            shared.room.notify_one();
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn results_come_in_order_and_the_window_holds() {
        for threads in [1, 2, 7] {
            let in_flight = AtomicUsize::new(0);
            let most = AtomicUsize::new(0);
            let mut seen = Vec::new();
            run_ordered(
                100,
                threads,
                5,
                || (),
                |(), unit, buffer| {
                    most.fetch_max(in_flight.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    if unit % 3 == 0 {
                        std::thread::yield_now();
                    }
                    buffer.extend_from_slice(&unit.to_le_bytes());
                    Ok::<_, ()>(unit * 2)
                },
                |unit, buffer, twice| {
                    in_flight.fetch_sub(1, Ordering::SeqCst);
                    assert_eq!(buffer, unit.to_le_bytes());
                    assert_eq!(twice, unit * 2);
                    seen.push(unit);
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!(seen, (0..100).collect::<Vec<_>>());
            assert!(most.load(Ordering::SeqCst) <= 5);
        }
    }

    #[test]
    fn the_first_failure_in_order_is_the_one_reported() {
        for threads in [1, 4] {
            let produce = |(): &mut (), unit: usize, _: &mut Vec<u8>| if unit >= 10 { Err(unit) } else { Ok(()) };
            assert_eq!(run_ordered(50, threads, 8, || (), produce, |_, _, ()| Ok(())), Err(10));
            let consume = |unit, _: &[u8], ()| if unit == 3 { Err(1000) } else { Ok(()) };
            assert_eq!(run_ordered(50, threads, 8, || (), |(), _, _| Ok(()), consume), Err(1000));
        }
        assert_eq!(run_ordered(0, 3, 8, || (), |(), _, _| Err::<(), _>(1), |_, _, ()| Ok(())), Ok(()));
    }

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn a_panic_in_a_worker_is_passed_on() {
        let produce = |(): &mut (), unit: usize, _: &mut Vec<u8>| {
            assert!(unit != 5, "unit 5");
            Ok::<(), ()>(())
        };
        let _ = run_ordered(50, 3, 4, || (), produce, |_, _, ()| Ok(()));
    }
}
