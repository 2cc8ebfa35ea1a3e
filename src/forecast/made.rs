//! Models that are nowhere: the header of any shape, and weights that are made up where they are read.
//!
//! They stand for a file that is still to be fetched or written, whose shape is known, and for a model of few layers that shows how
//! fast this machine computes one. What they compute means nothing.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use st_format::{Scope, Tensor};
use st_gguf::{GgmlType, GgufError, GgufFile, Metadata, ModelShape, ReadAt, TensorSpec, encode_header};

/// A scale of 0.0105 as f16: rows of some thousands of such weights neither vanish nor grow beyond all bounds.
const SCALE: [u8; 2] = 0x2160u16.to_le_bytes();
/// Bytes of a block of Q4_0.
const BLOCK: u64 = 18;
const ALIGNMENT: u64 = 4096;

/// A file of a model of this shape, whose matrices are Q4_0 and whose norms and routers are F32, as `quantize --q4_0` writes them. `head`
/// says whether the LM head is a matrix of its own.
///
/// # Errors
/// Shapes that cannot be written.
pub(crate) fn file(shape: &ModelShape, head: bool) -> Result<GgufFile, GgufError> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "smallthinker");
    for (key, value) in shape.to_metadata() {
        metadata.insert(key, value);
    }
    let mut tensors = Vec::new();
    let mut kinds = Vec::new();
    for tensor in Tensor::ALL.into_iter().filter(|&tensor| head || tensor != Tensor::Output) {
        let (kind, ty) = match tensor {
            Tensor::OutputNorm | Tensor::AttnNorm | Tensor::FfnNorm => (Kind::Ones, GgmlType::F32),
            Tensor::FfnGateInp => (Kind::Noise, GgmlType::F32),
            _ => (Kind::Blocks, GgmlType::Q4_0),
        };
        let layers = if tensor.scope() == Scope::Model { 1 } else { shape.n_layers };
        for layer in 0..layers {
            tensors.push(TensorSpec { name: tensor.name(layer), shape: tensor.ggml_shape(shape), ty });
            kinds.push(kind);
        }
    }
    let (header, plan) = encode_header(&metadata, &tensors, ALIGNMENT)?;
    let places = plan.offsets.iter().zip(&plan.sizes).map(|(&start, &len)| start..start + len);
    let places = places.zip(kinds).collect();
    GgufFile::from_source(Arc::new(Made { header, places, len: plan.total }))
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Ones,
    Noise,
    Blocks,
}

struct Made {
    header: Vec<u8>,
    places: Vec<(Range<u64>, Kind)>,
    len: u64,
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a made model of {} bytes", self.len)
    }
}

impl ReadAt for Made {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.fill(0);
        let within = |range: &Range<u64>| {
            let (start, end) = (range.start.max(offset), range.end.min(end));
            (start < end).then(|| (start, (start - offset) as usize..(end - offset) as usize))
        };
        if let Some((start, part)) = within(&(0..self.header.len() as u64)) {
            let len = part.len();
            buf[part].copy_from_slice(&self.header[start as usize..][..len]);
        }
        let first = self.places.partition_point(|(place, _)| place.end <= offset);
        for (place, kind) in self.places[first..].iter().take_while(|(place, _)| place.start < end) {
            if let Some((start, part)) = within(place) {
                kind.fill(&mut buf[part], start - place.start, place.start);
            }
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl Kind {
    /// Fills `out` with the bytes of a tensor from its byte `at` on; `seed` differs from tensor to tensor.
    fn fill(self, out: &mut [u8], at: u64, seed: u64) {
        let four = |word: u64| match self {
            Kind::Ones => 1f32.to_le_bytes(),
            // From -0.1 to 0.1.
            Kind::Noise => ((mixed(word ^ seed) >> 40) as f32 / (1 << 24) as f32 * 0.2 - 0.1).to_le_bytes(),
            Kind::Blocks => (mixed(word ^ seed) as u32).to_le_bytes(),
        };
        let mut position = at;
        let mut rest = &mut *out;
        while !rest.is_empty() {
            let (word, skip) = (position / 4, (position % 4) as usize);
            let len = (4 - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(&four(word)[skip..skip + len]);
            (rest, position) = (later, position + len as u64);
        }
        if let Kind::Blocks = self {
            let mut block = at / BLOCK * BLOCK;
            while block < at + out.len() as u64 {
                for (i, &byte) in SCALE.iter().enumerate() {
                    let place = (block + i as u64).checked_sub(at).and_then(|place| out.get_mut(place as usize));
                    place.into_iter().for_each(|place| *place = byte);
                }
                block += BLOCK;
            }
        }
    }
}

/// A number that looks like chance.
fn mixed(n: u64) -> u64 {
    let n = (n ^ n >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ n >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_model_is_the_same_however_it_is_read() {
        let (rope_layers, windows) = (vec![true], vec![None]);
        let one = ModelShape { n_layers: 1, n_experts: 4, n_vocab: 64, ..ModelShape::published_4b() };
        let shape = ModelShape { rope_layers, windows, ..one };
        let file = file(&shape, true).expect("possible");
        assert_eq!(file.header.model_shape().expect("a model"), shape);
        let tensor = file.header.require_tensor("blk.0.attn_q.weight").expect("there");
        let whole = file.read_tensor(tensor).expect("read");
        assert_eq!(whole[18..20], SCALE);
        for (start, len) in [(0, 5), (1, 40), (17, 3), (1000, 77)] {
            let mut part = vec![0; len];
            file.read_range(tensor, start as u64, &mut part).expect("read");
            assert_eq!(part, whole[start..start + len], "{start}");
        }
        let norm = file.header.require_tensor("output_norm.weight").expect("there");
        assert!(file.read_tensor(norm).expect("read").chunks(4).all(|four| four == 1f32.to_le_bytes()));
    }
}
