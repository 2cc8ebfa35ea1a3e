//! `run --receipt FILE`: what proves an answer; `st-tool verify`: proving it by making it again.

use std::ffi::OsStr;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use indicatif::ProgressBar;
use serde_json::Value;
use st_gguf::{GgufFile, Kind, OutputFile};
use st_grammar::{Grammars, Source};
use st_model::sampler::Sampler;
use st_model::{
    Engine, GenerateOptions, Generation, LoadOptions, LoadProgress, ModelDigest, Observer, Proven, Receipt, Settings,
};

use super::{engine, fit};
use crate::cli::VerifyArgs;
use crate::context::Context;
use crate::models::Model;
use crate::report::Advice;
use crate::{input, ui};

/// Bytes of a receipt that are read, at most: its longest parts are a hash for each expert's matrix and one for each token.
const MOST: u64 = 64 << 20;
const MORE: &str = "more than a receipt takes";

const RECEIPT: Kind = Kind {
    name: "a receipt",
    recognizes: |bytes| {
        let mut first = Vec::new();
        bytes.take(64).read_to_end(&mut first)?;
        first.retain(|byte| !byte.is_ascii_whitespace());
        Ok(first.starts_with(br#"{"st_tool_receipt":"#))
    },
};

/// A receipt that was asked for, before there is a model.
pub(crate) struct ReceiptFile {
    path: PathBuf,
    file: OutputFile,
}

/// A receipt of an answer of a model that is known.
pub(crate) struct Begun {
    path: PathBuf,
    file: OutputFile,
    name: String,
    digest: ModelDigest,
    sampler: Sampler,
    fit: Option<Value>,
}

impl ReceiptFile {
    /// Makes sure that `path` can be written.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let file = OutputFile::create(path, RECEIPT, true).with_context(|| cannot_write(path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Reads all of the model in `model`, which was called `name`; its answer's tokens will be chosen by a sampler like this one, and
    /// have to fit what is said beside it.
    pub(crate) fn begin(
        self,
        name: Option<&OsStr>,
        model: &GgufFile,
        threads: usize,
        (sampler, fit): (&Sampler, Option<Value>),
        context: &Context,
    ) -> anyhow::Result<Begun> {
        let name = name.map_or("tiny".into(), OsStr::to_string_lossy).into_owned();
        let digest = digest(model, threads, context)?;
        Ok(Begun { path: self.path, file: self.file, name, digest, sampler: sampler.clone(), fit })
    }
}

impl Begun {
    /// Completes the file with the receipt of `answer`.
    pub(crate) fn finish(
        mut self,
        engine: &Engine,
        prompt: &[u32],
        options: &GenerateOptions,
        answer: &Generation,
        context: &Context,
    ) -> anyhow::Result<()> {
        let settings = Settings::of(engine, &self.sampler, options, self.fit);
        let seed = self.sampler.options().seed;
        let receipt = Receipt::new(&self.name, &self.digest, prompt, settings, seed, Proven::from(answer));
        let json = receipt.to_json()?;
        std::io::Write::write_all(&mut self.file, json.as_bytes()).with_context(|| cannot_write(&self.path))?;
        self.file.finish().with_context(|| cannot_write(&self.path))?;
        let (path, n) = (self.path.display(), answer.ids.len());
        context.ui.note(format_args!("{path}: a receipt of {n} tokens; `st-tool verify {path}` proves them"));
        Ok(())
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// The hashes of a model, with a bar while it is read.
pub(crate) fn digest(file: &GgufFile, threads: usize, context: &Context) -> anyhow::Result<ModelDigest> {
    let total = file.header.tensors.iter().map(|tensor| tensor.n_bytes).sum();
    let bar = ui::bytes_bar(context.ui, "hashing the model", total);
    let digest = ModelDigest::of(file, threads, &Hashing { bar: &bar, context });
    bar.finish_and_clear();
    Ok(digest?)
}

struct Hashing<'a> {
    bar: &'a ProgressBar,
    context: &'a Context,
}

impl LoadProgress for Hashing<'_> {
    fn reading(&self) -> ControlFlow<()> {
        self.context.interrupt.flow()
    }

    fn loaded(&self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

/// `st-tool verify`: makes the answer of a receipt again, and says whether all is the same.
pub(crate) fn verify(args: &VerifyArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let name = input::name(&args.receipt);
    let text = input::text(&args.receipt, MOST, MORE, &context.interrupt)?;
    let receipt = Receipt::parse(&text).with_context(|| name.clone())?;
    let sampler = receipt.sampler().with_context(|| name.clone())?;
    drop(sampler);
    if receipt.version != env!("CARGO_PKG_VERSION") {
        let (theirs, ours) = (&receipt.version, env!("CARGO_PKG_VERSION"));
        context.ui.note(format_args!(
            "note: {name} was made by version {theirs}; this is {ours}, and may compute other bits"
        ));
    }
    let model = args.model.as_deref().unwrap_or(OsStr::new(receipt.model_name()));
    let file = Model::resolve(model)?.open_gguf(context)?;
    let digest = digest(&file, engine::threads(&args.engine), context)?;
    if let Some(difference) = receipt.other_model(&digest) {
        let message = format!("{} is not the model of {name}: {difference}", file.header.file_name());
        return Err(Advice::new(message, "st-tool verify RECEIPT MODEL takes the model that made the answer").into());
    }
    let source = receipt.settings.fit.as_ref().map(Source::from_json).transpose().with_context(|| name.clone())?;
    let beside = source.as_ref().map_or(0, |_| Grammars::memory(engine::vocabulary(&file), 1));
    let ctx = receipt.tokens().min(file.header.model_shape()?.context_length).max(1);
    let kv_type = Some(receipt.settings.kv_type()?);
    let options = LoadOptions { beside, kv_type, ..engine::options(&args.engine, Some(ctx), None) };
    let engine = engine::load_with(file, options, &engine::Loading(context), context)?;
    if let Some(difference) = receipt.other_end(&engine) {
        return Err(Advice::new(format!("{name} is not proven: {difference}"), PROVEN_BY).into());
    }
    let grammar = source.map(|source| fit::compile(&engine, &source)).transpose()?;
    let bar = ui::count_bar(context.ui, "making it again", receipt.tokens() as u64);
    let mut watch = Watch { bar: &bar, context };
    let outcome = receipt.again(&engine, fit::constraint(grammar.as_ref()), &mut watch, &mut || {
        bar.inc(1);
        context.interrupt.flow()
    });
    bar.finish_and_clear();
    if let Some(difference) = outcome? {
        return Err(Advice::new(format!("{name} is not proven: {difference}"), PROVEN_BY).into());
    }
    let tokens = receipt.answer().ids.len();
    ui::print(&format!(
        "the same: {tokens} tokens and the logits that each was chosen by, of model {}…\n",
        &receipt.model_sha256()[..receipt.model_sha256().len().min(16)]
    ))?;
    Ok(ExitCode::SUCCESS)
}

const PROVEN_BY: &str =
    "the receipt, or what made it, is not what it says; `st-tool run --receipt FILE` writes a receipt";

struct Watch<'a> {
    bar: &'a ProgressBar,
    context: &'a Context,
}

impl Observer for Watch<'_> {
    fn progress(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        // The prompt alone: of the answer each token is told of.
        if of > 1 {
            self.bar.set_position(done as u64);
        }
        self.context.interrupt.flow()
    }
}
