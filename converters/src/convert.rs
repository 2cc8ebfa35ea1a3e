//! Streams an input's tensors into a GGUF file: read, checked, converted and packed in parallel, written in order.
//!
//! Owns memory and speed: input pages are asked for ahead of their use and let go after it, results in flight are
//! bounded by bytes, and the bytes written are a function of input and options alone.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use st_gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, WriteOptions, reserve_checksums};
use st_kernels::{ExpertFormat, Kernels, SquaredErrors, WeightType};

use crate::compare::{Comparison, Difference};
use crate::error::ConvertError;
use crate::imatrix::Imatrix;
use crate::input::{Input, SourceTensor, weight_bytes};
use crate::layout::{EXPERT_TENSORS, OutputLayout, Unit, alignment_of};
use crate::metadata;
use crate::options::ConvertOptions;
use crate::pipeline::run_ordered;
use crate::progress::{Cancel, Progress};
use crate::quantize::{Scratch, Target, convert_weights, untranspose};
use crate::record;
use crate::tensor_map::Tensor;

/// Most bytes of finished output that wait to be written.
const IN_FLIGHT_BYTES: usize = 64 << 20;
/// How many bytes of input the kernel is asked for before they are used: enough for it to keep a disk busy.
const READ_AHEAD_BYTES: usize = 64 << 20;

/// Said of every file in the offload layout.
pub(crate) const OFFLOAD_NOTE: &str = "the offload layout is for this tool; llama.cpp does not read it";

/// One tensor of an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Name, shape (fastest dimension first) and type.
    pub spec: TensorSpec,
    /// Where it starts in the file.
    pub offset: u64,
    /// Its bytes, without padding.
    pub bytes: u64,
}

/// What a conversion will write.
#[derive(Clone, Debug)]
pub struct ConvertPlan {
    /// The tensors in the order of the file.
    pub tensors: Vec<PlannedTensor>,
    /// Bytes of weights that will be read.
    pub input_bytes: u64,
    /// Bytes of the whole file.
    pub output_bytes: u64,
    /// What the person should know, one sentence each.
    pub warnings: Vec<String>,
}

/// What a conversion wrote.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The file.
    pub plan: ConvertPlan,
    /// What the search for scales gained, one entry per kind of matrix; without a search, none.
    pub gains: Vec<SearchGain>,
}

/// What a search for scales gained on all matrices of one kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SearchGain {
    /// The kind.
    pub tensor: Tensor,
    /// Weights of all such matrices.
    pub weights: u64,
    /// Sums over those weights.
    pub errors: SquaredErrors,
}

/// Everything that a conversion derives from input and options before it reads a weight.
pub(crate) struct Job<'a> {
    input: &'a Input,
    keep_head: bool,
    imatrix: Option<Arc<Imatrix>>,
    pub(crate) layout: OutputLayout,
    pub(crate) metadata: Metadata,
    /// Tensors start at multiples of this.
    pub(crate) alignment: u64,
    /// Largest output of a unit.
    unit_bytes: usize,
    /// Bytes of input, and of the largest unit's input.
    input_bytes: u64,
    unit_input_bytes: usize,
}

/// What one unit leaves behind besides its bytes.
pub(crate) struct Done {
    pub(crate) input_bytes: u64,
    /// Of each matrix, where scales are searched for.
    pub(crate) gains: Vec<SearchGain>,
}

/// Sums of gains, one for each kind of matrix. Added in the order of the file, so that not even the last digit depends on threads.
#[derive(Debug, Default)]
pub(crate) struct Gains(BTreeMap<Tensor, SearchGain>);

impl Gains {
    pub(crate) fn add(&mut self, gain: SearchGain) {
        let start = SearchGain { weights: 0, errors: SquaredErrors::default(), ..gain };
        let sum = self.0.entry(gain.tensor).or_insert(start);
        sum.weights += gain.weights;
        sum.errors += gain.errors;
    }

    pub(crate) fn into_vec(self) -> Vec<SearchGain> {
        self.0.into_values().collect()
    }
}

/// Lays out the output without reading a weight or touching the disk.
///
/// # Errors
/// As [`convert`], short of what concerns weights and writing.
pub fn plan(input: &Input, options: &ConvertOptions) -> Result<ConvertPlan, ConvertError> {
    Job::new(input, options)?.plan()
}

