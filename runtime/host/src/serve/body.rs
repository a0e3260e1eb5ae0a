//! What all requests with a body have in common: it is JSON, whole in time, of a bounded size, and given up when the client leaves.

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::App;
use super::reply::{IGNORED, Refusal};
use crate::handler::{Context, HandlerError, Kind};

/// Largest body of a request, in bytes.
const BODY_LIMIT: usize = 4 << 20;

/// Reads the body of a request.
pub(super) async fn read(app: &App, request: Request) -> Result<Bytes, Refusal> {
    let is_json = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).is_some_and(|kind| {
        kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        let message = "the body should be JSON, with the header content-type: application/json";
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let body = timeout(app.bounds.body, to_bytes(request.into_body(), BODY_LIMIT)).await.map_err(|_| {
        let message = format!("the body of the request was not complete after {} s", app.bounds.body.as_secs());
        Refusal::new(StatusCode::REQUEST_TIMEOUT, message)
    })?;
    body.map_err(|_| {
        let message = format!("the body of the request is larger than {} MiB, or incomplete", BODY_LIMIT >> 20);
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    })
}

/// Returns the fields of a body.
pub(super) fn fields(body: &[u8]) -> Result<Map<String, Value>, HandlerError> {
    let body: Value = serde_json::from_slice(body).map_err(|error| {
        HandlerError::new(Kind::InvalidRequest { param: None }, format!("the body is not JSON: {error}"))
    })?;
    match body {
        Value::Object(fields) => Ok(fields),
        _ => Err(HandlerError::new(Kind::InvalidRequest { param: None }, "the body should be a JSON object")),
    }
}

/// Names the fields that were ignored, if a header can hold their names.
pub(super) fn name_ignored(headers: &mut HeaderMap, ignored: &[String]) {
    if let Ok(value) = HeaderValue::from_str(&ignored.join(","))
        && !value.is_empty()
    {
        headers.insert(IGNORED, value);
    }
}

/// Cancels the work when it is dropped, which happens when the client leaves.
pub(super) struct Waiting(pub(super) Context);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
