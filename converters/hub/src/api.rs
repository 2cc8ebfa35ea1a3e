//! What the hub says about a repository: the commit a revision stands for, and every file's size and content hash.
//!
//! All of it is checked before it is believed: hashes become file names and paths become paths.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use hf_hub::{Repo, RepoType};
use serde::Deserialize;

use crate::address::join;
use crate::http::{Client, Subject, What, bad_response};
use crate::names::{check_file_name, encode_path, is_commit, is_hex};
use crate::{HubError, RepoId};

/// Largest answer that is read into memory: a listing page of a very large repository is a few MiB.
const MAX_JSON: u64 = 64 << 20;
/// Pages of a listing before it is taken for endless; a page has up to 1000 files.
const MAX_PAGES: usize = 1000;

/// How the content of a file is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Digest {
    /// SHA-256 of the content, stated for large files.
    Sha256(String),
    /// SHA-1 of git's blob header and the content, stated for all others.
    GitSha1(String),
}

impl Digest {
    /// The hash, which is also the entity tag and the name of the blob in the cache.
    pub(crate) fn hex(&self) -> &str {
        match self {
            Digest::Sha256(hex) | Digest::GitSha1(hex) => hex,
        }
    }
}

/// One file of a repository at a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Path inside the repository, checked where it is going to be used as a path.
    pub(crate) path: String,
    pub(crate) size: u64,
    pub(crate) digest: Digest,
    /// The git object, of the file itself or of its pointer.
    pub(crate) blob_id: String,
    /// Address in the hub's chunk store, kept for the Hugging Face tools that read the same listing.
    pub(crate) xet_hash: Option<String>,
}

impl Entry {
    /// Builds an entry from fields as they were stated; `None` where a hash is not one.
    pub(crate) fn checked(
        path: String,
        size: u64,
        blob_id: String,
        lfs: Option<(String, u64)>,
        xet_hash: Option<String>,
    ) -> Option<Entry> {
        let xet_hash = xet_hash.filter(|hash| is_hex(hash, 64));
        let (size, digest) = match lfs {
            Some((sha256, size)) if is_hex(&sha256, 64) => (size, Digest::Sha256(sha256)),
            None if is_hex(&blob_id, 40) => (size, Digest::GitSha1(blob_id.clone())),
            _ => return None,
        };
        Some(Entry { path, size, digest, blob_id, xet_hash })
    }
}

/// What the hub says about a repository at a revision.
#[derive(Debug)]
pub(crate) struct Info {
    /// The commit that the revision stands for now.
    pub(crate) commit: String,
    /// The name that the hub has for the repository, which may have moved since it was given the one that was asked for.
    pub(crate) name: RepoId,
}

#[derive(Deserialize)]
struct InfoAnswer {
    sha: String,
    id: Option<String>,
}

#[derive(Deserialize)]
struct TreeItem {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    lfs: Option<TreeLfs>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct TreeLfs {
    oid: String,
    size: u64,
}

/// Requests about one repository.
pub(crate) struct Api<'a> {
    pub(crate) client: &'a Client<'a>,
    pub(crate) repo: &'a RepoId,
    pub(crate) notify: &'a dyn Fn(Duration, &HubError),
}

impl Api<'_> {
    /// What `revision` stands for now.
    pub(crate) fn info(&self, revision: &str) -> Result<Info, HubError> {
        // `api_url` escapes the slashes, and nothing else.
        let repo = Repo::with_revision(self.repo.to_string(), RepoType::Model, encode_path(revision));
        let url = format!("{}/api/{}", self.client.endpoint(), repo.api_url());
        let subject = Subject { repo: self.repo, revision, what: What::Info };
        let (body, _) = self.client.get_small(&url, MAX_JSON, &subject, self.notify)?;
        let info: InfoAnswer = serde_json::from_slice(&body).map_err(|e| bad_response(&url, e))?;
        if !is_commit(&info.sha) {
            return Err(bad_response(&url, "the commit is not 40 hexadecimal digits"));
        }
        // A mirror may say anything here; what is no name changes nothing.
        let name = info.id.and_then(|id| RepoId::owner_and_name(&id).ok()).unwrap_or_else(|| self.repo.clone());
        Ok(Info { commit: info.sha, name })
    }

    /// Every file at `commit`, by path.
    pub(crate) fn tree(&self, commit: &str) -> Result<BTreeMap<String, Entry>, HubError> {
        let endpoint = self.client.endpoint();
        let mut url = format!("{endpoint}/api/models/{}/tree/{commit}?recursive=true&expand=false", self.repo);
        let subject = Subject { repo: self.repo, revision: commit, what: What::Listing };
        let mut entries = BTreeMap::new();
        for _ in 0..MAX_PAGES {
            let (body, next) = self.client.get_small(&url, MAX_JSON, &subject, self.notify)?;
            let items: Vec<TreeItem> = serde_json::from_slice(&body).map_err(|e| bad_response(&url, e))?;
            for item in items.into_iter().filter(|item| item.kind == "file") {
                let lfs = item.lfs.map(|lfs| (lfs.oid, lfs.size));
                let entry = Entry::checked(item.path.clone(), item.size, item.oid, lfs, item.xet_hash)
                    .ok_or_else(|| bad_response(&url, format!("the hash of {:?} is not one", item.path)))?;
                entries.insert(item.path, entry);
            }
            let Some(next) = next else { return Ok(entries) };
            let base = url.parse().map_err(|_| bad_response(&url, "an address that does not parse"))?;
            url = join(&base, &next);
        }
        Err(bad_response(&url, "a listing without end"))
    }

    /// A small file's content, without storing it.
    pub(crate) fn small_file(&self, commit: &str, path: &str, limit: u64) -> Result<Vec<u8>, HubError> {
        let subject = Subject { repo: self.repo, revision: commit, what: What::File(path) };
        let url = resolve_url(self.client.endpoint(), self.repo, commit, path);
        Ok(self.client.get_small(&url, limit, &subject, self.notify)?.0)
    }

    /// Some bytes of a file, without storing them.
    pub(crate) fn part(&self, commit: &str, path: &str, range: &Range<u64>) -> Result<Vec<u8>, HubError> {
        let subject = Subject { repo: self.repo, revision: commit, what: What::File(path) };
        let url = resolve_url(self.client.endpoint(), self.repo, commit, path);
        self.client.get_part(&url, range, &subject, self.notify)
    }
}

/// Where the hub serves a file.
pub(crate) fn resolve_url(endpoint: &str, repo: &RepoId, commit: &str, path: &str) -> String {
    format!("{endpoint}/{repo}/resolve/{commit}/{}", encode_path(path))
}

/// The wanted files, refusing names that are not safe to write.
pub(crate) fn select(entries: &BTreeMap<String, Entry>, wanted: impl Fn(&str) -> bool) -> Result<Vec<Entry>, HubError> {
    let chosen = entries.values().filter(|entry| wanted(&entry.path));
    chosen.map(|entry| check_file_name(&entry.path).map(|()| entry.clone())).collect()
}
