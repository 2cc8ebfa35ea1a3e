//! What MODEL means: a name, a file, a folder or a repository, resolved to something that can be opened.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use st_convert::Input;
use st_gguf::GgufFile;
use st_hub::{DownloadRequest, RepoId, without_secrets};

use crate::context::Context;
use crate::get::Wanted;
use crate::input::is_stdin;
use crate::report::Advice;
use crate::repos::{hub, short_name};
use crate::store::name_of;
use crate::tiny::TINY;
use crate::ui::DownloadBars;

/// What a MODEL argument names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Model {
    /// The model inside the binary.
    Tiny,
    /// A file.
    File(PathBuf),
    /// A folder.
    Folder(PathBuf),
    /// A repository on the hub, perhaps with a type.
    Hub(Wanted),
}

impl Model {
    /// Resolves an argument: first the fixed names, then what is on disk, then repositories.
    pub(crate) fn resolve(name: impl AsRef<OsStr>) -> anyhow::Result<Self> {
        let name = name.as_ref();
        let Some(name) = name.to_str() else {
            // No name of a model or a repository is like this, so it is a path.
            let path = PathBuf::from(name);
            return Ok(if path.is_dir() { Self::Folder(path) } else { Self::File(path) });
        };
        not_stdin(Path::new(name))?;
        if name.contains("://") {
            let message = format!("{} is an address, and a model is no address", without_secrets(name));
            return Err(Advice::new(message, "a model on the hub is written `owner/name`").into());
        }
        if name == "tiny" {
            return Ok(Self::Tiny);
        }
        let alias = !name.contains('/');
        if alias && let Ok(wanted) = Wanted::parse(name) {
            return Ok(Self::Hub(wanted));
        }
        let path = Path::new(name);
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        // A name that ends in .gguf is a file even where it does not exist: the error should say so.
        if path.exists() || path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return Ok(Self::File(path.to_owned()));
        }
        match Wanted::parse(name) {
            Ok(wanted) => Ok(Self::Hub(wanted)),
            // A repository, and what cannot be a type.
            Err(error) if name.split_once(':').is_some_and(|(repo, _)| RepoId::parse(repo).is_ok()) => Err(error.into()),
            Err(_) => Err(Advice::new(
                format!("there is no file or folder {:?}, and it is no model's name", without_secrets(name)),
                "a model is `tiny`, a .gguf file, a checkpoint folder, `4b`, `21b`, or `owner/name` on the hub; `:TYPE` behind \
                 it is one of its GGUF files",
            )
            .into()),
        }
    }

    /// Opens the model for running.
    ///
    /// A repository stands for the file that was made of it, or for one that is fetched where the person allows it.
    pub(crate) fn open_gguf(&self, context: &Context) -> anyhow::Result<GgufFile> {
        match self {
            Self::Tiny => GgufFile::from_static(TINY).context("the bundled model is damaged"),
            Self::File(path) => open_file(path),
            Self::Folder(path) => Err(Advice::new(
                format!("{} is a folder; a model runs from a GGUF file", path.display()),
                format!("st-tool quantize {} --q4_0 makes one from a checkpoint", path.display()),
            )
            .into()),
            Self::Hub(wanted) => open_file(&wanted.file(context)?),
        }
    }

    /// Opens the model as the source of a conversion; a repository that is not in the cache is downloaded if it may be.
    pub(crate) fn open_source(&self, context: &Context, fetch: Fetch) -> anyhow::Result<Input> {
        let path = match self {
            Self::Tiny => {
                return Err(Advice::new(
                    "the bundled model is converted already",
                    "its checkpoint is models/tiny/checkpoint in the source of this program",
                )
                .into());
            }
            Self::File(path) | Self::Folder(path) => path.clone(),
            Self::Hub(Wanted { repo, ty: None }) => snapshot(repo, context, fetch)?,
            Self::Hub(wanted) => wanted.source(context, fetch == Fetch::Allowed)?,
        };
        Ok(Input::open(&path)?)
    }

    /// The file or folder that was named, if one was.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Folder(path) => Some(path),
            Self::Tiny | Self::Hub(_) => None,
        }
    }

    /// The name that a converted file is given.
    pub(crate) fn file_stem(&self) -> String {
        let of_path = |path: &Path, strip: bool| {
            let full = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            let name = if strip { full.file_stem() } else { full.file_name() };
            name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
        };
        match self {
            Self::Tiny => "tiny".to_owned(),
            Self::File(path) => of_path(path, true),
            Self::Folder(path) => of_path(path, false),
            Self::Hub(wanted) => name_of(&wanted.repo).to_owned(),
        }
    }
}

/// A model is read here and there, so a pipe does not do.
pub(crate) fn not_stdin(path: &Path) -> anyhow::Result<()> {
    match is_stdin(path) {
        true => Err(Advice::new("a model is not read from stdin", "name its file").into()),
        false => Ok(()),
    }
}

/// Whether a command may download what it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fetch {
    /// It may, and says how much that is.
    Allowed,
    /// It only looks.
    Never,
}

/// The checkpoint folder of a repository.
fn snapshot(repo: &RepoId, context: &Context, fetch: Fetch) -> anyhow::Result<PathBuf> {
    let hub = hub(context);
    let request = DownloadRequest::new(repo.clone());
    if let Some(folder) = hub.cached(repo, &request.revision)? {
        return Ok(folder);
    }
    if fetch == Fetch::Never {
        return Err(Advice::new(
            format!("{repo} is not downloaded, or not completely"),
            format!(
                "st-tool download {name} fetches it; with --dry-run it says how much that is",
                name = short_name(repo)
            ),
        )
        .into());
    }
    // The bars begin with the number of bytes.
    Ok(hub.download(&request, &DownloadBars::new(context.ui))?)
}

fn open_file(path: &Path) -> anyhow::Result<GgufFile> {
    Ok(GgufFile::open(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_resolve_before_paths_and_paths_before_repositories() {
        assert_eq!(Model::resolve("tiny").expect("known"), Model::Tiny);
        let Ok(Model::Hub(wanted)) = Model::resolve("4b") else { panic!("4b is a repository") };
        assert_eq!(wanted.repo.as_str(), "Tiiny/SmallThinker-4BA0.6B-Instruct");
        let Ok(Model::Hub(wanted)) = Model::resolve("owner/name:Q4_K_M") else { panic!("a repository and a type") };
        assert_eq!(wanted.to_string(), "owner/name:Q4_K_M");
        assert!(Model::resolve("owner/name:q4 0").is_err());
        assert_eq!(Model::resolve("src").expect("a folder"), Model::Folder("src".into()));
        assert_eq!(Model::resolve("Cargo.toml").expect("a file"), Model::File("Cargo.toml".into()));
        assert_eq!(Model::resolve("no/where.gguf").expect("a file"), Model::File("no/where.gguf".into()));
        assert!(matches!(Model::resolve("owner/name"), Ok(Model::Hub(_))));
        assert!(Model::resolve("/no/such/folder").is_err());
        assert!(Model::resolve("nothing").is_err());
    }

    #[test]
    fn outputs_are_named_after_the_model() {
        assert_eq!(Model::resolve("4b").expect("known").file_stem(), "SmallThinker-4BA0.6B-Instruct");
        assert_eq!(Model::File("a/b-f16.gguf".into()).file_stem(), "b-f16");
        assert_eq!(Model::Folder("src/".into()).file_stem(), "src");
    }
}
