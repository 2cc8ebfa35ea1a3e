//! The body of a request: read within bounds of size and time, and made JSON of within bounds of memory.

use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use hyper::body::Body as _;
use serde_json::Value;
use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, timeout_at};

use crate::app::App;
use crate::error::ApiError;

/// Time that a body gets at least, and the rate in bytes per second from there on.
const PATIENCE: Duration = Duration::from_secs(20);
const SLOWEST: usize = 16 << 10;
/// Values of a body, at most: each takes a hundred bytes of memory and may take two of the body.
const VALUES: usize = 200_000;

/// A body, and the memory that it holds.
pub(crate) struct Bytes<'a> {
    pub(crate) bytes: Vec<u8>,
    _memory: SemaphorePermit<'a>,
}

/// Reads the body of a request.
///
/// # Errors
/// Where it is too large, too slow, or cut off.
pub(crate) async fn read(app: &App, request: Request) -> Result<Bytes<'_>, ApiError> {
    let most = app.settings.max_body;
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok());
    let mut body = request.into_body();
    if declared.is_some_and(|declared: usize| declared > most) {
        drain(&mut body, most).await;
        return Err(too_large(most));
    }
    // What has come takes memory, not what was announced.
    let mut memory = acquire(app, 0).await?;
    let mut bytes = Vec::with_capacity(declared.unwrap_or(0).min(64 << 10));
    let start = Instant::now();
    loop {
        let deadline = start + PATIENCE + Duration::from_secs((bytes.len() / SLOWEST) as u64);
        let frame = timeout_at(deadline, poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).await;
        let slow = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_body", "the body comes too slowly");
        match frame.map_err(slow)? {
            None => return Ok(Bytes { bytes, _memory: memory }),
            Some(Err(_)) => return Err(ApiError::bad("the body was cut off")),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len() + data.len() > most {
                    drain(&mut body, most).await;
                    return Err(too_large(most));
                }
                memory.merge(acquire(app, data.len()).await?);
                bytes.extend_from_slice(&data);
            }
        }
    }
}

/// Memory for so many bytes of a body.
async fn acquire(app: &App, bytes: usize) -> Result<SemaphorePermit<'_>, ApiError> {
    let busy = || ApiError {
        retry_after: Some(2),
        ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", "other large requests take all memory for bodies")
    };
    let permits = u32::try_from(bytes).map_err(|_| busy())?;
    let acquired = timeout_at(Instant::now() + Duration::from_secs(5), app.bodies.acquire_many(permits)).await;
    acquired.ok().and_then(Result::ok).ok_or_else(busy)
}

fn too_large(most: usize) -> ApiError {
    let message = format!("the body is larger than {most} bytes, which --max-body allows");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

/// Lets some of a body pass by, so that a client that only sends can be told why nobody listens.
async fn drain(body: &mut Body, most: usize) {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut left = 4 * most;
    while let Ok(Some(Ok(frame))) = timeout_at(deadline, poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx))).await {
        let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, |data| data.len())) else { return };
        left = rest;
    }
}

/// The JSON value of a body.
///
/// # Errors
/// Where it is none, or has more parts than any request needs.
pub(crate) fn json(bytes: &[u8]) -> Result<Value, ApiError> {
    if values(bytes) > VALUES {
        return Err(ApiError::bad(format!("the body has more than {VALUES} values")));
    }
    serde_json::from_slice(bytes).map_err(|error| ApiError::bad(format!("the body is not JSON: {error}")))
}

/// Values of a JSON text, about and not fewer than there are.
fn values(bytes: &[u8]) -> usize {
    let (mut count, mut quoted, mut escaped) = (1, false, false);
    for byte in bytes {
        match (byte, quoted) {
            _ if escaped => escaped = false,
            (b'\\', true) => escaped = true,
            (b'"', _) => quoted = !quoted,
            (b',' | b'[' | b'{', false) => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_outside_of_texts() {
        assert_eq!(values(br#"{"a": [1, 2], "b": "[[[,,,\"{{{"}"#), 5);
        let many = format!("[{}]", "[],".repeat(VALUES));
        assert!(json(many.as_bytes()).unwrap_err().message.contains("more than"));
        let deep = "[".repeat(VALUES - 1);
        assert!(json(deep.as_bytes()).unwrap_err().message.contains("not JSON"));
        assert!(json(b"\xff").is_err() && json(b"").is_err());
    }
}
