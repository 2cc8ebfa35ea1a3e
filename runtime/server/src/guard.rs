//! Who may ask: host, origin and key of every request, before anything else of it is looked at.
//!
//! A server on one's own machine is reached by every web page that is open there. Such a page cannot send a `Host` of this machine
//! by a name that it owns, and its browser says its `Origin`; so both are checked. Names without a dot, and those that nobody can
//! register, are fine.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::app::App;
use crate::error::{ApiError, Form};
use crate::log::Record;

/// Endings of names that no registrar gives out.
const PRIVATE: [&str; 7] = [".localhost", ".local", ".internal", ".lan", ".home", ".home.arpa", ".test"];

/// Addresses that tell nothing and need no key: whether the server lives, and the page that asks for the key.
const OPEN: [&str; 2] = ["/health", "/"];

/// Lets a request through, or answers it.
pub(crate) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (started, method, uri) = (Instant::now(), request.method().clone(), request.uri().clone());
    let form = Form::of(uri.path());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let allowed = origin.filter(|origin| is_allowed(&app, origin));
    let mut response = match examine(&app, &request, allowed.is_some()) {
        Err(error) => error.response(form),
        Ok(()) if request.method() == Method::OPTIONS && allowed.is_some() => preflight(request.headers()),
        Ok(()) => next.run(request).await,
    };
    if let Some(origin) = allowed {
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
    }
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    let hundreds = usize::from(response.status().as_u16() / 100).min(5);
    app.metrics.responses[hundreds].add(1);
    let status = response.status().as_u16();
    app.log.tell(Record::request(method.as_str(), uri.path(), status, started.elapsed()));
    response
}

fn examine(app: &App, request: &Request, origin_allowed: bool) -> Result<(), ApiError> {
    let headers = request.headers();
    let host = header_text(headers, header::HOST).or_else(|| request.uri().authority().map(|a| a.as_str()));
    if app.keys.is_empty() && !host.is_some_and(is_ours) {
        let message = "this Host is not this machine's: a name without a dot, an address, or --api-key will do";
        return Err(ApiError::new(StatusCode::FORBIDDEN, "host", message));
    }
    if let Some(origin) = headers.get(header::ORIGIN)
        && !origin_allowed
        && !is_same(origin, host)
    {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "origin",
            "web pages of other origins may not ask: --cors ORIGIN allows one",
        ));
    }
    // A browser asks for permission before it sends a key.
    let asks = request.method() == Method::OPTIONS && origin_allowed;
    if app.keys.is_empty() || OPEN.contains(&request.uri().path()) || asks {
        return Ok(());
    }
    let bearer = header_text(headers, header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    let given = bearer.map(str::as_bytes).or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes));
    match given.is_some_and(|key| app.keys.holds(key)) {
        true => Ok(()),
        false => Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "a key is needed: `Authorization: Bearer KEY`, or `x-api-key: KEY`",
        )),
    }
}

fn header_text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Whether no web page can have had that name made for itself.
fn is_ours(host: &str) -> bool {
    let name = name_of(host);
    let address = name.trim_start_matches('[').trim_end_matches(']');
    let lower = name.trim_end_matches('.').to_ascii_lowercase();
    address.parse::<IpAddr>().is_ok()
        || (!lower.is_empty() && !lower.contains('.'))
        || PRIVATE.iter().any(|ending| lower.ends_with(ending))
}

/// A host without its port.
fn name_of(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

/// Whether the origin is this server's own page.
fn is_same(origin: &HeaderValue, host: Option<&str>) -> bool {
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    matches!((origin, host), (Some((_, authority)), Some(host)) if authority.eq_ignore_ascii_case(host))
}

fn is_allowed(app: &App, origin: &HeaderValue) -> bool {
    app.settings.cors.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin.as_bytes())
}

/// What a browser wants to know before it sends a request of another origin.
fn preflight(headers: &HeaderMap) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let own = response.headers_mut();
    own.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    if let Some(asked) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        own.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
    }
    own.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_can_be_registered_are_not_ours() {
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:1",
            "[::1]:8080",
            "[::1]",
            "10.0.0.7",
            "box",
            "a.local:80",
            "LocalHost",
        ] {
            assert!(is_ours(host), "{host}");
        }
        for host in ["", "evil.example", "127.0.0.1.evil.example:80", "localhost.evil.com", ":80", "a.local.com"] {
            assert!(!is_ours(host), "{host}");
        }
    }
}
