//! Snapshots: a text and its keys and values as a file, to go on from later.
//!
//! A snapshot belongs to one model's weights and one way to keep keys and values, and to no machine: it is the same with any
//! instruction set, threads and budget, and what goes on from it has the bits of a run from the beginning. It holds the pages that
//! the next token can see, or that a text cut by its last token would. Everything in it is summed (CRC-32C) and compared when it is
//! read, before any of it is used.
//!
//! Layout, little-endian: the magic; the model (32 bytes); type of keys and values, layers (32 bits each); bytes of a page, tokens (64
//! bits each); the tokens (32 bits each); for each layer its first chunk and number of pages (64 bits each); the sum of all this (32
//! bits); then layer by layer each page, followed by its sum.

use std::io::{self, Read, Write};
use std::sync::Arc;

use st_format::ModelShape;
use st_gguf::GgufFile;
use st_kernels::{KvFormat, KvPool, KvType};

use crate::error::ModelError;
use crate::kv_cache::{LayerKv, POSITION_STEP};

/// How a snapshot begins.
pub const SNAPSHOT_MAGIC: &[u8; 8] = b"STKVSNP1";

/// Why a snapshot cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Reading or writing failed.
    #[error("the snapshot cannot be read or written")]
    Io(#[from] io::Error),
    /// It is none, or was cut off or changed.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// It is of another model, or of other keys and values.
    #[error("the snapshot is of another model, or another --kv-type")]
    Other,
    /// The context is too short for it.
    #[error("the snapshot has {tokens} tokens, the context holds {ctx}")]
    Context {
        /// Tokens of the snapshot.
        tokens: usize,
        /// Tokens of the context.
        ctx: usize,
    },
    /// There are no pages for it.
    #[error(transparent)]
    Pages(#[from] Box<ModelError>),
}

/// What a snapshot says before its pages.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) tokens: Vec<u32>,
    /// First chunk and number of pages of each layer.
    pub(crate) layers: Vec<(usize, usize)>,
}

/// What snapshots of one engine have in common.
#[derive(Debug)]
pub(crate) struct Expected<'a> {
    pub(crate) model: &'a [u8; 32],
    pub(crate) format: KvFormat,
    /// The window of each layer.
    pub(crate) windows: &'a [Option<usize>],
    pub(crate) ctx: usize,
}

fn type_number(ty: KvType) -> u32 {
    match ty {
        KvType::Bf16 => 1,
        KvType::F16 => 2,
        KvType::Q8_0 => 3,
        KvType::F32 => 4,
    }
}

/// Writes and sums up.
struct Summed<W> {
    inner: W,
    sum: u32,
}

impl<W: Write> Summed<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum = st_gguf::crc32c::crc32c_append(self.sum, bytes);
        self.inner.write_all(bytes)
    }

    /// Writes the sum, and begins another.
    fn end(&mut self) -> io::Result<()> {
        let sum = std::mem::take(&mut self.sum);
        self.inner.write_all(&sum.to_le_bytes())
    }
}

impl<R: Read> Summed<R> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(bytes)?;
        self.sum = st_gguf::crc32c::crc32c_append(self.sum, bytes);
        Ok(())
    }

    fn number(&mut self) -> io::Result<usize> {
        Ok(usize::try_from(u64::from_le_bytes(self.take()?)).unwrap_or(usize::MAX))
    }

    /// Compares the sum with the one that comes next, and begins another.
    fn compare(&mut self, what: &'static str) -> Result<(), SnapshotError> {
        let sum = std::mem::take(&mut self.sum);
        let mut stated = [0; 4];
        self.inner.read_exact(&mut stated)?;
        if u32::from_le_bytes(stated) == sum { Ok(()) } else { Err(SnapshotError::Damaged(what)) }
    }
}

