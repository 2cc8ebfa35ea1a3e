//! Converting a checkpoint whose shards arrive one after the other, each gone again before the next one comes.
//!
//! Owns the folder of such a conversion: in place of a shard that is not there lies a file of its size that holds its header
//! and nothing else, so that shapes and places are known from the start; of one that was converted, what later shards need
//! is kept. A journal says which shards are in the output. Whoever fetches them proves them before they are taken.
//! The bytes of the output are those of [`convert`](crate::convert()).

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use st_format::ModelShape;
use st_gguf::{PlacedWriter, WriteOptions, checksum_parts, crc32c};
use st_kernels::SquaredErrors;

use crate::convert::{ConvertPlan, Converted, Gains, Job, SearchGain};
use crate::error::ConvertError;
use crate::input::Input;
use crate::options::ConvertOptions;
use crate::progress::{Cancel, Progress};
use crate::tensor_map::Tensor;

/// The longest header of a safetensors file, as its own library limits it.
pub const MAX_SHARD_HEADER: u64 = 100_000_000;
const JOURNAL: &str = "journal.json";
/// Bytes that a file may take beyond what is kept of it.
const SLACK: u64 = 1 << 20;

/// What is done, on the disk.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    /// What is converted to what: another conversion begins anew.
    of: String,
    /// Whether the LM head was found to be the embedding.
    head_is_embedding: bool,
    /// For each shard that is in the output, the units that came with it.
    shards: BTreeMap<String, Vec<DoneUnit>>,
}

/// A unit of work that is in the output.
#[derive(Debug, Serialize, Deserialize)]
struct DoneUnit {
    unit: usize,
    sum: u32,
    /// Where scales were searched for, of each matrix: its kind, its weights, and the bits of both errors.
    gains: Vec<(String, u64, u64, u64)>,
}

/// A conversion under way.
#[derive(Debug)]
pub struct Arriving {
    folder: PathBuf,
    options: ConvertOptions,
    journal: Journal,
    plan: ConvertPlan,
    metadata: st_gguf::Metadata,
    writer: PlacedWriter,
    /// Names of the shards in order.
    shards: Vec<String>,
    /// For each unit, its tensor, its first byte there, its bytes, and the shards it is made of.
    units: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    tensor: usize,
    start: u64,
    bytes: u64,
    sources: Vec<(usize, Range<usize>)>,
}

/// Where a matrix lies: the name of its shard, and its bytes there.
pub type InShard = (String, Range<u64>);

/// Makes `folder` ready for the conversion of `what` with `options`; `what` names everything that decides the bytes beside them, a tensor
/// that is added among it. What another conversion left there is removed; what the
/// same one left stays: then whether it found the LM head to be the embedding. Call it before anything is put there.
///
/// # Errors
/// [`ConvertError::Io`]; [`ConvertError::Options`] for a folder that no conversion made.
pub fn begin(folder: &Path, what: &str, options: &ConvertOptions) -> Result<Option<bool>, ConvertError> {
    let fail = |source| ConvertError::Io { path: folder.into(), source };
    let of = identity(what, options);
    match read_journal(folder)? {
        Some(journal) if journal.of == of => {
            return Ok((!journal.shards.is_empty()).then_some(journal.head_is_embedding));
        }
        Some(_) => fs::remove_dir_all(folder).map_err(fail)?,
        None if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) => {
            let message = format!("{} is in the way of this conversion: remove it", folder.display());
            return Err(ConvertError::Options(message));
        }
        None => {}
    }
    fs::create_dir_all(folder).map_err(fail)?;
    Journal { of, ..Journal::default() }.write(folder)?;
    Ok(None)
}

/// Where shards are put when they are whole and proven, for [`Arriving::take`].
pub fn fetched(folder: &Path) -> PathBuf {
    folder.join("fetched")
}

/// Whether a shard called `name` has its place in `folder` already.
pub fn is_placed(folder: &Path, name: &str) -> bool {
    folder.join(name).exists()
}

/// Puts the header of a shard in its place: its first bytes, of `size` that the shard has.
///
/// # Errors
/// [`ConvertError::Io`].
pub fn place_header(folder: &Path, name: &str, header: &[u8], size: u64) -> Result<(), ConvertError> {
    keep(&folder.join(name), size, |file| file.write_all(header))
}

