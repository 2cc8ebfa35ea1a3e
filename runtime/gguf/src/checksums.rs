//! Checksums (CRC-32C) of tensor data: which bytes have one, where a file states it, and comparing what is read with it.
//!
//! The unit is the *part*: a whole tensor, one expert's matrix of a stacked tensor, one expert's record of a packed one. The
//! sums of parts stand in the metadata, where programs that do not know them pass over them: those of records under the
//! layout's own key, all others under [`checksum_keys::CRC32C`] in the order of the file. Where the rest of the header
//! is not what the sums were made with, another program has rewritten the file and copied keys that it does not know: its
//! sums say nothing about it and are not used.

use std::collections::{BTreeMap, HashMap};
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

use crate::crc32c;
use crate::encode::{self, ALIGNMENT_KEY};
use crate::error::{GgufError, Result};
use crate::layout::{Layout, layout_keys, tensor_names};
use crate::{GgmlType, GgufFile, Header, Metadata, TensorInfo, TensorSpec};

/// Metadata keys of the checksums.
pub mod checksum_keys {
    /// Version of what is summed and in which order: [`VERSION_NUMBER`].
    pub const VERSION: &str = "st.checksums.version";
    /// CRC-32C of what else the header says: each key with its value as the file has them, but for sums, alignment and the keys of split
    /// files; then each tensor's name, a zero byte, its type and dimensions (32 and 64 bits, little-endian), and the number of
    /// dimensions in 32 bits.
    pub const HEADER: &str = "st.checksums.header";
    /// CRC-32C of every part that is no record, in the order of the file.
    pub const CRC32C: &str = "st.checksums.crc32c";
    /// All of them, in the order they are written.
    pub const ALL: [&str; 3] = [VERSION, HEADER, CRC32C];
    /// The version this crate knows.
    pub const VERSION_NUMBER: u32 = 1;
}

/// How much is read at a time where nothing is wanted but the sum.
const READ_BYTES: usize = 4 << 20;

/// Where the sums of one tensor's parts are stated.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    records: bool,
    range: Range<usize>,
}

/// The places of all tensors, in their order. Only names and shapes decide, so that writer and readers agree.
fn places<'a>(tensors: impl Iterator<Item = (&'a str, &'a [u64])>) -> Vec<Place> {
    let mut next = 0usize;
    tensors
        .map(|(name, shape)| match tensor_names::experts_in(name) {
            Some((Layout::Offload, layer)) => {
                let n = count(shape, 1);
                let first = layer.saturating_mul(n);
                Place { records: true, range: first..first.saturating_add(n) }
            }
            experts => {
                let n = if experts.is_some() { count(shape, 2) } else { 1 };
                let first = next;
                next = first.saturating_add(n);
                Place { records: false, range: first..next }
            }
        })
        .collect()
}

/// What [`checksum_keys::HEADER`] states.
fn header_sum<'a>(metadata: &Metadata, tensors: impl Iterator<Item = (&'a str, GgmlType, &'a [u64])>) -> u32 {
    let ours = |key: &str| checksum_keys::ALL.contains(&key) || key == layout_keys::CRC32C;
    let free = |key: &str| key == ALIGNMENT_KEY || key.starts_with("split.");
    let keys = metadata.iter().filter(|(key, _)| !ours(key) && !free(key)).fold(0, |sum, (key, value)| {
        let mut bytes = Vec::new();
        // What cannot be written is refused by the writer; a reader never holds such a value.
        let _ = encode::put_value(&mut bytes, key, value);
        crc32c::crc32c_append(crc32c::crc32c_append(sum, key.as_bytes()), &bytes)
    });
    tensors.fold(keys, |sum, (name, ty, shape)| {
        let mut bytes = [name.as_bytes(), &[0], &ty.id().to_le_bytes()].concat();
        bytes.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
        bytes.extend((shape.len() as u32).to_le_bytes());
        crc32c::crc32c_append(sum, &bytes)
    })
}

fn count(shape: &[u64], dimension: usize) -> usize {
    shape.get(dimension).map_or(1, |&n| usize::try_from(n).unwrap_or(usize::MAX))
}

fn places_of(tensors: &[TensorSpec]) -> Vec<Place> {
    places(tensors.iter().map(|spec| (spec.name.as_str(), spec.shape.as_slice())))
}

/// Parts of a tensor with this name and shape that have a sum each.
pub fn checksum_parts(spec: &TensorSpec) -> u64 {
    places_of(std::slice::from_ref(spec)).iter().map(|place| place.range.len() as u64).sum()
}

/// Makes room in `metadata` for the sums of `tensors`; [`GgufWriter::state_checksums`](crate::GgufWriter::state_checksums) puts
/// them there once the data has passed. Sums that were there are forgotten.
pub fn reserve_checksums(metadata: &mut Metadata, tensors: &[TensorSpec]) {
    let places = places_of(tensors);
    let zeros = places.iter().flat_map(|place| place.range.clone().map(|_| 0)).collect::<Vec<u32>>();
    for key in checksum_keys::ALL {
        metadata.remove(key);
    }
    state(metadata, tensors, &zeros);
}

