//! Anthropic's messages: content in blocks, tools, streaming events, and tokens counted.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::openai;
use crate::answers::{Encoder, Events, stream};
use crate::app::App;
use crate::asked::Asked;
use crate::error::{ApiError, Form, json_response};
use crate::fields::{Fields, is_nothing};
use crate::job::{Ending, Event, Finished};
use crate::prepare;
use crate::sampling::{Sampling, stops};
use crate::tools::{self, Call, Choice, Fit, Part, Split, Tool, Tools};

/// A block of the instructions that begins so differs with every request: nothing behind it could be kept.
const CHANGES: &str = "x-anthropic-billing-header";

/// `POST /v1/messages`.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request).await.unwrap_or_else(|error| error.response(Form::Anthropic))
}

/// `POST /v1/messages/count_tokens`.
pub(crate) async fn count(State(app): State<Arc<App>>, request: Request) -> Response {
    let counted = async {
        let mut fields = openai::fields(&app, request).await?;
        let (messages, tools) = (messages(&mut fields)?, tools(&mut fields)?);
        let count = prepare::apart(&app, move |engine| prepare::chat(engine, messages, &tools, "messages"));
        Ok(json!({"input_tokens": count.await?.len()}))
    };
    match counted.await {
        Ok(count) => json_response(&count),
        Err(error) => ApiError::response(&error, Form::Anthropic),
    }
}

async fn answer(app: &App, request: Request) -> Result<Response, ApiError> {
    let mut fields = openai::fields(app, request).await?;
    let is_streamed = fields.flag("stream")?;
    let (messages, tools) = (messages(&mut fields)?, tools(&mut fields)?);
    let stop = stops(&mut fields, "stop_sequences")?;
    let (format, format_param) = match fields.within("output_config")? {
        Some(mut config) => (openai::format(&mut config, "format")?, "output_config.format"),
        None => (openai::format(&mut fields, "output_format")?, "output_format"),
    };
    for name in ["mcp_servers", "container"] {
        fields.refuse(name, is_nothing)?;
    }
    let mut sampling = Sampling::take(&mut fields, &["max_tokens"], app.engine()?.n_vocab())?;
    if sampling.max_tokens.is_none() {
        return Err(ApiError::field("max_tokens", "it is missing"));
    }
    (sampling.n, sampling.stop) = (1, stop);
    let frame = Frame {
        id: app.id("msg_"),
        call_ids: app.id("toolu_"),
        model: app.name().to_owned(),
        stop: sampling.stop.clone(),
        may_call: tools.may_call(),
        seed: sampling.options.seed,
    };
    let asked = Asked { messages, param: "messages", fit: Fit { tools, format }, format_param, sampling };
    let (answers, prompt) = asked.submit(app).await?;
    if is_streamed {
        let split = Split::new(frame.may_call);
        return Ok(stream(answers, Blocks { frame, prompt, split, index: 0, open: None, calls: 0 }));
    }
    let whole = answers.collect().await?.into_iter().next().unwrap_or_default();
    let (text, calls) = tools::collect(&whole.text, frame.may_call);
    Ok(json_response(&frame.whole(&text, &calls, whole.finished.as_ref())))
}

/// What a response and its events have in common.
struct Frame {
    id: String,
    /// Calls are named so, and numbered.
    call_ids: String,
    model: String,
    stop: Vec<String>,
    may_call: bool,
    seed: u64,
}

