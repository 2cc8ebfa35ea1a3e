//! Quantized blocks as ggml stores them, and the way from floats to blocks and back.
//!
//! Owns the definition of Q4_0 and Q8_0: [`quantize_row_q4_0`] and [`quantize_row_q8_0`] give the same bytes as ggml's
//! `quantize_row_*_ref`. Nothing here depends on the instruction set; `Kernels` has faster versions of the same bytes.

use half::{bf16, f16};

use crate::weight_type::{BLOCK_LEN, WeightType};

/// 32 weights in 18 bytes: weight `i` is `(nibble(i) - 8) * d`.
///
/// Byte `j` of `qs` holds weight `j` in its low nibble and weight `j + 16` in its high one.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockQ4_0 {
    /// Scale, the bits of an f16 (little endian in files).
    pub d: u16,
    /// Nibbles.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<BlockQ4_0>() == 18);

/// 32 values in 34 bytes: value `i` is `qs[i] * d`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockQ8_0 {
    /// Scale, the bits of an f16 (little endian in files).
    pub d: u16,
    /// Values, -127..=127 when made by [`quantize_row_q8_0`].
    pub qs: [i8; 32],
}
const _: () = assert!(size_of::<BlockQ8_0>() == 34);

impl BlockQ4_0 {
    /// The block in the 18 bytes `b`.
    #[inline]
    pub fn from_bytes(b: &[u8; 18]) -> Self {
        let mut qs = [0; 16];
        qs.copy_from_slice(&b[2..]);
        Self { d: u16::from_le_bytes([b[0], b[1]]), qs }
    }

    /// The 18 bytes of this block as files hold them.
    #[inline]
    pub fn to_bytes(&self) -> [u8; 18] {
        let mut b = [0; 18];
        b[..2].copy_from_slice(&self.d.to_le_bytes());
        b[2..].copy_from_slice(&self.qs);
        b
    }

    /// Quantizes 32 floats as ggml's reference does.
    #[inline]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        // Where all are zero, of whatever sign, `max` stays +0 and the scale is -0, as in ggml's C code.
        let (mut amax, mut max) = (0f32, 0f32);
        for &v in x {
            if amax < v.abs() {
                amax = v.abs();
                max = v;
            }
        }
        let d = max / -8.0;
        let id = if d != 0.0 { 1.0 / d } else { 0.0 };
        Self { d: f16::from_f32(d).to_bits(), qs: nibbles(x, id) }
    }

    /// The 32 weights of this block.
    #[inline]
    pub fn dequantize(&self) -> [f32; BLOCK_LEN] {
        let d = f16::from_bits(self.d).to_f32();
        std::array::from_fn(|i| level(&self.qs, i) as f32 * d)
    }
}

/// The signed 4-bit value of weight `i`, -8..=7.
#[inline]
pub(crate) fn level(qs: &[u8; 16], i: usize) -> i32 {
    let byte = qs[i % 16];
    i32::from(if i < 16 { byte & 15 } else { byte >> 4 }) - 8
}

#[inline]
fn nibbles(x: &[f32; BLOCK_LEN], id: f32) -> [u8; 16] {
    std::array::from_fn(|j| {
        let lo = to_i8(x[j] * id + 8.5).clamp(0, 15) as u8;
        let hi = to_i8(x[j + 16] * id + 8.5).clamp(0, 15) as u8;
        lo | (hi << 4)
    })
}

/// `(int8_t)v` as the reference's compiled code does it: out of range (the reciprocal of a denormal scale is infinite) is 0.
#[inline]
pub(crate) fn to_i8(v: f32) -> i8 {
    if v.abs() < 2_147_483_648.0 { v as i32 as i8 } else { 0 }
}

impl BlockQ8_0 {
    /// The block in the 34 bytes `b`.
    #[inline]
    pub fn from_bytes(b: &[u8; 34]) -> Self {
        Self { d: u16::from_le_bytes([b[0], b[1]]), qs: std::array::from_fn(|i| b[2 + i] as i8) }
    }

    /// The 34 bytes of this block as files hold them.
    #[inline]
    pub fn to_bytes(&self) -> [u8; 34] {
        let mut b = [0; 34];
        b[..2].copy_from_slice(&self.d.to_le_bytes());
        for (dst, &q) in b[2..].iter_mut().zip(&self.qs) {
            *dst = q as u8;
        }
        b
    }

    /// Quantizes 32 floats as ggml's reference does: rounding half away from zero, with the scale before it is rounded to f16.
    #[inline]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        let mut amax = 0f32;
        for &v in x {
            if amax < v.abs() {
                amax = v.abs();
            }
        }
        let d = amax / 127.0;
        let id = if d != 0.0 { 1.0 / d } else { 0.0 };
        Self { d: f16::from_f32(d).to_bits(), qs: std::array::from_fn(|i| to_i8((x[i] * id).round())) }
    }

    /// The 32 values of this block.
    #[inline]
    pub fn dequantize(&self) -> [f32; BLOCK_LEN] {
        let d = f16::from_bits(self.d).to_f32();
        std::array::from_fn(|i| f32::from(self.qs[i]) * d)
    }
}

