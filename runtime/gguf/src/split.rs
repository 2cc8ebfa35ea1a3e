//! A file that is split into parts, `NAME-00001-of-0000N.gguf` and so on, read as one.
//!
//! Each part is a GGUF file with tensors of its own; the first has the metadata. The parts lie one after the other, each
//! at a multiple of [`PART_ALIGNMENT`], in a range of offsets that no file has, so that whoever reads sees one source.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::{GgufError, Result};
use crate::source::Part;
use crate::{FileSource, Header, Metadata, ReadAt};

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
/// Most parts; the names have five digits.
const MAX_PARTS: u64 = 99_999;
/// Parts start at multiples of this: a tensor that starts on a page goes on doing so.
const PART_ALIGNMENT: u64 = 4096;

/// The parts of a split file as one source.
#[derive(Debug)]
struct SplitSource {
    /// Where each part starts, and the part.
    parts: Vec<(u64, FileSource)>,
    len: u64,
}

impl ReadAt for SplitSource {
    /// What lies between two parts reads as zeros.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.fill(0);
        for (start, part) in &self.parts {
            let (from, to) = (offset.max(*start), end.min(start + part.len()));
            if from < to {
                part.read_exact_at(&mut buf[(from - offset) as usize..(to - offset) as usize], from - start)?;
            }
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn parts(&self) -> Vec<Part<'_>> {
        self.parts.iter().filter_map(|(start, file)| Some(Part { path: file.path()?, start: *start })).collect()
    }
}

/// The number of parts that `metadata` speaks of, and which of them this is, from 1; `None` for a file that is whole.
pub(crate) fn part_of(metadata: &Metadata) -> Result<Option<(u64, u64)>> {
    let count = metadata.u64(COUNT)?.unwrap_or(1);
    Ok((count > 1).then_some((metadata.u64(NUMBER)?.unwrap_or(0).saturating_add(1), count)))
}

/// All parts of the split file of which `path`, with this header, is one; `None` where it is whole.
///
/// # Errors
/// [`GgufError::SplitPart`] where the others are not beside it; [`GgufError::Malformed`] where they do not belong together.
pub(crate) fn join(path: &Path, header: &Header) -> Result<Option<(Header, Box<dyn ReadAt>)>> {
    let Some((number, count)) = part_of(&header.metadata)? else { return Ok(None) };
    let missing = |missing: Option<PathBuf>| GgufError::SplitPart {
        file: path.display().to_string(),
        number,
        count,
        missing: missing.map(|path| path.display().to_string()),
    };
    let names = (count <= MAX_PARTS).then(|| names(path, number, count)).flatten().ok_or_else(|| missing(None))?;
    let (mut parts, mut headers, mut len) = (Vec::new(), Vec::new(), 0u64);
    for name in names {
        if !name.is_file() {
            return Err(missing(Some(name)));
        }
        let file = FileSource::open(&name)?;
        let part = Header::parse(&file)?;
        let expected = (parts.len() as u64 + 1, count);
        if part_of(&part.metadata)? != Some(expected) {
            let problem = format!("is not part {} of {count}, as its name says", expected.0);
            return Err(GgufError::malformed(name.display(), "the file", problem));
        }
        let start = len.next_multiple_of(PART_ALIGNMENT);
        len = start + file.len();
        headers.push((start, part));
        parts.push((start, file));
    }
    let mut joined = Header::joined(headers, len)?;
    if let Some(stated) = joined.metadata.u64(TENSORS)?
        && stated != joined.tensors.len() as u64
    {
        let problem = format!("its parts hold {} tensors, {TENSORS} says {stated}", joined.tensors.len());
        return Err(GgufError::malformed(path.display(), "the split file", problem));
    }
    // What is read as one is no part any more.
    for key in [COUNT, NUMBER, TENSORS] {
        joined.metadata.remove(key);
    }
    Ok(Some((joined, Box::new(SplitSource { parts, len }))))
}

/// The paths of all parts, by the name of one.
fn names(path: &Path, number: u64, count: u64) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-{number:05}-of-{count:05}.gguf"))?;
    Some((1..=count).map(|i| path.with_file_name(format!("{stem}-{i:05}-of-{count:05}.gguf"))).collect())
}
