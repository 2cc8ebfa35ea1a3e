//! A model to plan for: the header of its file, wherever that is, and what having it would take.
//!
//! A file that is here is opened. Of a published one only the header is read over the network, of a checkpoint only `config.json`: its file
//! would be the one that converting it gives.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use st_convert::ModelConfig;
use st_gguf::{GgufFile, ReadAt};
use st_hub::{DownloadRequest, Hub, Listing, Published};

use crate::context::Context;
use crate::forecast::{LIVE, Machine, Weights, made, speed_at};
use crate::size::show_size;

/// What a tokenizer takes in memory for each token of its vocabulary, about, where the file with it is not here.
const TOKENIZER: u64 = 300;
const CONFIG: &str = "config.json";
const MAX_CONFIG: u64 = 4 << 20;

/// A model that is planned for.
pub(crate) struct Planned {
    /// As it was named.
    pub(crate) name: String,
    /// The same, for a sentence.
    pub(crate) short: String,
    /// Where its shape is from, in words.
    pub(crate) source: String,
    /// Its header; weights are not to be read.
    pub(crate) file: GgufFile,
    /// Memory of a tokenizer that is not in it.
    pub(crate) tokenizer: u64,
    /// The file, where it is on a disk.
    pub(crate) on_disk: Option<PathBuf>,
    /// Bytes to fetch.
    pub(crate) fetch: u64,
    /// Bytes that the disk needs room for, and has.
    pub(crate) disk: u64,
    pub(crate) free: Option<u64>,
}

impl Planned {
    /// A file that is open; `path` where it is on a disk.
    pub(crate) fn of_file(name: String, file: GgufFile, path: Option<PathBuf>) -> Self {
        let size = show_size(file.header.file_len);
        let source = match &path {
            Some(path) => format!("{} is here, {size}", path.display()),
            None => format!("it is inside the program, {size}"),
        };
        Self { short: short(&name), name, source, file, tokenizer: 0, on_disk: path, fetch: 0, disk: 0, free: None }
    }

    /// A folder with a checkpoint, by its `config.json`.
    ///
    /// # Errors
    /// Where that cannot be read, or makes no model.
    pub(crate) fn of_folder(name: String, folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(CONFIG);
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let made = Self::of_config(name, &text, &path)?;
        let disk = made.file.header.file_len;
        Ok(Self {
            source: format!("as `quantize --q4_0` would convert it to {}", show_size(disk)),
            disk,
            free: free(folder),
            ..made
        })
    }

    /// A checkpoint of the hub, of which `config.json` is read.
    ///
    /// # Errors
    /// What asking for it meets; a configuration that makes no model.
    pub(crate) fn of_checkpoint(name: String, listing: &Listing, hub: &Hub, store: &Path) -> anyhow::Result<Self> {
        let config = listing.files.iter().find(|file| file.path == CONFIG).map_or(MAX_CONFIG, |file| file.size);
        let request =
            DownloadRequest { revision: listing.commit.clone(), ..DownloadRequest::new(listing.repo.clone()) };
        let text = hub.read_part(&request, CONFIG, 0..config.min(MAX_CONFIG))?;
        let made = Self::of_config(name, &text, Path::new(CONFIG))?;
        let shards = listing.files.iter().filter(|file| file.path.ends_with(".safetensors"));
        let shard = shards.map(|file| file.size).max().unwrap_or(0);
        let output = made.file.header.file_len;
        let size = show_size(output);
        let source = format!("the checkpoint {}, converted to Q4_0 while it is fetched, gives {size}", listing.repo);
        let free = free(store);
        Ok(Self { source, fetch: listing.missing_bytes(), disk: output + shard, free, ..made })
    }

    fn of_config(name: String, text: &[u8], path: &Path) -> anyhow::Result<Self> {
        let json = serde_json::from_slice(text).with_context(|| format!("{} is not JSON", path.display()))?;
        let config = ModelConfig::from_json(&json, path)?;
        let file = made::file(&config.shape, config.tied == Some(false))?;
        let tokenizer = TOKENIZER * config.shape.n_vocab as u64;
        let (short, source) = (short(&name), String::new());
        Ok(Self { short, name, source, file, tokenizer, on_disk: None, fetch: 0, disk: 0, free: None })
    }

