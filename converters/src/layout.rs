//! Where each tensor and each expert goes in the output, and the work that brings it there.
//!
//! Order: first, in one run, everything that a token always needs (embedding, norms, attention, routers), so that it is
//! loaded in one read; then the experts layer by layer, gate, up, down, so that what is used together lies together.
//! Every tensor of a quantized model starts on a page. The plan is a pure function of configuration and options: it reads no weight.

use std::ops::Range;
use std::sync::Arc;

use st_gguf::{GgmlType, Layout, TensorSpec};
use st_kernels::{ExpertFormat, WeightType};

use crate::error::ConvertError;
use crate::options::ConvertOptions;
use crate::quantize::Target;
use crate::tensor_map::{Kind, ModelShape, Rule, Scope, TABLE, Tensor, rule_of};

/// Tensors of files that are run as they are start at multiples of this: a page, and the sector size of direct reads.
pub(crate) const ALIGNMENT: u64 = 4096;

/// The alignment of files of floats: what other programs go on from. llama-quantize writes tensors 32 bytes apart whatever its input
/// states, so that what it makes of other files cannot be loaded.
const PLAIN_ALIGNMENT: u64 = 32;

/// Where the tensors of an output may start, whose experts are quantized or floats.
pub(crate) fn alignment_of(layout: Layout, is_quantized: bool) -> u64 {
    if layout == Layout::Gguf && !is_quantized { PLAIN_ALIGNMENT } else { ALIGNMENT }
}

/// Most weights of one unit of work: large enough that its overhead vanishes, small enough that many fit in memory.
const UNIT_WEIGHTS: usize = 1 << 20;

/// The matrices of an expert in the order in which they are used.
pub(crate) const EXPERT_TENSORS: [Tensor; 3] = [Tensor::FfnGateExps, Tensor::FfnUpExps, Tensor::FfnDownExps];

/// What one unit of work produces: the next bytes of the output.
#[derive(Clone, Debug)]
pub(crate) enum Unit {
    /// Some weights of one matrix.
    Weights {
        /// Which matrix.
        slot: (Tensor, usize, usize),
        /// The first of them, counted through the matrix.
        first: usize,
        /// How many.
        count: usize,
        /// What they become.
        target: Target,
    },
    /// Bytes of the tensor that is not the model's own.
    Extra {
        /// Which.
        range: Range<usize>,
    },
    /// The packed record of one expert.
    Record {
        /// Its layer.
        layer: usize,
        /// Its number.
        expert: usize,
    },
}

/// The output's tensors, and the units that fill them, both in the order of the file.
#[derive(Debug)]
pub(crate) struct OutputLayout {
    pub(crate) tensors: Vec<TensorSpec>,
    pub(crate) units: Vec<Unit>,
    /// The index of the tensor that each unit belongs to.
    pub(crate) unit_tensor: Vec<usize>,
    /// How packed records are laid out, in the offload layout.
    pub(crate) packing: Option<ExpertFormat>,
    /// What experts become.
    pub(crate) expert_target: Target,
    /// The tensor that is not the model's own, and its bytes.
    pub(crate) extra: Option<(TensorSpec, Arc<[u8]>)>,
}

