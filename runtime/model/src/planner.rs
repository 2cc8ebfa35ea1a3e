//! Memory plans of a model that is not loaded: what loading it would spend, for any number of settings.

use st_format::ModelShape;
use st_gguf::GgufFile;

use crate::error::ModelError;
use crate::options::LoadOptions;
use crate::plan::MemoryPlan;
use crate::progress::NoProgress;
use crate::sizes;
use crate::tokenizer::Tokenizer;
use crate::weights::TensorSource;

/// A file's header and tokenizer, as they are in memory when a model's plan is made, so that plans are those of a run.
#[derive(Debug)]
pub struct Planner {
    file: GgufFile,
    config: ModelShape,
    /// Counted as a part of the process.
    _tokenizer: Option<Tokenizer>,
}

impl Planner {
    /// Reads what plans are made of. No weights are read, but for the beginnings of an LM head and an embedding that could be the same.
    ///
    /// # Errors
    /// Where the file is no complete SmallThinker model.
    pub fn new(mut file: GgufFile) -> Result<Self, ModelError> {
        let config = file.header.model_shape()?;
        let tokenizer = Tokenizer::from_metadata_with(&file.header.metadata, &NoProgress)?;
        for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"] {
            file.header.metadata.remove(key);
        }
        Ok(Self { file, config, _tokenizer: tokenizer })
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelShape {
        &self.config
    }

    /// The file.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// The plan that loading with `options` would follow.
    ///
    /// # Errors
    /// As [`Engine::load`](crate::Engine::load).
    pub fn plan(&self, options: &LoadOptions) -> Result<MemoryPlan, ModelError> {
        let source = TensorSource::new(&self.file, &self.config, &NoProgress)?;
        sizes::plan(&source, &self.config, options)
    }
}
