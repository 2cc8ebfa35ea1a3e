//! Answers that fit a JSON schema or a grammar.
//!
//! [`Grammars`] knows a model's tokens; it compiles a [`Source`] to a [`Grammar`], of which any number of answers get a
//! [`Constraint`](st_model::Constraint) each. All text that such an answer can have parses, and what a schema asks for and cannot be
//! enforced is an error before the first token. The language itself is llguidance's. Sources are untrusted: their size and depth, the
//! work of compiling them and the memory of their tables are bounded.
//!
//! ```
//! use st_grammar::{Grammars, Source};
//! use st_model::sampler::{Sampler, SamplerOptions};
//! use st_model::{Engine, GenerateOptions, LoadOptions, Session, generate_within};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open("../../models/tiny/tiny-q4_0.gguf", &LoadOptions::default())?;
//! let schema = serde_json::json!({"type": "object", "properties": {"cat": {"enum": ["Tom", "Kit"]}},
//!     "required": ["cat"], "additionalProperties": false});
//! let grammar = Grammars::new(&engine)?.compile(&Source::Schema(schema))?;
//!
//! let prompt = engine.tokenizer().ok_or("no tokenizer")?.encode("A cat: ", false)?;
//! let mut sampler = Sampler::new(SamplerOptions::greedy())?;
//! let (options, constraint) = (GenerateOptions::default(), Box::new(grammar.constraint()));
//! let mut session = Session::new(&engine)?;
//! let answer = generate_within(&mut session, &prompt, &mut sampler, &options, Some(constraint), &mut (), &mut |_| {
//!     std::ops::ControlFlow::Continue(())
//! })?;
//! assert!([r#"{"cat":"Tom"}"#, r#"{"cat":"Kit"}"#].contains(&answer.text.as_str()), "{}", answer.text);
//! # Ok(())
//! # }
//! ```

mod constraint;
mod error;
mod grammar;
mod one_of;
mod source;
mod vocabulary;

pub use constraint::Fit;
pub use error::GrammarError;
pub use grammar::{Grammar, Grammars};
pub use source::{Source, embedded};
