//! Where files go: the Hugging Face cache, or a plain folder. Both on disk exactly as `huggingface_hub` keeps them.
//!
//! The cache of one repository is `blobs/<etag>` (content), `snapshots/<commit>/<path>` (relative links to it),
//! `refs/<revision>` (a commit) and `trees/<commit>.json` (the listing); content on its way is
//! `blobs/<etag>.incomplete`. In a plain folder the same bookkeeping lies under `.cache/huggingface/`.
//! A repository that goes by two names, because it has moved, has one folder; the other name is a link to it.
//! This module never talks to the network.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use sha1::Digest as _;

use crate::api::Entry;
use crate::files::{beside, create_parent, has_size, write_atomically};
use crate::hasher::Hasher;
use crate::names::is_commit;
use crate::{HubError, RepoId, trees};

/// One repository in a cache folder.
#[derive(Debug)]
pub(crate) struct CachedRepo {
    repo: RepoId,
    paths: CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
}

impl CachedRepo {
    /// The folder of `repo`, or the one that it is a link to: there are the locks, too.
    pub(crate) fn new(cache_dir: &Path, repo: &RepoId) -> CachedRepo {
        let linked = linked_repo(&cache_dir.join(folder_name(repo)));
        let repo = linked.as_ref().unwrap_or(repo);
        let name = folder_name(repo);
        CachedRepo {
            repo: repo.clone(),
            paths: Cache::new(cache_dir.to_owned()).repo(Repo::new(repo.to_string(), RepoType::Model)),
            folder: cache_dir.join(&name),
            locks: cache_dir.join(".locks").join(&name),
        }
    }

    /// The folder of the first of `names` that has one, and before all others one that has `revision`.
    pub(crate) fn find(cache_dir: &Path, names: &[RepoId], revision: &str) -> Option<CachedRepo> {
        let mut there: Vec<_> = names.iter().map(|name| CachedRepo::new(cache_dir, name)).collect();
        there.retain(|repo| repo.folder.is_dir());
        let has =
            |repo: &CachedRepo| repo.cached_commit(revision).is_some_and(|commit| repo.snapshot(&commit).is_dir());
        let best = there.iter().position(has).unwrap_or(0);
        there.into_iter().nth(best)
    }

    /// Makes the folder findable under another name, unless that has a folder of its own.
    fn add_name(&self, name: &RepoId) {
        let link = self.folder.with_file_name(folder_name(name));
        if let Some(target) = self.folder.file_name().filter(|_| fs::symlink_metadata(&link).is_err()) {
            // Without it the other name is only found where the hub can be asked.
            if let Err(error) = st_sys::symlink(Path::new(target), &link) {
                tracing::debug!(%error, link = %link.display(), "no link for the other name");
            }
        }
    }

    /// The folder that `trees/` lies in.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The name that has the folder.
    pub(crate) fn repo(&self) -> &RepoId {
        &self.repo
    }

    /// The folder of a folder for each commit.
    pub(crate) fn snapshots(&self) -> PathBuf {
        self.folder.join("snapshots")
    }

    /// The folder of its locks.
    pub(crate) fn locks(&self) -> &Path {
        &self.locks
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.paths.pointer_path(commit)
    }

    /// The commit `revision` stood for when it was last fetched.
    pub(crate) fn cached_commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let mut text = String::new();
        File::open(self.folder.join("refs").join(revision)).ok()?.take(64).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Records that `revision` stands for `commit`.
    fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit || self.cached_commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_atomically(&self.folder.join("refs").join(revision), commit.as_bytes())
    }
}

fn folder_name(repo: &RepoId) -> String {
    Repo::new(repo.to_string(), RepoType::Model).folder_name()
}

/// The repository whose folder `path` is a link to.
pub(crate) fn linked_repo(path: &Path) -> Option<RepoId> {
    repo_of_folder(fs::read_link(path).ok()?.to_str()?)
}

/// The repository whose folder has this name.
pub(crate) fn repo_of_folder(name: &str) -> Option<RepoId> {
    let (owner, name) = name.strip_prefix("models--")?.split_once("--")?;
    RepoId::owner_and_name(&format!("{owner}/{name}")).ok()
}

