//! The memory plan: what a budget is spent on, decided before any weight is read.
//!
//! Owns the arithmetic and nothing else: sizes come in, a plan or a refusal with the smallest budget that works goes
//! out. All sizes are bytes of resident memory.

use crate::error::ModelError;

/// How much of the model's experts is in memory. Everything else that differs between the two follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All: a slot for every expert, filled when it is first asked for, and nothing is ever evicted.
    All,
    /// Some, in slots that others take in turn.
    Cached {
        /// Experts that fit.
        slots: usize,
    },
}

impl Residency {
    /// Whether experts are read again and again, and not once: then large pages serve their direct reads. Where every expert
    /// stays, those gain 2 to 3 % of generation and cost seconds at the start on virtual machines whose host takes back free
    /// memory.
    pub fn reads_again(self) -> bool {
        matches!(self, Self::Cached { .. })
    }

    /// Whether the embedding stays in the file, of which a token needs one row: where that makes room for experts, and the head is a matrix of
    /// its own (`has_head`).
    pub fn leaves_embedding(self, has_head: bool) -> bool {
        self.reads_again() && has_head
    }

    /// Rows of a prompt that go through the layers together. Their buffers take memory from the cache; where there is none,
    /// every matrix is unpacked a quarter as often.
    pub fn batch(self) -> usize {
        match self {
            Self::All => 2048,
            Self::Cached { .. } => 512,
        }
    }
}

/// What the caller asks for.
#[derive(Clone, Copy, Debug)]
pub struct PlanRequest {
    /// The most memory that the process may use.
    pub budget: Option<u64>,
    /// Context length in tokens; `None` lets the plan choose.
    pub ctx: Option<usize>,
    /// Conversations at once.
    pub sequences: usize,
    /// At most this many slots for experts.
    pub slots: Option<usize>,
}

/// What a residency costs.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// What stays the same whatever the budget is.
    pub fixed: FixedCosts,
    /// What grows.
    pub variable: VariableCosts,
}

/// What stays the same whatever the budget is.
#[derive(Clone, Copy, Debug)]
pub struct FixedCosts {
    /// The process as it stands when the plan is made: the program, the file's header, the tokenizer.
    pub process: u64,
    /// What it will take beside the model.
    pub beside: u64,
    /// Embedding, attention, routers, norms and head, as they lie in memory.
    pub dense: u64,
    /// Activations and scratch of a decoding step and of a prompt batch.
    pub scratch: u64,
    /// Buffers between the disk and the slots.
    pub io: u64,
    /// What rendering a chat may make, where the file has a template.
    pub template: u64,
}

/// What grows with the context and with the slots.
#[derive(Clone, Copy, Debug)]
pub struct VariableCosts {
    /// Keys and values of one sequence, in all layers that attend to everything, for one position.
    pub kv_full_per_token: u64,
    /// The same in all window layers; it does not grow.
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
    /// What the process takes before anything is loaded, in bytes.
    pub process: u64,
    /// What it will take beside the model: a server's connections, tables of grammars, in bytes.
    pub beside: u64,
    /// Weights that are always resident: everything but the experts, in bytes.
    pub dense: u64,
    /// Buffers of one forward pass, and what sampling needs, in bytes.
    pub scratch: u64,
    /// Buffers of expert reads, and what whole large pages add to the slots, in bytes.
    pub io: u64,
    /// What the chat template may make, in bytes; 0 where the file has none.
    pub template: u64,
    /// Conversations at once.
    pub sequences: usize,
    /// Keys and values of all sequences, in the layers that attend to everything, at the full context.
    pub kv_full: u64,
    /// The same in the window layers.
    pub kv_window: u64,
    /// One expert in the cache.
    pub slot: u64,
    /// How much of the experts is in memory.
    pub residency: Residency,
    /// Experts of the model.
    pub n_experts_total: usize,
    /// Experts that one token touches: fewer slots than this and nearly every expert is read for every token.
    pub token_cycle: usize,
    /// Experts that fit beside those as long as no keys and values have taken their memory.
    pub lent: usize,
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
    /// The plan: the context first (as asked for, or what a small share of the memory allows), then every expert where they
    /// all fit, otherwise as many slots as the rest holds. `all` and `cached` are what either costs.
    ///
    /// # Errors
    /// [`ModelError::Budget`] with the smallest budget that works; [`ModelError::Context`] for a context of no tokens or beyond
    /// the model's.
    pub fn new(request: &PlanRequest, shape: PlanShape, all: Costs, cached: Costs) -> Result<Self, ModelError> {
        let asked = check_ctx(request.ctx, shape)?;
        let cap = request.slots.filter(|&slots| slots < shape.n_layers * shape.n_experts);
        let plan = |costs, residency, ctx, reserve| Self::assemble(request, costs, shape, residency, ctx, reserve);
        let Some(budget) = request.budget else {
            let ctx = asked.unwrap_or(shape.max_ctx);
            return Ok(match cap {
                None => plan(all, Residency::All, ctx, 0),
                Some(slots) => plan(cached, Residency::Cached { slots }, ctx, 0),
            });
        };
        let streamed = Self::for_budget(budget, request, shape, cached, asked)?;
        let resident = plan(all, Residency::All, streamed.ctx, streamed.reserve);
        Ok(match cap {
            None if resident.total() <= budget => resident,
            None => streamed,
            Some(cap) => {
                let slots = streamed.n_slots().min(cap);
                let lent = streamed.lent.min(cap - slots);
                Self { residency: Residency::Cached { slots }, lent, ..streamed }
            }
        })
    }

