//! OpenAI's responses, without a memory of its own: whoever asks brings the whole conversation along.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::openai;
use crate::answers::{Encoder, Events, stream};
use crate::app::App;
use crate::asked::Asked;
use crate::clock::now;
use crate::error::{ApiError, Form, json_response};
use crate::fields::{Fields, is_nothing};
use crate::job::{Ending, Event, Finished};
use crate::prepare;
use crate::sampling::Sampling;
use crate::tools::{self, Call, Choice, Fit, Part, Split, Tool, Tools};

/// `POST /v1/responses`.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request).await.unwrap_or_else(|error| error.response(Form::OpenAi))
}

async fn answer(app: &App, request: Request) -> Result<Response, ApiError> {
    let mut fields = openai::fields(app, request).await?;
    let is_streamed = fields.flag("stream")?;
    let about = About::take(&mut fields)?;
    let messages = messages(&mut fields, about.instructions.as_deref())?;
    let tools = tools(&mut fields)?;
    let format = match fields.within("text")? {
        Some(mut text) => openai::format(&mut text, "format")?,
        None => None,
    };
    for name in ["previous_response_id", "conversation", "background", "prompt", "max_tool_calls", "top_logprobs"] {
        fields.refuse(name, is_nothing)?;
    }
    let mut sampling = Sampling::take(&mut fields, &["max_output_tokens"], app.engine()?.n_vocab())?;
    sampling.n = 1;
    let frame = Frame::new(app, about, &tools, &sampling);
    let asked = Asked { messages, param: "input", fit: Fit { tools, format }, format_param: "text.format", sampling };
    let (answers, _) = asked.submit(app).await?;
    if is_streamed {
        let split = Split::new(frame.may_call);
        return Ok(stream(answers, Items { frame, split, number: 0, output: Vec::new(), open: None, finished: None }));
    }
    let whole = answers.collect().await?.into_iter().next().unwrap_or_default();
    let (text, calls) = tools::collect(&whole.text, frame.may_call);
    let mut output = Vec::new();
    if !text.is_empty() || calls.is_empty() {
        output.push(frame.message(0, &text, "completed"));
    }
    for call in &calls {
        output.push(frame.call(output.len(), call, "completed"));
    }
    Ok(json_response(&frame.ended(output, whole.finished.as_ref())))
}

/// What a request says that a response repeats.
struct About {
    instructions: Option<String>,
    metadata: Value,
    tools: Value,
    choice: Value,
}

impl About {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            instructions: fields.text("instructions")?,
            metadata: fields.take("metadata").unwrap_or_else(|| json!({})),
            tools: fields.look("tools").cloned().unwrap_or_else(|| json!([])),
            choice: fields.look("tool_choice").cloned().unwrap_or_else(|| json!("auto")),
        })
    }
}

/// What a response and its events have in common.
struct Frame {
    id: String,
    /// Items are named so, and numbered.
    item_ids: String,
    created: u64,
    model: String,
    about: About,
    parallel: bool,
    may_call: bool,
    temperature: f32,
    top_p: f32,
    max_tokens: Option<usize>,
    seed: u64,
}

impl Frame {
    fn new(app: &App, about: About, tools: &Tools, sampling: &Sampling) -> Self {
        Self {
            id: app.id("resp_"),
            item_ids: app.id(""),
            created: now(),
            model: app.name().to_owned(),
            about,
            parallel: tools.parallel,
            may_call: tools.may_call(),
            temperature: sampling.options.temperature,
            top_p: sampling.options.top_p,
            max_tokens: sampling.max_tokens,
            seed: sampling.options.seed,
        }
    }

