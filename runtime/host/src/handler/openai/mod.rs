//! A handler that asks an endpoint which speaks OpenAI's API: a provider, a server in the network, or another `homeroom serve`.
//!
//! It always asks for a stream of a conversation's answer. A stream that ends without a `finish_reason` is an error, since it would look like a short answer.
//! Nothing is asked twice, except that an endpoint which refuses `stream_options` is asked again without it. Redirects are not
//! followed: a key and a conversation go to the address that the user wrote, and to no other.

mod answer;
mod embedding;
mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};
use ureq::Agent;

use self::answer::{Answer, Wanted};
use self::request::STREAM_OPTIONS;
use super::provider::piece::choices;
use super::provider::reading::{BROKE_OFF, EVENTS, Reading, Teller, first, post, reader, unreadable, whole};
use super::provider::refusal::{Refusal, Refused, refusal};
pub use super::provider::{BaseUrl, Endpoint};
use super::sse::Events;
use super::{Backend, Context, EmbedRequest, Embeddings, EventStream, Gives, Handler, HandlerError, Kind, Request};

/// The field for the longest answer of a conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MaxTokensParam {
    /// `max_tokens`, which most endpoints know.
    #[default]
    MaxTokens,
    /// `max_completion_tokens`, where the other is refused.
    MaxCompletionTokens,
}

impl MaxTokensParam {
    /// Both.
    pub const ALL: [Self; 2] = [Self::MaxTokens, Self::MaxCompletionTokens];

    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::MaxTokens => "max_tokens",
            Self::MaxCompletionTokens => "max_completion_tokens",
        }
    }

    /// A refusal of the field that the settings chose is a fault of these, and not of the request. One of a conversation that is too long
    /// may name the field too.
    fn explained(self, refused: Refusal) -> Refusal {
        let is_of_field = matches!(refused.kind, Kind::InvalidRequest { .. })
            && refused.words.contains(Self::MaxCompletionTokens.word());
        if self == Self::MaxCompletionTokens || !is_of_field {
            return refused;
        }
        let more = "; set max_tokens_param = \"max_completion_tokens\" for this handler".to_owned() + &refused.more;
        Refusal { kind: Kind::Protocol, more, ..refused }
    }
}

/// A handler that asks an endpoint.
pub struct OpenAi {
    endpoint: Endpoint,
    max_tokens: MaxTokensParam,
    /// The endpoint has refused `stream_options`.
    usage_refused: Arc<AtomicBool>,
}

impl OpenAi {
    /// Makes a handler; connects to nothing.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, max_tokens: MaxTokensParam::default(), usage_refused: Arc::default() }
    }

    /// Has the longest answer asked for in this field.
    #[must_use]
    pub fn with_max_tokens_param(self, max_tokens: MaxTokensParam) -> Self {
        Self { max_tokens, ..self }
    }
}

impl Handler for OpenAi {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        request.check_for(Backend::OpenAi)?;
        let context = context.within(self.endpoint.answer_timeout);
        let request = &Request { max_tokens: context.tokens(request.max_tokens), ..request.clone() };
        let path = if request.prompt.is_some() { COMPLETIONS } else { CHAT };
        let usage_refused = self.usage_refused.clone();
        let max_tokens = self.max_tokens;
        let body = request::body(&self.endpoint, max_tokens, request, !usage_refused.load(Ordering::SeqCst));
        let wanted = Wanted::of(request);
        let ask = move |endpoint: &Endpoint, agent: &Agent, teller: &Teller| {
            ask(endpoint, agent, (path, body, max_tokens), &usage_refused, wanted, teller)
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
    (path, mut body, max_tokens): (&str, Map<String, Value>, MaxTokensParam),
    usage_refused: &AtomicBool,
    wanted: Wanted,
    teller: &Teller,
) -> Result<(), HandlerError> {
    let mut response = post(endpoint, agent, path, EVENTS, &body)?;
    if !response.status().is_success() {
        let refused = refusal(endpoint, response);
        if !refused.of_stream_options || body.get(STREAM_OPTIONS).is_none() {
            return Err(max_tokens.explained(refused).error(endpoint));
        }
        usage_refused.store(true, Ordering::SeqCst);
        body.remove(STREAM_OPTIONS);
        response = post(endpoint, agent, path, EVENTS, &body)?;
        if !response.status().is_success() {
            return Err(max_tokens.explained(refusal(endpoint, response)).error(endpoint));
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
            let text = whole(&mut reader).map_err(|error| unreadable(endpoint, &error))?;
            let whole: Option<Value> = match serde_json::from_str(&text) {
                Err(error) if error.is_eof() => return Err(endpoint.error(Kind::Cut, BROKE_OFF)),
                whole => whole.ok(),
            };
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
