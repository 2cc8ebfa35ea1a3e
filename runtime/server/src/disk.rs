//! Texts that outlive the server: snapshots in a folder, found by their tokens.
//!
//! Owns which files are there: those of use last, up to a size. Each is written beside its name and renamed, summed, and compared
//! when it is read; one that cannot be used is as if it were not there. Files that are no snapshots are left alone.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use st_gguf::{Kind, OutputFile, begins_with};
use st_model::{Engine, SNAPSHOT_MAGIC, Sequence, SnapshotError};

use crate::prefix::common;

/// What a snapshot's file is called.
const EXTENSION: &str = "stkv";
/// Shorter texts are computed as fast as they are read.
const WORTH_KEEPING: usize = 64;

const SNAPSHOT: Kind = Kind { name: "a snapshot", recognizes: |bytes| begins_with(bytes, SNAPSHOT_MAGIC) };

/// The snapshots of one folder.
pub(crate) struct Disk {
    folder: PathBuf,
    /// Bytes of all files, at most.
    most: u64,
    stored: Vec<Stored>,
}

struct Stored {
    path: PathBuf,
    /// None of another model's.
    tokens: Option<Vec<u32>>,
    bytes: u64,
    used: SystemTime,
}

/// There are no pages for a text.
#[derive(Debug)]
pub(crate) struct NoPages;

/// Reading or writing on a thread of its own.
struct Apart<T>(Receiver<Result<T, SnapshotError>>);

impl<T: Send + 'static> Apart<T> {
    fn new(work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static) -> Self {
        let (teller, told) = channel();
        // Without a thread nothing is told, and it is as if there were no file.
        let _ = thread::Builder::new().name("snapshot".to_owned()).spawn(move || teller.send(work()));
        Self(told)
    }

    /// What came of it, once it has; waits for so long, at most. Nothing comes of it where there is no thread.
    fn wait(&self, time: Duration) -> Option<Option<Result<T, SnapshotError>>> {
        match self.0.recv_timeout(time) {
            Ok(done) => Some(Some(done)),
            Err(RecvTimeoutError::Disconnected) => Some(None),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }
}

/// A snapshot that is being read.
pub(crate) struct Loading {
    pub(crate) path: PathBuf,
    work: Apart<Sequence>,
}

impl Loading {
    /// What was read, once it is.
    pub(crate) fn done(&self) -> Option<Option<Result<Sequence, SnapshotError>>> {
        self.work.wait(Duration::ZERO)
    }
}

/// A snapshot that is being written.
pub(crate) struct Saving {
    path: PathBuf,
    tokens: Vec<u32>,
    bytes: u64,
    work: Apart<()>,
}

impl Saving {
    /// What came of it, once it has; waits for so long, at most.
    pub(crate) fn wait(&self, time: Duration) -> Option<Option<Result<(), SnapshotError>>> {
        self.work.wait(time)
    }
}

