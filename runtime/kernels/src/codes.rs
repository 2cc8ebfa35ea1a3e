//! Blocks of codes: what the bytes of a block mean for the types beside Q4_0 and Q8_0.
//!
//! A block of 32 or 256 weights holds a small code for each, scales for each 16 or 32 of them, and for some types minima:
//!
//! ```text
//! weight = scale · value(code) + minimum
//! ```
//!
//! `value` subtracts an offset or looks a code up. A scale is what the file has as one f16, or the product of an f16 and an integer of at
//! most 8 bits, which an f32 holds exactly; so is a minimum. [`dequantize`] rounds where ggml's reference does: after the product and
//! after the sum.
//!
//! Codes lie in one or two *planes* of 4, 2 or 1 bits, and all scales of a block are its *head*. Both are given and taken here in
//! one form for all types; `planes` arranges them for kernels.

use std::ops::Range;

use half::f16;

use crate::weight_type::{BLOCK_LEN, WeightType};

/// Most bytes of a head: Q2_K's.
pub(crate) const MAX_HEAD: usize = 20;
/// Most weights of a block.
pub(crate) const MAX_BLOCK: usize = 256;
/// Most scales of a block.
pub(crate) const MAX_SCALES: usize = 16;

/// What stands for a block of a row that does not exist: scales of 0, where one is needed.
pub(crate) static NO_BLOCK: [u8; MAX_BLOCK] = [0; MAX_BLOCK];

/// A scale and a minimum.
pub(crate) type Scale = (f32, f32);

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The code less this.
    Less(i32),
    /// The value in a table.
    Table(&'static [i8; 16]),
}

/// Some bits of every code of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plane {
    /// Where in the block it starts.
    pub at: usize,
    /// Bits of each code: 4, 2 or 1.
    pub width: usize,
    /// Bytes that lie together: their lowest bits are as many codes in order, the next bits the next codes. 0: codes in order from
    /// the lowest bit of the first byte on.
    pub run: usize,
}

/// How the blocks of a type are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Coding {
    /// Weights that share a scale: 16 or 32.
    pub sub_len: usize,
    pub has_minima: bool,
    pub meaning: Meaning,
    low: Plane,
    /// The bits above those of `low`.
    high: Option<Plane>,
    /// Where f16 scales lie.
    wide: &'static [usize],
    /// Where other scales lie.
    narrow: (usize, usize),
}

/// A type with codes that is known when a kernel is compiled.
pub(crate) trait Coded {
    /// The type.
    const TY: WeightType;
    /// How its blocks are made.
    const CODING: Coding = Coding::of(Self::TY);
    /// Steps of 32 weights of a block.
    const STEPS: usize = Self::TY.block_len() / BLOCK_LEN;
    /// Scales of a step: 1 or 2.
    const SUBS: usize = BLOCK_LEN / Self::CODING.sub_len;
}

/// The types with codes, as types.
pub(crate) mod coded {
    use super::{Coded, WeightType};
    macro_rules! coded {
        ($($name:ident)*) => {
            $(
                #[allow(non_camel_case_types, reason = "ggml's own spelling")]
                pub(crate) struct $name;
                impl Coded for $name {
                    const TY: WeightType = WeightType::$name;
                }
            )*
        };
    }
    coded!(Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4);
}

/// Runs `$call` with `$T` as the [`Coded`] type that is `$ty`.
macro_rules! with_coded {
    ($ty:expr, $T:ident => $call:expr) => {
        $crate::codes::with_coded!(@ $ty, $T, $call, Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4)
    };
    (@ $ty:expr, $T:ident, $call:expr, $($name:ident)*) => {
        match $ty {
            $($crate::weight_type::WeightType::$name => {
                type $T = $crate::codes::coded::$name;
                $call
            })*
            ty => unreachable!("{ty} has no codes"),
        }
    };
}
pub(crate) use with_coded;

