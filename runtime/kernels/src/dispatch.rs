//! Which instruction set computes: detected once, logged, and the same functions behind every one of them.

use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use crate::aarch64;
use crate::scalar;
use crate::table::{Isa, Table};
#[cfg(target_arch = "x86_64")]
use crate::x86_64;

/// The kernels of one instruction set: a handle to copy around. Methods are safe; they check lengths and panic where a
/// caller got them wrong.
#[derive(Clone, Copy)]
pub struct Kernels {
    pub(crate) table: &'static Table,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kernels").field(&self.isa()).finish()
    }
}

impl Kernels {
    /// The best kernels that this CPU runs. Detection and its log line happen once per process.
    pub fn detect() -> Self {
        static BEST: OnceLock<Kernels> = OnceLock::new();
        *BEST.get_or_init(|| {
            let best = Isa::ALL.into_iter().rev().find_map(Self::for_isa).unwrap_or(Self { table: &scalar::TABLE });
            tracing::info!(isa = best.isa().name(), "kernels selected");
            best
        })
    }

    /// The kernels of one instruction set, if this CPU runs it.
    pub fn for_isa(isa: Isa) -> Option<Self> {
        let table = match isa {
            Isa::Scalar => Some(&scalar::TABLE),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86_64::has_avx2().then_some(&x86_64::avx2::TABLE),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => x86_64::avx_vnni(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => x86_64::has_avx512().then_some(&x86_64::avx512::TABLE),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => x86_64::has_avx512_bf16().then_some(&x86_64::avx512::BF16_TABLE),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => aarch64::has_neon().then_some(&aarch64::BASE_TABLE),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => aarch64::has_neon_dot().then_some(&aarch64::TABLE),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => aarch64::has_neon_i8mm().then_some(&aarch64::MATRIX_TABLE),
            _ => None,
        };
        table.map(|table| Self { table })
    }

    /// The instruction set.
    pub fn isa(self) -> Isa {
        self.table.isa
    }
}
