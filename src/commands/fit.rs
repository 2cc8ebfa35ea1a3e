//! What an answer is made to fit: a JSON schema or a grammar, from a file or the command line.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use st_grammar::{Grammar, Grammars, Source};
use st_model::{Constraint, Engine};

use crate::cli::RunArgs;
use crate::context::Context;
use crate::input;
use crate::report::Advice;

/// Bytes of a schema or a grammar that are read, at most; [`Source`] has its own limits.
const MOST: u64 = 4 << 20;
const MORE: &str = "more than a schema or a grammar takes";

/// What the arguments ask for.
pub(crate) fn source(args: &RunArgs, context: &Context) -> anyhow::Result<Option<Source>> {
    if let Some(path) = &args.grammar {
        return Ok(Some(Source::Lark(input::text(path, MOST, MORE, &context.interrupt)?)));
    }
    let Some(given) = &args.schema else { return Ok(None) };
    let written = given.to_str().filter(|text| text.trim_start().starts_with('{'));
    let (text, name) = match written {
        Some(text) => (text.to_owned(), "--schema".to_owned()),
        None => (input::text(Path::new(given), MOST, MORE, &context.interrupt)?, input::name(Path::new(given))),
    };
    let schema = serde_json::from_str(&text).with_context(|| format!("{name} is not JSON"))?;
    Ok(Some(Source::Schema(schema)))
}

/// The grammar for a model's tokens.
pub(crate) fn compile(engine: &Arc<Engine>, source: &Source) -> anyhow::Result<Grammar> {
    let what = match source {
        Source::Schema(_) | Source::JsonObject => "schema",
        Source::Lark(_) => "grammar",
    };
    let grammars = Grammars::new(engine)?;
    grammars.compile(source).map_err(|error| {
        Advice::new(format!("the {what} cannot be used: {error}"), "leave out what is named, or say it otherwise")
            .into()
    })
}

/// What one answer has to fit.
pub(crate) fn constraint(grammar: Option<&Grammar>) -> Option<Box<dyn Constraint>> {
    grammar.map(|grammar| Box::new(grammar.constraint()) as Box<dyn Constraint>)
}
