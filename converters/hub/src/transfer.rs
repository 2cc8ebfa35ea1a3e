//! One file from the hub to a partial file that is complete and proven: resumed, retried, hashed on the way.
//!
//! The partial file's length is the only record of progress, so an attempt can end at any byte, by a cut or by Ctrl-C,
//! and the next one goes on from there. Nothing waits for the disk: what a power failure takes away is missing from
//! the file's length, and lengths are checked before every use. Bytes are hashed by a second thread while the next
//! ones arrive; memory is a handful of fixed buffers whatever the file's size.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use ureq::Body;
use ureq::http::{StatusCode, header};

use crate::api::{Digest, Entry, resolve_url};
use crate::files::{create_parent, free_space};
use crate::hasher::Hasher;
use crate::http::{Answer, Client, Failure, Subject, What, bad_response};
use crate::part::parse_content_range;
use crate::{DownloadProgress, HubError, RepoId};

/// Size of one buffer between the socket, the file and the hash.
const CHUNK: usize = 512 << 10;
/// Buffers in flight per file.
const CHUNKS: usize = 6;

/// What the hashing thread is sent.
enum Piece {
    Bytes(Vec<u8>, usize),
    /// Forget everything: the file starts again from its first byte.
    Restart,
}

/// The near end of the hashing thread: gives out empty buffers and takes full ones.
struct HashQueue {
    full: SyncSender<Piece>,
    empty: Receiver<Vec<u8>>,
}

impl HashQueue {
    fn buffer(&self) -> Vec<u8> {
        // The far end only hangs up by panicking, which the join reports.
        self.empty.recv().unwrap_or_else(|_| vec![0; CHUNK])
    }

    fn send(&self, piece: Piece) {
        // As above.
        let _ = self.full.send(piece);
    }
}

/// One file's way from the hub to `partial`.
pub(crate) struct Transfer<'a> {
    pub(crate) client: &'a Client<'a>,
    pub(crate) repo: &'a RepoId,
    pub(crate) commit: &'a str,
    pub(crate) entry: &'a Entry,
    /// Index for `progress`.
    pub(crate) index: usize,
    pub(crate) partial: &'a Path,
    pub(crate) progress: &'a dyn DownloadProgress,
}

