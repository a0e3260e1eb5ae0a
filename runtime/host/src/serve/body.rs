//! What all requests with a body have in common: it is JSON, whole in time, of a bounded size, and given up when the client leaves.

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::App;
use super::reply::{IGNORED, Refusal};
use crate::handler::{Context, HandlerError, Kind};

/// Reads the body of a request.
pub(super) async fn read(app: &App, request: Request) -> Result<Bytes, Refusal> {
    let is_json = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).is_some_and(|kind| {
        kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        let message = "the body should be JSON, with the header content-type: application/json";
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    read_any(app, request).await
}

/// Reads the body of a request by Ollama's API, whose examples do not say that it is JSON. A browser says of every request to another
/// origin where it comes from: one that does must say that it is JSON.
pub(super) async fn read_of_ollama(app: &App, request: Request) -> Result<Bytes, Refusal> {
    let of_page = [header::ORIGIN.as_str(), "sec-fetch-site"];
    match of_page.iter().any(|name| request.headers().contains_key(*name)) {
        true => read(app, request).await,
        false => read_any(app, request).await,
    }
}

async fn read_any(app: &App, request: Request) -> Result<Bytes, Refusal> {
    let most = app.settings().max_body;
    let body = timeout(app.bounds.body, to_bytes(request.into_body(), most)).await.map_err(|_| {
        let message = format!("the body of the request was not complete after {} s", app.bounds.body.as_secs());
        Refusal::new(StatusCode::REQUEST_TIMEOUT, message)
    })?;
    body.map_err(|error| {
        if is_too_large(&error) {
            let message = format!("the body of the request is larger than {}", binary(most));
            return Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, message);
        }
        Refusal::new(StatusCode::BAD_REQUEST, "the body of the request is incomplete, or its chunks are malformed")
    })
}

/// Whether a body is longer than it may be: `http_body_util::LengthLimitError`, which is not one of this crate's dependencies.
fn is_too_large(error: &axum::Error) -> bool {
    std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source())
        .any(|error| error.to_string() == "length limit exceeded")
}

/// A size in the units of the settings.
fn binary(bytes: usize) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        bytes if bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        bytes => format!("{bytes} bytes"),
    }
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
