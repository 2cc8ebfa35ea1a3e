//! What a cache holds: its repositories and their files, how large they are, when they were used, and removing them.
//!
//! Asks nobody. What another process is fetching is not removed.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::cache::{CachedRepo, linked_repo, repo_of_folder};
use crate::lock::FileLock;
use crate::{Hub, HubError, ListedFile, RepoId};

/// How deep folders are looked into.
const DEPTH: usize = 8;

/// A repository in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldRepo {
    /// Its name.
    pub repo: RepoId,
    /// Bytes that it takes, with what has arrived of files that are not whole.
    pub bytes: u64,
    /// The files of the commit that `main` stands for, or of the latest one.
    pub files: Vec<HeldFile>,
}

/// A whole file in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldFile {
    /// Path inside the repository.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes.
    pub bytes: u64,
    /// When it was last read, as far as the system notes that.
    pub last_used: Option<SystemTime>,
}

impl HeldRepo {
    /// The files as a listing has them.
    pub fn listed(&self) -> Vec<ListedFile> {
        let listed = |file: &HeldFile| ListedFile { path: file.name.clone(), size: file.bytes, on_disk: file.bytes };
        self.files.iter().map(listed).collect()
    }
}

impl HeldFile {
    fn new(name: String, path: PathBuf) -> Option<HeldFile> {
        let metadata = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?;
        let last_used = metadata.accessed().or_else(|_| metadata.modified()).ok();
        Some(HeldFile { name, path, bytes: metadata.len(), last_used })
    }
}

impl Hub {
    /// Every repository that the cache holds anything of, by name.
    ///
    /// # Errors
    /// [`HubError::Io`] where the cache is there and cannot be read.
    pub fn held(&self) -> Result<Vec<HeldRepo>, HubError> {
        let cache = &self.config.cache_dir;
        let mut held = Vec::new();
        for name in names_in(cache)? {
            let path = cache.join(&name);
            let Some(repo) = name.to_str().and_then(repo_of_folder) else { continue };
            // One that has moved is listed under the name that has the folder.
            if linked_repo(&path).is_none() && path.is_dir() {
                held.push(self.held_repo(repo)?);
            }
        }
        held.sort_by(|a, b| a.repo.as_str().cmp(b.repo.as_str()));
        Ok(held)
    }

    /// What the cache holds of `repo` under any of its names; `None` where it holds nothing.
    ///
    /// # Errors
    /// As [`Hub::held`].
    pub fn held_of(&self, repo: &RepoId) -> Result<Option<HeldRepo>, HubError> {
        match CachedRepo::find(&self.config.cache_dir, &repo.names(), "main") {
            Some(cached) => self.held_repo(cached.repo().clone()).map(Some),
            None => Ok(None),
        }
    }

