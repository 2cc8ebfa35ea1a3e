//! The loaded model, shared by every conversation: plan, load, and hold.
//!
//! Owns the order of loading: header and tokenizer, then the memory plan, and only then weights. A budget that does
//! not suffice is refused before anything large is read.

use std::sync::{Arc, OnceLock};

use st_experts::io::ExpertIo;
use st_experts::{ExpertStore, IoMode, StoreOptions, StoreStats};
use st_gguf::GgufFile;
use st_kernels::{Isa, Kernels, KvType, WeightType};

use crate::chat::{ChatError, ChatTemplate};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::model::Model;
use crate::plan::MemoryPlan;
use crate::progress::{LoadProgress, NoProgress};
use crate::sizes;
use crate::tokenizer::Tokenizer;
use crate::weights::TensorSource;

/// How to load and run a model.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Compute threads.
    pub threads: usize,
    /// Context length in tokens; `None` takes the model's own, or what the budget allows.
    pub ctx: Option<usize>,
    /// How keys and values are kept; `None` is as exact as the weights call for: BF16 where they are quantized, otherwise F16.
    pub kv_type: Option<KvType>,
    /// The most memory that the process may use, in bytes.
    pub memory: Option<u64>,
    /// At most this many experts in the cache, whatever the memory allows; `None` takes what the plan gives.
    pub slots: Option<usize>,
    /// How experts are read.
    pub io: IoMode,
    /// What to read experts through, whatever `io` says: other storage than the file, or one that fails on purpose. The
    /// offsets are those of the file.
    pub expert_io: Option<Arc<dyn ExpertIo>>,
    /// Whether reads of chosen experts start before attention.
    pub prefetch: bool,
    /// Whether the next layer's experts are guessed and read ahead, where guesses prove right.
    pub guess: bool,
    /// Expert reads in flight at once; `None` lets the store choose.
    pub io_threads: Option<usize>,
    /// Kernels to use; `None` takes the best that the CPU has.
    pub isa: Option<Isa>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            threads: 1,
            ctx: None,
            kv_type: None,
            memory: None,
            slots: None,
            io: IoMode::Auto,
            expert_io: None,
            prefetch: true,
            guess: true,
            io_threads: None,
            isa: None,
        }
    }
}

/// Tokens of a prompt that go through the layers together under a budget, which their buffers are part of.
const BATCH: usize = 512;
/// Without a budget: every matrix is unpacked a quarter as often.
const BATCH_UNLIMITED: usize = 2048;

/// Tokens of a prompt that go through the layers together under `budget`. It changes no bit.
fn batch_within(budget: Option<u64>) -> usize {
    if budget.is_some() { BATCH } else { BATCH_UNLIMITED }
}

impl LoadOptions {
    /// Tokens of a prompt that go through the layers together.
    pub(crate) fn batch(&self) -> usize {
        batch_within(self.memory)
    }

    /// The kernels that pack and compute.
    ///
    /// # Errors
    /// [`ModelError::Isa`] where the CPU lacks the instruction set that is asked for.
    pub(crate) fn kernels(&self) -> Result<Kernels, ModelError> {
        match self.isa {
            Some(isa) => Kernels::for_isa(isa).ok_or(ModelError::Isa { name: isa.name() }),
            None => Ok(Kernels::detect()),
        }
    }

    /// How keys and values of a model with weights of type `weights` are kept.
    pub(crate) fn kv_type_for(&self, weights: WeightType) -> KvType {
        self.kv_type.unwrap_or(if weights.is_quantized() { KvType::Bf16 } else { KvType::F16 })
    }

    /// What of it concerns the expert store.
    pub(crate) fn store(&self) -> StoreOptions {
        let defaults = StoreOptions::default();
        let io_threads = self.io_threads.unwrap_or(defaults.io_threads);
        // Large pages serve direct reads, which a budget brings. Where every expert stays, they gain 2 to 3 % of generation and
        // cost seconds at the start on virtual machines whose host takes back free memory.
        let huge_pages = self.memory.is_some();
        StoreOptions { io: self.io, io_threads, prefetch: self.prefetch, huge_pages, ..defaults }
    }
}