/// States `sums`, one for each part in the order of the file.
pub(crate) fn state(metadata: &mut Metadata, tensors: &[TensorSpec], mut sums: &[u32]) {
    let (mut parts, mut records) = (Vec::new(), Vec::new());
    for place in places_of(tensors) {
        let (these, later) = sums.split_at(place.range.len().min(sums.len()));
        let list = if place.records { &mut records } else { &mut parts };
        if list.len() < place.range.end {
            list.resize(place.range.end, 0);
        }
        list[place.range.start..place.range.start + these.len()].copy_from_slice(these);
        sums = later;
    }
    if !records.is_empty() {
        metadata.insert(layout_keys::CRC32C, records);
    }
    metadata.insert(checksum_keys::VERSION, checksum_keys::VERSION_NUMBER);
    let header = header_sum(metadata, tensors.iter().map(|spec| (spec.name.as_str(), spec.ty, spec.shape.as_slice())));
    metadata.insert(checksum_keys::HEADER, header);
    metadata.insert(checksum_keys::CRC32C, parts);
}

/// The sums that a file states.
#[derive(Clone, Debug, Default)]
pub struct Checksums {
    /// Per tensor, those of its parts.
    of: HashMap<String, Vec<u32>>,
    unfit: bool,
}

impl Checksums {
    /// Finds the sums in a header; none is no error.
    pub fn from_header(header: &Header) -> Self {
        let places = places(header.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())));
        let total = |records| places.iter().filter(|p| p.records == records).map(|p| p.range.end).max().unwrap_or(0);
        let list = |key: &str, records| match header.metadata.u32s(key) {
            Ok(Some(list)) if list.len() == total(records) => Some(list),
            _ => None,
        };
        let number = |key| header.metadata.u32(key).ok().flatten();
        let tensors = header.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.ty, tensor.shape.as_slice()));
        let fits = number(checksum_keys::VERSION) == Some(checksum_keys::VERSION_NUMBER)
            && number(checksum_keys::HEADER) == Some(header_sum(&header.metadata, tensors));
        let parts = list(checksum_keys::CRC32C, false).filter(|_| fits);
        let records = list(layout_keys::CRC32C, true);
        let mut of = HashMap::new();
        for (tensor, place) in header.tensors.iter().zip(&places) {
            let list = if place.records { &records } else { &parts };
            let n = place.range.len() as u64;
            if let Some(sums) = list.as_ref().and_then(|list| list.get(place.range.clone()))
                && n > 0
                && tensor.n_bytes.is_multiple_of(n)
            {
                of.insert(tensor.name.clone(), sums.to_vec());
            }
        }
        Self { of, unfit: parts.is_none() && header.metadata.get(checksum_keys::CRC32C).is_some() }
    }

    /// The sums of a tensor, one for each of its equal parts; empty where the file states none.
    pub fn of(&self, tensor: &str) -> &[u32] {
        self.of.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// Whether no part has one.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// Whether there is a list, but not of this file: another program has rewritten it.
    pub fn are_of_another_file(&self) -> bool {
        self.unfit
    }
}

/// Compares the data of one file, read in pieces of any size and order by any threads, with the file's sums. A part is
/// compared as soon as all of it was seen.
#[derive(Debug)]
pub(crate) struct Verifier {
    sums: Arc<Checksums>,
    seen: Mutex<Seen>,
}

/// What was seen of parts that are read in pieces.
#[derive(Debug, Default)]
struct Seen {
    /// By tensor and part: where each piece starts, its length and its sum.
    pieces: HashMap<(String, u64), BTreeMap<u64, (u64, u32)>>,
    /// What a sum becomes by as many more zero bytes, for lengths that were needed: combining without them takes
    /// as long as summing hundreds of KiB, and nearly all pieces of a model have one of a few lengths.
    shifts: HashMap<u64, Shift>,
}

/// A linear map of sums: the image of each bit.
#[derive(Debug)]
struct Shift([u32; 32]);

impl Shift {
    fn by(len: u64) -> Self {
        Self(std::array::from_fn(|bit| crc32c::crc32c_combine(1 << bit, 0, len as usize)))
    }

    fn of(&self, sum: u32) -> u32 {
        (0..32).filter(|bit| sum >> bit & 1 == 1).fold(0, |all, bit| all ^ self.0[bit])
    }
}

impl Verifier {
    pub(crate) fn new(sums: Arc<Checksums>) -> Self {
        Self { sums, seen: Mutex::default() }
    }

