//! Loading a model for a command: options to plan to engine, with the plan shown before work begins.

use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::sync::Arc;

use st_gguf::{GgufFile, Header};
use st_model::sampler::SamplerOptions;
use st_model::{
    Draft, Engine, Hot, IoMode, KvType, LoadOptions, LoadProgress, MemoryPlan, PREDICTOR_TENSOR, SmallerModel,
    SparseHead,
};

use super::predictor;
use crate::cli::{EngineArgs, HeadArgs, IoName, KvName};
use crate::context::Context;
use crate::hot;
use crate::models::Model;
use crate::size::show_size;
use st_sys::physical_cores;

/// Compute threads of a command.
pub(crate) fn threads(args: &EngineArgs) -> usize {
    args.threads.0.unwrap_or_else(physical_cores)
}

/// Opens a model. Without a name, the bundled one, and a note says so.
pub(crate) fn open(name: Option<&OsStr>, context: &Context) -> anyhow::Result<GgufFile> {
    if name.is_none() {
        context
            .ui
            .note("note: no MODEL is given; this is `tiny`, the small model inside st-tool: it tells short stories");
    }
    Model::resolve(name.unwrap_or("tiny".as_ref()))?.open_gguf(context)
}

/// Loads a model that is open already.
pub(crate) fn load_file(
    file: GgufFile,
    args: &EngineArgs,
    ctx: Option<usize>,
    kv_type: Option<KvName>,
    context: &Context,
) -> anyhow::Result<Arc<Engine>> {
    load_for(file, args, &HeadArgs::default(), ctx, 1, kv_type, context)
}

/// [`load_file`] for several conversations at once, each of which may fill the context.
pub(crate) fn load_for(
    file: GgufFile,
    args: &EngineArgs,
    head: &HeadArgs,
    ctx: Option<usize>,
    sequences: usize,
    kv_type: Option<KvName>,
    context: &Context,
) -> anyhow::Result<Arc<Engine>> {
    let sparse_head = sparse_head(head, &file, context)?;
    let options = LoadOptions { sequences, sparse_head, hot: hot(&file, args, context), ..options(args, ctx, kv_type) };
    load_with(file, options, &Loading(context), context)
}

/// Tokens of a file's vocabulary; 0 where it has no tokenizer.
pub(crate) fn vocabulary(file: &GgufFile) -> usize {
    file.header.metadata.strings("tokenizer.ggml.tokens").ok().flatten().map_or(0, |tokens| tokens.len())
}

/// What the cache of a model is filled with at its start.
pub(crate) fn hot(file: &GgufFile, args: &EngineArgs, context: &Context) -> Option<Arc<Hot>> {
    args.memory.filter(|_| !args.no_hot).and_then(|_| hot::find(file, context))
}

/// How a model is loaded, by the options of a command.
pub(crate) fn options(args: &EngineArgs, ctx: Option<usize>, kv_type: Option<KvName>) -> LoadOptions {
    LoadOptions {
        threads: threads(args),
        ctx,
        kv_type: kv_type.map(Into::into),
        memory: args.memory,
        io: args.io.into(),
        prefetch: !args.no_prefetch,
        guess: !args.no_guess,
        io_threads: args.reads.map(usize::from),
        isa: args.isa,
        ..LoadOptions::default()
    }
}

/// Loads a model that is open already, followed by `progress`.
pub(crate) fn load_with(
    file: GgufFile,
    options: LoadOptions,
    progress: &dyn LoadProgress,
    context: &Context,
) -> anyhow::Result<Arc<Engine>> {
    tell_of_ignored(&file.header, context);
    let engine = Engine::load_with(file, &options, progress)?;
    context.interrupt.check()?;
    Ok(engine)
}

/// A model that drafts for another, before it is loaded.
pub(crate) struct Smaller {
    file: GgufFile,
    options: LoadOptions,
    /// What it will take, in bytes.
    pub(crate) bytes: u64,
}

/// Tokens that a model which drafts reads, where nobody says how many and memory is counted.
const DRAFTED_CTX: usize = 4096;

