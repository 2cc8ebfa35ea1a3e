//! A cursor over the header that trusts nothing: before it reads or allocates it compares with what is
//! left of the file and with the caps. It knows values; what they mean is for `header`.

use std::str::Utf8Error;

use crate::encode::value_type;
use crate::error::{GgufError, Result};
use crate::limits;
use crate::source::ReadAt;
use crate::{Array, OctetArray, StringArray, Value};

/// Bytes fetched from the source at a time. Longer strings are read around the window.
const WINDOW: usize = 128 << 10;

/// What is being read, for messages; formatted only when one is needed.
#[derive(Clone, Debug)]
pub(crate) enum Context {
    Start,
    Key(u64),
    Value(String),
    TensorName(u64),
    Tensor(String),
}

impl std::fmt::Display for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Start => f.write_str("the start of the header"),
            Self::Key(i) => write!(f, "metadata key number {i}"),
            Self::Value(key) => write!(f, "the value of metadata key `{key}`"),
            Self::TensorName(i) => write!(f, "the name of tensor number {i}"),
            Self::Tensor(name) => write!(f, "the description of tensor `{name}`"),
        }
    }
}

pub(crate) struct Cursor<'a> {
    source: &'a dyn ReadAt,
    file: &'a str,
    pub(crate) context: Context,
    /// Bytes `window_start..window_start + window.len()` of the file.
    window: Vec<u8>,
    window_start: u64,
    pos: u64,
}

