//! From logits to the tokens in the running, and the random number that decides among them.
//!
//! Pure functions over slices. Which of them apply, and what moves logits beforehand, is `sampler.rs`'s.

use std::cmp::Ordering;

/// One token still in the running.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub(crate) id: u32,
    pub(crate) logit: f32,
    /// exp(logit - the highest logit).
    pub(crate) weight: f32,
}

/// Best first: higher logit, then lower id, so that the order is total and never depends on chance.
pub(crate) fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// The first logit that is neither a finite number nor -inf, which a token has that is not to be chosen. Blocks are judged whole: a search
/// that may end at any logit is not vectorized, and a vocabulary is long.
pub(crate) fn first_not_finite(logits: &[f32]) -> Option<(usize, f32)> {
    const BLOCK: usize = 256;
    // False for NaN, too.
    let can_be = |logit: f32| logit < f32::INFINITY;
    let all_can_be = |block: &[f32]| block.iter().fold(true, |all, &logit| all & can_be(logit));
    let block = logits.chunks(BLOCK).position(|block| !all_can_be(block))?;
    let rest = logits.iter().enumerate().skip(block * BLOCK);
    rest.map(|(id, &logit)| (id, logit)).find(|&(_, logit)| !can_be(logit))
}

/// The id of the highest logit, the lowest id where several are equal; `None` where no token is allowed.
pub(crate) fn argmax(logits: &[f32]) -> Option<u32> {
    // Floats compared as integers in the same order, which is vectorized.
    let key = |logit: &f32| {
        let bits = logit.to_bits() as i32;
        bits ^ ((bits >> 31) & i32::MAX)
    };
    let highest = logits.iter().map(key).max()?;
    let highest = f32::from_bits((highest ^ ((highest >> 31) & i32::MAX)) as u32);
    if highest == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&logit| logit == highest).map(|id| id as u32)
}

/// Fills `out` with the `k` best candidates that are allowed, in no order.
///
/// One pass with a rising threshold: most logits of a large vocabulary are dismissed by a single comparison.
pub(crate) fn keep_top_k(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let room = k.saturating_mul(2).max(k + 1024);
    let mut threshold = f32::MIN;
    for (id, &logit) in (0u32..).zip(logits) {
        if logit >= threshold {
            out.push(Candidate { id, logit, weight: 0.0 });
            if out.len() >= room {
                out.select_nth_unstable_by(k - 1, best_first);
                out.truncate(k);
                threshold = out[k - 1].logit;
            }
        }
    }
    if out.len() > k && k > 0 {
        out.select_nth_unstable_by(k - 1, best_first);
        out.truncate(k);
    }
}

/// Keeps the best candidates until their weights reach `enough`, the one that reaches it included; at least one.
///
/// Sorts only as many as it keeps, a stretch at a time.
pub(crate) fn keep_top_p(candidates: &mut Vec<Candidate>, enough: f64) {
    let mut reached = 0.0f64;
    let mut sorted = 0;
    let mut stretch = 256;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let n = stretch.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, best_first);
        }
        rest[..n].sort_unstable_by(best_first);
        for (i, candidate) in rest[..n].iter().enumerate() {
            reached += f64::from(candidate.weight);
            if reached >= enough {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted += n;
        stretch *= 4;
    }
}

/// The random number of place `position` in a text, uniform in [0, 1): that entry of the sequence of splitmix64 (Steele, Lea and
/// Flood), which can be entered anywhere. The seed goes through the same mixing first, so that the sequences of neighbouring
/// seeds do not overlap.
pub(crate) fn unit(seed: u64, position: u64) -> f64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let state = mix(seed.wrapping_add(STEP)).wrapping_add(position.wrapping_add(1).wrapping_mul(STEP));
    (mix(state) >> 11) as f64 / (1u64 << 53) as f64
}

pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
