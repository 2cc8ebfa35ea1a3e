//! The weight types that the kernels compute with, and how many bytes a row of each takes.

/// Values per quantized block.
pub const BLOCK_LEN: usize = 32;

/// How the weights of a matrix are stored. A subset of the ggml types: the ones that the runtime computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Blocks of 32: one f16 scale and 4-bit values with an offset of 8 ([`crate::block::BlockQ4_0`]).
    Q4_0,
    /// Blocks of 32: one f16 scale and signed 8-bit values ([`crate::block::BlockQ8_0`]).
    Q8_0,
}

impl WeightType {
    /// Every type, in the order of their ggml ids.
    pub const ALL: [WeightType; 5] = [Self::F32, Self::F16, Self::Q4_0, Self::Q8_0, Self::BF16];

    /// The type with this ggml id, if the kernels know it.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.ggml_id() == id)
    }

    /// The id that GGUF files use for this type.
    pub fn ggml_id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
            Self::BF16 => 30,
        }
    }

    /// The name that ggml prints.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 => "Q8_0",
            Self::BF16 => "BF16",
        }
    }

    /// Values per block: 32 for the quantized types, 1 for floats.
    pub fn block_len(self) -> usize {
        if self.is_quantized() { BLOCK_LEN } else { 1 }
    }

    /// Bytes per block of [`Self::block_len`] values.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q8_0 => 34,
        }
    }

    /// Whether values come in scaled integer blocks, multiplied by int8 activations.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Q4_0 | Self::Q8_0)
    }

    /// Bytes of a row of `k` values; `None` if `k` is not a whole number of blocks or the size overflows.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        (k / self.block_len()).checked_mul(self.block_bytes())
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
    fn ids_round_trip_and_unknown_ids_are_refused() {
        for ty in WeightType::ALL {
            assert_eq!(WeightType::from_ggml_id(ty.ggml_id()), Some(ty));
        }
        assert_eq!(WeightType::from_ggml_id(3), None);
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
