//! Turns rows into bytes on all threads while the previous bytes are written, in bounded memory.

use std::ops::Range;
use std::sync::mpsc;

use anyhow::{Result, anyhow};
use rayon::prelude::*;
use st_gguf::GgmlType;

use super::encode::{encode_row, row_bytes};
use super::recipe::{Recipe, Tensor};

/// Bytes encoded at a time.
const CHUNK: usize = 32 << 20;

/// Appends rows `rows` of `tensor` to `out`, as weights of type `ty`.
///
/// # Errors
/// As [`encode_row`].
pub fn encode_rows(
    recipe: &Recipe,
    tensor: &Tensor,
    rows: Range<usize>,
    ty: GgmlType,
    out: &mut Vec<u8>,
) -> Result<()> {
    let row_bytes = row_bytes(ty, tensor.cols)?;
    let start = out.len();
    out.resize(start + rows.len() * row_bytes, 0);
    out[start..].par_chunks_mut(row_bytes).zip(rows).try_for_each_init(
        || vec![0.0; tensor.cols],
        |row, (bytes, i)| {
            recipe.fill_row(tensor, i, row);
            encode_row(ty, row, bytes)
        },
    )
}

/// A run of rows of one tensor.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The tensor.
    pub tensor: &'a Tensor,
    /// Its rows.
    pub rows: Range<usize>,
    /// How they are stored.
    pub ty: GgmlType,
}

/// Cuts a tensor into parts of bounded size.
pub fn parts(tensor: &Tensor, ty: GgmlType) -> impl Iterator<Item = Part<'_>> {
    // As floats: every type takes less.
    let step = (CHUNK / (4 * tensor.cols)).max(1);
    (0..tensor.rows).step_by(step).map(move |start| Part { tensor, rows: start..(start + step).min(tensor.rows), ty })
}

/// Makes every item's bytes with `make` and hands them, in order and in runs of bounded size, to `write`, which runs on
/// a thread of its own.
///
/// # Errors
/// The first error of `make` or `write`.
pub fn pipeline<T>(
    items: impl Iterator<Item = T>,
    mut make: impl FnMut(T, &mut Vec<u8>) -> Result<()>,
    mut write: impl FnMut(&[u8]) -> Result<()> + Send,
) -> Result<()> {
    let (full_sender, full) = mpsc::sync_channel::<Vec<u8>>(1);
    let (empty_sender, empty) = mpsc::channel::<Vec<u8>>();
    for _ in 0..2 {
        empty_sender.send(Vec::new()).map_err(|_| anyhow!("the buffer channel closed"))?;
    }
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || -> Result<()> {
            for buffer in full {
                write(&buffer)?;
                // The maker may be done and gone; then nobody needs the buffer back.
                let _ = empty_sender.send(buffer);
            }
            Ok(())
        });
        let made = (|| {
            let mut buffer = Vec::new();
            for item in items {
                make(item, &mut buffer)?;
                if buffer.len() >= CHUNK {
                    let Ok(next) = empty.recv() else { return Ok(()) };
                    if full_sender.send(std::mem::replace(&mut buffer, next)).is_err() {
                        return Ok(());
                    }
                    buffer.clear();
                }
            }
            // A failed send means that the writer has stopped; its error is reported below.
            let _ = full_sender.send(buffer);
            Ok(())
        })();
        drop(full_sender);
        let written = writer.join().map_err(|_| anyhow!("the writer thread panicked"))?;
        made.and(written)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipeline_keeps_order() {
        let mut out = Vec::new();
        let make = |i: u8, buffer: &mut Vec<u8>| {
            buffer.extend(std::iter::repeat_n(i, CHUNK / 3));
            Ok(())
        };
        pipeline(0..10_u8, make, |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
        assert_eq!(out.len(), 10 * (CHUNK / 3));
        assert!(out.is_sorted());
    }

    #[test]
    fn pipeline_reports_errors_of_both_ends() {
        let fill = |_: u8, buffer: &mut Vec<u8>| {
            buffer.resize(CHUNK, 0);
            Ok(())
        };
        assert!(pipeline(0..9, fill, |_| Err(anyhow!("disk full"))).is_err());
        assert!(pipeline(0..9_u8, |_, _| Err(anyhow!("cannot make")), |_| Ok(())).is_err());
    }
}