/// The shape of the model whose checkpoint arrives in `folder`: what describes it is there, and the headers of its shards.
///
/// # Errors
/// Everything that is wrong with the checkpoint.
pub fn shape(folder: &Path) -> Result<ModelShape, ConvertError> {
    Ok(Input::open_unread(folder, false)?.shape().clone())
}

/// Where embedding and LM head lie, of a checkpoint in `folder` that stores both in one type; `None` where it does not. Whether
/// they are the same decides what is written, so it has to be known before.
///
/// # Errors
/// Everything that is wrong with the checkpoint.
pub fn head_and_embedding(folder: &Path) -> Result<Option<[InShard; 2]>, ConvertError> {
    let input = Input::open_unread(folder, false)?;
    let place = |tensor| {
        let source = input.tensor((tensor, 0, 0)).ok()?;
        let name = shard_name(input.files[source.file].path());
        Some((source.ty, (name, source.range.start as u64..source.range.end as u64)))
    };
    Ok(match (place(Tensor::TokenEmbd), place(Tensor::Output)) {
        (Some((ty, embedding)), Some((other, head))) if ty == other => Some([embedding, head]),
        _ => None,
    })
}

/// Whether the output is the same whether or not the head is the embedding: a tied model's head is left out either way.
///
/// # Errors
/// As [`head_and_embedding`].
pub fn head_is_left_out(folder: &Path, keep_head: bool) -> Result<bool, ConvertError> {
    Ok(!Input::open_unread(folder, false)?.has_output(keep_head))
}

impl Arriving {
    /// Begins or goes on with the conversion in `folder`, which was [`begin`]-ed, has all files but the shards, and a header for
    /// each shard. `head_is_embedding` says that the LM head is the embedding once more.
    ///
    /// # Errors
    /// As [`convert`](crate::convert()).
    pub fn open(
        folder: &Path,
        options: &ConvertOptions,
        head_is_embedding: bool,
        out: &Path,
        overwrite: bool,
    ) -> Result<Self, ConvertError> {
        let mut journal = read_journal(folder)?.unwrap_or_default();
        let input = Input::open_unread(folder, head_is_embedding)?;
        let job = Job::new(&input, options)?;
        let plan = job.plan()?;
        let units = places(&job)?;
        let shards = input.files.iter().map(|file| shard_name(file.path())).collect();
        let write_options = WriteOptions { alignment: job.alignment, overwrite };
        let go_on = !journal.shards.is_empty() && journal.head_is_embedding == head_is_embedding;
        let writer = PlacedWriter::open(out, &job.metadata, &job.layout.tensors, write_options, go_on)?;
        if !(go_on && writer.goes_on()) {
            // Of shards that were converted into something else, no more than a part is here.
            for name in std::mem::take(&mut journal.shards).into_keys() {
                forget(folder, &name)?;
            }
        }
        journal.head_is_embedding = head_is_embedding;
        journal.write(folder)?;
        let metadata = job.metadata.clone();
        let arriving = Self {
            folder: folder.to_owned(),
            options: options.clone(),
            journal,
            plan,
            metadata,
            writer,
            shards,
            units,
        };
        for name in arriving.journal.shards.keys() {
            arriving.let_go(name)?;
        }
        Ok(arriving)
    }

    /// What will be written.
    pub fn plan(&self) -> &ConvertPlan {
        &self.plan
    }

    /// Bytes that the disk still has to have room for, the shards not counted.
    pub fn missing_space(&self) -> u64 {
        self.writer.missing_space()
    }

    /// The next shard that is to be taken; `None` where all are in the output.
    pub fn next(&self) -> Option<&str> {
        self.shards.iter().map(String::as_str).find(|name| !self.journal.shards.contains_key(*name))
    }

    /// How many shards there are, and how many are in the output.
    pub fn count(&self) -> (usize, usize) {
        (self.shards.len(), self.journal.shards.len())
    }