    fn response(&self, status: &str, output: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "background": false,
            "error": null, "incomplete_details": null, "instructions": self.about.instructions,
            "max_output_tokens": self.max_tokens, "model": self.model, "output": output,
            "parallel_tool_calls": self.parallel, "previous_response_id": null,
            "reasoning": {"effort": null, "summary": null}, "store": false, "temperature": self.temperature,
            "text": {"format": {"type": "text"}}, "tool_choice": self.about.choice, "tools": self.about.tools,
            "top_p": self.top_p, "truncation": "disabled", "usage": null, "user": null, "metadata": self.about.metadata,
            "seed": self.seed,
        })
    }

    /// The response of an answer that has ended.
    fn ended(&self, output: Vec<Value>, finished: Option<&Finished>) -> Value {
        let is_cut = finished.is_none_or(|finished| finished.ending == Ending::Length);
        let mut response = self.response(if is_cut { "incomplete" } else { "completed" }, output);
        if is_cut {
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        if let Some(finished) = finished {
            response["usage"] = json!({
                "input_tokens": finished.prompt,
                "input_tokens_details": {"cached_tokens": finished.cached},
                "output_tokens": finished.made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": finished.prompt + finished.made,
            });
        }
        response
    }

    fn message(&self, index: usize, text: &str, status: &str) -> Value {
        let content = if status == "in_progress" { json!([]) } else { json!([text_part(text)]) };
        let id = format!("msg_{}{index:02}", self.item_ids);
        json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
    }

    fn call(&self, index: usize, call: &Call, status: &str) -> Value {
        json!({
            "id": format!("fc_{}{index:02}", self.item_ids), "type": "function_call", "status": status,
            "call_id": format!("call_{}{index:02}", self.item_ids), "name": call.name, "arguments": call.arguments,
        })
    }
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

/// The item that is being made.
enum Item {
    Text(String),
    Call(Call),
}

/// The events of a stream: items, one after the other.
struct Items {
    frame: Frame,
    split: Split,
    /// Events so far.
    number: usize,
    /// Items that are whole.
    output: Vec<Value>,
    open: Option<Item>,
    finished: Option<Finished>,
}

impl Items {
    fn send(&mut self, out: &mut Events, mut event: Value, kind: &'static str) {
        event["type"] = kind.into();
        event["sequence_number"] = self.number.into();
        self.number += 1;
        out.named(kind, event);
    }

    /// An event about the item that is open.
    fn about(&mut self, out: &mut Events, mut event: Value, kind: &'static str) {
        let prefix = if matches!(self.open, Some(Item::Call(_))) { "fc" } else { "msg" };
        let index = self.output.len();
        event["item_id"] = format!("{prefix}_{}{index:02}", self.frame.item_ids).into();
        event["output_index"] = index.into();
        if prefix == "msg" {
            event["content_index"] = 0.into();
        }
        self.send(out, event, kind);
    }

    fn open(&mut self, item: Item, out: &mut Events) {
        self.close(out, "completed");
        let index = self.output.len();
        let (shown, is_text) = match &item {
            Item::Text(_) => (self.frame.message(index, "", "in_progress"), true),
            Item::Call(call) => (self.frame.call(index, call, "in_progress"), false),
        };
        self.open = Some(item);
        self.send(out, json!({"output_index": index, "item": shown}), "response.output_item.added");
        if is_text {
            self.about(out, json!({"part": text_part("")}), "response.content_part.added");
        }
    }

    fn close(&mut self, out: &mut Events, status: &'static str) {
        let index = self.output.len();
        let item = match &self.open {
            None => return,
            Some(Item::Text(text)) => {
                let (text, item) = (text.clone(), self.frame.message(index, text, status));
                self.about(out, json!({"text": text, "logprobs": []}), "response.output_text.done");
                self.about(out, json!({"part": text_part(&text)}), "response.content_part.done");
                item
            }
            Some(Item::Call(call)) => {
                let (event, item) =
                    (json!({"arguments": call.arguments, "name": call.name}), self.frame.call(index, call, status));
                self.about(out, event, "response.function_call_arguments.done");
                item
            }
        };
        self.open = None;
        self.send(out, json!({"output_index": index, "item": item}), "response.output_item.done");
        self.output.push(item);
    }

    fn parts(&mut self, parts: Vec<Part>, out: &mut Events) {
        for part in parts {
            match part {
                Part::Text(text) => {
                    if !matches!(self.open, Some(Item::Text(_))) {
                        self.open(Item::Text(String::new()), out);
                    }
                    if let Some(Item::Text(all)) = &mut self.open {
                        all.push_str(&text);
                    }
                    self.about(out, json!({"delta": text, "logprobs": []}), "response.output_text.delta");
                }
                Part::Begin(name) => self.open(Item::Call(Call { name, arguments: String::new() }), out),
                Part::Arguments(text) => {
                    if let Some(Item::Call(call)) = &mut self.open {
                        call.arguments.push_str(&text);
                    }
                    self.about(out, json!({"delta": text}), "response.function_call_arguments.delta");
                }
                Part::End => self.close(out, "completed"),
            }
        }
    }
}

impl Encoder for Items {
    fn begin(&mut self, out: &mut Events) {
        for kind in ["response.created", "response.in_progress"] {
            let response = self.frame.response("in_progress", Vec::new());
            self.send(out, json!({"response": response}), kind);
        }
    }

    fn event(&mut self, _: usize, event: Event, out: &mut Events) {
        let mut parts = Vec::new();
        match event {
            Event::Piece(piece) => {
                self.split.push(&piece.text, &mut parts);
                self.parts(parts, out);
            }
            Event::Finished(finished) => {
                self.split.finish(&mut parts);
                self.parts(parts, out);
                if self.output.is_empty() && self.open.is_none() {
                    self.open(Item::Text(String::new()), out);
                }
                self.close(out, if finished.ending == Ending::Length { "incomplete" } else { "completed" });
                self.finished = Some(finished);
            }
            Event::Begun | Event::Proven(_) | Event::Failed(_) => {}
        }
    }

    fn end(&mut self, out: &mut Events) {
        let response = self.frame.ended(std::mem::take(&mut self.output), self.finished.as_ref());
        let kind = if response["status"] == "completed" { "response.completed" } else { "response.incomplete" };
        self.send(out, json!({"response": response}), kind);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        let mut response = self.frame.response("failed", std::mem::take(&mut self.output));
        response["error"] = json!({"code": error.code, "message": error.message});
        self.send(out, json!({"response": response}), "response.failed");
    }
}

/// Instructions and items in the form of chat completions.
fn messages(fields: &mut Fields, instructions: Option<&str>) -> Result<Vec<Value>, ApiError> {
    let mut out: Vec<Value> = Vec::new();
    if let Some(instructions) = instructions.filter(|text| !text.is_empty()) {
        out.push(json!({"role": "system", "content": instructions}));
    }
    match fields.need("input")? {
        Value::String(text) => out.push(json!({"role": "user", "content": text})),
        Value::Array(items) if items.is_empty() => return Err(ApiError::field("input", "it is empty")),
        Value::Array(items) => {
            for (index, item) in items.into_iter().enumerate() {
                one_item(item, &format!("input[{index}]"), &mut out)?;
            }
        }
        _ => return Err(ApiError::field("input", "a text is expected, or a list of items")),
    }
    let messages = prepare::messages(out)?;
    Ok(one_system(messages))
}

/// Templates know one system message, at the beginning.
fn one_system(messages: Vec<Value>) -> Vec<Value> {
    let (system, mut others): (Vec<Value>, Vec<Value>) = messages.into_iter().partition(|m| m["role"] == "system");
    let texts: Vec<&str> = system.iter().filter_map(|message| message["content"].as_str()).collect();
    if !texts.is_empty() {
        others.insert(0, json!({"role": "system", "content": texts.join("\n\n")}));
    }
    others
}

fn one_item(item: Value, name: &str, out: &mut Vec<Value>) -> Result<(), ApiError> {
    let missing = |field: &str| ApiError::field(format!("{name}.{field}"), "it is missing");
    match item["type"].as_str() {
        None | Some("message") => out.push(json!({"role": item["role"], "content": item["content"]})),
        // What other models thought is not said to this one.
        Some("reasoning") => {}
        Some("function_call") => {
            let called = item["name"].as_str().ok_or_else(|| missing("name"))?;
            let function = json!({"name": called, "arguments": item["arguments"]});
            let call = json!({"id": item["call_id"], "type": "function", "function": function});
            // Calls belong to the message before them.
            match out.last_mut().filter(|last| last["role"] == "assistant") {
                Some(last) => match last.get_mut("tool_calls").and_then(Value::as_array_mut) {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                },
                None => out.push(json!({"role": "assistant", "content": "", "tool_calls": [call]})),
            }
        }
        Some("function_call_output") => {
            let output = match item.get("output") {
                Some(Value::String(text)) => text.clone(),
                Some(parts @ Value::Array(_)) => prepare::content_text(parts.clone(), &format!("{name}.output"))?,
                Some(other) if !other.is_null() => other.to_string(),
                _ => return Err(missing("output")),
            };
            out.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": output}));
        }
        Some(kind) => return Err(ApiError::field(format!("{name}.type"), format!("{kind:?} is not supported"))),
    }
    Ok(())
}

fn tools(fields: &mut Fields) -> Result<Tools, ApiError> {
    let mut tools = Vec::new();
    for (index, tool) in fields.list("tools")?.unwrap_or_default().into_iter().enumerate() {
        let mut tool = Fields::of(tool, &format!("tools[{index}]"))?;
        // What runs on OpenAI's own machines, and calls that are no JSON, are not offered to the model.
        if tool.text("type")?.as_deref() == Some("function") {
            tools.push(Tool::take(&mut tool, "parameters")?);
        }
    }
    let choice = match fields.take("tool_choice") {
        None => Choice::Auto,
        Some(Value::String(choice)) => openai::choice(&choice)?,
        Some(choice) => match (choice["type"].as_str(), choice["name"].as_str()) {
            (Some("function"), Some(name)) => Choice::One(name.to_owned()),
            _ => return Err(ApiError::field("tool_choice", "auto, none, required, or a function is expected")),
        },
    };
    let parallel = openai::parallel(fields)?;
    Tools::new(tools, choice, parallel)
}