impl Frame {
    fn message(&self, content: Vec<Value>) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": null, "stop_sequence": null, "seed": self.seed,
        })
    }

    fn tool_use(&self, number: usize, name: &str, input: Value) -> Value {
        json!({"type": "tool_use", "id": format!("{}{number:02}", self.call_ids), "name": name, "input": input})
    }

    fn whole(&self, text: &str, calls: &[Call], finished: Option<&Finished>) -> Value {
        let mut content = Vec::new();
        if !text.is_empty() || calls.is_empty() {
            content.push(json!({"type": "text", "text": text}));
        }
        for (number, call) in calls.iter().enumerate() {
            // Arguments that were cut off are no JSON.
            let input = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
            content.push(self.tool_use(number, &call.name, input));
        }
        let mut message = self.message(content);
        if let Some(finished) = finished {
            self.end(&mut message, finished, !calls.is_empty());
            message["usage"] = usage(finished);
        }
        message
    }

    /// Says why an answer ended.
    fn end(&self, object: &mut Value, finished: &Finished, called: bool) {
        let (reason, stop) = match finished.ending {
            Ending::EndToken if called => ("tool_use", None),
            Ending::EndToken => ("end_turn", None),
            Ending::StopString(index) => ("stop_sequence", self.stop.get(index)),
            Ending::Length => ("max_tokens", None),
        };
        object["stop_reason"] = reason.into();
        object["stop_sequence"] = json!(stop);
    }
}

/// Tokens that were not known, that were, and that were made.
fn usage(finished: &Finished) -> Value {
    json!({
        "input_tokens": finished.prompt - finished.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": finished.cached,
        "output_tokens": finished.made,
    })
}

/// The events of a stream: blocks, one after the other.
struct Blocks {
    frame: Frame,
    prompt: usize,
    split: Split,
    /// Number of the block that is open, or comes next.
    index: usize,
    open: Option<Block>,
    calls: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Text,
    Call,
}

impl Blocks {
    fn send(out: &mut Events, mut event: Value, kind: &'static str) {
        event["type"] = kind.into();
        out.named(kind, event);
    }

    fn open(&mut self, block: Block, content: &Value, out: &mut Events) {
        self.close(out);
        self.open = Some(block);
        Self::send(out, json!({"index": self.index, "content_block": content}), "content_block_start");
    }

    fn close(&mut self, out: &mut Events) {
        if self.open.take().is_some() {
            Self::send(out, json!({"index": self.index}), "content_block_stop");
            self.index += 1;
        }
    }

    fn delta(&self, delta: &Value, out: &mut Events) {
        Self::send(out, json!({"index": self.index, "delta": delta}), "content_block_delta");
    }

    fn parts(&mut self, parts: Vec<Part>, out: &mut Events) {
        for part in parts {
            match part {
                Part::Text(text) => {
                    if self.open != Some(Block::Text) {
                        self.open(Block::Text, &json!({"type": "text", "text": ""}), out);
                    }
                    self.delta(&json!({"type": "text_delta", "text": text}), out);
                }
                Part::Begin(name) => {
                    let call = self.frame.tool_use(self.calls, &name, json!({}));
                    self.calls += 1;
                    self.open(Block::Call, &call, out);
                }
                Part::Arguments(text) => self.delta(&json!({"type": "input_json_delta", "partial_json": text}), out),
                Part::End => self.close(out),
            }
        }
    }
}

impl Encoder for Blocks {
    fn begin(&mut self, out: &mut Events) {
        let mut message = self.frame.message(Vec::new());
        // How much of it is known is told at the end.
        message["usage"] = json!({
            "input_tokens": self.prompt, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0
        });
        Self::send(out, json!({"message": message}), "message_start");
        Self::send(out, json!({}), "ping");
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
                if self.index == 0 && self.open.is_none() {
                    self.open(Block::Text, &json!({"type": "text", "text": ""}), out);
                }
                self.close(out);
                let mut delta = json!({});
                self.frame.end(&mut delta, &finished, self.split.called);
                Self::send(out, json!({"delta": delta, "usage": usage(&finished)}), "message_delta");
            }
            Event::Begun | Event::Proven(_) | Event::Failed(_) => {}
        }
    }

    fn end(&mut self, out: &mut Events) {
        Self::send(out, json!({}), "message_stop");
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.named("error", error.json(Form::Anthropic));
    }
}

