//! Records of the offload layout: the keys that describe them, and putting an expert's three matrices into one.

use st_gguf::{Metadata, RecordLayout, describe_records};
use st_kernels::{ExpertFormat, Kernels, Matrix};

use crate::error::ConvertError;

/// States how the records of each layer lie.
pub(crate) fn describe(formats: &[ExpertFormat], metadata: &mut Metadata) {
    let of = |format: &ExpertFormat| RecordLayout {
        types: Matrix::ALL.map(|matrix| format.type_of(matrix).ggml()),
        bytes: format.record_bytes() as u64,
        starts: Matrix::ALL.map(|matrix| format.region(matrix).start as u64),
    };
    describe_records(metadata, &formats.iter().map(of).collect::<Vec<_>>());
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
