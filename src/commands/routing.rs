//! `--record-routing`: the routers' choices as a trace, for `st-tool cache-sim`.
//!
//! The file is written beside its final name and gets that name when it is complete, so that no half trace ever stands
//! there. Without the option nothing of this exists, and a run does not even look whether to record.

use std::fs;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use st_experts::{TraceHeader, TraceWriter};
use st_model::{Engine, Routing, Session};
use tempfile::NamedTempFile;

use super::Context;
use crate::report::is_interruption;
use crate::tensor_file::beside;

/// A trace that was asked for, before there is a model.
#[derive(Debug)]
pub(crate) struct RoutingFile {
    path: PathBuf,
    file: NamedTempFile,
}

/// A trace being written.
#[derive(Debug)]
pub(crate) struct Recorder {
    path: PathBuf,
    trace: Mutex<Trace>,
}

#[derive(Debug)]
struct Trace {
    writer: TraceWriter<BufWriter<NamedTempFile>>,
    /// Tokens of earlier batches.
    before: u64,
    /// Tokens of them and of the batch that runs.
    tokens: u64,
}

impl RoutingFile {
    /// Makes sure that `path` can be written.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let begun = match fs::metadata(path) {
            // A device or a pipe would be replaced by a file.
            Ok(metadata) if !metadata.is_file() => Err(io::Error::other("it is not a regular file")),
            _ => beside(path),
        };
        let file = begun.with_context(|| cannot_write(path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Begins the trace of what `engine` runs.
    pub(crate) fn begin(self, engine: &Engine) -> anyhow::Result<Recorder> {
        let (config, plan) = (engine.config(), engine.plan());
        let header = TraceHeader {
            n_layers: config.n_layers as u32,
            n_experts: config.n_experts as u32,
            expert_bytes: plan.slot,
            other_bytes: Some(plan.beside_cache()),
        };
        let writer = TraceWriter::new(BufWriter::new(self.file), &header).with_context(|| cannot_write(&self.path))?;
        Ok(Recorder { path: self.path, trace: Mutex::new(Trace { writer, before: 0, tokens: 0 }) })
    }
}

impl Recorder {
    /// Records what `session` runs from now on.
    pub(crate) fn attach<'e>(&'e self, session: &mut Session<'e>) {
        session.on_routing(Box::new(|layer, routing| {
            let mut trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
            trace
                .add(layer, routing)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", cannot_write(&self.path))))
        }));
    }

    /// Completes the file after work that ended with `outcome`, and hands that on. Work that failed leaves no trace; work
    /// that was interrupted does.
    pub(crate) fn finish<T>(self, outcome: anyhow::Result<T>, context: &Context) -> anyhow::Result<T> {
        if outcome.as_ref().err().is_none_or(is_interruption) {
            let Trace { writer, tokens, .. } = self.trace.into_inner().unwrap_or_else(PoisonError::into_inner);
            complete(writer, &self.path).with_context(|| cannot_write(&self.path))?;
            context.ui.note(format_args!("{}: routing of {tokens} tokens", self.path.display()));
        }
        outcome
    }
}

impl Trace {
    fn add(&mut self, layer: usize, routing: &Routing) -> io::Result<()> {
        if layer == 0 {
            self.before = self.tokens;
            self.tokens += routing.n_tokens() as u64;
        }
        for (token, ids) in (self.before..).zip(routing.ids().chunks_exact(routing.n_used())) {
            self.writer.record(token, layer, ids)?;
        }
        Ok(())
    }
}

fn complete(writer: TraceWriter<BufWriter<NamedTempFile>>, path: &Path) -> io::Result<()> {
    let file = writer.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}