impl Expected<'_> {
    /// Chunks of a layer that a snapshot of `len` tokens has: from the first that its last token sees.
    fn chunks(&self, layer: usize, len: usize) -> std::ops::Range<usize> {
        let first = self.windows[layer].map_or(0, |window| len.saturating_sub(window)) / POSITION_STEP;
        first..len.div_ceil(POSITION_STEP)
    }

    /// How many tokens of a snapshot of `tokens` are kept where it is cut to `len`.
    pub(crate) fn keeps(&self, tokens: usize, len: usize) -> usize {
        let shortest = |layer| match (self.chunks(layer, tokens).start, self.windows[layer]) {
            (first @ 1.., Some(window)) => first * POSITION_STEP + window - 1,
            _ => 0,
        };
        match len {
            len if len >= tokens => tokens,
            len if len < (0..self.windows.len()).map(shortest).max().unwrap_or(0) => 0,
            len => len,
        }
    }

    /// Writes a snapshot.
    ///
    /// # Errors
    /// What writing meets.
    pub(crate) fn write(&self, tokens: &[u32], kv: &[LayerKv], out: impl Write) -> io::Result<()> {
        let mut out = Summed { inner: out, sum: 0 };
        out.put(SNAPSHOT_MAGIC)?;
        out.put(self.model)?;
        out.put(&type_number(self.format.ty()).to_le_bytes())?;
        out.put(&(kv.len() as u32).to_le_bytes())?;
        out.put(&(self.format.page_bytes() as u64).to_le_bytes())?;
        out.put(&(tokens.len() as u64).to_le_bytes())?;
        for token in tokens {
            out.put(&token.to_le_bytes())?;
        }
        let chunks: Vec<_> = (0..kv.len()).map(|layer| self.chunks(layer, tokens.len())).collect();
        for chunks in &chunks {
            out.put(&(chunks.start as u64).to_le_bytes())?;
            out.put(&(chunks.len() as u64).to_le_bytes())?;
        }
        out.end()?;
        for (kv, chunks) in kv.iter().zip(chunks) {
            let last = chunks.end * POSITION_STEP;
            for (page, end) in kv.pages_of(chunks.clone()).zip(chunks.map(|chunk| (chunk + 1) * POSITION_STEP)) {
                // Of tokens that were taken back nothing is kept.
                match tokens.len() < last && end == last {
                    true => out.put(&page.bytes_of_first(tokens.len() + POSITION_STEP - last))?,
                    false => out.put(page.as_bytes())?,
                }
                out.end()?;
            }
        }
        out.inner.flush()
    }

    /// Reads what stands before the pages. No more is believed than the file's length bears out: memory is taken as tokens come.
    ///
    /// # Errors
    /// Where it is no snapshot of this model that fits the context.
    pub(crate) fn head<R: Read>(&self, input: R) -> Result<(Head, impl Read + use<R>), SnapshotError> {
        let mut input = Summed { inner: input, sum: 0 };
        if input.take::<8>()? != *SNAPSHOT_MAGIC {
            return Err(SnapshotError::Damaged("it does not begin like one"));
        }
        let model = input.take::<32>()?;
        let ty = u32::from_le_bytes(input.take()?);
        let (n_layers, page_bytes) = (u32::from_le_bytes(input.take()?) as usize, input.number()?);
        let of_this = model == *self.model && ty == type_number(self.format.ty());
        if !of_this || n_layers != self.windows.len() || page_bytes != self.format.page_bytes() {
            return Err(SnapshotError::Other);
        }
        let n = input.number()?;
        if n > self.ctx {
            return Err(SnapshotError::Context { tokens: n, ctx: self.ctx });
        }
        let mut tokens = Vec::new();
        for _ in 0..n {
            tokens.push(u32::from_le_bytes(input.take()?));
        }
        let mut layers = Vec::with_capacity(n_layers);
        for _ in 0..n_layers {
            layers.push((input.number()?, input.number()?));
        }
        input.compare("its beginning has changed")?;
        let fits = |(layer, &(first, pages)): (usize, &(usize, usize))| {
            let chunks = self.chunks(layer, n);
            (first, pages) == (chunks.start, chunks.len())
        };
        match n > 0 && layers.iter().enumerate().all(fits) {
            true => Ok((Head { tokens, layers }, input.inner)),
            false => Err(SnapshotError::Damaged("its pages are not those of its tokens")),
        }
    }

    /// Reads the pages that follow `head`, into pages of `memory`.
    ///
    /// # Errors
    /// Where they are damaged, or `memory` has no more.
    pub(crate) fn pages(&self, head: &Head, input: impl Read, memory: &KvPool) -> Result<Vec<LayerKv>, SnapshotError> {
        let mut input = Summed { inner: input, sum: 0 };
        let mut kv = Vec::with_capacity(head.layers.len());
        for (&(first, n), &window) in head.layers.iter().zip(self.windows) {
            let mut pages = Vec::with_capacity(n);
            for _ in 0..n {
                let full = || SnapshotError::Pages(Box::new(ModelError::KvFull { pages: memory.most() }));
                let mut page = memory.page().ok_or_else(full)?;
                // Nobody else has it yet.
                let bytes = Arc::get_mut(&mut page).map(|page| page.as_bytes_mut());
                input.fill(bytes.unwrap_or_default())?;
                input.compare("one of its pages has changed")?;
                pages.push(page);
            }
            kv.push(LayerKv::restored(memory, window, first, pages));
        }
        let mut more = [0];
        match input.inner.read(&mut more)? {
            0 => Ok(kv),
            _ => Err(SnapshotError::Damaged("something follows its end")),
        }
    }
}

/// What tells a model's weights from all others': the configuration, and the names, types and shapes of its tensors and the sums of their data; where a
/// file states no sums, a few bytes of each tensor.
///
/// # Errors
/// What reading meets.
pub(crate) fn identity(file: &GgufFile, config: &ModelShape) -> Result<[u8; 32], ModelError> {
    use sha2::{Digest as _, Sha256};
    const SAMPLE: u64 = 1024;
    let sums = file.header.checksums();
    let mut hash = Sha256::new();
    // Another version may compute other bits.
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(format!("{config:?}"));
    for tensor in &file.header.tensors {
        hash.update(tensor.name.as_bytes());
        hash.update([0]);
        hash.update(tensor.ty.to_string().as_bytes());
        tensor.shape.iter().for_each(|n| hash.update(n.to_le_bytes()));
        let of_tensor = sums.of(&tensor.name);
        of_tensor.iter().for_each(|sum| hash.update(sum.to_le_bytes()));
        if of_tensor.is_empty() && tensor.n_bytes > 0 {
            let len = SAMPLE.min(tensor.n_bytes);
            let mut bytes = vec![0; len as usize];
            for start in [0, (tensor.n_bytes - len) / 2, tensor.n_bytes - len] {
                file.read_unchecked(tensor, start, &mut bytes)?;
                hash.update(&bytes);
            }
        }
    }
    Ok(hash.finalize().into())
}
