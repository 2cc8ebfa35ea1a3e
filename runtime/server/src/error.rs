//! What is said where there is no answer: a status, and a body in the form of the API that was called.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use crate::job::Failure;
use crate::queue::Refused;

/// An error as clients see it.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// OpenAI's `code`.
    pub(crate) code: &'static str,
    /// The field that is wrong, as `messages[2].content`.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
    /// When to come back, in seconds.
    pub(crate) retry_after: Option<u64>,
    /// What else belongs into the object.
    pub(crate) more: Option<Box<(&'static str, Value)>>,
}

/// How errors look to the callers of an API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    OpenAi,
    Anthropic,
}

impl Form {
    /// The form that belongs to an address.
    pub(crate) fn of(path: &str) -> Self {
        if path.starts_with("/v1/messages") { Self::Anthropic } else { Self::OpenAi }
    }
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into(), retry_after: None, more: None }
    }

    /// A request that makes no sense.
    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// A field that makes no sense.
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("`{param}`: {}", message.into());
        Self { param: Some(param), code: "invalid_value", ..Self::bad(message) }
    }

    /// A field that would change the answer, and of which nothing is made here.
    pub(crate) fn unsupported(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("`{param}` is not supported, and would change the answer");
        Self { param: Some(param), code: "unsupported_parameter", ..Self::bad(message) }
    }

    pub(crate) fn loading(share: f64) -> Self {
        let message = format!("the model is loading: {:.0} %", 100.0 * share);
        Self {
            retry_after: Some(1),
            more: Some(Box::new(("progress", json!(share)))),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "loading", message)
        }
    }

    pub(crate) fn ending() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is shutting down")
    }

    /// OpenAI's `type`, Anthropic's `type`.
    fn kind(&self, form: Form) -> &'static str {
        match (form, self.status.as_u16()) {
            (_, 401) => "authentication_error",
            (Form::OpenAi, 403) | (Form::Anthropic, 403) => "permission_error",
            (Form::OpenAi, 404) | (Form::Anthropic, 404) => "not_found_error",
            (Form::Anthropic, 413) => "request_too_large",
            (_, 429) => "rate_limit_error",
            (Form::Anthropic, 503) => "overloaded_error",
            (Form::OpenAi, 503) => "unavailable_error",
            (Form::Anthropic, 500..) => "api_error",
            (Form::OpenAi, 500..) => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The object.
    pub(crate) fn json(&self, form: Form) -> Value {
        let kind = self.kind(form);
        let mut error = match form {
            Form::Anthropic => json!({"type": kind, "message": self.message}),
            Form::OpenAi => json!({"message": self.message, "type": kind, "param": self.param, "code": self.code}),
        };
        if let Some(more) = &self.more {
            error[more.0] = more.1.clone();
        }
        match form {
            Form::Anthropic => json!({"type": "error", "error": error}),
            Form::OpenAi => json!({"error": error}),
        }
    }

    /// The response.
    pub(crate) fn response(&self, form: Form) -> Response {
        let mut response = json_response(&self.json(form));
        *response.status_mut() = self.status;
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full { seconds } => Self {
                retry_after: Some(seconds),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", "the queue is full: come back later")
            },
            Refused::Ending => Self::ending(),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Model(why) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", why),
            Failure::Ending => Self::ending(),
        }
    }
}

/// A response of one JSON value.
pub(crate) fn json_response(value: &Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
