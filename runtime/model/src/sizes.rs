//! How much memory each part of a model takes: the numbers that the plan is made of.

use std::sync::Arc;

use st_experts::{SlotFormat, StoreMemory, StoreOptions};
use st_format::ModelShape;
use st_kernels::{ExpertFormat, Kernels, Matrix, Q8Acts};

use crate::error::ModelError;
use crate::kv_cache::{self, POSITION_STEP};
use crate::lookup::Lookup;
use crate::moe::Moe;
use crate::ops::{Linear, SparseHead};
use crate::options::LoadOptions;
use crate::plan::{Costs, FixedCosts, MemoryPlan, PlanRequest, PlanShape, Residency, VariableCosts};
use crate::template::MOST_UNDER_A_BUDGET;
use crate::weights::{self, TensorSource};
use crate::workspace::{Workspace, logit_rows};

/// The expert formats as the store wants them: where matrices lie in a slot, and how to put them there.
#[derive(Debug)]
struct Slots {
    /// Per layer.
    formats: Vec<ExpertFormat>,
    kernels: Kernels,
}

impl SlotFormat for Slots {
    fn slot_bytes(&self) -> usize {
        self.formats.iter().map(ExpertFormat::record_bytes).max().unwrap_or(0)
    }

    fn record_bytes(&self, layer: usize) -> usize {
        self.formats[layer].record_bytes()
    }

    fn region(&self, layer: usize, matrix: Matrix) -> std::ops::Range<usize> {
        self.formats[layer].region(matrix)
    }

    fn canonical_bytes(&self, layer: usize, matrix: Matrix) -> usize {
        self.formats[layer].canonical_bytes(matrix)
    }

    fn fill(&self, layer: usize, matrix: Matrix, canonical: &[u8], region: &mut [u8]) {
        self.kernels.pack_expert(&self.formats[layer], matrix, canonical, region);
    }
}

/// How experts of this file lie in the store's slots.
pub(crate) fn slot_format(source: &TensorSource<'_>, kernels: Kernels) -> Arc<dyn SlotFormat> {
    Arc::new(Slots { formats: source.formats().to_vec(), kernels })
}

/// The memory plan of a file under `options`.
///
/// # Errors
/// [`ModelError::Budget`], [`ModelError::BudgetUnknown`], [`ModelError::BudgetBeyondContainer`], [`ModelError::Context`].
pub(crate) fn plan(
    source: &TensorSource<'_>,
    config: &ModelShape,
    options: &LoadOptions,
) -> Result<MemoryPlan, ModelError> {
    let request = PlanRequest {
        budget: options.memory,
        ctx: options.ctx,
        sequences: options.sequences.max(1),
        slots: options.slots,
    };
    let shape = PlanShape {
        n_layers: config.n_layers,
        n_experts: config.n_experts,
        n_experts_used: config.n_experts_used,
        max_ctx: config.context_length,
        ctx_step: POSITION_STEP,
    };
    within_container(options.memory, st_sys::memory_limit())?;
    let process = process_bytes(options.memory, st_sys::resident())?;
    let slots = slot_format(source, options.kernels()?);
    // The store maps whole large pages: what one slot takes beyond its own bytes is the most that any number loses.
    let slot = slots.slot_bytes().next_multiple_of(st_experts::PAGE);
    let longest = options.ctx.map_or(config.context_length, |ctx| ctx.min(config.context_length));
    let drafts = request.sequences.saturating_mul(Lookup::bytes(longest));
    let costs = |residency: Residency| -> Result<Costs, ModelError> {
        let store = StoreOptions { n_slots: 1, ..options.store(residency) };
        let one = StoreMemory::of(source.experts(), &*slots, &store);
        let fixed = FixedCosts {
            process,
            beside: options.beside,
            dense: dense(source, config, residency, options)?,
            scratch: scratch(config, source.n_vocab(), residency.batch(), request.sequences) + drafts as u64,
            io: one.io_buffer_bytes as u64 + (one.slab_bytes - slot) as u64,
            template: match options.memory {
                Some(_) if source.has_chat_template() => MOST_UNDER_A_BUDGET as u64,
                _ => 0,
            },
        };
        let page = kv_cache::format(config, options.kv_type_for(source.is_quantized())).page_bytes() as u64;
        let ctx = options.ctx.unwrap_or(config.context_length);
        let of = |window: &Option<usize>| page * kv_cache::most_pages(*window, ctx, residency.batch()) as u64;
        let full_layers = config.windows.iter().filter(|window| window.is_none()).count() as u64;
        let variable = VariableCosts {
            kv_full_per_token: full_layers * page / POSITION_STEP as u64,
            kv_window: config.windows.iter().filter(|window| window.is_some()).map(of).sum(),
            slot: slot as u64,
        };
        Ok(Costs { fixed, variable })
    };
    let cached = Residency::Cached { slots: 1 };
    MemoryPlan::new(&request, shape, costs(Residency::All)?, costs(cached)?).map_err(with_slack)
}

