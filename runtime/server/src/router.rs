//! The table of addresses.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{get, post};

use crate::api::{chat, completions, experts, messages, models, responses, status, text};
use crate::app::App;
use crate::error::{ApiError, Form};
use crate::guard;
use crate::page;

/// All addresses, behind the guard.
pub(crate) fn router(app: &Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/responses", post(responses::handle))
        .route("/v1/messages", post(messages::handle))
        .route("/v1/messages/count_tokens", post(messages::count))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/apply-template", post(text::apply_template))
        .route("/health", get(status::health))
        .route("/metrics", get(status::metrics))
        .route("/props", get(status::props))
        .route("/slots", get(status::slots))
        .route("/openapi.json", get(status::openapi))
        .route("/experts", get(experts::handle))
        .route("/", get(page::handle))
        .fallback(unknown)
        .method_not_allowed_fallback(other_method)
        .layer(from_fn_with_state(Arc::clone(app), guard::check))
        .with_state(Arc::clone(app))
}

async fn unknown(request: Request) -> Response {
    let path = request.uri().path();
    let error = ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address");
    error.response(Form::of(path))
}

async fn other_method(request: Request) -> Response {
    let message = format!("this address does not take {}", request.method());
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
    error.response(Form::of(request.uri().path()))
}
