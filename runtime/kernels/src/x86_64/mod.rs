//! x86-64: AVX2 and AVX-512 VNNI.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use crate::dispatch::Table;

pub(crate) mod avx2;
pub(crate) mod avx512;

/// How far ahead of the bytes in use a stream of weights is requested.
const STREAM_AHEAD: usize = 2304;
/// How far ahead a page is touched, so that its address is known when its lines are requested.
const PAGE_AHEAD: usize = 4 * PAGE;
/// The smallest page.
const PAGE: usize = 4096;

/// Requests the cache line at `p`, which may point anywhere, into the second-level cache: the first level waits for too few lines
/// at once to cover memory's latency where rows are scattered.
#[inline(always)]
fn prefetch(p: *const u8) {
    // SAFETY: a hint without effect on registers or memory.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
}

/// Requests what comes [`STREAM_AHEAD`] after the `BYTES` bytes at `p` of a stream that is read in order: every second line. Asking
/// for each one keeps the miss buffers of the first level busy (24 on Zen 4) and so holds up the prefetcher of the second, which
/// has more lines on their way: 49 GB/s instead of 58 on two cores of Zen 4.
#[inline(always)]
fn request_stream<const BYTES: usize>(p: *const u8) {
    for at in (0..BYTES).step_by(128) {
        prefetch(p.wrapping_add(STREAM_AHEAD + at));
    }
    if p.addr() % PAGE < BYTES {
        prefetch(p.wrapping_add(PAGE_AHEAD));
    }
}

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
