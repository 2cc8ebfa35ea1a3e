//! OpenAI's chat completions.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use st_model::Engine;

use super::openai::{self, Frame, Proofs, Streaming};
use super::{logprobs, openai::usage};
use crate::answers::{Encoder, Events, Whole, stream};
use crate::app::App;
use crate::asked::Asked;
use crate::error::{ApiError, Form, json_response};
use crate::fields::{Fields, is_nothing};
use crate::job::{Ending, Event, Finished, Token};
use crate::prepare;
use crate::sampling::Sampling;
use crate::tools::{self, Fit, Part, Split};

/// `POST /v1/chat/completions`.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request).await.unwrap_or_else(|error| error.response(Form::OpenAi))
}

async fn answer(app: &App, request: Request) -> Result<Response, ApiError> {
    let mut fields = openai::fields(app, request).await?;
    let engine = Arc::clone(app.engine()?);
    let streaming = Streaming::take(&mut fields)?;
    let mut sampling = sampling(&mut fields, &engine)?;
    sampling.take_receipt(&mut fields, app)?;
    let tools = openai::tools(&mut fields)?;
    let format = openai::format(&mut fields, "response_format")?;
    let list = fields.list("messages")?.ok_or_else(|| ApiError::field("messages", "it is missing"))?;
    let calls = Calls { may_call: tools.may_call(), ids: app.id("call_") };
    let asked = Asked {
        messages: prepare::messages(list)?,
        param: "messages",
        fit: Fit { tools, format },
        format_param: "response_format",
        sampling: sampling.clone(),
    };
    let (answers, _) = asked.submit(app).await?;
    if streaming.is_on {
        let frame = Frame::new(app, &engine, "chatcmpl-", "chat.completion.chunk", sampling.options.seed);
        let all = vec![None; sampling.n];
        let splits = (0..sampling.n).map(|_| (Split::new(calls.may_call), 0)).collect();
        let with_usage = streaming.with_usage;
        let proofs = Proofs::new(app, sampling.n);
        return Ok(stream(answers, Chunks { frame, engine, sampling, with_usage, all, proofs, calls, splits }));
    }
    let frame = Frame::new(app, &engine, "chatcmpl-", "chat.completion", sampling.options.seed);
    let wholes = answers.collect().await?;
    let mut object = whole(&frame, &engine, &sampling, &calls, &wholes);
    Proofs::put_all(app, wholes, &mut object);
    Ok(json_response(&object))
}

fn sampling(fields: &mut Fields, engine: &Engine) -> Result<Sampling, ApiError> {
    let mut sampling = Sampling::take(fields, &["max_completion_tokens", "max_tokens", "n_predict"], engine.n_vocab())?;
    let top = Sampling::top_logprobs(fields, "top_logprobs")?;
    sampling.logprobs = match (fields.flag("logprobs")?, top) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::field("top_logprobs", "it needs `logprobs`: true")),
    };
    fields.refuse("echo", is_nothing)?;
    Ok(sampling)
}

/// Names of an answer's calls.
struct Calls {
    may_call: bool,
    ids: String,
}

impl Calls {
    fn id(&self, index: usize, number: usize) -> String {
        format!("{}{index:02}{number:02}", self.ids)
    }

    fn message(&self, index: usize, text: &str) -> (Value, bool) {
        let (text, calls) = tools::collect(text, self.may_call);
        if calls.is_empty() {
            return (json!({"role": "assistant", "content": text}), false);
        }
        let call = |(number, call): (usize, &tools::Call)| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": self.id(index, number), "type": "function", "function": function})
        };
        let calls: Vec<Value> = calls.iter().enumerate().map(call).collect();
        let content = if text.is_empty() { Value::Null } else { text.into() };
        (json!({"role": "assistant", "content": content, "tool_calls": calls}), true)
    }
}

/// Why an answer ended; a call is a reason of its own.
fn reason(finished: &Finished, called: bool) -> &'static str {
    if called && finished.ending == Ending::EndToken { "tool_calls" } else { openai::finish_reason(finished) }
}

fn whole(frame: &Frame, engine: &Engine, sampling: &Sampling, calls: &Calls, wholes: &[Whole]) -> Value {
    let finished: Vec<Finished> = wholes.iter().filter_map(|whole| whole.finished).collect();
    let choice = |(index, whole): (usize, &Whole)| {
        let (message, called) = calls.message(index, &whole.text);
        json!({
            "index": index,
            "message": message,
            "logprobs": logprobs_of(engine, sampling, &whole.tokens),
            "finish_reason": whole.finished.as_ref().map(|finished| reason(finished, called)),
            "seed": sampling.seed_of(index),
        })
    };
    let mut object = frame.with(wholes.iter().enumerate().map(choice).collect());
    object["usage"] = usage(&finished, sampling.n);
    object["timings"] = finished.first().map_or(Value::Null, openai::timings);
    object
}

fn logprobs_of(engine: &Engine, sampling: &Sampling, tokens: &[Token]) -> Value {
    match (sampling.logprobs, engine.tokenizer()) {
        (Some(_), Some(tokenizer)) => logprobs::of_chat(tokenizer, tokens),
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
    proofs: Proofs,
    calls: Calls,
    /// Each answer's text on its way to parts, and its calls so far.
    splits: Vec<(Split, usize)>,
}

impl Chunks {
    fn chunk(&self, out: &mut Events, index: usize, delta: Value, reason: Option<&str>, logprobs: Value) {
        let mut choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
        if reason.is_some() {
            self.proofs.put(index, &mut choice);
        }
        self.send(out, self.frame.with(vec![choice]));
    }

    /// Text and calls of an answer; `logprobs` go along with the first.
    fn parts(&mut self, out: &mut Events, index: usize, parts: Vec<Part>, logprobs: Value) {
        let mut logprobs = Some(logprobs);
        for part in parts {
            let calls = &mut self.splits[index].1;
            let call = |call: Value| json!({"tool_calls": [call]});
            let delta = match part {
                Part::Text(text) => json!({"content": text}),
                Part::Begin(name) => {
                    *calls += 1;
                    let (number, id) = (*calls - 1, self.calls.id(index, *calls - 1));
                    call(
                        json!({"index": number, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}),
                    )
                }
                Part::Arguments(text) => {
                    call(json!({"index": calls.saturating_sub(1), "function": {"arguments": text}}))
                }
                Part::End => continue,
            };
            self.chunk(out, index, delta, None, logprobs.take().unwrap_or_default());
        }
        if let Some(logprobs) = logprobs.filter(|logprobs| !logprobs.is_null()) {
            self.chunk(out, index, json!({"content": ""}), None, logprobs);
        }
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
                let logprobs = logprobs_of(&self.engine, &self.sampling, &piece.tokens);
                let mut parts = Vec::new();
                self.splits[index].0.push(&piece.text, &mut parts);
                self.parts(out, index, parts, logprobs);
            }
            Event::Finished(finished) => {
                let mut parts = Vec::new();
                self.splits[index].0.finish(&mut parts);
                self.parts(out, index, parts, Value::Null);
                self.all[index] = Some(finished);
                let reason = reason(&finished, self.splits[index].0.called);
                self.chunk(out, index, json!({}), Some(reason), Value::Null);
            }
            Event::Proven(proof) => self.proofs.take(index, proof),
            Event::Begun | Event::Failed(_) => {}
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.with_usage {
            self.send(out, openai::last_chunk(&self.frame, &self.all, self.sampling.n));
        }
        out.data("[DONE]");
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.data(error.json(Form::OpenAi));
        out.data("[DONE]");
    }
}
