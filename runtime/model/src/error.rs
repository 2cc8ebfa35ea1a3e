//! What can go wrong between a GGUF file and an answer.

use st_gguf::GgufError;

/// An error of loading or running a model. Every variant names what was met and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The caller asked to stop.
    #[error("interrupted")]
    Cancelled,
    /// The file itself is broken or cannot be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A row that is read when it is wanted, and cannot be.
    #[error("a row of tensor `{tensor}` cannot be read at offset {offset}")]
    Row {
        /// GGUF name.
        tensor: &'static str,
        /// Where it is in the file.
        offset: u64,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// A metadata value that makes no model.
    #[error("metadata key `{key}`: got {got}, expected {expected}")]
    BadKey {
        /// Full key.
        key: String,
        /// The value found.
        got: String,
        /// What would have been right.
        expected: String,
    },
    /// A tensor that the configuration asks for is not in the file.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// GGUF name.
        name: String,
    },
    /// A tensor in a type that this program has no kernel for.
    #[error("tensor `{name}` has type {got}, expected one of {expected}")]
    TensorType {
        /// GGUF name.
        name: String,
        /// Type name in the file.
        got: String,
        /// The types that would do.
        expected: String,
    },
    /// A file that holds no predictor of this model's LM head.
    #[error("{path} is no predictor: {problem}")]
    Predictor {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A sparse head was asked for, and there is nothing to tell which rows matter.
    #[error("{file} holds no predictor of its LM head")]
    NoPredictor {
        /// The model.
        file: String,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {n_vocab}")]
    TokenId {
        /// The id given.
        id: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// No token to start from.
    #[error("the prompt is empty: there is no token to continue from")]
    EmptyPrompt,
    /// More tokens than the context holds.
    #[error("the prompt needs {needed} tokens, the context holds {ctx}")]
    ContextFull {
        /// Tokens that would be in the context.
        needed: usize,
        /// Context length in tokens.
        ctx: usize,
    },
    /// A context longer than the model was made for, or of no tokens.
    #[error("a context of {got} tokens is not possible: the model allows 1 to {max}")]
    Context {
        /// The length asked for.
        got: usize,
        /// The model's own limit.
        max: usize,
    },
    /// A memory budget below what the model needs at the least.
    #[error(
        "{budget} bytes of memory are not enough: this model needs at least {minimum} bytes with a context of {ctx}"
    )]
    Budget {
        /// The budget given, in bytes.
        budget: u64,
        /// The smallest budget that works, in bytes.
        minimum: u64,
        /// The context length that the minimum is for.
        ctx: usize,
    },
    /// A budget on a system that does not tell what the process takes.
    #[error("a memory budget cannot be kept here: the system does not tell how much memory this process uses")]
    BudgetUnknown,
    /// A budget that the container does not have.
    #[error("a budget of {budget} bytes is more than the {limit} bytes that this container may use")]
    BudgetBeyondContainer {
        /// What was asked for, in bytes.
        budget: u64,
        /// The container's limit, in bytes.
        limit: u64,
    },
    /// A weight that is no number.
    #[error("tensor `{name}` holds {got}: the file is damaged")]
    NotFinite {
        /// GGUF name.
        name: String,
        /// The value.
        got: f32,
    },
    /// A row that is not whole blocks of its type.
    #[error("tensor `{name}`: rows of {n_in} are not whole blocks of {ty}")]
    Blocks {
        /// GGUF name.
        name: String,
        /// Type name.
        ty: &'static str,
        /// Values per row.
        n_in: usize,
    },
    /// Kernels that this CPU cannot run.
    #[error("this CPU cannot run the `{name}` kernels")]
    Isa {
        /// The instruction set.
        name: &'static str,
    },
    /// Threads could not be started.
    #[error("cannot start {threads} compute threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// The file's tokenizer is broken.
    #[error(transparent)]
    Tokenizer(crate::vocabulary::TokenizerError),
    /// No token can be chosen.
    #[error(transparent)]
    Sampler(#[from] crate::sampler::SamplerError),
    /// A text for a model whose file has no tokenizer.
    #[error("the file has no tokenizer, so it takes no text")]
    NoTokenizer,
    /// A chat with a model whose file has no format for one.
    #[error("the file has no chat template")]
    NoChatTemplate,
    /// The file's chat template cannot be used, or refuses the messages.
    #[error(transparent)]
    Chat(#[from] std::sync::Arc<crate::chat::ChatError>),
    /// Whoever watched could not take what was shown.
    #[error("the {what} could not be recorded")]
    Observer {
        /// What was shown.
        what: &'static str,
        /// What the observer said.
        #[source]
        cause: std::io::Error,
    },
    /// A batch with more rows than the buffers are made for.
    #[error("a batch of {got} rows, the most is {most}")]
    BatchRows {
        /// Rows of the batch.
        got: usize,
        /// Rows that one pass takes.
        most: usize,
    },
    /// A batch that wants more logits than one pass gives.
    #[error("the logits of {got} rows, the most is {most}")]
    LogitRows {
        /// Rows whose logits are wanted.
        got: usize,
        /// Rows whose logits one pass gives.
        most: usize,
    },
    /// A row of a sequence that is not there.
    #[error("a row of sequence {index}, there are {n}")]
    NoSequence {
        /// The index given.
        index: usize,
        /// Sequences given.
        n: usize,
    },
    /// No more memory for keys and values: texts hold all of it.
    #[error("the memory for keys and values is used up: texts hold all {pages} pages")]
    KvFull {
        /// Pages that there are.
        pages: usize,
    },
    /// A model that should draft for one with other tokens.
    #[error("the model that drafts has other tokens than the model that it drafts for")]
    Vocabulary,
    /// Something that another engine has made.
    #[error("the {what} belongs to another engine")]
    Foreign {
        /// What it is.
        what: &'static str,
    },
    /// Reading experts failed.
    #[error(transparent)]
    Experts(#[from] st_experts::StoreError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl From<crate::vocabulary::TokenizerError> for ModelError {
    fn from(error: crate::vocabulary::TokenizerError) -> Self {
        match error {
            crate::vocabulary::TokenizerError::Cancelled => Self::Cancelled,
            error => Self::Tokenizer(error),
        }
    }
}
