//! The KV cache of one layer, arranged for the attention kernels.
//!
//! Positions are kept in chunks of [`KV_CHUNK`]; position `p` lives in slot `p % capacity`, so a buffer whose capacity covers
//! a window (plus one batch) serves as a ring. A chunk holds, head by head, the keys and then the values of its positions, with the
//! head dimension `d` padded to a multiple of 32:
//!
//! - keys: for each tile of 16 positions, for each dimension, 16 values (one per position). In Q8_0 a tile is, for each block
//!   of 32 dimensions, 16 f16 scales and 32 × 16 int8 values.
//! - values: for each block of 32 dimensions, for each position, 32 values. In Q8_0 such a block begins with the f16 scales of
//!   all positions.
//!
//! So a query reads keys with one lane per position and values with one lane per dimension, both in one sequential stream.
//!
//! In BF16 two such rows (of dimensions 2i and 2i + 1, or of positions) are one of 32-bit words: the even row's value in the upper
//! half, which is where the instruction that multiplies pairs begins, the odd row's in the lower.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::aligned::AlignedBuf;
use crate::block::BlockQ8_0;
use crate::pool::Pool;
use crate::weight_type::BLOCK_LEN;

/// Positions per chunk. Partial sums of attention are formed per chunk at absolute boundaries, so that their bits do not
/// depend on how the work is split.
pub const KV_CHUNK: usize = 256;
/// Positions per key tile.
pub(crate) const KV_TILE: usize = 16;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// 2 bytes per value, with the range of f32 and 8 significant bits. Queries and weights of the softmax are rounded alike, as
    /// the published code does when it runs in its own type; sums are f32.
    #[default]
    Bf16,
    /// 2 bytes per value.
    F16,
    /// 34 bytes per 32 values, blocks along the head dimension.
    Q8_0,
    /// 4 bytes per value.
    F32,
}

impl KvType {
    /// Bytes of `values` values, a multiple of 32.
    pub(crate) fn bytes(self, values: usize) -> usize {
        match self {
            Self::Bf16 | Self::F16 => values * 2,
            Self::Q8_0 => values / 32 * 34,
            Self::F32 => values * 4,
        }
    }
}

/// Keys and values of one layer: every KV head, `capacity` positions.
#[derive(Debug, Clone)]
pub struct KvBuffer {
    ty: KvType,
    n_heads: usize,
    head_dim: usize,
    capacity: usize,
    data: AlignedBuf<u8>,
}

impl KvBuffer {
    /// A zeroed buffer for at least `positions` positions (rounded up to whole chunks). Memory is taken from the system as it
    /// is first written.
    ///
    /// # Panics
    /// If a dimension is 0 or the size overflows.
    pub fn new(ty: KvType, n_heads: usize, head_dim: usize, positions: usize) -> Self {
        assert!(n_heads > 0 && head_dim > 0 && positions > 0, "empty KV buffer");
        let bytes = Self::bytes_for(ty, n_heads, head_dim, positions).expect("KV buffer size overflows");
        Self { ty, n_heads, head_dim, capacity: positions.next_multiple_of(KV_CHUNK), data: AlignedBuf::zeroed(bytes) }
    }

    /// Bytes that [`Self::new`] takes, keys and values; `None` on overflow.
    pub fn bytes_for(ty: KvType, n_heads: usize, head_dim: usize, positions: usize) -> Option<usize> {
        let values = positions
            .checked_next_multiple_of(KV_CHUNK)?
            .checked_mul(n_heads)?
            .checked_mul(head_dim.checked_next_multiple_of(BLOCK_LEN)?)?;
        values.checked_mul(8)?;
        Some(2 * ty.bytes(values))
    }

    /// How values are stored.
    pub fn ty(&self) -> KvType {
        self.ty
    }

    /// KV heads.
    pub fn n_heads(&self) -> usize {
        self.n_heads
    }

    /// Values per head and position.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Positions that fit before the oldest is overwritten, a multiple of [`KV_CHUNK`].
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of keys and values that a query reads for one position, all heads.
    pub fn bytes_per_position(&self) -> usize {
        2 * self.n_heads * self.ty.bytes(self.padded_dim())
    }

    /// Stores the keys and values (`n_heads × head_dim` each) of position `pos`, replacing the one `capacity` positions ago.
    ///
    /// # Panics
    /// If a length is not `n_heads × head_dim`.
    pub fn write(&mut self, pos: usize, keys: &[f32], values: &[f32]) {
        let (d, ty) = (self.head_dim, self.ty);
        assert_eq!(keys.len(), self.n_heads * d, "key length");
        assert_eq!(values.len(), self.n_heads * d, "value length");
        let slot = pos % self.capacity;
        for (head, (key, value)) in keys.chunks_exact(d).zip(values.chunks_exact(d)).enumerate() {
            let keys_at = self.range(head, slot / KV_CHUNK, 0);
            let both = keys_at.start..keys_at.start + 2 * keys_at.len();
            write_head(ty, &mut self.data[both], slot % KV_CHUNK, key, value);
        }
    }

