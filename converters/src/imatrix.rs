//! Importance matrices: how much each column of a weight matrix matters, as the mean of the squares of what it is multiplied with.
//!
//! Two forms are read: llama.cpp's GGUF form, which `st-tool profile` writes too (`NAME.in_sum2` and `NAME.counts` for each tensor NAME), and
//! the older one that llama.cpp wrote before. Numbers that are none are refused; of an expert that was never chosen nothing is known, and
//! all its columns count alike.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;

use st_gguf::{FileSource, GgufFile, ReadAt as _, begins_with, crc32c};

use crate::error::ConvertError;

/// How tensors' names end.
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// Numbers of a file, entries, and bytes of a name, at most.
const NUMBERS: usize = 1 << 28;
const ENTRIES: usize = 1 << 16;
const NAME: usize = 1024;
/// A column counts so much of the mean one, at least: what a text does not show may still be wanted.
const LEAST: f32 = 1e-4;

/// How much columns matter.
#[derive(Clone, PartialEq)]
pub struct Imatrix {
    /// By tensor, all columns of its matrices; those of one have a mean of 1.
    entries: HashMap<String, Entry>,
    /// CRC-32C of the file's numbers.
    sum: u32,
}

#[derive(Clone, PartialEq)]
struct Entry {
    columns: usize,
    values: Vec<f32>,
}

impl fmt::Debug for Imatrix {
    /// What tells it from others, on a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Imatrix({} tensors, {:08x})", self.entries.len(), self.sum)
    }
}

impl Imatrix {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// Where it cannot be read, has neither form, or holds what is no importance.
    pub fn open(path: &Path) -> Result<Arc<Self>, ConvertError> {
        let fail = |problem: &str| ConvertError::Imatrix { path: path.into(), problem: problem.to_owned() };
        let source = FileSource::open(path)?;
        let is_gguf = begins_with(&mut source.file(), b"GGUF")
            .map_err(|source| ConvertError::Io { path: path.into(), source })?;
        let raw = match is_gguf {
            true => Self::of_gguf(&GgufFile::open(path)?)?.ok_or_else(|| fail("it holds no sums of squares"))?,
            false => {
                let mut bytes = vec![
                    0;
                    usize::try_from(source.len())
                        .ok()
                        .filter(|&len| len < 4 * NUMBERS)
                        .ok_or_else(|| fail("it is too large"))?
                ];
                source.read_exact_at(&mut bytes, 0).map_err(|source| ConvertError::Io { path: path.into(), source })?;
                of_older_form(&bytes).map_err(|_| fail("it has neither form of an importance matrix"))?
            }
        };
        let mut all = Self { entries: HashMap::new(), sum: 0 };
        let mut names: Vec<_> = raw.into_iter().collect();
        names.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (name, mut entry) in names {
            if entry.values.iter().any(|value| !value.is_finite() || *value < 0.0) {
                return Err(fail(&format!("{name} has an importance that is no number from 0")));
            }
            for matrix in entry.values.chunks_mut(entry.columns.max(1)) {
                normalize(matrix);
            }
            for value in &entry.values {
                all.sum = crc32c::crc32c_append(all.sum, &value.to_le_bytes());
            }
            all.entries.insert(name, entry);
        }
        Ok(Arc::new(all))
    }

    fn of_gguf(file: &GgufFile) -> Result<Option<HashMap<String, Entry>>, ConvertError> {
        let mut entries = HashMap::new();
        let mut left = NUMBERS;
        for tensor in &file.header.tensors {
            let Some(name) = tensor.name.strip_suffix(SUMS) else { continue };
            let Some(counts) = file.header.tensor(&format!("{name}{COUNTS}")) else { return Ok(None) };
            let columns = tensor.shape.first().copied().unwrap_or(0) as usize;
            left = left.saturating_sub(tensor.n_elements() as usize);
            let matrices = tensor.shape.get(1).copied().unwrap_or(1);
            let is_f32 = |ty| ty == st_gguf::GgmlType::F32;
            if left == 0 || columns == 0 || counts.n_elements() != matrices || !is_f32(tensor.ty) || !is_f32(counts.ty)
            {
                return Ok(None);
            }
            let floats =
                |bytes: Vec<u8>| bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect::<Vec<f32>>();
            let (mut values, counts) = (floats(file.read_tensor(tensor)?), floats(file.read_tensor(counts)?));
            for (matrix, count) in values.chunks_mut(columns).zip(counts) {
                matrix.iter_mut().for_each(|value| *value = if count > 0.0 { *value / count } else { 0.0 });
            }
            entries.insert(name.to_owned(), Entry { columns, values });
        }
        Ok(Some(entries).filter(|entries| !entries.is_empty()))
    }

