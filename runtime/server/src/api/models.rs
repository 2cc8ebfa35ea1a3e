//! The list of models, of which there is one.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::openai::no_model;
use crate::app::App;
use crate::error::{ApiError, Form, json_response};

/// `GET /v1/models`.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Response {
    let outcome = app.engine().map(|_| {
        let all: Vec<Value> = app.settings.names.iter().map(|name| model(&app, name)).collect();
        json_response(&json!({"object": "list", "data": all}))
    });
    outcome.unwrap_or_else(|error| error.response(Form::OpenAi))
}

/// `GET /v1/models/ID`; an ID may have slashes in it.
pub(crate) async fn one(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    let find = || -> Result<Response, ApiError> {
        app.engine()?;
        match app.settings.names.contains(&id) {
            true => Ok(json_response(&model(&app, &id))),
            false => Err(no_model(&app, &id)),
        }
    };
    find().unwrap_or_else(|error| error.response(Form::OpenAi))
}

fn model(app: &App, name: &str) -> Value {
    let mut meta = app.settings.about.clone();
    if let Ok(engine) = app.engine() {
        let (plan, config) = (engine.plan(), engine.config());
        for (key, value) in [
            ("n_ctx", json!(engine.ctx())),
            ("n_ctx_train", json!(config.context_length)),
            ("n_vocab", json!(engine.n_vocab())),
            ("n_embd", json!(config.n_embd)),
            ("n_layers", json!(config.n_layers)),
            ("n_experts", json!(config.n_experts)),
            ("n_experts_used", json!(config.n_experts_used)),
            ("parallel", json!(app.settings.parallel)),
            ("memory_budget", json!(plan.budget)),
            ("experts_in_memory", json!(plan.n_slots())),
        ] {
            meta.insert(key.to_owned(), value);
        }
    }
    json!({"id": name, "object": "model", "created": app.started, "owned_by": "st-tool", "meta": meta})
}