    fn held_repo(&self, repo: RepoId) -> Result<HeldRepo, HubError> {
        let cached = CachedRepo::new(&self.config.cache_dir, &repo);
        let bytes = files_below(&cached.folder().join("blobs"))?
            .iter()
            .chain(&files_below(&cached.snapshots())?)
            .filter_map(|(_, path)| fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file))
            .map(|metadata| metadata.len())
            .fold(0, u64::saturating_add);
        let files = match latest_snapshot(&cached)? {
            Some(snapshot) => {
                let files = files_below(&snapshot)?.into_iter();
                files.filter_map(|(name, path)| HeldFile::new(name, path)).collect()
            }
            None => Vec::new(),
        };
        Ok(HeldRepo { repo, bytes, files })
    }

    /// The folder of `repo` under any of its names.
    fn cached_repo(&self, repo: &RepoId) -> CachedRepo {
        let cache = &self.config.cache_dir;
        CachedRepo::find(cache, &repo.names(), "main").unwrap_or_else(|| CachedRepo::new(cache, repo))
    }

    /// Removes all that the cache holds of `repo`.
    ///
    /// # Errors
    /// [`HubError::Busy`] where another process is fetching some of it; [`HubError::Io`].
    pub fn remove(&self, repo: &RepoId) -> Result<(), HubError> {
        let cached = self.cached_repo(repo);
        let _locks = hold_all(&cached)?;
        for name in names_in(&self.config.cache_dir)? {
            let link = self.config.cache_dir.join(&name);
            if linked_repo(&link).is_some_and(|to| to == *cached.repo()) {
                fs::remove_file(&link).map_err(HubError::io("remove", &link))?;
            }
        }
        fs::remove_dir_all(cached.folder()).map_err(HubError::io("remove", cached.folder()))
    }

    /// Removes files of `repo` by their paths inside it, and their content where no other name has it.
    ///
    /// # Errors
    /// As [`Hub::remove`].
    pub fn remove_files(&self, repo: &RepoId, names: &[String]) -> Result<(), HubError> {
        let cached = self.cached_repo(repo);
        let _locks = hold_all(&cached)?;
        let mut contents = HashSet::new();
        for (snapshot, path) in files_below(&cached.snapshots())? {
            // The first folder is the commit.
            if snapshot.split_once('/').is_some_and(|(_, name)| names.iter().any(|wanted| wanted == name)) {
                contents.extend(fs::canonicalize(&path).ok().filter(|content| *content != path));
                fs::remove_file(&path).map_err(HubError::io("remove", &path))?;
            }
        }
        for (_, path) in files_below(&cached.snapshots())? {
            if let Ok(content) = fs::canonicalize(&path) {
                contents.remove(&content);
            }
        }
        for content in contents {
            fs::remove_file(&content).map_err(HubError::io("remove", &content))?;
        }
        Ok(())
    }
}

/// The snapshot of `main`, or the one that was made last.
fn latest_snapshot(cached: &CachedRepo) -> Result<Option<PathBuf>, HubError> {
    if let Some(main) = cached.cached_commit("main").map(|commit| cached.snapshot(&commit)).filter(|path| path.is_dir())
    {
        return Ok(Some(main));
    }
    let snapshots = cached.snapshots();
    let made = |path: &PathBuf| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    Ok(names_in(&snapshots)?.into_iter().map(|name| snapshots.join(name)).filter(|path| path.is_dir()).max_by_key(made))
}

/// Holds the lock of everything of `cached` that may be fetched, or says that somebody else does.
fn hold_all(cached: &CachedRepo) -> Result<Vec<FileLock>, HubError> {
    let busy = |error| match error {
        HubError::Cancelled => HubError::Busy { repo: cached.repo().to_string() },
        other => other,
    };
    let locks = files_below(cached.locks())?.into_iter().filter(|(name, _)| name.ends_with(".lock"));
    locks.map(|(_, path)| FileLock::acquire(&path, || {}, || true).map_err(busy)).collect()
}

/// The names in a folder; none where there is no such folder.
fn names_in(folder: &Path) -> Result<Vec<std::ffi::OsString>, HubError> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(HubError::io("read", folder))?.file_name())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(HubError::io("read", folder)(error)),
    }
}

/// All files and links below a folder, in order, by their paths from there with `/`. Names that are no text are none that a
/// repository has.
fn files_below(folder: &Path) -> Result<Vec<(String, PathBuf)>, HubError> {
    let mut found = Vec::new();
    let mut folders = vec![(String::new(), folder.to_owned(), 0)];
    while let Some((prefix, folder, depth)) = folders.pop() {
        for name in names_in(&folder)? {
            let path = folder.join(&name);
            let Some(name) = name.to_str().map(|name| format!("{prefix}{name}")) else { continue };
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() && depth < DEPTH => {
                    folders.push((format!("{name}/"), path, depth + 1))
                }
                Ok(metadata) if !metadata.is_dir() => found.push((name, path)),
                _ => {}
            }
        }
    }
    found.sort();
    Ok(found)
}
