//! Text to tokens and back, and what the template makes of messages, as llama-server has them.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::openai;
use crate::app::App;
use crate::error::{ApiError, Form, json_response};
use crate::prepare;

/// `POST /tokenize`.
pub(crate) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async {
        let mut fields = openai::fields(&app, request).await?;
        let text = fields.text("content")?.ok_or_else(|| ApiError::field("content", "it is missing"))?;
        let (add_special, parse_special) = (fields.flag("add_special")?, fields.flag("parse_special")?);
        let with_pieces = fields.flag("with_pieces")?;
        prepare::apart(&app, move |engine| {
            let tokenizer = prepare::tokenizer(engine)?;
            let wrong = |error: st_model::tokenizer::TokenizerError| ApiError::field("content", error.to_string());
            let ids = match add_special {
                true => tokenizer.encode_prompt(&text, parse_special),
                false => tokenizer.encode(&text, parse_special),
            };
            let ids = ids.map_err(wrong)?;
            let piece = |&id: &u32| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                let piece = std::str::from_utf8(bytes).map_or_else(|_| json!(bytes), |text| json!(text));
                json!({"id": id, "piece": piece})
            };
            let tokens = if with_pieces { ids.iter().map(piece).collect() } else { json!(ids) };
            Ok(json!({ "tokens": tokens }))
        })
        .await
    };
    respond(answer.await)
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async {
        let mut fields = openai::fields(&app, request).await?;
        let tokens = fields.list("tokens")?.ok_or_else(|| ApiError::field("tokens", "it is missing"))?;
        prepare::apart(&app, move |engine| {
            let n_vocab = engine.n_vocab();
            let id = |value: &Value| {
                value.as_u64().and_then(|id| id.try_into().ok()).filter(|&id: &u32| (id as usize) < n_vocab)
            };
            let ids: Option<Vec<u32>> = tokens.iter().map(id).collect();
            let ids =
                ids.ok_or_else(|| ApiError::field("tokens", format!("token ids below {n_vocab} are expected")))?;
            Ok(json!({"content": prepare::tokenizer(engine)?.decode(&ids, true)}))
        })
        .await
    };
    respond(answer.await)
}

/// `POST /apply-template`.
pub(crate) async fn apply_template(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = async {
        let mut fields = openai::fields(&app, request).await?;
        let list = fields.list("messages")?.ok_or_else(|| ApiError::field("messages", "it is missing"))?;
        let tools = openai::tools(&mut fields)?;
        prepare::apart(&app, move |engine| {
            let rendered = prepare::render(engine, prepare::messages(list)?, &tools, "messages")?;
            Ok(json!({"prompt": rendered.text()}))
        })
        .await
    };
    respond(answer.await)
}

fn respond(answer: Result<Value, ApiError>) -> Response {
    match answer {
        Ok(value) => json_response(&value),
        Err(error) => error.response(Form::OpenAi),
    }
}
