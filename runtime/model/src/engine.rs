//! The loaded model, shared by every conversation: plan, load, and hold.
//!
//! Owns the order of loading: header and tokenizer, then the memory plan, and only then weights. A budget that does
//! not suffice is refused before anything large is read.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use st_experts::{ExpertStore, Hot, StoreOptions, StoreStats};
use st_format::ModelShape;
use st_gguf::GgufFile;
use st_kernels::{Isa, KvFormat, KvPool, KvType};

use crate::batch::Batch;
use crate::chat::{ChatError, ChatTemplate};
use crate::error::ModelError;
use crate::kv_cache::{self, LayerKv};
use crate::model::Model;
use crate::observer::Observer;
use crate::ops::HeadStats;
use crate::options::LoadOptions;
use crate::plan::MemoryPlan;
use crate::progress::{LoadProgress, NoProgress};
use crate::sequence::Sequence;
use crate::sizes;
use crate::snapshot::{self, SnapshotError};
use crate::tokenizer::Tokenizer;
use crate::weights::TensorSource;
use crate::workspace::{Workspace, logit_rows};

/// A model ready to run, to be shared: immutable but for the expert cache. It computes rows of any number of sequences
/// ([`Engine::forward`]); a [`Session`](crate::Session) is the simple way to run one.
pub struct Engine {
    /// Tells this engine's sequences from others'.
    id: u64,
    model: Model,
    tokenizer: Option<Tokenizer>,
    chat_template: Result<Option<ChatTemplate>, Arc<ChatError>>,
    /// Whether the template compiles, once somebody asked for it.
    template_check: OnceLock<Result<(), Arc<ChatError>>>,
    end_ids: Vec<u32>,
    plan: MemoryPlan,
    /// The memory of all sequences' keys and values.
    kv: KvPool,
    /// What tells the model from others.
    identity: [u8; 32],
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("id", &self.id).field("plan", &self.plan).finish_non_exhaustive()
    }
}

