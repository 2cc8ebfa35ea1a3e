//! Everything that can go wrong between a checkpoint and a GGUF file, typed.
//!
//! Messages name the file and the tensor, and where two things disagree, what was found and what was expected.

use std::path::PathBuf;

use st_gguf::{GgufError, Placeholder};

/// Why a conversion was refused or gave up.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The operating system refused to read or map a file.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file stands for one that was never fetched.
    #[error("{} is {what}", path.display())]
    Placeholder {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: Placeholder,
    },
    /// An importance matrix that is none.
    #[error("{} is no importance matrix: {problem}", path.display())]
    Imatrix {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A JSON file is not what its name promises.
    #[error("{}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The model is of another architecture.
    #[error("{}: expected a SmallThinker model, got {got}", path.display())]
    Architecture {
        /// `config.json` or the GGUF file.
        path: PathBuf,
        /// What the file calls its architecture.
        got: String,
    },
    /// The weights are quantized already, by another program.
    #[error("{}: the checkpoint is quantized already ({method}), expected BF16, F16 or F32 weights", path.display())]
    Quantized {
        /// The configuration, or the file that holds such a tensor.
        path: PathBuf,
        /// How.
        method: String,
    },
    /// A value of the configuration makes no model.
    #[error("{}: {key}: got {got}, expected {expected}", path.display())]
    Config {
        /// `config.json` or the GGUF file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        got: String,
        /// What it has to be.
        expected: String,
    },
    /// Neither `model.safetensors` nor an index is in the folder.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// The folder holds weights, but none under a name that is read.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json, but {there}", path.display())]
    OtherWeights {
        /// The folder.
        path: PathBuf,
        /// The files that are there.
        there: String,
    },
    /// The folder holds some of its shards, and not the index that lists them.
    #[error("{} is not there, and the shards are not complete without it: there is only {there}", path.display())]
    NoIndex {
        /// Where the index should be.
        path: PathBuf,
        /// The shards that are there.
        there: String,
    },
    /// The index names a shard that is not there.
    #[error("missing shard {}, which {} lists", path.display(), index.display())]
    MissingShard {
        /// Where the shard should be.
        path: PathBuf,
        /// The index that names it.
        index: PathBuf,
    },
    /// A shard is no valid safetensors file (truncated, or its header lies).
    #[error("{} is not a complete safetensors file: {message}", path.display())]
    BadShard {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor that the configuration calls for is not there.
    #[error("{}: tensor {tensor} is missing", path.display())]
    MissingTensor {
        /// The checkpoint folder or the GGUF file.
        path: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
    },
    /// A tensor that the configuration calls for is not there, and one of a similar name is.
    #[error("{}: tensor {tensor} is missing; there is {there}", path.display())]
    OtherNames {
        /// The checkpoint folder.
        path: PathBuf,
        /// The name that was looked for.
        tensor: String,
        /// A name that is there.
        there: String,
    },
    /// A tensor that the configuration leaves no place for.
    #[error("{}: tensor {tensor} has no place in the model that the configuration describes ({why})", path.display())]
    UnexpectedTensor {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What the configuration says.
        why: String,
    },
    /// A tensor's shape contradicts the configuration.
    #[error("{}: tensor {tensor} has shape {got:?}, expected {expected:?} from the configuration", path.display())]
    Shape {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its shape, in the order of its file.
        got: Vec<u64>,
        /// The shape that the configuration calls for, in the same order.
        expected: Vec<u64>,
    },
    /// A tensor is stored as a type that is no source for a conversion.
    #[error("{}: tensor {tensor} has type {got}, expected {expected}", path.display())]
    SourceType {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The type found.
        got: String,
        /// The types that can be converted.
        expected: &'static str,
    },
    /// A tensor of a type that no program here computes with.
    #[error("{}: tensor {tensor} has type {got}, expected one of {expected}", path.display())]
    ComputedType {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The type found.
        got: String,
        /// The types that would do.
        expected: String,
    },
    /// Weights of few bits would be rounded a second time.
    #[error("{}: tensor {tensor} has type {got}, below 8 bits: quantizing it again as {to} loses more than quantizing the original", path.display())]
    Requantize {
        /// The input.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The type found.
        got: &'static str,
        /// The type asked for.
        to: &'static str,
    },
    /// A weight is NaN or infinite.
    #[error("tensor {tensor}: weight {index} is {value}, expected finite weights")]
    NonFinite {
        /// The tensor's name in its source.
        tensor: String,
        /// Position of the weight, counted through the tensor.
        index: u64,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
    },
    /// A weight is too large for the chosen type.
    #[error("tensor {tensor}: weight {index} is {value}, which {ty} cannot hold")]
    TooLarge {
        /// The tensor's name in its source.
        tensor: String,
        /// Position of the weight, counted through the tensor.
        index: u64,
        /// The weight.
        value: f32,
        /// The type asked for.
        ty: &'static str,
    },
    /// Rows of a matrix cannot be cut into blocks of the chosen type.
    #[error("tensor {tensor}: rows of {columns} weights cannot be stored as {ty}, which needs a multiple of {block}")]
    RowLength {
        /// The tensor's name in the output.
        tensor: String,
        /// Length of a row.
        columns: usize,
        /// The type asked for.
        ty: &'static str,
        /// Weights per block of that type.
        block: usize,
    },
    /// The tokenizer files cannot be expressed in GGUF.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The input's experts are already packed for offloading.
    #[error("{} is in the offload layout; bring it to the gguf layout first", path.display())]
    PackedInput {
        /// The input file.
        path: PathBuf,
    },
    /// The options contradict themselves or the model.
    #[error("{0}")]
    Options(String),
    /// Reading or writing a GGUF file failed.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The caller asked to stop.
    #[error("interrupted before the output was complete; nothing was left behind")]
    Cancelled,
}