/// A model ready to run. Immutable but for the expert cache; conversations borrow it.
pub struct Engine {
    model: Model,
    tokenizer: Option<Tokenizer>,
    chat_template: Result<Option<ChatTemplate>, ChatError>,
    /// Whether the template compiles, once somebody asked for it.
    template_check: OnceLock<Result<(), ChatError>>,
    end_ids: Vec<u32>,
    plan: MemoryPlan,
    kv_type: KvType,
}

impl Engine {
    /// The plan that [`Engine::load`] would follow, without loading.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn plan_for(file: &GgufFile, options: &LoadOptions) -> Result<MemoryPlan, ModelError> {
        let config = file.header.model_shape()?;
        let source = TensorSource::new(file, &config, &NoProgress)?;
        sizes::plan(&source, &config, options)
    }

    /// Loads the model of `file`: dense weights now, experts when they are first asked for.
    ///
    /// # Errors
    /// Where the file is not a complete SmallThinker model, the context is not possible, or the budget too small.
    pub fn load(file: GgufFile, options: &LoadOptions) -> Result<Self, ModelError> {
        Self::load_with(file, options, &NoProgress)
    }

    /// [`Engine::load`] that `progress` follows and may stop.
    ///
    /// # Errors
    /// As [`Engine::load`]; [`ModelError::Cancelled`] where `progress` breaks.
    pub fn load_with(
        mut file: GgufFile,
        options: &LoadOptions,
        progress: &dyn LoadProgress,
    ) -> Result<Self, ModelError> {
        let config = file.header.model_shape()?;
        let tokenizer = Tokenizer::from_metadata_with(&file.header.metadata, progress)?;
        let chat_template = ChatTemplate::unchecked(&file.header.metadata);
        let end_ids = match &tokenizer {
            Some(tokenizer) => tokenizer.end_ids().to_vec(),
            None => crate::tokenizer::end_ids(&file.header.metadata)?,
        };
        // The tokenizer has its own copy by now; the header's would only take memory.
        for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"] {
            file.header.metadata.remove(key);
        }
        let source = TensorSource::new(&file, &config, progress)?;
        let plan = sizes::plan(&source, &config, options)?;
        progress.planned(&plan);
        let (index, format) = (source.experts().clone(), sizes::slot_format(&source, options.kernels()?));
        let store_options = StoreOptions {
            n_slots: plan.n_slots,
            top_k: config.n_experts_used,
            guess_slots: if options.guess { 2 * config.n_experts_used } else { 0 },
            ..options.store()
        };
        let store = match &options.expert_io {
            Some(io) => ExpertStore::with_io(Box::new(Arc::clone(io)), index, format, store_options),
            None => ExpertStore::new(Arc::clone(&file.source), index, format, store_options),
        }?;
        let kv_type = options.kv_type_for(source.format().ty());
        let model = Model::load(&source, config, store, options)?;
        Ok(Self { model, tokenizer, chat_template, template_check: OnceLock::new(), end_ids, plan, kv_type })
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Where the memory goes.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The file's tokenizer, where it has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The file's chat template, where it has one.
    ///
    /// # Errors
    /// Where it cannot be used. Only chats need one, so this keeps no model from being loaded.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>, &ChatError> {
        let template = self.chat_template.as_ref()?.as_ref();
        // Compiled when first asked for: what needs no template runs however broken it is.
        self.template_check.get_or_init(|| template.map_or(Ok(()), ChatTemplate::check)).as_ref()?;
        Ok(template)
    }

    /// Tokens that end an answer.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Tokens that a context holds.
    pub fn ctx(&self) -> usize {
        self.plan.ctx
    }

    /// Size of the vocabulary, as the embedding has it.
    pub fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    /// The instruction set that computes.
    pub fn isa(&self) -> Isa {
        self.model.isa()
    }

    /// How keys and values are kept.
    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Tokens of a prompt that go through the layers together.
    pub(crate) fn batch(&self) -> usize {
        batch_within(self.plan.budget)
    }

    /// What the expert cache did since it was made.
    pub fn store_stats(&self) -> StoreStats {
        self.model.store().stats()
    }

    pub(crate) fn model(&self) -> &Model {
        &self.model
    }
}