    /// Takes note of `bytes`, which lie in `tensor` from its byte `start` on.
    ///
    /// # Errors
    /// [`GgufError::Damaged`] where they complete a part whose sum is another.
    pub(crate) fn saw(&self, file: &str, tensor: &TensorInfo, mut start: u64, mut bytes: &[u8]) -> Result<()> {
        let sums = self.sums.of(&tensor.name);
        if sums.is_empty() || bytes.is_empty() {
            return Ok(());
        }
        let part_bytes = tensor.n_bytes / sums.len() as u64;
        while !bytes.is_empty() {
            let (part, at) = (start / part_bytes, start % part_bytes);
            let (now, later) = bytes.split_at((part_bytes - at).min(bytes.len() as u64) as usize);
            let sum = crc32c::crc32c(now);
            let whole = match now.len() as u64 == part_bytes {
                true => Some(sum),
                false => self.add(&tensor.name, part, part_bytes, at, (now.len() as u64, sum)),
            };
            if let Some(got) = whole {
                compare(file, tensor, sums, part as usize, got)?;
            }
            (start, bytes) = (start + now.len() as u64, later);
        }
        Ok(())
    }

    /// Adds a piece of a part; returns the part's sum where that was the last one.
    fn add(&self, tensor: &str, part: u64, part_bytes: u64, at: u64, piece: (u64, u32)) -> Option<u32> {
        let Seen { pieces: seen, shifts } = &mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (tensor.to_owned(), part);
        let pieces = seen.entry(key.clone()).or_default();
        pieces.insert(at, piece);
        // Who reads some of it again, cut otherwise, does not complete it: nothing is compared that was not seen.
        if pieces.values().map(|(len, _)| len).sum::<u64>() < part_bytes {
            return None;
        }
        let pieces = seen.remove(&key)?;
        let (mut end, mut sum) = (0, 0);
        for (at, (len, piece)) in pieces {
            if at != end {
                return None;
            }
            sum = shifts.entry(len).or_insert_with(|| Shift::by(len)).of(sum) ^ piece;
            end += len;
        }
        (end == part_bytes).then_some(sum)
    }
}

fn compare(file: &str, tensor: &TensorInfo, sums: &[u32], part: usize, got: u32) -> Result<()> {
    let expected = sums[part];
    if got == expected {
        return Ok(());
    }
    let expert = tensor_names::experts_in(&tensor.name).map(|_| part);
    let offset = tensor.offset + tensor.n_bytes / sums.len() as u64 * part as u64;
    Err(GgufError::Damaged { file: file.to_owned(), tensor: tensor.name.clone(), expert, offset, got, expected })
}

/// What came of comparing a whole file with its sums.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// Parts that were compared: dense tensors, experts' matrices or records.
    pub parts: u64,
    /// Bytes that were compared.
    pub bytes: u64,
    /// Tensors without a sum.
    pub without: usize,
    /// [`GgufError::Damaged`] for each part that is not what the file states.
    pub damaged: Vec<GgufError>,
}

impl GgufFile {
    /// The sums that the file states.
    pub fn checksums(&self) -> &Checksums {
        &self.verifier.sums
    }

    /// Bytes that [`check`](Self::check) reads.
    pub fn checked_bytes(&self) -> u64 {
        let tensors = self.header.tensors.iter().filter(|tensor| !self.checksums().of(&tensor.name).is_empty());
        tensors.map(|tensor| tensor.n_bytes).sum()
    }

    /// Reads every tensor that has sums and compares; `progress` hears of bytes as they are read and may stop it, which gives
    /// `None`.
    ///
    /// # Errors
    /// [`GgufError::Io`] where reading fails. Damage is no error: the report lists it.
    pub fn check(&self, progress: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Result<Option<CheckReport>> {
        let mut report = CheckReport::default();
        let mut buffer = vec![0; READ_BYTES];
        for tensor in &self.header.tensors {
            let sums = self.checksums().of(&tensor.name);
            report.without += usize::from(sums.is_empty());
            let part_bytes = tensor.n_bytes / sums.len().max(1) as u64;
            for part in 0..sums.len() {
                let (mut sum, mut at) = (0, 0);
                while at < part_bytes {
                    let len = (part_bytes - at).min(READ_BYTES as u64) as usize;
                    self.read_unchecked(tensor, part as u64 * part_bytes + at, &mut buffer[..len])?;
                    sum = crc32c::crc32c_append(sum, &buffer[..len]);
                    at += len as u64;
                    if progress(len as u64).is_break() {
                        return Ok(None);
                    }
                }
                report.parts += 1;
                report.bytes += part_bytes;
                report.damaged.extend(compare(self.header.file_name(), tensor, sums, part, sum).err());
            }
        }
        Ok(Some(report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_pieces_make_the_sum_of_the_whole() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i * i % 251) as u8).collect();
        for cut in [1, 7, 500, 999] {
            let (a, b) = bytes.split_at(cut);
            let whole = Shift::by(b.len() as u64).of(crc32c::crc32c(a)) ^ crc32c::crc32c(b);
            assert_eq!(whole, crc32c::crc32c(&bytes), "cut at {cut}");
        }
    }
}
