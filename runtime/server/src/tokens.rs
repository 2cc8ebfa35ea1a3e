//! The model's tokens as grammars need them.

use std::sync::{Arc, OnceLock};

use st_grammar::{Grammar, GrammarError, Grammars, Source};
use st_model::Engine;

use crate::error::ApiError;

/// Made when a request first asks for a grammar.
#[derive(Debug, Default)]
pub(crate) struct Tokens(OnceLock<Result<Grammars, GrammarError>>);

impl Tokens {
    /// The grammar of what an answer has to fit; `param` is the field that says so.
    ///
    /// # Errors
    /// Where it cannot be enforced.
    pub(crate) fn compile(&self, engine: &Arc<Engine>, source: &Source, param: &str) -> Result<Grammar, ApiError> {
        let grammars = self.0.get_or_init(|| Grammars::new(engine)).as_ref();
        let compiled = grammars.map_err(Clone::clone).and_then(|grammars| grammars.compile(source));
        compiled.map_err(|error| ApiError::field(param, error.to_string()))
    }
}
