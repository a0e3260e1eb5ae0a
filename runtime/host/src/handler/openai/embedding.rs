//! Vectors that a provider makes.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::Agent;

use crate::handler::context::PATIENCE;
use crate::handler::provider::Endpoint;
use crate::handler::provider::reading::{BROKE_OFF, Reader, post, unreadable};
use crate::handler::provider::refusal::{Refused, refusal};
use crate::handler::{Context, EmbedRequest, Embeddings, HandlerError, Input, Kind};

/// Texts of one request to the provider: more would make an answer of many megabytes.
const TEXTS_MAX: usize = 256;
/// Longest answer, in bytes: 256 vectors of 4096 numbers of 30 characters.
const ANSWER_BYTES_MAX: u64 = 32 << 20;

/// An answer, in OpenAI's shape. What else is in it is not read.
#[derive(Deserialize)]
struct Answer {
    data: Vec<Row>,
    model: Option<String>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Row {
    index: Option<usize>,
    /// JSON has no number that is not finite, and one beyond f32 is not read.
    embedding: Vec<f32>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
}

/// Asks for the vectors of all texts, some at a time. `agent` makes the client of one request.
pub(super) fn embed(
    endpoint: &Endpoint,
    agent: impl Fn() -> Agent,
    request: &EmbedRequest,
    context: &Context,
) -> Result<Embeddings, HandlerError> {
    if request.refuse_long {
        let message = "`truncate` = false is not supported by a provider; leave it out";
        return Err(HandlerError::invalid("truncate", message));
    }
    let mut all = Embeddings { handler: endpoint.name.clone(), prompt_tokens: Some(0), ..Embeddings::default() };
    for texts in request.input.chunks(TEXTS_MAX) {
        let answer = ask_within(endpoint, agent(), body(endpoint, texts, request.dimensions), context)?;
        take(endpoint, &mut all, answer, texts.len())?;
    }
    Ok(all)
}

fn body(endpoint: &Endpoint, texts: &[Input], dimensions: Option<usize>) -> Map<String, Value> {
    let input = texts.iter().map(|text| match text {
        Input::Text(text) => json!(text),
        Input::Tokens(ids) => json!(ids),
    });
    let mut body = Map::new();
    body.insert("model".into(), json!(endpoint.model));
    body.insert("input".into(), input.collect());
    // Not every endpoint knows base64.
    body.insert("encoding_format".into(), json!("float"));
    if let Some(dimensions) = dimensions {
        body.insert("dimensions".into(), json!(dimensions));
    }
    body
}

/// Adds the vectors of `texts` texts to those before them.
fn take(endpoint: &Endpoint, all: &mut Embeddings, answer: Answer, texts: usize) -> Result<(), HandlerError> {
    let strange = |what: String| Err(endpoint.error(Kind::Protocol, &what));
    let Answer { data, model, usage } = answer;
    if data.len() != texts {
        return strange(format!("it sent {} vectors for {texts} texts", data.len()));
    }
    let mut rows: Vec<Option<Vec<f32>>> = vec![None; texts];
    for (at, row) in data.into_iter().enumerate() {
        let index = row.index.unwrap_or(at);
        match rows.get_mut(index) {
            Some(place @ None) => *place = Some(row.embedding),
            _ => return strange(format!("it sent no vector, or several, for one of the texts: index {index}")),
        }
    }
    for row in rows.into_iter().flatten() {
        if all.dimensions == 0 {
            all.dimensions = row.len();
        }
        if row.is_empty() || row.len() != all.dimensions {
            return strange(format!("its vectors have {} and {} numbers", all.dimensions, row.len()));
        }
        all.values.extend(row);
    }
    all.model = endpoint.name_of(model.as_deref().unwrap_or(&endpoint.model));
    let tokens = usage.and_then(|usage| usage.prompt_tokens);
    all.prompt_tokens = all.prompt_tokens.zip(tokens).map(|(sum, tokens)| sum.saturating_add(tokens));
    Ok(())
}

/// Asks in a thread of its own, so that a caller who leaves need not wait for the provider.
fn ask_within(
    endpoint: &Endpoint,
    agent: Agent,
    body: Map<String, Value>,
    context: &Context,
) -> Result<Answer, HandlerError> {
    context.check()?;
    let reader = Reader::new(endpoint)?;
    let (sender, told) = sync_channel(1);
    let (asked, client) = (endpoint.clone(), agent.clone());
    let run = move || {
        let _reader = reader;
        // The caller may have left.
        let _ = sender.send(ask(&asked, &client, &body));
    };
    let started = std::thread::Builder::new().name("provider".to_owned()).spawn(run);
    started.map_err(|error| endpoint.error(Kind::Internal, &format!("cannot start a thread: {error}")))?;
    loop {
        match told.recv_timeout(PATIENCE) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(endpoint.error(Kind::Internal, "the thread that reads the answer stopped"));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Err(gone) = context.check() {
            agent.shutdown();
            return Err(gone);
        }
    }
}

fn ask(endpoint: &Endpoint, agent: &Agent, body: &Map<String, Value>) -> Result<Answer, HandlerError> {
    let response = post(endpoint, agent, "embeddings", "application/json", body)?;
    if !response.status().is_success() {
        return Err(refusal(endpoint, response).error(endpoint));
    }
    let read = response.into_body().into_with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
    let bytes = read.map_err(|error| match error {
        ureq::Error::BodyExceedsLimit(_) => {
            endpoint.error(Kind::Protocol, &format!("its answer is longer than {} MiB", ANSWER_BYTES_MAX >> 20))
        }
        other => unreadable(endpoint, &other.into_io()),
    })?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(bytes).map_err(|error| {
        if error.is_eof() && !bytes.trim_ascii().is_empty() {
            return endpoint.error(Kind::Cut, BROKE_OFF);
        }
        let value: Option<Value> = serde_json::from_slice(bytes).ok();
        if let Some(refused) = value.as_ref().and_then(Refused::of_piece) {
            return endpoint.refused(refused.kind(None, None), refused.words(), "");
        }
        let page = bytes.trim_ascii_start().starts_with(b"<");
        let what = if page { "it answered with a web page".to_owned() } else { format!("it sent no vectors: {error}") };
        endpoint.error(Kind::Protocol, &format!("{what}; is base_url the address without /embeddings?"))
    })
}
