//! `--session FILE`: what a conversation has computed, kept for the next run. It saves time and changes no token.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind};
use std::path::Path;

use anyhow::Context as _;
use st_gguf::{Kind, OutputFile, begins_with, check_output};
use st_model::{SNAPSHOT_MAGIC, Session, SnapshotError};

use crate::context::Context;

const SNAPSHOT: Kind = Kind { name: "a session", recognizes: |bytes| begins_with(bytes, SNAPSHOT_MAGIC) };

/// Refuses a file that is of another kind, before anything is loaded.
pub(crate) fn check(path: &Path) -> anyhow::Result<()> {
    Ok(check_output(path, SNAPSHOT, true)?)
}

/// Takes up what is in the file, where it is there and of this model.
pub(crate) fn load(path: &Path, session: &mut Session, context: &Context) -> anyhow::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    if file.metadata().is_ok_and(|about| about.len() == 0) {
        return Ok(());
    }
    match session.engine().restore(BufReader::with_capacity(1 << 20, file)) {
        Ok(sequence) => *session.sequence_mut() = sequence,
        Err(error @ (SnapshotError::Damaged(_) | SnapshotError::Other | SnapshotError::Context { .. })) => {
            context.ui.note(format_args!("note: {} is begun anew: {error}", path.display()));
        }
        Err(error) => return Err(error).with_context(|| format!("cannot go on from {}", path.display())),
    }
    Ok(())
}

/// Writes what the conversation has computed.
pub(crate) fn save(path: &Path, session: &Session) -> anyhow::Result<()> {
    if session.is_empty() {
        return Ok(());
    }
    let mut file = OutputFile::create(path, SNAPSHOT, true)?;
    let saved = session.engine().save(session.sequence(), BufWriter::with_capacity(1 << 20, &mut file));
    saved.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(file.finish()?)
}