    /// The importance of the columns of a matrix: of `tensor`, or of one expert's matrix in it; `None` where the file says nothing of it.
    ///
    /// # Errors
    /// Where it says something of a matrix of another size.
    pub(crate) fn of(
        &self,
        tensor: &str,
        columns: usize,
        (expert, experts): (usize, usize),
    ) -> Result<Option<&[f32]>, ConvertError> {
        let Some(entry) = self.entries.get(tensor) else { return Ok(None) };
        if entry.values.len() != columns * experts {
            let (got, wanted) = (entry.values.len(), columns * experts);
            return Err(ConvertError::Options(format!(
                "the importance matrix is of another model: it has {got} columns for {tensor}, which has {wanted}"
            )));
        }
        Ok(Some(&entry.values[expert * columns..(expert + 1) * columns]))
    }

    /// Names of the tensors that it says something of.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

/// Brings the mean to 1; where nothing is known all count alike.
fn normalize(matrix: &mut [f32]) {
    let mean = matrix.iter().map(|&value| f64::from(value)).sum::<f64>() / matrix.len().max(1) as f64;
    let scaled = |value: f32| if mean > 0.0 { ((f64::from(value) / mean) as f32).max(LEAST) } else { 1.0 };
    matrix.iter_mut().for_each(|value| *value = scaled(*value));
}

/// The form of before: the number of entries, then for each the length of its name, the name, how many calls it is the sum of, the number
/// of its values, and those.
fn of_older_form(bytes: &[u8]) -> io::Result<HashMap<String, Entry>> {
    let mut rest = bytes;
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    let number = |rest: &mut &[u8], most: usize| -> io::Result<usize> {
        let mut four = [0; 4];
        rest.read_exact(&mut four)?;
        usize::try_from(i32::from_le_bytes(four)).ok().filter(|&n| n <= most).ok_or_else(wrong)
    };
    let mut entries = HashMap::new();
    let n = number(&mut rest, ENTRIES)?;
    for _ in 0..n {
        let len = number(&mut rest, NAME)?;
        let mut name = vec![0; len];
        rest.read_exact(&mut name)?;
        let calls = number(&mut rest, i32::MAX as usize)?.max(1) as f32;
        let n_values = number(&mut rest, NUMBERS)?;
        let (values, after) = rest.split_at_checked(4 * n_values).ok_or_else(wrong)?;
        rest = after;
        let values = values.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four) / calls).collect();
        entries.insert(String::from_utf8(name).map_err(|_| wrong())?, Entry { columns: n_values, values });
    }
    if entries.is_empty() { Err(wrong()) } else { Ok(entries) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn older(entries: &[(&str, i32, &[f32])]) -> Vec<u8> {
        let mut bytes = (entries.len() as i32).to_le_bytes().to_vec();
        for (name, calls, values) in entries {
            bytes.extend((name.len() as i32).to_le_bytes());
            bytes.extend(name.as_bytes());
            bytes.extend(calls.to_le_bytes());
            bytes.extend((values.len() as i32).to_le_bytes());
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        // llama.cpp adds the number of chunks and the name of the text.
        bytes.extend(7i32.to_le_bytes());
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Arc<Imatrix>, ConvertError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.dat");
        std::fs::write(&path, bytes).unwrap();
        Imatrix::open(&path)
    }

    #[test]
    fn the_older_form_is_read() {
        let all = open(&older(&[("a.weight", 4, &[1.0, 3.0]), ("b.weight", 1, &[0.0; 4])])).unwrap();
        assert_eq!(all.of("a.weight", 2, (0, 1)).unwrap(), Some(&[0.5, 1.5][..]));
        // Two experts of which nothing is known.
        assert_eq!(all.of("b.weight", 2, (1, 2)).unwrap(), Some(&[1.0, 1.0][..]));
        assert_eq!(all.of("c.weight", 2, (0, 1)).unwrap(), None);
        assert!(all.of("a.weight", 3, (0, 1)).unwrap_err().to_string().contains("another model"));
    }

    #[test]
    fn what_is_no_importance_is_refused() {
        for values in [f32::NAN, f32::INFINITY, -1.0] {
            let error = open(&older(&[("a", 1, &[1.0, values])])).unwrap_err().to_string();
            assert!(error.contains("a has an importance that is no number"), "{error}");
        }
        let whole = older(&[("a", 1, &[1.0, 2.0])]);
        for cut in [0, 3, 8, 12, whole.len() - 5] {
            assert!(open(&whole[..cut]).is_err(), "{cut}");
        }
        assert!(open(b"GGUF").is_err());
        assert!(open(&[0xff; 64]).is_err());
    }
}
