//! Connections, from the first to the last: one thread serves them all, another runs the model.

use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use st_model::{Engine, MemoryPlan, ModelError};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use crate::app::App;
use crate::disk::Disk;
use crate::log::{Log, RECORDS, Record};
use crate::router::router;
use crate::scheduler::Scheduler;
use crate::settings::{CONNECTIONS, Settings};

/// How long a connection may say nothing between two requests, and the head of one may take.
const HEAD: Duration = Duration::from_secs(60);
/// How long connections get to take what is left for them once the last answer has ended.
const LAST_BYTES: Duration = Duration::from_secs(2);
/// How often the operator is asked.
const ASK: Duration = Duration::from_millis(50);
/// Bytes of a connection that are read ahead, at most; the head of a request must fit.
const BUFFER: usize = 64 << 10;

/// Who runs the server.
pub trait Operator: Sync {
    /// Loads the model; called once, on the engine's thread. `follow` may be handed to the loading: it keeps the count for
    /// `/health`.
    ///
    /// # Errors
    /// Whatever keeps the model from being loaded ends the server.
    fn load(&self, follow: &Loading<'_>) -> Result<Arc<Engine>, Self::Error>;

    /// The model is there: the server answers.
    fn ready(&self, engine: &Engine);

    /// Something happened; called on a thread of its own.
    fn told(&self, record: &Record) {
        let _ = record;
    }

    /// Whether the server is to end.
    fn should_end(&self) -> bool;

    /// Why a model may not load.
    type Error: Send;
}

/// Follows the loading of the model.
pub struct Loading<'a> {
    app: &'a App,
}

impl Loading<'_> {
    /// The plan is made; its dense weights are what is read first.
    pub fn planned(&self, plan: &MemoryPlan) {
        self.app.will_load(plan.dense);
    }

    /// So many bytes more are read.
    pub fn loaded(&self, bytes: u64) {
        self.app.has_loaded(bytes);
    }

    /// Whether the server ends before the model is there.
    pub fn is_ending(&self) -> bool {
        self.app.is_ending()
    }
}

/// Why a server ended that was not told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError<E> {
    /// The model could not be loaded.
    #[error("the model could not be loaded")]
    Load(E),
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The folder of snapshots could not be used.
    #[error("the folder for --cache-dir cannot be used")]
    Cache(io::Error),
    /// There are no connections to be had, or no threads.
    #[error("cannot serve connections")]
    Io(#[from] io::Error),
}

/// Serves the model that `operator` loads to whoever connects to `listener`, until the operator ends it: answers under way are
/// given their time first.
///
/// # Errors
/// Where the model cannot be loaded, or connections cannot be served.
pub fn serve<O: Operator>(listener: TcpListener, settings: Settings, operator: &O) -> Result<(), ServeError<O::Error>> {
    let (records, told) = sync_channel(RECORDS);
    let app = Arc::new(App::new(settings, Log::new(records.clone())));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(2)
        .thread_name("prepare")
        .build()?;
    listener.set_nonblocking(true)?;
    let failed = AtomicBool::new(false);
    thread::scope(|scope| {
        // Ends when whoever could tell something is gone.
        thread::Builder::new().name("log".into()).spawn_scoped(scope, move || {
            told.iter().map_while(|record| record).for_each(|record| operator.told(&record))
        })?;
        let engine = thread::Builder::new().name("engine".into()).spawn_scoped(scope, || {
            let outcome = run_engine(&app, operator);
            failed.store(outcome.is_err(), Ordering::Relaxed);
            app.set_idle();
            outcome
        })?;
        let served =
            runtime.block_on(connections(listener, &app, || operator.should_end() || failed.load(Ordering::Relaxed)));
        // Where connections failed, nobody waits for answers either.
        app.end();
        let ran = engine.join();
        // Connections that were cut off may still hold the log's other end.
        let _ = records.send(None);
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(served.map_err(ServeError::Io))
    })
}

/// The engine's thread: loads, then answers until the end.
fn run_engine<O: Operator>(app: &App, operator: &O) -> Result<(), ServeError<O::Error>> {
    let engine = match operator.load(&Loading { app }) {
        Ok(engine) => engine,
        Err(_) if app.is_ending() || operator.should_end() => return Ok(()),
        Err(error) => return Err(ServeError::Load(error)),
    };
    let open = |(folder, most): &(PathBuf, u64)| Disk::open(folder, *most, &engine).map_err(ServeError::Cache);
    let disk = app.settings.cache.as_ref().map(open).transpose()?;
    let scheduler = Scheduler::new(app, Arc::clone(&engine), disk)?;
    app.set_engine(&engine);
    operator.ready(&engine);
    scheduler.run();
    Ok(())
}

/// Takes connections until the server ends, and then waits for those that are open.
async fn connections(listener: TcpListener, app: &Arc<App>, should_end: impl Fn() -> bool) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = router(app);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        if should_end() {
            break;
        }
        // Who finds no place waits in the system's queue.
        let Ok(Ok(place)) = timeout(ASK, Arc::clone(&places).acquire_owned()).await else { continue };
        match timeout(ASK, listener.accept()).await {
            Err(_) => {}
            // No more descriptors, or a connection that was over before it began: others may do better in a while.
            Ok(Err(_)) => sleep(ASK).await,
            Ok(Ok((stream, _))) => {
                let (app, router) = (Arc::clone(app), router.clone());
                tokio::spawn(async move {
                    app.metrics.connections.add(1);
                    connection(stream, &app, router).await;
                    app.metrics.connections.sub(1);
                    drop(place);
                });
            }
        }
    }
    drop(listener);
    app.end();
    while !app.is_idle() {
        sleep(Duration::from_millis(5)).await;
    }
    let deadline = Instant::now() + LAST_BYTES;
    while places.available_permits() < CONNECTIONS && Instant::now() < deadline {
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Serves one connection to its end. Whatever goes wrong with it is its client's business.
async fn connection(stream: TcpStream, app: &App, router: Router) {
    // Tokens are small and shall not wait for each other.
    let _ = stream.set_nodelay(true);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BUFFER);
    let service = TowerToHyperService::new(router);
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut ending = app.ending();
    let ends = async move {
        // The sender lives as long as the server.
        let _ = ending.wait_for(|ending| *ending).await;
    };
    tokio::select! {
        _ = served.as_mut() => return,
        () = ends => served.as_mut().graceful_shutdown(),
    }
    let _ = served.await;
}
