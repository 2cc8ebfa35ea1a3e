//! The fields of a request, each looked at once; what is wrong with one is said by its name.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// The fields of an object that were not looked at yet. `null` is as if a field were not there.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// What stands before the names, as `stream_options.`.
    prefix: String,
}

impl Fields {
    /// The fields of `value`, which is called `name` in messages; nothing for the whole body.
    ///
    /// # Errors
    /// Where it is no object.
    pub(crate) fn of(value: Value, name: &str) -> Result<Self, ApiError> {
        match (value, name) {
            (Value::Object(map), "") => Ok(Self { map, prefix: String::new() }),
            (Value::Object(map), name) => Ok(Self { map, prefix: format!("{name}.") }),
            (_, "") => Err(ApiError::bad("the body is not a JSON object")),
            (_, name) => Err(ApiError::field(name, "an object is expected")),
        }
    }

    /// The full name of a field.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn wrong(&self, name: &str, expected: impl std::fmt::Display) -> ApiError {
        ApiError::field(self.name(name), format!("{expected} is expected"))
    }

    /// A field as it is.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// A field as it is, left where it is.
    pub(crate) fn look(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// A field that must be there.
    pub(crate) fn need(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name).ok_or_else(|| ApiError::field(self.name(name), "it is missing"))
    }

    /// A number.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| range.contains(number));
        let expected = || self.wrong(name, format_args!("a number from {} to {}", range.start(), range.end()));
        number.map(|number| Some(number as f32)).ok_or_else(expected)
    }

    /// A whole number.
    pub(crate) fn whole(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // Some clients write 5.0.
        let from_float = || value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15).map(|f| f as i64);
        let number = value.as_i64().or_else(from_float).filter(|number| range.contains(number));
        let expected = || match *range.end() {
            i64::MAX => self.wrong(name, format_args!("a whole number from {}", range.start())),
            end => self.wrong(name, format_args!("a whole number from {} to {end}", range.start())),
        };
        number.map(Some).ok_or_else(expected)
    }

    /// True or false; false where it is absent.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(self.wrong(name, "true or false")),
        }
    }

    /// A text.
    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(name, "a text")),
        }
    }

    /// A list.
    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(self.wrong(name, "a list")),
        }
    }

    /// An object within.
    pub(crate) fn within(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        let full = self.name(name);
        self.take(name).map(|value| Self::of(value, &full)).transpose()
    }

    /// Refuses a field of which nothing is made, unless it says what is the case anyway.
    pub(crate) fn refuse(&mut self, name: &str, changes_nothing: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !changes_nothing(&value) => Err(ApiError::unsupported(self.name(name))),
            _ => Ok(()),
        }
    }
}

/// Whether a value asks for nothing: `false`, 0, an empty text, list or object.
pub(crate) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Whether a value is that number.
pub(crate) fn is_number(expected: f64) -> impl Fn(&Value) -> bool {
    move |value| value.as_f64() == Some(expected)
}
