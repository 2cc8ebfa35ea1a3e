//! The memory plan: what a budget is spent on, decided before any weight is read.
//!
//! Owns the arithmetic and nothing else: sizes come in, a plan or a refusal with the smallest budget that works goes
//! out. All sizes are bytes of resident memory.

use crate::error::ModelError;

/// What stays the same whatever the budget is.
#[derive(Clone, Copy, Debug)]
pub struct FixedCosts {
    /// The process as it stands when the plan is made: the program, the file's header, the tokenizer.
    pub process: u64,
    /// Embedding, attention, routers, norms and head, as they lie in memory.
    pub dense: u64,
    /// Activations and scratch of a decoding step and of a prompt batch.
    pub scratch: u64,
    /// Buffers between the disk and the slots.
    pub io: u64,
}

/// What grows with the context and with the slots.
#[derive(Clone, Copy, Debug)]
pub struct VariableCosts {
    /// KV cache of all layers that attend to everything, for one position.
    pub kv_full_per_token: u64,
    /// KV cache of all window layers; it does not grow.
    pub kv_window: u64,
    /// One expert in the cache.
    pub slot: u64,
}

/// The shape that a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct PlanShape {
    /// Decoder layers.
    pub n_layers: usize,
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts per token and layer.
    pub n_experts_used: usize,
    /// The longest context that the model allows, in tokens.
    pub max_ctx: usize,
    /// Positions are allocated in multiples of this.
    pub ctx_step: usize,
}

/// Where the memory goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The budget, where there is one.
    pub budget: Option<u64>,
    /// See [`FixedCosts::process`].
    pub process: u64,
    /// See [`FixedCosts::dense`].
    pub dense: u64,
    /// See [`FixedCosts::scratch`].
    pub scratch: u64,
    /// See [`FixedCosts::io`].
    pub io: u64,
    /// KV cache of the layers that attend to everything, at the full context.
    pub kv_full: u64,
    /// KV cache of the window layers.
    pub kv_window: u64,
    /// One expert in the cache.
    pub slot: u64,
    /// Experts that fit in the cache.
    pub n_slots: usize,
    /// Experts of the model.
    pub n_experts_total: usize,
    /// Experts that one token touches: fewer slots than this and nearly every expert is read for every token.
    pub token_cycle: usize,
    /// Kept free for what no plan foresees: stacks, the allocator, the page tables.
    pub reserve: u64,
    /// Context length in tokens.
    pub ctx: usize,
}

/// Share of a budget kept in reserve, and the least of it.
const RESERVE_SHARE: u64 = 64;
const RESERVE_MIN: u64 = 8 << 20;
/// A context chosen by the plan takes at most this share of what the fixed costs leave.
const KV_SHARE: u64 = 6;
/// The plan does not choose a context below this unless the model's own is shorter.
const CTX_FLOOR: usize = 1024;

impl MemoryPlan {
    /// A plan without a budget: a slot for every expert.
    ///
    /// # Errors
    /// [`ModelError::Context`] for a context of no tokens or beyond the model's.
    pub fn unlimited(
        fixed: FixedCosts,
        variable: VariableCosts,
        shape: PlanShape,
        ctx: Option<usize>,
    ) -> Result<Self, ModelError> {
        let ctx = check_ctx(ctx, shape)?.unwrap_or(shape.max_ctx);
        Ok(Self::assemble(None, fixed, variable, shape, ctx, 0, shape.n_layers * shape.n_experts))
    }

    /// A plan for `budget` bytes: the context first (as asked for, or what a small share of the memory allows), then
    /// as many slots as the rest holds.
    ///
    /// # Errors
    /// [`ModelError::Budget`] with the smallest budget that works; [`ModelError::Context`].
    pub fn for_budget(
        budget: u64,
        fixed: FixedCosts,
        variable: VariableCosts,
        shape: PlanShape,
        ctx: Option<usize>,
    ) -> Result<Self, ModelError> {
        let asked = check_ctx(ctx, shape)?;
        let n_total = shape.n_layers * shape.n_experts;
        // A wave of a prompt computes on one half while the other half loads.
        let min_slots = (2 * shape.n_experts_used).min(n_total);
        let smallest_ctx = asked.unwrap_or(CTX_FLOOR.min(shape.max_ctx));
        let floor = |ctx: usize, reserve: u64| {
            Self::assemble(Some(budget), fixed, variable, shape, ctx, reserve, min_slots).total()
        };
        let reserve = reserve_of(budget);
        if floor(smallest_ctx, reserve) > budget {
            let minimum = Self::budget_for(floor(smallest_ctx, 0));
            return Err(ModelError::Budget { budget, minimum, ctx: smallest_ctx });
        }
        let free = budget - floor(0, reserve) + min_slots as u64 * variable.slot;
        let ctx = asked.unwrap_or_else(|| {
            let affordable = (free / KV_SHARE).checked_div(variable.kv_full_per_token).unwrap_or(u64::MAX);
            let stepped = usize::try_from(affordable).unwrap_or(usize::MAX) / shape.ctx_step * shape.ctx_step;
            stepped.clamp(smallest_ctx, shape.max_ctx)
        });
        let rest = budget - Self::assemble(Some(budget), fixed, variable, shape, ctx, reserve, 0).total();
        let n_slots = usize::try_from(rest / variable.slot.max(1)).unwrap_or(usize::MAX).min(n_total);
        Ok(Self::assemble(Some(budget), fixed, variable, shape, ctx, reserve, n_slots))
    }

