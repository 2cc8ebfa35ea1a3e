//! What the addresses and the engine's thread have in common: a job goes one way, its events the other.
//!
//! Every API makes jobs of its requests and texts of their events; the scheduler knows no API. A dropped [`JobHandle`] ends the
//! job's work: nothing is computed for nobody.

use std::task::{Context, Poll};
use std::time::Duration;

use st_grammar::Grammar;
use st_model::sampler::Sampler;
use st_model::{Engine, GenerateOptions, Logprobs, ModelDigest, Proven, Receipt, Settings};
use tokio::sync::mpsc;

/// Events of one job that wait for their reader, at most. Whoever reads so slowly waits for himself.
pub(crate) const EVENTS: usize = 256;

/// One answer to be made.
pub(crate) struct Job {
    /// The text that it goes on with; not empty, and no longer than the context.
    pub(crate) prompt: Vec<u32>,
    /// How its tokens are chosen.
    pub(crate) sampler: Sampler,
    /// When it ends, besides the model's own end tokens.
    pub(crate) limits: GenerateOptions,
    /// Whether to tell how likely its tokens were, and how many others beside each.
    pub(crate) logprobs: Option<usize>,
    /// What its tokens must fit.
    pub(crate) grammar: Option<Grammar>,
    /// How it is made, where a receipt is wanted.
    pub(crate) settings: Option<Box<Settings>>,
}

impl Job {
    /// Has it proven: `fit` is what its tokens must fit.
    pub(crate) fn prove(&mut self, engine: &Engine, fit: Option<serde_json::Value>) {
        self.limits.hash_logits = true;
        self.settings = Some(Box::new(Settings::of(engine, &self.sampler, &self.limits, fit)));
    }
}

/// What a receipt says of an answer, but for the model.
#[derive(Debug)]
pub(crate) struct Proof {
    pub(crate) prompt: Vec<u32>,
    pub(crate) settings: Box<Settings>,
    pub(crate) seed: u64,
    pub(crate) answer: Proven,
}

impl Proof {
    /// The receipt, where the model is called so and has these hashes.
    pub(crate) fn receipt(&self, (name, digest): &(String, ModelDigest)) -> Receipt {
        let settings = Settings::clone(&self.settings);
        Receipt::new(name, digest, &self.prompt, settings, self.seed, self.answer.clone())
    }
}

/// What becomes of a job, in order: `Begun`, any number of `Piece`s, and `Finished`; or `Failed` anywhere.
#[derive(Debug)]
pub(crate) enum Event {
    /// The prompt has been read.
    Begun,
    /// More of the answer.
    Piece(Piece),
    /// What it is proven by, where that is wanted, just before it ends.
    Proven(Box<Proof>),
    /// The answer is whole.
    Finished(Finished),
    /// There is no more of it.
    Failed(Failure),
}

/// A part of an answer.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    /// Whole characters; may be empty.
    pub(crate) text: String,
    /// The tokens of it, where logprobs were asked for, end tokens left out.
    pub(crate) tokens: Vec<Token>,
}

/// A token and how likely it was.
#[derive(Debug)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) logprobs: Logprobs,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By an end token.
    EndToken,
    /// Before a stop string, by its index.
    StopString(usize),
    /// At the limit of tokens, or of the context; or the server ends.
    Length,
}

/// What an answer took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    pub(crate) ending: Ending,
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// Those of them that were not computed again.
    pub(crate) cached: usize,
    /// Tokens of the answer, an end token included.
    pub(crate) made: usize,
    /// In the queue.
    pub(crate) waited: Duration,
    /// From there to the first token.
    pub(crate) prompt_time: Duration,
    /// From there to the last.
    pub(crate) answer_time: Duration,
}

/// Why an answer failed.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// Something could not be computed: what, without folders.
    Model(String),
    /// The server ends, and the job had not begun.
    Ending,
}

/// The reader's end of a job.
#[derive(Debug)]
pub(crate) struct JobHandle {
    events: mpsc::Receiver<Event>,
}

impl JobHandle {
    /// A handle, and where its events come from.
    pub(crate) fn new() -> (Self, mpsc::Sender<Event>) {
        let (sender, events) = mpsc::channel(EVENTS);
        (Self { events }, sender)
    }

    /// The next event; `None` after the last.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(cx)
    }
}
