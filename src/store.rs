//! The store: converted files that the program made for itself, one folder for each repository.
//!
//! Owns where they lie and what they are called. What another program fetched is the hub's cache, and not here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use st_hub::{RepoId, TypeTag};

/// What stands at the end of the name of a file in the offload layout.
const OFFLOAD: &str = "-offload";
/// Types in the order in which a person who names none gets them.
const PREFERRED: [&str; 5] = ["q4_0", "q8_0", "f16", "bf16", "f32"];

/// The folder of all that was converted.
#[derive(Debug)]
pub(crate) struct Store {
    folder: PathBuf,
}

impl Store {
    /// The store in `home`.
    pub(crate) fn new(home: &Path) -> Self {
        Self { folder: home.join("models") }
    }

    /// The files of `repo`.
    pub(crate) fn files(&self, repo: &RepoId) -> Vec<PathBuf> {
        gguf_files(&self.folder.join(folder_name(repo)))
    }

    /// The file of `repo` of type `ty`, or of the type that is preferred.
    pub(crate) fn find(&self, repo: &RepoId, ty: Option<&TypeTag>) -> Option<PathBuf> {
        best(self.files(repo), ty)
    }

    /// Where the file of `repo` with the type `ty` belongs; its folder is there afterwards.
    pub(crate) fn place(&self, repo: &RepoId, ty: &str) -> anyhow::Result<PathBuf> {
        let folder = self.folder.join(folder_name(repo));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(folder.join(format!("{}-{ty}.gguf", name_of(repo))))
    }

    /// Every repository that has a file here, with its files.
    pub(crate) fn all(&self) -> Vec<(RepoId, Vec<PathBuf>)> {
        self.of_each(gguf_files)
    }

    /// Every repository with conversions that were cut off, each by the file that it would have become.
    pub(crate) fn unfinished(&self) -> Vec<(RepoId, Vec<Unfinished>)> {
        self.of_each(unfinished)
    }

    /// What `find` finds in the folder of each repository, where it does.
    fn of_each<T>(&self, find: fn(&Path) -> Vec<T>) -> Vec<(RepoId, Vec<T>)> {
        let folders = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let repo = |name: &str| RepoId::parse(&name.strip_prefix("models--")?.replacen("--", "/", 1)).ok();
        let mut all: Vec<_> = folders
            .filter_map(|entry| Some((repo(entry.file_name().to_str()?)?, find(&entry.path()))))
            .filter(|(_, files)| !files.is_empty())
            .collect();
        all.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        all
    }

    /// Removes the folder of `repo` where nothing is left in it.
    pub(crate) fn tidy(&self, repo: &RepoId) {
        // One that is not empty stays.
        let _ = fs::remove_dir(self.folder.join(folder_name(repo)));
    }
}

/// A conversion that was cut off, and may be gone on with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    /// The file that it would have become.
    pub file: PathBuf,
    /// What there is of it: the output so far, and what is kept of shards.
    pub parts: Vec<PathBuf>,
}

impl Unfinished {
    /// Bytes that it takes on the disk.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| bytes_of(part)).sum()
    }

    /// Whether a program is at it.
    pub(crate) fn is_under_way(&self) -> bool {
        let is_locked = |path: &PathBuf| {
            let file = fs::File::open(path).ok().filter(|_| path.is_file());
            file.is_some_and(|file| matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock)))
        };
        self.parts.iter().any(is_locked)
    }

    /// Removes it.
    pub(crate) fn remove(&self) -> anyhow::Result<()> {
        for part in &self.parts {
            let removed = if part.is_dir() { fs::remove_dir_all(part) } else { fs::remove_file(part) };
            removed.with_context(|| format!("cannot remove {}", part.display()))?;
        }
        Ok(())
    }
}

/// Bytes that a file or a folder takes on the disk, of which placeholders have less than they seem to.
fn bytes_of(path: &Path) -> u64 {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            fs::read_dir(path).into_iter().flatten().flatten().map(|entry| bytes_of(&entry.path())).sum()
        }
        Ok(metadata) => fs::File::open(path).ok().and_then(|file| st_sys::allocated(&file)).unwrap_or(metadata.len()),
        Err(_) => 0,
    }
}

/// The name that `quantize` gives a file of this repository in a folder.
pub(crate) fn name_of(repo: &RepoId) -> &str {
    repo.as_str().rsplit('/').next().unwrap_or_default()
}

/// Of files that were converted from one repository, the one of type `ty`, or of the type that is preferred; of those, one in
/// the gguf layout.
pub(crate) fn best(mut files: Vec<PathBuf>, ty: Option<&TypeTag>) -> Option<PathBuf> {
    let stem = |path: &Path| path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
    let plain = |path: &Path| stem(path).trim_end_matches(OFFLOAD).to_owned();
    let rank = |path: &Path| PREFERRED.iter().position(|ty| plain(path).ends_with(ty)).unwrap_or(PREFERRED.len());
    files.retain(|path| ty.is_none_or(|ty| ty.ends(&plain(path))));
    files.into_iter().min_by_key(|path| (rank(path), stem(path).ends_with(OFFLOAD), path.clone()))
}

