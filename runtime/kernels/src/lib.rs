//! Quantized blocks, the kernels that compute with them, and the threads that they run on.
//!
//! A leaf: all SIMD of the project and its `unsafe` live here, behind safe functions that check lengths. It knows nothing of
//! files, tensors' names or models.
//!
//! Every kernel computes the same bits on every instruction set, for any number of threads and in every form (one token or
//! many, dense or sparse): integer sums per block of 32 are exact, and every floating-point operation happens in an order that
//! the documentation of the kernel fixes.
//!
//! ```
//! use st_kernels::{AlignedBuf, Isa, Kernels, Pool, Q8Acts, R16, WeightType, quantize_row_q4_0, r16};
//!
//! # fn main() -> std::io::Result<()> {
//! let (ty, rows, k) = (WeightType::Q4_0, 64, 256);
//! let wave = |i: usize| (i as f32).sin();
//! let mut blocks = vec![0; rows * ty.row_bytes(k).unwrap()];
//! quantize_row_q4_0(&(0..rows * k).map(wave).collect::<Vec<_>>(), &mut blocks);
//! let x: Vec<f32> = (0..k).map(wave).collect();
//!
//! let pool = Pool::new(2)?;
//! let products = Isa::ALL.into_iter().filter_map(Kernels::for_isa).map(|kernels| {
//!     let mut tiles = AlignedBuf::zeroed(r16::packed_bytes(ty, rows, k).unwrap());
//!     kernels.pack_r16(ty, rows, k, &blocks, &mut tiles);
//!     let (mut acts, mut out) = (Q8Acts::new(k, 1), vec![0.0; rows]);
//!     kernels.quantize_acts(&x, &mut acts);
//!     kernels.linear_r16_pool(&pool, R16::new(ty, rows, k, &tiles), &acts, &mut out, || ());
//!     out
//! });
//! let products: Vec<Vec<f32>> = products.collect();
//! assert!(products.iter().all(|product| product == &products[0]) && products[0][0] > 1.0);
//! # Ok(())
//! # }
//! ```
//!
//! Words that the modules share:
//!
//! - *block*: 32 values of a row, with a scale ([`mod@block`]).
//! - *tile*: one block of each of 16 rows, interleaved; a *row group* is the tiles of 16 rows ([`mod@r16`]).
//! - *panel*: a row group unpacked to bytes, for products with many tokens (`panel`).
//! - *unit*: 4 rows of activations, interleaved, for the same products ([`Q8Acts`]).
//! - *quad*: 4 bytes side by side: what one lane of an integer dot product takes.
//! - *group*: 32 neurons of an expert, whose hidden values are one block ([`HiddenGroup`]).
//! - *chunk*: 128 outputs of an expert ([`OUTPUT_CHUNK`]), or the positions of a cache that attention takes together ([`KV_CHUNK`]).
//! - *live*: of a neuron, that its hidden value is not 0: its row of up and its run of down are read. Others are skipped.
//! - *few*: up to [`FEW_ROWS`] tokens, of one conversation or several: the weights that any of them needs are read once.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod activations;
mod aligned;
mod attention;
pub mod block;
mod bytes16;
mod codes;
mod columns;
mod dispatch;
mod down_layout;
pub mod expert_format;
mod experts;
mod kv;
mod linear;
mod live;
mod math;
mod out;
mod panel;
mod planes;
mod pool;
pub mod r16;
mod scalar;
mod scratch;
mod search;
mod some_rows;
mod table;
mod up_layout;
mod weight_type;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use activations::{FEW_ROWS, HiddenGroup, Q8Acts, UNIT_ROWS};
pub use aligned::AlignedBuf;
pub use attention::{kv_chunks, partial_len, visible_range};
pub use block::{dequantize_row, quantize_row_q4_0, quantize_row_q8_0};
pub use dispatch::Kernels;
pub use down_layout::OUTPUT_CHUNK;
pub use expert_format::{Arrangement, DownParts, ExpertFormat, FormatError, Matrix, MatrixFormat};
pub use experts::ExpertInput;
pub use kv::{KV_CHUNK, KvFormat, KvPage, KvPages, KvPagesMut, KvPool, KvType};
pub use out::ColumnsMut;
pub use pool::{Pool, RowSplit};
pub use r16::{R16, R16_ROWS};
pub use search::SquaredErrors;
pub use some_rows::SomeRows;
pub use table::Isa;
pub use weight_type::{BLOCK_LEN, UnsupportedType, WeightType};
