//! Moves the experts of a GGUF file from one layout to the other, bit for bit.
//!
//! Owns position only: no weight is decoded, nothing is quantized again, and what is not an expert is copied as it
//! is. Memory is bounded by a few experts. What is read is compared with the input's checksums, so damage found here ends
//! the work instead of travelling on.

use std::path::Path;

use st_gguf::{
    ByteRange, ExpertIndex, GgmlType, GgufError, GgufFile, GgufWriter, Layout, Matrix, Metadata, TensorSpec,
    WriteOptions, checksum_keys, layout_keys, reserve_checksums, tensor_names,
};
use st_kernels::{ExpertFormat, Kernels, UnsupportedType, WeightType};

use crate::compare::{Comparison, Difference};
use crate::convert::{ConvertPlan, OFFLOAD_NOTE, PlannedTensor};
use crate::error::ConvertError;
use crate::layout::alignment_of;
use crate::pipeline::run_ordered;
use crate::progress::{Cancel, Progress};
use crate::record;
use crate::vocabulary;

/// Most bytes that one piece copies of a tensor that holds no experts.
const COPY_BYTES: u64 = 4 << 20;
/// Most bytes of output that wait to be written.
const IN_FLIGHT_BYTES: usize = 64 << 20;

/// How to rearrange a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayoutOptions {
    /// The layout to bring the file to.
    pub to: Layout,
    /// Threads that read and rearrange; one more writes. The bytes do not depend on it.
    pub threads: usize,
    /// Whether an existing output is replaced.
    pub overwrite: bool,
}

/// What one piece of work produces: the next bytes of the output.
#[derive(Clone, Copy, Debug)]
enum Piece {
    /// Bytes of a tensor of the input as they are: the tensor's number, and the bytes within it.
    Copy { tensor: usize, start: u64, len: u64 },
    /// The record of an expert, out of its three matrices.
    Pack { layer: usize, expert: usize },
    /// A matrix of an expert, out of its record.
    Unpack { layer: usize, expert: usize, matrix: Matrix },
}

/// The input, and everything that follows from it before a weight is read.
struct Job<'a> {
    path: &'a Path,
    file: GgufFile,
    index: ExpertIndex,
    /// Per layer.
    formats: Vec<ExpertFormat>,
    kernels: Kernels,
    metadata: Metadata,
    tensors: Vec<TensorSpec>,
    /// With the number of the output's tensor that each is a part of.
    pieces: Vec<(usize, Piece)>,
}

