//! Any endpoint that speaks OpenAI's API: a provider, another machine's server, ours.
//!
//! Always asks for a stream. A stream that ends without a `finish_reason` is an error, since it looks like a short answer
//! otherwise. Nothing is asked twice and no redirect is followed: a key and a conversation go to the address that the
//! user wrote, once.

use std::collections::VecDeque;
use std::io::{self, BufReader};
use std::time::Duration;

use serde_json::{Map, Value, json};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

use super::sse::Events;
use super::{Context, Event, EventStream, FinishReason, Handler, HandlerError, Kind, Request, Secret, Usage, new_id};

/// Longest body of a refusal that is read, in bytes.
const REFUSAL_LIMIT: u64 = 64 << 10;

/// Where an endpoint is and how it is asked.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The address that `/chat/completions` follows.
    pub base_url: BaseUrl,
    /// The model, in the provider's words.
    pub model: String,
    /// The key, if it wants one.
    pub api_key: Option<Secret>,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest silence, before the first word and between two.
    pub read_timeout: Duration,
    /// What the provider calls the longest answer: `max_tokens`, or `max_completion_tokens` where that is refused.
    pub max_tokens_param: String,
}

/// An address that is one: `http://` or `https://`, a host, a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    text: String,
    host: String,
    encrypted: bool,
}

impl BaseUrl {
    /// Reads an address.
    ///
    /// # Errors
    /// When it is none; says why.
    pub fn parse(text: &str) -> Result<Self, String> {
        let example = "it should be like https://api.example.com/v1";
        let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| format!("not an address; {example}"))?;
        let encrypted = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("an address begins with https:// or http://; {example}")),
        };
        let authority = uri.authority().ok_or_else(|| format!("the address has no host; {example}"))?;
        if authority.as_str().contains('@') {
            return Err("a name or password in the address would be printed; use api_key".to_owned());
        }
        let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
        if host.is_empty() {
            return Err(format!("the address has no host; {example}"));
        }
        if uri.query().is_some() || text.contains('#') {
            return Err("the address ends before `?` and `#`".to_owned());
        }
        let text = text.trim_end_matches('/').to_owned();
        if text.ends_with("/chat/completions") {
            return Err("leave /chat/completions away: it is added".to_owned());
        }
        Ok(Self { text, host, encrypted })
    }

    /// Whether it is this machine.
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// The host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether what is sent there can be read on the way.
    pub fn can_be_overheard(&self) -> bool {
        !self.encrypted && !self.is_loopback()
    }
}

/// Asks an endpoint.
pub struct OpenAi {
    endpoint: Endpoint,
    agent: Agent,
}

impl OpenAi {
    /// Prepares to ask; connects to nothing.
    pub fn new(endpoint: Endpoint) -> Self {
        let mut config = Agent::config_builder()
            .timeout_connect(Some(endpoint.connect_timeout))
            .timeout_per_read(Some(endpoint.read_timeout))
            .timeout_per_write(Some(endpoint.read_timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("homeroom/", env!("CARGO_PKG_VERSION")));
        if endpoint.base_url.is_loopback() {
            // What is meant for this machine must not leave it by a proxy of the environment.
            config = config.proxy(None);
        }
        let agent = Agent::new_with_config(config.build());
        Self { endpoint, agent }
    }

    fn body(&self, request: &Request) -> Value {
        let mut body = Map::new();
        body.insert("model".into(), json!(self.endpoint.model));
        body.insert("messages".into(), json!(request.messages));
        body.insert("stream".into(), json!(true));
        body.insert("stream_options".into(), json!({"include_usage": true}));
        let optional = [
            (self.endpoint.max_tokens_param.as_str(), request.max_tokens.map(|n| json!(n))),
            ("temperature", request.temperature.map(|t| json!(t))),
            ("top_p", request.top_p.map(|p| json!(p))),
            ("seed", request.seed.map(|seed| json!(seed))),
            ("stop", Some(&request.stop).filter(|stop| !stop.is_empty()).map(|stop| json!(stop))),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                body.insert(name.into(), value);
            }
        }
        Value::Object(body)
    }

    /// `message` with what was wrong where, and without the key.
    fn error(&self, kind: Kind, message: &str) -> HandlerError {
        said_by(&self.endpoint, kind, message)
    }
}

fn said_by(endpoint: &Endpoint, kind: Kind, message: &str) -> HandlerError {
    let message: String = message.chars().filter(|c| !c.is_control()).take(400).collect();
    let message = format!("{}: {message}", endpoint.base_url.text);
    HandlerError::new(kind, endpoint.api_key.as_ref().map_or(message.clone(), |key| key.scrub(&message)))
}