impl Transfer<'_> {
    /// Completes and proves the partial file. On an error it keeps what has arrived, unless that is proven wrong.
    pub(crate) fn run(&self) -> Result<(), HubError> {
        create_parent(self.partial)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.partial)
            .map_err(HubError::io("open", self.partial))?;
        let mut arrived = file.metadata().map_err(HubError::io("read", self.partial))?.len();
        if arrived > self.entry.size {
            self.truncate(&file)?;
            arrived = 0;
        }
        self.progress.started(self.index, arrived);
        let first = self.complete(&file, arrived)?;
        if first == self.entry.digest.hex() {
            return Ok(());
        }
        // What an earlier run left may be at fault, or a proxy in between: one more time, and from the first byte.
        tracing::warn!(file = self.entry.path, got = first, "wrong content; fetching it again");
        self.truncate(&file)?;
        self.progress.rewound(self.index, self.entry.size);
        let second = self.complete(&file, 0)?;
        if second == self.entry.digest.hex() {
            return Ok(());
        }
        self.truncate(&file)?;
        Err(HubError::Digest {
            file: self.entry.path.clone(),
            algorithm: match self.entry.digest {
                Digest::Sha256(_) => "sha256",
                Digest::GitSha1(_) => "git sha1",
            },
            expected: self.entry.digest.hex().to_owned(),
            got: second,
        })
    }

    /// Fetches what is missing, attempt after attempt; returns the hash of the whole.
    fn complete(&self, file: &File, arrived: u64) -> Result<String, HubError> {
        let (full, far_full) = sync_channel(CHUNKS);
        let (far_empty, empty) = sync_channel(CHUNKS);
        for _ in 0..CHUNKS {
            let _ = far_empty.send(vec![0; CHUNK]);
        }
        thread::scope(|scope| {
            let hash = move || {
                let mut hasher = Hasher::new(self.entry);
                for piece in far_full {
                    match piece {
                        Piece::Bytes(buffer, len) => {
                            hasher.update(&buffer[..len]);
                            let _ = far_empty.send(buffer);
                        }
                        Piece::Restart => hasher = Hasher::new(self.entry),
                    }
                }
                hasher.hex()
            };
            let hashing = thread::Builder::new().spawn_scoped(scope, hash).map_err(HubError::Thread)?;
            let queue = HashQueue { full, empty };
            self.hash_existing(file, arrived, &queue)?;
            self.fetch_rest(file, arrived, &queue)?;
            drop(queue);
            match hashing.join() {
                Ok(hex) => Ok(hex),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn hash_existing(&self, file: &File, arrived: u64, queue: &HashQueue) -> Result<(), HubError> {
        let mut at = 0;
        while at < arrived {
            if self.client.stopped() {
                return Err(HubError::Cancelled);
            }
            let mut buffer = queue.buffer();
            let wanted = buffer.len().min(usize::try_from(arrived - at).unwrap_or(usize::MAX));
            st_sys::read_exact_at(file, &mut buffer[..wanted], at).map_err(HubError::io("read", self.partial))?;
            queue.send(Piece::Bytes(buffer, wanted));
            at += wanted as u64;
        }
        Ok(())
    }

    fn fetch_rest(&self, file: &File, mut at: u64, queue: &HashQueue) -> Result<(), HubError> {
        let mut attempt = 0;
        let notify = |wait: Duration, cause: &HubError| self.progress.retrying(Some(self.index), wait, cause);
        while at < self.entry.size {
            let before = at;
            let Err(failure) = self.attempt(file, &mut at, queue) else { continue };
            if at > before {
                attempt = 0;
            }
            self.client.wait_to_retry(failure, &mut attempt, &notify)?;
        }
        Ok(())
    }

    /// One request, and as much of its answer as arrives. `at` is where the file stands, before and after.
    fn attempt(&self, file: &File, at: &mut u64, queue: &HashQueue) -> Result<(), Failure> {
        let entry = self.entry;
        let subject = Subject { repo: self.repo, revision: self.commit, what: What::File(&entry.path) };
        let url = resolve_url(self.client.endpoint(), self.repo, self.commit, &entry.path);
        let mut answer = self.client.get(&url, Some(*at).filter(|at| *at > 0), &subject)?;
        self.check_identity(&answer)?;
        if *at > 0 && !self.continues(&answer, *at) {
            // Not the bytes that were asked for: all of them, or none, or others. An answer with all is of use.
            tracing::debug!(file = entry.path, "the server ignores Range; starting over");
            self.truncate(file)?;
            self.progress.rewound(self.index, *at);
            queue.send(Piece::Restart);
            *at = 0;
            if answer.response.status() != StatusCode::OK {
                answer = self.client.get(&url, None, &subject)?;
                self.check_identity(&answer)?;
            }
        }
        let expected = entry.size - *at;
        if *at == 0 && answer.response.status() != StatusCode::OK {
            return Err(bad_response(&answer.url, "a partial answer to a request for all").into());
        }
        if let Some(announced) = answer.response.body().content_length().filter(|n| *n != expected) {
            if *at == 0 && is_lfs_pointer(answer.response.into_body()) {
                return Err(HubError::LfsPointer { file: entry.path.clone(), host: answer.host }.into());
            }
            return Err(HubError::Size { file: entry.path.clone(), expected: entry.size, got: *at + announced }.into());
        }
        self.receive(file, at, answer, queue)
    }

    /// Refuses an answer that is, by the hub's own words, another file than the listing names.
    fn check_identity(&self, answer: &Answer) -> Result<(), HubError> {
        let entry = self.entry;
        if let Some(got) = answer.linked_size.filter(|size| *size != entry.size) {
            return Err(HubError::Size { file: entry.path.clone(), expected: entry.size, got });
        }
        if let Some(got) = answer.linked_etag.as_deref().filter(|etag| *etag != entry.digest.hex()) {
            return Err(HubError::Changed {
                file: entry.path.clone(),
                expected: entry.digest.hex().to_owned(),
                got: got.to_owned(),
            });
        }
        Ok(())
    }

    /// Whether the answer is the rest of the file from byte `at`.
    fn continues(&self, answer: &Answer, at: u64) -> bool {
        let range = answer.response.headers().get(header::CONTENT_RANGE).and_then(|v| v.to_str().ok());
        answer.response.status() == StatusCode::PARTIAL_CONTENT
            && range.and_then(parse_content_range).is_some_and(|(first, last, total)| {
                first == at && last + 1 == self.entry.size && total.is_none_or(|total| total == self.entry.size)
            })
    }

    fn receive(&self, file: &File, at: &mut u64, answer: Answer, queue: &HashQueue) -> Result<(), Failure> {
        let (entry, host) = (self.entry, answer.host);
        let mut body = answer.response.into_body().into_reader();
        while *at < entry.size {
            let mut buffer = queue.buffer();
            let wanted = buffer.len().min(usize::try_from(entry.size - *at).unwrap_or(usize::MAX));
            let (filled, ended) = self.fill(&mut body, &mut buffer[..wanted]);
            st_sys::write_all_at(file, &buffer[..filled], *at).map_err(|e| self.write_failure(*at, e))?;
            queue.send(Piece::Bytes(buffer, filled));
            *at += filled as u64;
            if let Some(error) = ended {
                return Err(self.client.read_failure(&host, &entry.path, *at, error));
            }
        }
        // Only an answer without a stated length can have more: then it is another file.
        match body.read(&mut [0]) {
            Ok(0) | Err(_) => Ok(()),
            Ok(_) => Err(HubError::Size { file: entry.path.clone(), expected: entry.size, got: entry.size + 1 }.into()),
        }
    }

    /// Reads until the buffer is full, so that few large pieces are passed on; says what ended it before that.
    fn fill(&self, body: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<io::Error>) {
        let mut filled = 0;
        while filled < buffer.len() {
            if self.client.stopped() {
                return (filled, Some(io::ErrorKind::Interrupted.into()));
            }
            match body.read(&mut buffer[filled..]) {
                Ok(0) => return (filled, Some(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    filled += n;
                    self.progress.advanced(self.index, n as u64);
                }
                Err(error) => return (filled, Some(error)),
            }
        }
        (filled, None)
    }

    fn write_failure(&self, at: u64, source: io::Error) -> HubError {
        let path = self.partial.to_owned();
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            let free = free_space(&path).unwrap_or(0);
            return HubError::NoSpace { path, needed: self.entry.size - at, free };
        }
        HubError::Io { action: "write", path, source }
    }

    fn truncate(&self, file: &File) -> Result<(), HubError> {
        file.set_len(0).map_err(HubError::io("truncate", self.partial))
    }
}

/// Whether an answer that has the wrong length is the text that git stores in place of a large file.
fn is_lfs_pointer(body: Body) -> bool {
    const BEGINNING: &[u8] = b"version https://git-lfs.github.com/spec/";
    let mut begins = Vec::with_capacity(BEGINNING.len());
    // Whatever else goes wrong here, the length is wrong as well.
    let read = body.into_reader().take(BEGINNING.len() as u64).read_to_end(&mut begins);
    read.is_ok() && begins == BEGINNING
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "hello\n").unwrap();
        // printf 'hello\n' | git hash-object --stdin
        let git = Entry::checked("x".into(), 6, "ce013625030ba8dba906f756967f9e9ca394464a".into(), None, None).unwrap();
        assert_eq!(Hasher::of_file(&path, &git).unwrap(), git.digest.hex());
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let lfs = Entry::checked("x".into(), 0, String::new(), Some((sha256.into(), 6)), None).unwrap();
        assert_eq!(Hasher::of_file(&path, &lfs).unwrap(), sha256);
    }
}
