//! `st-tool perplexity`: how well a model predicts a text.
//!
//! The text is cut into windows of `--ctx` tokens, each run by itself; the second half of a window is scored, so that
//! every scored token has at least half a window before it. That is llama.cpp's method and gives comparable figures.

use std::ffi::OsStr;
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;
use st_model::sampler::SamplerError;
use st_model::{Engine, ModelError, Session};

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

    let against = args.against.as_deref().map(|model| against(model, args, window, context)).transpose()?;
    if let Some(other) = against.as_ref().filter(|other| other.n_vocab() != engine.n_vocab()) {
        let message = format!("the models have vocabularies of {} and {} tokens", engine.n_vocab(), other.n_vocab());
        return Err(Advice::new(message, "--against takes the same model in another type").into());
    }
    let mut against = against.as_ref().map(Against::new).transpose()?;
    let mut session = Session::new(&engine)?;
    let bar = ui::count_bar(context.ui, "scoring", ids.len() as u64);
    let mut score = Score::default();
    let mut windows = 0;
    for chunk in chunks(&ids, window) {
        context.interrupt.check()?;
        session.reset();
        let first = chunk.len() / 2;
        if let Some(against) = &mut against {
            against.session.reset();
        }
        let mut done = 0;
        // Piece by piece, where the logits of one model wait for those of another.
        for piece in chunk.chunks(if against.is_some() { PIECE } else { chunk.len() }) {
            let scored = |position: usize| chunk.get(position + 1).copied().filter(|_| position + 1 >= first.max(1));
            let mut kept = against.as_mut().map(|against| &mut against.rows);
            if let Some(rows) = &mut kept {
                rows.clear();
            }
            session.run_all(piece, &mut (), |position, logits| {
                if context.interrupt.raised() {
                    return Err(ModelError::Cancelled);
                }
                if let Some(next) = scored(done + position) {
                    score.add(negative_log_likelihood(logits, next)?);
                    if let Some(rows) = &mut kept {
                        rows.extend_from_slice(logits);
                    }
                }
                Ok(())
            })?;
            if let Some(against) = &mut against {
                against.compare(piece, |position| scored(done + position))?;
            }
            done += piece.len();
        }
        windows += 1;
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let (perplexity, error) = (score.perplexity(), score.standard_error());
    match args.json {
        true => {
            let mut object = json!({
                "perplexity": perplexity,
                "standard_error": error,
                "tokens_scored": score.count,
                "windows": windows,
                "ctx": window,
            });
            if let Some(Against { divergence, change, .. }) = &against {
                let of = |of: &Score| json!({"mean": of.mean(), "standard_error": of.error_of_mean()});
                object["against"] = json!({"kl_divergence": of(divergence), "log_perplexity_change": of(change)});
            }
            ui::print_json(&object)?;
        }
        false => {
            ui::print(&format!(
                "perplexity {perplexity:.4} ± {error:.4} ({} tokens scored in {windows} windows of {window})\n",
                score.count
            ))?;
            if let Some(Against { divergence, change, .. }) = &against {
                ui::print(&format!(
                    "KL divergence {:.5} ± {:.5}, ln of the perplexity {:+.5} ± {:.5}\n",
                    divergence.mean(),
                    divergence.error_of_mean(),
                    change.mean(),
                    change.error_of_mean()
                ))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Loads the model that this one is compared with.
fn against(name: &OsStr, args: &PerplexityArgs, window: usize, context: &Context) -> anyhow::Result<Arc<Engine>> {
    engine::load_file(Model::resolve(name)?.open_gguf(context)?, &args.engine, Some(window), None, context)
}

/// Tokens that go through both models before their logits are compared.
const PIECE: usize = 32;

/// Another model on the same text: how far the first one's predictions are from its.
struct Against {
    session: Session,
    /// Logits of the first model, of the tokens of a piece that are scored.
    rows: Vec<f32>,
    /// The other's distribution's divergence from that of the first.
    divergence: Score,
    /// How much less likely the first finds what comes, as a difference of logarithms.
    change: Score,
}

impl Against {
    fn new(engine: &Arc<Engine>) -> Result<Self, ModelError> {
        let session = Session::new(engine)?;
        Ok(Self { session, rows: Vec::new(), divergence: Score::default(), change: Score::default() })
    }

    /// Runs a piece, of which the first model's logits are there.
    fn compare(&mut self, piece: &[u32], scored: impl Fn(usize) -> Option<u32>) -> Result<(), ModelError> {
        let Self { session, rows, divergence, change } = self;
        let mut rows = rows.chunks_exact(session.engine().n_vocab());
        session.run_all(piece, &mut (), |position, logits| {
            if let Some((next, first)) = scored(position).and_then(|next| Some((next, rows.next()?))) {
                divergence.add(kl_divergence(logits, first));
                change.add(negative_log_likelihood(first, next)? - negative_log_likelihood(logits, next)?);
            }
            Ok(())
        })
    }
}

/// Σ p · ln(p / q), where p and q are what softmax makes of these logits.
fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
        f64::from(highest) + sum.ln()
    };
    let (log_p, log_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) - log_p, f64::from(q) - log_q);
        p.exp() * (p - q)
    });
    terms.sum()
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

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    fn error_of_mean(&self) -> f64 {
        let n = self.count as f64;
        let variance = (self.squares / n - self.mean() * self.mean()).max(0.0);
        (variance / (n - 1.0).max(1.0)).sqrt()
    }

    fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    /// The standard error of the mean, carried through the exponential.
    fn standard_error(&self) -> f64 {
        self.perplexity() * self.error_of_mean()
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
    fn a_distribution_diverges_from_others_alone() {
        let (p, q) = ([1.0, 2.0, -3.0, 0.5], [1.0, 0.0, 0.0, 0.0]);
        assert!(kl_divergence(&p, &p).abs() < 1e-12 && kl_divergence(&p, &p.map(|x| x + 7.0)).abs() < 1e-6);
        assert!(kl_divergence(&p, &q) > 0.1);
        let halves = kl_divergence(&[0.0, 0.0], &[0.0, -3f32.ln()]);
        assert!((halves - (0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln())).abs() < 1e-6, "{halves}");
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        assert!(negative_log_likelihood(&[f32::NAN, 0.0], 1).is_err());
    }
}
