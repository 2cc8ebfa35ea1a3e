//! The vocabulary of the kernels: the instruction sets, and the functions that each of them provides.
//!
//! Stands on the ground: the files of the instruction sets import it, and it imports only the types that the functions take.

use std::ops::Range;

use crate::activations::{ActRow, HiddenGroup, Sums, UNIT_ROWS};
use crate::down_layout::DownLayout;
use crate::kv::KvType;
use crate::live::LiveRows;
use crate::panel::{PanelKind, PanelLayout};
use crate::r16::R16_ROWS;
use crate::search::SquaredErrors;
use crate::up_layout::UpLayout;
use crate::weight_type::WeightType;

/// An instruction set that the kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Portable code; what the others are tested against.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// [`Self::Avx2`] with VNNI for vectors of 256 bits.
    AvxVnni,
    /// x86-64 with AVX-512 (F, BW, VL, DQ) and VNNI.
    Avx512Vnni,
    /// [`Self::Avx512Vnni`] with products of BF16 pairs.
    Avx512Bf16,
    /// Any AArch64.
    Neon,
    /// [`Self::Neon`] with the dot product instructions.
    NeonDot,
    /// [`Self::NeonDot`] with products of int8 matrices.
    NeonI8mm,
}

impl Isa {
    /// Every instruction set, best last.
    pub const ALL: [Isa; 8] = [
        Self::Scalar,
        Self::Neon,
        Self::NeonDot,
        Self::NeonI8mm,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
    ];

    /// A short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Neon => "neon",
            Self::NeonDot => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
        }
    }
}

/// Most units of 4 tokens that [`Table::gemm`] takes at once.
pub(crate) const GEMM_UNITS: usize = 3;
/// What the 16 rows of a panel give for so many tokens.
pub(crate) type PanelOutputs = [f32; GEMM_UNITS * UNIT_ROWS * R16_ROWS];
/// Most queries that [`Table::scores`] and [`Table::values`] take at once.
pub(crate) const MAX_QUERIES: usize = 12;

/// The maximum of some scores and the sum of their exponentials relative to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SoftmaxState {
    pub max: f32,
    pub sum: f32,
}

impl SoftmaxState {
    /// Of no scores.
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// The functions of one instruction set. All lengths are checked by the callers in `Kernels`.
///
/// # Safety of the members
/// Each needs the CPU features of its instruction set, and arguments whose lengths fit each other as described.
#[allow(clippy::type_complexity)]
pub(crate) struct Table {
    pub isa: Isa,
    /// Floats to int8 blocks: `x` of whole blocks, `q` as long, one scale and [`Sums`] per block.
    pub quantize_q8: unsafe fn(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [Sums]),
    /// Floats to Q4_0 bytes.
    pub quantize_q4_0: unsafe fn(x: &[f32], out: &mut [u8]),
    /// Better scales for the Q4_0 bytes that `quantize_q4_0` made of `x`.
    pub improve_q4_0: unsafe fn(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> SquaredErrors,
    /// Canonical rows (a multiple of 16) of `kb` blocks to tiles.
    pub pack_r16: unsafe fn(ty: WeightType, kb: usize, canonical: &[u8], tiles: &mut [u8]),
    /// Canonical rows to an up region of rows.
    pub pack_up: unsafe fn(up: &UpLayout, canonical: &[u8], region: &mut [u8]),
    /// A canonical matrix of `n_embd` rows to a down region.
    pub pack_down: unsafe fn(down: &DownLayout, n_embd: usize, canonical: &[u8], region: &mut [u8]),
    /// `out[t][r] = row r · acts[t]` for `out[t].len() / 16` row groups of tiles and 1..=FEW_ROWS tokens; the tiles are read once.
    pub gemv_r16: unsafe fn(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]),
    /// `out[i * acts.len() + t] = up row rows.ids[i] · acts[t]` for the tokens `t` that row lives for, 1..=FEW_ROWS in all; the other
    /// outputs stay.
    pub up_rows: unsafe fn(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]),
    /// `out[i] = canonical Q8_0 row rows[i] · a`, rows of `kb` blocks.
    pub q8_rows: unsafe fn(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]),
    /// Outputs of 128-output chunks from the live neurons of 1..=FEW_ROWS tokens: `hidden` has `fb` groups for each, `out` 128 floats
    /// per chunk for each.
    pub down: unsafe fn(
        down: &DownLayout,
        region: &[u8],
        hidden: &[HiddenGroup],
        chunks: Range<usize>,
        out: &mut [&mut [f32]],
    ),
    /// One row group of tiles to a weight panel of `kb * PANEL_BLOCK` bytes.
    pub panel_r16: unsafe fn(ty: WeightType, kb: usize, tiles: &[u8], panel: &mut [u8]),
    /// Rows `first..first + 16` of an up region to a weight panel.
    pub panel_up: unsafe fn(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]),
    /// Chunk `chunk` (128 outputs) of a down region to 8 weight panels of `fb` blocks each.
    pub panel_down: unsafe fn(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]),
    /// How this instruction set has the bytes of a panel.
    pub panel: PanelLayout,
    /// `out[t * 16 + r] = panel row r · token t` for 1..=GEMM_UNITS units of 4 tokens.
    pub gemm: unsafe fn(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs),
    /// `out[r] = float row r · x`, rows of `x.len()` values of a float type.
    pub dots: unsafe fn(ty: WeightType, rows: &[u8], x: &[f32], out: &mut [f32]),
    /// `out = x / rms(x) * weight`.
    pub rms_norm: unsafe fn(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]),
    /// `out[i * KV_CHUNK + p] = q row i · key p` for the positions of `tiles` of a chunk; `q` has 1..=MAX_QUERIES rows of `dim`.
    pub scores: unsafe fn(ty: KvType, dim: usize, keys: &[u8], tiles: Range<usize>, q: &[f32], out: &mut [f32]),
    /// Turns the scores of one query into exp(score * scale - max) for the `visible` positions and 0 for the rest of `tiles`;
    /// returns the maximum and the sum. For a BF16 cache the exponentials are rounded to that type.
    pub softmax:
        unsafe fn(ty: KvType, s: &mut [f32], tiles: Range<usize>, visible: Range<usize>, scale: f32) -> SoftmaxState,
    /// `acc row i = Σ p[i * KV_CHUNK + j] * value j` for the positions `j`, in order; `acc` has 1..=MAX_QUERIES rows of `dim`.
    /// The `p` of a position that is not asked for, but paired with one that is, is 0.
    pub values: unsafe fn(ty: KvType, dim: usize, values: &[u8], positions: Range<usize>, p: &[f32], acc: &mut [f32]),
    /// Adds a part (maximum, sum, values) of a softmax to a running one, rescaling both to the larger maximum: with
    /// `a = exp(max - new)` and `b = exp(part.max - new)`, `sum = sum * a + part.sum * b` and `acc = fma(acc, a, part * b)`.
    pub merge: unsafe fn(state: SoftmaxState, acc: &mut [f32], part: SoftmaxState, values: &[f32]) -> SoftmaxState,
}