/// Files of this repository that `quantize` wrote into the current folder under its default names.
pub(crate) fn in_this_folder(repo: &RepoId) -> Vec<PathBuf> {
    let layouts = |ty: &&str| ["", OFFLOAD].map(|layout| format!("{}-{ty}{layout}.gguf", name_of(repo)));
    PREFERRED.iter().flat_map(layouts).map(PathBuf::from).filter(|path| path.is_file()).collect()
}

/// As the hub's cache names it; a model that is known goes by its present name.
fn folder_name(repo: &RepoId) -> String {
    let name = repo.alias().map_or(repo.as_str(), |alias| alias.repo);
    format!("models--{}", name.replace('/', "--"))
}

fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let hidden = |path: &Path| path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let mut files: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|ending| ending == "gguf") && !hidden(path) && path.is_file())
        .collect();
    files.sort();
    files
}

fn unfinished(folder: &Path) -> Vec<Unfinished> {
    let mut names: Vec<String> = (fs::read_dir(folder).into_iter().flatten().flatten())
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let of = name.strip_suffix(".shards").or(name.strip_suffix(".partial"))?.strip_prefix('.')?;
            of.ends_with(".gguf").then(|| of.to_owned())
        })
        .collect();
    names.sort();
    names.dedup();
    let part = |file: &Path, ending| Some(st_sys::beside(file, ".", ending)).filter(|part| part.exists());
    names
        .into_iter()
        .map(|name| folder.join(name))
        .map(|file| Unfinished {
            parts: [".partial", ".shards"].into_iter().filter_map(|ending| part(&file, ending)).collect(),
            file,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_their_type_and_by_both_names_of_a_model() {
        let home = tempfile::tempdir().expect("a folder");
        let store = Store::new(home.path());
        let [repo, former] =
            ["4b", "PowerInfer/SmallThinker-4BA0.6B-Instruct"].map(|name| RepoId::parse(name).expect("a name"));
        assert_eq!(store.find(&repo, None), None);
        let q8_0 = store.place(&repo, "q8_0").expect("a place");
        fs::write(&q8_0, "x").expect("written");
        assert_eq!(store.find(&former, None), Some(q8_0.clone()));
        let q4_0 = store.place(&former, "q4_0").expect("a place");
        fs::write(&q4_0, "x").expect("written");
        fs::write(q4_0.with_file_name(".x-q4_0.gguf"), "x").expect("written");
        assert_eq!(store.find(&repo, None), Some(q4_0.clone()));
        let ty = |text: &str| TypeTag::parse(text).expect("a type");
        assert_eq!(store.find(&repo, Some(&ty("Q80"))), Some(q8_0.clone()));
        assert_eq!(store.find(&repo, Some(&ty("f16"))), None);
        assert_eq!(store.all(), [(repo.clone(), vec![q4_0.clone(), q8_0.clone()])]);
        for file in [q4_0, q8_0, home.path().join("models/models--Tiiny--SmallThinker-4BA0.6B-Instruct/.x-q4_0.gguf")] {
            fs::remove_file(file).expect("removed");
        }
        store.tidy(&repo);
        assert_eq!(store.all(), []);
    }

    #[test]
    fn conversions_that_were_cut_off_are_found_and_removed() {
        let home = tempfile::tempdir().expect("a folder");
        let store = Store::new(home.path());
        let repo = RepoId::parse("4b").expect("a name");
        let place = store.place(&repo, "q4_0").expect("a place");
        let [partial, shards] = [".partial", ".shards"].map(|ending| st_sys::beside(&place, ".", ending));
        fs::create_dir(&shards).expect("a folder");
        fs::write(shards.join("a.safetensors"), [1; 5000]).expect("written");
        fs::write(&partial, [1; 5000]).expect("written");
        let [(of, found)] = &store.unfinished()[..] else { panic!("one repository") };
        let [one] = &found[..] else { panic!("{found:?}") };
        assert!(of.is_same(&repo) && one.file == place && store.all().is_empty(), "{one:?}");
        assert!(one.bytes() >= 10_000 && !one.is_under_way());
        let held = fs::File::open(&partial).expect("there");
        held.lock().expect("locked");
        assert!(one.is_under_way());
        one.remove().expect("removed");
        assert_eq!(store.unfinished(), []);
    }

    #[test]
    fn a_plain_file_comes_before_a_packed_one() {
        let files = ["m-q4_0-offload.gguf", "m-q8_0.gguf", "m-q4_0.gguf"].map(PathBuf::from);
        assert_eq!(best(files.to_vec(), None), Some("m-q4_0.gguf".into()));
        let q4_0 = TypeTag::parse("q4_0").expect("a type");
        assert_eq!(best(files[..2].to_vec(), Some(&q4_0)), Some("m-q4_0-offload.gguf".into()));
    }
}
