//! What is told of requests and answers to whoever runs the server: numbers and names of its own, never a text or a key.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::clock::now;
use crate::job::{Ending, Finished};

/// Records that wait to be written, at most; what comes beyond them is dropped rather than waited for.
pub(crate) const RECORDS: usize = 1024;

/// Addresses that are named in records. Others are strangers' words.
const KNOWN: [&str; 16] = [
    "/",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/health",
    "/metrics",
    "/props",
    "/slots",
    "/openapi.json",
    "/experts",
];

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Record {
    /// Seconds since 1970.
    pub time: u64,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum What {
    /// A request was answered, or its answer began.
    Request {
        /// GET, POST, OPTIONS or another.
        method: &'static str,
        /// The address, where it is one of the server's.
        path: &'static str,
        /// The status of the response.
        status: u16,
        /// From the head of the request to the head of the response.
        time: Duration,
    },
    /// An answer ended.
    Answer {
        /// Tokens of the prompt.
        prompt: usize,
        /// Of them, tokens that were not run again.
        cached: usize,
        /// Tokens made.
        made: usize,
        /// Why it ended: `stop`, `length`, `gone` (nobody waits for it) or `failed`.
        ending: &'static str,
        /// Time in the queue.
        waited: Duration,
        /// Time from there to the first token.
        prompt_time: Duration,
        /// Time from there to the last.
        answer_time: Duration,
    },
    /// Something failed: what, without folders.
    Failed(String),
}

impl Record {
    pub(crate) fn new(what: What) -> Self {
        Self { time: now(), what }
    }

    /// A request, of which only what is known is named.
    pub(crate) fn request(method: &str, path: &str, status: u16, time: Duration) -> Self {
        let method = ["GET", "POST", "OPTIONS", "HEAD"].into_iter().find(|known| *known == method).unwrap_or("other");
        let path = KNOWN.into_iter().find(|known| *known == path).unwrap_or("other");
        Self::new(What::Request { method, path, status, time })
    }

    /// An answer's end; without an `ending`, it failed or nobody waits for it, as `otherwise` says.
    pub(crate) fn answer(finished: &Finished, otherwise: Option<&'static str>) -> Self {
        let ending = otherwise.unwrap_or(match finished.ending {
            Ending::EndToken | Ending::StopString(_) => "stop",
            Ending::Length => "length",
        });
        let &Finished { prompt, cached, made, waited, prompt_time, answer_time, .. } = finished;
        Self::new(What::Answer { prompt, cached, made, ending, waited, prompt_time, answer_time })
    }

    /// The record as an object.
    pub fn json(&self) -> Value {
        let ms = |time: &Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        match &self.what {
            What::Request { method, path, status, time } => json!({
                "time": self.time, "event": "request", "method": method, "path": path, "status": status, "ms": ms(time),
            }),
            What::Answer { prompt, cached, made, ending, waited, prompt_time, answer_time } => json!({
                "time": self.time, "event": "answer", "prompt_tokens": prompt, "cached_tokens": cached,
                "completion_tokens": made, "ending": ending, "queue_ms": ms(waited), "prompt_ms": ms(prompt_time),
                "answer_ms": ms(answer_time),
            }),
            What::Failed(why) => json!({"time": self.time, "event": "failed", "error": why}),
        }
    }
}

/// Where records go; nothing is the end of them.
pub(crate) struct Log(SyncSender<Option<Record>>);

impl Log {
    pub(crate) fn new(records: SyncSender<Option<Record>>) -> Self {
        Self(records)
    }

    pub(crate) fn tell(&self, record: Record) {
        match self.0.try_send(Some(record)) {
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}
