//! What OpenAI's chat and text completions have in common: the frame of a response, usage, and why an answer ended.

use std::sync::Arc;

use axum::extract::Request;
use serde_json::{Value, json};
use st_grammar::Source;
use st_model::{Engine, ModelDigest};

use crate::answers::Whole;
use crate::app::App;
use crate::body;
use crate::clock::now;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::job::{Ending, Finished, Proof};
use crate::tools::{Choice, Tool, Tools};

/// The fields of a request whose `model` is this one.
///
/// # Errors
/// Where the server is not ready, the body is no JSON object, or another model is asked for.
pub(crate) async fn fields(app: &App, request: Request) -> Result<Fields, ApiError> {
    app.engine()?;
    let bytes = body::read(app, request).await?;
    let mut fields = Fields::of(body::json(&bytes.bytes)?, "")?;
    check_model(app, &mut fields)?;
    Ok(fields)
}

/// The proofs of one request's answers, where receipts are given.
pub(crate) struct Proofs {
    model: Option<Arc<(String, ModelDigest)>>,
    of: Vec<Option<Box<Proof>>>,
}

impl Proofs {
    /// None yet, for `n` answers.
    pub(crate) fn new(app: &App, n: usize) -> Self {
        Self { model: app.settings.receipts.clone(), of: (0..n).map(|_| None).collect() }
    }

    /// The proof of an answer is there.
    pub(crate) fn take(&mut self, index: usize, proof: Box<Proof>) {
        self.of[index] = Some(proof);
    }

    /// Puts the receipt of an answer that has ended beside it.
    pub(crate) fn put(&self, index: usize, choice: &mut Value) {
        if let (Some(model), Some(proof)) = (self.model.as_deref(), &self.of[index]) {
            choice["receipt"] = json!(proof.receipt(model));
        }
    }

    /// Puts receipts beside whole answers.
    pub(crate) fn put_all(app: &App, wholes: Vec<Whole>, object: &mut Value) {
        let mut proofs = Self::new(app, wholes.len());
        for (index, whole) in wholes.into_iter().enumerate() {
            proofs.of[index] = whole.proof;
            proofs.put(index, &mut object["choices"][index]);
        }
    }
}

/// Refuses a request for another model.
pub(crate) fn check_model(app: &App, fields: &mut Fields) -> Result<(), ApiError> {
    match fields.text("model")? {
        Some(model) if !app.settings.names.contains(&model) => Err(no_model(app, &model)),
        _ => Ok(()),
    }
}

/// The error for a model that is not here.
pub(crate) fn no_model(app: &App, model: &str) -> ApiError {
    let shown: String = model.chars().take(100).collect();
    ApiError {
        param: Some("model".to_owned()),
        ..ApiError::new(
            hyper::StatusCode::NOT_FOUND,
            "model_not_found",
            format!("the model {shown:?} is not here; this is {}", app.settings.names.join(", ")),
        )
    }
}

/// The functions that may be called.
///
/// # Errors
/// What is wrong with one, or with the choice.
pub(crate) fn tools(fields: &mut Fields) -> Result<Tools, ApiError> {
    let mut tools = Vec::new();
    for (index, tool) in fields.list("tools")?.unwrap_or_default().into_iter().enumerate() {
        let name = format!("tools[{index}]");
        let mut tool = Fields::of(tool, &name)?;
        let mut function = match (tool.text("type")?.as_deref(), tool.within("function")?) {
            (None | Some("function"), Some(function)) => function,
            _ => return Err(ApiError::field(name, "only functions are supported")),
        };
        tools.push(Tool::take(&mut function, "parameters")?);
    }
    let choice = match fields.take("tool_choice") {
        None => Choice::Auto,
        Some(Value::String(kind)) => choice(&kind)?,
        Some(one) => match one["function"]["name"].as_str() {
            Some(name) => Choice::One(name.to_owned()),
            None => return Err(ApiError::field("tool_choice", "auto, none, required, or a function is expected")),
        },
    };
    let parallel = parallel(fields)?;
    Tools::new(tools, choice, parallel)
}

/// A choice by its name.
///
/// # Errors
/// Where it is none.
pub(crate) fn choice(kind: &str) -> Result<Choice, ApiError> {
    match kind {
        "auto" => Ok(Choice::Auto),
        "none" => Ok(Choice::Never),
        "required" => Ok(Choice::Always),
        _ => Err(ApiError::field("tool_choice", "auto, none, required, or a function is expected")),
    }
}

