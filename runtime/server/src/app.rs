//! What all addresses and the engine's thread share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use st_model::Engine;
use tokio::sync::{Semaphore, watch};

use crate::clock::{now, random};
use crate::error::ApiError;
use crate::keys::Keys;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::queue::Queue;
use crate::settings::{BODIES, Settings};
use crate::slots::Slots;
use crate::tokens::Tokens;

/// The server as its parts see it.
pub(crate) struct App {
    pub(crate) settings: Settings,
    pub(crate) log: Log,
    pub(crate) keys: Keys,
    pub(crate) queue: Queue,
    pub(crate) metrics: Metrics,
    /// What grammars need, once one is asked for.
    pub(crate) tokens: Arc<Tokens>,
    /// What each conversation does.
    pub(crate) slots: Slots,
    /// Bytes that bodies may still take.
    pub(crate) bodies: Semaphore,
    /// One request at a time is made tokens of, so that its memory is needed once.
    pub(crate) preparing: Semaphore,
    /// When the server began, in seconds since 1970.
    pub(crate) started: u64,
    engine: OnceLock<Arc<Engine>>,
    /// Bytes of weights that were read so far, and all of them.
    loading: [AtomicU64; 2],
    /// Set once the server is to end.
    ending: watch::Sender<bool>,
    deadline: OnceLock<Instant>,
    /// Set once the engine's thread has nothing more to do.
    idle: AtomicBool,
    ids: AtomicU64,
}

impl App {
    pub(crate) fn new(settings: Settings, log: Log) -> Self {
        let bodies = (BODIES * settings.max_body).min(Semaphore::MAX_PERMITS);
        Self {
            keys: Keys::new(&settings.keys),
            queue: Queue::new(settings.queue, settings.parallel),
            metrics: Metrics::default(),
            tokens: Arc::default(),
            slots: Slots::new(settings.parallel),
            bodies: Semaphore::new(bodies),
            preparing: Semaphore::new(1),
            started: now(),
            engine: OnceLock::new(),
            loading: Default::default(),
            ending: watch::Sender::new(false),
            deadline: OnceLock::new(),
            idle: AtomicBool::new(false),
            ids: AtomicU64::new(random()),
            settings,
            log,
        }
    }

    /// The model.
    ///
    /// # Errors
    /// Where it is not there yet, or will soon be gone.
    pub(crate) fn engine(&self) -> Result<&Arc<Engine>, ApiError> {
        match (self.is_ending(), self.engine.get()) {
            (true, _) => Err(ApiError::ending()),
            (false, None) => Err(ApiError::loading(self.loaded())),
            (false, Some(engine)) => Ok(engine),
        }
    }

    /// The model is there.
    pub(crate) fn set_engine(&self, engine: &Arc<Engine>) {
        let _ = self.engine.set(Arc::clone(engine));
    }

    /// The share of the weights that are read, from 0 to 1.
    pub(crate) fn loaded(&self) -> f64 {
        let [read, all] = self.loading.each_ref().map(|bytes| bytes.load(Ordering::Relaxed));
        match (self.engine.get(), all) {
            (Some(_), _) => 1.0,
            (None, 0) => 0.0,
            (None, all) => (read as f64 / all as f64).min(1.0),
        }
    }

    /// So many bytes of weights are to be read.
    pub(crate) fn will_load(&self, bytes: u64) {
        self.loading[1].store(bytes, Ordering::Relaxed);
    }

    /// More of them are read.
    pub(crate) fn has_loaded(&self, bytes: u64) {
        self.loading[0].fetch_add(bytes, Ordering::Relaxed);
    }

    /// Begins to end: no new requests, and `grace` for the answers under way.
    pub(crate) fn end(&self) {
        let _ = self.deadline.set(Instant::now() + self.settings.grace);
        self.ending.send_replace(true);
        self.queue.close();
    }

    pub(crate) fn is_ending(&self) -> bool {
        *self.ending.borrow()
    }

    /// Whether the time for answers under way is over.
    pub(crate) fn is_over(&self) -> bool {
        self.deadline.get().is_some_and(|deadline| Instant::now() >= *deadline)
    }

    /// Who is told that the server ends.
    pub(crate) fn ending(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// The engine's thread has ended.
    pub(crate) fn set_idle(&self) {
        self.idle.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Relaxed)
    }

    /// A name that no other answer of this server has.
    pub(crate) fn id(&self, prefix: &str) -> String {
        let number = self.ids.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        format!("{prefix}{number:016x}")
    }

    /// The model's own name.
    pub(crate) fn name(&self) -> &str {
        self.settings.names.first().map_or("model", String::as_str)
    }
}