/// Values of IQ4_NL and IQ4_XS.
static IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the values of E2M1; scales are halved.
static E2M1_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl Coding {
    /// How the blocks of `ty` are made.
    ///
    /// # Panics
    /// If it has no codes.
    #[inline(always)]
    pub(crate) const fn of(ty: WeightType) -> Self {
        use Meaning::{Less, Table};
        use WeightType as T;
        const fn at(at: usize, width: usize, run: usize) -> Plane {
            Plane { at, width, run }
        }
        const fn coding(
            sub_len: usize,
            has_minima: bool,
            meaning: Meaning,
            planes: (Plane, Option<Plane>),
            wide: &'static [usize],
            narrow: (usize, usize),
        ) -> Coding {
            Coding { sub_len, has_minima, meaning, low: planes.0, high: planes.1, wide, narrow }
        }
        match ty {
            T::Q4_1 => coding(32, true, Less(0), (at(4, 4, 16), None), &[0, 2], (0, 0)),
            T::Q5_0 => coding(32, false, Less(16), (at(6, 4, 16), Some(at(2, 1, 0))), &[0], (0, 0)),
            T::Q5_1 => coding(32, true, Less(0), (at(8, 4, 16), Some(at(4, 1, 0))), &[0, 2], (0, 0)),
            T::Q2_K => coding(16, true, Less(0), (at(16, 2, 32), None), &[80, 82], (0, 16)),
            T::Q3_K => coding(16, false, Less(4), (at(32, 2, 32), Some(at(0, 1, 32))), &[108], (96, 108)),
            T::Q4_K => coding(32, true, Less(0), (at(16, 4, 32), None), &[0, 2], (4, 16)),
            T::Q5_K => coding(32, true, Less(0), (at(48, 4, 32), Some(at(16, 1, 32))), &[0, 2], (4, 16)),
            T::Q6_K => coding(16, false, Less(32), (at(0, 4, 64), Some(at(128, 2, 32))), &[208], (192, 208)),
            T::IQ4_NL => coding(32, false, Table(&IQ4_VALUES), (at(2, 4, 16), None), &[0], (0, 0)),
            T::IQ4_XS => coding(32, false, Table(&IQ4_VALUES), (at(8, 4, 16), None), &[0], (2, 8)),
            T::MXFP4 => coding(32, false, Table(&E2M1_VALUES), (at(1, 4, 16), None), &[], (0, 1)),
            T::F32 | T::F16 | T::BF16 | T::Q4_0 | T::Q8_0 => panic!("a type without codes"),
        }
    }

    /// Bits of a code: 2 to 6.
    pub(crate) const fn bits(&self) -> usize {
        self.low.width + self.high_bits()
    }

    /// Those of the lower plane: 4 or 2.
    pub(crate) const fn low_bits(&self) -> usize {
        self.low.width
    }

    /// Those of the upper plane: 2, 1 or 0.
    pub(crate) const fn high_bits(&self) -> usize {
        match self.high {
            Some(plane) => plane.width,
            None => 0,
        }
    }

    /// The lower plane, and the upper one.
    pub(crate) const fn planes(&self) -> [Option<Plane>; 2] {
        [Some(self.low), self.high]
    }

    /// f16 scales of a head.
    pub(crate) const fn wide(&self) -> usize {
        self.wide.len()
    }

    /// Other bytes of a head.
    pub(crate) const fn narrow(&self) -> usize {
        self.narrow.1 - self.narrow.0
    }

    /// Bytes of a head: the f16 scales, then the others.
    pub(crate) const fn head_bytes(&self) -> usize {
        2 * self.wide() + self.narrow()
    }

    /// What a code stands for.
    #[inline(always)]
    pub(crate) fn value(&self, code: u8) -> i32 {
        match self.meaning {
            Meaning::Less(offset) => i32::from(code) - offset,
            Meaning::Table(table) => i32::from(table[usize::from(code & 15)]),
        }
    }

    /// The head of a block.
    pub(crate) fn head(&self, block: &[u8], head: &mut [u8]) {
        let (wide, narrow) = head[..self.head_bytes()].split_at_mut(2 * self.wide());
        for (to, &at) in wide.chunks_exact_mut(2).zip(self.wide) {
            to.copy_from_slice(&block[at..at + 2]);
        }
        narrow.copy_from_slice(&block[self.narrow_range()]);
    }

    /// Undoes [`Self::head`].
    pub(crate) fn set_head(&self, head: &[u8], block: &mut [u8]) {
        let (wide, narrow) = head[..self.head_bytes()].split_at(2 * self.wide());
        for (from, &at) in wide.chunks_exact(2).zip(self.wide) {
            block[at..at + 2].copy_from_slice(from);
        }
        block[self.narrow_range()].copy_from_slice(narrow);
    }

    const fn narrow_range(&self) -> Range<usize> {
        self.narrow.0..self.narrow.1
    }

    /// The codes of a block.
    #[inline(always)]
    pub(crate) fn codes(&self, block: &[u8], codes: &mut [u8]) {
        self.low.read(block, 0, codes);
        if let Some(high) = self.high {
            high.read(block, self.low.width, codes);
        }
    }

    /// Undoes [`Self::codes`].
    #[inline(always)]
    pub(crate) fn set_codes(&self, codes: &[u8], block: &mut [u8]) {
        self.low.write(codes, 0, block);
        if let Some(high) = self.high {
            high.write(codes, self.low.width, block);
        }
    }
}