impl OutputLayout {
    /// Lays out a model with or without an LM head of its own.
    ///
    /// # Errors
    /// [`ConvertError::RowLength`] where a matrix cannot be cut into blocks of its type.
    pub(crate) fn new(model: &ModelShape, has_output: bool, options: &ConvertOptions) -> Result<Self, ConvertError> {
        let target = |ty| Target { ty, search: options.search && ty == WeightType::Q4_0 };
        let packing = match options.layout {
            Layout::Gguf => None,
            Layout::Offload => Some(expert_format(model, options.ty)?),
        };
        let mut layout = Self {
            tensors: Vec::new(),
            units: Vec::new(),
            unit_tensor: Vec::new(),
            packing,
            expert_target: target(options.ty),
            extra: options.extra.clone(),
        };
        for scope in [Scope::Model, Scope::Layer] {
            let layers = if scope == Scope::Model { 1 } else { model.n_layers };
            for layer in 0..layers {
                for rule in TABLE.iter().filter(|rule| rule.scope() == scope) {
                    let ty = match rule.kind {
                        Kind::Norm | Kind::Router => WeightType::F32,
                        Kind::Embedding => options.output_type.unwrap_or(options.ty),
                        Kind::Matrix | Kind::Expert => options.ty,
                    };
                    if rule.tensor != Tensor::Output || has_output {
                        layout.push_tensor(model, rule, layer, target(ty))?;
                    }
                }
            }
        }
        if let Some((spec, bytes)) = &options.extra {
            layout.tensors.push(spec.clone());
            for start in (0..bytes.len()).step_by(UNIT_WEIGHTS) {
                layout.push_unit(Unit::Extra { range: start..bytes.len().min(start + UNIT_WEIGHTS) });
            }
        }
        for layer in 0..model.n_layers {
            match &layout.packing {
                None => {
                    for tensor in EXPERT_TENSORS {
                        layout.push_tensor(model, rule_of(tensor), layer, target(options.ty))?;
                    }
                }
                Some(format) => {
                    let shape = vec![format.record_bytes() as u64, model.n_experts as u64];
                    let name = st_gguf::tensor_names::packed(layer);
                    layout.tensors.push(TensorSpec { name, shape, ty: GgmlType::I8 });
                    for expert in 0..model.n_experts {
                        layout.push_unit(Unit::Record { layer, expert });
                    }
                }
            }
        }
        Ok(layout)
    }

    /// Adds a tensor and the work for it: its one matrix, or those of all experts of the layer.
    fn push_tensor(
        &mut self,
        model: &ModelShape,
        rule: &Rule,
        layer: usize,
        target: Target,
    ) -> Result<(), ConvertError> {
        let (rows, cols) = (rule.rows(model), rule.cols(model));
        let name = rule.gguf_name(layer);
        check_rows(&name, cols, target.ty)?;
        self.tensors.push(TensorSpec { name, shape: rule.tensor.ggml_shape(model), ty: target.ty.ggml() });
        let experts = if rule.scope() == Scope::Expert { model.n_experts } else { 1 };
        // Parts of about equal size, so that no thread is left with a crumb while the others wait for the next tensor.
        let parts = (rows * cols).div_ceil(UNIT_WEIGHTS).clamp(1, rows);
        let rows_per_part = rows.div_ceil(parts);
        for expert in 0..experts {
            for row in (0..rows).step_by(rows_per_part) {
                let count = rows_per_part.min(rows - row) * cols;
                let slot = (rule.tensor, layer, expert);
                self.push_unit(Unit::Weights { slot, first: row * cols, count, target });
            }
        }
        Ok(())
    }

    fn push_unit(&mut self, unit: Unit) {
        self.units.push(unit);
        self.unit_tensor.push(self.tensors.len() - 1);
    }

    /// Bytes that a unit adds to the output.
    pub(crate) fn unit_bytes(&self, unit: &Unit) -> usize {
        match unit {
            Unit::Weights { count, target, .. } => target.bytes(*count),
            Unit::Extra { range } => range.len(),
            Unit::Record { .. } => self.packing.as_ref().map_or(0, ExpertFormat::record_bytes),
        }
    }
}

fn check_rows(name: &str, columns: usize, ty: WeightType) -> Result<(), ConvertError> {
    if columns.is_multiple_of(ty.block_len()) {
        return Ok(());
    }
    Err(ConvertError::RowLength { tensor: name.into(), columns, ty: ty.name(), block: ty.block_len() })
}

/// How records of this model's experts are packed.
fn expert_format(model: &ModelShape, ty: WeightType) -> Result<ExpertFormat, ConvertError> {
    for tensor in EXPERT_TENSORS {
        check_rows(&rule_of(tensor).gguf_name(0), rule_of(tensor).cols(model), ty)?;
    }
    ExpertFormat::new(ty, model.n_embd, model.n_ff)
        .map_err(|error| ConvertError::Options(format!("experts cannot be packed as {ty}: {error}")))
}