/// Whether there may be several calls in one answer.
///
/// # Errors
/// Where it is no flag.
pub(crate) fn parallel(fields: &mut Fields) -> Result<bool, ApiError> {
    const NAME: &str = "parallel_tool_calls";
    match fields.look(NAME).is_some() {
        true => fields.flag(NAME),
        false => Ok(true),
    }
}

/// What answers have to fit, besides calls.
///
/// # Errors
/// Where it is of no kind that there is.
pub(crate) fn format(fields: &mut Fields, name: &str) -> Result<Option<Source>, ApiError> {
    let Some(mut format) = fields.within(name)? else { return Ok(None) };
    match format.text("type")?.as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => match format.take("schema") {
            None => Ok(Some(Source::JsonObject)),
            // Other servers take a schema here, too.
            Some(schema) => Ok(Some(Source::Schema(schema))),
        },
        Some("json_schema") => {
            // Chat completions have an object of its own for it, responses do not.
            let mut within = format.within("json_schema")?;
            let schema = within.as_mut().unwrap_or(&mut format).need("schema")?;
            Ok(Some(Source::Schema(schema)))
        }
        _ => Err(ApiError::field(format.name("type"), "text, json_object or json_schema is expected")),
    }
}

/// Whether and how a response is streamed.
pub(crate) struct Streaming {
    pub(crate) is_on: bool,
    pub(crate) with_usage: bool,
}

impl Streaming {
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let is_on = fields.flag("stream")?;
        let with_usage = match fields.within("stream_options")? {
            Some(mut options) => options.flag("include_usage")?,
            None => false,
        };
        Ok(Self { is_on, with_usage })
    }
}

/// What all responses and chunks of one request have in common.
#[derive(Clone)]
pub(crate) struct Frame {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    seed: u64,
    fingerprint: String,
}

impl Frame {
    pub(crate) fn new(app: &App, engine: &Engine, prefix: &str, object: &'static str, seed: u64) -> Self {
        let fingerprint = format!("st-{}-{}", env!("CARGO_PKG_VERSION"), engine.fingerprint());
        Self { id: app.id(prefix), object, created: now(), model: app.name().to_owned(), seed, fingerprint }
    }

    /// An object with `choices`.
    pub(crate) fn with(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
            "choices": choices,
        })
    }
}

/// Why an answer ended, in OpenAI's words.
pub(crate) fn finish_reason(finished: &Finished) -> &'static str {
    match finished.ending {
        Ending::EndToken | Ending::StopString(_) => "stop",
        Ending::Length => "length",
    }
}

/// What the answers to some prompts took: each prompt counts once, with its `n` answers.
pub(crate) fn usage(all: &[Finished], n: usize) -> Value {
    let first = || all.iter().step_by(n.max(1));
    let prompt: usize = first().map(|finished| finished.prompt).sum();
    let cached: usize = first().map(|finished| finished.cached).sum();
    let made: usize = all.iter().map(|finished| finished.made).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}

/// The chunk at the end of a stream that says what its answers took.
pub(crate) fn last_chunk(frame: &Frame, all: &[Option<Finished>], n: usize) -> Value {
    let finished: Vec<Finished> = all.iter().flatten().copied().collect();
    let mut last = frame.with(Vec::new());
    last["usage"] = usage(&finished, n);
    last["timings"] = finished.first().map_or(Value::Null, timings);
    last
}

/// Where the time of an answer went.
pub(crate) fn timings(finished: &Finished) -> Value {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let each = |n: usize, time: std::time::Duration| if n == 0 { 0.0 } else { ms(time) / n as f64 };
    let rate = |n: usize, time: std::time::Duration| if time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() };
    json!({
        "queue_ms": ms(finished.waited),
        "cache_n": finished.cached,
        "prompt_n": finished.prompt - finished.cached,
        "prompt_ms": ms(finished.prompt_time),
        "prompt_per_token_ms": each(finished.prompt - finished.cached, finished.prompt_time),
        "prompt_per_second": rate(finished.prompt - finished.cached, finished.prompt_time),
        "predicted_n": finished.made,
        "predicted_ms": ms(finished.answer_time),
        // The first token comes with the prompt.
        "predicted_per_token_ms": each(finished.made.saturating_sub(1), finished.answer_time),
        "predicted_per_second": rate(finished.made.saturating_sub(1), finished.answer_time),
    })
}