/// The destination of one download.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) cache: CachedRepo,
    pub(crate) commit: String,
    /// A plain folder instead of the cache.
    local: Option<PathBuf>,
}

/// The paths that one file passes through.
#[derive(Debug)]
pub(crate) struct FilePaths {
    /// Where the content ends up.
    pub(crate) content: PathBuf,
    /// Where it grows; its length is what has arrived.
    pub(crate) partial: PathBuf,
    pub(crate) lock: PathBuf,
}

/// What is already there of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Under its final name.
    Present,
    /// The content is on this disk, but not under this name: no transfer needed. The bytes count as needed space
    /// where they have to be copied.
    Local {
        /// Whether it takes a copy and not just a link.
        copy: bool,
    },
    /// This many bytes have arrived.
    Partial(u64),
}

impl Place {
    pub(crate) fn new(cache: CachedRepo, commit: String, local: Option<PathBuf>) -> Place {
        Place { cache, commit, local }
    }

    /// What the download returns: the snapshot folder or the plain folder.
    pub(crate) fn root(&self) -> PathBuf {
        self.local.clone().unwrap_or_else(|| self.cache.snapshot(&self.commit))
    }

    /// The folder whose disk receives the bytes.
    pub(crate) fn storage(&self) -> PathBuf {
        self.local.clone().unwrap_or_else(|| self.cache.folder.clone())
    }

    /// Where the listing is kept.
    pub(crate) fn trees(&self) -> PathBuf {
        self.local.as_deref().map_or_else(|| self.cache.folder.clone(), bookkeeping)
    }

    pub(crate) fn slot(&self, entry: &Entry) -> FilePaths {
        let etag = entry.digest.hex();
        match &self.local {
            None => FilePaths {
                content: self.cache.paths.blob_path(etag),
                partial: self.cache.paths.blob_path(&format!("{etag}.incomplete")),
                lock: self.cache.locks.join(format!("{etag}.lock")),
            },
            Some(folder) => {
                let metadata = metadata_path(folder, &entry.path);
                let name = metadata.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let partial = format!("{}.{etag}.incomplete", short_hash(&name));
                FilePaths {
                    content: folder.join(&entry.path),
                    partial: metadata.with_file_name(partial),
                    lock: metadata.with_extension("lock"),
                }
            }
        }
    }

    /// Looks at the disk. May read a whole file where a plain folder has one of unknown origin.
    pub(crate) fn state(&self, entry: &Entry) -> State {
        let slot = self.slot(entry);
        let partial = || State::Partial(fs::metadata(&slot.partial).map_or(0, |m| m.len()).min(entry.size));
        let Some(folder) = &self.local else {
            return if has_size(&self.pointer(entry), entry.size) {
                State::Present
            } else if has_size(&slot.content, entry.size) {
                State::Local { copy: false }
            } else {
                partial()
            };
        };
        if has_size(&slot.content, entry.size) {
            match recorded_etag(folder, &entry.path) {
                Some(etag) if etag == entry.digest.hex() => return State::Present,
                _ if Hasher::of_file(&slot.content, entry).is_ok_and(|hex| hex == entry.digest.hex()) => {
                    return State::Local { copy: false };
                }
                _ => {}
            }
        }
        if self.cached_content(entry).is_some() { State::Local { copy: true } } else { partial() }
    }

    /// The content in the cache, when this place is a plain folder and the cache has it.
    pub(crate) fn cached_content(&self, entry: &Entry) -> Option<PathBuf> {
        let blob = self.cache.paths.blob_path(entry.digest.hex());
        (self.local.is_some() && has_size(&blob, entry.size)).then_some(blob)
    }

    /// Gives verified content its final name.
    pub(crate) fn settle(&self, entry: &Entry, slot: &FilePaths, partial: &Path) -> Result<(), HubError> {
        create_parent(&slot.content)?;
        fs::rename(partial, &slot.content).map_err(HubError::io("rename to", &slot.content))?;
        self.find_as(entry, slot, Blob::New)
    }

    /// Makes content that has its final place findable: the snapshot's link, or the plain folder's metadata.
    pub(crate) fn record(&self, entry: &Entry, slot: &FilePaths) -> Result<(), HubError> {
        self.find_as(entry, slot, Blob::Shared)
    }