/// What threads may share, checked when this is compiled.
const _: () = {
    const fn shared<T: Send + Sync + 'static>() {}
    const fn owned<T: Send + 'static>() {}
    shared::<Engine>();
    owned::<Sequence>();
    owned::<Workspace>();
};

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

    /// Loads the model of the GGUF file at `path`.
    ///
    /// # Errors
    /// Where it cannot be opened, and as [`Engine::load`].
    pub fn open(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Arc<Self>, ModelError> {
        Self::load(GgufFile::open(path)?, options)
    }

    /// Loads the model of `file`: dense weights now, experts when they are first asked for.
    ///
    /// # Errors
    /// Where the file is not a complete SmallThinker model, the context is not possible, or the budget too small.
    pub fn load(file: GgufFile, options: &LoadOptions) -> Result<Arc<Self>, ModelError> {
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
    ) -> Result<Arc<Self>, ModelError> {
        let config = file.header.model_shape()?;
        let tokenizer = Tokenizer::from_metadata_with(&file.header.metadata, progress)?;
        let mut chat_template = ChatTemplate::unchecked(&file.header.metadata).map_err(Arc::new);
        if options.memory.is_some() {
            chat_template = chat_template.map(|template| template.map(ChatTemplate::within_a_budget));
        }
        let end_ids = match &tokenizer {
            Some(tokenizer) => tokenizer.end_ids().to_vec(),
            None => crate::vocabulary::end_ids(&file.header.metadata)?,
        };
        // The tokenizer has its own copy by now; the header's would only take memory.
        for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"] {
            file.header.metadata.remove(key);
        }
        let identity = snapshot::identity(&file, &config)?;
        let source = TensorSource::new(&file, &config, progress)?;
        let plan = sizes::plan(&source, &config, options)?;
        progress.planned(&plan);
        let (index, format) = (source.experts().clone(), sizes::slot_format(&source, options.kernels()?));
        let store_options = StoreOptions {
            top_k: config.n_experts_used,
            guess_slots: if options.guess { 2 * config.n_experts_used } else { 0 },
            lent: plan.lent,
            ..options.store(plan.residency)
        };
        let store = match &options.expert_io {
            Some(io) => ExpertStore::with_io(Box::new(Arc::clone(io)), index, format, store_options),
            None => ExpertStore::new(Arc::clone(&file.source), index, format, store_options),
        }?;
        if let Some(hot) = &options.hot
            && hot.is_of(&fingerprint(&identity), config.n_layers, config.n_experts)
        {
            // They are read while the other weights are.
            store.warm(hot.order().into_iter());
        }
        let kv_format = kv_cache::format(&config, options.kv_type_for(source.is_quantized()));
        let planned = pages(&plan, kv_format);
        let store = Arc::new(store);
        let kv = match plan.lent {
            0 => KvPool::new(kv_format, if plan.budget.is_some() { planned } else { usize::MAX }),
            _ => lent_pages(&store, &plan, kv_format, planned),
        };
        let model = Model::load(&source, config, store, plan.residency, options)?;
        static ENGINES: AtomicU64 = AtomicU64::new(0);
        let id = ENGINES.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self {
            id,
            model,
            tokenizer,
            chat_template,
            template_check: OnceLock::new(),
            end_ids,
            plan,
            kv,
            identity,
        }))
    }

    /// An empty text.
    pub fn sequence(&self) -> Sequence {
        let layer = |layer| LayerKv::new(self.config(), layer, &self.kv);
        Sequence::new(self.id, (0..self.config().n_layers).map(layer).collect())
    }

    /// Writes a text and what later tokens need of it, for [`Engine::restore`].
    ///
    /// # Errors
    /// What writing meets; [`ModelError::Foreign`] within for another engine's text.
    pub fn save(&self, sequence: &Sequence, out: impl std::io::Write) -> Result<(), SnapshotError> {
        sequence.check_engine(self.id).map_err(Box::new)?;
        Ok(self.expected().write(sequence.tokens(), sequence.layers(), out)?)
    }

    /// Reads a text that was written by an engine of the same model, on whatever machine, with whatever budget. What goes on from
    /// it has the bits of a run from the beginning.
    ///
    /// # Errors
    /// [`SnapshotError`]: whatever keeps it from being exactly what was written.
    pub fn restore(&self, input: impl std::io::Read) -> Result<Sequence, SnapshotError> {
        let expected = self.expected();
        let (head, rest) = expected.head(input)?;
        let kv = expected.pages(&head, rest, &self.kv)?;
        let n_vocab = self.n_vocab();
        match head.tokens.iter().any(|&id| id as usize >= n_vocab) {
            true => Err(SnapshotError::Damaged("its tokens are no tokens")),
            false => Ok(Sequence::restored(self.id, head.tokens, kv)),
        }
    }

    /// The tokens of a snapshot, whose pages are not looked at.
    ///
    /// # Errors
    /// As [`Engine::restore`].
    pub fn snapshot_tokens(&self, input: impl std::io::Read) -> Result<Vec<u32>, SnapshotError> {
        Ok(self.expected().head(input)?.0.tokens)
    }

    /// How many tokens of a text are kept that is restored from a snapshot of `tokens` and cut to `len`.
    pub fn snapshot_keeps(&self, tokens: usize, len: usize) -> usize {
        self.expected().keeps(tokens, len)
    }

    /// Bytes of a snapshot of `sequence`, about and not less.
    pub fn snapshot_bytes(&self, sequence: &Sequence) -> u64 {
        let pages = sequence.len().div_ceil(kv_cache::POSITION_STEP) * self.config().n_layers;
        (pages * (self.kv.format().page_bytes() + 4) + 4 * sequence.len() + 1024 + 16 * self.config().n_layers) as u64
    }

    fn expected(&self) -> snapshot::Expected<'_> {
        let (windows, ctx) = (self.config().windows.as_slice(), self.ctx());
        snapshot::Expected { model: &self.identity, format: self.kv.format(), windows, ctx }
    }

    /// The buffers of one forward pass. The memory plan counts one: whoever runs several at once needs more.
    ///
    /// # Errors
    /// Where they cannot be allocated.
    pub fn workspace(&self) -> Result<Workspace, ModelError> {
        Ok(Workspace::new(self.id, self.config(), self.n_vocab(), self.max_rows()))
    }

    /// Runs the rows of `batch`, each of which goes on with one of `sequences`; [`Workspace::logits`] has the logits that were
    /// asked for. A row's logits are, bit for bit, those that it would have alone. Where it fails, for whatever reason, the
    /// sequences are as they were.
    ///
    /// # Errors
    /// [`ModelError::EmptyPrompt`], [`ModelError::TokenId`], [`ModelError::ContextFull`], [`ModelError::BatchRows`],
    /// [`ModelError::LogitRows`], [`ModelError::NoSequence`], [`ModelError::Foreign`], [`ModelError::KvFull`] before anything is
    /// computed; then
    /// [`ModelError::Experts`] for what cannot be read, [`ModelError::Observer`] and [`ModelError::Cancelled`] for what the
    /// observer says.
    pub fn forward(
        &self,
        batch: &Batch,
        sequences: &mut [&mut Sequence],
        workspace: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<(), ModelError> {
        self.check(batch, sequences, workspace)?;
        self.model.forward(batch, sequences, workspace, observer)
    }

    /// Logits of some rows of the batch that went through `workspace` last, instead of those that it has.
    pub(crate) fn head(&self, rows: &[usize], workspace: &mut Workspace) -> Result<(), ModelError> {
        self.model.head(rows, workspace)
    }

    fn check(&self, batch: &Batch, sequences: &[&mut Sequence], workspace: &Workspace) -> Result<(), ModelError> {
        if workspace.engine != self.id {
            return Err(ModelError::Foreign { what: "workspace" });
        }
        sequences.iter().try_for_each(|sequence| sequence.check_engine(self.id))?;
        self.check_tokens(batch.tokens())?;
        if batch.len() > self.max_rows() {
            return Err(ModelError::BatchRows { got: batch.len(), most: self.max_rows() });
        }
        if batch.wants_logits().len() > self.max_logits() {
            return Err(ModelError::LogitRows { got: batch.wants_logits().len(), most: self.max_logits() });
        }
        let n = sequences.len();
        if let Some(&index) = batch.sequences().iter().find(|&&index| index >= n) {
            return Err(ModelError::NoSequence { index, n });
        }
        for (index, sequence) in sequences.iter().enumerate() {
            self.check_room(sequence.len() + batch.sequences().iter().filter(|&&of| of == index).count())?;
        }
        Ok(())
    }

    /// Refuses tokens that are none, or too few to go on from.
    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<(), ModelError> {
        let n_vocab = self.n_vocab();
        match tokens.iter().find(|&&id| id as usize >= n_vocab) {
            Some(&id) => Err(ModelError::TokenId { id, n_vocab }),
            None if tokens.is_empty() => Err(ModelError::EmptyPrompt),
            None => Ok(()),
        }
    }

    /// Refuses a text of more tokens than the context holds.
    pub(crate) fn check_room(&self, needed: usize) -> Result<(), ModelError> {
        if needed > self.ctx() { Err(ModelError::ContextFull { needed, ctx: self.ctx() }) } else { Ok(()) }
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelShape {
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
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>, Arc<ChatError>> {
        let template = self.chat_template.as_ref().map_err(Arc::clone)?.as_ref();
        // Compiled when first asked for: what needs no template runs however broken it is.
        let check = || template.map_or(Ok(()), ChatTemplate::check).map_err(Arc::new);
        self.template_check.get_or_init(check).clone()?;
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
        self.kv.format().ty()
    }

    /// The memory of keys and values: pages in use, and the most that may be.
    pub fn kv_pages(&self) -> (usize, usize) {
        (self.kv.in_use(), self.kv.most())
    }

    /// Pages of keys and values that the plan counts: those of all its sequences at the full context.
    pub fn planned_pages(&self) -> usize {
        pages(&self.plan, self.kv.format())
    }

    /// Experts that have a slot now: those of the plan, and those in memory that keys and values do not need yet.
    pub fn expert_slots(&self) -> usize {
        self.model.store().usable_slots()
    }

    /// Refuses texts that the context cannot hold together before anything is made of them: rendering and encoding take several
    /// times their size. Texts so short that this takes no memory to speak of are left to [`Engine::forward`].
    ///
    /// # Errors
    /// [`ModelError::ContextFull`] with a number of tokens that they have at least; [`ModelError::NoTokenizer`].
    pub fn check_texts<'t>(&self, texts: impl Iterator<Item = &'t str> + Clone) -> Result<(), ModelError> {
        const SHORT: usize = 64 << 10;
        let tokenizer = self.tokenizer().ok_or(ModelError::NoTokenizer)?;
        let bytes: usize = texts.clone().map(str::len).sum();
        if bytes <= SHORT.max(self.ctx()) {
            return Ok(());
        }
        let mut needed = bytes / tokenizer.longest_token().max(1);
        if needed <= self.ctx() {
            needed = 0;
            for text in texts {
                needed += tokenizer.count_to(text, self.ctx() + 1 - needed.min(self.ctx()))?;
            }
        }
        self.check_room(needed)
    }

    /// What tells the model and its settings from all others, for people: the same for the same weights, on every machine.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.identity)
    }

    /// [`Engine::fingerprint`] of a file that is not loaded yet.
    ///
    /// # Errors
    /// Where it holds no model.
    pub fn fingerprint_of(file: &GgufFile) -> Result<String, ModelError> {
        Ok(fingerprint(&snapshot::identity(file, &file.header.model_shape()?)?))
    }

    /// How often each expert was used since the model was loaded, for [`LoadOptions::hot`]; `None` where every expert has a slot, or none
    /// was used.
    pub fn hot(&self) -> Option<Hot> {
        let uses = self.expert_activity().0;
        let used = self.plan.residency.reads_again() && uses.iter().any(|&n| n > 0);
        let layers = uses.chunks(self.config().n_experts.max(1));
        let layers = layers.map(|layer| layer.iter().map(|&n| u64::from(n)).collect()).collect();
        used.then(|| Hot::new(self.fingerprint(), layers))
    }

    /// Rows that one pass takes, at most.
    pub fn max_rows(&self) -> usize {
        self.plan.residency.batch()
    }

    /// Rows whose logits one pass gives, at most.
    pub fn max_logits(&self) -> usize {
        logit_rows(self.plan.sequences)
    }

    /// As [`ExpertStore::activity`]: which experts were used, and which were read.
    pub fn expert_activity(&self) -> (Vec<u32>, Vec<u32>) {
        self.model.store().activity()
    }

    /// Bytes per second of experts, as a file has them that is not packed, that one thread arranges for the kernels: what a miss costs
    /// beside its read. Measured when it is asked for, on the shape and types of the first layer; takes some milliseconds.
    pub fn arranging_speed(&self) -> f64 {
        self.model.arranging_speed()
    }

    /// What a sparse head did since the model was loaded; `None` where every row is computed.
    pub fn head_stats(&self) -> Option<HeadStats> {
        self.model.head_stats()
    }

    /// What the expert cache did since it was made.
    pub fn store_stats(&self) -> StoreStats {
        self.model.store().stats()
    }
}

/// A few bytes of what tells a model from others, as text.
fn fingerprint(identity: &[u8; 32]) -> String {
    identity[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Pages of keys and values whose memory experts use as long as no text needs it.
fn lent_pages(store: &Arc<ExpertStore>, plan: &MemoryPlan, format: KvFormat, planned: usize) -> KvPool {
    let (page, slot) = (format.page_bytes() as u64, plan.slot.max(1));
    // Texts may outlive the engine; the store must not.
    let store = Arc::downgrade(store);
    KvPool::lent(format, planned, move |taken| {
        let unused = planned.saturating_sub(taken) as u64 * page;
        if let Some(store) = store.upgrade()
            && let Err(error) = store.set_lent(usize::try_from(unused / slot).unwrap_or(usize::MAX))
        {
            tracing::warn!(%error, "the system takes no memory back");
        }
    })
}

/// Pages that a plan counts.
fn pages(plan: &MemoryPlan, format: KvFormat) -> usize {
    usize::try_from((plan.kv_full + plan.kv_window) / format.page_bytes() as u64).unwrap_or(usize::MAX)
}
