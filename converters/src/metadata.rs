//! The output's metadata: the keys by which llama.cpp and this project's runtime know a SmallThinker file.

use st_gguf::Metadata;
use st_kernels::WeightType;

use crate::tensor_map::ModelShape;

/// The version of ggml's block formats that this project writes.
const QUANTIZATION_VERSION: u32 = 2;

/// llama.cpp's number for "mostly this type", one that is written.
fn file_type(ty: WeightType) -> u32 {
    match ty {
        WeightType::F32 => 0,
        WeightType::F16 => 1,
        WeightType::Q4_0 => 2,
        WeightType::Q8_0 => 7,
        WeightType::BF16 => 32,
        _ => unreachable!("{ty} is not written"),
    }
}

/// All keys of an output whose matrices are of type `ty`; `carried` holds the tokenizer and what the input brought
/// along. Nothing depends on where the input lies.
pub(crate) fn describe(shape: &ModelShape, carried: &Metadata, ty: WeightType, alignment: u64) -> Metadata {
    let mut out = Metadata::new();
    out.insert("general.architecture", "smallthinker");
    out.insert("general.type", "model");
    out.insert("general.name", "SmallThinker");
    let (general, rest): (Vec<_>, Vec<_>) = carried.iter().partition(|(key, _)| key.starts_with("general."));
    for (key, value) in general {
        out.insert(key, value.clone());
    }
    // Stated here so that its place does not depend on who writes the file; the writer keeps it.
    out.insert("general.alignment", alignment as u32);
    out.insert("general.file_type", file_type(ty));
    out.insert("general.quantization_version", QUANTIZATION_VERSION);
    for (key, value) in shape.to_metadata() {
        out.insert(key, value);
    }
    for (key, value) in rest {
        out.insert(key, value.clone());
    }
    out
}