    /// Converts what the shard `name` completes. It lies in [`fetched`] and was proven; it is gone afterwards.
    ///
    /// # Errors
    /// As [`convert`](crate::convert()). What was taken before stays taken.
    pub fn take(&mut self, name: &str, progress: &dyn Progress, cancel: &Cancel) -> Result<(), ConvertError> {
        let place = self.folder.join(name);
        put(&fetched(&self.folder).join(name), &place)
            .map_err(|source| ConvertError::Io { path: place.clone(), source })?;
        let input = Input::open_unread(&self.folder, self.journal.head_is_embedding)?;
        let job = Job::new(&input, &self.options)?;
        let written: HashSet<usize> = self.journal.shards.values().flatten().map(|done| done.unit).collect();
        let here = |file: &usize| self.shards[*file] == name || self.journal.shards.contains_key(&self.shards[*file]);
        let complete =
            |unit: &usize| !written.contains(unit) && self.units[*unit].sources.iter().all(|(file, _)| here(file));
        let units: Vec<usize> = (0..self.units.len()).filter(complete).collect();
        let bytes = units.iter().flat_map(|&unit| &self.units[unit].sources).map(|(_, range)| range.len() as u64);
        progress.start(bytes.sum());
        let mut done = Vec::with_capacity(units.len());
        let (places, writer) = (&self.units, &self.writer);
        job.run(&units, self.options.threads, cancel, |unit, bytes, unit_done| {
            let place = &places[unit];
            writer.write_at(place.tensor, place.start, bytes)?;
            let gain = |gain: SearchGain| {
                let SquaredErrors { reference, chosen } = gain.errors;
                (gain.tensor.part().to_owned(), gain.weights, reference.to_bits(), chosen.to_bits())
            };
            let gains = unit_done.gains.into_iter().map(gain).collect();
            done.push(DoneUnit { unit, sum: crc32c::crc32c(bytes), gains });
            progress.advance(unit_done.input_bytes);
            Ok::<(), ConvertError>(())
        })?;
        cancel.check()?;
        progress.finish();
        // The journal must not know of bytes that a power failure could take back.
        self.writer.sync()?;
        self.journal.shards.insert(name.to_owned(), done);
        self.journal.write(&self.folder)?;
        drop(input);
        self.let_go(name)
    }

    /// Completes the output, and removes the folder.
    ///
    /// # Errors
    /// As [`convert`](crate::convert()).
    pub fn finish(self) -> Result<Converted, ConvertError> {
        let mut units: Vec<&DoneUnit> = self.journal.shards.values().flatten().collect();
        units.sort_by_key(|done| done.unit);
        if let Some(missing) = (0..self.units.len()).zip(&units).find(|(unit, done)| *unit != done.unit) {
            return Err(ConvertError::Options(format!("unit {} of the conversion is not done", missing.0)));
        }
        let mut gains = Gains::default();
        for (tensor, weights, reference, chosen) in units.iter().flat_map(|done| &done.gains) {
            let errors = SquaredErrors { reference: f64::from_bits(*reference), chosen: f64::from_bits(*chosen) };
            if let Some(tensor) = Tensor::ALL.into_iter().find(|known| known.part() == tensor) {
                gains.add(SearchGain { tensor, weights: *weights, errors });
            }
        }
        let sums = self.sums(&units);
        self.writer.finish(self.metadata, &sums)?;
        // The output is complete: what cannot be removed harms nobody.
        let _ = fs::remove_dir_all(&self.folder);
        Ok(Converted { plan: self.plan, gains: gains.into_vec() })
    }

    /// Gives up: neither output nor folder is left.
    pub fn discard(self) {
        self.writer.discard();
        let _ = fs::remove_dir_all(&self.folder);
    }

    /// The checksum of every part of the output, from those of its units.
    fn sums(&self, units: &[&DoneUnit]) -> Vec<u32> {
        let mut sums = Vec::new();
        let (mut sum, mut filled) = (0, 0);
        for (place, done) in self.units.iter().zip(units) {
            let tensor = &self.plan.tensors[place.tensor];
            let part = tensor.bytes / checksum_parts(&tensor.spec).max(1);
            sum = if filled == 0 { done.sum } else { crc32c::crc32c_combine(sum, done.sum, place.bytes as usize) };
            filled += place.bytes;
            if filled == part {
                sums.push(sum);
                filled = 0;
            }
        }
        sums
    }

    /// Removes a shard that is in the output, but for what others need.
    fn let_go(&self, name: &str) -> Result<(), ConvertError> {
        let fetched = fetched(&self.folder).join(name);
        match fs::remove_file(&fetched) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(ConvertError::Io { path: fetched, source }),
            _ => self.reduce(name),
        }
    }

    /// Leaves of a shard that is in the output its header and what units need that wait for other shards.
    fn reduce(&self, name: &str) -> Result<(), ConvertError> {
        let path = self.folder.join(name);
        let fail = |source| ConvertError::Io { path: path.clone(), source };
        let Some(index) = self.shards.iter().position(|shard| shard == name) else { return Ok(()) };
        let written: HashSet<usize> = self.journal.shards.values().flatten().map(|done| done.unit).collect();
        let waiting = self.units.iter().enumerate().filter(|(unit, _)| !written.contains(unit));
        let of_shard = waiting.flat_map(|(_, place)| &place.sources).filter(|(file, _)| *file == index);
        let mut ranges: Vec<Range<u64>> = of_shard.map(|(_, range)| range.start as u64..range.end as u64).collect();
        let file = File::open(&path).map_err(fail)?;
        let size = file.metadata().map_err(fail)?.len();
        ranges.push(0..header_bytes(&file, size).map_err(fail)?);
        let kept: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        if st_sys::allocated(&file).is_some_and(|bytes| bytes <= kept + SLACK) {
            return Ok(());
        }
        keep(&path, size, |to| copy(&file, to, &ranges))
    }
}

