//! Texts and messages to tokens, away from the thread that serves connections, one request at a time.

use std::sync::Arc;

use serde_json::Value;
use st_model::chat::ROLES;
use st_model::tokenizer::Tokenizer;
use st_model::{Engine, ModelError};

use crate::app::App;
use crate::error::ApiError;
use crate::sampling::too_long;
use crate::tools::{self, Tools};

/// Does `work` on a thread of its own, when no other request is at it.
///
/// # Errors
/// What `work` says.
pub(crate) async fn apart<T: Send + 'static>(
    app: &App,
    work: impl FnOnce(&Engine) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let engine = Arc::clone(app.engine()?);
    let _turn = app.preparing.acquire().await.map_err(|_| ApiError::ending())?;
    let done = tokio::task::spawn_blocking(move || work(&engine)).await;
    done.unwrap_or_else(|_| Err(ApiError::new(hyper::StatusCode::INTERNAL_SERVER_ERROR, "failed", "it failed")))
}

/// The file's tokenizer.
///
/// # Errors
/// Where it has none.
pub(crate) fn tokenizer(engine: &Engine) -> Result<&Tokenizer, ApiError> {
    engine.tokenizer().ok_or_else(|| ApiError::bad("the model's file has no tokenizer: it takes token ids alone"))
}

/// A text as tokens; what is called control tokens in it is letters.
///
/// # Errors
/// Where it is longer than the context.
pub(crate) fn text(engine: &Engine, text: &str, param: &str) -> Result<Vec<u32>, ApiError> {
    let tokenizer = tokenizer(engine)?;
    check(engine, &[text], param)?;
    tokenizer.encode_prompt(text, false).map_err(|error| ApiError::field(param, error.to_string()))
}

/// A chat as tokens, rendered by the file's template.
///
/// # Errors
/// Where there is no template, it refuses the messages, or they are longer than the context.
pub(crate) fn chat(engine: &Engine, messages: Vec<Value>, tools: &Tools, param: &str) -> Result<Vec<u32>, ApiError> {
    let tokenizer = tokenizer(engine)?;
    let rendered = render(engine, messages, tools, param)?;
    tokenizer.encode_chat(&rendered).map_err(|error| ApiError::field(param, error.to_string()))
}

/// A chat as the template makes it.
///
/// # Errors
/// As [`chat`].
pub(crate) fn render(
    engine: &Engine,
    messages: Vec<Value>,
    tools: &Tools,
    param: &str,
) -> Result<st_model::chat::Rendered, ApiError> {
    let unusable = |error: std::sync::Arc<st_model::chat::ChatError>| ApiError::bad(error.to_string());
    let template = engine.chat_template().map_err(unusable)?;
    let template =
        template.ok_or_else(|| ApiError::bad("the model's file has no chat template: it takes no messages"))?;
    let (messages, tools) = match template.takes_tools(tools::OPEN) {
        true => (tools::with_calls_as_text(messages), tools.json()),
        false => (tools::told(messages, tools), Vec::new()),
    };
    let mut texts = Vec::new();
    messages.iter().chain(&tools).for_each(|value| collect_texts(value, &mut texts));
    check(engine, &texts, param)?;
    template.render_json(&messages, &tools, true).map_err(|error| ApiError::field(param, error.to_string()))
}

fn collect_texts<'v>(value: &'v Value, texts: &mut Vec<&'v str>) {
    match value {
        Value::String(text) => texts.push(text),
        Value::Array(items) => items.iter().for_each(|item| collect_texts(item, texts)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            texts.push(key);
            collect_texts(value, texts);
        }),
        _ => {}
    }
}

fn check(engine: &Engine, texts: &[&str], param: &str) -> Result<(), ApiError> {
    engine.check_texts(texts.iter().copied()).map_err(|error| match error {
        ModelError::ContextFull { needed, ctx } => too_long(param, needed, ctx),
        other => ApiError::field(param, other.to_string()),
    })
}

/// Messages as templates take them: a role that they know, and content that is text.
///
/// # Errors
/// What is wrong with a message, by its place.
pub(crate) fn messages(list: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if list.is_empty() {
        return Err(ApiError::field("messages", "it is empty"));
    }
    list.into_iter().enumerate().map(|(index, message)| one_message(message, &format!("messages[{index}]"))).collect()
}

