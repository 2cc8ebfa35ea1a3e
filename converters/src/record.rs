//! Records of the offload layout: the keys that describe them, and putting an expert's three matrices into one.

use st_gguf::{Metadata, describe_records};
use st_kernels::{ExpertFormat, Kernels, Matrix};

use crate::error::ConvertError;

/// States how `format` lays records out.
pub(crate) fn describe(format: &ExpertFormat, metadata: &mut Metadata) {
    let ty = format.type_of(Matrix::Gate).ggml();
    let starts = Matrix::ALL.map(|matrix| format.region(matrix).start as u64);
    describe_records(metadata, ty, format.record_bytes() as u64, starts);
}

/// Fills `record` with an expert whose matrices, as GGUF stores them, `fetch` puts into a buffer of the right length.
pub(crate) fn pack(
    kernels: Kernels,
    format: &ExpertFormat,
    canonical: &mut Vec<u8>,
    record: &mut [u8],
    mut fetch: impl FnMut(Matrix, &mut [u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    // Buffers come back from other units: what no region covers must not depend on them.
    record.fill(0);
    for matrix in Matrix::ALL {
        canonical.resize(format.canonical_bytes(matrix), 0);
        fetch(matrix, canonical)?;
        kernels.pack_expert(format, matrix, canonical, &mut record[format.region(matrix)]);
    }
    Ok(())
}
