//! A GGUF file as input, with weights of any types that are computed with.
//!
//! Owns cutting the stacked expert tensors into single matrices, and telling PowerInfer's own files, whose down matrices are transposed.
//! Carries tokenizer and general keys over unchanged. Refuses packed experts.

use std::collections::HashMap;
use std::path::Path;

use st_format::{is_transposed_down, same_shape};
use st_gguf::{GgufFile, Header, Metadata, Part};
use st_kernels::{UnsupportedType, WeightType};

use crate::error::ConvertError;
use crate::input::{Input, Slot, SourceTensor, weight_bytes};
use crate::mapped::map_weights;
use crate::tensor_map::{ModelShape, Scope, TABLE, Tensor};
use crate::vocabulary;

/// Opens and validates the GGUF file at `path`.
pub(crate) fn open(path: &Path) -> Result<Input, ConvertError> {
    let gguf = GgufFile::open(path)?;
    let header = &gguf.header;
    if header.metadata.str("st.layout.kind")?.is_some_and(|kind| kind != "gguf") {
        return Err(ConvertError::PackedInput { path: path.into() });
    }
    let shape = header.model_shape()?;
    let mut warnings = shape.ignored(header);
    vocabulary::check(path, &header.metadata)?;
    let parts = gguf.source.parts();
    let tensors = bind(path, header, &parts, &shape)?;
    let carried = carry(&header.metadata);
    if carried.get("tokenizer.ggml.tokens").is_none() {
        warnings.push("the file has no tokenizer: the output takes and gives token ids only".into());
    }
    let files = parts.iter().map(|part| map_weights(part.path)).collect::<Result<Vec<_>, _>>()?;
    let mut ends = parts.iter().zip(&files).map(|(part, file)| part.start + file.bytes().len() as u64);
    if ends.next_back() != Some(header.file_len) {
        let source = std::io::Error::other("the file changed its length while it was opened");
        return Err(ConvertError::Io { path: path.into(), source });
    }
    if tensors.values().any(|tensor| tensor.transposed) {
        warnings.push(
            "the file is one for PowerInfer, its down matrices quantized along the outputs: they are quantized anew along the \
             neurons, so weights change; the plain file of the same model loses nothing"
                .into(),
        );
    }
    let tied = header.tensor(&Tensor::Output.name(0)).is_none();
    Ok(Input { path: path.into(), shape, tied, carried, files, gguf: Some(gguf), tensors, warnings })
}

/// What describes the weights is written anew; everything else is kept, in its order.
fn carry(metadata: &Metadata) -> Metadata {
    const RENEWED: [&str; 3] = ["general.alignment", "general.file_type", "general.quantization_version"];
    let mut carried = Metadata::new();
    for (key, value) in metadata.iter() {
        let renewed = RENEWED.contains(&key)
            || ["smallthinker.", "st.", "split.", "quantize."].iter().any(|prefix| key.starts_with(prefix));
        if !renewed {
            carried.insert(key, value.clone());
        }
    }
    carried
}

/// Gives every matrix of the model its place in the file, experts one by one.
fn bind(
    path: &Path,
    header: &Header,
    parts: &[Part<'_>],
    shape: &ModelShape,
) -> Result<HashMap<Slot, SourceTensor>, ConvertError> {
    let mut tensors = HashMap::new();
    for rule in &TABLE {
        if rule.tensor == Tensor::Output && header.tensor(&rule.gguf_name(0)).is_none() {
            continue;
        }
        let expected = rule.tensor.ggml_shape(shape);
        let weights = rule.rows(shape) * rule.cols(shape);
        for (layer, expert) in rule.instances(shape) {
            let name = rule.gguf_name(layer);
            let missing = |_| ConvertError::MissingTensor { path: path.into(), tensor: name.clone() };
            let (info, first_row) = header.place_of(&name, shape).map_err(missing)?;
            // The shape of a matrix that is part of another was proved with the header.
            let is_part = info.name != name;
            let transposed = rule.tensor == Tensor::FfnDownExps && is_transposed_down(&info.shape, shape);
            if !same_shape(&info.shape, &expected) && !transposed && !is_part {
                let got = info.shape.clone();
                return Err(ConvertError::Shape { path: path.into(), tensor: name, got, expected });
            }
            let ty = WeightType::try_from(info.ty).map_err(|UnsupportedType(got)| ConvertError::ComputedType {
                path: path.into(),
                tensor: name.clone(),
                got: got.to_string(),
                expected: WeightType::names(),
            })?;
            // The header parser has proved that all experts together lie inside the file.
            let bytes = weight_bytes(ty, weights);
            let file = parts.partition_point(|part| part.start <= info.offset).saturating_sub(1);
            let start = (info.offset - parts[file].start) as usize
                + expert * bytes
                + weight_bytes(ty, first_row * rule.cols(shape));
            let before = if rule.scope() == Scope::Expert { expert * weights } else { first_row * rule.cols(shape) };
            let (name, first_weight) = (info.name.clone(), before as u64);
            let source = SourceTensor { name, first_weight, file, range: start..start + bytes, ty, transposed };
            tensors.insert((rule.tensor, layer, expert), source);
        }
    }
    Ok(tensors)
}
