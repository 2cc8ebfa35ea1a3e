//! A safetensors file whose tensors are filled row by row, in any order, without being held in memory.
//!
//! What is written here are logits, and what goes with them: they come first in the file, which is how it is known again.

use std::io::{self, Read, Write as _};
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, json};
use st_gguf::{GgufError, Kind, OutputFile, begins_with};

/// The files that are written here.
pub(crate) const LOGITS: Kind = Kind { name: "a file of logits", recognizes };

/// Element types that are written here, four bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    I32,
}

/// A file being written. Dropping it without [`TensorFile::finish`] removes it.
#[derive(Debug)]
pub(crate) struct TensorFile {
    file: OutputFile,
    /// Where each tensor starts in the file, and the bytes of one of its rows.
    places: Vec<(u64, usize)>,
    buffer: Vec<u8>,
}

impl TensorFile {
    /// Begins the file that will be `path`: name, type and shape of each tensor. An existing one is replaced only with
    /// `overwrite`.
    pub(crate) fn create(
        path: &Path,
        tensors: &[(String, Dtype, Vec<usize>)],
        overwrite: bool,
    ) -> anyhow::Result<Self> {
        let mut header = Map::new();
        let mut places = Vec::with_capacity(tensors.len());
        let mut offset = 0u64;
        for (name, dtype, shape) in tensors {
            let bytes = 4 * shape.iter().map(|&n| n as u64).product::<u64>();
            let dtype = match dtype {
                Dtype::F32 => "F32",
                Dtype::I32 => "I32",
            };
            let place = json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bytes]});
            header.insert(name.clone(), place);
            places.push((offset, 4 * shape.iter().skip(1).product::<usize>()));
            offset += bytes;
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let start = 8 + header.len() as u64;
        for (place, _) in &mut places {
            *place += start;
        }

        let mut file = OutputFile::create(path, LOGITS, overwrite)?;
        file.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(&header))
            .and_then(|()| file.file().set_len(start + offset))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, places, buffer: Vec::new() })
    }

    /// Writes rows of tensor number `tensor` from row `first` on.
    pub(crate) fn write_f32(&mut self, tensor: usize, first: usize, rows: &[f32]) -> io::Result<()> {
        self.write(tensor, first, rows.iter().map(|value| value.to_le_bytes()))
    }

    /// Writes rows of tensor number `tensor` from row `first` on.
    pub(crate) fn write_i32(&mut self, tensor: usize, first: usize, rows: &[i32]) -> io::Result<()> {
        self.write(tensor, first, rows.iter().map(|value| value.to_le_bytes()))
    }

    fn write(&mut self, tensor: usize, first: usize, values: impl Iterator<Item = [u8; 4]>) -> io::Result<()> {
        let (start, row_bytes) = self.places[tensor];
        self.buffer.clear();
        self.buffer.extend(values.flatten());
        st_sys::write_all_at(self.file.file(), &self.buffer, start + (first * row_bytes) as u64)
    }

    /// Gives the complete file its name.
    pub(crate) fn finish(self) -> Result<(), GgufError> {
        self.file.finish()
    }
}

/// Files of this kind begin with the one tensor that all of them have; a checkpoint's do not.
fn recognizes(bytes: &mut dyn Read) -> io::Result<bool> {
    io::copy(&mut bytes.take(8), &mut io::sink())?;
    begins_with(bytes, br#"{"logits":"#)
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn tensors() -> Vec<(String, Dtype, Vec<usize>)> {
        vec![("logits".into(), Dtype::F32, vec![3, 2]), ("b".into(), Dtype::I32, vec![2, 1])]
    }

    #[test]
    fn rows_written_in_any_order_are_read_by_the_reference_reader() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        let mut file = TensorFile::create(&path, &tensors(), false).expect("created");
        file.write_i32(1, 0, &[7, -8]).expect("written");
        file.write_f32(0, 2, &[5.0, 6.0]).expect("written");
        file.write_f32(0, 0, &[1.0, 2.0, 3.0, 4.0]).expect("written");
        file.finish().expect("finished");

        let bytes = std::fs::read(&path).expect("read");
        let read = SafeTensors::deserialize(&bytes).expect("valid");
        let a = read.tensor("logits").expect("there");
        assert_eq!(a.shape(), [3, 2]);
        let values: Vec<f32> = a.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect();
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(read.tensor("b").expect("there").data(), [7, 0, 0, 0, 0xf8, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn nothing_is_left_of_a_file_that_was_not_finished_and_nothing_is_replaced_unasked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        drop(TensorFile::create(&path, &tensors(), false).expect("created"));
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0);
        TensorFile::create(&path, &tensors(), false).expect("created").finish().expect("finished");
        assert!(TensorFile::create(&path, &tensors(), false).is_err());
        TensorFile::create(&path, &tensors(), true).expect("created").finish().expect("replaced");
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
        // The weights of a model are tensors, too.
        for other in ["mine", "12345678{\"model.norm.weight\":"] {
            std::fs::write(&path, other).expect("written");
            assert!(TensorFile::create(&path, &tensors(), true).is_err());
        }
    }
}
