//! The key-value part of a header: ordered as in the file, so that what is read can be written again byte
//! for byte, and looked up by key.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{GgufError, Result};
use crate::{Array, StringArray, Value};

/// Metadata in file order. The typed getters tell an absent key (`Ok(None)`) from one of the wrong type
/// (an error that names the key, what was expected and what was found). Integers convert between widths
/// and signs where the value fits; nothing else converts.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(Arc<str>, Value)>,
    index: HashMap<Arc<str>, usize>,
    /// The file this was read from, for messages.
    file: Option<Arc<str>>,
}

impl PartialEq for Metadata {
    /// Equal keys with equal values in equal order; where they were read does not count.
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// No keys.
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn of_file(file: &str) -> Self {
        Self { file: Some(file.into()), ..Self::default() }
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Sets `key`: in its place where it exists, at the end otherwise. Returns the value it had.
    pub fn insert(&mut self, key: impl AsRef<str>, value: impl Into<Value>) -> Option<Value> {
        let (key, value) = (key.as_ref(), value.into());
        if let Some(&i) = self.index.get(key) {
            return Some(std::mem::replace(&mut self.entries[i].1, value));
        }
        let key: Arc<str> = key.into();
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        None
    }

    /// Removes `key`; the others keep their order. Returns the value it had.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let i = self.index.remove(key)?;
        let (_, value) = self.entries.remove(i);
        for position in self.index.values_mut().filter(|position| **position > i) {
            *position -= 1;
        }
        Some(value)
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (&**key, value))
    }

    /// An unsigned 32-bit integer.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type, or an integer that does not fit.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.integer(key, "an unsigned 32-bit integer")
    }

    /// An unsigned 64-bit integer.
    ///
    /// # Errors
    /// As [`u32`](Self::u32).
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.integer(key, "an unsigned 64-bit integer")
    }

    /// A 32-bit float; a 64-bit one that is exactly a 32-bit one counts.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f32().map(Some).ok_or_else(|| self.wrong_type(key, "f32", value))
    }

    /// A string.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "string", other)),
        }
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Bool(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "bool", other)),
        }
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type.
    pub fn strings(&self, key: &str) -> Result<Option<&StringArray>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::String(v))) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "array of string", other)),
        }
    }

    /// An array of truth values.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type.
    pub fn bools(&self, key: &str) -> Result<Option<&[bool]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Bool(v))) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "array of bool", other)),
        }
    }

    /// An array of 32-bit floats.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::F32(v))) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "array of f32", other)),
        }
    }

    /// An array of integers, each of which fits in 32 unsigned bits.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] for another type, or an element that does not fit.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.integers(key, "array of unsigned 32-bit integers")
    }

    /// An array of integers, each of which fits in 64 unsigned bits.
    ///
    /// # Errors
    /// As [`u32s`](Self::u32s).
    pub fn u64s(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.integers(key, "array of unsigned 64-bit integers")
    }

    /// An array of integers, each of which fits in 32 signed bits.
    ///
    /// # Errors
    /// As [`u32s`](Self::u32s).
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.integers(key, "array of signed 32-bit integers")
    }

    /// The error for a key that is needed and absent, to be used as
    /// `metadata.u32(key)?.ok_or_else(|| metadata.missing(key))`.
    pub fn missing(&self, key: &str) -> GgufError {
        GgufError::MissingKey { file: self.file_name(), key: key.to_owned() }
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str, expected: &str) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let integer = value.as_integer().ok_or_else(|| self.wrong_type(key, expected, value))?;
        T::try_from(integer).map(Some).map_err(|_| self.key_type(key, expected, integer.to_string()))
    }

    fn integers<T: TryFrom<i128>>(&self, key: &str, expected: &str) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Value::Array(array) = value else { return Err(self.wrong_type(key, expected, value)) };
        (0..array.len())
            .map(|i| {
                let element = array.integer(i).ok_or_else(|| self.wrong_type(key, expected, value))?;
                T::try_from(element).map_err(|_| self.key_type(key, expected, format!("element {i} = {element}")))
            })
            .collect::<Result<Vec<T>>>()
            .map(Some)
    }

    fn wrong_type(&self, key: &str, expected: &str, got: &Value) -> GgufError {
        self.key_type(key, expected, got.type_name())
    }

    fn key_type(&self, key: &str, expected: &str, got: String) -> GgufError {
        GgufError::KeyType { file: self.file_name(), key: key.to_owned(), expected: expected.to_owned(), got }
    }

    fn file_name(&self) -> String {
        self.file.as_deref().unwrap_or("GGUF metadata").to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Metadata {
        let mut metadata = Metadata::of_file("m.gguf");
        metadata.insert("a", 1u8);
        metadata.insert("b", "text");
        metadata.insert("c", vec![1i32, -2]);
        metadata.insert("d", i64::MAX);
        metadata
    }

    #[test]
    fn insert_replaces_in_place_and_remove_keeps_order() {
        let mut metadata = sample();
        assert_eq!(metadata.insert("b", true), Some(Value::String("text".into())));
        assert_eq!(metadata.remove("a"), Some(Value::U8(1)));
        assert_eq!(metadata.remove("a"), None);
        assert_eq!(metadata.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["b", "c", "d"]);
        assert_eq!(metadata.bool("b").unwrap(), Some(true));
        assert_eq!(metadata.u64("d").unwrap(), Some(i64::MAX as u64));
    }

    #[test]
    fn absent_is_none_and_wrong_is_an_error_that_names_everything() {
        let metadata = sample();
        assert_eq!(metadata.u32("a").unwrap(), Some(1));
        assert_eq!(metadata.u32("zzz").unwrap(), None);
        assert_eq!(
            metadata.u32("b").unwrap_err().to_string(),
            "m.gguf: metadata key `b`: expected an unsigned 32-bit integer, got string"
        );
        assert!(metadata.u32("d").unwrap_err().to_string().ends_with("got 9223372036854775807"));
        assert!(metadata.u32s("c").unwrap_err().to_string().ends_with("got element 1 = -2"));
        assert_eq!(metadata.i32s("c").unwrap(), Some(vec![1, -2]));
        assert!(metadata.i32s("b").is_err() && metadata.strings("b").is_err());
        assert!(metadata.f32("a").is_err() && metadata.bools("a").is_err());
        assert_eq!(metadata.missing("x.y").to_string(), "m.gguf: metadata key `x.y` is missing");
    }

    #[test]
    fn doubles_convert_only_where_nothing_is_lost() {
        let mut metadata = Metadata::new();
        metadata.insert("exact", 0.5f64);
        metadata.insert("inexact", 0.1f64);
        assert_eq!(metadata.f32("exact").unwrap(), Some(0.5));
        assert!(metadata.f32("inexact").is_err());
    }
}