macro_rules! scalars {
    ($($name:ident: $ty:ty;)*) => {$(
        pub(crate) fn $name(&mut self) -> Result<$ty> {
            Ok(<$ty>::from_le_bytes(self.fixed()?))
        }
    )*};
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(source: &'a dyn ReadAt, file: &'a str) -> Self {
        Self { source, file, context: Context::Start, window: Vec::new(), window_start: 0, pos: 0 }
    }

    pub(crate) fn pos(&self) -> u64 {
        self.pos
    }

    scalars! {
        u8: u8;
        i8: i8;
        u16: u16;
        i16: i16;
        u32: u32;
        i32: i32;
        f32: f32;
        u64: u64;
        i64: i64;
        f64: f64;
    }

    /// Fails unless `count` things of at least `min_bytes` each can still follow.
    pub(crate) fn expect(&self, count: u64, min_bytes: u64) -> Result<()> {
        let left = self.source.len().saturating_sub(self.pos);
        let needed = count.saturating_mul(min_bytes);
        if needed > left {
            return Err(GgufError::Truncated {
                file: self.file.to_owned(),
                what: self.context.to_string(),
                offset: self.pos,
                needed,
                left,
            });
        }
        let end = self.pos + needed;
        self.limit("the size of the header up to", end, limits::MAX_HEADER_BYTES)
    }

    pub(crate) fn limit(&self, what: &str, got: u64, limit: u64) -> Result<()> {
        if got <= limit {
            return Ok(());
        }
        let (file, what) = (self.file.to_owned(), format!("{what} {}", self.context));
        Err(GgufError::Limit { file, what, got, limit })
    }

    pub(crate) fn malformed(&self, problem: impl Into<String>) -> GgufError {
        GgufError::malformed(self.file, self.context.to_string(), problem)
    }

    /// A string of at most `max` bytes.
    pub(crate) fn string(&mut self, max: u64) -> Result<String> {
        let bytes = self.octets(max)?;
        String::from_utf8(bytes).map_err(|_| self.malformed("is not UTF-8 text"))
    }

    /// The bytes of a string of at most `max` bytes, whatever its encoding.
    fn octets(&mut self, max: u64) -> Result<Vec<u8>> {
        let len = self.u64()?;
        self.limit("the length of", len, max)?;
        self.expect(len, 1)?;
        let len = len as usize;
        if len <= WINDOW {
            return self.take(len).map(<[u8]>::to_vec);
        }
        let mut bytes = vec![0; len];
        self.source.read_exact_at(&mut bytes, self.pos).map_err(|source| self.io(source))?;
        self.pos += len as u64;
        Ok(bytes)
    }

    pub(crate) fn value(&mut self) -> Result<Value> {
        Ok(match self.u32()? {
            value_type::U8 => Value::U8(self.u8()?),
            value_type::I8 => Value::I8(self.i8()?),
            value_type::U16 => Value::U16(self.u16()?),
            value_type::I16 => Value::I16(self.i16()?),
            value_type::U32 => Value::U32(self.u32()?),
            value_type::I32 => Value::I32(self.i32()?),
            value_type::F32 => Value::F32(self.f32()?),
            value_type::BOOL => Value::Bool(self.bool()?),
            value_type::STRING => match String::from_utf8(self.octets(limits::MAX_STRING_BYTES)?) {
                Ok(text) => Value::String(text),
                Err(error) => Value::Octets(error.into_bytes()),
            },
            value_type::ARRAY => Value::Array(self.array(1)?),
            value_type::U64 => Value::U64(self.u64()?),
            value_type::I64 => Value::I64(self.i64()?),
            value_type::F64 => Value::F64(self.f64()?),
            id => return Err(self.malformed(format!("has the unknown value type {id}"))),
        })
    }

    fn array(&mut self, depth: u32) -> Result<Array> {
        self.limit("the nesting of", depth.into(), limits::MAX_ARRAY_DEPTH.into())?;
        let ty = self.u32()?;
        let len = self.u64()?;
        self.limit("the array length of", len, limits::MAX_ARRAY_LEN)?;
        Ok(match ty {
            value_type::U8 => Array::U8(self.scalars(len, u8::from_le_bytes)?),
            value_type::I8 => Array::I8(self.scalars(len, i8::from_le_bytes)?),
            value_type::U16 => Array::U16(self.scalars(len, u16::from_le_bytes)?),
            value_type::I16 => Array::I16(self.scalars(len, i16::from_le_bytes)?),
            value_type::U32 => Array::U32(self.scalars(len, u32::from_le_bytes)?),
            value_type::I32 => Array::I32(self.scalars(len, i32::from_le_bytes)?),
            value_type::F32 => Array::F32(self.scalars(len, f32::from_le_bytes)?),
            value_type::U64 => Array::U64(self.scalars(len, u64::from_le_bytes)?),
            value_type::I64 => Array::I64(self.scalars(len, i64::from_le_bytes)?),
            value_type::F64 => Array::F64(self.scalars(len, f64::from_le_bytes)?),
            value_type::BOOL => {
                self.expect(len, 1)?;
                let mut bools = Vec::with_capacity(len as usize);
                for _ in 0..len {
                    bools.push(self.bool()?);
                }
                Array::Bool(bools)
            }
            value_type::STRING => self.strings(len)?,
            value_type::ARRAY => {
                self.limit("the number of arrays in", len, limits::MAX_NESTED_LEN)?;
                // An inner array has at least its type and its length.
                self.expect(len, 12)?;
                let mut arrays = Vec::with_capacity(len as usize);
                for _ in 0..len {
                    arrays.push(self.array(depth + 1)?);
                }
                Array::Array(arrays)
            }
            id => return Err(self.malformed(format!("has the unknown array type {id}"))),
        })
    }

    fn bool(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.malformed(format!("is {other}, where a truth value is 0 or 1"))),
        }
    }

    fn scalars<const N: usize, T>(&mut self, len: u64, decode: fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.expect(len, N as u64)?;
        let mut left = len as usize;
        let mut out = Vec::with_capacity(left);
        while left > 0 {
            let n = left.min(WINDOW / N);
            let (chunks, _) = self.take(n * N)?.as_chunks::<N>();
            out.extend(chunks.iter().map(|&bytes| decode(bytes)));
            left -= n;
        }
        Ok(out)
    }

    fn strings(&mut self, len: u64) -> Result<Array> {
        // A string has at least its length.
        self.expect(len, 8)?;
        let mut strings = StringArray::with_capacity(len as usize);
        for i in 0..len {
            let read = self.string_in_array(|bytes| std::str::from_utf8(bytes).map(|text| strings.push(text)))?;
            match read {
                Ok(pushed) => self.all_fit(pushed)?,
                Err(bytes) => return self.octet_strings(strings.into(), bytes, len - i - 1),
            }
        }
        strings.shrink_to_fit();
        Ok(Array::String(strings))
    }

    /// The rest of an array of which `next` is the first string that is no text.
    fn octet_strings(&mut self, mut strings: OctetArray, next: Vec<u8>, left: u64) -> Result<Array> {
        self.all_fit(strings.push(&next))?;
        for _ in 0..left {
            let pushed = self.string_in_array(|bytes| Ok::<_, Utf8Error>(strings.push(bytes)))?;
            self.all_fit(pushed.unwrap_or(true))?;
        }
        Ok(Array::Octets(strings))
    }

    /// Hands the next string of an array to `put`, which may find that it is no text: then its bytes.
    fn string_in_array(
        &mut self,
        put: impl FnOnce(&[u8]) -> std::result::Result<bool, Utf8Error>,
    ) -> Result<std::result::Result<bool, Vec<u8>>> {
        let len = u64::from_le_bytes(self.fixed()?);
        self.limit("the length of a string in", len, limits::MAX_STRING_BYTES)?;
        self.expect(len, 1)?;
        if len as usize <= WINDOW {
            let bytes = self.take(len as usize)?;
            return Ok(put(bytes).map_err(|_| bytes.to_vec()));
        }
        self.pos -= 8;
        let bytes = self.octets(limits::MAX_STRING_BYTES)?;
        Ok(put(&bytes).map_err(|_| bytes))
    }

    fn all_fit(&self, pushed: bool) -> Result<()> {
        if pushed { Ok(()) } else { Err(self.malformed("holds more than 4 GiB of text")) }
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    /// The next `n` bytes, at most a window.
    fn take(&mut self, n: usize) -> Result<&[u8]> {
        debug_assert!(n <= WINDOW);
        let inside =
            self.pos.checked_sub(self.window_start).filter(|&start| start + n as u64 <= self.window.len() as u64);
        let start = match inside {
            Some(start) => start as usize,
            None => {
                self.expect(n as u64, 1)?;
                let left = self.source.len() - self.pos;
                self.window.resize(left.min(WINDOW as u64) as usize, 0);
                self.window_start = self.pos;
                if let Err(source) = self.source.read_exact_at(&mut self.window, self.pos) {
                    self.window.clear();
                    return Err(self.io(source));
                }
                0
            }
        };
        self.pos += n as u64;
        Ok(&self.window[start..start + n])
    }

    fn io(&self, source: std::io::Error) -> GgufError {
        GgufError::io(self.file, format!("read {}", self.context), source)
    }
}