    /// A published file, of which the header is read.
    ///
    /// # Errors
    /// What asking for it meets; a file that is no model.
    pub(crate) fn of_published(name: String, listing: &Listing, model: &Published, hub: Hub) -> anyhow::Result<Self> {
        let (fetch, free) = (model.missing_bytes(), listing.free_bytes);
        let first = &model.files[0];
        let source = format!("{} of {}, {}", first.path, listing.repo, show_size(model.bytes()));
        let request =
            DownloadRequest { revision: listing.commit.clone(), ..DownloadRequest::new(listing.repo.clone()) };
        let remote = Arc::new(Remote {
            hub,
            request,
            path: first.path.clone(),
            len: first.size,
            blocks: Mutex::default(),
            parsed: AtomicBool::new(false),
        });
        let file = GgufFile::from_source(Arc::clone(&remote) as Arc<dyn ReadAt>)?;
        remote.parsed.store(true, Ordering::Relaxed);
        Ok(Self { short: short(&name), name, source, file, tokenizer: 0, on_disk: None, fetch, disk: fetch, free })
    }

    /// How fast an answer would be made here with all of the model in memory, in words, where there is so much.
    ///
    /// # Errors
    /// Where the file is no complete model, or this machine cannot be measured.
    pub(crate) fn speed(&self, context: &Context) -> anyhow::Result<Option<String>> {
        let weights = Weights::of(&self.file)?;
        let (threads, isa) = (st_sys::physical_cores(), st_model::Kernels::detect().isa());
        let known = Machine::load(&context.env.store, threads, isa);
        let mut machine = known.unwrap_or_else(|| Machine::measure(threads, isa));
        machine.layer(&weights.shape, isa)?;
        let speed = speed_at(&weights, &machine, 1.0, LIVE);
        let bytes = self.file.header.file_len;
        let fits = st_sys::available_memory().is_none_or(|available| bytes + bytes / 8 < available);
        Ok(speed.filter(|_| fits).map(|speed| format!("about {speed:.0} tokens/s here, with all of it in memory")))
    }
}

/// A model's name in a sentence.
fn short(name: &str) -> String {
    match name.split(':').next() {
        Some(alias @ ("4b" | "21b")) => format!("the {}", alias.to_uppercase()),
        _ => Path::new(name).file_name().map_or_else(|| name.to_owned(), |name| name.to_string_lossy().into_owned()),
    }
}

/// Free space where `folder` is, or will be.
fn free(folder: &Path) -> Option<u64> {
    folder.ancestors().find(|folder| folder.exists()).and_then(|folder| st_sys::free_space(folder).ok().flatten())
}

/// A file of the hub of which only the header is fetched, in blocks.
struct Remote {
    hub: Hub,
    request: DownloadRequest,
    path: String,
    len: u64,
    blocks: Mutex<HashMap<u64, Vec<u8>>>,
    /// Whether the header was read: of weights only the beginning of each read is fetched, which tells whether two matrices that could be
    /// the same are; the rest is zeros.
    parsed: AtomicBool,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl Remote {
    const BLOCK: u64 = 2 << 20;
    const LOOK: u64 = 64 << 10;

    fn fetch(&self, start: u64, end: u64) -> io::Result<Vec<u8>> {
        self.hub.read_part(&self.request, &self.path, start..end.min(self.len)).map_err(io::Error::other)
    }
}

impl ReadAt for Remote {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end =
            offset.checked_add(buf.len() as u64).filter(|&end| end <= self.len).ok_or(io::ErrorKind::UnexpectedEof)?;
        if self.parsed.load(Ordering::Relaxed) {
            let beginning = self.fetch(offset, end.min(offset + Self::LOOK))?;
            buf.fill(0);
            buf[..beginning.len()].copy_from_slice(&beginning);
            return Ok(());
        }
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        for number in offset / Self::BLOCK..end.div_ceil(Self::BLOCK) {
            let start = number * Self::BLOCK;
            let block = match blocks.entry(number) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => place.insert(self.fetch(start, start + Self::BLOCK)?),
            };
            let (from, to) = (offset.max(start), end.min(start + Self::BLOCK));
            let part = block.get((from - start) as usize..(to - start) as usize);
            let part = part.ok_or(io::ErrorKind::UnexpectedEof)?;
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }
}
