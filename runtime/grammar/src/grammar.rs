//! Sources to grammars: compiled once, within bounds of work and memory, on a thread with a stack of its own.

use std::sync::Arc;
use std::thread;

use llguidance::api::ParserLimits;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory};
use st_model::Engine;

use crate::constraint::Fit;
use crate::error::{GrammarError, first_lines, plain};
use crate::source::Source;
use crate::vocabulary::Vocabulary;

/// Stack of the threads that compile: sources are as deep as [`Source`] allows.
const STACK: usize = 16 << 20;

/// The most memory of one grammar's tables, about; states take up to 2 KiB each.
const GRAMMAR_BYTES: u64 = 8 << 20;

/// What a source may take: so much work and memory, and no more.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 1000,
        initial_lexer_fuel: 300_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 4_000,
        max_grammar_size: 50_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// What grammars of a model have in common: its tokens, as a tree.
pub struct Grammars(Arc<ParserFactory>);

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// The tokens of `engine`. Takes a quarter of a second for 150 000.
    ///
    /// # Errors
    /// [`GrammarError::NoTokens`], [`GrammarError::Tokens`].
    pub fn new(engine: &Arc<Engine>) -> Result<Self, GrammarError> {
        let tokens: TokEnv = Arc::new(Vocabulary::new(engine).ok_or(GrammarError::NoTokens)?);
        let capabilities = InferenceCapabilities { ff_tokens: true, ..InferenceCapabilities::default() };
        // Slices would make masks faster that nobody waits for, and take three times the memory.
        let factory = ParserFactory::new(&tokens, capabilities, &[]);
        let mut factory = factory.map_err(|error| GrammarError::Tokens(plain(&error)))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self(Arc::new(factory)))
    }

    /// Memory of the tokens' tree for a vocabulary of `n_vocab`, and of `answers` grammars at once, in bytes; at most, about.
    pub fn memory(n_vocab: usize, answers: usize) -> u64 {
        n_vocab as u64 * 208 + answers as u64 * GRAMMAR_BYTES
    }

    /// Compiles `source`.
    ///
    /// # Errors
    /// [`GrammarError::Source`] in words that name what is wrong with it.
    pub fn compile(&self, source: &Source) -> Result<Grammar, GrammarError> {
        let grammar = source.top_level()?;
        let factory = Arc::clone(&self.0);
        let compile = move || {
            let mut matcher = Matcher::new(factory.create_parser(grammar));
            match matcher.get_error() {
                Some(error) => Err(GrammarError::Source(first_lines(&error))),
                // A mask shows whether there is any text at all.
                None => match matcher.compute_mask() {
                    Err(error) => Err(GrammarError::Source(plain(&error))),
                    Ok(_) => Ok(matcher),
                },
            }
        };
        let thread = thread::Builder::new().name("st-grammar".to_owned()).stack_size(STACK).spawn(compile);
        let compiled = thread.map_err(|error| GrammarError::Thread(error.kind()))?.join();
        let matcher = compiled.unwrap_or_else(|_| Err(GrammarError::Source("it cannot be compiled".to_owned())))?;
        Ok(Grammar { matcher, end_id: self.0.tok_env().tok_trie().eos_token() })
    }
}

/// A compiled source, for any number of answers.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
    end_id: u32,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// What one answer must fit. Where there is no thread to work it out on, it says so when it is first asked.
    pub fn constraint(&self) -> Fit {
        Fit::new(self.matcher.deep_clone().into_cancellable(), self.end_id)
    }
}
