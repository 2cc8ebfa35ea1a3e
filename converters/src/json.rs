//! The small files of a checkpoint: JSON as Python reads it, and text.
//!
//! Owns what is put up with (a byte-order mark, `NaN` and `Infinity`, a key that is there twice) and what a file may
//! cost: nothing is built of a value that nobody asked for, and what is asked for may be large only where it has to be.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use st_gguf::Placeholder;

use crate::error::ConvertError;

/// Most bytes that such a file may have: far above any tokenizer, far below what would hurt.
const MAX_BYTES: u64 = 256 << 20;
/// Most values that one setting may consist of: far above any list of layers, far below what would hurt.
const MAX_VALUES: usize = 1 << 16;

/// Reads a text file; `None` where there is none.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, ConvertError> {
    let fail = |source| ConvertError::Io { path: path.into(), source };
    let invalid = |message: String| ConvertError::Json { path: path.into(), message };
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    if !metadata.is_file() {
        return Err(invalid("not a regular file".into()));
    }
    if metadata.len() > MAX_BYTES {
        return Err(invalid(format!("{} bytes, expected at most {MAX_BYTES}", metadata.len())));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    std::fs::File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes)).map_err(fail)?;
    if let Some(what) = Placeholder::of(&bytes[..bytes.len().min(Placeholder::PREFIX_BYTES)]) {
        return Err(ConvertError::Placeholder { path: path.into(), what });
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(invalid("text in UTF-16, expected UTF-8".into()));
    }
    // Editors on Windows begin UTF-8 with a mark.
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| invalid(format!("byte {} is not UTF-8 text", error.utf8_error().valid_up_to())))
}

/// Reads the object in a JSON file into `members`; `false` where there is no file.
pub(crate) fn read_members<M>(path: &Path, members: &mut M) -> Result<bool, ConvertError>
where
    M: for<'de> Members<'de>,
{
    let Some(text) = read_text(path)? else { return Ok(false) };
    let text = without_constants(&text);
    let mut json = serde_json::Deserializer::from_str(&text);
    MembersOf(members).deserialize(&mut json).and_then(|()| json.end()).map(|()| true).map_err(|error| {
        let not = if error.is_data() { "" } else { "not valid JSON: " };
        ConvertError::Json { path: path.into(), message: format!("{not}{error}") }
    })
}

/// Reads those of `keys` that the object in a JSON file has; `None` where there is no file.
pub(crate) fn read_settings(path: &Path, keys: &[&str]) -> Result<Option<Value>, ConvertError> {
    let mut settings = Settings { keys, found: Map::new() };
    Ok(read_members(path, &mut settings)?.then_some(Value::Object(settings.found)))
}

/// What is read of an object, member by member. Of members with the same key the last one counts.
pub(crate) trait Members<'de> {
    /// Takes the value of `key` from `map`.
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error>;
}

/// The object that `members` is filled from.
pub(crate) struct MembersOf<'m, M>(pub(crate) &'m mut M);

impl<'de, M: Members<'de>> DeserializeSeed<'de> for MembersOf<'_, M> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, M: Members<'de>> Visitor<'de> for MembersOf<'_, M> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            self.0.member(&key, &mut map)?;
        }
        Ok(())
    }
}

/// The members with certain keys, each of bounded size.
pub(crate) struct Settings<'k> {
    /// The keys wanted.
    pub(crate) keys: &'k [&'k str],
    /// Those that were there.
    pub(crate) found: Map<String, Value>,
}

impl<'de> Members<'de> for Settings<'_> {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        if self.keys.contains(&key) {
            self.found.insert(key.to_owned(), bounded(key, map)?);
        } else {
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// Takes the value that comes next in `map`, which is `key`'s, if it is of bounded size.
pub(crate) fn bounded<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> Result<Value, A::Error> {
    let left = Cell::new(MAX_VALUES);
    map.next_value_seed(Bounded { key, left: &left })
}

/// A value that counts itself and those inside it.
struct Bounded<'b> {
    key: &'b str,
    /// How many values may still come.
    left: &'b Cell<usize>,
}

impl Bounded<'_> {
    /// The seed of a value inside this one.
    fn inner(&self) -> Bounded<'_> {
        Bounded { ..*self }
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.left.get().checked_sub(1);
        self.left
            .set(left.ok_or_else(|| D::Error::custom(format!("{} holds more than {MAX_VALUES} values", self.key)))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element_seed(self.inner())? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            object.insert(key, map.next_value_seed(self.inner())?);
        }
        Ok(object.into())
    }
}

/// Python writes and reads numbers that JSON does not have. As strings they are no valid value of any setting, and do
/// no harm where nobody asks for them.
fn without_constants(text: &str) -> Cow<'_, str> {
    const CONSTANTS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];
    if !CONSTANTS[..2].iter().any(|constant| text.contains(constant)) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(at) = rest.find(['"', 'N', 'I', '-']) {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let len = match CONSTANTS.iter().find(|constant| from.starts_with(**constant)) {
            Some(constant) => {
                out.extend(["\"", constant, "\""]);
                constant.len()
            }
            None => {
                let len = if from.starts_with('"') { string_len(from) } else { 1 };
                out.push_str(&from[..len]);
                len
            }
        };
        rest = &from[len..];
    }
    out.push_str(rest);
    out.into()
}

/// Bytes of the string that `text` begins with, quotes included.
fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings(bytes: &[u8]) -> Result<Value, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert!(read_settings(&path, &["k"]).unwrap().is_none());
        std::fs::write(&path, bytes).unwrap();
        read_settings(&path, &["k"]).map(Option::unwrap).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_what_python_reads() {
        assert_eq!(settings(br#"{"k": 1, "k": [-2, {"a": null}], "x": 3}"#), Ok(json!({"k": [-2, {"a": null}]})));
        assert_eq!(settings(b"\xef\xbb\xbf {\"k\": true}"), Ok(json!({"k": true})));
        let constants = br#"{"x": [NaN, Infinity, {"NaN": "a \"NaN\" -Infinity"}], "k": -Infinity}"#;
        assert_eq!(settings(constants), Ok(json!({"k": "-Infinity"})));
        assert_eq!(settings(br#"{"k": "NaN and \\", "x": NaN}"#), Ok(json!({"k": "NaN and \\"})));
    }

    #[test]
    fn names_what_is_no_json() {
        let message = |bytes: &[u8]| settings(bytes).unwrap_err();
        assert!(message(b"{").contains("not valid JSON"));
        assert!(message(b"[1]").contains("expected an object"));
        assert!(message(b"{\"k\": \"\xff\"}").contains("byte 7 is not UTF-8"));
        assert!(message(b"\xff\xfe{\0}\0").contains("UTF-16"));
        assert!(message(b"<!doctype html>").contains("web page"));
        assert!(message(b"version https://git-lfs.github.com/spec/v1\n").contains("Git LFS"));
        assert!(message(b"{\"k\": NaNN}").contains("not valid JSON"));
    }

    #[test]
    fn what_is_asked_for_has_a_bound() {
        let list = |key: &str| format!("{{\"{key}\": [{}0]}}", "0,".repeat(MAX_VALUES)).into_bytes();
        assert!(settings(&list("k")).unwrap_err().contains("k holds more than 65536 values"));
        assert_eq!(settings(&list("x")), Ok(json!({})));
    }
}