    fn find_as(&self, entry: &Entry, slot: &FilePaths, blob: Blob) -> Result<(), HubError> {
        match &self.local {
            None => link(&slot.content, &self.pointer(entry), blob),
            Some(folder) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
                let text = format!("{}\n{}\n{now}\n", self.commit, entry.digest.hex());
                write_atomically(&metadata_path(folder, &entry.path), text.as_bytes())
            }
        }
    }

    /// Called before the first file: the listing, so that others can tell a part from the whole, and the names that the
    /// cache is to know the repository by.
    pub(crate) fn begin(&self, entries: &BTreeMap<String, Entry>, names: &[RepoId]) -> Result<(), HubError> {
        if let Some(folder) = &self.local {
            let ignore = bookkeeping(folder).join(".gitignore");
            if !ignore.exists() {
                write_atomically(&ignore, b"*")?;
            }
        }
        trees::write(&self.trees(), &self.commit, entries)?;
        if self.local.is_none() {
            names.iter().for_each(|name| self.cache.add_name(name));
        }
        Ok(())
    }

    /// Called after the last file: from here on the revision is found in the cache.
    pub(crate) fn conclude(&self, revision: &str) -> Result<(), HubError> {
        if self.local.is_none() { self.cache.write_ref(revision, &self.commit) } else { Ok(()) }
    }

    fn pointer(&self, entry: &Entry) -> PathBuf {
        self.cache.snapshot(&self.commit).join(&entry.path)
    }
}

/// The entity tag noted for a file of a plain folder, unless the file was changed afterwards.
pub(crate) fn recorded_etag(folder: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(metadata_path(folder, file)).ok()?;
    let mut lines = text.lines();
    let (_commit, etag, noted) = (lines.next()?, lines.next()?, lines.next()?.trim().parse::<f64>().ok()?);
    let changed = fs::metadata(folder.join(file)).ok()?.modified().ok()?;
    let changed = changed.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    // File systems round times; the Hugging Face tools allow the same second.
    (changed - 1.0 <= noted).then(|| etag.trim().to_owned())
}

/// Whether others may know a blob by now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Blob {
    New,
    Shared,
}

/// Makes `pointer` a relative link to the blob at `content`, replacing what is there.
fn link(content: &Path, pointer: &Path, blob: Blob) -> Result<(), HubError> {
    create_parent(pointer)?;
    let target = relative(content, pointer.parent().unwrap_or(Path::new("")));
    let beside = beside(pointer);
    match st_sys::symlink(&target, &beside) {
        Ok(()) => fs::rename(&beside, pointer).map_err(|source| {
            let _ = fs::remove_file(&beside);
            HubError::Io { action: "link", path: pointer.to_owned(), source }
        }),
        Err(e) if matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
            without_links(content, pointer, blob)
        }
        Err(source) => Err(HubError::Io { action: "link", path: pointer.to_owned(), source }),
    }
}

/// FAT and exFAT have no links, and on Windows few may make one. As the Hugging Face tools do, the snapshot then holds the file itself: a new
/// one is moved there, one that another snapshot may lead to is copied.
fn without_links(content: &Path, pointer: &Path, blob: Blob) -> Result<(), HubError> {
    match blob {
        Blob::New => fs::rename(content, pointer).map_err(HubError::io("rename to", pointer)),
        Blob::Shared => {
            let beside = beside(pointer);
            fs::copy(content, &beside).and_then(|_| fs::rename(&beside, pointer)).map_err(|source| {
                let _ = fs::remove_file(&beside);
                HubError::Io { action: "copy to", path: pointer.to_owned(), source }
            })
        }
    }
}

/// The path of `to` as seen from the folder `from`; both under a common root, neither with `..` in it.
fn relative(to: &Path, from: &Path) -> PathBuf {
    let to: Vec<Component<'_>> = to.components().collect();
    let from: Vec<Component<'_>> = from.components().collect();
    let common = to.iter().zip(&from).take_while(|(a, b)| a == b).count();
    let up = from[common..].iter().map(|_| Component::ParentDir);
    up.chain(to[common..].iter().copied()).collect()
}

