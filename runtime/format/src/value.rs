//! Metadata values. Arrays are typed vectors, and an array of strings is one text and a list of ends, so
//! that a vocabulary of 150 000 tokens costs two allocations.

use std::fmt;

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is the type it names")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
    /// A string that is not UTF-8: what a program made of another encoding.
    Octets(Vec<u8>),
}

/// An array of values of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is an array of the type it names")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(StringArray),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
    /// Strings that are not all UTF-8.
    Octets(OctetArray),
}

impl Value {
    /// The value as an integer where it is one, of whatever width and sign.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(v) => v.into(),
            Self::I8(v) => v.into(),
            Self::U16(v) => v.into(),
            Self::I16(v) => v.into(),
            Self::U32(v) => v.into(),
            Self::I32(v) => v.into(),
            Self::U64(v) => v.into(),
            Self::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// The value as a 32-bit float where it is one, or a 64-bit one that loses nothing.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(v) => Some(v),
            Self::F64(v) if f64::from(v as f32) == v => Some(v as f32),
            _ => None,
        }
    }

    /// The value as a number where it is an integer or a float, rounded where it is a very large integer.
    pub fn as_number(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => self.as_integer().map(|v| v as f64),
        }
    }

    /// The string where it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self { Some(text) } else { None }
    }

    /// The type in words, such as `u32` or `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            Self::U8(_) => "u8".into(),
            Self::I8(_) => "i8".into(),
            Self::U16(_) => "u16".into(),
            Self::I16(_) => "i16".into(),
            Self::U32(_) => "u32".into(),
            Self::I32(_) => "i32".into(),
            Self::F32(_) => "f32".into(),
            Self::Bool(_) => "bool".into(),
            Self::String(_) => "string".into(),
            Self::Array(array) => format!("array of {}", array.element_type_name()),
            Self::U64(_) => "u64".into(),
            Self::I64(_) => "i64".into(),
            Self::F64(_) => "f64".into(),
            Self::Octets(_) => "string that is not UTF-8".into(),
        }
    }

    /// Whether it holds a string that is not UTF-8.
    pub fn has_octets(&self) -> bool {
        match self {
            Self::Octets(_) => true,
            Self::Array(array) => array.has_octets(),
            _ => false,
        }
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
            Self::Array(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::Octets(v) => v.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements in words.
    pub fn element_type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
            Self::Octets(_) => "string that is not all UTF-8",
        }
    }

    fn has_octets(&self) -> bool {
        match self {
            Self::Octets(_) => true,
            Self::Array(arrays) => arrays.iter().any(Self::has_octets),
            _ => false,
        }
    }

    /// Element `i` as an integer where the elements are integers and there is such an element.
    pub fn integer(&self, i: usize) -> Option<i128> {
        Some(match self {
            Self::U8(v) => (*v.get(i)?).into(),
            Self::I8(v) => (*v.get(i)?).into(),
            Self::U16(v) => (*v.get(i)?).into(),
            Self::I16(v) => (*v.get(i)?).into(),
            Self::U32(v) => (*v.get(i)?).into(),
            Self::I32(v) => (*v.get(i)?).into(),
            Self::U64(v) => (*v.get(i)?).into(),
            Self::I64(v) => (*v.get(i)?).into(),
            _ => return None,
        })
    }
}

/// Strings stored end to end in one buffer: at most 4 GiB of text.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StringArray {
    text: String,
    /// Where each string ends in `text`; it starts where its predecessor ends.
    ends: Vec<u32>,
}

impl StringArray {
    /// An empty array with room for `n` strings.
    pub fn with_capacity(n: usize) -> Self {
        Self { text: String::new(), ends: Vec::with_capacity(n) }
    }

