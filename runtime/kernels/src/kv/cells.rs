//! Where the value of a position and dimension lies in a chunk of a head's keys or values, as each type has it.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::format::{KV_CHUNK, KV_TILE, KvType};
use crate::block::BlockQ8_0;
use crate::weight_type::BLOCK_LEN;

/// Stores one position of a head in its keys and values of a chunk.
pub(super) fn write_head(ty: KvType, chunk: &mut [u8], p: usize, key: &[f32], value: &[f32]) {
    let (keys, values) = chunk.split_at_mut(chunk.len() / 2);
    let mut padded = [0f32; BLOCK_LEN];
    for (block, (key, value)) in key.chunks(BLOCK_LEN).zip(value.chunks(BLOCK_LEN)).enumerate() {
        padded[key.len()..].fill(0.0);
        padded[..key.len()].copy_from_slice(key);
        write_key(ty, keys, p, block, &padded);
        padded[..key.len()].copy_from_slice(value);
        write_value(ty, values, p, block, &padded);
    }
}

fn write_key(ty: KvType, chunk: &mut [u8], p: usize, block: usize, x: &[f32; BLOCK_LEN]) {
    let tile_bytes = chunk.len() / (KV_CHUNK / KV_TILE);
    let tile = &mut chunk[p / KV_TILE * tile_bytes..][..tile_bytes];
    let lane = p % KV_TILE;
    let block_bytes = ty.bytes(KV_TILE * BLOCK_LEN);
    let out = &mut tile[block * block_bytes..][..block_bytes];
    match ty {
        KvType::F32 => {
            for (o, v) in out.chunks_exact_mut(4 * KV_TILE).zip(x) {
                o[lane * 4..lane * 4 + 4].copy_from_slice(&v.to_le_bytes());
            }
        }
        KvType::Bf16 => {
            for (i, v) in x.iter().enumerate() {
                out[paired::<KV_TILE>(i, lane)..][..2].copy_from_slice(&bf16::from_f32(*v).to_le_bytes());
            }
        }
        KvType::F16 => {
            for (o, v) in out.chunks_exact_mut(2 * KV_TILE).zip(halves(x)) {
                o[lane * 2..lane * 2 + 2].copy_from_slice(&v.to_le_bytes());
            }
        }
        KvType::Q8_0 => {
            let q = BlockQ8_0::quantize(x);
            let (scales, values) = out.split_at_mut(2 * KV_TILE);
            scales[lane * 2..lane * 2 + 2].copy_from_slice(&q.d.to_le_bytes());
            for (o, v) in values.chunks_exact_mut(KV_TILE).zip(q.qs) {
                o[lane] = v as u8;
            }
        }
    }
}

fn write_value(ty: KvType, chunk: &mut [u8], p: usize, block: usize, x: &[f32; BLOCK_LEN]) {
    let block_bytes = ty.bytes(KV_CHUNK * BLOCK_LEN);
    let out = &mut chunk[block * block_bytes..][..block_bytes];
    match ty {
        KvType::F32 => {
            for (o, v) in out[p * 128..].chunks_exact_mut(4).zip(x) {
                o.copy_from_slice(&v.to_le_bytes());
            }
        }
        KvType::Bf16 => {
            for (i, v) in x.iter().enumerate() {
                out[paired::<BLOCK_LEN>(p, i)..][..2].copy_from_slice(&bf16::from_f32(*v).to_le_bytes());
            }
        }
        KvType::F16 => {
            for (o, v) in out[p * 64..].chunks_exact_mut(2).zip(halves(x)) {
                o.copy_from_slice(&v.to_le_bytes());
            }
        }
        KvType::Q8_0 => {
            let q = BlockQ8_0::quantize(x);
            out[p * 2..p * 2 + 2].copy_from_slice(&q.d.to_le_bytes());
            for (o, v) in out[2 * KV_CHUNK + p * BLOCK_LEN..].iter_mut().zip(q.qs) {
                *o = v as u8;
            }
        }
    }
}

/// Offset of value `i` of row `row`, rows of `WIDTH` values being paired.
#[inline]
fn paired<const WIDTH: usize>(row: usize, i: usize) -> usize {
    (row / 2 * WIDTH + i) * 4 + (1 - row % 2) * 2
}

fn halves(x: &[f32; BLOCK_LEN]) -> [f16; BLOCK_LEN] {
    let mut h = [f16::ZERO; BLOCK_LEN];
    h.convert_from_f32_slice(x);
    h
}

/// Key `dim` of position `p` of a chunk.
#[inline]
pub(crate) fn key_at(ty: KvType, chunk: &[u8], padded_dim: usize, p: usize, dim: usize) -> f32 {
    let tile = &chunk[p / KV_TILE * ty.bytes(KV_TILE * padded_dim)..];
    let lane = p % KV_TILE;
    match ty {
        KvType::F32 => f32_at(tile, dim * KV_TILE + lane),
        KvType::Bf16 => bf16_at(tile, paired::<KV_TILE>(dim, lane)),
        KvType::F16 => f16_at(tile, dim * KV_TILE + lane),
        KvType::Q8_0 => {
            let block = &tile[dim / BLOCK_LEN * ty.bytes(KV_TILE * BLOCK_LEN)..];
            f16_at(block, lane) * f32::from(block[2 * KV_TILE + dim % BLOCK_LEN * KV_TILE + lane] as i8)
        }
    }
}

/// Value `dim` of position `p` of a chunk.
#[inline]
pub(crate) fn value_at(ty: KvType, chunk: &[u8], p: usize, dim: usize) -> f32 {
    let block = &chunk[dim / BLOCK_LEN * ty.bytes(KV_CHUNK * BLOCK_LEN)..];
    let i = p * BLOCK_LEN + dim % BLOCK_LEN;
    match ty {
        KvType::F32 => f32_at(block, i),
        KvType::Bf16 => bf16_at(block, paired::<BLOCK_LEN>(p, dim % BLOCK_LEN)),
        KvType::F16 => f16_at(block, i),
        KvType::Q8_0 => f16_at(block, p) * f32::from(block[2 * KV_CHUNK + i] as i8),
    }
}

#[inline]
fn bf16_at(b: &[u8], at: usize) -> f32 {
    bf16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

#[inline]
fn f16_at(b: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([b[i * 2], b[i * 2 + 1]]).to_f32()
}

#[inline]
fn f32_at(b: &[u8], i: usize) -> f32 {
    f32::from_le_bytes([b[i * 4], b[i * 4 + 1], b[i * 4 + 2], b[i * 4 + 3]])
}
