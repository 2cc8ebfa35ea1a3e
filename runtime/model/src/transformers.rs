//! What Hugging Face `transformers` adds to Jinja for chat templates.
//!
//! Owns `tojson`, `raise_exception`, `strftime_now` and `{% generation %}`, as `transformers` has them.

use std::time::SystemTime;

use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, Error, ErrorKind, Value};

use crate::python;

/// What `transformers` adds to Jinja.
pub(crate) fn extend(environment: &mut Environment<'static>, marker: char) {
    environment.add_filter("tojson", move |value: Value, positional: Rest<Value>, kwargs: Kwargs| {
        to_json(&value, &positional, &kwargs, marker)
    });
    environment.add_function("raise_exception", move |message: String| {
        let message = message.replace(marker, "");
        Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, REFUSED).with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", |format: String| python::strftime(&format, SystemTime::now()));
}

const REFUSED: &str = "raise_exception";

/// Carries the message of `raise_exception` through the template engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

/// What a template that refuses its messages says.
pub(crate) fn refusal(error: &Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref::<Refusal>() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

/// The most that one part of a JSON text is indented or set apart by.
const SPACING: usize = 64;

/// `json.dumps` with the defaults that `transformers` gives it.
fn to_json(value: &Value, positional: &[Value], kwargs: &Kwargs, marker: char) -> Result<Value, Error> {
    let ensure_ascii = match (positional.first(), kwargs.get::<Option<bool>>("ensure_ascii")?) {
        (Some(first), _) => first.is_true(),
        (None, keyword) => keyword.unwrap_or(false),
    };
    let options = python::JsonOptions {
        ensure_ascii,
        indent: kwargs.get::<Option<usize>>("indent")?,
        separators: kwargs.get::<Option<Vec<String>>>("separators")?,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        kept: marker,
    };
    kwargs.assert_all_used()?;
    let separators: usize = options.separators.iter().flatten().map(String::len).sum();
    if separators > SPACING || options.indent > Some(SPACING) {
        return Err(Error::new(ErrorKind::InvalidOperation, "it sets JSON farther apart than any chat needs"));
    }
    let json = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "cannot write this value as JSON").with_source(error)
    })?;
    // Marked safe so that no later escaping touches it.
    Ok(Value::from_safe_string(python::json_dumps(&json, &options)))
}

/// Rewrites `{% generation %}` … `{% endgeneration %}` (which only marks a span for training) as a block that is
/// always rendered, whitespace control kept.
pub(crate) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open + 2);
        out.push_str(before);
        rest = tag;
        let Some(close) = tag.find("%}") else { break };
        let inner = &tag[..close];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inner.replacen(word, replacement, 1));
        rest = &tag[close..];
    }
    out.push_str(rest);
    out
}
