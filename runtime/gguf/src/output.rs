//! Output files of every kind: written beside the final name, which they get when they are complete and on the disk.
//!
//! Whatever happens before, nothing stands under that name that was not there. The bytes go to `.NAME.partial`, one name
//! for each output: it is locked while it is written, so that two writers of one output notice each other, and one that
//! a killed process left behind is not locked, and is taken over.
//!
//! Refused: to replace a file that is not of the kind that is written, whatever it is told; what is no regular file, and
//! links that stand for an open file of a process, as `/dev/stdout` does. A link to a file stands for that file, and
//! stays. What is replaced hands on its permissions.

use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf, is_separator};

use crate::error::{GgufError, Result};

/// A kind of file, known by how it begins.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What a file of this kind is called, such as `a GGUF file`.
    pub name: &'static str,
    /// Whether these bytes are a file of this kind, as far as it takes to be sure. Never asked of an empty file, which
    /// may be replaced by any.
    pub recognizes: fn(&mut dyn Read) -> io::Result<bool>,
}

impl Kind {
    /// GGUF files, of any version and any model.
    pub const GGUF: Self = Self { name: "a GGUF file", recognizes: |bytes| begins_with(bytes, b"GGUF") };
}

/// Whether `bytes` begin with `start`.
///
/// # Errors
/// What reading meets.
pub fn begins_with(bytes: &mut dyn Read, start: &[u8]) -> io::Result<bool> {
    let mut first = Vec::with_capacity(start.len());
    bytes.take(start.len() as u64).read_to_end(&mut first)?;
    Ok(first == start)
}

/// Whether `path` can become an output of this kind: it is free, or a file of the kind that may be replaced, in a folder
/// that can be written to. Whoever has much to do before writing asks first; [`OutputFile`] has the last word.
///
/// # Errors
/// [`GgufError::OtherKind`], [`GgufError::Exists`], [`GgufError::NotAFile`], [`GgufError::Descriptor`],
/// [`GgufError::Stdout`], [`GgufError::NoFolder`], [`GgufError::Io`].
pub fn check_output(path: &Path, kind: Kind, overwrite: bool) -> Result<()> {
    Target::find(path, kind, overwrite).map(drop)
}

/// Where an output goes.
#[derive(Debug)]
struct Target {
    /// As it was named, for messages.
    named: PathBuf,
    /// The same with links followed.
    path: PathBuf,
    kind: Kind,
    overwrite: bool,
    /// The file that will be replaced.
    existing: Option<Metadata>,
}

impl Target {
    fn find(named: &Path, kind: Kind, overwrite: bool) -> Result<Self> {
        if named == Path::new("-") {
            return Err(GgufError::Stdout { kind: kind.name });
        }
        let no_file = || GgufError::NotAFile { file: named.display().to_string() };
        let fail = |action: &str, source| GgufError::io(named.display(), action, source);
        let path = follow_links(named)?;
        let existing = match std::fs::metadata(&path) {
            Ok(metadata) if !metadata.is_file() => return Err(no_file()),
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(fail("look at the output", source)),
        };
        let ends_in_separator = path.as_os_str().as_encoded_bytes().last().is_some_and(|&b| is_separator(b.into()));
        if path.file_name().is_none() || ends_in_separator {
            return Err(no_file());
        }
        let folder = parent_of(&path);
        if let Ok(false) = folder.try_exists() {
            return Err(GgufError::NoFolder { path: named.to_owned(), folder: folder.to_owned() });
        }
        if let Some(metadata) = &existing {
            if metadata.len() > 0 {
                let known = File::open(&path).and_then(|mut file| (kind.recognizes)(&mut file));
                if !known.map_err(|source| fail("look at the file that is there", source))? {
                    return Err(GgufError::OtherKind { path: named.to_owned(), kind: kind.name });
                }
            }
            if !overwrite {
                return Err(GgufError::Exists { path: named.to_owned() });
            }
        }
        st_sys::may_write_into(folder).map_err(|source| fail("write into its folder", source))?;
        Ok(Self { named: named.to_owned(), path, kind, overwrite, existing })
    }

    /// The name of the file while it is written.
    fn partial(&self) -> PathBuf {
        st_sys::beside(&self.path, ".", ".partial")
    }
}

/// The name that writing to `named` would reach.
fn follow_links(named: &Path) -> Result<PathBuf> {
    let mut path = named.to_owned();
    // As many as Linux follows.
    for _ in 0..40 {
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_symlink() => {
                if st_sys::shows_processes(parent_of(&path)) {
                    return Err(GgufError::Descriptor { file: named.display().to_string() });
                }
                let to = std::fs::read_link(&path)
                    .map_err(|source| GgufError::io(named.display(), "follow the link", source))?;
                path = parent_of(&path).join(to);
            }
            // Whether it is there at all is the caller's question.
            _ => return Ok(path),
        }
    }
    Err(GgufError::io(named.display(), "follow the link", io::Error::other("too many levels of links")))
}

