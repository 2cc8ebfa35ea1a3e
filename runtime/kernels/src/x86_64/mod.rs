//! x86-64: AVX2 and AVX-512 VNNI.

use crate::table::Table;

pub(crate) mod avx2;
pub(crate) mod avx512;
mod heads;
mod request;
pub(crate) mod sse2;
mod sums;

/// Whether this CPU runs the AVX2 kernels.
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The AVX2 kernels with VNNI, in the encoding that this CPU has.
pub(crate) fn avx_vnni() -> Option<&'static Table> {
    if !has_avx2() {
        None
    } else if is_x86_feature_detected!("avxvnni") {
        Some(&avx2::vnni::TABLE)
    } else {
        (is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl"))
            .then_some(&avx2::vnni::EVEX_TABLE)
    }
}

/// Whether this CPU runs the AVX-512 kernels and multiplies pairs of BF16.
pub(crate) fn has_avx512_bf16() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512bf16")
}

/// Whether this CPU runs the AVX-512 kernels.
pub(crate) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("f16c")
}
