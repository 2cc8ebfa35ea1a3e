//! Downloads against a hub on loopback that misbehaves on demand.
//!
//! Each test states its own expectation: resumed with a range request and right in the end, or one clear error; and
//! never a wrong file under a final name. No test waits for a clock: waits between attempts are recorded, not slept.

mod access;
mod faults;
mod held;
mod layout;
mod moved;
#[allow(dead_code, reason = "the example of the same name uses more of it")]
mod server;
mod sharing;
mod ways;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use server::{RepoFile, Server, Settings, pattern};
use st_hub::{DownloadProgress, DownloadRequest, Hub, HubConfig, HubError, Listing, RepoId, RetryPolicy};

/// The repository that the loopback hub has.
const REPO: &str = "Tiiny/SmallThinker-4BA0.6B-Instruct";
/// Its two large files.
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const CONFIG: &str = r#"{"architectures": ["SmallThinkerForCausalLM"]}"#;

/// A server, a cache folder, and what is needed to download from one into the other.
struct World {
    server: Server,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let index = format!(r#"{{"weight_map": {{"a": "{FIRST}", "b": "{SECOND}"}}}}"#);
        let files = [
            ("config.json", RepoFile::small(CONFIG)),
            ("tokenizer.json", RepoFile::small(pattern(5000, 1))),
            ("chat_template.jinja", RepoFile::small("{{ messages }}")),
            ("README.md", RepoFile::small("not needed")),
            ("empty.json", RepoFile::small("")),
            ("model.safetensors.index.json", RepoFile::small(index)),
            ("extra/sub folder/ünï#%.json", RepoFile::small("{}")),
            (FIRST, RepoFile::large(pattern(300_000, 2))),
            (SECOND, RepoFile::large(pattern(200_000, 3))),
        ];
        let files = files.into_iter().map(|(name, file)| (name.to_owned(), file)).collect();
        let server = Server::start(Settings { repo: REPO.to_owned(), files, ..Settings::default() });
        World { server, folder: tempfile::tempdir().unwrap() }
    }

    fn config(&self) -> HubConfig {
        HubConfig {
            endpoint: self.server.endpoint(),
            retry: RetryPolicy { retries: 3, sleep: |_| {}, ..RetryPolicy::default() },
            ..HubConfig::new(self.cache())
        }
    }

    fn hub(&self) -> Hub {
        Hub::new(self.config())
    }

    fn offline(&self) -> Hub {
        Hub::new(HubConfig { offline: true, ..self.config() })
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    fn repo_folder(&self) -> PathBuf {
        self.cache().join("models--Tiiny--SmallThinker-4BA0.6B-Instruct")
    }

    fn blob(&self, file: &str) -> PathBuf {
        self.repo_folder().join("blobs").join(self.file(file).etag)
    }

    fn partial(&self, file: &str) -> PathBuf {
        self.blob(file).with_extension("incomplete")
    }

    /// Puts bytes where an interrupted download would have left them.
    fn leave_partial(&self, file: &str, content: &[u8]) {
        let path = self.partial(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn file(&self, name: &str) -> RepoFile {
        let mut found = None;
        self.server.change(|settings| found = settings.files.get(name).cloned());
        found.unwrap()
    }

    fn put(&self, name: &str, file: RepoFile) {
        self.server.change(|settings| {
            settings.files.insert(name.to_owned(), file);
        });
    }

    /// Downloads the default files; gives the events too.
    fn download(&self) -> (Result<PathBuf, HubError>, Recorder) {
        self.download_with(&self.hub(), &request())
    }

    fn download_with(&self, hub: &Hub, request: &DownloadRequest) -> (Result<PathBuf, HubError>, Recorder) {
        let recorder = Recorder::default();
        let result = hub.download(request, &recorder);
        (result, recorder)
    }

    /// Everything that a default download brings has the right content in `folder`, and nothing is left over.
    #[track_caller]
    fn assert_complete(&self, folder: &Path) {
        for name in DEFAULT_FILES {
            let got = fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(got == self.file(name).content(), "{name} has the wrong content");
        }
        assert_eq!(self.leftovers(), Vec::<PathBuf>::new());
    }

    /// No file of the cache has wrong content under a final name.
    #[track_caller]
    fn assert_nothing_wrong(&self) {
        let mut right = BTreeMap::new();
        self.server.change(|s| right = s.files.values().map(|f| (f.etag.clone(), f.clone())).collect());
        for path in walk(&self.repo_folder().join("blobs")) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if !name.ends_with(".incomplete") {
                assert!(fs::read(&path).unwrap() == right[&name].content(), "{name} has the wrong content");
            }
        }
    }

    /// Files in the cache that are on their way.
    fn leftovers(&self) -> Vec<PathBuf> {
        let unfinished = |p: &PathBuf| p.extension().is_some_and(|e| e == "incomplete" || e == "tmp");
        walk(&self.cache()).into_iter().filter(unfinished).collect()
    }
}

/// What a default download brings.
const DEFAULT_FILES: [&str; 7] = [
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "empty.json",
    "model.safetensors.index.json",
    FIRST,
    SECOND,
];

fn request() -> DownloadRequest {
    DownloadRequest::new(RepoId::parse("4b").unwrap())
}

fn request_for(patterns: &[&str]) -> DownloadRequest {
    DownloadRequest { include: patterns.iter().map(|p| (*p).to_owned()).collect(), ..request() }
}

/// All files under a folder.
fn walk(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// Remembers the events of a download.
#[derive(Default)]
struct Recorder {
    files: Mutex<Vec<String>>,
    /// Bytes on the way, per file index: from the start event and from the others.
    arrived: Mutex<BTreeMap<usize, (u64, i64)>>,
    waits: Mutex<Vec<Duration>>,
    causes: Mutex<Vec<String>>,
    waited: std::sync::atomic::AtomicBool,
}

impl Recorder {
    fn waits(&self) -> Vec<u64> {
        self.waits.lock().unwrap().iter().map(Duration::as_secs).collect()
    }

    /// Bytes that were transferred, less those that had to be fetched again.
    fn transferred(&self) -> i64 {
        self.arrived.lock().unwrap().values().map(|(_, bytes)| bytes).sum()
    }

    /// Per file: bytes that were there at the start.
    fn already(&self, file: &str) -> u64 {
        let index = self.files.lock().unwrap().iter().position(|f| f == file).unwrap();
        self.arrived.lock().unwrap()[&index].0
    }
}

impl DownloadProgress for Recorder {
    fn listed(&self, listing: &Listing) {
        *self.files.lock().unwrap() = listing.files.iter().map(|f| f.path.clone()).collect();
    }
    fn started(&self, file: usize, already: u64) {
        self.arrived.lock().unwrap().insert(file, (already, 0));
    }
    fn advanced(&self, file: usize, bytes: u64) {
        self.arrived.lock().unwrap().get_mut(&file).unwrap().1 += bytes as i64;
    }
    fn rewound(&self, file: usize, bytes: u64) {
        self.arrived.lock().unwrap().get_mut(&file).unwrap().1 -= bytes as i64;
    }
    fn waiting(&self, _: usize) {
        self.waited.store(true, Ordering::Relaxed);
    }
    fn retrying(&self, _: Option<usize>, wait: Duration, cause: &HubError) {
        self.waits.lock().unwrap().push(wait);
        self.causes.lock().unwrap().push(cause.to_string());
    }
}