/// Converts `input` and writes it to `out`; returns what was written. `out` appears when it is complete and synced, and
/// until then, as after any failure, whatever was there stays as it was.
///
/// # Errors
/// Anything in [`ConvertError`]; an existing `out` is refused unless `overwrite` is set.
pub fn convert(
    input: &Input,
    options: &ConvertOptions,
    out: &Path,
    overwrite: bool,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Converted, ConvertError> {
    let job = Job::new(input, options)?;
    let plan = job.plan()?;
    cancel.check()?;
    let write_options = WriteOptions { alignment: job.alignment, overwrite };
    let mut writer = GgufWriter::create(out, &job.metadata, &job.layout.tensors, write_options)?;
    progress.start(job.input_bytes);
    let mut gains = Gains::default();
    job.run(&job.all(), options.threads, cancel, |_, bytes, done| {
        writer.write(bytes)?;
        done.gains.into_iter().for_each(|gain| gains.add(gain));
        progress.advance(done.input_bytes);
        Ok(())
    })?;
    cancel.check()?;
    writer.state_checksums(job.metadata)?;
    writer.finish()?;
    progress.finish();
    Ok(Converted { plan, gains: gains.into_vec() })
}

/// Converts `input` in memory and compares the result with the GGUF file `with`, tensor by tensor: names, shapes, types
/// and bytes. Order, alignment and metadata may differ.
///
/// # Errors
/// As [`convert`]; [`ConvertError::Gguf`] where `with` cannot be read.
pub fn compare(
    input: &Input,
    options: &ConvertOptions,
    with: &Path,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Vec<Difference>, ConvertError> {
    let job = Job::new(input, options)?;
    let mut comparison = Comparison::new(GgufFile::open(with)?, &job.layout.tensors);
    progress.start(job.input_bytes);
    job.run(&job.all(), options.threads, cancel, |unit, bytes, done| {
        comparison.add(job.layout.unit_tensor[unit], bytes)?;
        progress.advance(done.input_bytes);
        Ok(())
    })?;
    progress.finish();
    Ok(comparison.finish())
}

impl<'a> Job<'a> {
    pub(crate) fn new(input: &'a Input, options: &ConvertOptions) -> Result<Self, ConvertError> {
        let types = [Some(options.ty), options.output_type];
        if let Some(ty) = types.into_iter().flatten().find(|ty| !WeightType::WRITTEN.contains(ty)) {
            return Err(ConvertError::Options(format!("weights of type {ty} are read, not written")));
        }
        if options.search && !types.contains(&Some(WeightType::Q4_0)) {
            return Err(ConvertError::Options("a search for scales needs a Q4_0 output".into()));
        }
        let shape = input.shape();
        let layout = OutputLayout::new(shape, input.has_output(options.keep_head), options)?;
        let alignment = alignment_of(options.layout, options.ty.is_quantized());
        let mut metadata = metadata::describe(shape, &input.carried, options.ty, alignment);
        if let Some(format) = &layout.packing {
            record::describe(&vec![format.clone(); shape.n_layers], &mut metadata);
        }
        reserve_checksums(&mut metadata, &layout.tensors);
        let mut job = Self {
            input,
            keep_head: options.keep_head,
            imatrix: options.imatrix.clone().filter(|_| options.search),
            layout,
            metadata,
            alignment,
            unit_bytes: 0,
            input_bytes: 0,
            unit_input_bytes: 1,
        };
        job.check_losses(options.requantize)?;
        job.check_imatrix()?;
        for unit in &job.layout.units {
            let bytes: usize = job.sources(unit)?.iter().map(|(_, range)| range.len()).sum();
            job.input_bytes += bytes as u64;
            job.unit_input_bytes = job.unit_input_bytes.max(bytes);
            job.unit_bytes = job.unit_bytes.max(job.layout.unit_bytes(unit));
        }
        Ok(job)
    }

    pub(crate) fn plan(&self) -> Result<ConvertPlan, ConvertError> {
        let plan = st_gguf::plan(&self.metadata, &self.layout.tensors, self.alignment)?;
        let places = plan.offsets.iter().zip(&plan.sizes);
        let tensors = self.layout.tensors.iter().zip(places);
        let mut warnings = self.input.warnings.clone();
        warnings.extend(self.input.head_note(self.keep_head));
        warnings.extend(self.input.shape().llama_cpp_differences());
        if self.layout.packing.is_some() {
            warnings.push(OFFLOAD_NOTE.into());
        } else if let Some((spec, _)) = &self.layout.extra {
            warnings.push(format!("llama.cpp does not load a file that holds `{}`", spec.name));
        }
        Ok(ConvertPlan {
            tensors: tensors
                .map(|(spec, (&offset, &bytes))| PlannedTensor { spec: spec.clone(), offset, bytes })
                .collect(),
            input_bytes: self.input_bytes,
            output_bytes: plan.total,
            warnings,
        })
    }

    /// Refuses importance that is of no tensor of this model.
    fn check_imatrix(&self) -> Result<(), ConvertError> {
        let Some(imatrix) = &self.imatrix else { return Ok(()) };
        let names = |name: &str| {
            let layers = 0..self.input.shape().n_layers;
            Tensor::ALL.iter().any(|tensor| layers.clone().any(|layer| tensor.name(layer) == name))
        };
        match imatrix.tensors().any(names) {
            true => Ok(()),
            false => Err(ConvertError::Options(
                "the importance matrix is of another model: it names none of its tensors".into(),
            )),
        }
    }

    /// How much the columns of a matrix matter, where somebody says so.
    fn importance(&self, (tensor, layer, expert): (Tensor, usize, usize)) -> Result<Option<&[f32]>, ConvertError> {
        let Some(imatrix) = &self.imatrix else { return Ok(None) };
        let shape = self.input.shape();
        let experts = if EXPERT_TENSORS.contains(&tensor) { shape.n_experts } else { 1 };
        imatrix.of(&tensor.name(layer), tensor.dims(shape).0, (expert, experts))
    }

    /// Refuses to round twice, where nobody `allowed` it.
    fn check_losses(&self, allowed: bool) -> Result<(), ConvertError> {
        let lossy = |source: &SourceTensor, ty: WeightType| match source.is_requantized_as(ty) && !allowed {
            true => Err(ConvertError::Requantize {
                path: self.input.path().into(),
                tensor: source.name.clone(),
                got: source.ty.name(),
                to: ty.name(),
            }),
            false => Ok(()),
        };
        for unit in &self.layout.units {
            match unit {
                Unit::Weights { slot, target, .. } => lossy(self.input.tensor(*slot)?, target.ty)?,
                Unit::Extra { .. } => {}
                Unit::Record { layer, expert } => {
                    for tensor in EXPERT_TENSORS {
                        lossy(self.input.tensor((tensor, *layer, *expert))?, self.layout.expert_target.ty)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The bytes of input that a unit reads: file and range, in order.
    pub(crate) fn sources(&self, unit: &Unit) -> Result<Vec<(usize, Range<usize>)>, ConvertError> {
        match unit {
            Unit::Weights { slot, first, count, .. } => {
                let source = self.input.tensor(*slot)?;
                if source.transposed {
                    return Ok(vec![(source.file, source.range.clone())]);
                }
                let start = source.range.start + weight_bytes(source.ty, *first);
                Ok(vec![(source.file, start..start + weight_bytes(source.ty, *count))])
            }
            Unit::Extra { .. } => Ok(Vec::new()),
            Unit::Record { layer, expert } => {
                let matrix = |tensor| self.input.tensor((tensor, *layer, *expert));
                EXPERT_TENSORS.iter().map(|&tensor| matrix(tensor).map(|m| (m.file, m.range.clone()))).collect()
            }
        }
    }

    /// The numbers of all units.
    fn all(&self) -> Vec<usize> {
        (0..self.layout.units.len()).collect()
    }

    /// Does these units on `threads` threads and hands their bytes to `sink` in order.
    pub(crate) fn run(
        &self,
        units: &[usize],
        threads: usize,
        cancel: &Cancel,
        mut sink: impl FnMut(usize, &[u8], Done) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let threads = threads.max(1);
        let window = (IN_FLIGHT_BYTES / self.unit_bytes.max(1)).clamp(1, 4 * threads);
        let ahead = (READ_AHEAD_BYTES / self.unit_input_bytes).max(window);
        run_ordered(
            units.len(),
            threads,
            window,
            Worker::new,
            |worker, i, out| {
                cancel.check()?;
                let first_ahead = if i == 0 { 1 } else { i + ahead };
                for &later in units.iter().take(i + ahead + 1).skip(first_ahead) {
                    for (file, range) in self.sources(&self.layout.units[later])? {
                        self.input.files[file].will_need(range);
                    }
                }
                self.produce(worker, &self.layout.units[units[i]], out)
            },
            |i, bytes, done| sink(units[i], bytes, done),
        )
    }

    /// Fills `out` with the bytes of one unit.
    fn produce(&self, worker: &mut Worker, unit: &Unit, out: &mut Vec<u8>) -> Result<Done, ConvertError> {
        let sources = self.sources(unit)?;
        out.resize(self.layout.unit_bytes(unit), 0);
        let mut gains = Vec::new();
        match unit {
            Unit::Weights { slot, first, count, target } => {
                let (file, range) = &sources[0];
                let source = self.input.tensor(*slot)?;
                let importance = self.importance(*slot)?;
                let errors =
                    self.weights(worker, source, (*file, range), (*first, *count), (*target, importance), out)?;
                if target.search {
                    gains.push(SearchGain { tensor: slot.0, weights: *count as u64, errors });
                }
            }
            Unit::Extra { range } => {
                if let Some((_, bytes)) = &self.layout.extra {
                    out.copy_from_slice(&bytes[range.clone()]);
                }
            }
            Unit::Record { layer, expert } => {
                if let Some(format) = &self.layout.packing {
                    gains = self.pack(worker, format, (*layer, *expert), &sources, out)?;
                }
            }
        }
        let mut input_bytes = 0;
        for (file, range) in sources {
            input_bytes += range.len() as u64;
            self.input.files[file].release(range);
        }
        Ok(Done { input_bytes, gains })
    }

    /// Converts `count` weights of a matrix from the first one on, which the bytes `place` of the input hold.
    fn weights(
        &self,
        worker: &mut Worker,
        source: &SourceTensor,
        (file, range): (usize, &Range<usize>),
        (first, count): (usize, usize),
        (target, importance): (Target, Option<&[f32]>),
        out: &mut [u8],
    ) -> Result<SquaredErrors, ConvertError> {
        let bytes = self.input.read(source, file, range)?;
        if !source.transposed {
            return convert_weights(source, first, bytes, (target, importance), &mut worker.scratch, out);
        }
        // Of the experts' matrices down alone is ever stored so.
        let (columns, rows) = (self.input.shape().n_ff, self.input.shape().n_embd);
        worker.upright.resize(count * 4, 0);
        untranspose(source.ty, bytes, columns, rows, first / columns, &mut worker.upright);
        let upright = SourceTensor { ty: WeightType::F32, transposed: false, ..source.clone() };
        convert_weights(&upright, first, &worker.upright, (target, importance), &mut worker.scratch, out)
    }

    /// Converts the three matrices of an expert and packs them into one record.
    fn pack(
        &self,
        worker: &mut Worker,
        format: &ExpertFormat,
        (layer, expert): (usize, usize),
        sources: &[(usize, Range<usize>)],
        record: &mut [u8],
    ) -> Result<Vec<SearchGain>, ConvertError> {
        let mut gains = Vec::new();
        let mut canonical = std::mem::take(&mut worker.canonical);
        let packed = record::pack(worker.kernels, format, &mut canonical, record, |matrix, canonical| {
            let (tensor, (file, range)) = (EXPERT_TENSORS[matrix as usize], &sources[matrix as usize]);
            let source = self.input.tensor((tensor, layer, expert))?;
            let (target, weights) = (self.layout.expert_target, format.n_embd() * format.n_ff());
            let importance = self.importance((tensor, layer, expert))?;
            let errors = self.weights(worker, source, (*file, range), (0, weights), (target, importance), canonical)?;
            if target.search {
                gains.push(SearchGain { tensor, weights: weights as u64, errors });
            }
            Ok(())
        });
        worker.canonical = canonical;
        packed?;
        Ok(gains)
    }
}

/// Buffers of one thread.
struct Worker {
    kernels: Kernels,
    scratch: Scratch,
    /// One matrix of an expert as GGUF stores it, on its way into a record.
    canonical: Vec<u8>,
    /// Floats of a matrix that the input holds transposed.
    upright: Vec<u8>,
}

impl Worker {
    fn new() -> Self {
        Self { kernels: Kernels::detect(), scratch: Scratch::new(), canonical: Vec::new(), upright: Vec::new() }
    }
}