/// The folder that `path` lies in.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A file being written. Dropping it without [`finish`](Self::finish) removes it.
#[derive(Debug)]
pub struct OutputFile {
    target: Target,
    partial: PathBuf,
    /// `None` once it has its name.
    file: Option<File>,
    /// Whether what was written stays for a later process, where this one does not finish it.
    stays: bool,
}

impl OutputFile {
    /// Begins the file that will be `path`.
    ///
    /// # Errors
    /// As [`check_output`]; [`GgufError::Busy`].
    pub fn create(path: &Path, kind: Kind, overwrite: bool) -> Result<Self> {
        let mut begun = Self::go_on(path, kind, overwrite)?;
        let emptied = begun.file().set_len(0);
        begun.stays = false;
        emptied.map_err(|source| GgufError::io(path.display(), "empty what is to become it", source))?;
        Ok(begun)
    }

    /// As [`create`](Self::create), with what an earlier process left of it; what this one leaves stays for the next.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn go_on(path: &Path, kind: Kind, overwrite: bool) -> Result<Self> {
        let target = Target::find(path, kind, overwrite)?;
        let partial = target.partial();
        let file = claim(&target, &partial)?;
        Ok(Self { target, partial, file: Some(file), stays: true })
    }

    /// Bytes that it takes on the disk by now.
    pub fn allocated(&self) -> u64 {
        st_sys::allocated(self.file()).unwrap_or(0)
    }

    /// Removes what was written.
    pub fn discard(mut self) {
        self.stays = false;
    }

    /// The open file.
    pub fn file(&self) -> &File {
        // `finish` takes the file away and consumes the output, so no method can meet it empty.
        self.file.as_ref().expect("an output that was not finished has its file")
    }

    /// The folder that it is written in.
    pub(crate) fn folder(&self) -> &Path {
        parent_of(&self.partial)
    }

    /// Completes the file: everything is on the disk and under its final name when this returns.
    ///
    /// # Errors
    /// As [`check_output`] for what came to be there meanwhile; [`GgufError::Io`]. Nothing is left behind then.
    pub fn finish(mut self) -> Result<()> {
        let named = self.target.named.display();
        let fail = |action: &str, source| GgufError::io(&named, action, source);
        let file = self.file();
        file.sync_all().map_err(|source| fail("write", source))?;
        if self.target.overwrite {
            // What is there now counts, not what was there when the work began.
            let now = Target::find(&self.target.named, self.target.kind, true)?;
            if let Some(existing) = &now.existing {
                st_sys::inherit(file, existing).map_err(|source| fail("keep the permissions", source))?;
            }
            std::fs::rename(&self.partial, &self.target.path)
                .map_err(|source| fail("give the file its final name", source))?;
        } else {
            match st_sys::rename_new(&self.partial, &self.target.path) {
                Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(GgufError::Exists { path: self.target.named.clone() });
                }
                renamed => renamed.map_err(|source| fail("give the file its final name", source))?,
            }
        }
        // From here on the partial name is free for others: drop must not remove what they put there.
        self.file = None;
        st_sys::sync_folder(self.folder())
            .map_err(|source| GgufError::io(self.target.named.display(), "sync its folder", source))
    }
}

impl Write for OutputFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file().write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take().filter(|_| !self.stays) {
            // Removed while still locked, so that it cannot be another writer's by now. What fails here
            // leaves a stale partial file, which the next writer takes over.
            let _ = std::fs::remove_file(&self.partial);
            drop(file);
        }
    }
}

/// Opens and locks the partial file.
fn claim(target: &Target, partial: &Path) -> Result<File> {
    let name = partial.file_name().unwrap_or_default().display();
    let fail = |source| GgufError::io(target.named.display(), format!("create {name} beside it"), source);
    loop {
        let file = st_sys::create_claimable(partial, target.existing.as_ref()).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(GgufError::Busy { path: target.named.clone(), partial: partial.to_owned() });
            }
            // Some network file systems know no locks; then there is only the partial file's name.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(source)) => return Err(fail(source)),
        }
        // Between opening and locking, the writer that had the lock may have given this very file its
        // final name: emptying it now would destroy a finished output.
        match st_sys::is_named(&file, partial) {
            Ok(true) if !file.metadata().map_err(fail)?.is_file() => {
                return Err(GgufError::NotAFile { file: partial.display().to_string() });
            }
            Ok(true) => return Ok(file),
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(fail(source)),
        }
    }
}