fn one_message(message: Value, name: &str) -> Result<Value, ApiError> {
    let Value::Object(mut fields) = message else {
        return Err(ApiError::field(name, "an object is expected"));
    };
    let role = fields.get("role").and_then(Value::as_str).filter(|role| ROLES.contains(role)).map(str::to_owned);
    let Some(role) = role else {
        return Err(ApiError::field(format!("{name}.role"), format!("one of {} is expected", ROLES.join(", "))));
    };
    // What developers say is what templates call a system message.
    let role = if role == "developer" { "system".to_owned() } else { role };
    let calls = fields.get("tool_calls").is_some_and(|calls| !calls.is_null());
    let content = match fields.remove("content") {
        None | Some(Value::Null) if role == "assistant" && calls => Value::from(""),
        None | Some(Value::Null) => return Err(ApiError::field(format!("{name}.content"), "it is missing")),
        Some(content) => Value::from(content_text(content, &format!("{name}.content"))?),
    };
    fields.insert("role".to_owned(), role.into());
    fields.insert("content".to_owned(), content);
    Ok(Value::Object(fields))
}

/// A content's text: itself, or that of its parts, each in a line of its own.
pub(crate) fn content_text(content: Value, name: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => return Err(ApiError::field(name, "a text is expected, or a list of parts")),
    };
    let text = |(index, part): (usize, Value)| {
        let name = format!("{name}[{index}]");
        match part.get("type").and_then(Value::as_str) {
            Some("text" | "input_text" | "output_text" | "refusal") => {
                let text = part.get("text").or_else(|| part.get("refusal")).and_then(Value::as_str);
                text.map(str::to_owned).ok_or_else(|| ApiError::field(format!("{name}.text"), "a text is expected"))
            }
            Some(kind) => Err(ApiError::field(format!("{name}.type"), format!("this model takes text, not {kind:?}"))),
            None => Err(ApiError::field(format!("{name}.type"), "it is missing")),
        }
    };
    let texts: Vec<String> = parts.into_iter().enumerate().map(text).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::body;
    use crate::fields::Fields;
    use crate::sampling::Sampling;

    #[test]
    fn messages_are_what_templates_take() {
        let list = json!([
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [{}]},
            {"role": "tool", "tool_call_id": "1", "content": "c"},
        ]);
        let taken = messages(list.as_array().expect("a list").clone()).expect("messages");
        assert_eq!(taken[0], json!({"role": "system", "content": "a\nb"}));
        assert_eq!((&taken[1]["content"], &taken[2]["tool_call_id"]), (&json!(""), &json!("1")));
    }

    /// Bodies that are nearly right, changed here and there: an answer or an error, and never a panic.
    #[test]
    fn bodies_may_be_anything() {
        const MARKS: &[u8] = b"0123456789-+.eE\"\\[]{},:nulltrue";
        let good = json!({
            "model": "x", "messages": [{"role": "user", "content": [{"type": "text", "text": "\u{e9}"}]}], "max_tokens": 5,
            "temperature": 0.5, "top_k": -1, "seed": 7, "stop": ["a"], "logit_bias": {"7": -100.0}, "stream_options": {}, "n": 2,
        })
        .to_string()
        .into_bytes();
        let mut dice = 1u64;
        let mut below = |n: usize| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) as usize % n
        };
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..100_000 {
            let mut bytes = good.clone();
            for _ in 0..=below(3) {
                let at = below(bytes.len());
                match below(4) {
                    0 => bytes[at] = below(256) as u8,
                    1 => bytes.truncate(at.max(1)),
                    2 => drop(bytes.remove(at)),
                    _ => bytes[at] = MARKS[below(MARKS.len())],
                }
                if bytes.is_empty() {
                    bytes.push(b'{');
                }
            }
            let take = || {
                let mut fields = Fields::of(body::json(&bytes)?, "")?;
                fields.text("model")?;
                fields.within("stream_options")?;
                Sampling::take(&mut fields, &["max_tokens"], 100)?;
                messages(fields.list("messages")?.unwrap_or_default())
            };
            match take() {
                Ok(_) => taken += 1,
                Err(error) => refused += usize::from(error.status.as_u16() == 400),
            }
        }
        assert!(taken > 1000 && taken + refused == 100_000, "{taken} {refused}");
    }
}
