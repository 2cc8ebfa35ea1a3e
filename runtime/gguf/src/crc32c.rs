//! CRC-32C, the checksum of every part of a file's data.
//!
//! Owns the choice of the code that computes it: summing what is read must not be felt beside reading it.

use crc_fast::{CrcAlgorithm, Digest};

const ALGORITHM: CrcAlgorithm = CrcAlgorithm::Crc32Iscsi;

/// The sum of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(ALGORITHM, bytes) as u32
}

/// The sum of what `sum` is the sum of, followed by `bytes`.
pub fn crc32c_append(sum: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(ALGORITHM, u64::from(!sum));
    digest.update(bytes);
    digest.finalize() as u32
}

/// The sum of two texts in a row, from the sum of each and the length of the second. Takes microseconds.
pub fn crc32c_combine(first: u32, second: u32, second_len: usize) -> u32 {
    crc_fast::checksum_combine(ALGORITHM, first.into(), second.into(), second_len as u64) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the standard defines it, bit by bit.
    fn slowly(bytes: &[u8]) -> u32 {
        let step = |sum: u32, _| (sum >> 1) ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 };
        !bytes.iter().fold(!0, |sum, &byte| (0..8).fold(sum ^ u32::from(byte), step))
    }

    #[test]
    fn sums_are_the_standards_however_they_are_computed() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i * i % 251) as u8).collect();
        for len in (0..300).chain([511, 1023, 4096, 5000]) {
            let (first, second) = bytes[..len].split_at(len / 3);
            let sum = slowly(&bytes[..len]);
            assert_eq!(crc32c(&bytes[..len]), sum, "{len}");
            assert_eq!(crc32c_append(crc32c(first), second), sum, "{len}");
            assert_eq!(crc32c_combine(crc32c(first), crc32c(second), second.len()), sum, "{len}");
        }
    }
}
