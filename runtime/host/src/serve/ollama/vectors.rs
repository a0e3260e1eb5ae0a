//! `/api/embed`, and its older form `/api/embeddings`: texts in, vectors out.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tokio::task::spawn_blocking;

use super::{error, name_of};
use crate::handler::{EmbedRequest, Embeddings, Gives, HandlerError, Input, Kind};
use crate::serve::App;
use crate::serve::admit::{Admission, Asker, Need};
use crate::serve::apart::apart;
use crate::serve::body::{self, Waiting, name_ignored};
use crate::serve::embeddings::INPUTS_MAX;
use crate::serve::reply::{HANDLER, Refusal};
use crate::serve::request::{not_known, wrong};

const HONOURED: [&str; 4] = ["model", "input", "truncate", "dimensions"];
const HONOURED_BEFORE: [&str; 2] = ["model", "prompt"];
/// Fields that change nothing: models stay loaded, and draw nothing.
const HARMLESS: [&str; 3] = ["keep_alive", "options", "user"];

pub(in crate::serve) async fn embed(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request, false).await.unwrap_or_else(|refusal| error(&refusal))
}

pub(in crate::serve) async fn embeddings(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request, true).await.unwrap_or_else(|refusal| error(&refusal))
}

async fn answer(app: &Arc<App>, request: Request, older: bool) -> Result<Response, Refusal> {
    let started = Instant::now();
    let asker = Asker::of(&request);
    let body = body::read_of_ollama(app, request).await?;
    let served = app.clone();
    let (admission, asked) = apart(move || {
        let asked = read(&body::fields(&body)?, older)?;
        let handler = asker.handler(&served, &name_of(&served, &asked.model), Gives::Vectors)?;
        let admission = asker.admit(&served, handler, asked.user.as_deref(), &Need::Vectors(&asked.request))?;
        Ok((admission, asked))
    })
    .await?;
    let (Admission { handler, context, .. }, Asked { model, request, ignored, .. }) = (admission, asked);
    let waiting = Waiting(context.clone());
    let made = spawn_blocking(move || -> Result<_, HandlerError> {
        let made = handler.embed(&request, &context)?;
        Ok((reply(&model, &made, started, older).to_string(), made.handler))
    });
    let (body, by) = made.await.map_err(|_| HandlerError::new(Kind::Internal, "the handler panicked"))??;
    drop(waiting);
    let mut response = ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    if let Ok(by) = HeaderValue::try_from(by) {
        response.headers_mut().insert(HANDLER, by);
    }
    name_ignored(response.headers_mut(), &ignored);
    Ok(response)
}

struct Asked {
    model: String,
    request: EmbedRequest,
    ignored: Vec<String>,
    user: Option<String>,
}

fn read(fields: &Map<String, Value>, older: bool) -> Result<Asked, HandlerError> {
    let honoured: &[&str] = if older { &HONOURED_BEFORE } else { &HONOURED };
    let mut ignored = Vec::new();
    for (field, _) in fields.iter().filter(|(_, value)| !value.is_null()) {
        if HARMLESS.contains(&field.as_str()) {
            ignored.push(field.clone());
        } else if !honoured.contains(&field.as_str()) {
            return Err(not_known(field, honoured));
        }
    }
    let get = |field: &str| fields.get(field).filter(|value| !value.is_null());
    let model = get("model").and_then(Value::as_str).filter(|model| !model.is_empty());
    let model = model.ok_or_else(|| wrong("model", "the name of a model"))?.to_owned();
    let truncate = get("truncate").map_or(Some(true), Value::as_bool);
    let truncate = truncate.ok_or_else(|| wrong("truncate", "true or false"))?;
    let dimensions = get("dimensions").map(|value| value.as_u64().and_then(|count| usize::try_from(count).ok()));
    let dimensions = match dimensions {
        None => None,
        // Some clients send 0 for all.
        Some(Some(0)) => None,
        Some(Some(count)) => Some(count),
        Some(None) => return Err(wrong("dimensions", "a whole number")),
    };
    let field = if older { "prompt" } else { "input" };
    let wanted = || wrong(field, if older { "a text" } else { "a text or a list of texts" });
    let text = |value: &Value| value.as_str().map(|text| Input::Text(text.to_owned()));
    let input = match get(field) {
        Some(Value::Array(list)) if !older && list.len() <= INPUTS_MAX => {
            list.iter().map(text).collect::<Option<Vec<_>>>().ok_or_else(wanted)?
        }
        Some(Value::Array(list)) if !older => {
            let message = format!("`input` has {} texts, at most {INPUTS_MAX} are taken at once", list.len());
            return Err(HandlerError::invalid("input", message));
        }
        Some(value) => vec![text(value).ok_or_else(wanted)?],
        None => return Err(wanted()),
    };
    if input.is_empty() {
        return Err(HandlerError::invalid("input", "`input` is an empty list"));
    }
    let request = EmbedRequest { input, dimensions, refuse_long: !truncate };
    let user = get("user").and_then(Value::as_str).map(str::to_owned);
    Ok(Asked { model, request, ignored, user })
}

fn reply(model: &str, made: &Embeddings, started: Instant, older: bool) -> Value {
    let mut rows = made.values.chunks_exact(made.dimensions.max(1));
    if older {
        return json!({"embedding": rows.next().unwrap_or_default()});
    }
    json!({
        "model": model,
        "embeddings": rows.collect::<Vec<_>>(),
        "total_duration": u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX),
        "load_duration": 0,
        "prompt_eval_count": made.prompt_tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_alone_or_in_a_list() {
        let read = |body: &Value, older| {
            let asked = read(body.as_object().expect("an object"), older);
            asked.map(|asked| (asked.request.input.len(), asked.request.refuse_long)).map_err(|error| error.message)
        };
        assert_eq!(read(&json!({"model": "m", "input": "a", "keep_alive": 5}), false), Ok((1, false)));
        assert_eq!(read(&json!({"model": "m", "input": ["a", "b"], "truncate": false}), false), Ok((2, true)));
        assert_eq!(read(&json!({"model": "m", "prompt": "a", "options": {}}), true), Ok((1, false)));
        for (wrong, older) in [
            (json!({"input": "a"}), false),
            (json!({"model": "m"}), false),
            (json!({"model": "m", "input": []}), false),
            (json!({"model": "m", "input": [1]}), false),
            (json!({"model": "m", "prompt": "a"}), false),
            (json!({"model": "m", "prompt": ["a"]}), true),
            (json!({"model": "m", "input": "a", "dimensions": -1}), false),
            (json!({"model": "m", "input": vec!["x"; INPUTS_MAX + 1]}), false),
        ] {
            assert!(read(&wrong, older).is_err(), "{:.80}", wrong.to_string());
        }
    }
}
