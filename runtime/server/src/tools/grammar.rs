//! The grammar that an answer with tools fits.

use std::fmt::Write as _;

use serde_json::{Value, json};
use st_grammar::{GrammarError, Source, embedded};

use super::{CLOSE, Choice, Fit, OPEN};

/// What the answer has to fit; `None` where anything goes.
///
/// # Errors
/// Where a schema is too large or too deep.
pub(crate) fn source(fit: &Fit) -> Result<Option<Source>, GrammarError> {
    let tools = &fit.tools;
    if tools.tools.is_empty() {
        return Ok(fit.format.clone());
    }
    // Text in which no call begins, and text up to where one does.
    let text = format!("TEXT: /(?s:.+)/ & ~/(?s:.*){OPEN}(?s:.*)/\n");
    let lead = format!("lead[lazy]: /(?s:.*)/ \"{OPEN}\"\n");
    let free = match &fit.format {
        None => ("TEXT?".to_owned(), text),
        Some(Source::Schema(schema)) => format_rule(schema)?,
        Some(Source::JsonObject) => format_rule(&json!({"type": "object"}))?,
        Some(Source::Lark(_)) => return Err(GrammarError::Source("a grammar and tools at once".to_owned())),
    };
    let (start, rules) = match (&tools.choice, &fit.format) {
        (Choice::Never, _) => (free.0, free.1),
        (Choice::Auto, None) => (format!("{} | lead calls", free.0), free.1 + &lead),
        (Choice::Auto, Some(_)) => (format!("{} | \"{OPEN}\" calls", free.0), free.1),
        (Choice::Always | Choice::One(_), _) => (format!("\"{OPEN}\" calls"), String::new()),
    };
    let mut lark = format!("start: {start}\n{rules}");
    if tools.may_call() {
        lark += &calls(fit)?;
    }
    Ok(Some(Source::Lark(lark)))
}

fn format_rule(schema: &Value) -> Result<(String, String), GrammarError> {
    Ok(("format".to_owned(), format!("format: %json {}\n", embedded(schema)?)))
}

/// The rules of calls, the first of which has begun.
fn calls(fit: &Fit) -> Result<String, GrammarError> {
    let tools = &fit.tools;
    let allowed = tools.tools.iter().enumerate().filter(|(_, tool)| match &tools.choice {
        Choice::One(name) => tool.name == *name,
        _ => true,
    });
    let (mut names, mut rules) = (Vec::new(), String::new());
    for (index, tool) in allowed {
        names.push(format!("call{index}"));
        let begin = Value::from(format!("\n{{\"name\": \"{}\", \"arguments\": ", tool.name));
        let end = Value::from(format!("}}\n{CLOSE}"));
        let schema = object(&tool.parameters);
        let _ = writeln!(rules, "call{index}: {begin} args{index} {end}\nargs{index}: %json {}", embedded(&schema)?);
    }
    let several = tools.parallel && !matches!(tools.choice, Choice::One(_));
    let more = if several { format!(" (\"\\n{OPEN}\" call)*") } else { String::new() };
    Ok(format!("calls: call{more}\ncall: {}\n{rules}", names.join(" | ")))
}

/// Arguments are an object, whatever else their schema says.
fn object(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if schema.get("type").is_none() && schema.get("$ref").is_none() && schema.get("anyOf").is_none() {
        schema["type"] = "object".into();
    }
    schema
}
