//! Prompt to answer for one conversation: feed, choose, stream, count.
//!
//! Drives one [`Answer`] in one [`Session`] and measures it. It never prints: text goes to the caller as it is made.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use st_experts::StoreStats;

use crate::answer::{Answer, FinishReason, GenerateOptions};
use crate::constraint::Constraint;
use crate::draft::DraftStats;
use crate::error::ModelError;
use crate::logits_hash::LogitsHash;
use crate::observer::Observer;
use crate::sampler::Sampler;
use crate::session::Session;
use crate::work::Work;

/// Time and work of one answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct GenerateStats {
    /// Tokens of the prompt that were run (those still in the KV cache are not run again).
    pub prompt_tokens: usize,
    /// From the first prompt token to the logits of the last.
    pub prompt_time: Duration,
    /// Tokens that the model was run for after the prompt.
    pub generated_tokens: usize,
    /// Time of those.
    pub generate_time: Duration,
    /// Work of the prompt.
    pub prompt_work: Work,
    /// Work of the tokens after it.
    pub generate_work: Work,
    /// What the expert cache did for the prompt, and for other conversations with the engine meanwhile.
    pub prompt_experts: StoreStats,
    /// What it did for the tokens after it.
    pub generate_experts: StoreStats,
    /// What became of drafts.
    pub drafts: DraftStats,
}

impl GenerateStats {
    /// Prompt tokens per second; 0 where there was none.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens as f64, self.prompt_time)
    }

    /// Generated tokens per second; 0 where there was none.
    pub fn generate_rate(&self) -> f64 {
        rate(self.generated_tokens as f64, self.generate_time)
    }

    /// Bytes of weights touched per second while generating.
    pub fn weight_bandwidth(&self) -> f64 {
        rate(self.generate_work.weight_bytes as f64, self.generate_time)
    }
}

fn rate(amount: f64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { amount / time.as_secs_f64() }
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The text, without end tokens and stop strings; empty where the file has no tokenizer.
    pub text: String,
    /// The token ids made, an end token included.
    pub ids: Vec<u32>,
    /// As [`Answer::logits_hashes`].
    pub logits: Vec<LogitsHash>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Time and work.
    pub stats: GenerateStats,
}

impl Generation {
    /// Whether it ended before it was over: somebody stopped it, or something failed.
    pub fn is_cut_off(&self) -> bool {
        matches!(self.finish_reason, FinishReason::Cancelled | FinishReason::Error)
    }
}

/// An answer that failed on the way: why, and what there is of it.
#[derive(Debug)]
pub struct GenerateError(Box<Failure>);

#[derive(Debug)]
struct Failure {
    error: ModelError,
    answer: Generation,
}

impl GenerateError {
    fn new(error: ModelError, answer: Generation) -> Self {
        Self(Box::new(Failure { error, answer }))
    }

    /// What went wrong.
    pub fn error(&self) -> &ModelError {
        &self.0.error
    }

    /// The answer up to there.
    pub fn answer(&self) -> &Generation {
        &self.0.answer
    }
}

impl std::fmt::Display for GenerateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.error.fmt(f)
    }
}

impl std::error::Error for GenerateError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0.error)
    }
}

impl From<ModelError> for GenerateError {
    /// A failure before there is an answer.
    fn from(error: ModelError) -> Self {
        let answer = Generation {
            text: String::new(),
            ids: Vec::new(),
            logits: Vec::new(),
            finish_reason: FinishReason::Error,
            stats: GenerateStats::default(),
        };
        Self::new(error, answer)
    }
}

/// Runs `prompt` in `session` and answers it. `observer` follows all that is run, and may break while the prompt is; `on_text`
/// is called with the text of every token made (empty where nothing can be shown yet), and may break to stop.
///
/// A cancelled or failed answer leaves the session usable: it holds the tokens that were run.
///
/// # Errors
/// [`ModelError::EmptyPrompt`], [`ModelError::ContextFull`] before anything is run; otherwise what the model or the
/// sampler meets.
pub fn generate(
    session: &mut Session,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    observer: &mut dyn Observer,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    generate_within(session, prompt, sampler, options, None, observer, on_text)
}

/// [`generate()`] of an answer that fits `constraint`.
///
/// # Errors
/// As [`generate()`].
pub fn generate_within(
    session: &mut Session,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    constraint: Option<Box<dyn Constraint>>,
    observer: &mut dyn Observer,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    let room = (session.ctx() - session.len()).saturating_sub(prompt.len());
    let mut answer = Answer::new(session.engine(), options, room).within(constraint);
    let mut stats = GenerateStats::default();
    let outcome = drive(session, prompt, sampler, &mut answer, &mut stats, observer, on_text);
    let finish_reason = match &outcome {
        Ok(()) | Err(ModelError::Cancelled) => FinishReason::Cancelled,
        Err(_) => FinishReason::Error,
    };
    // It may have ended for a reason of its own.
    let finish_reason = answer.finish(finish_reason);
    let rest = answer.take_text();
    if !rest.is_empty() {
        // The answer is over: a wish to stop changes nothing any more.
        let _ = on_text(rest);
    }
    let (text, ids, logits) = answer.into_parts();
    let answer = Generation { text, ids, logits, finish_reason, stats };
    match outcome {
        Ok(()) | Err(ModelError::Cancelled) => Ok(answer),
        Err(error) => Err(GenerateError::new(error, answer)),
    }
}

/// Runs the prompt and then the answer's tokens, until that is over or `on_text` breaks.
fn drive(
    session: &mut Session,
    prompt: &[u32],
    sampler: &mut Sampler,
    answer: &mut Answer,
    stats: &mut GenerateStats,
    observer: &mut dyn Observer,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<(), ModelError> {
    let clock = Clock::start(session);
    let ran = session.run(prompt, observer);
    (stats.prompt_tokens, stats.prompt_time, stats.prompt_work, stats.prompt_experts) = clock.read(session);
    ran?;
    sampler.begin(session.tokens());
    session.begin_answer();

    let clock = Clock::start(session);
    let drafts = session.draft_stats();
    let generated = (|| {
        // Whatever is run ahead, each token is shown as if it had come alone; the last one's text comes with what was held back.
        let mut show = |answer: &mut Answer, _: &[f32]| match answer.finish_reason() {
            None => on_text(answer.take_text()),
            Some(_) => ControlFlow::Continue(()),
        };
        while let ControlFlow::Continue(token) = session.settle(answer, sampler, &mut show)? {
            session.run_ahead(token, answer, observer)?;
        }
        Ok(())
    })();
    (stats.generated_tokens, stats.generate_time, stats.generate_work, stats.generate_experts) = clock.read(session);
    stats.drafts = session.draft_stats().since(&drafts);
    generated
}

/// Where time and work stood.
struct Clock {
    tokens: usize,
    start: Instant,
    work: Work,
    experts: StoreStats,
}

impl Clock {
    fn start(session: &Session) -> Self {
        let (tokens, work, experts) = (session.len(), session.work(), session.engine().store_stats());
        Self { tokens, start: Instant::now(), work, experts }
    }

    /// What came since: tokens run, time, work, and what the expert cache did.
    fn read(&self, session: &Session) -> (usize, Duration, Work, StoreStats) {
        let experts = session.engine().store_stats().since(&self.experts);
        (session.len() - self.tokens, self.start.elapsed(), session.work().since(&self.work), experts)
    }
}