impl Disk {
    /// The snapshots in `folder`, which is made where it is not there, for texts of `engine`.
    ///
    /// # Errors
    /// Where the folder cannot be made or read.
    pub(crate) fn open(folder: &Path, most: u64, engine: &Engine) -> io::Result<Self> {
        st_sys::create_private_folder(folder)?;
        let mut stored = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                stored.extend(Self::look_at(path, engine));
            }
        }
        let mut disk = Self { folder: folder.to_owned(), most, stored };
        disk.keep_within(0);
        Ok(disk)
    }

    /// What a file holds; `None` where it is no snapshot, or a broken one, which is removed.
    fn look_at(path: PathBuf, engine: &Engine) -> Option<Stored> {
        let file = File::open(&path).ok()?;
        let about = file.metadata().ok()?;
        let used = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let stored = |tokens| Some(Stored { path: path.clone(), tokens, bytes: about.len(), used });
        match engine.snapshot_tokens(BufReader::new(file)) {
            Ok(tokens) => stored(Some(tokens)),
            Err(SnapshotError::Other | SnapshotError::Context { .. }) => stored(None),
            Err(SnapshotError::Damaged(_)) if is_snapshot(&path) => {
                let _ = fs::remove_file(&path);
                None
            }
            Err(_) => None,
        }
    }

    /// How much of `prompt` a snapshot may have, beyond `least` tokens; its index.
    pub(crate) fn find(&self, prompt: &[u32], least: usize, engine: &Engine) -> Option<usize> {
        let most = prompt.len().saturating_sub(1);
        let shares = |stored: &Stored| {
            let tokens = stored.tokens.as_deref()?;
            let kept = engine.snapshot_keeps(tokens.len(), common(tokens, prompt).min(most));
            (kept > least + WORTH_KEEPING).then_some(kept)
        };
        let all = self.stored.iter().enumerate();
        all.filter_map(|(index, stored)| Some((shares(stored)?, index))).max().map(|(_, index)| index)
    }

    /// Begins to read the text of a snapshot, on a thread of its own: others go on meanwhile.
    pub(crate) fn load(&self, index: usize, engine: &Arc<Engine>) -> Loading {
        let (path, engine) = (self.stored[index].path.clone(), Arc::clone(engine));
        let from = path.clone();
        let read = move || {
            let file = File::open(&from)?;
            let sequence = engine.restore(BufReader::with_capacity(1 << 20, &file))?;
            // That it was of use is told to those who come after; it matters little where that fails.
            let _ = file.set_modified(SystemTime::now());
            Ok(sequence)
        };
        Loading { path, work: Apart::new(read) }
    }

    /// The text that was read; `None` where it cannot be gone on from.
    ///
    /// # Errors
    /// [`NoPages`] where nothing is wrong with the file.
    pub(crate) fn loaded(
        &mut self,
        path: &Path,
        read: Option<Result<Sequence, SnapshotError>>,
    ) -> Result<Option<Sequence>, NoPages> {
        let place = self.stored.iter().position(|stored| stored.path == path);
        match (read, place) {
            (Some(Ok(sequence)), place) => {
                place.into_iter().for_each(|index| self.stored[index].used = SystemTime::now());
                Ok(Some(sequence))
            }
            (Some(Err(SnapshotError::Pages(_))), _) => Err(NoPages),
            (Some(Err(_)), Some(index)) => {
                let stored = self.stored.swap_remove(index);
                if is_snapshot(&stored.path) {
                    let _ = fs::remove_file(stored.path);
                }
                Ok(None)
            }
            (Some(Err(_)) | None, _) => Ok(None),
        }
    }

    /// Begins to write a snapshot, on a thread of its own; `None` where one is there, or it is not worth it.
    pub(crate) fn save(&mut self, sequence: &Sequence, engine: &Arc<Engine>) -> Option<Saving> {
        let tokens = sequence.tokens().to_vec();
        let bytes = engine.snapshot_bytes(sequence);
        let there = |stored: &Stored| stored.tokens.as_ref() == Some(&tokens);
        if tokens.len() < WORTH_KEEPING || bytes > self.most || self.stored.iter().any(there) {
            return None;
        }
        self.keep_within(bytes);
        let mut hash = Sha256::new();
        tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        let hash: String = hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.folder.join(format!("{hash}.{EXTENSION}"));
        let (engine, sequence, to) = (Arc::clone(engine), sequence.fork(), path.clone());
        let write = move || {
            let io = |error: st_gguf::GgufError| SnapshotError::Io(io::Error::other(error));
            let mut file = OutputFile::create(&to, SNAPSHOT, true).map_err(io)?;
            engine.save(&sequence, BufWriter::with_capacity(1 << 20, &mut file))?;
            file.finish().map_err(io)?;
            Ok(())
        };
        Some(Saving { path, tokens, bytes, work: Apart::new(write) })
    }

    /// A snapshot was written, or was not.
    ///
    /// # Errors
    /// What writing met.
    pub(crate) fn saved(
        &mut self,
        saving: &Saving,
        written: Option<Result<(), SnapshotError>>,
    ) -> Result<(), SnapshotError> {
        let Some(written) = written else { return Ok(()) };
        written?;
        let Saving { path, tokens, bytes, .. } = saving;
        self.stored.retain(|stored| stored.path != *path);
        self.stored.push(Stored {
            path: path.clone(),
            tokens: Some(tokens.clone()),
            bytes: *bytes,
            used: SystemTime::now(),
        });
        Ok(())
    }

    /// Removes what was of no use for the longest time, until there is room for `more` bytes.
    fn keep_within(&mut self, more: u64) {
        while !self.stored.is_empty() && self.bytes().saturating_add(more) > self.most {
            let oldest = self.stored.iter().enumerate().min_by_key(|(_, stored)| stored.used);
            let Some(index) = oldest.map(|(index, _)| index) else { return };
            let stored = self.stored.swap_remove(index);
            if is_snapshot(&stored.path) {
                let _ = fs::remove_file(stored.path);
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.stored.iter().map(|stored| stored.bytes).sum()
    }

    /// Files, and their bytes.
    pub(crate) fn size(&self) -> (usize, u64) {
        (self.stored.len(), self.bytes())
    }
}

/// Whether a file begins like a snapshot: nothing else is ever removed.
fn is_snapshot(path: &Path) -> bool {
    File::open(path).is_ok_and(|mut file| begins_with(&mut file, SNAPSHOT_MAGIC).unwrap_or(false))
}
