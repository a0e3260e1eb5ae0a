//! `POST /v1/embeddings`: texts in, vectors out.
//!
//! A text longer than the model reads is cut, as in sentence-transformers and Ollama; the header `x-homeroom-truncated` counts those that
//! were, and `"truncate": false` refuses them, as OpenAI does. Nothing of a text or a vector is logged.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::prelude::*;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use tokio::task::spawn_blocking;

use super::App;
use super::admit::{Admission, Asker, Need};
use super::apart::apart;
use super::body::{self, Waiting, name_ignored};
use super::reply::{HANDLER, Refusal};
use crate::handler::{EmbedRequest, Embeddings, Gives, HandlerError, Input, Kind};
use crate::toml_problems::near;

/// Most texts of a request, as at OpenAI.
pub(super) const INPUTS_MAX: usize = 2048;
/// The header that counts the texts that were cut.
const TRUNCATED: &str = "x-homeroom-truncated";

/// How a vector is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// As numbers.
    Float,
    /// As base64 of f32, the lowest byte first, which OpenAI's own clients ask for.
    Base64,
}

/// A request, read.
#[derive(Debug)]
struct Asked {
    model: String,
    request: EmbedRequest,
    format: Format,
    ignored: Vec<String>,
    user: Option<String>,
}

pub(super) async fn embeddings(State(app): State<Arc<App>>, request: Request) -> Response {
    match answer(&app, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    }
}

async fn answer(app: &Arc<App>, request: Request) -> Result<Response, Refusal> {
    let asker = Asker::of(&request);
    let body = body::read(app, request).await?;
    let served = app.clone();
    let (admission, asked) = apart(move || {
        let asked = read(&body)?;
        let handler = asker.handler(&served, &asked.model, Gives::Vectors)?;
        let admission = asker.admit(&served, handler, asked.user.as_deref(), &Need::Vectors(&asked.request))?;
        Ok((admission, asked))
    })
    .await?;
    let (Admission { handler, context, .. }, Asked { model, request, format, ignored, .. }) = (admission, asked);
    let waiting = Waiting(context.clone());
    let made = spawn_blocking(move || -> Result<_, HandlerError> {
        let made = handler.embed(&request, &context)?;
        Ok((reply(&model, &made, format), made.handler, made.truncated))
    });
    let made = made.await.map_err(|_| HandlerError::new(Kind::Internal, "the handler panicked"))?;
    let (body, by, truncated) = made.map_err(|error| {
        let too_long = error.kind == Kind::ContextLength;
        let refusal = Refusal::from(error);
        if too_long { Refusal { param: Some("input".to_owned()), ..refusal } } else { refusal }
    })?;
    drop(waiting);
    let mut response = (StatusCode::OK, [(header::CONTENT_TYPE, "application/json")], body).into_response();
    let headers = response.headers_mut();
    if let Ok(by) = HeaderValue::try_from(by) {
        headers.insert(HANDLER, by);
    }
    if truncated > 0 {
        headers.insert(TRUNCATED, HeaderValue::from(truncated));
    }
    name_ignored(headers, &ignored);
    Ok(response)
}

const HONOURED: [&str; 5] = ["model", "input", "encoding_format", "dimensions", "truncate"];
/// Fields of OpenAI's API that do not change the vectors.
const HARMLESS: [&str; 1] = ["user"];

/// Reads a body.
fn read(body: &[u8]) -> Result<Asked, HandlerError> {
    let mut fields = body::fields(body)?;
    let mut ignored = Vec::new();
    for (field, _) in fields.iter().filter(|(_, value)| !value.is_null()) {
        if HARMLESS.contains(&field.as_str()) {
            ignored.push(field.clone());
        } else if !HONOURED.contains(&field.as_str()) {
            let name: String = field.chars().take(80).collect();
            return Err(HandlerError::invalid(
                &name,
                format!("`{name}` is not known here, {}", near(&name, &HONOURED)),
            ));
        }
    }
    let input = take(&mut fields, "input").ok_or_else(|| HandlerError::invalid("input", "`input` is missing"))?;
    let model = take(&mut fields, "model").ok_or_else(|| HandlerError::invalid("model", "`model` is missing"))?;
    let Value::String(model) = model else { return Err(HandlerError::invalid("model", "`model` should be a text")) };
    let format = match take(&mut fields, "encoding_format") {
        None => Format::Float,
        Some(format) if format == "float" => Format::Float,
        Some(format) if format == "base64" => Format::Base64,
        Some(_) => return Err(HandlerError::invalid("encoding_format", "`encoding_format` should be float or base64")),
    };
    let dimensions = take(&mut fields, "dimensions").map(|value| {
        let dimensions = value.as_u64().filter(|dimensions| *dimensions >= 1);
        dimensions.and_then(|dimensions| usize::try_from(dimensions).ok())
    });
    if dimensions == Some(None) {
        return Err(HandlerError::invalid("dimensions", "`dimensions` should be a whole number from 1"));
    }
    let truncate = take(&mut fields, "truncate").map_or(Some(true), |truncate| truncate.as_bool());
    let truncate = truncate.ok_or_else(|| HandlerError::invalid("truncate", "`truncate` should be true or false"))?;
    let request = EmbedRequest { input: inputs(input)?, dimensions: dimensions.flatten(), refuse_long: !truncate };
    let user = take(&mut fields, "user").and_then(|user| user.as_str().map(str::to_owned));
    Ok(Asked { model, request, format, ignored, user })
}

fn take(fields: &mut Map<String, Value>, field: &str) -> Option<Value> {
    fields.get_mut(field).map(Value::take).filter(|value| !value.is_null())
}