/// Instructions and messages in the form of chat completions.
fn messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| ApiError::field("messages", "it is missing"))?;
    let mut out = Vec::with_capacity(list.len() + 1);
    let system = match fields.take("system") {
        None => String::new(),
        Some(Value::String(text)) => text,
        Some(blocks) => {
            let Value::Array(mut blocks) = blocks else {
                return Err(ApiError::field("system", "a text is expected, or a list of blocks"));
            };
            blocks.retain(|block| !block["text"].as_str().is_some_and(|text| text.starts_with(CHANGES)));
            prepare::content_text(Value::Array(blocks), "system")?
        }
    };
    if !system.is_empty() {
        out.push(json!({"role": "system", "content": system}));
    }
    for (index, message) in list.into_iter().enumerate() {
        one_message(message, &format!("messages[{index}]"), &mut out)?;
    }
    if out.last().is_some_and(|last| last["role"] == "assistant") {
        let message = "the last message is the assistant's: an answer that goes on with it is not supported";
        return Err(ApiError::field("messages", message));
    }
    prepare::messages(out)
}

fn one_message(message: Value, name: &str, out: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of(message, name)?;
    let role = fields.text("role")?.filter(|role| ["user", "assistant", "system"].contains(&role.as_str()));
    let role = role.ok_or_else(|| ApiError::field(format!("{name}.role"), "user or assistant is expected"))?;
    let blocks = match fields.need("content")? {
        Value::String(text) => vec![json!({"type": "text", "text": text})],
        Value::Array(blocks) => blocks,
        _ => return Err(ApiError::field(format!("{name}.content"), "a text is expected, or a list of blocks")),
    };
    let (mut texts, mut calls) = (Vec::new(), Vec::new());
    for (index, block) in blocks.into_iter().enumerate() {
        let name = format!("{name}.content[{index}]");
        match block["type"].as_str() {
            // What other models thought is not said to this one.
            Some("thinking" | "redacted_thinking") => {}
            Some("tool_use") if role == "assistant" => {
                let arguments = block["input"].as_object().cloned().unwrap_or_else(Map::new);
                let arguments = tools::spaced(&Value::Object(arguments));
                let function = json!({"name": block["name"], "arguments": arguments});
                calls.push(json!({"id": block["id"], "type": "function", "function": function}));
            }
            Some("tool_result") if role == "user" => {
                let content = match block.get("content") {
                    None | Some(Value::Null) => String::new(),
                    Some(content) => prepare::content_text(content.clone(), &format!("{name}.content"))?,
                };
                out.push(json!({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}));
            }
            _ => texts.push(prepare::content_text(Value::Array(vec![block]), &name)?),
        }
    }
    if !texts.is_empty() || !calls.is_empty() {
        let mut message = json!({"role": role, "content": texts.join("\n")});
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        out.push(message);
    }
    Ok(())
}

fn tools(fields: &mut Fields) -> Result<Tools, ApiError> {
    let mut tools = Vec::new();
    for (index, tool) in fields.list("tools")?.unwrap_or_default().into_iter().enumerate() {
        let mut tool = Fields::of(tool, &format!("tools[{index}]"))?;
        match tool.text("type")?.as_deref() {
            None | Some("custom") => tools.push(Tool::take(&mut tool, "input_schema")?),
            // What runs on Anthropic's own machines is not offered to the model.
            Some(_) => {}
        }
    }
    let Some(mut choice) = fields.within("tool_choice")? else {
        return Tools::new(tools, Choice::Auto, true);
    };
    let kind = match (choice.text("type")?.as_deref(), choice.text("name")?) {
        (Some("auto"), _) => Choice::Auto,
        (Some("any"), _) => Choice::Always,
        (Some("none"), _) => Choice::Never,
        (Some("tool"), Some(name)) => Choice::One(name),
        _ => return Err(ApiError::field("tool_choice", "auto, any, none, or a tool by name is expected")),
    };
    let parallel = !choice.flag("disable_parallel_tool_use")?;
    Tools::new(tools, kind, parallel)
}