    /// [`Self::write`] for the positions from `first` on, shared among the threads of a pool: each row of `width` floats ends with the
    /// keys and then the values of one.
    ///
    /// # Panics
    /// If `rows` is not whole rows, or they are too short for keys and values.
    pub fn write_rows(&mut self, pool: &Pool, first: usize, rows: &[f32], width: usize) {
        let (d, ty, n_heads, n_chunks) = (self.head_dim, self.ty, self.n_heads, self.capacity / KV_CHUNK);
        let kv_dim = n_heads * d;
        assert!(width >= 2 * kv_dim && rows.len().is_multiple_of(width), "rows of {width}, {} floats", rows.len());
        let of_row = |row: usize| rows[(row + 1) * width - 2 * kv_dim..(row + 1) * width].split_at(kv_dim);
        if rows.len() == width {
            // Too little to be shared.
            let (keys, values) = of_row(0);
            return self.write(first, keys, values);
        }
        let end = first + rows.len() / width;
        let both = 2 * ty.bytes(KV_CHUNK * self.padded_dim());
        pool.run_chunks(&mut self.data, both, &|i, chunk| {
            let (slot, head) = (i / n_heads, i % n_heads);
            // The absolute chunks that live in this one: the first that may hold some of the positions, then once around the ring.
            let oldest = first / KV_CHUNK + (slot + n_chunks - first / KV_CHUNK % n_chunks) % n_chunks;
            for base in (oldest * KV_CHUNK..end).step_by(self.capacity) {
                for pos in first.max(base)..end.min(base + KV_CHUNK) {
                    let (keys, values) = of_row(pos - first);
                    write_head(ty, chunk, pos - base, &keys[head * d..][..d], &values[head * d..][..d]);
                }
            }
        });
    }

    pub(crate) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(BLOCK_LEN)
    }

    /// Keys of the chunk that holds absolute chunk `chunk` of head `head`.
    pub(crate) fn keys(&self, head: usize, chunk: usize) -> &[u8] {
        &self.data[self.range(head, chunk % (self.capacity / KV_CHUNK), 0)]
    }

    /// Values of that chunk.
    pub(crate) fn values(&self, head: usize, chunk: usize) -> &[u8] {
        &self.data[self.range(head, chunk % (self.capacity / KV_CHUNK), 1)]
    }

    /// Where the keys (`part` 0) or values (1) of a head in a chunk are.
    fn range(&self, head: usize, chunk: usize, part: usize) -> std::ops::Range<usize> {
        assert!(head < self.n_heads, "KV head {head} of {}", self.n_heads);
        let bytes = self.ty.bytes(KV_CHUNK * self.padded_dim());
        let start = ((chunk * self.n_heads + head) * 2 + part) * bytes;
        start..start + bytes
    }
}

/// Stores one position of a head in its keys and values of a chunk.
fn write_head(ty: KvType, chunk: &mut [u8], p: usize, key: &[f32], value: &[f32]) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_rings_wrap() {
        for (ty, bound) in [(KvType::F32, 0.0), (KvType::Bf16, 2e-3), (KvType::F16, 1e-3), (KvType::Q8_0, 8e-3)] {
            let (heads, d) = (2, 40);
            let mut kv = KvBuffer::new(ty, heads, d, 300);
            assert_eq!(kv.capacity(), 512);
            for pos in [0, 17, 255, 256, 700] {
                let x: Vec<f32> = (0..heads * d).map(|i| ((pos + i * 7) % 101) as f32 / 101.0 - 0.5).collect();
                let y: Vec<f32> = x.iter().map(|v| -v).collect();
                kv.write(pos, &x, &y);
                let slot = pos % 512;
                for (i, &x) in x.iter().enumerate() {
                    let (head, dim) = (i / d, i % d);
                    let key = key_at(ty, kv.keys(head, pos / KV_CHUNK), 64, slot % KV_CHUNK, dim);
                    let value = value_at(ty, kv.values(head, pos / KV_CHUNK), slot % KV_CHUNK, dim);
                    assert!((key - x).abs() <= bound && (value + x).abs() <= bound, "{ty:?} {pos} {i}");
                }
            }
        }
    }

    #[test]
    fn rows_are_written_as_one_by_one() {
        let (heads, d, width) = (3, 40, 300);
        let pool = Pool::new(2).unwrap();
        for ty in [KvType::F32, KvType::Bf16, KvType::F16, KvType::Q8_0] {
            // Within a chunk, across chunks, around the ring, and around it with both ends in one chunk.
            for (first, n) in [(3, 1), (200, 100), (400, 300), (700, 512)] {
                let rows: Vec<f32> = (0..n * width).map(|i| (i * 31 % 997) as f32 / 997.0 - 0.5).collect();
                let (mut one_by_one, mut together) =
                    (KvBuffer::new(ty, heads, d, 300), KvBuffer::new(ty, heads, d, 300));
                for (i, row) in rows.chunks(width).enumerate() {
                    let (keys, values) = row[width - 2 * heads * d..].split_at(heads * d);
                    one_by_one.write(first + i, keys, values);
                }
                together.write_rows(&pool, first, &rows, width);
                assert!(one_by_one.data[..] == together.data[..], "{ty:?} {first} {n}");
            }
        }
    }
}