/// Puts a file in the place of another. It keeps its own name too, so that it is found there until its work is done.
fn put(whole: &Path, place: &Path) -> std::io::Result<()> {
    let beside = st_sys::beside(place, "", ".part");
    let _ = fs::remove_file(&beside);
    match fs::hard_link(whole, &beside) {
        Ok(()) => {
            fs::rename(&beside, place)?;
            // Where both were one file already, the system leaves either.
            let _ = fs::remove_file(&beside);
            Ok(())
        }
        // A file system without such links.
        Err(_) => fs::rename(whole, place),
    }
}

fn copy(from: &File, to: &mut File, ranges: &[Range<u64>]) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(buffer.len() as u64) as usize;
            st_sys::read_exact_at(from, &mut buffer[..len], at)?;
            st_sys::write_all_at(to, &buffer[..len], at)?;
            at += len as u64;
        }
    }
    Ok(())
}

/// Bytes in front of the data of a shard.
fn header_bytes(file: &File, size: u64) -> std::io::Result<u64> {
    let mut len = [0; 8];
    st_sys::read_exact_at(file, &mut len, 0)?;
    Ok(u64::from_le_bytes(len).saturating_add(8).min(size))
}

/// Puts a file of `size` bytes at `path` of which `fill` writes some; the others take no room.
fn keep(path: &Path, size: u64, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<(), ConvertError> {
    let beside = st_sys::beside(path, "", ".part");
    let write = || {
        let mut file = File::create(&beside)?;
        fill(&mut file)?;
        file.set_len(size)?;
        file.sync_data()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| ConvertError::Io { path: path.into(), source })
}

/// Removes a shard of which no more than a part is left, but for its header.
fn forget(folder: &Path, name: &str) -> Result<(), ConvertError> {
    let path = folder.join(name);
    let fail = |source| ConvertError::Io { path: path.clone(), source };
    let file = File::open(&path).map_err(fail)?;
    let size = file.metadata().map_err(fail)?.len();
    let header = 0..header_bytes(&file, size).map_err(fail)?;
    keep(&path, size, |to| copy(&file, to, &[header]))
}

fn places(job: &Job<'_>) -> Result<Vec<Place>, ConvertError> {
    let mut places: Vec<Place> = Vec::with_capacity(job.layout.units.len());
    for (unit, &tensor) in job.layout.units.iter().zip(&job.layout.unit_tensor) {
        let before = places.last().filter(|last| last.tensor == tensor);
        let start = before.map_or(0, |last| last.start + last.bytes);
        let bytes = job.layout.unit_bytes(unit) as u64;
        places.push(Place { tensor, start, bytes, sources: job.sources(unit)? });
    }
    Ok(places)
}

fn shard_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn identity(what: &str, options: &ConvertOptions) -> String {
    // The bytes do not depend on the number of threads. What is added is part of `what`.
    let options = ConvertOptions { threads: 1, extra: None, ..options.clone() };
    format!("{what} {options:?} {}", env!("CARGO_PKG_VERSION"))
}

fn read_journal(folder: &Path) -> Result<Option<Journal>, ConvertError> {
    let path = folder.join(JOURNAL);
    match fs::read(&path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).unwrap_or_default())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConvertError::Io { path, source }),
    }
}

impl Journal {
    fn write(&self, folder: &Path) -> Result<(), ConvertError> {
        let path = folder.join(JOURNAL);
        let text = serde_json::to_vec(self)
            .map_err(|error| ConvertError::Json { path: path.clone(), message: error.to_string() })?;
        keep(&path, text.len() as u64, |file| file.write_all(&text))?;
        st_sys::sync_folder(folder).map_err(|source| ConvertError::Io { path, source })
    }
}
