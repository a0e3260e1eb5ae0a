//! `POST /v1/feedback`: what somebody thinks of an answer of their own, by its id.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::apart::apart;
use super::caller::Caller;
use super::query::refused;
use super::reply::{Refusal, failed};
use super::{App, body};
use crate::memory::{Feedback, Memory, Refused};
use crate::toml_problems::near;

const KNOWN: [&str; 5] = ["response_id", "rating", "correction", "comment", "user"];
/// Longest correction, in bytes.
const CORRECTION_BYTES_MAX: usize = 256 << 10;
/// Longest comment, in bytes.
const COMMENT_BYTES_MAX: usize = 8 << 10;

pub(super) async fn feedback(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, Refusal> {
    let memory = app.class.memory().ok_or_else(|| {
        let message = "feedback is not taken here; whoever runs the server can add [memory] to its file of handlers";
        Refusal::new(StatusCode::NOT_FOUND, message)
    })?;
    let caller = Caller::of(request.extensions());
    let body = body::read(&app, request).await?;
    apart(move || rate(&memory, caller, &body)).await
}

fn rate(memory: &Memory, caller: Caller, body: &[u8]) -> Result<Json<Value>, Refusal> {
    let fields = body::fields(body)?;
    let feedback = read(&fields)?;
    let caller = caller.with_user(fields.get("user").and_then(Value::as_str))?;
    let mut answer = json!({"object": "feedback", "response_id": feedback.response_id, "rating": feedback.rating});
    let kept = memory.rate(caller.into(), feedback).map_err(|why| match why {
        Refused::Unknown => {
            let message = "you have no answer of this id, or it is too long ago; the id is that of the answer, as in chatcmpl-…, which its header x-homeroom-response-id has, too";
            let refusal = Refusal::new(StatusCode::NOT_FOUND, message);
            Refusal { param: Some("response_id".to_owned()), code: Some("response_not_found"), ..refusal }
        }
        Refused::Enough => {
            let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, "enough was said of this answer");
            Refusal { kind: "rate_limit_error", retry: Some(false), ..refusal }
        }
        Refused::Failed(error) => failed(&error),
    })?;
    // Who wrote words should know where they go.
    answer["kept"] = json!(if kept { ["rating", "correction", "comment"].as_slice() } else { &["rating"] });
    Ok(Json(answer))
}

fn read(fields: &Map<String, Value>) -> Result<Feedback, Refusal> {
    if let Some(other) = fields.keys().find(|name| !KNOWN.contains(&name.as_str())) {
        let shown: String = other.chars().take(80).collect();
        return Err(refused(&shown, format!("`{shown}`: unknown field, {}", near(&shown, &KNOWN))));
    }
    let text = |name: &str, most: usize| match fields.get(name).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(Value::String(text)) if text.len() <= most => Ok(Some(text.clone())),
        Some(_) => Err(refused(name, format!("`{name}`: should be a text of at most {most} bytes"))),
    };
    let rating = match fields.get("rating").filter(|value| !value.is_null()) {
        None => None,
        Some(rating) => Some(match (rating.as_i64(), rating.as_str()) {
            (Some(1), _) | (_, Some("up")) => 1,
            (Some(-1), _) | (_, Some("down")) => -1,
            _ => return Err(refused("rating", "`rating`: should be 1 or -1, \"up\" or \"down\"")),
        }),
    };
    text("user", 256)?;
    let response_id = text("response_id", 256)?.ok_or_else(|| refused("response_id", "`response_id` is missing"))?;
    let (correction, comment) = (text("correction", CORRECTION_BYTES_MAX)?, text("comment", COMMENT_BYTES_MAX)?);
    if rating.is_none() && correction.is_none() && comment.is_none() {
        return Err(refused("rating", "nothing is said: give a `rating`, a `correction` or a `comment`"));
    }
    Ok(Feedback { response_id, rating, correction, comment })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rating_is_a_thumb_or_a_number() {
        let read = |body: Value| read(body.as_object().expect("an object")).map_err(|refusal| refusal.message);
        for (rating, wanted) in [(json!(1), 1), (json!("up"), 1), (json!(-1), -1), (json!("down"), -1)] {
            let rated = read(json!({"response_id": "a", "rating": rating})).expect("it is one");
            assert_eq!(rated.rating, Some(wanted));
        }
        for (wrong, words) in [
            (json!({"rating": 1}), "`response_id` is missing"),
            (json!({"response_id": "a"}), "nothing is said"),
            (json!({"response_id": "a", "rating": 2}), "should be 1 or -1"),
            (json!({"response_id": "a", "rating": 1.0}), "should be 1 or -1"),
            (json!({"response_id": "a", "ratng": 1}), "`ratng`: unknown field, did you mean `rating`?"),
            (
                json!({"response_id": "a", "comment": "x".repeat(9000)}),
                "`comment`: should be a text of at most 8192 bytes",
            ),
        ] {
            assert!(read(wrong.clone()).is_err_and(|message| message.contains(words)), "{wrong}");
        }
    }
}
