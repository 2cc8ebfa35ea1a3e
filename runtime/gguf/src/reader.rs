//! A file opened for reading: its header, and its tensors' bytes on request, compared with the file's checksums where it has
//! some.

use std::path::Path;
use std::sync::Arc;

use crate::checksums::Verifier;
use crate::error::{GgufError, Result};
use crate::source::name_of;
use crate::split;
use crate::{FileSource, Header, MemorySource, ReadAt, TensorInfo};

/// A GGUF file whose header has been read and checked. Cloning shares the source.
#[derive(Clone, Debug)]
pub struct GgufFile {
    /// The header.
    pub header: Header,
    /// Where the tensors' bytes come from.
    pub source: Arc<dyn ReadAt>,
    pub(crate) verifier: Arc<Verifier>,
}

impl GgufFile {
    /// Opens the file `path` and reads its header; of a split file all parts, whichever is named.
    ///
    /// # Errors
    /// As [`FileSource::open`] and [`Header::parse`]; [`GgufError::SplitPart`] where other parts are not beside it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = Self::from_source(Arc::new(FileSource::open(path)?))?;
        Ok(match split::join(path, &file.header)? {
            Some((header, source)) => Self::with(header, Arc::from(source)),
            None => file,
        })
    }

    /// Reads the header of a file that is embedded in the binary.
    ///
    /// # Errors
    /// As [`Header::parse`].
    pub fn from_static(bytes: &'static [u8]) -> Result<Self> {
        Self::from_source(Arc::new(MemorySource(bytes)))
    }

    /// Reads the header of `source`.
    ///
    /// # Errors
    /// As [`Header::parse`].
    pub fn from_source(source: Arc<dyn ReadAt>) -> Result<Self> {
        Ok(Self::with(Header::parse(&*source)?, source))
    }

    fn with(header: Header, source: Arc<dyn ReadAt>) -> Self {
        let verifier = Arc::new(Verifier::new(Arc::clone(&header.checksums)));
        Self { header, source, verifier }
    }

    /// All bytes of `tensor`.
    ///
    /// # Errors
    /// As [`read_range`](Self::read_range); [`GgufError::Io`] also where there is no memory for them.
    pub fn read_tensor(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        self.check_range(tensor, 0, tensor.n_bytes)?;
        let mut bytes = Vec::new();
        let len = usize::try_from(tensor.n_bytes).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(len).map_err(|_| {
            let action = format!("get {len} bytes of memory for tensor `{}`", tensor.name);
            GgufError::io(name_of(&*self.source), action, std::io::ErrorKind::OutOfMemory.into())
        })?;
        bytes.resize(len, 0);
        self.read_range(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `buf` with the bytes of `tensor` from its byte `start` on.
    ///
    /// # Errors
    /// [`GgufError::Tensor`] where the range leaves the tensor, [`GgufError::Io`] where reading fails, [`GgufError::Damaged`]
    /// as [`verify`](Self::verify).
    pub fn read_range(&self, tensor: &TensorInfo, start: u64, buf: &mut [u8]) -> Result<()> {
        self.read_unchecked(tensor, start, buf)?;
        self.verify(tensor, start, buf)
    }

    /// Compares `bytes` of `tensor`, which were read from its byte `start` on, with the file's checksums, as soon as all of a
    /// part (the tensor, or an expert's share of it) was seen. Reading by [`read_range`](Self::read_range) does this itself.
    ///
    /// # Errors
    /// [`GgufError::Damaged`].
    pub fn verify(&self, tensor: &TensorInfo, start: u64, bytes: &[u8]) -> Result<()> {
        self.verifier.saw(self.header.file_name(), tensor, start, bytes)
    }

    /// As [`read_range`](Self::read_range), for whoever compares the bytes with something else than the file's checksums.
    ///
    /// # Errors
    /// As [`read_range`](Self::read_range), but for damage.
    pub fn read_unchecked(&self, tensor: &TensorInfo, start: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(tensor, start, buf.len() as u64)?;
        self.source.read_exact_at(buf, tensor.offset + start).map_err(|source| {
            let (len, at) = (buf.len(), tensor.offset + start);
            let action = format!("read {len} bytes of tensor `{}` at offset {at}", tensor.name);
            GgufError::io(name_of(&*self.source), action, source)
        })
    }

    fn check_range(&self, tensor: &TensorInfo, start: u64, len: u64) -> Result<()> {
        let inside = start.checked_add(len).is_some_and(|end| end <= tensor.n_bytes)
            && tensor.offset.checked_add(tensor.n_bytes).is_some_and(|end| end <= self.header.file_len);
        if inside {
            return Ok(());
        }
        let problem = format!("has {} bytes; {len} from byte {start} were asked for", tensor.n_bytes);
        Err(GgufError::tensor(name_of(&*self.source), &tensor.name, problem))
    }
}