    /// A plan for `budget` bytes with as many slots as they hold.
    fn for_budget(
        budget: u64,
        request: &PlanRequest,
        shape: PlanShape,
        costs: Costs,
        asked: Option<usize>,
    ) -> Result<Self, ModelError> {
        let n_total = shape.n_layers * shape.n_experts;
        let variable = &costs.variable;
        // A wave of a prompt computes on one half while the other half loads.
        let min_slots = (2 * shape.n_experts_used).min(n_total);
        let smallest_ctx = asked.unwrap_or(CTX_FLOOR.min(shape.max_ctx));
        let plan =
            |slots, ctx, reserve| Self::assemble(request, costs, shape, Residency::Cached { slots }, ctx, reserve);
        let floor = |ctx: usize, reserve: u64| plan(min_slots, ctx, reserve).total();
        let reserve = reserve_of(budget);
        if floor(smallest_ctx, reserve) > budget {
            let minimum = Self::budget_for(floor(smallest_ctx, 0));
            return Err(ModelError::Budget { budget, minimum, ctx: smallest_ctx });
        }
        let free = budget - floor(0, reserve) + min_slots as u64 * variable.slot;
        let ctx = asked.unwrap_or_else(|| {
            let per_token = variable.kv_full_per_token * request.sequences.max(1) as u64;
            let affordable = (free / KV_SHARE).checked_div(per_token).unwrap_or(u64::MAX);
            let stepped = usize::try_from(affordable).unwrap_or(usize::MAX) / shape.ctx_step * shape.ctx_step;
            stepped.clamp(smallest_ctx, shape.max_ctx)
        });
        let rest = budget - plan(0, ctx, reserve).total();
        let n_slots = usize::try_from(rest / variable.slot.max(1)).unwrap_or(usize::MAX).min(n_total);
        Ok(plan(n_slots, ctx, reserve))
    }

    fn assemble(
        request: &PlanRequest,
        Costs { fixed, variable }: Costs,
        shape: PlanShape,
        residency: Residency,
        ctx: usize,
        reserve: u64,
    ) -> Self {
        let positions = ctx.next_multiple_of(shape.ctx_step.max(1)) as u64;
        let sequences = request.sequences.max(1);
        let kv_full = sequences as u64 * positions * variable.kv_full_per_token;
        let kv_window = sequences as u64 * variable.kv_window;
        let n_experts_total = shape.n_layers * shape.n_experts;
        let lent = match (request.budget, residency) {
            (Some(_), Residency::Cached { slots }) => {
                let fit = usize::try_from((kv_full + kv_window) / variable.slot.max(1)).unwrap_or(usize::MAX);
                fit.min(n_experts_total.saturating_sub(slots))
            }
            _ => 0,
        };
        Self {
            budget: request.budget,
            process: fixed.process,
            beside: fixed.beside,
            dense: fixed.dense,
            scratch: fixed.scratch,
            io: fixed.io,
            template: fixed.template,
            sequences,
            kv_full,
            kv_window,
            slot: variable.slot,
            residency,
            n_experts_total,
            token_cycle: shape.n_layers * shape.n_experts_used,
            lent,
            reserve,
            ctx,
        }
    }

    /// Experts that have a slot.
    pub fn n_slots(&self) -> usize {
        match self.residency {
            Residency::All => self.n_experts_total,
            Residency::Cached { slots } => slots,
        }
    }

    /// Whether what the expert cache does is worth a report: where there is a budget, or experts are read again.
    pub fn reports_cache(&self) -> bool {
        self.budget.is_some() || self.residency.reads_again()
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
        self.process + self.beside + self.dense + self.scratch + self.io + self.template + self.kv_full + self.kv_window
    }

    /// Everything together, in bytes.
    pub fn total(&self) -> u64 {
        self.beside_cache() + self.slot * self.n_slots() as u64 + self.reserve
    }

