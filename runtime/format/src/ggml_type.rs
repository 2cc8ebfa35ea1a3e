//! The element types that ggml defines, with their block sizes. Sizes only: what the bytes of a block
//! mean is not this crate's business.

use std::fmt;

macro_rules! ggml_types {
    ($($variant:ident = $id:literal, $len:literal, $bytes:literal;)*) => {
        /// The element type of a tensor, as ggml numbers and names them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "ggml's own spelling")]
        #[non_exhaustive]
        pub enum GgmlType {
            $(
                #[doc = concat!("`", stringify!($variant), "`: ", $len, " elements in ", $bytes, " bytes.")]
                $variant,
            )*
            /// A type id this crate does not know. Such tensors can be listed, not sized by their shape.
            Unknown(u32),
        }

        impl GgmlType {
            /// Every known type, in the order of the ids.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The type with ggml's number `id`.
            pub const fn from_id(id: u32) -> Self {
                match id {
                    $($id => Self::$variant,)*
                    other => Self::Unknown(other),
                }
            }

            /// ggml's number for this type.
            pub const fn id(self) -> u32 {
                match self {
                    $(Self::$variant => $id,)*
                    Self::Unknown(id) => id,
                }
            }

            /// ggml's name, such as `Q4_0`; `unknown` for a type this crate does not know.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($variant),)*
                    Self::Unknown(_) => "unknown",
                }
            }

            /// Elements in one block (1 for plain numbers; 1 for an unknown type).
            pub const fn block_len(self) -> u64 {
                match self {
                    $(Self::$variant => $len,)*
                    Self::Unknown(_) => 1,
                }
            }

            /// Bytes of one block (0 for an unknown type).
            pub const fn block_bytes(self) -> u64 {
                match self {
                    $(Self::$variant => $bytes,)*
                    Self::Unknown(_) => 0,
                }
            }
        }
    };
}

ggml_types! {
    F32 = 0, 1, 4;
    F16 = 1, 1, 2;
    Q4_0 = 2, 32, 18;
    Q4_1 = 3, 32, 20;
    Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24;
    Q8_0 = 8, 32, 34;
    Q8_1 = 9, 32, 36;
    Q2_K = 10, 256, 84;
    Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144;
    Q5_K = 13, 256, 176;
    Q6_K = 14, 256, 210;
    Q8_K = 15, 256, 292;
    IQ2_XXS = 16, 256, 66;
    IQ2_XS = 17, 256, 74;
    IQ3_XXS = 18, 256, 98;
    IQ1_S = 19, 256, 50;
    IQ4_NL = 20, 32, 18;
    IQ3_S = 21, 256, 110;
    IQ2_S = 22, 256, 82;
    IQ4_XS = 23, 256, 136;
    I8 = 24, 1, 1;
    I16 = 25, 1, 2;
    I32 = 26, 1, 4;
    I64 = 27, 1, 8;
    F64 = 28, 1, 8;
    IQ1_M = 29, 256, 56;
    BF16 = 30, 1, 2;
    TQ1_0 = 34, 256, 54;
    TQ2_0 = 35, 256, 66;
    MXFP4 = 39, 32, 17;
    NVFP4 = 40, 64, 36;
    Q1_0 = 41, 128, 18;
    Q2_0 = 42, 64, 18;
}

impl GgmlType {
    /// Bytes that `n_elements` take, or `None` where they are no whole number of blocks, the type is
    /// unknown, or the size does not fit in 64 bits.
    pub const fn bytes_for(self, n_elements: u64) -> Option<u64> {
        if matches!(self, Self::Unknown(_)) || !n_elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (n_elements / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor of `shape` (ggml order: fastest dimension first, which must hold whole blocks),
    /// or `None` as for [`bytes_for`](Self::bytes_for).
    pub fn bytes_for_shape(self, shape: &[u64]) -> Option<u64> {
        let row = self.bytes_for(shape.first().copied().unwrap_or(1))?;
        shape.iter().skip(1).try_fold(row, |bytes, &n| bytes.checked_mul(n))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(id) => write!(f, "unknown type {id}"),
            known => f.write_str(known.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_sizes_are_whole_blocks() {
        for &ty in GgmlType::ALL {
            assert_eq!(GgmlType::from_id(ty.id()), ty);
            assert_eq!(ty.bytes_for(0), Some(0));
            assert_eq!(ty.bytes_for(ty.block_len()), Some(ty.block_bytes()));
            assert!(ty.block_bytes() > 0);
        }
        assert_eq!(GgmlType::from_id(99).id(), 99);
        assert_eq!(GgmlType::Unknown(99).to_string(), "unknown type 99");
    }

    #[test]
    fn sizes_of_the_4b_expert_matrix() {
        assert_eq!(GgmlType::Q4_0.bytes_for_shape(&[1536, 768]), Some(663_552));
        assert_eq!(GgmlType::Q4_0.bytes_for_shape(&[1536, 768, 32]), Some(32 * 663_552));
        assert_eq!(GgmlType::F32.bytes_for_shape(&[]), Some(4));
    }

    #[test]
    fn partial_blocks_overflow_and_unknown_types_have_no_size() {
        assert_eq!(GgmlType::Q4_0.bytes_for(33), None);
        assert_eq!(GgmlType::Q4_0.bytes_for_shape(&[16, 2]), None, "a row holds whole blocks");
        assert_eq!(GgmlType::F64.bytes_for(u64::MAX), None);
        assert_eq!(GgmlType::F32.bytes_for_shape(&[1 << 40, 1 << 40]), None);
        assert_eq!(GgmlType::Unknown(99).bytes_for(32), None);
    }
}