/// Where a plain folder keeps what is known about its files.
fn bookkeeping(folder: &Path) -> PathBuf {
    folder.join(".cache").join("huggingface")
}

fn metadata_path(folder: &Path, file: &str) -> PathBuf {
    let path = bookkeeping(folder).join("download").join(file);
    let whole = path.with_added_extension("metadata");
    // The Hugging Face tools have no notes of a file whose name has no room for more.
    if whole.file_name().is_some_and(|name| name.len() > 255) { st_sys::beside(&path, "", ".metadata") } else { whole }
}

/// URL-safe base64 of the SHA-1, as `huggingface_hub` names partial files of a plain folder.
fn short_hash(name: &str) -> String {
    URL_SAFE.encode(sha1::Sha1::digest(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_links_a_snapshot_holds_the_file_itself() {
        let folder = tempfile::tempdir().unwrap();
        let [content, first, second] = ["blob", "first", "second"].map(|name| folder.path().join(name));
        fs::write(&content, "weights").unwrap();
        without_links(&content, &first, Blob::Shared).unwrap();
        assert_eq!((fs::read(&first).unwrap(), content.exists()), (b"weights".to_vec(), true));
        without_links(&content, &second, Blob::New).unwrap();
        assert_eq!((fs::read(&second).unwrap(), content.exists()), (b"weights".to_vec(), false));
        assert!(without_links(&content, &second, Blob::Shared).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn links_are_relative() {
        let from = Path::new("/c/models--a--b/snapshots/1234/sub");
        assert_eq!(relative(Path::new("/c/models--a--b/blobs/ab"), from), Path::new("../../../blobs/ab"));
        assert_eq!(relative(Path::new("c/blobs/ab"), Path::new("c/snapshots/1")), Path::new("../../blobs/ab"));
    }

    #[test]
    fn short_hash_is_the_one_of_huggingface_hub() {
        // python: base64.urlsafe_b64encode(hashlib.sha1(b"config.json.metadata").digest())
        assert_eq!(short_hash("config.json.metadata"), "8_PA_wEVGiVa2goH2H4KQOQpvVY=");
    }

    #[test]
    fn a_reference_is_believed_only_if_it_is_a_commit() {
        let folder = tempfile::tempdir().unwrap();
        let repo = CachedRepo::new(folder.path(), &RepoId::parse("a/b").unwrap());
        assert_eq!(repo.folder(), folder.path().join("models--a--b"));
        assert_eq!(repo.cached_commit("main"), None);
        let commit = "0123456789012345678901234567890123456789";
        repo.write_ref("refs/pr/1", commit).unwrap();
        assert_eq!(repo.cached_commit("refs/pr/1").as_deref(), Some(commit));
        fs::write(repo.folder().join("refs/main"), "../../../etc").unwrap();
        assert_eq!(repo.cached_commit("main"), None);
        assert_eq!(repo.cached_commit(commit).as_deref(), Some(commit));
    }

    #[test]
    fn a_folder_has_all_the_names_it_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let [old, new, other] = ["a/old", "b/new", "c/other"].map(|name| RepoId::parse(name).unwrap());
        let there = CachedRepo::new(folder.path(), &old);
        assert!(CachedRepo::find(folder.path(), &[new.clone(), old.clone()], "main").is_none());
        fs::create_dir(there.folder()).unwrap();
        there.add_name(&new);
        there.add_name(&old);
        let found = CachedRepo::find(folder.path(), &[other.clone(), new.clone()], "main").unwrap();
        assert_eq!((&found.folder, &found.locks), (&there.folder, &there.locks));
        assert_eq!(fs::read_link(folder.path().join("models--b--new")).unwrap(), Path::new("models--a--old"));
        // Two folders from other tools: the one that has the revision.
        let commit = "0123456789012345678901234567890123456789";
        let second = CachedRepo::new(folder.path(), &other);
        fs::create_dir_all(second.snapshot(commit)).unwrap();
        second.write_ref("main", commit).unwrap();
        assert_eq!(CachedRepo::find(folder.path(), &[new, other], "main").unwrap().folder, second.folder);
    }
}
