//! `st-tool logits`: the logits of every position, for comparing engines.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;
use std::process::ExitCode;

use st_gguf::{GgufFile, check_output};
use st_model::{Batch, ModelError, ModelShape, Observer, Reference, Routing, Session};

use super::{engine, tokens};
use crate::cli::{EngineArgs, LogitsArgs};
use crate::context::Context;
use crate::models::Model;
use crate::report::Advice;
use crate::tensor_file::{Dtype, LOGITS, TensorFile};

/// Tokens that are run between two looks at whether to stop.
const STRETCH: usize = 512;

pub(crate) fn run(args: &LogitsArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let ids = tokens::parse(&args.token_ids, &context.interrupt)?;
    if ids.is_empty() {
        return Err(Advice::new("there are no token ids", "--token-ids 1,2,3 or --token-ids @FILE").into());
    }
    check_output(&args.output, LOGITS, args.force)?;
    let file = Model::resolve(&args.model)?.open_gguf(context)?;
    let config = file.header.model_shape()?;
    if ids.len() > config.context_length {
        return Err(ModelError::ContextFull { needed: ids.len(), ctx: config.context_length }.into());
    }
    match args.reference {
        true => with_reference(&file, &ids, args, context)?,
        false => with_engine(file, &ids, args, context)?,
    }
    context.ui.note(format_args!("{}: {} tokens", args.output.display(), ids.len()));
    Ok(ExitCode::SUCCESS)
}

fn with_engine(file: GgufFile, ids: &[u32], args: &LogitsArgs, context: &Context) -> anyhow::Result<()> {
    let engine_args = EngineArgs { memory: args.memory, threads: args.threads, ..EngineArgs::default() };
    let engine = engine::load_file(file, &engine_args, Some(ids.len()), None, context)?;
    let out = Output::create(args, ids.len(), engine.n_vocab(), engine.config())?;
    let mut session = Session::new(&engine)?;
    let mut rows = Rows { out: RefCell::new(out), failed: Cell::new(None), first: 0 };
    for (n, stretch) in ids.chunks(STRETCH).enumerate() {
        context.interrupt.check()?;
        rows.first = n * STRETCH;
        let mut layers = Layers { rows: &rows, before: 0, batch: 0, ids: Vec::new(), weights: Vec::new() };
        let ran =
            session.run_all(stretch, &mut layers, |row, logits| rows.keep(|out| out.logits(n * STRETCH + row, logits)));
        if let Some(error) = rows.failed.take() {
            return Err(cannot_write(&args.output, error));
        }
        ran?;
    }
    rows.out.into_inner().finish()
}

/// What one stretch of tokens is written to, by layers and then by logits.
struct Rows {
    out: RefCell<Output>,
    /// A write that failed: the model's own errors do not carry it.
    failed: Cell<Option<io::Error>>,
    /// Number of the stretch's first token.
    first: usize,
}

impl Rows {
    /// Writes something; where that fails, asks to stop.
    fn keep(&self, write: impl FnOnce(&mut Output) -> io::Result<()>) -> Result<(), ModelError> {
        write(&mut self.out.borrow_mut()).map_err(|error| {
            self.failed.set(Some(error));
            ModelError::Cancelled
        })
    }
}

/// Writes what each layer did with a stretch, which goes through the layers in one batch or in several.
struct Layers<'a> {
    rows: &'a Rows,
    /// Rows of earlier batches, and of the one that runs.
    before: usize,
    batch: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl Observer for Layers<'_> {
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        if layer == 0 {
            self.before += std::mem::replace(&mut self.batch, batch.len());
        }
        self.ids = routing.ids().to_vec();
        self.weights = routing.weights().to_vec();
        Ok(())
    }

    fn residual(&mut self, layer: usize, _: &Batch, x: &[f32]) -> io::Result<()> {
        let first = self.rows.first + self.before;
        // A failure is kept, and ends the pass.
        let kept = self.rows.keep(|out| out.layer(layer, first, x, &self.ids, &self.weights));
        kept.map_err(|_| io::ErrorKind::Interrupted.into())
    }
}

fn with_reference(file: &GgufFile, ids: &[u32], args: &LogitsArgs, context: &Context) -> anyhow::Result<()> {
    let mut reference = Reference::load_with(file, &engine::Loading(context))?;
    let config = reference.config().clone();
    let mut out: Option<Output> = None;
    for (n, stretch) in ids.chunks(STRETCH).enumerate() {
        context.interrupt.check()?;
        let first = n * STRETCH;
        let mut layers = Vec::new();
        let logits = reference.forward_traced(stretch, |_, trace| {
            if args.layers {
                let residual = trace.output.flatten_all()?.to_vec1::<f32>()?;
                layers.push((residual, trace.topk_ids.concat(), trace.topk_weights.concat()));
            }
            Ok(())
        })?;
        let n_vocab = logits.dim(1).map_err(ModelError::from)?;
        let rows = logits.flatten_all().and_then(|rows| rows.to_vec1::<f32>()).map_err(ModelError::from)?;
        let out = match &mut out {
            Some(out) => out,
            None => out.insert(Output::create(args, ids.len(), n_vocab, &config)?),
        };
        let write = |out: &mut Output| -> std::io::Result<()> {
            for (layer, (residual, ids, weights)) in layers.iter().enumerate() {
                out.layer(layer, first, residual, ids, weights)?;
            }
            out.logits(first, &rows)
        };
        write(out).map_err(|error| cannot_write(&args.output, error))?;
    }
    out.map_or(Ok(()), Output::finish)
}

fn cannot_write(path: &Path, error: std::io::Error) -> anyhow::Error {
    anyhow::Error::from(error).context(format!("cannot write {}", path.display()))
}

/// The tensors of one output, filled row by row as they are computed.
struct Output {
    file: TensorFile,
    layers: bool,
}

impl Output {
    fn create(args: &LogitsArgs, n: usize, n_vocab: usize, config: &ModelShape) -> anyhow::Result<Self> {
        let layers = args.layers;
        let mut tensors = vec![("logits".to_owned(), Dtype::F32, vec![n, n_vocab])];
        if layers {
            for layer in 0..config.n_layers {
                tensors.push((format!("layer.{layer}.output"), Dtype::F32, vec![n, config.n_embd]));
                tensors.push((format!("layer.{layer}.topk_ids"), Dtype::I32, vec![n, config.n_experts_used]));
                tensors.push((format!("layer.{layer}.topk_weights"), Dtype::F32, vec![n, config.n_experts_used]));
            }
        }
        Ok(Self { file: TensorFile::create(&args.output, &tensors, args.force)?, layers })
    }

    /// Logits of the rows from `first` on.
    fn logits(&mut self, first: usize, logits: &[f32]) -> std::io::Result<()> {
        self.file.write_f32(0, first, logits)
    }

    /// What a layer did with the tokens from `first` on, which may be cut into several calls.
    fn layer(
        &mut self,
        layer: usize,
        first: usize,
        residual: &[f32],
        ids: &[u32],
        weights: &[f32],
    ) -> std::io::Result<()> {
        if !self.layers {
            return Ok(());
        }
        let base = 1 + 3 * layer;
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        self.file.write_f32(base, first, residual)?;
        self.file.write_i32(base + 1, first, &ids)?;
        self.file.write_f32(base + 2, first, weights)
    }

    fn finish(self) -> anyhow::Result<()> {
        Ok(self.file.finish()?)
    }
}
