//! Why a file holds no SmallThinker model that is computed as its makers meant it.

/// What is wrong with a file's metadata or with its list of tensors.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// A model of another architecture.
    #[error("expected a SmallThinker model, got `{got}`: this program runs `smallthinker` only")]
    Architecture {
        /// `general.architecture` as found.
        got: String,
    },
    /// A key that the model cannot do without.
    #[error("metadata key `{key}` is missing")]
    MissingKey {
        /// The whole key.
        key: String,
    },
    /// A value that makes no model.
    #[error("metadata key `{key}`: expected {expected}, got {got}")]
    BadKey {
        /// The whole key.
        key: String,
        /// What would have been right.
        expected: String,
        /// The value found.
        got: String,
    },
    /// A setting that asks for arithmetic that this program does not do: to ignore it would give wrong numbers.
    #[error("metadata key `{key}` is {got}, which is not computed: only {computed} is")]
    KeyNotComputed {
        /// The whole key.
        key: String,
        /// The value found.
        got: String,
        /// The value that is computed.
        computed: String,
    },
    /// A tensor that the shape asks for is not in the file.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor of another shape than the metadata say. Shapes are in ggml order, fastest dimension first.
    #[error("tensor `{name}`: expected shape {expected:?}, got {got:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// The shape by the metadata.
        expected: Vec<u64>,
        /// The shape in the file.
        got: Vec<u64>,
    },
    /// A tensor that has no place in the computation: to ignore it would give wrong numbers.
    #[error("tensor `{name}` has no place in the model: {why}")]
    TensorNotComputed {
        /// Its name.
        name: String,
        /// What the model has instead.
        why: String,
    },
}