/// The process is measured anew at every start and differs a little: the smallest budget that is named has to work then, too.
fn with_slack(error: ModelError) -> ModelError {
    const SLACK: u64 = 1 << 20;
    match error {
        ModelError::Budget { budget, minimum, ctx } => ModelError::Budget { budget, minimum: minimum + SLACK, ctx },
        other => other,
    }
}

/// Everything but the experts, as it lies in memory.
fn dense(
    source: &TensorSource<'_>,
    config: &ModelShape,
    residency: Residency,
    options: &LoadOptions,
) -> Result<u64, ModelError> {
    let matrix = |name: &str, rows: usize, cols: usize| -> Result<u64, ModelError> {
        let ty = source.weight_type(name)?;
        let bytes = Linear::bytes_for(ty, rows, cols);
        bytes.map(|bytes| bytes as u64).ok_or_else(|| ModelError::Blocks {
            name: name.to_owned(),
            ty: ty.name(),
            n_in: cols,
        })
    };
    let (n_embd, n_vocab) = (config.n_embd, source.n_vocab());
    let mut total = match source.predictor(options)? {
        None => matrix(source.head(), n_vocab, n_embd)?,
        Some(predictor) => {
            let (name, ty) = (source.head(), source.weight_type(source.head())?);
            let bytes = SparseHead::bytes_for(ty, n_vocab, n_embd, predictor.hidden());
            bytes.ok_or_else(|| ModelError::Blocks { name: name.into(), ty: ty.name(), n_in: n_embd })? as u64
        }
    };
    if source.has_head() && !residency.leaves_embedding(true) {
        total += matrix(weights::TOKEN_EMBD, n_vocab, n_embd)?;
    }
    for layer in 0..config.n_layers {
        for (part, rows, cols) in [
            ("attn_q", config.q_dim(), n_embd),
            ("attn_k", config.kv_dim(), n_embd),
            ("attn_v", config.kv_dim(), n_embd),
            ("attn_output", n_embd, config.q_dim()),
            ("ffn_gate_inp", config.n_experts, n_embd),
        ] {
            total += matrix(&weights::layer_tensor(layer, part), rows, cols)?;
        }
    }
    let norms = (2 * config.n_layers + 1) * n_embd * size_of::<f32>();
    Ok(total + norms as u64)
}

/// The workspace: activations, what experts need, logits.
fn scratch(config: &ModelShape, n_vocab: usize, batch: usize, sequences: usize) -> u64 {
    let inputs = [config.n_embd, config.q_dim()].map(|k| Q8Acts::bytes_for(k, batch)).iter().sum::<usize>();
    // What sampling makes of logits, for each that samples.
    let sampling = sequences * 3 * n_vocab * size_of::<f32>();
    (Workspace::bytes(config, n_vocab, batch, logit_rows(sequences))
        + inputs
        + Moe::scratch_bytes(config, batch)
        + sampling) as u64
}

/// What the process takes before anything is loaded. Without a budget nobody relies on it.
///
/// # Errors
/// [`ModelError::BudgetUnknown`] where there is a budget and the system does not tell what is `resident`.
fn process_bytes(budget: Option<u64>, resident: Option<u64>) -> Result<u64, ModelError> {
    match (budget, resident) {
        (Some(_), None) => Err(ModelError::BudgetUnknown),
        (_, resident) => Ok(resident.unwrap_or(0)),
    }
}

/// Whoever takes more than a container's limit is killed: such a budget is none.
///
/// # Errors
/// [`ModelError::BudgetBeyondContainer`].
fn within_container(budget: Option<u64>, limit: Option<u64>) -> Result<(), ModelError> {
    match (budget, limit) {
        (Some(budget), Some(limit)) if budget > limit => Err(ModelError::BudgetBeyondContainer { budget, limit }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_beyond_the_containers_memory_is_refused() {
        let beyond = within_container(Some((1 << 30) + 1), Some(1 << 30));
        assert!(matches!(beyond, Err(ModelError::BudgetBeyondContainer { limit: 1_073_741_824, .. })));
        for (budget, limit) in [(Some(1 << 30), Some(1 << 30)), (Some(1 << 40), None), (None, Some(1))] {
            within_container(budget, limit).unwrap();
        }
    }

    #[test]
    fn a_budget_that_cannot_be_measured_is_not_promised() {
        assert!(matches!(process_bytes(Some(1 << 30), None), Err(ModelError::BudgetUnknown)));
        assert_eq!(process_bytes(Some(1 << 30), Some(7)).unwrap(), 7);
        assert_eq!(process_bytes(None, None).unwrap(), 0);
    }
}
