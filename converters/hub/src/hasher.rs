//! The hash of a content, of the kind that the hub states for it.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::api::{Digest, Entry};

/// Bytes that a file is read in.
const CHUNK: usize = 512 << 10;

/// The running hash that proves a file.
pub(crate) enum Hasher {
    Sha256(Sha256),
    GitSha1(Sha1),
}

impl Hasher {
    pub(crate) fn new(entry: &Entry) -> Hasher {
        match entry.digest {
            Digest::Sha256(_) => Hasher::Sha256(Sha256::new()),
            // Git hashes a header in front of the content.
            Digest::GitSha1(_) => Hasher::GitSha1(Sha1::new_with_prefix(format!("blob {}\0", entry.size))),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(h) => h.update(bytes),
            Hasher::GitSha1(h) => h.update(bytes),
        }
    }

    pub(crate) fn hex(self) -> String {
        let bytes = match self {
            Hasher::Sha256(h) => h.finalize().to_vec(),
            Hasher::GitSha1(h) => h.finalize().to_vec(),
        };
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The hash of a file on disk.
    pub(crate) fn of_file(path: &Path, entry: &Entry) -> io::Result<String> {
        let (mut file, mut hasher, mut buffer) = (File::open(path)?, Hasher::new(entry), vec![0; CHUNK]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.hex()),
                n => hasher.update(&buffer[..n]),
            }
        }
    }
}