impl Handler for OpenAi {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let body = self.body(request).to_string();
        let mut post = self.agent.post(format!("{}/chat/completions", self.endpoint.base_url.text));
        post = post.header("content-type", "application/json").header("accept", "text/event-stream");
        if let Some(key) = &self.endpoint.api_key {
            post = post.header("authorization", format!("Bearer {}", key.expose()));
        }
        let response = post.send(body.as_bytes()).map_err(|error| {
            let kind = kind_of(&error);
            self.error(kind, &words_of(&error))
        })?;
        if !response.status().is_success() {
            return Err(self.refusal(response));
        }
        let is_stream = response.body().mime_type() == Some("text/event-stream");
        if !is_stream {
            let kind = response.body().mime_type().unwrap_or("nothing").to_owned();
            return Err(self.error(Kind::Protocol, &format!("it answered with {kind} and not with a stream")));
        }
        // Any length: an answer is as long as it is. What is kept of it is bounded line by line.
        let reader = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(Box::new(Answer {
            events: Events::new(BufReader::new(reader)),
            endpoint: self.endpoint.clone(),
            context: context.clone(),
            ready: VecDeque::new(),
            started: false,
            finish: None,
            usage: Usage::default(),
            over: false,
        }))
    }
}

impl OpenAi {
    fn refusal(&self, response: Response<Body>) -> HandlerError {
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
        let seconds = header("retry-after-ms").map(|ms| ms / 1000.0).or_else(|| header("retry-after"));
        // An hour and more is as good as never, and what is not a duration is nothing.
        let retry_after = seconds.and_then(|s| Duration::try_from_secs_f64(s.min(3600.0)).ok());
        let text = response.into_body().into_with_config().limit(REFUSAL_LIMIT).read_to_string().unwrap_or_default();
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        let refused = Refused::read(&body);
        let kind = refused.kind(Some(status), retry_after);
        self.error(kind, &format!("{} (status {status})", refused.words()))
    }
}

/// An error object of a provider. They are alike, and no two the same.
struct Refused {
    message: Option<String>,
    code: String,
    param: Option<String>,
}

impl Refused {
    /// Reads the body of a refusal, or a frame of a stream.
    fn read(body: &Value) -> Self {
        let error = body.get("error").unwrap_or(body);
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let message = text(error).or_else(|| text(&error["message"])).or_else(|| text(&body["detail"]));
        let words = [&error["code"], &error["type"], &error["status"]];
        let code = words.map(|value| text(value).unwrap_or_else(|| value.to_string())).join(" ");
        Self { message, code, param: text(&error["param"]) }
    }

    fn words(&self) -> &str {
        self.message.as_deref().unwrap_or("it refused and did not say why")
    }

    fn kind(&self, status: Option<u16>, retry_after: Option<Duration>) -> Kind {
        let says = |word: &str| self.code.contains(word);
        // A frame within a stream has no status; some put it into the code.
        let status = status.or_else(|| self.code.split(' ').find_map(|word| word.parse().ok()));
        match status {
            _ if says("context_length") || says("exceed_context_size") => Kind::ContextLength,
            _ if says("model_not_found") => Kind::NotFound,
            Some(429) => Kind::RateLimited { retry_after },
            Some(401 | 403) => Kind::Authentication,
            Some(404 | 405) => Kind::NotFound,
            Some(408 | 504) => Kind::Timeout,
            Some(400..=499) => Kind::InvalidRequest { param: self.param.clone() },
            Some(500..=599) => Kind::Unavailable,
            Some(_) => Kind::Protocol,
            None if says("rate_limit") => Kind::RateLimited { retry_after },
            None if says("invalid_request") => Kind::InvalidRequest { param: self.param.clone() },
            None => Kind::Unavailable,
        }
    }
}

fn kind_of(error: &ureq::Error) -> Kind {
    match error {
        ureq::Error::Timeout(_) => Kind::Timeout,
        ureq::Error::Io(error) if is_timeout(error) => Kind::Timeout,
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => Kind::Protocol,
        ureq::Error::Http(_) | ureq::Error::BadUri(_) => Kind::Internal,
        _ => Kind::Unavailable,
    }
}

fn words_of(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => "no connection in time".to_owned(),
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::HostNotFound => "there is no such host, or no network".to_owned(),
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            "the connection was refused: nothing listens there".to_owned()
        }
        other => other.to_string(),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>());
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
        || matches!(inner, Some(ureq::Error::Timeout(_)))
}

