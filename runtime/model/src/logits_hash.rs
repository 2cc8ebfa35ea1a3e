//! The hash of the logits that a token was chosen by.

use sha2::{Digest as _, Sha256};

/// A hash of the logits that a token was chosen by: the first 128 bits of the SHA-256 of their bits, little-endian, token by token of the
/// vocabulary. `None` for a token that a grammar left no choice about.
pub type LogitsHash = Option<[u8; 16]>;

/// The hash of one row of logits.
pub(crate) fn hash_logits(logits: &[f32]) -> [u8; 16] {
    const AT_ONCE: usize = 1024;
    let mut hash = Sha256::new();
    let mut bytes = [0; 4 * AT_ONCE];
    for logits in logits.chunks(AT_ONCE) {
        let bytes = &mut bytes[..4 * logits.len()];
        bytes.as_chunks_mut::<4>().0.iter_mut().zip(logits).for_each(|(four, logit)| *four = logit.to_le_bytes());
        hash.update(bytes);
    }
    let [whole @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _]: [u8; 32] = hash.finalize().into();
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_that_of_the_bits() {
        let logits: Vec<f32> = (0..2500).map(|i| i as f32 - 1000.5).collect();
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        assert_eq!(hash_logits(&logits)[..], Sha256::digest(&bytes)[..16]);
        assert_ne!(hash_logits(&[0.0]), hash_logits(&[-0.0]));
    }
}