fn block(x: &[f32]) -> &[f32; BLOCK_LEN] {
    x.try_into().expect("a chunk of 32 floats")
}

fn check_row(what: &str, values: usize, bytes: usize, ty: WeightType) {
    assert_eq!(Some(bytes), ty.row_bytes(values), "{what}: {values} values of {ty} do not take {bytes} bytes");
}

/// Quantizes `x` to Q4_0 blocks in `out`, bit-identical to ggml's `quantize_row_q4_0_ref`.
///
/// # Panics
/// If `x` is not whole blocks of 32 or `out` is not 18 bytes for each.
pub fn quantize_row_q4_0(x: &[f32], out: &mut [u8]) {
    check_row("quantize_row_q4_0", x.len(), out.len(), WeightType::Q4_0);
    for (x, out) in x.chunks_exact(BLOCK_LEN).zip(out.chunks_exact_mut(18)) {
        out.copy_from_slice(&BlockQ4_0::quantize(block(x)).to_bytes());
    }
}

/// Quantizes `x` to Q8_0 blocks in `out`, bit-identical to ggml's `quantize_row_q8_0_ref`.
///
/// # Panics
/// If `x` is not whole blocks of 32 or `out` is not 34 bytes for each.
pub fn quantize_row_q8_0(x: &[f32], out: &mut [u8]) {
    check_row("quantize_row_q8_0", x.len(), out.len(), WeightType::Q8_0);
    for (x, out) in x.chunks_exact(BLOCK_LEN).zip(out.chunks_exact_mut(34)) {
        out.copy_from_slice(&BlockQ8_0::quantize(block(x)).to_bytes());
    }
}

/// Turns a row of any type into floats.
///
/// # Panics
/// If `bytes` is not the size of `out.len()` values of `ty`.
pub fn dequantize_row(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    check_row("dequantize_row", out.len(), bytes.len(), ty);
    match ty {
        WeightType::F32 => {
            for (b, o) in bytes.chunks_exact(4).zip(out) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        WeightType::F16 => {
            for (b, o) in bytes.chunks_exact(2).zip(out) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        WeightType::BF16 => {
            for (b, o) in bytes.chunks_exact(2).zip(out) {
                *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        WeightType::Q4_0 => {
            for (b, o) in bytes.chunks_exact(18).zip(out.chunks_exact_mut(BLOCK_LEN)) {
                o.copy_from_slice(&BlockQ4_0::from_bytes(b.try_into().expect("18 bytes")).dequantize());
            }
        }
        ty if ty.has_codes() => crate::codes::dequantize(ty, bytes, out),
        _ => {
            for (b, o) in bytes.chunks_exact(34).zip(out.chunks_exact_mut(BLOCK_LEN)) {
                o.copy_from_slice(&BlockQ8_0::from_bytes(b.try_into().expect("34 bytes")).dequantize());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn golden() -> Vec<u8> {
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/quant_vectors.safetensors")).unwrap()
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        let mut x = vec![0.0; bytes.len() / 4];
        dequantize_row(WeightType::F32, bytes, &mut x);
        x
    }

    #[test]
    fn quantizers_give_the_reference_bytes_and_values() {
        let file = golden();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let mut seen = 0;
        for name in tensors.names() {
            let Some(case) = name.strip_suffix(".input") else { continue };
            let x = floats(tensors.tensor(name).unwrap().data());
            for (ty, key) in [(WeightType::Q4_0, "q4_0"), (WeightType::Q8_0, "q8_0")] {
                let mut want = tensors.tensor(&format!("{case}.{key}")).unwrap().data().to_vec();
                if (case, ty) == ("negative_zeros", WeightType::Q4_0) {
                    // The one known difference of the vectors (gguf-py's) from ggml's C code, which is followed.
                    want.chunks_exact_mut(18).for_each(|block| block[..2].copy_from_slice(&0x8000_u16.to_le_bytes()));
                }
                let mut got = vec![0; ty.row_bytes(x.len()).unwrap()];
                match ty {
                    WeightType::Q4_0 => quantize_row_q4_0(&x, &mut got),
                    _ => quantize_row_q8_0(&x, &mut got),
                }
                assert!(got == want, "{case}.{key}: bytes differ from the reference");
                let want = floats(tensors.tensor(&format!("{case}.{key}_dequant")).unwrap().data());
                let mut values = vec![0.0; x.len()];
                dequantize_row(ty, &got, &mut values);
                for (i, (a, b)) in values.iter().zip(&want).enumerate() {
                    assert!(
                        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()) || (*a == 0.0 && *b == 0.0),
                        "{case}.{key}[{i}]: got {a}, expected {b}"
                    );
                }
                seen += 1;
            }
        }
        assert!(seen >= 30, "only {seen} golden cases");
    }

    #[test]
    #[should_panic(expected = "do not take")]
    fn a_ragged_row_is_refused() {
        quantize_row_q4_0(&[0.0; 33], &mut [0; 18]);
    }
}
