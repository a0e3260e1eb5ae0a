//! A handler that asks an endpoint which speaks OpenAI's API: a provider, a server in the network, or another `homeroom serve`.
//!
//! It always asks for a stream of a conversation's answer. A stream that ends without a `finish_reason` is an error, since it would look like a short answer.
//! Nothing is asked twice, except that an endpoint which refuses `stream_options` is asked again without it. Redirects are not
//! followed: a key and a conversation go to the address that the user wrote, and to no other.

mod answer;
mod embedding;
mod request;

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};
use ureq::Agent;

use self::answer::{Answer, Wanted};
use self::request::STREAM_OPTIONS;
use super::provider::piece::choices;
use super::provider::reading::{EVENTS, Reading, Teller, WHOLE_BYTES_MAX, first, post, reader, unreadable};
use super::provider::refusal::{Refused, refusal};
pub use super::provider::{BaseUrl, Endpoint};
use super::sse::Events;
use super::{Backend, Context, EmbedRequest, Embeddings, EventStream, Gives, Handler, HandlerError, Kind, Request};

/// A handler that asks an endpoint.
pub struct OpenAi {
    endpoint: Endpoint,
    /// The endpoint has refused `stream_options`.
    usage_refused: Arc<AtomicBool>,
}

impl OpenAi {
    /// Makes a handler; connects to nothing.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, usage_refused: Arc::default() }
    }
}

impl Handler for OpenAi {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        request.check_for(Backend::OpenAi)?;
        let context = context.within(self.endpoint.answer_timeout);
        let request = &Request { max_tokens: context.tokens(request.max_tokens), ..request.clone() };
        let path = if request.prompt.is_some() { COMPLETIONS } else { CHAT };
        let usage_refused = self.usage_refused.clone();
        let body = request::body(&self.endpoint, request, !usage_refused.load(Ordering::SeqCst));
        let wanted = Wanted::of(request);
        let ask = move |endpoint: &Endpoint, agent: &Agent, teller: &Teller| {
            ask(endpoint, agent, path, body, &usage_refused, wanted, teller)
        };
        Ok(Box::new(Reading::begin(self.endpoint.clone(), context, ask)?))
    }

    fn gives(&self) -> Gives {
        Gives::Either
    }

    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        let context = context.within(self.endpoint.answer_timeout);
        embedding::embed(&self.endpoint, || self.endpoint.agent(&context), request, &context)
    }
}

/// Where conversations are sent, and where texts are that are gone on with.
const CHAT: &str = "chat/completions";
const COMPLETIONS: &str = "completions";

/// Sends the request and passes the answer on, as long as the caller listens.
fn ask(
    endpoint: &Endpoint,
    agent: &Agent,
    path: &str,
    mut body: Map<String, Value>,
    usage_refused: &AtomicBool,
    wanted: Wanted,
    teller: &Teller,
) -> Result<(), HandlerError> {
    let mut response = post(endpoint, agent, path, EVENTS, &body)?;
    if !response.status().is_success() {
        let refused = refusal(endpoint, response);
        if !refused.of_stream_options || body.get(STREAM_OPTIONS).is_none() {
            return Err(refused.error);
        }
        usage_refused.store(true, Ordering::SeqCst);
        body.remove(STREAM_OPTIONS);
        response = post(endpoint, agent, path, EVENTS, &body)?;
        if !response.status().is_success() {
            return Err(refusal(endpoint, response).error);
        }
    }
    let mut reader = reader(endpoint, response)?;
    if !teller.taken() {
        return Ok(());
    }
    // Its first character tells what it is; its content-type is often wrong.
    let first = first(&mut reader).map_err(|error| unreadable(endpoint, &error))?;
    match first {
        Some(b'<') => {
            let message = "it answered with a web page; is base_url the address without /chat/completions, often with /v1 at its end?";
            Err(endpoint.error(Kind::Protocol, message))
        }
        // An answer in one piece, or an error that came too late for a status.
        Some(b'{' | b'[') => {
            let mut text = String::new();
            let read = reader.take(WHOLE_BYTES_MAX).read_to_string(&mut text);
            read.map_err(|error| unreadable(endpoint, &error))?;
            let whole: Option<Value> = serde_json::from_str(&text).ok();
            let has_text = |choice: &Value| ["message", "delta", "text"].iter().any(|field| !choice[*field].is_null());
            let is_first = |(number, choice): (usize, &Value)| number == 0 && has_text(choice);
            let is_answer = |whole: &Value| choices(whole).any(is_first) || Refused::of_piece(whole).is_some();
            if !whole.as_ref().is_some_and(is_answer) {
                return Err(endpoint.error(Kind::Protocol, "it answered with JSON that is not an answer"));
            }
            teller.all(Answer::whole(endpoint, wanted, std::iter::once(Ok(text))))
        }
        _ => teller.all(Answer::new(endpoint, wanted, Events::new(reader))),
    }
}
