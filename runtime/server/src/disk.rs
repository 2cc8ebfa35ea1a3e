//! Texts that outlive the server: snapshots in a folder, found by their tokens.
//!
//! Owns which files are there: those of use last, up to a size. Each is written beside its name and renamed, summed, and compared
//! when it is read; one that cannot be used is as if it were not there. Files that are no snapshots are left alone.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

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

    /// The text of a snapshot; `None` where it cannot be gone on from.
    pub(crate) fn load(&mut self, index: usize, engine: &Engine) -> Option<Sequence> {
        let stored = &mut self.stored[index];
        let read = File::open(&stored.path).map_err(SnapshotError::from).and_then(|file| {
            let sequence = engine.restore(BufReader::with_capacity(1 << 20, &file))?;
            stored.used = SystemTime::now();
            // That it was of use is told to those who come after; it matters little where that fails.
            let _ = file.set_modified(stored.used);
            Ok(sequence)
        });
        match read {
            Ok(sequence) => Some(sequence),
            // Nothing is wrong with the file.
            Err(SnapshotError::Pages(_)) => None,
            Err(_) => {
                let stored = self.stored.swap_remove(index);
                if is_snapshot(&stored.path) {
                    let _ = fs::remove_file(stored.path);
                }
                None
            }
        }
    }

    /// Writes a snapshot, unless one serves as well or it is not worth it. Those that it serves better than are removed.
    ///
    /// # Errors
    /// What writing meets.
    pub(crate) fn save(&mut self, sequence: &Sequence, engine: &Engine) -> Result<(), SnapshotError> {
        let tokens = sequence.tokens();
        let bytes = engine.snapshot_bytes(sequence);
        let there = |stored: &Stored| stored.tokens.as_deref() == Some(tokens);
        if tokens.len() < WORTH_KEEPING || bytes > self.most || self.stored.iter().any(there) {
            return Ok(());
        }
        self.keep_within(bytes);
        let mut hash = Sha256::new();
        tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        let hash: String = hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.folder.join(format!("{hash}.{EXTENSION}"));
        let io = |error: st_gguf::GgufError| SnapshotError::Io(io::Error::other(error));
        let mut file = OutputFile::create(&path, SNAPSHOT, true).map_err(io)?;
        engine.save(sequence, BufWriter::with_capacity(1 << 20, &mut file))?;
        file.finish().map_err(io)?;
        self.stored.retain(|stored| stored.path != path);
        self.stored.push(Stored { path, tokens: Some(tokens.to_vec()), bytes, used: SystemTime::now() });
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
