//! Prompt to answer: feed, sample, stream, stop.
//!
//! Owns when an answer ends (an end token, a stop string, the limit, the context, the caller) and what is told about
//! it. It never prints: text goes to the caller as it is made, whole characters only.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;
use st_experts::StoreStats;

use crate::error::ModelError;
use crate::sampler::Sampler;
use crate::session::{Session, Work};
use crate::text::TextStream;

/// When an answer ends, besides the model's own end tokens.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// At most this many tokens; `None` goes on until the context is full.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
}

/// How far an answer is.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// So many tokens of the prompt were run.
    Prompt(usize),
    /// A token was made; its text, empty where nothing can be shown yet.
    Text(&'a str),
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token, or a stop string.
    Stop,
    /// The limit of tokens, or the end of the context.
    Length,
    /// The caller asked for it.
    Cancelled,
}

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
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Time and work.
    pub stats: GenerateStats,
}

/// Runs `prompt` in `session` and answers it. `on_step` is called after each layer of the prompt and for every token made, and
/// may break to stop.
///
/// A cancelled or failed answer leaves the session usable: it holds the tokens that were run.
///
/// # Errors
/// [`ModelError::EmptyPrompt`], [`ModelError::ContextFull`] before anything is run; otherwise what the model or the
/// sampler meets.
pub fn generate(
    session: &mut Session<'_>,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on_step: &mut dyn FnMut(Step<'_>) -> ControlFlow<()>,
) -> Result<Generation, ModelError> {
    let engine = session.engine();
    let room = session.ctx() - session.len();
    if prompt.len() > room {
        return Err(ModelError::ContextFull { needed: session.len() + prompt.len(), ctx: session.ctx() });
    }
    for &id in prompt {
        sampler.accept(id);
    }
    let mut answer = Generation {
        text: String::new(),
        ids: Vec::with_capacity(options.max_tokens.unwrap_or(256).min(room)),
        finish_reason: FinishReason::Length,
        stats: GenerateStats { prompt_tokens: prompt.len(), ..GenerateStats::default() },
    };
    let (before, experts_before) = (session.work(), engine.store_stats());
    let start = Instant::now();
    if session.feed(prompt, &mut |done| on_step(Step::Prompt(done)))?.is_break() {
        answer.finish_reason = FinishReason::Cancelled;
        return Ok(answer);
    }
    answer.stats.prompt_time = start.elapsed();
    answer.stats.prompt_work = session.work().since(&before);
    let (before, experts_between) = (session.work(), engine.store_stats());
    answer.stats.prompt_experts = experts_between.since(&experts_before);

    let mut stream = TextStream::new(options.stop.clone());
    let max_tokens = options.max_tokens.unwrap_or(usize::MAX);
    let start = Instant::now();
    while answer.ids.len() < max_tokens {
        let id = sampler.sample(session.logits())?;
        sampler.accept(id);
        answer.ids.push(id);
        if engine.end_ids().contains(&id) {
            answer.finish_reason = FinishReason::Stop;
            break;
        }
        let step = stream.push(engine.tokenizer().map_or(&[][..], |tokenizer| tokenizer.visible_bytes(id)));
        answer.text.push_str(step.text);
        let stopped = step.stopped.is_some();
        if on_step(Step::Text(step.text)).is_break() {
            answer.finish_reason = FinishReason::Cancelled;
            break;
        }
        if stopped {
            answer.finish_reason = FinishReason::Stop;
            break;
        }
        if session.len() == session.ctx() || answer.ids.len() == max_tokens {
            break;
        }
        session.forward(&[id])?;
        answer.stats.generated_tokens += 1;
    }
    answer.stats.generate_time = start.elapsed();
    answer.stats.generate_work = session.work().since(&before);
    answer.stats.generate_experts = engine.store_stats().since(&experts_between);
    let rest = stream.finish();
    if !rest.text.is_empty() {
        answer.text.push_str(rest.text);
        // The answer is over: a wish to stop changes nothing any more.
        let _ = on_step(Step::Text(rest.text));
    }
    Ok(answer)
}
