//! `st-tool perplexity`: how well a model predicts a text.
//!
//! The text is cut into windows of `--ctx` tokens, each run by itself; the second half of a window is scored, so that
//! every scored token has at least half a window before it. That is llama.cpp's method and gives comparable figures.

use std::process::ExitCode;

use serde_json::json;
use st_model::sampler::SamplerError;
use st_model::{ModelError, Session};

use super::engine;
use crate::cli::PerplexityArgs;
use crate::context::Context;
use crate::models::Model;
use crate::report::Advice;
use crate::{input, ui};

const DEFAULT_WINDOW: usize = 512;
/// The longest text that is scored: days of work. It is held in memory, with its tokens.
const MAX_TEXT: u64 = 256 << 20;
/// The share of a budget that a text may take: it and its tokens fit the reserve.
const BUDGET_SHARE: u64 = 256;

pub(crate) fn run(args: &PerplexityArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let (most, more) = match args.engine.memory {
        Some(budget) => (MAX_TEXT.min(budget / BUDGET_SHARE), "more than this budget holds"),
        None => (MAX_TEXT, "more than can be scored; score a part of it"),
    };
    let text = input::text(&args.file, most, more, &context.interrupt)?;
    let file = Model::resolve(&args.model)?.open_gguf(context)?;
    let limit = file.header.model_shape()?.context_length;
    let window = args.ctx.unwrap_or(DEFAULT_WINDOW.min(limit));
    let engine = engine::load_file(file, &args.engine, Some(window), None, context)?;
    let ids = engine.tokenizer().ok_or(ModelError::NoTokenizer)?.encode(&text, true)?;
    drop(text);
    if ids.len() < 2 || window < 2 {
        let message = format!("{} gives {} tokens, of which none can be scored", input::name(&args.file), ids.len());
        return Err(Advice::new(message, "give a text of some hundred words at least").into());
    }

    let mut session = Session::new(&engine)?;
    let bar = ui::count_bar(context.ui, "scoring", ids.len() as u64);
    let mut score = Score::default();
    let mut windows = 0;
    for chunk in chunks(&ids, window) {
        context.interrupt.check()?;
        session.reset();
        let first = chunk.len() / 2;
        session.run_all(chunk, &mut (), |position, logits| {
            if context.interrupt.raised() {
                return Err(ModelError::Cancelled);
            }
            if position + 1 >= first.max(1)
                && let Some(&next) = chunk.get(position + 1)
            {
                score.add(negative_log_likelihood(logits, next)?);
            }
            Ok(())
        })?;
        windows += 1;
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let (perplexity, error) = (score.perplexity(), score.standard_error());
    match args.json {
        true => ui::print_json(&json!({
            "perplexity": perplexity,
            "standard_error": error,
            "tokens_scored": score.count,
            "windows": windows,
            "ctx": window,
        }))?,
        false => ui::print(&format!(
            "perplexity {perplexity:.4} ± {error:.4} ({} tokens scored in {windows} windows of {window})\n",
            score.count
        ))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whole windows only, unless the text is shorter than one.
fn chunks(ids: &[u32], window: usize) -> impl Iterator<Item = &[u32]> {
    let whole = if ids.len() < window { ids.len() } else { window };
    ids.chunks_exact(whole)
}

/// -ln of the probability that softmax gives token `id`.
fn negative_log_likelihood(logits: &[f32], id: u32) -> Result<f64, ModelError> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
    let logit = logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let nll = sum.ln() - f64::from(logit - highest);
    match nll.is_nan() {
        true => Err(SamplerError::NotFinite { id: id as usize, got: logit }.into()),
        false => Ok(nll),
    }
}

/// Sums of negative log-likelihoods and of their squares.
#[derive(Debug, Default)]
struct Score {
    count: u64,
    sum: f64,
    squares: f64,
}

impl Score {
    fn add(&mut self, nll: f64) {
        self.count += 1;
        self.sum += nll;
        self.squares += nll * nll;
    }

    fn perplexity(&self) -> f64 {
        (self.sum / self.count as f64).exp()
    }

    /// The standard error of the mean, carried through the exponential.
    fn standard_error(&self) -> f64 {
        let n = self.count as f64;
        let mean = self.sum / n;
        let variance = (self.squares / n - mean * mean).max(0.0);
        self.perplexity() * (variance / (n - 1.0).max(1.0)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_model_has_the_perplexity_of_its_vocabulary() {
        let mut score = Score::default();
        for id in 0..7 {
            score.add(negative_log_likelihood(&[0.5; 7], id).expect("a number"));
        }
        assert!((score.perplexity() - 7.0).abs() < 1e-9);
        assert!(score.standard_error().abs() < 1e-6);
    }

    #[test]
    fn a_short_text_is_one_window_and_a_rest_is_left_out() {
        let ids: Vec<u32> = (0..10).collect();
        assert_eq!(chunks(&ids, 4).map(<[u32]>::len).collect::<Vec<_>>(), [4, 4]);
        assert_eq!(chunks(&ids, 100).map(<[u32]>::len).collect::<Vec<_>>(), [10]);
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        assert!(negative_log_likelihood(&[f32::NAN, 0.0], 1).is_err());
    }
}