    /// Whether so few experts fit that nearly every one is read again for every token.
    pub fn thrashes(&self) -> bool {
        self.n_slots() < self.token_cycle.min(self.n_experts_total)
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

    const SHAPE: PlanShape =
        PlanShape { n_layers: 32, n_experts: 32, n_experts_used: 4, max_ctx: 32768, ctx_step: 256 };

    /// What either residency costs: a large batch takes 90 MiB more.
    fn costs() -> [Costs; 2] {
        [120, 30].map(|scratch| Costs {
            fixed: FixedCosts {
                process: 34 * MIB,
                beside: 5 * MIB,
                dense: 240 * MIB,
                scratch: scratch * MIB,
                io: 8 * MIB,
                template: MIB,
            },
            variable: VariableCosts { kv_full_per_token: 32 << 10, kv_window: MIB, slot: 2 * MIB },
        })
    }

    fn plan(budget: Option<u64>, ctx: Option<usize>, sequences: usize) -> Result<MemoryPlan, ModelError> {
        let [all, cached] = costs();
        MemoryPlan::new(&PlanRequest { budget, ctx, sequences, slots: None }, SHAPE, all, cached)
    }

    #[test]
    fn a_budget_is_never_exceeded_and_nearly_spent() {
        for sequences in [1, 2, 8] {
            for mib in (700..4000).step_by(37) {
                let budget = mib * MIB;
                let plan = plan(Some(budget), None, sequences).expect("enough memory");
                assert!(plan.total() <= budget, "{} MiB of {mib}", plan.total() / MIB);
                assert!(plan.n_slots() == 1024 || budget - plan.total() < plan.slot);
                // Experts use the memory of keys and values, and no more.
                assert!(plan.lent as u64 * plan.slot <= plan.kv_full + plan.kv_window);
                assert!(plan.n_slots() + plan.lent <= 1024 && (plan.lent > 0 || plan.n_slots() == 1024));
                // Every conversation can fill the context.
                assert_eq!(plan.kv_full, (sequences * plan.ctx.next_multiple_of(256)) as u64 * (32 << 10));
                assert_eq!(plan.kv_window, sequences as u64 * MIB);
            }
        }
    }

    #[test]
    fn all_experts_are_held_where_they_fit_with_the_large_batch() {
        let (mut residencies, mut before) = (Vec::new(), 0);
        for mib in 2400..3400 {
            let plan = plan(Some(mib * MIB), Some(4096), 1).expect("enough memory");
            assert!(plan.n_slots() >= before && plan.total() <= mib * MIB);
            before = plan.n_slots();
            residencies.push(plan.residency);
        }
        residencies.dedup();
        // Slots for some, then for all with small batches, then everything.
        let all_at = residencies.iter().position(|&residency| residency == Residency::All).expect("3.3 GiB are enough");
        assert_eq!(all_at, residencies.len() - 1);
        assert_eq!(residencies[all_at - 1], Residency::Cached { slots: 1024 });
        assert_eq!([Residency::All, Residency::Cached { slots: 9 }].map(Residency::batch), [2048, 512]);
    }

    #[test]
    fn slots_are_capped_in_every_plan() {
        let [all, cached] = costs();
        for budget in [None, Some(700 * MIB), Some(9000 * MIB)] {
            let capped = |slots| {
                let request = PlanRequest { budget, ctx: None, sequences: 1, slots: Some(slots) };
                MemoryPlan::new(&request, SHAPE, all, cached).expect("a plan")
            };
            assert_eq!(capped(50).residency, Residency::Cached { slots: 50 });
            assert!(capped(50).reports_cache());
            assert_eq!(capped(1024), plan(budget, None, 1).expect("a plan"));
        }
    }

    #[test]
    fn the_minimum_named_in_the_refusal_works() {
        for (ctx, sequences) in [(None, 1), (Some(1), 2), (Some(4096), 8), (Some(32768), 1)] {
            let Err(ModelError::Budget { minimum, .. }) = plan(Some(MIB), ctx, sequences) else {
                panic!("1 MiB is too little");
            };
            let smallest = plan(Some(minimum), ctx, sequences).expect("the stated minimum");
            assert!(smallest.n_slots() >= 8 && smallest.thrashes());
            assert!(plan(Some(minimum - MIB), ctx, sequences).is_err());
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
        let plan = plan(None, None, 1).expect("a plan");
        assert_eq!((plan.residency, plan.n_slots(), plan.ctx), (Residency::All, 1024, 32768));
        assert!(!plan.thrashes() && !plan.reports_cache());
    }

    #[test]
    fn a_context_beyond_the_model_is_refused() {
        for ctx in [0, 32769] {
            assert!(matches!(plan(None, Some(ctx), 1), Err(ModelError::Context { .. })));
        }
    }
}
