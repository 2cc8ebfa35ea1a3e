//! Canonical matrices of the types of [`crate::planes`] to the forms that the kernels read: portable loops, compiled for these
//! instructions.

use crate::codes::{Coded, with_coded};
use crate::planes;
use crate::scalar;
use crate::up_layout::UpLayout;
use crate::weight_type::WeightType;

pub(super) fn pack_r16(ty: WeightType, kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    if !ty.has_codes() {
        return scalar::pack_r16(ty, kb, canonical, tiles);
    }
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(ty, T => unsafe { pack_tiles::<T>(kb, canonical, tiles) });
}

#[target_feature(enable = "avx2")]
fn pack_tiles<T: Coded>(kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    planes::pack_tiles_of::<T>(kb, canonical, tiles);
}

pub(super) fn pack_up(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(up.ty, T => unsafe { pack_rows::<T>(up, canonical, region) });
}

#[target_feature(enable = "avx2")]
fn pack_rows<T: Coded>(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    planes::pack_rows_of::<T>(up, canonical, region);
}