impl Plane {
    const fn mask(self) -> u8 {
        (1 << self.width) - 1
    }

    /// Which code has its bits in byte `byte` of the plane, from bit `width * slot` on.
    #[inline(always)]
    pub(crate) const fn code(self, byte: usize, slot: usize) -> usize {
        let per_byte = 8 / self.width;
        if self.run == 0 {
            return byte * per_byte + slot;
        }
        (byte / self.run * per_byte + slot) * self.run + byte % self.run
    }

    /// Where codes `run * chunk..` of the plane lie: their first byte, and the bit they start at.
    #[inline(always)]
    fn chunk(self, chunk: usize) -> (usize, usize) {
        let per_byte = 8 / self.width;
        (self.at + chunk / per_byte * self.run, chunk % per_byte * self.width)
    }

    /// Puts the bits of a plane at `shift` of the codes, whose bits below it are there already. Eight codes are a word: what the mask leaves
    /// of it stays in its bytes.
    #[inline(always)]
    fn read(self, block: &[u8], shift: usize, codes: &mut [u8]) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        let put = |codes: &mut [u8; 8], bits: u64| {
            let below = if shift == 0 { 0 } else { u64::from_le_bytes(*codes) };
            *codes = (below | bits << shift).to_le_bytes();
        };
        if self.run == 0 {
            // Single bits: bit `i` of a byte is alone in byte `i` of the word, and then made its lowest.
            for (codes, &byte) in codes.as_chunks_mut().0.iter_mut().zip(&block[self.at..]) {
                let bits = (u64::from(byte) * ONES) & 0x8040_2010_0804_0201;
                put(codes, (bits + 0x7f * ONES) >> 7 & ONES);
            }
            return;
        }
        let mask = u64::from(self.mask()) * ONES;
        for (chunk, codes) in codes.chunks_exact_mut(self.run).enumerate() {
            let (at, bit) = self.chunk(chunk);
            for (codes, bytes) in codes.as_chunks_mut().0.iter_mut().zip(block[at..at + self.run].as_chunks().0) {
                put(codes, u64::from_le_bytes(*bytes) >> bit & mask);
            }
        }
    }

    #[inline(always)]
    fn write(self, codes: &[u8], shift: usize, block: &mut [u8]) {
        block[self.at..self.at + codes.len() * self.width / 8].fill(0);
        if self.run == 0 {
            for (i, code) in codes.iter().enumerate() {
                block[self.at + i * self.width / 8] |= (code >> shift & self.mask()) << (i * self.width % 8);
            }
            return;
        }
        for (chunk, codes) in codes.chunks_exact(self.run).enumerate() {
            let (at, bit) = self.chunk(chunk);
            for (byte, code) in block[at..at + self.run].iter_mut().zip(codes) {
                *byte |= (code >> shift & self.mask()) << bit;
            }
        }
    }
}

/// Scales and minima of the sub-blocks of a block, from its head; as many as it has.
pub(crate) fn scales(ty: WeightType, head: &[u8]) -> [Scale; MAX_SCALES] {
    let wide = |i: usize| f16::from_le_bytes([head[2 * i], head[2 * i + 1]]).to_f32();
    let narrow = &head[2 * Coding::of(ty).wide()..];
    let mut scales = [(0.0, 0.0); MAX_SCALES];
    match ty {
        WeightType::Q4_1 | WeightType::Q5_1 => scales[0] = (wide(0), wide(1)),
        WeightType::Q5_0 | WeightType::IQ4_NL => scales[0] = (wide(0), 0.0),
        WeightType::MXFP4 => scales[0] = (half_of_power(narrow[0]), 0.0),
        _ => {
            let coding = Coding::of(ty);
            for (sub, scale) in scales.iter_mut().enumerate().take(ty.block_len() / coding.sub_len) {
                let (by, minimum) = integers(ty, |i| narrow[i], sub);
                scale.0 = wide(0) * f32::from(by);
                if coding.has_minima {
                    scale.1 = -(wide(1) * f32::from(minimum));
                }
            }
        }
    }
    scales
}

