//! Several at once, and those who are interrupted.

use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use st_hub::{DownloadProgress, Hub, HubConfig, HubError};

use crate::server::Fault;
use crate::{DEFAULT_FILES, FIRST, Recorder, SECOND, World, request};

#[test]
fn those_who_download_the_same_model_at_once_fetch_each_file_once() {
    let world = World::new();
    let together = Barrier::new(3);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                together.wait();
                let folder = world.download().0.unwrap();
                world.assert_nothing_wrong();
                assert!(DEFAULT_FILES.iter().all(|file| folder.join(file).exists()));
            });
        }
    });
    world.assert_complete(&world.download().0.unwrap());
    for file in DEFAULT_FILES.iter().filter(|file| **file != "empty.json") {
        assert_eq!(world.server.ranges(file).len(), 1, "{file}");
    }
}

#[test]
fn a_lock_of_another_process_is_waited_for() {
    let world = World::new();
    let name = world.repo_folder().file_name().unwrap().to_owned();
    let path = world.cache().join(".locks").join(name).join(format!("{}.lock", world.file(FIRST).etag));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let theirs = File::create(&path).unwrap();
    theirs.lock().unwrap();

    /// Plays the other process: finishes the file once this one waits for it.
    struct Other<'a>(&'a World, File, Recorder);
    impl DownloadProgress for Other<'_> {
        fn waiting(&self, file: usize) {
            self.2.waiting(file);
            fs::create_dir_all(self.0.blob(FIRST).parent().unwrap()).unwrap();
            fs::write(self.0.blob(FIRST), self.0.file(FIRST).content()).unwrap();
            self.1.unlock().unwrap();
        }
    }
    let other = Other(&world, theirs, Recorder::default());
    let folder = world.hub().download(&request(), &other).unwrap();
    world.assert_complete(&folder);
    assert!(other.2.waited.load(Ordering::Relaxed));
    assert!(world.server.ranges(FIRST).is_empty(), "the other process had fetched it");
}

/// Asks to stop when some bytes of the large files have come.
struct Interrupt(Arc<AtomicBool>);

impl DownloadProgress for Interrupt {
    fn advanced(&self, _: usize, bytes: u64) {
        if bytes > 10_000 {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn an_interrupted_download_keeps_what_has_arrived_and_goes_on_from_there() {
    let world = World::new();
    // Both servers fall silent for good: only closing the connections ends the reads.
    for file in [FIRST, SECOND] {
        world.server.spoil(file, Fault::StallAfter(60_000));
    }
    let config = HubConfig { stall_timeout: Duration::from_secs(600), ..world.config() };
    let cancel = Arc::clone(&config.cancel);
    let error = Hub::new(config).download(&request(), &Interrupt(cancel)).unwrap_err();
    assert!(matches!(error, HubError::Cancelled), "{error}");
    let kept = fs::metadata(world.partial(FIRST)).map_or(0, |m| m.len());
    let kept_second = fs::metadata(world.partial(SECOND)).map_or(0, |m| m.len());
    assert!(kept + kept_second > 10_000);
    assert!(!world.blob(FIRST).exists() && !world.blob(SECOND).exists());
    assert!(!world.repo_folder().join("refs/main").exists(), "offline, nobody takes the part for the whole");

    world.server.forget();
    world.server.heal();
    world.assert_complete(&world.download().0.unwrap());
    let first_range = world.server.ranges(FIRST)[0].clone();
    assert_eq!(first_range, (kept > 0).then(|| format!("bytes={kept}-")));
}

#[test]
fn cancelling_beforehand_transfers_nothing() {
    let world = World::new();
    let config = world.config();
    config.cancel.store(true, Ordering::Relaxed);
    let hub = Hub::new(config);
    assert!(matches!(hub.download(&request(), &Recorder::default()), Err(HubError::Cancelled)));
    assert!(matches!(hub.list(&request()), Err(HubError::Cancelled)));
}

#[test]
fn cancelling_ends_the_wait_for_a_lock_and_the_wait_for_a_retry() {
    let world = World::new();
    for _ in 0..100 {
        world.server.spoil("info", Fault::Status(503, vec![("Retry-After", "299".into())]));
    }
    struct StopAtRetry(Arc<AtomicBool>);
    impl DownloadProgress for StopAtRetry {
        fn retrying(&self, _: Option<usize>, _: Duration, _: &HubError) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let mut config = world.config();
    config.retry.sleep = thread::sleep;
    let cancel = Arc::clone(&config.cancel);
    let error = Hub::new(config).download(&request(), &StopAtRetry(cancel)).unwrap_err();
    assert!(matches!(error, HubError::Cancelled), "{error}");
    assert_eq!(world.server.log().len(), 1);
}
