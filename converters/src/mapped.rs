//! Weight files mapped into memory. What stands in place of one, such as a Git LFS pointer, is named.

use std::path::Path;

use st_gguf::Placeholder;
use st_sys::MappedFile;

use crate::error::ConvertError;

/// Maps a whole weight file.
pub(crate) fn map_weights(path: &Path) -> Result<MappedFile, ConvertError> {
    let mapped = MappedFile::open(path).map_err(|source| ConvertError::Io { path: path.into(), source })?;
    let bytes = mapped.bytes();
    match Placeholder::of(&bytes[..bytes.len().min(Placeholder::PREFIX_BYTES)]) {
        Some(what) => Err(ConvertError::Placeholder { path: path.into(), what }),
        None => Ok(mapped),
    }
}
