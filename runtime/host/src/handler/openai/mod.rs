//! A handler that asks an endpoint which speaks OpenAI's API: a provider, a server in the network, or another `homeroom serve`.
//!
//! It always asks for a stream of a conversation's answer. A stream that ends without a `finish_reason` is an error, since it would look like a short answer.
//! Nothing is asked twice, except that an endpoint which refuses `stream_options` is asked again without it. Redirects are not
//! followed: a key and a conversation go to the address that the user wrote, and to no other.

mod answer;
mod embedding;
mod endpoint;
mod piece;
mod refusal;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value, json};
use ureq::Agent;

pub use self::endpoint::{BaseUrl, Endpoint};
use self::stream::{Reading, STREAM_OPTIONS};
use super::{Context, EmbedRequest, Embeddings, EventStream, Gives, Handler, HandlerError, Message, Request, Role};

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

    /// Makes the HTTP client of one answer. Its shutdown ends every wait of that answer, and of no other.
    fn agent(&self) -> Agent {
        let endpoint = &self.endpoint;
        let mut config = Agent::config_builder()
            .timeout_connect(Some(endpoint.connect_timeout))
            .timeout_per_read(Some(endpoint.read_timeout))
            .timeout_per_write(Some(endpoint.read_timeout))
            .timeout_global(Some(endpoint.answer_timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("homeroom/", env!("CARGO_PKG_VERSION")));
        if endpoint.base_url.is_loopback() {
            // A proxy of the environment would take conversations away from this machine.
            config = config.proxy(None);
        }
        Agent::new_with_config(config.build())
    }

    fn body(&self, request: &Request) -> Map<String, Value> {
        let mut body = Map::new();
        body.insert("model".into(), json!(self.endpoint.model));
        // Every endpoint knows `system`; OpenAI's make `developer` of it where a model wants that.
        let role = |role| if role == Role::Developer { Role::System } else { role };
        let message = |message: &Message| json!({"role": role(message.role), "content": message.content});
        body.insert("messages".into(), request.messages.iter().map(message).collect());
        body.insert("stream".into(), json!(true));
        if !self.usage_refused.load(Ordering::SeqCst) {
            body.insert(STREAM_OPTIONS.into(), json!({"include_usage": true}));
        }
        let optional = [
            (self.endpoint.max_tokens_param.as_str(), request.max_tokens.map(|n| json!(n))),
            ("temperature", request.temperature.map(|t| json!(t))),
            ("top_k", request.top_k.map(|k| json!(k))),
            ("top_p", request.top_p.map(|p| json!(p))),
            ("min_p", request.min_p.map(|p| json!(p))),
            ("repetition_penalty", request.repetition_penalty.map(|p| json!(p))),
            ("frequency_penalty", request.frequency_penalty.map(|p| json!(p))),
            ("presence_penalty", request.presence_penalty.map(|p| json!(p))),
            ("seed", request.seed.map(|seed| json!(seed))),
            ("stop", Some(&request.stop).filter(|stop| !stop.is_empty()).map(|stop| json!(stop))),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                body.insert(name.into(), value);
            }
        }
        body
    }
}

impl Handler for OpenAi {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let context = context.within(self.endpoint.answer_timeout);
        let request = Request { max_tokens: context.tokens(request.max_tokens), ..request.clone() };
        let (body, usage_refused) = (self.body(&request), self.usage_refused.clone());
        Ok(Box::new(Reading::begin(self.endpoint.clone(), self.agent(), body, usage_refused, context)?))
    }

    fn gives(&self) -> Gives {
        Gives::Either
    }

    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        let context = context.within(self.endpoint.answer_timeout);
        embedding::embed(&self.endpoint, || self.agent(), request, &context)
    }
}
