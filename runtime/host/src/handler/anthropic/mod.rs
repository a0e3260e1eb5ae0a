//! A handler that asks Anthropic's Messages API, in either of its versions.
//!
//! It always asks for a stream. A stream that ends without a reason is an error, since it would look like a short answer. Nothing is asked
//! twice and redirects are not followed.
//!
//! Source: <https://docs.anthropic.com/en/api/messages> and its pages on streaming, tools, structured outputs, errors and versions.

mod answer;
mod request;

use serde_json::{Map, Value};
use ureq::Agent;

use self::answer::Answer;
use super::provider::Endpoint;
use super::provider::reading::{EVENTS, Reading, Teller, first, post_with, reader, unreadable, whole};
use super::provider::refusal::refusal;
use super::sse::Events;
use super::{Backend, Context, EventStream, Handler, HandlerError, Kind, Request};

/// A version of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiVersion {
    /// `2023-06-01`.
    V2023,
    /// `2026-10-21`: takes the key as a bearer's, and knows neither `temperature` nor `top_p` nor `top_k`.
    V2026,
}

impl ApiVersion {
    /// All of them, the newest last.
    pub const ALL: [Self; 2] = [Self::V2023, Self::V2026];

    /// The word of the header `anthropic-version`.
    pub fn word(self) -> &'static str {
        match self {
            Self::V2023 => "2023-06-01",
            Self::V2026 => "2026-10-21",
        }
    }
}

/// A handler that asks Anthropic's API.
pub struct Anthropic {
    /// The address and the key.
    pub endpoint: Endpoint,
    /// The API's version.
    pub version: ApiVersion,
    /// What steers the draw and is not known there is left out; otherwise it is refused.
    pub drop_unsupported: bool,
    /// Longest answer where a request does not say: the API has no default.
    pub max_tokens: usize,
}

impl Handler for Anthropic {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let ignored = request.fit(Backend::Anthropic(self.version), self.drop_unsupported)?;
        let context = context.within(self.endpoint.answer_timeout);
        let request =
            &Request { max_tokens: context.tokens(request.max_tokens.or(Some(self.max_tokens))), ..request.clone() };
        let body = request::body(self, request, &ignored)?;
        let (version, tools) = (self.version, !request.tools.is_empty());
        let ignored: Vec<String> = ignored.into_iter().map(|field| field.name().to_owned()).collect();
        let ask = move |endpoint: &Endpoint, agent: &Agent, teller: &Teller| {
            ask(endpoint, agent, version, &body, teller, |endpoint| Answer::new(endpoint, tools, ignored))
        };
        Ok(Box::new(Reading::begin(self.endpoint.clone(), context, ask)?))
    }
}

/// Sends the request and passes the answer on, as long as the caller listens.
fn ask<'a>(
    endpoint: &'a Endpoint,
    agent: &Agent,
    version: ApiVersion,
    body: &Map<String, Value>,
    teller: &Teller,
    answer: impl FnOnce(&'a Endpoint) -> Answer<'a>,
) -> Result<(), HandlerError> {
    let base = &endpoint.base_url.text;
    let path = if base.ends_with("/v1") { "messages" } else { "v1/messages" };
    let mut headers = vec![("anthropic-version", version.word().to_owned())];
    headers.extend(endpoint.api_key.as_ref().map(|key| match version {
        ApiVersion::V2023 => ("x-api-key", key.expose().to_owned()),
        ApiVersion::V2026 => ("authorization", format!("Bearer {}", key.expose())),
    }));
    let response = post_with(endpoint, agent, &format!("{base}/{path}"), EVENTS, &headers, body)?;
    if !response.status().is_success() {
        return Err(refusal(endpoint, response).error(endpoint));
    }
    let mut reader = reader(endpoint, response)?;
    if !teller.taken() {
        return Ok(());
    }
    let answer = answer(endpoint);
    match first(&mut reader).map_err(|error| unreadable(endpoint, &error))? {
        Some(b'<') => {
            let message = "it answered with a web page; is base_url the address without /v1/messages?";
            Err(endpoint.error(Kind::Protocol, message))
        }
        Some(b'{' | b'[') => {
            let text = whole(&mut reader).map_err(|error| unreadable(endpoint, &error))?;
            teller.all(answer.whole(&text))
        }
        _ => teller.all(answer.stream(Events::new(reader))),
    }
}
