//! OpenAI's text completions: prompts as texts or token ids.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use st_grammar::Source;
use st_model::Engine;

use super::logprobs;
use super::openai::{self, Frame, Proofs, Streaming, usage};
use crate::answers::{Answers, Encoder, Events, Whole, stream};
use crate::app::App;
use crate::error::{ApiError, Form, json_response};
use crate::fields::{Fields, is_nothing};
use crate::job::{Event, Finished};
use crate::prepare;
use crate::sampling::Sampling;

/// Prompts of a request, at most.
const PROMPTS: usize = 64;

/// A prompt as it is given.
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// `POST /v1/completions`.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request).await.unwrap_or_else(|error| error.response(Form::OpenAi))
}

async fn answer(app: &App, request: Request) -> Result<Response, ApiError> {
    let mut fields = openai::fields(app, request).await?;
    let engine = Arc::clone(app.engine()?);
    let streaming = Streaming::take(&mut fields)?;
    let mut sampling = sampling(&mut fields, &engine)?;
    sampling.take_receipt(&mut fields, app)?;
    let prompts = prompts(fields.need("prompt")?)?;
    let format = openai::format(&mut fields, "response_format")?;
    let (wanted, tokens, shared) = (sampling.clone(), Arc::clone(&app.tokens), Arc::clone(&engine));
    let jobs = prepare::apart(app, move |engine| {
        let compile = |source| tokens.compile(&shared, &source, "response_format");
        let fit = format.as_ref().map(Source::to_json);
        let grammar = format.map(compile).transpose()?;
        let mut jobs = Vec::new();
        for prompt in prompts {
            let ids = match prompt {
                Prompt::Ids(ids) => ids,
                Prompt::Text(text) => prepare::text(engine, &text, "prompt")?,
            };
            jobs.extend(wanted.jobs(engine, &ids, "prompt")?);
        }
        jobs.iter_mut().for_each(|job| job.grammar = grammar.clone());
        if wanted.receipt {
            jobs.iter_mut().for_each(|job| job.prove(engine, fit.clone()));
        }
        Ok(jobs)
    });
    let jobs = jobs.await?;
    let n = jobs.len();
    let answers = Answers::new(app.queue.submit(jobs).inspect_err(|_| app.metrics.refused.add(1))?);
    let frame = Frame::new(app, &engine, "cmpl-", "text_completion", sampling.options.seed);
    if streaming.is_on {
        let (all, offsets) = (vec![None; n], vec![0; n]);
        let (with_usage, proofs) = (streaming.with_usage, Proofs::new(app, n));
        return Ok(stream(answers, Chunks { frame, engine, sampling, with_usage, all, proofs, offsets }));
    }
    let wholes = answers.collect().await?;
    let mut object = whole(&frame, &engine, &sampling, &wholes);
    Proofs::put_all(app, wholes, &mut object);
    Ok(json_response(&object))
}

fn sampling(fields: &mut Fields, engine: &Engine) -> Result<Sampling, ApiError> {
    let mut sampling = Sampling::take(fields, &["max_tokens", "n_predict"], engine.n_vocab())?;
    // OpenAI's default, so that a forgotten limit is no endless text.
    sampling.max_tokens = sampling.max_tokens.or(Some(16));
    let top = Sampling::top_logprobs(fields, "top_logprobs")?;
    sampling.logprobs = match fields.take("logprobs") {
        None | Some(Value::Bool(false)) => None,
        Some(Value::Bool(true)) => Some(top.unwrap_or(0)),
        Some(number) => {
            let mut one = Fields::of(json!({"logprobs": number}), "")?;
            Sampling::top_logprobs(&mut one, "logprobs")?
        }
    };
    fields.refuse("echo", is_nothing)?;
    Ok(sampling)
}

/// One prompt or several, as texts or as token ids.
fn prompts(value: Value) -> Result<Vec<Prompt>, ApiError> {
    let wrong = || ApiError::field("prompt", "a text is expected, token ids, or a list of either");
    let one = |value: Value| match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(items) => {
            let ids: Option<Vec<u32>> = items.iter().map(|id| id.as_u64().and_then(|id| id.try_into().ok())).collect();
            ids.map(Prompt::Ids).ok_or_else(wrong)
        }
        _ => Err(wrong()),
    };
    match value {
        Value::Array(items) if items.first().is_some_and(|first| !first.is_number()) => {
            if items.len() > PROMPTS {
                return Err(ApiError::field("prompt", format!("at most {PROMPTS} prompts are expected")));
            }
            items.into_iter().map(one).collect()
        }
        other => Ok(vec![one(other)?]),
    }
}

fn logprobs_of(engine: &Engine, sampling: &Sampling, tokens: &[crate::job::Token], offset: &mut usize) -> Value {
    match (sampling.logprobs, engine.tokenizer()) {
        (Some(_), Some(tokenizer)) => logprobs::of_text(tokenizer, tokens, offset),
        _ => Value::Null,
    }
}

fn whole(frame: &Frame, engine: &Engine, sampling: &Sampling, wholes: &[Whole]) -> Value {
    let finished: Vec<Finished> = wholes.iter().filter_map(|whole| whole.finished).collect();
    let choice = |(index, whole): (usize, &Whole)| {
        json!({
            "index": index,
            "text": whole.text,
            "logprobs": logprobs_of(engine, sampling, &whole.tokens, &mut 0),
            "finish_reason": whole.finished.as_ref().map(openai::finish_reason),
            "seed": sampling.seed_of(index % sampling.n),
        })
    };
    let mut object = frame.with(wholes.iter().enumerate().map(choice).collect());
    object["usage"] = usage(&finished, sampling.n);
    object["timings"] = finished.first().map_or(Value::Null, openai::timings);
    object
}

/// The chunks of a stream.
struct Chunks {
    frame: Frame,
    engine: Arc<Engine>,
    sampling: Sampling,
    with_usage: bool,
    /// How each answer ended.
    all: Vec<Option<Finished>>,
    proofs: Proofs,
    /// Characters of each answer so far.
    offsets: Vec<usize>,
}

impl Chunks {
    fn chunk(&self, out: &mut Events, index: usize, text: &str, reason: Option<&str>, logprobs: Value) {
        let mut choice = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason});
        if reason.is_some() {
            self.proofs.put(index, &mut choice);
        }
        let mut chunk = self.frame.with(vec![choice]);
        if self.with_usage {
            chunk["usage"] = Value::Null;
        }
        out.data(chunk);
    }
}

impl Encoder for Chunks {
    fn begin(&mut self, _: &mut Events) {}

    fn event(&mut self, index: usize, event: Event, out: &mut Events) {
        match event {
            Event::Piece(piece) => {
                let offset = &mut self.offsets[index];
                let logprobs = logprobs_of(&self.engine, &self.sampling, &piece.tokens, offset);
                self.chunk(out, index, &piece.text, None, logprobs);
            }
            Event::Finished(finished) => {
                self.all[index] = Some(finished);
                self.chunk(out, index, "", Some(openai::finish_reason(&finished)), Value::Null);
            }
            Event::Proven(proof) => self.proofs.take(index, proof),
            Event::Begun | Event::Failed(_) => {}
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.with_usage {
            out.data(openai::last_chunk(&self.frame, &self.all, self.sampling.n));
        }
        out.data("[DONE]");
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.data(error.json(Form::OpenAi));
        out.data("[DONE]");
    }
}
