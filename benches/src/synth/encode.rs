//! Rows of floats as weights of any type that is computed with; K types by candle's quantizer, which is ggml's.
//!
//! Files for tests and benchmarks are made with it. None of it is tuned: what counts is that the bytes are the type's.

use anyhow::{Context, Result, bail};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use st_gguf::GgmlType;
use st_kernels::{quantize_row_q4_0, quantize_row_q8_0};

/// Values of the nibbles of IQ4_NL and IQ4_XS.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the values of the nibbles of MXFP4.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Bytes of a row of `columns` weights of type `ty`.
///
/// # Errors
/// Where they are no whole blocks.
pub fn row_bytes(ty: GgmlType, columns: usize) -> Result<usize> {
    let bytes = ty.bytes_for_shape(&[columns as u64]);
    Ok(bytes.with_context(|| format!("rows of {columns} are no whole blocks of {ty}"))? as usize)
}

/// Fills `out`, which is as long as [`row_bytes`] says, with `row`.
///
/// # Errors
/// A type that nobody makes here.
pub fn encode_row(ty: GgmlType, row: &[f32], out: &mut [u8]) -> Result<()> {
    match ty {
        GgmlType::F32 => each(row, out, |x| x.to_le_bytes()),
        GgmlType::F16 => each(row, out, |x| half::f16::from_f32(x).to_le_bytes()),
        GgmlType::BF16 => each(row, out, |x| half::bf16::from_f32(x).to_le_bytes()),
        GgmlType::Q4_0 => quantize_row_q4_0(row, out),
        GgmlType::Q8_0 => quantize_row_q8_0(row, out),
        GgmlType::IQ4_NL => blocks(row, out, 32, 18, iq4_nl),
        GgmlType::IQ4_XS => blocks(row, out, 256, 136, iq4_xs),
        GgmlType::MXFP4 => blocks(row, out, 32, 17, mxfp4),
        _ => {
            let ty = candle_type(ty)?;
            let quantized = QTensor::quantize(&Tensor::new(row, &Device::Cpu)?, ty)?;
            out.copy_from_slice(&quantized.data()?);
        }
    }
    Ok(())
}

fn candle_type(ty: GgmlType) -> Result<GgmlDType> {
    Ok(match ty {
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q2_K => GgmlDType::Q2K,
        GgmlType::Q3_K => GgmlDType::Q3K,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
        other => bail!("weights of type {other} are not made here"),
    })
}

fn each<const N: usize>(row: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
    for (out, &x) in out.chunks_exact_mut(N).zip(row) {
        out.copy_from_slice(&bytes(x));
    }
}

fn blocks(row: &[f32], out: &mut [u8], weights: usize, bytes: usize, encode: fn(&[f32], &mut [u8])) {
    row.chunks_exact(weights).zip(out.chunks_exact_mut(bytes)).for_each(|(row, out)| encode(row, out));
}

fn largest(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()))
}

/// The number of the value nearest to `x`.
fn nearest(values: &[i8; 16], x: f32) -> u8 {
    let distance = |i: &u8| (f32::from(values[usize::from(*i)]) - x).abs();
    (0..16).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0)
}

/// Nibbles of 32 weights, the first 16 low.
fn nibbles(values: &[i8; 16], row: &[f32], scale: f32, out: &mut [u8]) {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let of = |i: usize| nearest(values, row[i] * inverse);
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = of(i) | of(i + 16) << 4;
    }
}

fn iq4_nl(row: &[f32], out: &mut [u8]) {
    let d = half::f16::from_f32(largest(row) / 113.0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    nibbles(&IQ4, row, d.to_f32(), &mut out[2..]);
}

fn iq4_xs(row: &[f32], out: &mut [u8]) {
    let d = half::f16::from_f32(largest(row) / 113.0 / 31.0);
    let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
    out[..8].fill(0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    let mut high = 0u16;
    for (i, row) in row.chunks_exact(32).enumerate() {
        // An offset of 32, so 63 at most stands for 31.
        let scale = ((largest(row) / 113.0 * inverse).round() as i32).clamp(-32, 31);
        let stored = (scale + 32) as u8;
        out[4 + i / 2] |= (stored & 15) << (4 * (i % 2));
        high |= u16::from(stored >> 4) << (2 * i);
        nibbles(&IQ4, row, d.to_f32() * scale as f32, &mut out[8 + 16 * i..][..16]);
    }
    out[2..4].copy_from_slice(&high.to_le_bytes());
}

fn mxfp4(row: &[f32], out: &mut [u8]) {
    // The largest value is 6 times the scale, a power of two of exponent E - 127.
    let exponent = match largest(row) {
        0.0 => 0,
        largest => ((largest / 6.0).log2().ceil() as i32 + 127).clamp(1, 254),
    };
    out[0] = exponent as u8;
    nibbles(&E2M1, row, ((exponent - 128) as f32).exp2(), &mut out[1..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_rows_of_its_length_and_others_are_refused() {
        let row: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
        use GgmlType::*;
        for ty in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4] {
            let mut out = vec![0; row_bytes(ty, row.len()).unwrap()];
            encode_row(ty, &row, &mut out).unwrap();
            assert!(out.iter().any(|&byte| byte != 0), "{ty}");
        }
        assert!(row_bytes(Q4_K, 192).is_err());
        assert!(encode_row(TQ1_0, &row, &mut [0; 108]).is_err());
    }
}
