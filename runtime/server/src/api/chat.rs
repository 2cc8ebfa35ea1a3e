//! OpenAI's chat completions.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use st_model::Engine;

use super::openai::{self, Frame, Streaming};
use super::{logprobs, openai::usage};
use crate::answers::{Answers, Encoder, Events, Whole, stream};
use crate::app::App;
use crate::error::{ApiError, Form, json_response};
use crate::fields::{Fields, is_nothing};
use crate::job::{Event, Finished};
use crate::prepare;
use crate::sampling::Sampling;

/// `POST /v1/chat/completions`.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request).await.unwrap_or_else(|error| error.response(Form::OpenAi))
}

async fn answer(app: &App, request: Request) -> Result<Response, ApiError> {
    let mut fields = openai::fields(app, request).await?;
    let engine = Arc::clone(app.engine()?);
    let streaming = Streaming::take(&mut fields)?;
    let sampling = sampling(&mut fields, &engine)?;
    let list = fields.list("messages")?.ok_or_else(|| ApiError::field("messages", "it is missing"))?;
    let wanted = sampling.clone();
    let jobs = prepare::apart(app, move |engine| {
        let ids = prepare::chat(engine, &prepare::messages(list)?, &[])?;
        wanted.jobs(engine, &ids, "messages")
    });
    let answers = Answers::new(app.queue.submit(jobs.await?).inspect_err(|_| app.metrics.refused.add(1))?);
    if streaming.is_on {
        let frame = Frame::new(app, &engine, "chatcmpl-", "chat.completion.chunk", sampling.options.seed);
        let all = vec![None; sampling.n];
        return Ok(stream(answers, Chunks { frame, engine, sampling, with_usage: streaming.with_usage, all }));
    }
    let frame = Frame::new(app, &engine, "chatcmpl-", "chat.completion", sampling.options.seed);
    let wholes = answers.collect().await?;
    Ok(json_response(&whole(&frame, &engine, &sampling, &wholes)))
}

fn sampling(fields: &mut Fields, engine: &Engine) -> Result<Sampling, ApiError> {
    let mut sampling = Sampling::take(fields, &["max_completion_tokens", "max_tokens", "n_predict"], engine.n_vocab())?;
    let top = Sampling::top_logprobs(fields, "top_logprobs")?;
    sampling.logprobs = match (fields.flag("logprobs")?, top) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::field("top_logprobs", "it needs `logprobs`: true")),
    };
    fields.refuse("response_format", |format| format["type"] == "text")?;
    // Tools that may not be called change nothing but the prompt.
    fields.refuse("tools", is_nothing)?;
    fields.refuse("tool_choice", |choice| choice == "none" || choice == "auto")?;
    fields.refuse("echo", is_nothing)?;
    Ok(sampling)
}

fn whole(frame: &Frame, engine: &Engine, sampling: &Sampling, wholes: &[Whole]) -> Value {
    let finished: Vec<Finished> = wholes.iter().filter_map(|whole| whole.finished).collect();
    let choice = |(index, whole): (usize, &Whole)| {
        json!({
            "index": index,
            "message": {"role": "assistant", "content": whole.text},
            "logprobs": logprobs_of(engine, sampling, whole),
            "finish_reason": whole.finished.as_ref().map(openai::finish_reason),
            "seed": sampling.seed_of(index),
        })
    };
    let mut object = frame.with(wholes.iter().enumerate().map(choice).collect());
    object["usage"] = usage(&finished, sampling.n);
    object["timings"] = finished.first().map_or(Value::Null, openai::timings);
    object
}

fn logprobs_of(engine: &Engine, sampling: &Sampling, whole: &Whole) -> Value {
    match (sampling.logprobs, engine.tokenizer()) {
        (Some(_), Some(tokenizer)) => logprobs::of_chat(tokenizer, &whole.tokens),
        _ => Value::Null,
    }
}

/// The chunks of a stream.
struct Chunks {
    frame: Frame,
    engine: Arc<Engine>,
    sampling: Sampling,
    with_usage: bool,
    /// How each answer ended.
    all: Vec<Option<Finished>>,
}

impl Chunks {
    fn chunk(&self, out: &mut Events, index: usize, delta: Value, reason: Option<&str>, logprobs: Value) {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
        self.send(out, self.frame.with(vec![choice]));
    }

    fn send(&self, out: &mut Events, mut chunk: Value) {
        if self.with_usage && chunk.get("usage").is_none() {
            chunk["usage"] = Value::Null;
        }
        out.data(chunk);
    }
}

impl Encoder for Chunks {
    fn begin(&mut self, out: &mut Events) {
        for index in 0..self.sampling.n {
            self.chunk(out, index, json!({"role": "assistant", "content": ""}), None, Value::Null);
        }
    }

    fn event(&mut self, index: usize, event: Event, out: &mut Events) {
        match event {
            Event::Piece(piece) => {
                let logprobs = match (self.sampling.logprobs, self.engine.tokenizer()) {
                    (Some(_), Some(tokenizer)) => logprobs::of_chat(tokenizer, &piece.tokens),
                    _ => Value::Null,
                };
                self.chunk(out, index, json!({"content": piece.text}), None, logprobs);
            }
            Event::Finished(finished) => {
                self.all[index] = Some(finished);
                self.chunk(out, index, json!({}), Some(openai::finish_reason(&finished)), Value::Null);
            }
            Event::Begun | Event::Failed(_) => {}
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.with_usage {
            let finished: Vec<Finished> = self.all.iter().flatten().copied().collect();
            let mut last = self.frame.with(Vec::new());
            last["usage"] = usage(&finished, self.sampling.n);
            last["timings"] = finished.first().map_or(Value::Null, openai::timings);
            self.send(out, last);
        }
        out.data("[DONE]");
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.data(error.json(Form::OpenAi));
        out.data("[DONE]");
    }
}
