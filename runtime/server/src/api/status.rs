//! How the server is: health, metrics, settings, conversations.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::json;
use st_model::sampler::SamplerOptions;

use super::metrics;
use crate::app::App;
use crate::error::{Form, json_response};

/// `GET /health`: 503 while the model loads or the server ends.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    match app.engine() {
        Ok(_) => json_response(&json!({"status": "ok"})),
        Err(error) => {
            let mut body = error.json(Form::OpenAi);
            body["status"] = json!(error.code);
            body["progress"] = json!(app.loaded());
            let mut response = error.response(Form::OpenAi);
            *response.body_mut() = Body::from(body.to_string());
            response
        }
    }
}

/// `GET /metrics`, in the text format of Prometheus.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut response = Response::new(Body::from(metrics::text(&app)));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// `GET /props`.
pub(crate) async fn props(State(app): State<Arc<App>>) -> Response {
    let engine = match app.engine() {
        Ok(engine) => engine,
        Err(error) => return error.response(Form::OpenAi),
    };
    let (d, plan, settings) = (SamplerOptions::default(), engine.plan(), &app.settings);
    json_response(&json!({
        "model": app.name(),
        "names": settings.names,
        "n_ctx": engine.ctx(),
        "total_slots": settings.parallel,
        "queue": settings.queue,
        "max_body": settings.max_body,
        "prompt_piece": settings.prompt_piece,
        "default_generation_settings": {
            "n_ctx": engine.ctx(),
            "params": {
                "temperature": d.temperature,
                "top_k": d.top_k,
                "top_p": d.top_p,
                "min_p": d.min_p,
                "repeat_penalty": d.repeat_penalty,
                "frequency_penalty": d.frequency_penalty,
                "presence_penalty": d.presence_penalty,
            },
        },
        "instruction_set": engine.isa().name(),
        "memory": {
            "budget": plan.budget,
            "process": plan.process,
            "server": plan.beside,
            "dense": plan.dense,
            "kv": plan.kv_full + plan.kv_window,
            "kv_per_conversation": (plan.kv_full + plan.kv_window) / plan.sequences as u64,
            "buffers": plan.scratch + plan.io,
            "experts": plan.slot * plan.n_slots() as u64,
            "expert_slots": plan.n_slots(),
            "reserve": plan.reserve,
        },
        "build_info": concat!("st-tool ", env!("CARGO_PKG_VERSION")),
    }))
}

/// `GET /openapi.json`: all addresses, for programs.
pub(crate) async fn openapi() -> Response {
    let mut response = Response::new(Body::from(include_str!("openapi.json")));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// `GET /slots`.
pub(crate) async fn slots(State(app): State<Arc<App>>) -> Response {
    match app.engine() {
        Ok(engine) => json_response(&app.slots.json(engine.ctx())),
        Err(error) => error.response(Form::OpenAi),
    }
}