/// Writes the experts of the GGUF file `input` to `out` in the layout `options.to`; returns what was written. The
/// output starts with the tensors that are no experts, in the input's order, and has the experts layer by layer.
/// There and back again gives the first file's bytes, where this tool wrote it.
///
/// # Errors
/// An input that is no SmallThinker file, is in that layout already, lacks a tensor or has one of another shape; a
/// part of it that does not match its checksum; whatever reading and writing may meet. `out` then stays as it was.
pub fn relayout(
    input: &Path,
    options: &RelayoutOptions,
    out: &Path,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<ConvertPlan, ConvertError> {
    let job = Job::new(input, options.to)?;
    let plan = job.plan(options.to)?;
    cancel.check()?;
    let write_options = WriteOptions { alignment: job.alignment(options.to), overwrite: options.overwrite };
    let mut writer = GgufWriter::create(out, &job.metadata, &job.tensors, write_options)?;
    job.run(options.threads, progress, cancel, |_, bytes| Ok(writer.write(bytes)?))?;
    writer.state_checksums(job.metadata)?;
    writer.finish()?;
    Ok(plan)
}

/// Compares what [`relayout`] would write with the GGUF file `with`, tensor by tensor: names, shapes, types and bytes. Writes nothing.
///
/// # Errors
/// As [`relayout`]; those of `with`.
pub fn compare_relayout(
    input: &Path,
    options: &RelayoutOptions,
    with: &Path,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Vec<Difference>, ConvertError> {
    let job = Job::new(input, options.to)?;
    let mut comparison = Comparison::new(GgufFile::open(with)?, &job.tensors);
    job.run(options.threads, progress, cancel, |tensor, bytes| comparison.add(tensor, bytes))?;
    Ok(comparison.finish())
}

impl<'a> Job<'a> {
    fn new(path: &'a Path, to: Layout) -> Result<Self, ConvertError> {
        let file = GgufFile::open(path)?;
        let header = &file.header;
        let index = ExpertIndex::from_header(header, &header.model_shape()?)?;
        vocabulary::check(path, &header.metadata)?;
        if index.layout() == to {
            return Err(ConvertError::Options(format!("{} is in the {} layout already", path.display(), to.name())));
        }
        let formats = (0..index.n_layers()).map(|layer| expert_format(path, &index, layer));
        let formats = formats.collect::<Result<Vec<_>, _>>()?;

        let mut metadata = header.metadata.clone();
        // Those of the checksums come last, as where a file is made at once.
        for key in layout_keys::ALL.into_iter().chain([layout_keys::UP_OFFSET_BEFORE]).chain(checksum_keys::ALL) {
            metadata.remove(key);
        }
        if to == Layout::Offload {
            record::describe(&formats, &mut metadata);
        }
        let kernels = Kernels::detect();
        let mut job = Self { path, file, index, formats, kernels, metadata, tensors: Vec::new(), pieces: Vec::new() };
        job.push_resident()?;
        for layer in 0..job.index.n_layers() {
            match to {
                Layout::Offload => job.push_packed(layer),
                Layout::Gguf => job.push_stacked(layer),
            }
        }
        reserve_checksums(&mut job.metadata, &job.tensors);
        Ok(job)
    }

    /// Makes the bytes of the output in order, for `take(tensor, bytes)`.
    fn run(
        &self,
        threads: usize,
        progress: &dyn Progress,
        cancel: &Cancel,
        mut take: impl FnMut(usize, &[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        progress.start(self.pieces.iter().map(|(_, piece)| self.input_bytes(piece)).sum());
        let threads = threads.max(1);
        let largest = self.pieces.iter().map(|(_, piece)| self.piece_bytes(piece)).max().unwrap_or(1);
        let window = (IN_FLIGHT_BYTES / largest.max(1)).clamp(1, 4 * threads);
        run_ordered(
            self.pieces.len(),
            threads,
            window,
            Vec::new,
            |scratch, piece, bytes| {
                cancel.check()?;
                self.produce(&self.pieces[piece].1, scratch, bytes)
            },
            |piece, bytes, ()| {
                let (tensor, piece) = &self.pieces[piece];
                take(*tensor, bytes)?;
                progress.advance(self.input_bytes(piece));
                Ok(())
            },
        )?;
        progress.finish();
        Ok(())
    }

    /// Adds the tensors that hold no experts.
    fn push_resident(&mut self) -> Result<(), ConvertError> {
        let layers = 0..self.index.n_layers();
        let experts: std::collections::HashSet<String> = match self.index.layout() {
            Layout::Offload => layers.map(tensor_names::packed).collect(),
            Layout::Gguf => {
                layers.flat_map(|layer| Matrix::ALL.map(|matrix| tensor_names::stacked(layer, matrix))).collect()
            }
        };
        let tensors = self.file.header.tensors.iter().enumerate();
        for (i, tensor) in tensors.filter(|(_, tensor)| !experts.contains(&tensor.name)) {
            // What could not be run afterwards is not worth hours of work.
            if let Err(UnsupportedType(got)) = WeightType::try_from(tensor.ty) {
                return Err(ConvertError::ComputedType {
                    path: self.path.into(),
                    tensor: tensor.name.clone(),
                    got: got.to_string(),
                    expected: WeightType::names(),
                });
            }
            let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
            self.tensors.push(TensorSpec { name, shape, ty: tensor.ty });
            for start in (0..tensor.n_bytes).step_by(COPY_BYTES as usize) {
                let len = COPY_BYTES.min(tensor.n_bytes - start);
                self.pieces.push((self.tensors.len() - 1, Piece::Copy { tensor: i, start, len }));
            }
        }
        Ok(())
    }

    fn push_packed(&mut self, layer: usize) {
        let shape = vec![self.formats[layer].record_bytes() as u64, self.index.n_experts() as u64];
        self.tensors.push(TensorSpec { name: tensor_names::packed(layer), shape, ty: GgmlType::I8 });
        let tensor = self.tensors.len() - 1;
        self.pieces.extend((0..self.index.n_experts()).map(|expert| (tensor, Piece::Pack { layer, expert })));
    }

    fn push_stacked(&mut self, layer: usize) {
        let (index, format) = (&self.index, &self.formats[layer]);
        for matrix in Matrix::ALL {
            let (rows, columns) = format.shape(matrix);
            self.tensors.push(TensorSpec {
                name: tensor_names::stacked(layer, matrix),
                shape: [columns, rows, index.n_experts()].map(|n| n as u64).to_vec(),
                ty: format.type_of(matrix).ggml(),
            });
            let tensor = self.tensors.len() - 1;
            self.pieces.extend((0..index.n_experts()).map(|expert| (tensor, Piece::Unpack { layer, expert, matrix })));
        }
    }

    fn plan(&self, to: Layout) -> Result<ConvertPlan, ConvertError> {
        let plan = st_gguf::plan(&self.metadata, &self.tensors, self.alignment(to))?;
        let places = plan.offsets.iter().zip(&plan.sizes);
        let tensors = self.tensors.iter().zip(places);
        Ok(ConvertPlan {
            tensors: tensors
                .map(|(spec, (&offset, &bytes))| PlannedTensor { spec: spec.clone(), offset, bytes })
                .collect(),
            input_bytes: self.pieces.iter().map(|(_, piece)| self.input_bytes(piece)).sum(),
            output_bytes: plan.total,
            warnings: (to == Layout::Offload).then(|| OFFLOAD_NOTE.to_owned()).into_iter().collect(),
        })
    }

    /// Where tensors of the output may start: as where a file of this layout is made at once.
    fn alignment(&self, to: Layout) -> u64 {
        let types = || self.formats.iter().flat_map(|format| Matrix::ALL.map(|matrix| format.type_of(matrix)));
        alignment_of(to, types().any(WeightType::is_quantized))
    }

    /// Bytes that a piece adds to the output.
    fn piece_bytes(&self, piece: &Piece) -> usize {
        match *piece {
            Piece::Copy { len, .. } => len as usize,
            Piece::Pack { layer, .. } => self.formats[layer].record_bytes(),
            Piece::Unpack { layer, matrix, .. } => self.formats[layer].canonical_bytes(matrix),
        }
    }

    /// Bytes of input that a piece stands for.
    fn input_bytes(&self, piece: &Piece) -> u64 {
        match *piece {
            Piece::Copy { len, .. } => len,
            Piece::Pack { layer, expert } => {
                Matrix::ALL.map(|matrix| self.index.matrix(layer, expert, matrix).len).iter().sum()
            }
            Piece::Unpack { layer, expert, matrix } => self.index.matrix(layer, expert, matrix).len,
        }
    }

    /// Fills `out` with the bytes of one piece.
    fn produce(&self, piece: &Piece, scratch: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<(), ConvertError> {
        out.resize(self.piece_bytes(piece), 0);
        match *piece {
            Piece::Copy { tensor, start, .. } => {
                self.file.read_range(&self.file.header.tensors[tensor], start, out)?;
            }
            Piece::Pack { layer, expert } => {
                record::pack(self.kernels, &self.formats[layer], scratch, out, |matrix, canonical| {
                    let range = self.index.matrix(layer, expert, matrix);
                    self.read_expert(&tensor_names::stacked(layer, matrix), range, canonical)
                })?;
            }
            Piece::Unpack { layer, expert, matrix } => {
                let format = &self.formats[layer];
                // An expert's gate comes first of its matrices, and the first failure in order ends the work: whole
                // records need be read and checked only then.
                let region = match self.index.record(layer, expert).filter(|_| matrix == Matrix::Gate) {
                    Some(range) => {
                        scratch.resize(range.len as usize, 0);
                        self.read_expert(&tensor_names::packed(layer), range, scratch)?;
                        format.region(Matrix::Gate)
                    }
                    None => {
                        let range = self.index.matrix(layer, expert, matrix);
                        scratch.resize(range.len as usize, 0);
                        self.read(range, scratch)?;
                        0..format.region(matrix).len()
                    }
                };
                format.unpack(matrix, &scratch[region], out);
            }
        }
        Ok(())
    }

    /// Reads an expert's matrix or record, which lies in `tensor`, and compares it with its checksum.
    fn read_expert(&self, tensor: &str, range: ByteRange, buf: &mut [u8]) -> Result<(), ConvertError> {
        let tensor = self.file.header.require_tensor(tensor)?;
        Ok(self.file.read_range(tensor, range.offset - tensor.offset, buf)?)
    }

    fn read(&self, range: ByteRange, buf: &mut [u8]) -> Result<(), ConvertError> {
        self.file.source.read_exact_at(buf, range.offset).map_err(|source| {
            let action = format!("read {} bytes at offset {}", range.len, range.offset);
            ConvertError::Gguf(GgufError::Io { file: self.path.display().to_string(), action, source })
        })
    }
}

/// The record format of the experts of a layer; for a file in the offload layout, proved to be the one it has.
fn expert_format(path: &Path, index: &ExpertIndex, layer: usize) -> Result<ExpertFormat, ConvertError> {
    let types = index.types(layer);
    let cannot = |ty: GgmlType, why: String| {
        ConvertError::Options(format!("the experts of {}, of type {ty}, cannot be packed: {why}", path.display()))
    };
    let [gate, up, down] = types.map(|ty| {
        let only = |UnsupportedType(_)| cannot(ty, format!("only {} can", WeightType::names()));
        WeightType::try_from(ty).map_err(only)
    });
    let format = ExpertFormat::with_types([gate?, up?, down?], index.n_embd() as usize, index.n_ff() as usize)
        .map_err(|error| cannot(types[0], error.to_string()))?;
    if let (Layout::Offload, Some(record)) = (index.layout(), index.record(layer, 0)) {
        let check = |key: &str, got: u64, expected: usize| {
            if got == expected as u64 {
                return Ok(());
            }
            let (got, expected) = (got.to_string(), expected.to_string());
            Err(ConvertError::Config { path: path.into(), key: key.into(), got, expected })
        };
        check(layout_keys::RECORD_BYTES, record.len, format.record_bytes())?;
        for (key, matrix) in layout_keys::OFFSETS.into_iter().zip(Matrix::ALL) {
            let start = index.matrix(layer, 0, matrix).offset - record.offset;
            check(key, start, format.region(matrix).start)?;
        }
    }
    Ok(format)
}

#[cfg(test)]
mod tests;
