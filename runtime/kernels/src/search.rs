//! Q4_0 blocks with the scale of least squared error instead of the reference one.
//!
//! Owns the candidates and the order of the sums. A candidate puts the largest weight of a block at some level of either sign
//! and rounds the others along. Given the levels `q`, the best scale is `Σxq / Σqq`, and the error it leaves is
//! `Σxx - (Σxq)² / Σqq`: the candidate with the largest `(Σxq)² / Σqq` wins. Blocks that it does not make better stay as they are.
//! Where weights differ in importance, every term of every sum is multiplied with that of its weight.
//!
//! Sixteen blocks go side by side, one in each lane, and every sum runs over the weights of a block in order. So compilers may
//! make any vectors of the lanes without changing a bit, and there is one source for all instruction sets.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::weight_type::BLOCK_LEN;

/// Levels at which candidates put the largest weight: past the end of the range it is cut off, and the others gain. Any
/// number of them, and more rounds with the best scale, would lower the error of real weights by another thousandth.
const LEVELS: [f32; 18] =
    [-7.0, -7.25, -7.5, -7.75, -8.0, -8.25, -8.5, -8.75, -9.0, 6.5, 6.75, 7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5];
/// A block is replaced where its error shrinks by more than this share, which is more than the sums' own rounding.
const LEAST_GAIN: f32 = 1e-5;
/// Added to a small float, rounds it to a whole number and leaves that in the lowest bits.
const ROUND: f32 = 12_582_912.0;

const LANES: usize = 16;
type Lanes = [f32; LANES];

/// Sums of squared differences between weights and what their blocks stand for.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SquaredErrors {
    /// With the reference's scales.
    pub reference: f64,
    /// With the scales that were chosen.
    pub chosen: f64,
}

impl std::ops::AddAssign for SquaredErrors {
    fn add_assign(&mut self, other: Self) {
        self.reference += other.reference;
        self.chosen += other.chosen;
    }
}

