//! What a server is told when it starts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use st_grammar::Grammars;
use st_model::{DraftLimit, ModelDigest};

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Names of the model; the first is the one that it is listed by.
    pub names: Vec<String>,
    /// Conversations at once.
    pub parallel: usize,
    /// Requests that may wait for one to end.
    pub queue: usize,
    /// The largest body of a request, in bytes.
    pub max_body: usize,
    /// Tokens of prompts that are read between the tokens of others' answers, at most; none where they are to be as many as keep those
    /// tokens close to each other.
    pub prompt_piece: Option<usize>,
    /// How far answers are drafted.
    pub draft: DraftLimit,
    /// Time that answers under way get when the server ends.
    pub grace: Duration,
    /// Keys of which a request must have one; none where everybody may ask.
    pub keys: Vec<String>,
    /// Origins of web pages that may ask, such as `https://chat.example`; `*` for all.
    pub cors: Vec<String>,
    /// Where texts are kept for the time after the server, and in how many bytes.
    pub cache: Option<(PathBuf, u64)>,
    /// What the model is called in receipts, and its hashes; without them none are given.
    pub receipts: Option<Arc<(String, ModelDigest)>>,
    /// What the model says of itself under `meta` in the list of models, such as its file's name.
    pub about: serde_json::Map<String, serde_json::Value>,
}

impl Settings {
    /// What most want, for a model of that name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            names: vec![name.into()],
            parallel: 4,
            queue: 64,
            max_body: 8 << 20,
            prompt_piece: None,
            draft: DraftLimit::Auto,
            grace: Duration::from_secs(10),
            keys: Vec::new(),
            cors: Vec::new(),
            cache: None,
            receipts: None,
            about: serde_json::Map::new(),
        }
    }

    /// Memory that a server with these settings takes beside a model with `n_vocab` tokens, in bytes, for
    /// [`LoadOptions::beside`](st_model::LoadOptions::beside).
    pub fn memory(&self, n_vocab: usize) -> u64 {
        // The bodies that are read at once, and what is made of one; buffers of connections and of answers between layers; events that
        // wait for readers.
        let bodies = BODIES as u64 * self.max_body as u64 + self.max_body as u64 * 2;
        let connections = CONNECTIONS as u64 * CONNECTION_BYTES;
        let grammars = Grammars::memory(n_vocab, self.parallel);
        let between = (ANSWERS_BETWEEN * n_vocab * size_of::<f32>()) as u64 + (2 << 20);
        bodies + connections + grammars + between + (self.parallel as u64) * (256 << 10) + (2 << 20)
    }
}

/// Connections at once.
pub(crate) const CONNECTIONS: usize = 256;

/// What a connection takes, about, where its client sends what clients send.
const CONNECTION_BYTES: u64 = 16 << 10;

/// Largest bodies that there is memory for at once: all bodies together are kept below them.
pub(crate) const BODIES: usize = 2;

/// Rows of answers between two layers of a prompt, at most: as many as small buffers hold.
pub(crate) const ANSWERS_BETWEEN: usize = 8;