    /// Appends `string`. Returns `false`, and leaves the array as it was, where the text would pass 4 GiB.
    #[must_use]
    pub fn push(&mut self, string: &str) -> bool {
        let Ok(end) = u32::try_from(self.text.len() as u64 + string.len() as u64) else {
            return false;
        };
        self.text.push_str(string);
        self.ends.push(end);
        true
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no string.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// String `i`, if there is one.
    pub fn get(&self, i: usize) -> Option<&str> {
        let end = *self.ends.get(i)? as usize;
        let start = i.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        Some(&self.text[start..end])
    }

    /// The strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> + Clone {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let string = &self.text[start..end as usize];
            start = end as usize;
            string
        })
    }

    /// Gives back memory that growing left over.
    pub fn shrink_to_fit(&mut self) {
        self.text.shrink_to_fit();
        self.ends.shrink_to_fit();
    }
}

impl fmt::Debug for StringArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<S: AsRef<str>> FromIterator<S> for StringArray {
    /// # Panics
    /// Where the strings are longer than 4 GiB together.
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let mut array = Self::default();
        for string in strings {
            assert!(array.push(string.as_ref()), "a string array holds at most 4 GiB of text");
        }
        array.shrink_to_fit();
        array
    }
}

/// Strings of any bytes, stored as those of a [`StringArray`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OctetArray {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl OctetArray {
    /// Appends `string`. Returns `false`, and leaves the array as it was, where the strings would pass 4 GiB.
    #[must_use]
    pub fn push(&mut self, string: &[u8]) -> bool {
        let Ok(end) = u32::try_from(self.bytes.len() as u64 + string.len() as u64) else {
            return false;
        };
        self.bytes.extend_from_slice(string);
        self.ends.push(end);
        true
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no string.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// String `i`, if there is one.
    pub fn get(&self, i: usize) -> Option<&[u8]> {
        let end = *self.ends.get(i)? as usize;
        let start = i.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        Some(&self.bytes[start..end])
    }

    /// The strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> + Clone {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let string = &self.bytes[start..end as usize];
            start = end as usize;
            string
        })
    }
}

impl From<StringArray> for OctetArray {
    fn from(strings: StringArray) -> Self {
        Self { bytes: strings.text.into_bytes(), ends: strings.ends }
    }
}

macro_rules! from {
    ($($source:ty => |$v:ident| $value:expr;)*) => {$(
        impl From<$source> for Value {
            fn from($v: $source) -> Self {
                $value
            }
        }
    )*};
}

from! {
    u8 => |v| Value::U8(v);
    i8 => |v| Value::I8(v);
    u16 => |v| Value::U16(v);
    i16 => |v| Value::I16(v);
    u32 => |v| Value::U32(v);
    i32 => |v| Value::I32(v);
    f32 => |v| Value::F32(v);
    bool => |v| Value::Bool(v);
    &str => |v| Value::String(v.to_owned());
    String => |v| Value::String(v);
    u64 => |v| Value::U64(v);
    i64 => |v| Value::I64(v);
    f64 => |v| Value::F64(v);
    Array => |v| Value::Array(v);
    StringArray => |v| Value::Array(Array::String(v));
    Vec<bool> => |v| Value::Array(Array::Bool(v));
    Vec<u32> => |v| Value::Array(Array::U32(v));
    Vec<i32> => |v| Value::Array(Array::I32(v));
    Vec<f32> => |v| Value::Array(Array::F32(v));
    Vec<u64> => |v| Value::Array(Array::U64(v));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_lie_end_to_end() {
        let array: StringArray = ["a", "", "ĠÄ", "tail"].into_iter().collect();
        assert_eq!(array.len(), 4);
        assert_eq!(array.get(1), Some(""));
        assert_eq!(array.get(2), Some("ĠÄ"));
        assert_eq!(array.get(4), None);
        assert_eq!(array.iter().collect::<Vec<_>>(), ["a", "", "ĠÄ", "tail"]);
        assert_eq!(array.iter().len(), 4);
    }

    #[test]
    fn integers_of_any_width() {
        assert_eq!(Value::U64(u64::MAX).as_integer(), Some(i128::from(u64::MAX)));
        assert_eq!(Value::I8(-1).as_integer(), Some(-1));
        assert_eq!(Value::F32(1.0).as_integer(), None);
        assert_eq!(Value::from(vec![true]).type_name(), "array of bool");
    }
}