/// An answer in the middle of being read.
struct Answer<R> {
    events: Events<R>,
    endpoint: Endpoint,
    context: Context,
    ready: VecDeque<Event>,
    started: bool,
    finish: Option<FinishReason>,
    usage: Usage,
    over: bool,
}

impl<R: io::BufRead> Answer<R> {
    /// Reads one event of the stream and makes events of it.
    fn step(&mut self) -> Result<(), HandlerError> {
        let data = match self.events.next() {
            Some(Ok(data)) => data,
            // After the finish nothing is missing but perhaps the usage.
            None | Some(Err(_)) if self.finish.is_some() => {
                self.end();
                return Ok(());
            }
            None => return Err(self.error(Kind::Cut, "the answer broke off: the connection ended before it did")),
            Some(Err(error)) if is_timeout(&error) => {
                return Err(self.error(Kind::Timeout, "the answer stopped in the middle: no further word in time"));
            }
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(self.error(Kind::Protocol, &error.to_string()));
            }
            Some(Err(error)) => return Err(self.error(Kind::Cut, &format!("the answer broke off: {error}"))),
        };
        if data.trim() == "[DONE]" {
            if self.finish.is_none() {
                return Err(self.error(Kind::Cut, "the answer broke off: it is done without a finish_reason"));
            }
            self.end();
            return Ok(());
        }
        let chunk: Value =
            serde_json::from_str(&data).map_err(|_| self.error(Kind::Protocol, "a piece of the answer is not JSON"))?;
        if chunk.get("error").is_some_and(|error| !error.is_null()) {
            let refused = Refused::read(&chunk);
            return Err(self.error(refused.kind(None, None), refused.words()));
        }
        self.take(&chunk);
        Ok(())
    }

    fn take(&mut self, chunk: &Value) {
        if !self.started {
            self.started = true;
            let text = |key: &str| chunk[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
            let id = text("id").unwrap_or_else(new_id);
            let model = text("model").unwrap_or_else(|| self.endpoint.model.clone());
            self.ready.push_back(Event::Start { id, model });
        }
        if let Some(usage) = chunk.get("usage").filter(|usage| usage.is_object()) {
            let count = |key: &str| usage[key].as_u64();
            self.usage = Usage { prompt_tokens: count("prompt_tokens"), completion_tokens: count("completion_tokens") };
        }
        let choice = &chunk["choices"][0];
        if self.finish.is_some() {
            return;
        }
        if let Some(text) = choice["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
            self.ready.push_back(Event::Delta { text: text.to_owned() });
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish = Some(match reason {
                "stop" => FinishReason::Stop,
                "length" => FinishReason::Length,
                "content_filter" => FinishReason::ContentFilter,
                other => FinishReason::Other(other.to_owned()),
            });
        }
    }

    fn end(&mut self) {
        self.over = true;
        let reason = self.finish.take().unwrap_or(FinishReason::Stop);
        self.ready.extend([Event::Finish { reason }, Event::Usage(self.usage)]);
    }

    fn error(&self, kind: Kind, message: &str) -> HandlerError {
        said_by(&self.endpoint, kind, message)
    }
}

impl<R: io::BufRead> Iterator for Answer<R> {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            if self.context.cancelled() {
                self.over = true;
                return Some(Err(HandlerError::new(Kind::Cancelled, "the answer was stopped")));
            }
            if let Err(error) = self.step() {
                self.over = true;
                return Some(Err(error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_before_it_is_used() -> Result<(), String> {
        for (good, loopback) in [
            ("https://api.example.com/v1", false),
            ("https://api.example.com/v1/", false),
            ("http://localhost:8080/v1", true),
            ("http://127.0.0.2:8080/v1", true),
            ("http://[::1]:8080", true),
            ("http://10.0.0.5:8000/v1", false),
            ("http://localhost.example.com", false),
            ("http://127.0.0.1.example.com", false),
        ] {
            assert_eq!(BaseUrl::parse(good)?.is_loopback(), loopback, "{good}");
        }
        for bad in [
            "",
            "api.example.com",
            "ftp://a/b",
            "https://",
            "https://me:secret@a/v1",
            "https://a/v1?key=1",
            "https://a/v1#x",
            "https://a/v1/chat/completions",
            "https://a b/",
        ] {
            assert!(BaseUrl::parse(bad).is_err(), "{bad}");
        }
        Ok(())
    }
}