/// Replaces blocks in `out`, which has the reference's blocks of `x`, where other scales serve better. With `importance`, as long as `x`,
/// each squared error counts as often as that says.
#[inline(always)]
pub(crate) fn improve_q4_0(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> SquaredErrors {
    let mut errors = SquaredErrors::default();
    let out = out.chunks_mut(LANES * 18);
    match importance {
        None => x.chunks(LANES * BLOCK_LEN).zip(out).for_each(|(x, out)| errors += improve_group::<false>(x, &[], out)),
        Some(importance) => {
            let weighed = x.chunks(LANES * BLOCK_LEN).zip(importance.chunks(LANES * BLOCK_LEN)).zip(out);
            weighed.for_each(|((x, importance), out)| errors += improve_group::<true>(x, importance, out));
        }
    }
    errors
}

/// The weights of at most one block per lane, one weight of each after the other.
#[inline(always)]
fn transposed(x: &[f32]) -> [Lanes; BLOCK_LEN] {
    let mut columns = [[0f32; LANES]; BLOCK_LEN];
    for (lane, block) in x.chunks_exact(BLOCK_LEN).enumerate() {
        for (column, &v) in columns.iter_mut().zip(block) {
            column[lane] = v;
        }
    }
    columns
}

/// At most one block per lane.
#[inline(always)]
fn improve_group<const WEIGHED: bool>(x: &[f32], importance: &[f32], out: &mut [u8]) -> SquaredErrors {
    let columns = transposed(x);
    let importance = if WEIGHED { transposed(importance) } else { [[1.0; LANES]; BLOCK_LEN] };
    let (mut reference, mut scales) = ([[8u8; LANES]; BLOCK_LEN], [f16::ZERO; LANES]);
    for (lane, block) in out.chunks_exact(18).enumerate() {
        scales[lane] = f16::from_le_bytes([block[0], block[1]]);
        for (j, &byte) in block[2..].iter().enumerate() {
            reference[j][lane] = byte & 15;
            reference[j + 16][lane] = byte >> 4;
        }
    }
    let mut reference_scale = [0.0; LANES];
    scales.convert_to_f32_slice(&mut reference_scale);

    let (inverse, best_scale) = best_candidate::<WEIGHED>(&columns, &importance);
    let mut scale = [0.0; LANES];
    scales.convert_from_f32_slice(&best_scale);
    scales.convert_to_f32_slice(&mut scale);

    let (mut before, mut after) = ([0.0; LANES], [0.0; LANES]);
    let mut nibbles = [[0u8; LANES]; BLOCK_LEN];
    for (((column, importance), reference), nibbles) in
        columns.iter().zip(&importance).zip(&reference).zip(&mut nibbles)
    {
        let counted = |l: usize, error: f32| if WEIGHED { error * importance[l] } else { error };
        let q = lanes(|l| level(column[l] * inverse[l]));
        after = lanes(|l| after[l] + counted(l, square(column[l] - q[l] * scale[l])));
        let reference = lanes(|l| (f32::from(reference[l]) - 8.0) * reference_scale[l]);
        before = lanes(|l| before[l] + counted(l, square(column[l] - reference[l])));
        *nibbles = std::array::from_fn(|l| (q[l] + (8.0 + ROUND)).to_bits() as u8 & 15);
    }
    let mut errors = SquaredErrors::default();
    for (lane, block) in out.chunks_exact_mut(18).enumerate() {
        errors.reference += f64::from(before[lane]);
        // Not so where the scale is no f16: then the error is no number.
        let better = after[lane] < before[lane] * (1.0 - LEAST_GAIN);
        if better {
            block[..2].copy_from_slice(&scales[lane].to_le_bytes());
            for (j, byte) in block[2..].iter_mut().enumerate() {
                *byte = nibbles[j][lane] | nibbles[j + 16][lane] << 4;
            }
        }
        errors.chosen += f64::from(if better { after[lane] } else { before[lane] });
    }
    errors
}

/// What weights are multiplied with before they are rounded, and the scale to go with the result.
#[inline(always)]
fn best_candidate<const WEIGHED: bool>(
    columns: &[Lanes; BLOCK_LEN],
    importance: &[Lanes; BLOCK_LEN],
) -> (Lanes, Lanes) {
    let mut max = [0f32; LANES];
    for column in columns {
        max = lanes(|l| if column[l].abs() > max[l].abs() { column[l] } else { max[l] });
    }
    let (mut gain, mut best_inverse, mut best_scale) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for at in LEVELS {
        let inverse = lanes(|l| at / max[l]);
        let (mut xq, mut qq) = ([0.0; LANES], [0.0; LANES]);
        for (column, importance) in columns.iter().zip(importance) {
            let q = lanes(|l| level(column[l] * inverse[l]));
            let counted = lanes(|l| if WEIGHED { q[l] * importance[l] } else { q[l] });
            xq = lanes(|l| xq[l] + column[l] * counted[l]);
            qq = lanes(|l| qq[l] + q[l] * counted[l]);
        }
        // Blocks of zeros give 0 / 0 here, and no candidate for them is better than another.
        let scale = lanes(|l| xq[l] / qq[l]);
        let better: [bool; LANES] = std::array::from_fn(|l| xq[l] * scale[l] > gain[l]);
        gain = lanes(|l| if better[l] { xq[l] * scale[l] } else { gain[l] });
        best_inverse = lanes(|l| if better[l] { inverse[l] } else { best_inverse[l] });
        best_scale = lanes(|l| if better[l] { scale[l] } else { best_scale[l] });
    }
    (best_inverse, best_scale)
}

#[inline(always)]
fn lanes(f: impl FnMut(usize) -> f32) -> Lanes {
    std::array::from_fn(f)
}

#[inline(always)]
fn square(x: f32) -> f32 {
    x * x
}

/// Rounds to a whole number and cuts off at -8 and 7. (Comparisons as one instruction has them; `clamp` takes several.)
#[inline(always)]
fn level(x: f32) -> f32 {
    let x = if x < -8.0 { -8.0 } else { x };
    let x = if x > 7.0 { 7.0 } else { x };
    (x + ROUND) - ROUND
}
