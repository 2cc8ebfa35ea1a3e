//! A safetensors file whose tensors are filled row by row, in any order, without being held in memory.
//!
//! The file is written beside its final name and renamed when it is complete; until then nothing stands there.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use serde_json::{Map, json};
use tempfile::NamedTempFile;

/// Element types that are written here, four bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    I32,
}

/// A file being written. Dropping it without [`TensorFile::finish`] removes it.
#[derive(Debug)]
pub(crate) struct TensorFile {
    file: NamedTempFile,
    /// Where each tensor starts in the file, and the bytes of one of its rows.
    places: Vec<(u64, usize)>,
    buffer: Vec<u8>,
}

impl TensorFile {
    /// Begins the file that will be `path`: name, type and shape of each tensor.
    pub(crate) fn create(path: &Path, tensors: &[(String, Dtype, Vec<usize>)]) -> io::Result<Self> {
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

        let mut file = beside(path)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        file.as_file().set_len(start + offset)?;
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
        self.file.as_file().write_all_at(&self.buffer, start + (first * row_bytes) as u64)
    }

    /// Gives the complete file its name; an existing one is replaced only with `overwrite`.
    pub(crate) fn finish(self, path: &Path, overwrite: bool) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        match overwrite {
            true => self.file.persist(path)?,
            false => self.file.persist_noclobber(path)?,
        };
        Ok(())
    }
}

/// A file next to the one it is to become, with the permissions that a new file has. Dropping it removes it.
pub(crate) fn beside(path: &Path) -> io::Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".st-tool-").suffix(".partial").permissions(Permissions::from_mode(0o666));
    builder.tempfile_in(folder).map_err(|error| match folder.try_exists() {
        // The system's words would name a file that nobody has heard of.
        Ok(false) => io::Error::new(error.kind(), format!("the folder {} does not exist", folder.display())),
        _ => error,
    })
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn tensors() -> Vec<(String, Dtype, Vec<usize>)> {
        vec![("a".into(), Dtype::F32, vec![3, 2]), ("b".into(), Dtype::I32, vec![2, 1])]
    }

    #[test]
    fn rows_written_in_any_order_are_read_by_the_reference_reader() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        let mut file = TensorFile::create(&path, &tensors()).expect("created");
        file.write_i32(1, 0, &[7, -8]).expect("written");
        file.write_f32(0, 2, &[5.0, 6.0]).expect("written");
        file.write_f32(0, 0, &[1.0, 2.0, 3.0, 4.0]).expect("written");
        file.finish(&path, false).expect("finished");

        let bytes = std::fs::read(&path).expect("read");
        let read = SafeTensors::deserialize(&bytes).expect("valid");
        let a = read.tensor("a").expect("there");
        assert_eq!(a.shape(), [3, 2]);
        let values: Vec<f32> = a.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect();
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(read.tensor("b").expect("there").data(), [7, 0, 0, 0, 0xf8, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn nothing_is_left_of_a_file_that_was_not_finished_and_nothing_is_replaced_unasked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        drop(TensorFile::create(&path, &tensors()).expect("created"));
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0);
        std::fs::write(&path, "mine").expect("written");
        assert!(TensorFile::create(&path, &tensors()).expect("created").finish(&path, false).is_err());
        assert_eq!(std::fs::read(&path).expect("read"), b"mine");
        TensorFile::create(&path, &tensors()).expect("created").finish(&path, true).expect("replaced");
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }
}
