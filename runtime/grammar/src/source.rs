//! What an answer is asked to fit, and what of it is not tried: sources too large or too deep to compile within bounds.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use crate::error::GrammarError;
use crate::one_of::as_any_of;

/// Values of a schema, those of one object (each may come after each), levels, and bytes of texts, at most.
const VALUES: usize = 8000;
const FIELDS: usize = 1000;
const DEPTH: usize = 64;
const BYTES: usize = 256 << 10;

/// The largest number of times that a schema may ask for, of characters or items: each takes a state of its own.
const TIMES: u64 = 4096;

/// What an answer is to fit.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A JSON schema: JSON without space between its parts.
    Schema(Value),
    /// Any JSON object.
    JsonObject,
    /// A grammar in llguidance's form of lark.
    Lark(String),
}

impl Source {
    /// It as JSON, for [`Source::from_json`]: an object with one field.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Schema(schema) => json!({"schema": schema}),
            Self::JsonObject => json!({"schema": {"type": "object"}}),
            Self::Lark(text) => json!({"lark": text}),
        }
    }

    /// A source that [`Source::to_json`] wrote.
    ///
    /// # Errors
    /// [`GrammarError::Source`] for anything else.
    pub fn from_json(json: &Value) -> Result<Self, GrammarError> {
        match json.as_object().filter(|fields| fields.len() == 1).and_then(|fields| fields.iter().next()) {
            Some((name, schema)) if name == "schema" => Ok(Self::Schema(schema.clone())),
            Some((name, Value::String(text))) if name == "lark" => Ok(Self::Lark(text.clone())),
            _ => Err(GrammarError::Source("it is neither a schema nor a grammar".to_owned())),
        }
    }

    /// The source as llguidance takes it.
    ///
    /// # Errors
    /// Where it is too large or too deep.
    pub(crate) fn top_level(&self) -> Result<TopLevelGrammar, GrammarError> {
        match self {
            Self::Schema(schema) => Ok(TopLevelGrammar::from_json_schema(compact(schema)?)),
            Self::JsonObject => Ok(TopLevelGrammar::from_json_schema(compact(&json!({"type": "object"}))?)),
            Self::Lark(text) if text.len() > BYTES => Err(too_much("text", BYTES)),
            Self::Lark(text) if text.trim().is_empty() => Err(GrammarError::Source("it is empty".to_owned())),
            Self::Lark(text) => {
                check_nesting(text)?;
                Ok(TopLevelGrammar::from_lark(text.clone()))
            }
        }
    }
}

/// A schema as a part of a [`Source::Lark`]: what stands there is `%json` and this text. Its JSON is spaced as Python's `json.dumps` does
/// it and chat templates do, so that a call that is rendered again is the text that was made.
///
/// # Errors
/// Where it is no schema, too large or too deep.
pub fn embedded(schema: &Value) -> Result<String, GrammarError> {
    const SPACED: [(&str, &str); 2] = [("item_separator", ", "), ("key_separator", ": ")];
    let mut schema = compact(schema)?;
    for (name, separator) in SPACED {
        schema["x-guidance"][name] = separator.into();
    }
    Ok(schema.to_string())
}

/// A schema that makes JSON without a choice of blanks: a model that chooses badly would never end.
fn compact(schema: &Value) -> Result<Value, GrammarError> {
    let (mut values, mut bytes) = (0, 0);
    check(schema, 1, &mut values, &mut bytes)?;
    let mut schema = match schema {
        Value::Object(_) => as_any_of(schema),
        Value::Bool(true) => json!({}),
        _ => return Err(GrammarError::Source("a schema is an object".to_owned())),
    };
    schema["x-guidance"] = json!({"whitespace_flexible": false});
    Ok(schema)
}

fn check(value: &Value, depth: usize, values: &mut usize, bytes: &mut usize) -> Result<(), GrammarError> {
    *values += 1;
    if depth > DEPTH {
        return Err(GrammarError::Source(format!("it is nested more than {DEPTH} levels deep")));
    }
    match value {
        Value::String(text) => *bytes += text.len(),
        Value::Array(items) => {
            items.iter().try_for_each(|item| check(item, depth + 1, values, bytes))?;
        }
        Value::Object(fields) => {
            if fields.len() > FIELDS {
                return Err(too_much("fields in one object", FIELDS));
            }
            for (key, value) in fields {
                *bytes += key.len();
                let counts = ["maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"];
                if counts.contains(&key.as_str()) && value.as_f64().is_some_and(|times| times > TIMES as f64) {
                    return Err(GrammarError::Source(format!("{key} is above {TIMES}")));
                }
                check(value, depth + 1, values, bytes)?;
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    match () {
        () if *values > VALUES => Err(too_much("values", VALUES)),
        () if *bytes > BYTES => Err(too_much("text", BYTES)),
        () => Ok(()),
    }
}

/// Refuses a grammar whose brackets are deeper than a parser that calls itself can follow.
fn check_nesting(text: &str) -> Result<(), GrammarError> {
    let mut depth = 0usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > 4 * DEPTH {
            return Err(GrammarError::Source(format!("it is nested more than {} levels deep", 4 * DEPTH)));
        }
    }
    Ok(())
}

fn too_much(what: &str, most: usize) -> GrammarError {
    let unit = if what == "text" { "bytes of text" } else { what };
    GrammarError::Source(format!("it has more than {most} {unit}"))
}
