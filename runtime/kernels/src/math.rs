//! Scalar arithmetic whose exact order of operations every instruction set follows.

/// Lanes of the virtual vector in which sums of floats are kept, on any instruction set.
pub(crate) const LANES: usize = 16;

/// Sum of 16 lanes: halves added to halves, 8, 4, 2, 1.
#[inline]
pub(crate) fn reduce_add(v: &[f32; LANES]) -> f32 {
    let mut v = *v;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            v[i] += v[i + half];
        }
    }
    v[0]
}

/// The nearest value with 8 significant bits, ties to even.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> f32 {
    // As `bf16::from_f32`, without a branch, so that loops over it become vector code.
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    f32::from_bits(if x.is_nan() { bits | 0x0040_0000 } else { up } & 0xffff_0000)
}

/// Multiplies scores by `scale` and returns the greatest; NaN never is.
#[inline(always)]
pub(crate) fn scale_and_max(scores: &mut [f32], scale: f32) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut scale_lanes = |scores: &mut [f32]| {
        for (s, max) in scores.iter_mut().zip(&mut max) {
            *s *= scale;
            *max = if *s > *max { *s } else { *max };
        }
    };
    let (whole, rest) = scores.as_chunks_mut::<LANES>();
    whole.iter_mut().for_each(|lanes| scale_lanes(lanes));
    scale_lanes(rest);
    max.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Below this, [`exp`] is 0.
pub(crate) const EXP_MIN: f32 = -87.0;
pub(crate) const LOG2E: f32 = std::f32::consts::LOG2_E;
pub(crate) const LN2_HI: f32 = 0.693_359_4;
pub(crate) const LN2_LO: f32 = -2.121_944_4e-4;
/// Polynomial of e^r on |r| <= ln2/2, highest power first; the last two coefficients are 1.
pub(crate) const EXP_POLY: [f32; 7] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0];

/// Added to a small float, leaves its nearest integer in the lowest bits.
const ROUND: f32 = 1.5 * (1 << 23) as f32;

/// e^x for x <= 0, with a relative error below 2e-7; 0 below [`EXP_MIN`] and for NaN. Without a branch, so that loops over it
/// become vector code.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let rounded = x * LOG2E + ROUND;
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let mut p = EXP_POLY[0];
    for c in &EXP_POLY[1..] {
        p = p.mul_add(r, *c);
    }
    p = p.mul_add(r, 1.0);
    let e = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x >= EXP_MIN { e } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every upper half, with lower halves on both sides of a tie.
    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        for upper in 0..=u32::from(u16::MAX) {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(upper << 16 | lower);
                assert_eq!(round_bf16(x).to_bits(), half::bf16::from_f32(x).to_f32().to_bits(), "{x:e}");
            }
        }
    }

    #[test]
    fn exp_is_within_its_bound() {
        let mut worst = 0f64;
        for i in 0..200_000 {
            let x = -87.0 * i as f32 / 200_000.0;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2e-7, "relative error {worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::NAN), 0.0);
    }

    #[test]
    fn reduction_adds_every_lane() {
        assert_eq!(reduce_add(&std::array::from_fn(|i| i as f32)), 120.0);
    }
}