impl Smaller {
    /// Opens it; all its experts stay in memory.
    pub(crate) fn open(name: &OsStr, args: &EngineArgs, ctx: Option<usize>, context: &Context) -> anyhow::Result<Self> {
        let file = Model::resolve(name)?.open_gguf(context)?;
        let longest = file.header.model_shape()?.context_length;
        let ctx = ctx.or(args.memory.map(|_| DRAFTED_CTX)).map(|ctx| ctx.min(longest));
        let options = LoadOptions { memory: None, ..options(args, ctx, None) };
        let plan = Engine::plan_for(&file, &options)?;
        Ok(Self { file, options, bytes: plan.total() - plan.process })
    }

    /// Loads it to draft for `larger`.
    pub(crate) fn load(
        self,
        larger: &Engine,
        sampling: SamplerOptions,
        context: &Context,
    ) -> anyhow::Result<Box<dyn Draft>> {
        let engine = load_with(self.file, self.options, &Loading(context), context)?;
        Ok(Box::new(SmallerModel::new(&engine, larger, sampling)?))
    }
}

/// Says what a file holds besides its model; what makes no model is refused by whoever needs one.
pub(crate) fn tell_of_ignored(header: &Header, context: &Context) {
    let notes = header.model_shape().map(|shape| shape.ignored(header)).unwrap_or_default();
    // A predictor is there for who asks for it.
    for note in notes.iter().filter(|note| !note.contains(PREDICTOR_TENSOR)) {
        context.ui.note(format_args!("note: {note}"));
    }
}

/// The part of the LM head that is computed, and the note that says what that means.
pub(crate) fn sparse_head(args: &HeadArgs, file: &GgufFile, context: &Context) -> anyhow::Result<Option<SparseHead>> {
    let Some(threshold) = args.sparse_head else { return Ok(None) };
    let predictor = match &args.predictor {
        Some(path) => Some(predictor::open(path, &file.header.model_shape()?)?),
        None => None,
    };
    context.ui.note(format_args!(
        "note: --sparse-head: answers are approximate; tokens that the predictor scores {threshold} or less cannot be chosen"
    ));
    Ok(Some(SparseHead { threshold, predictor, check: args.sparse_head_check }))
}

/// Shows the memory plan, and stops the loading of a model on request.
pub(crate) struct Loading<'a>(pub(crate) &'a Context);

impl LoadProgress for Loading<'_> {
    fn planned(&self, plan: &MemoryPlan) {
        show_plan(plan, self.0);
    }

    fn reading(&self) -> ControlFlow<()> {
        self.0.interrupt.flow()
    }
}

pub(crate) fn show_plan(plan: &MemoryPlan, context: &Context) {
    let Some(budget) = plan.budget else { return };
    let ctx = match plan.sequences {
        1 => format!("{} tokens", plan.ctx),
        n => format!("{n} × {} tokens", plan.ctx),
    };
    let beside = match plan.beside {
        0 => String::new(),
        bytes => format!(" + server, grammars {}", show_size(bytes)),
    };
    let lent = match plan.lent {
        0 => String::new(),
        lent => format!(" (and up to {lent} in the KV cache's memory until the text takes it)"),
    };
    context.ui.note(format_args!(
        "memory: {} = weights {} + KV cache {} ({ctx}){beside} + buffers {} + chat template {} + {} of {} experts {}{lent} + program {} + reserve {}",
        show_size(budget),
        show_size(plan.dense),
        show_size(plan.kv_full + plan.kv_window),
        show_size(plan.scratch + plan.io),
        show_size(plan.template),
        plan.n_slots(),
        plan.n_experts_total,
        show_size(plan.slot * plan.n_slots() as u64),
        show_size(plan.process),
        show_size(budget.saturating_sub(plan.total() - plan.reserve)),
    ));
    if plan.thrashes() {
        context.ui.note(format_args!(
            "note: one token uses {} experts, more than fit: nearly every expert is read from disk for every token",
            plan.token_cycle
        ));
    }
}

impl From<KvName> for KvType {
    fn from(name: KvName) -> Self {
        match name {
            KvName::Bf16 => Self::Bf16,
            KvName::F16 => Self::F16,
            KvName::Q8_0 => Self::Q8_0,
            KvName::F32 => Self::F32,
        }
    }
}

impl From<IoName> for IoMode {
    fn from(name: IoName) -> Self {
        match name {
            IoName::Auto => Self::Auto,
            IoName::Direct => Self::Direct,
            IoName::Buffered => Self::Buffered,
        }
    }
}