/// Reads a text, a list of texts, the tokens of one text, or a list of those.
fn inputs(input: Value) -> Result<Vec<Input>, HandlerError> {
    let wrong = |at: &str| {
        let message = format!("`{at}` should be a text, a list of texts, a list of tokens, or a list of those");
        HandlerError::invalid("input", message)
    };
    let tokens = |list: &[Value], at: &str| -> Result<Input, HandlerError> {
        let ids = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        ids.collect::<Option<Vec<u32>>>().map(Input::Tokens).ok_or_else(|| wrong(at))
    };
    let list = match input {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(list) => list,
        _ => return Err(wrong("input")),
    };
    match list.first() {
        None => return Err(HandlerError::invalid("input", "`input` is an empty list")),
        Some(Value::Number(_)) => return Ok(vec![tokens(&list, "input")?]),
        Some(_) => {}
    }
    if list.len() > INPUTS_MAX {
        let message = format!("`input` has {} texts, at most {INPUTS_MAX} are taken at once", list.len());
        return Err(HandlerError::invalid("input", message));
    }
    let read = list.into_iter().enumerate().map(|(at, value)| match value {
        Value::String(text) => Ok(Input::Text(text)),
        Value::Array(ids) => tokens(&ids, &format!("input[{at}]")),
        _ => Err(wrong(&format!("input[{at}]"))),
    });
    read.collect()
}

/// The body of an answer.
fn reply(model: &str, made: &Embeddings, format: Format) -> Vec<u8> {
    let vectors = made.values.chunks_exact(made.dimensions.max(1)).enumerate();
    let data = vectors.map(|(index, values)| Row { object: "embedding", index, embedding: Vector(values, format) });
    let tokens =
        made.prompt_tokens.map_or(Value::Null, |tokens| json!({"prompt_tokens": tokens, "total_tokens": tokens}));
    let whole = Reply { object: "list", data: data.collect(), model, usage: tokens };
    serde_json::to_vec(&whole).expect("its parts have names and finite numbers")
}

#[derive(Serialize)]
struct Reply<'a> {
    object: &'static str,
    data: Vec<Row<'a>>,
    model: &'a str,
    usage: Value,
}

#[derive(Serialize)]
struct Row<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

struct Vector<'a>(&'a [f32], Format);

impl Serialize for Vector<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(values, format) = self;
        match format {
            Format::Float => values.serialize(serializer),
            Format::Base64 => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                serializer.serialize_str(&BASE64_STANDARD.encode(&bytes))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(body: &Value) -> Result<Asked, HandlerError> {
        read(body.to_string().as_bytes())
    }

    #[test]
    fn all_forms_of_input_are_read() -> Result<(), HandlerError> {
        for (input, read) in [
            (json!("hi"), vec![Input::Text("hi".into())]),
            (json!(""), vec![Input::Text(String::new())]),
            (json!(["a", "b"]), vec![Input::Text("a".into()), Input::Text("b".into())]),
            (json!([1, 2, 3]), vec![Input::Tokens(vec![1, 2, 3])]),
            (json!([[1, 2], [3]]), vec![Input::Tokens(vec![1, 2]), Input::Tokens(vec![3])]),
            (json!([[]]), vec![Input::Tokens(vec![])]),
        ] {
            assert_eq!(asked(&json!({"model": "m", "input": input}))?.request.input, read, "{input}");
        }
        let all = asked(&json!({
            "model": "m", "input": "x", "encoding_format": "base64", "dimensions": 36, "user": "u", "truncate": false,
        }))?;
        assert_eq!((all.format, all.request.dimensions, all.request.refuse_long), (Format::Base64, Some(36), true));
        assert_eq!(all.ignored, ["user"]);
        let none = asked(&json!({"model": "m", "input": "x", "encoding_format": null, "dimensions": null}))?;
        assert_eq!((none.format, none.request.dimensions, none.request.refuse_long), (Format::Float, None, false));
        Ok(())
    }

    #[test]
    fn what_is_wrong_is_refused_by_name() {
        let many = vec!["x"; INPUTS_MAX + 1];
        for (field, value) in [
            ("input", json!([])),
            ("input", json!(7)),
            ("input", json!({"text": "x"})),
            ("input", json!([null])),
            ("input", json!(["x", 1])),
            ("input", json!(["x", {"a": 1}])),
            ("input", json!([1, "x"])),
            ("input", json!([1, -2])),
            ("input", json!([1.5])),
            ("input", json!([4_294_967_296_u64])),
            ("input", json!([[[1]]])),
            ("input", json!([true])),
            ("input", json!(many)),
            ("input", Value::Null),
            ("model", json!(["m"])),
            ("model", Value::Null),
            ("encoding_format", json!("int8")),
            ("encoding_format", json!(1)),
            ("dimensions", json!(0)),
            ("dimensions", json!(-3)),
            ("dimensions", json!("36")),
            ("truncate", json!("END")),
            ("inputs", json!("x")),
            ("messages", json!([])),
        ] {
            let mut body = json!({"model": "m", "input": "x"});
            body[field] = value.clone();
            let error = asked(&body).expect_err(field);
            assert_eq!(error.kind, Kind::InvalidRequest { param: Some(field.to_owned()) }, "{field} {value}: {error}");
        }
        let near = asked(&json!({"model": "m", "input": "x", "dimension": 3})).expect_err("it is not known").message;
        assert!(near.contains("did you mean `dimensions`?"), "{near}");
        for body in ["", "[]", "{\"model\":", "\u{0}", &"[".repeat(100_000)] {
            assert!(read(body.as_bytes()).is_err(), "{body:.20}");
        }
    }
}
