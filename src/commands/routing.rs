//! `--record-routing`: the routers' choices as a trace, for `st-tool cache-sim`.
//!
//! The file gets its name when it is complete, so that no half trace ever stands there, and it takes the place of an earlier
//! trace only: a MODEL that was meant for the command, and stands where FILE is missing, stays what it is. Without the
//! option nothing of this exists, and a run does not even look whether to record.

use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use st_experts::{TraceHeader, TraceWriter};
use st_gguf::{Kind, OutputFile, begins_with};
use st_model::{Batch, BatchKind, Engine, Observer, Routing};

use crate::context::Context;
use crate::report::is_interruption;

/// Traces begin with a line that says of what model they are.
const TRACE: Kind = Kind { name: "a routing trace", recognizes: |bytes| begins_with(bytes, b"# routing n_layers=") };

/// A trace that was asked for, before there is a model.
#[derive(Debug)]
pub(crate) struct RoutingFile {
    path: PathBuf,
    file: OutputFile,
}

/// A trace being written.
#[derive(Debug)]
pub(crate) struct Recorder {
    path: PathBuf,
    writer: TraceWriter<BufWriter<OutputFile>>,
    /// Tokens of earlier batches.
    before: u64,
    /// Tokens of them and of the batch that runs.
    tokens: u64,
}

impl RoutingFile {
    /// Makes sure that `path` can be written.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let file = OutputFile::create(path, TRACE, true).with_context(|| cannot_write(path))?;
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
        Ok(Recorder { path: self.path, writer, before: 0, tokens: 0 })
    }
}

impl Recorder {
    /// Completes the file after work that ended with `outcome`, and hands that on. Work that failed leaves no trace; work
    /// that was interrupted does.
    pub(crate) fn finish<T>(self, outcome: anyhow::Result<T>, context: &Context) -> anyhow::Result<T> {
        if outcome.as_ref().err().is_none_or(is_interruption) {
            complete(self.writer).with_context(|| cannot_write(&self.path))?;
            context.ui.note(format_args!("{}: routing of {} tokens", self.path.display(), self.tokens));
        }
        outcome
    }

    fn record(&mut self, layer: usize, kind: BatchKind, routing: &Routing) -> io::Result<()> {
        if layer == 0 {
            self.before = self.tokens;
            self.tokens += routing.n_tokens() as u64;
        }
        for (token, ids) in (self.before..).zip(routing.ids().chunks_exact(routing.n_used())) {
            self.writer.record(token, layer, ids, kind.use_of_experts())?;
        }
        Ok(())
    }
}

impl Observer for Recorder {
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        let recorded = self.record(layer, batch.kind(), routing);
        recorded.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", cannot_write(&self.path))))
    }
}

fn complete(writer: TraceWriter<BufWriter<OutputFile>>) -> anyhow::Result<()> {
    let file = writer.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(file.finish()?)
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}