/// What the f16 scale and the f16 minimum of a block of 256 are multiplied by for sub-block `sub`; `narrow` gives the other bytes of the
/// head.
#[inline(always)]
pub(crate) fn integers(ty: WeightType, narrow: impl Fn(usize) -> u8, sub: usize) -> (i8, i8) {
    match ty {
        WeightType::Q2_K => ((narrow(sub) & 15) as i8, (narrow(sub) >> 4) as i8),
        WeightType::Q3_K => {
            let low = if sub < 8 { narrow(sub) & 15 } else { narrow(sub - 8) >> 4 };
            let high = narrow(8 + sub % 4) >> (sub / 4 * 2) & 3;
            ((low | high << 4) as i8 - 32, 0)
        }
        WeightType::Q4_K | WeightType::Q5_K if sub < 4 => ((narrow(sub) & 63) as i8, (narrow(sub + 4) & 63) as i8),
        WeightType::Q4_K | WeightType::Q5_K => {
            let low = narrow(sub + 4);
            ((low & 15 | narrow(sub - 4) >> 6 << 4) as i8, (low >> 4 | narrow(sub) >> 6 << 4) as i8)
        }
        WeightType::Q6_K => (narrow(sub) as i8, 0),
        WeightType::IQ4_XS => {
            let low = narrow(2 + sub / 2) >> (sub % 2 * 4) & 15;
            let high = narrow(sub / 4) >> (sub % 4 * 2) & 3;
            ((low | high << 4) as i8 - 32, 0)
        }
        _ => unreachable!("{ty} has one scale for a block"),
    }
}

/// Half of the power of two whose biased exponent is `exponent`, the scale of twice the values of MXFP4.
pub(crate) fn half_of_power(exponent: u8) -> f32 {
    match exponent {
        0 | 1 => f32::from_bits(0x0020_0000 << exponent),
        _ => f32::from_bits((u32::from(exponent) - 1) << 23),
    }
}

/// The weights of codes whose block has the head `head`; with those of a block from the beginning on.
pub(crate) fn weights(ty: WeightType, head: &[u8], codes: &[u8], out: &mut [f32]) {
    let coding = Coding::of(ty);
    let subs = codes.chunks_exact(coding.sub_len).zip(out.chunks_exact_mut(coding.sub_len));
    for ((codes, out), (scale, minimum)) in subs.zip(scales(ty, head)) {
        for (out, &code) in out.iter_mut().zip(codes) {
            let product = scale * coding.value(code) as f32;
            *out = if coding.has_minima { product + minimum } else { product };
        }
    }
}

/// Turns blocks into floats, as ggml's reference does.
pub(crate) fn dequantize(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    let coding = Coding::of(ty);
    let (mut codes, mut head) = ([0; MAX_BLOCK], [0; MAX_HEAD]);
    let codes = &mut codes[..ty.block_len()];
    for (block, out) in bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_len())) {
        coding.codes(block, codes);
        coding.head(block, &mut head);
        weights(ty, &head, codes, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn values_are_the_references_and_codes_can_be_put_back() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/dequant_vectors.safetensors");
        let file = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        for ty in WeightType::ALL.into_iter().filter(|ty| ty.has_codes()) {
            let bytes = tensors.tensor(&format!("{ty}.bytes")).unwrap().data().to_vec();
            let values = tensors.tensor(&format!("{ty}.values")).unwrap().data().to_vec();
            let mut got = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
            crate::dequantize_row(ty, &bytes, &mut got);
            let want: Vec<f32> = values.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            assert_eq!(got.len(), want.len());
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!(got.to_bits(), want.to_bits(), "{ty}: weight {i}: {got}, expected {want}");
            }
            let coding = Coding::of(ty);
            for block in bytes.chunks_exact(ty.block_bytes()) {
                let (mut head, mut codes) = ([0; MAX_HEAD], [0; MAX_BLOCK]);
                let codes = &mut codes[..ty.block_len()];
                coding.head(block, &mut head);
                coding.codes(block, codes);
                assert!(codes.iter().all(|code| code >> coding.bits() == 0));
                let mut back = vec![0xa5; block.len()];
                coding.set_codes(codes, &mut back);
                coding.set_head(&head, &mut back);
                assert!(back == block, "{ty}");
            }
        }
    }
}
