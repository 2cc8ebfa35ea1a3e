//! The weight types that the kernels compute with, and how many bytes a row of each takes.

use st_format::GgmlType;

/// Values per quantized block.
pub const BLOCK_LEN: usize = 32;
/// Rows that are interleaved: of a tile, of a panel.
pub const R16_ROWS: usize = 16;

/// How the weights of a matrix are stored. A subset of the ggml types: the ones that the runtime computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "ggml's own spelling")]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Blocks of 32: one f16 scale and 4-bit values with an offset of 8 ([`crate::block::BlockQ4_0`]).
    Q4_0,
    /// Blocks of 32: f16 scale and minimum, 4 bits.
    Q4_1,
    /// Blocks of 32: f16 scale, 5 bits with an offset of 16.
    Q5_0,
    /// Blocks of 32: f16 scale and minimum, 5 bits.
    Q5_1,
    /// Blocks of 32: one f16 scale and signed 8-bit values ([`crate::block::BlockQ8_0`]).
    Q8_0,
    /// Blocks of 256: for each 16 a scale and a minimum of 4 bits, 2 bits.
    Q2_K,
    /// Blocks of 256: for each 16 a scale of 6 bits, 3 bits with an offset of 4.
    Q3_K,
    /// Blocks of 256: for each 32 a scale and a minimum of 6 bits, 4 bits.
    Q4_K,
    /// Blocks of 256: for each 32 a scale and a minimum of 6 bits, 5 bits.
    Q5_K,
    /// Blocks of 256: for each 16 a scale of 8 bits, 6 bits with an offset of 32.
    Q6_K,
    /// Blocks of 32: f16 scale, 4 bits that stand for values of a table.
    IQ4_NL,
    /// Blocks of 256: for each 32 a scale of 6 bits, 4 bits that stand for values of a table.
    IQ4_XS,
    /// Blocks of 32: a power of two, 4-bit floats.
    MXFP4,
}

/// A ggml type that the kernels do not compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("weights of type {0} are not computed; those of {known} are", known = WeightType::names())]
pub struct UnsupportedType(pub GgmlType);

impl WeightType {
    /// Every type, in the order of their ggml ids.
    pub const ALL: [WeightType; 16] = [
        Self::F32,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
        Self::BF16,
        Self::MXFP4,
    ];
    /// The types that floats are turned into; the others are only read.
    pub const WRITTEN: [WeightType; 5] = [Self::F32, Self::F16, Self::Q4_0, Self::Q8_0, Self::BF16];

    /// The ggml type that it is.
    pub const fn ggml(self) -> GgmlType {
        match self {
            Self::F32 => GgmlType::F32,
            Self::F16 => GgmlType::F16,
            Self::BF16 => GgmlType::BF16,
            Self::Q4_0 => GgmlType::Q4_0,
            Self::Q4_1 => GgmlType::Q4_1,
            Self::Q5_0 => GgmlType::Q5_0,
            Self::Q5_1 => GgmlType::Q5_1,
            Self::Q8_0 => GgmlType::Q8_0,
            Self::Q2_K => GgmlType::Q2_K,
            Self::Q3_K => GgmlType::Q3_K,
            Self::Q4_K => GgmlType::Q4_K,
            Self::Q5_K => GgmlType::Q5_K,
            Self::Q6_K => GgmlType::Q6_K,
            Self::IQ4_NL => GgmlType::IQ4_NL,
            Self::IQ4_XS => GgmlType::IQ4_XS,
            Self::MXFP4 => GgmlType::MXFP4,
        }
    }

    /// The name that ggml prints.
    pub const fn name(self) -> &'static str {
        self.ggml().name()
    }

    /// The names of all, as a list in a sentence.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Values per block: 32 or 256 for the quantized types, 1 for floats.
    pub const fn block_len(self) -> usize {
        self.ggml().block_len() as usize
    }

    /// Bytes per block of [`Self::block_len`] values.
    pub const fn block_bytes(self) -> usize {
        self.ggml().block_bytes() as usize
    }

    /// Whether values come in scaled integer blocks, multiplied by int8 activations.
    pub const fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Whether blocks hold codes and scales as `codes` describes them: the quantized types beside Q4_0 and Q8_0.
    pub(crate) const fn has_codes(self) -> bool {
        self.is_quantized() && !matches!(self, Self::Q4_0 | Self::Q8_0)
    }

    /// Bytes of a row of `k` values; `None` if `k` is not a whole number of blocks or the size overflows.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        (k / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl From<WeightType> for GgmlType {
    fn from(ty: WeightType) -> Self {
        ty.ggml()
    }
}

impl TryFrom<GgmlType> for WeightType {
    type Error = UnsupportedType;

    fn try_from(ty: GgmlType) -> Result<Self, UnsupportedType> {
        Self::ALL.into_iter().find(|known| known.ggml() == ty).ok_or(UnsupportedType(ty))
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_types_are_ggmls_and_others_are_refused_by_name() {
        for ty in WeightType::ALL {
            assert_eq!(WeightType::try_from(ty.ggml()), Ok(ty));
        }
        assert_eq!(WeightType::Q4_0.block_bytes(), size_of::<crate::block::BlockQ4_0>());
        assert_eq!(WeightType::Q8_0.block_bytes(), size_of::<crate::block::BlockQ8_0>());
        assert_eq!(WeightType::Q4_0.block_len(), BLOCK_LEN);
        let error = WeightType::try_from(GgmlType::IQ3_S).unwrap_err().to_string();
        assert!(error.starts_with("weights of type IQ3_S are not computed; those of F32, F16, Q4_0, "), "{error}");
    }

    #[test]
    fn row_bytes_need_whole_blocks() {
        assert_eq!(WeightType::Q4_0.row_bytes(64), Some(36));
        assert_eq!(WeightType::Q8_0.row_bytes(64), Some(68));
        assert_eq!(WeightType::Q4_0.row_bytes(33), None);
        assert_eq!(WeightType::F32.row_bytes(3), Some(12));
        assert_eq!(WeightType::F32.row_bytes(usize::MAX), None);
    }
}