    fn assemble(
        budget: Option<u64>,
        fixed: FixedCosts,
        variable: VariableCosts,
        shape: PlanShape,
        ctx: usize,
        reserve: u64,
        n_slots: usize,
    ) -> Self {
        let positions = ctx.next_multiple_of(shape.ctx_step.max(1)) as u64;
        Self {
            budget,
            process: fixed.process,
            dense: fixed.dense,
            scratch: fixed.scratch,
            io: fixed.io,
            kv_full: positions * variable.kv_full_per_token,
            kv_window: variable.kv_window,
            slot: variable.slot,
            n_slots,
            n_experts_total: shape.n_layers * shape.n_experts,
            token_cycle: shape.n_layers * shape.n_experts_used,
            reserve,
            ctx,
        }
    }

    /// A budget, no larger than need be, of which `bytes` can be spent and the reserve is still there.
    pub fn budget_for(bytes: u64) -> u64 {
        // The reserve is a share of the budget itself: budget = bytes + budget/64, or bytes + the least reserve.
        let shared = bytes.saturating_mul(RESERVE_SHARE).div_ceil(RESERVE_SHARE - 1);
        shared.max(bytes.saturating_add(RESERVE_MIN))
    }

    /// What of `budget` can be spent; `None` where it does not even hold the reserve.
    pub fn within_reserve(budget: u64) -> Option<u64> {
        budget.checked_sub(reserve_of(budget))
    }

    /// Everything but the expert cache and the reserve, in bytes.
    pub fn beside_cache(&self) -> u64 {
        self.process + self.dense + self.scratch + self.io + self.kv_full + self.kv_window
    }

    /// Everything together, in bytes.
    pub fn total(&self) -> u64 {
        self.beside_cache() + self.slot * self.n_slots as u64 + self.reserve
    }

    /// Whether so few experts fit that nearly every one is read again for every token.
    pub fn thrashes(&self) -> bool {
        self.n_slots < self.token_cycle.min(self.n_experts_total)
    }
}

/// What is kept free of a budget.
fn reserve_of(budget: u64) -> u64 {
    (budget / RESERVE_SHARE).max(RESERVE_MIN)
}

fn check_ctx(ctx: Option<usize>, shape: PlanShape) -> Result<Option<usize>, ModelError> {
    match ctx {
        Some(got) if got == 0 || got > shape.max_ctx => Err(ModelError::Context { got, max: shape.max_ctx }),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn costs() -> (FixedCosts, VariableCosts, PlanShape) {
        (
            FixedCosts { process: 40 * MIB, dense: 240 * MIB, scratch: 30 * MIB, io: 8 * MIB },
            VariableCosts { kv_full_per_token: 32 << 10, kv_window: 0, slot: 2 * MIB },
            PlanShape { n_layers: 32, n_experts: 32, n_experts_used: 4, max_ctx: 32768, ctx_step: 256 },
        )
    }

    #[test]
    fn a_budget_is_never_exceeded_and_nearly_spent() {
        let (fixed, variable, shape) = costs();
        for mib in (400..4000).step_by(37) {
            let budget = mib * MIB;
            let plan = MemoryPlan::for_budget(budget, fixed, variable, shape, None).expect("enough memory");
            assert!(plan.total() <= budget, "{} MiB of {mib}", plan.total() / MIB);
            assert!(plan.n_slots == 1024 || budget - plan.total() < variable.slot);
        }
    }

    #[test]
    fn the_minimum_named_in_the_refusal_works() {
        let (fixed, variable, shape) = costs();
        for ctx in [None, Some(1), Some(4096), Some(32768)] {
            let Err(ModelError::Budget { minimum, .. }) = MemoryPlan::for_budget(MIB, fixed, variable, shape, ctx)
            else {
                panic!("1 MiB is too little");
            };
            let plan = MemoryPlan::for_budget(minimum, fixed, variable, shape, ctx).expect("the stated minimum");
            assert!(plan.n_slots >= 8 && plan.thrashes());
            assert!(MemoryPlan::for_budget(minimum - MIB, fixed, variable, shape, ctx).is_err());
        }
    }

    #[test]
    fn a_budget_for_some_bytes_holds_them_and_the_reserve() {
        for bytes in [0, 1, MIB, 503 * MIB, 504 * MIB + 1, 505 * MIB, 5000 * MIB + 77] {
            let usable = MemoryPlan::within_reserve(MemoryPlan::budget_for(bytes)).expect("more than the reserve");
            assert!((bytes..=bytes + 1).contains(&usable), "{usable} for {bytes}");
        }
        assert_eq!(MemoryPlan::within_reserve(MIB), None);
        assert!(MemoryPlan::budget_for(u64::MAX) > 1 << 58);
    }

    #[test]
    fn without_a_budget_every_expert_has_a_slot() {
        let (fixed, variable, shape) = costs();
        let plan = MemoryPlan::unlimited(fixed, variable, shape, None).expect("a plan");
        assert_eq!((plan.n_slots, plan.ctx), (1024, 32768));
        assert!(!plan.thrashes());
    }

    #[test]
    fn a_context_beyond_the_model_is_refused() {
        let (fixed, variable, shape) = costs();
        for ctx in [0, 32769] {
            let got = MemoryPlan::unlimited(fixed, variable, shape, Some(ctx));
            assert!(matches!(got, Err(ModelError::Context { .. })));
        }
    }
}
