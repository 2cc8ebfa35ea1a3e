//! Tools: what the model may call, how it is told of them, the grammar that its calls fit, and calls found in its text.
//!
//! Every API brings its own form of all this and makes [`Tools`] of it. A call's text is one and the same everywhere
//! (`<tool_call>` … `</tool_call>`, Qwen's form), so that it is read again as it was made.

mod grammar;
mod prompt;
mod split;

use serde_json::{Value, json};
use st_grammar::Source;

use crate::error::ApiError;
use crate::fields::Fields;

pub(crate) use grammar::source;
pub(crate) use prompt::{spaced, told, with_calls_as_text};
pub(crate) use split::{Call, Part, Split, collect};

/// Where a call begins and ends.
pub(crate) const OPEN: &str = "<tool_call>";
pub(crate) const CLOSE: &str = "</tool_call>";

/// Tools of a request, and bytes of a name, at most.
const MOST: usize = 128;
const NAME_BYTES: usize = 128;

/// One function.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    pub(crate) name: String,
    description: Option<Value>,
    /// The schema of its arguments, an object's.
    parameters: Value,
}

impl Tool {
    /// A function from the fields that describe it; `schema` is what its parameters are called.
    ///
    /// # Errors
    /// What is wrong with it, by name.
    pub(crate) fn take(fields: &mut Fields, schema: &str) -> Result<Self, ApiError> {
        let wrong = |fields: &Fields| {
            let expected = format!("1 to {NAME_BYTES} letters, digits, `_`, `-`, `.` or `:` are expected");
            ApiError::field(fields.name("name"), expected)
        };
        let name = fields.text("name")?.ok_or_else(|| wrong(fields))?;
        let is_fine = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
        if name.is_empty() || name.len() > NAME_BYTES || !name.chars().all(is_fine) {
            return Err(wrong(fields));
        }
        let description = fields.text("description")?.map(Value::from);
        let parameters = match fields.take(schema) {
            None => json!({"type": "object", "properties": {}, "additionalProperties": false}),
            Some(Value::Object(schema)) => Value::Object(schema),
            Some(_) => return Err(ApiError::field(fields.name(schema), "a JSON schema is expected")),
        };
        Ok(Self { name, description, parameters })
    }

    /// The tool as templates expect it.
    pub(crate) fn json(&self) -> Value {
        let mut function = json!({"name": self.name});
        if let Some(description) = &self.description {
            function["description"] = description.clone();
        }
        function["parameters"] = self.parameters.clone();
        json!({"type": "function", "function": function})
    }
}

/// Whether calls are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// None.
    Never,
    /// As the model likes.
    Auto,
    /// One at least.
    Always,
    /// This one.
    One(String),
}

/// What may be called.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) tools: Vec<Tool>,
    choice: Choice,
    /// Whether there may be several calls in one answer.
    pub(crate) parallel: bool,
}

impl Tools {
    /// Tools, as an API has read them.
    ///
    /// # Errors
    /// Where the choice is of a tool that is not there, or there are too many.
    pub(crate) fn new(tools: Vec<Tool>, choice: Choice, parallel: bool) -> Result<Self, ApiError> {
        if tools.len() > MOST {
            return Err(ApiError::field("tools", format!("at most {MOST} are expected")));
        }
        if let Some(twice) = (1..tools.len()).find(|&i| tools[..i].iter().any(|tool| tool.name == tools[i].name)) {
            return Err(ApiError::field(format!("tools[{twice}]"), "its name is another's, too"));
        }
        match &choice {
            Choice::One(name) if !tools.iter().any(|tool| tool.name == *name) => {
                Err(ApiError::field("tool_choice", format!("there is no tool {name:?}")))
            }
            Choice::Always if tools.is_empty() => Err(ApiError::field("tool_choice", "it needs `tools`")),
            _ => Ok(Self { tools, choice, parallel }),
        }
    }

    /// Whether the answer may hold calls.
    pub(crate) fn may_call(&self) -> bool {
        !self.tools.is_empty() && self.choice != Choice::Never
    }

    /// The tools as templates expect them.
    pub(crate) fn json(&self) -> Vec<Value> {
        self.tools.iter().map(Tool::json).collect()
    }
}

/// What an answer has to fit: its tools' calls, and the format of what is not a call.
#[derive(Clone, Debug)]
pub(crate) struct Fit {
    pub(crate) tools: Tools,
    pub(crate) format: Option<Source>,
}
