//! Admission of a request to a model: whether its key may use that, and how much; and what it came to.
//!
//! A handler that was admitted is asked once. What it reserved is paid by what was said, also when the client left in the middle.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::StatusCode;
use homeroom_engine::inference::Engine;

use super::caller::Caller;
use super::keys::Key;
use super::keys::limits::{Excess, Reached, Ticket, Wish};
use super::metrics::Answered;
use super::record::{Known, Record};
use super::reply::Refusal;
use super::{App, Models, no_model, wrong_model};
use crate::handler::{
    self, Completion, Context, EmbedRequest, Embeddings, Event, EventStream, FinishReason, Gives, Handler,
    HandlerError, Input, Message, Prompt, ResponseFormat, ToolCall, new_id,
};
use crate::progress::line;

/// The header by which Open WebUI marks work that may wait: titles, tags, suggestions.
const TASK: &str = "x-openwebui-task";
/// Bytes of a token, to estimate a prompt before it is read. Fewer than in most languages, so that enough is reserved.
const BYTES_OF_RESERVED: usize = 3;
/// Bytes of a token, to estimate what a provider does not count, or what was said before a client left.
const BYTES_OF_PAID: usize = 4;

/// The key of a request that was let in.
#[derive(Clone)]
pub(super) struct Access(pub(super) Option<Arc<Key>>);

impl Access {
    /// Returns true if a model may be used. One that was trained here for a key is for that key, and for those that name it.
    pub(super) fn may_use(&self, models: &Models, model: &str) -> bool {
        let key = self.0.as_deref();
        match models.trained_for(model) {
            Some(owner) if owner != key.map(|key| key.name.as_str()) => key.is_some_and(|key| key.names(model)),
            Some(_) => true,
            None => key.is_none_or(|key| key.may_use(model)),
        }
    }
}

/// Who asks, as it is known before the body is read.
#[derive(Clone)]
pub(super) struct Asker {
    pub(super) caller: Caller,
    access: Access,
    record: Arc<Record>,
    background: bool,
}

/// A request that was let in to a handler.
pub(super) struct Admission {
    /// What answers it; it is to be asked once.
    pub(super) handler: Arc<dyn Handler>,
    /// The context of the answer.
    pub(super) context: Context,
    /// The id of the answer: ours, as a provider may give one twice, and what is thought of an answer is of that answer alone.
    pub(super) id: String,
}

/// What is asked of a model.
pub(super) enum Need<'a> {
    /// An answer.
    Answer(&'a handler::Request),
    /// Vectors.
    Vectors(&'a EmbedRequest),
}

impl Asker {
    /// Who sent a request.
    pub(super) fn of(request: &Request) -> Self {
        let extensions = request.extensions();
        let record = extensions.get::<Arc<Record>>().cloned();
        Self {
            caller: Caller::of(extensions),
            access: extensions.get::<Access>().cloned().unwrap_or(Access(None)),
            record: record.unwrap_or_else(|| Arc::new(Record::new(request.headers(), "", ""))),
            // Open WebUI sends it with a person's request, too, and empty.
            background: request.headers().get(TASK).is_some_and(|task| !task.as_bytes().trim_ascii().is_empty()),
        }
    }

    /// Returns the handler of a model, if it may be used and gives what is wanted.
    ///
    /// # Errors
    /// When there is none, the key may not use it, or it gives something else.
    pub(super) fn handler(&self, app: &App, model: &str, wanted: Gives) -> Result<Arc<dyn Handler>, Refusal> {
        let models = app.models();
        let listed = models.listed(model).map(str::to_owned);
        let found = listed.and_then(|listed| Some((models.get(&listed)?, listed)));
        let may_use = found.as_ref().is_some_and(|(_, listed)| self.access.may_use(&models, listed));
        let is_anothers = found.as_ref().is_some_and(|(_, listed)| models.trained_for(listed).is_some());
        // Of a model that was trained for another nobody hears.
        let found = found.filter(|_| may_use || !is_anothers);
        let Some((handler, listed)) = found else { return Err(no_model(app, &self.access, model)) };
        if !may_use {
            return Err(self.forbidden(app, &listed));
        }
        let gives = handler.gives();
        if gives != wanted && gives != Gives::Either && wanted != Gives::Either {
            return Err(wrong_model(app, &self.access, model, wanted));
        }
        self.record.known().model = Some(listed);
        Ok(handler)
    }

    fn forbidden(&self, app: &App, model: &str) -> Refusal {
        let models = app.models();
        let known: Vec<&str> = models.names().filter(|name| self.access.may_use(&models, name)).collect();
        let key = self.caller.key.as_deref().unwrap_or_default();
        let may = if known.is_empty() { "nothing that is served".to_owned() } else { known.join(", ") };
        let message = format!("the key `{key}` may not use `{model}`; it may use {may}");
        let refusal = Refusal::new(StatusCode::FORBIDDEN, message);
        Refusal {
            kind: "permission_error",
            param: Some("model".to_owned()),
            code: Some("model_not_allowed"),
            ..refusal
        }
    }

    /// Lets a request in to a handler.
    ///
    /// `user` is the person whom the body names.
    ///
    /// # Errors
    /// When the request asks for more than is given, or reaches a limit of its key.
    pub(super) fn admit(
        self,
        app: &App,
        handler: Arc<dyn Handler>,
        user: Option<&str>,
        need: &Need,
    ) -> Result<Admission, Refusal> {
        let Self { caller, access, record, background } = self;
        let caller = caller.with_user(user)?;
        let settings = app.settings();
        let mut context = Context::default().or_with(app.ending.clone()).within(settings.answer_timeout);
        if background {
            context = context.in_background();
        }
        let (bytes, answer) = match need {
            Need::Answer(request) => (prompt_bytes(request), request.max_tokens),
            Need::Vectors(request) => (request.input.iter().map(input_bytes).sum(), Some(0)),
        };
        let choices = match need {
            Need::Answer(request) => request.choices() as u64,
            Need::Vectors(_) => 1,
        };
        if let Some(most) = settings.max_tokens {
            if let Some(asked) = answer.filter(|asked| *asked > most) {
                let message = format!("`max_tokens` is {asked}, answers here are of at most {most}");
                return Err(HandlerError::invalid("max_tokens", message).into());
            }
            context = context.at_most(most);
        }
        {
            let mut known = record.known();
            (known.user, known.background) = (caller.user.clone(), background);
        }
        let mut reserved = 0;
        let ticket = match &access.0 {
            None => None,
            Some(key) => {
                let answer = answer.map(|tokens| tokens as u64);
                let wish = Wish { prompt: (bytes / BYTES_OF_RESERVED) as u64, answer, choices };
                let ticket = ticket(app, key, &caller, &record, wish)?;
                reserved = ticket.answer();
                if let Some(most) = ticket.at_most {
                    context = context.at_most(usize::try_from(most / choices).unwrap_or(usize::MAX).max(1));
                }
                Some(ticket)
            }
        };
        let model = record.known().model.clone().unwrap_or_default();
        let id = new_id();
        let handler = match need {
            Need::Answer(_) => app.class.observed(handler, &id, &model, &caller),
            Need::Vectors(_) => handler,
        };
        let bill = Bill {
            ticket,
            metrics: app.metrics.clone(),
            record,
            prompt: (bytes / BYTES_OF_PAID) as u64,
            answer: reserved,
            begun: false,
            pieces: 0,
            bytes: 0,
            first: None,
            last: None,
            usage: handler::Usage::default(),
            end: None,
        };
        let handler = Arc::new(Admitted { handler, id: id.clone(), bill: Mutex::new(Some(bill)) });
        Ok(Admission { handler, context, id })
    }
}

/// Bytes of a conversation.
fn prompt_bytes(request: &handler::Request) -> usize {
    let prompt = match &request.prompt {
        None => 0,
        Some(Prompt::Text(text)) => text.len(),
        Some(Prompt::Tokens(tokens)) => tokens.len().saturating_mul(BYTES_OF_PAID),
    };
    let of_call = |call: &ToolCall| call.name.len() + call.arguments.len();
    let of_message = |message: &Message| {
        let reasoning = message.reasoning.as_ref().map_or(0, String::len);
        message.content.len() + reasoning + message.tool_calls.iter().map(of_call).sum::<usize>()
    };
    let tools: usize = request.tools.iter().map(|tool| tool.json().to_string().len()).sum();
    let form = match &request.response_format {
        Some(ResponseFormat::JsonSchema { schema, .. }) => schema.to_string().len(),
        Some(ResponseFormat::Text | ResponseFormat::JsonObject) | None => 0,
    };
    prompt + tools + form + request.messages.iter().map(of_message).sum::<usize>()
}

fn input_bytes(input: &Input) -> usize {
    match input {
        Input::Text(text) => text.len(),
        Input::Tokens(tokens) => tokens.len().saturating_mul(BYTES_OF_PAID),
    }
}

/// Counts a request that asks no model.
///
/// # Errors
/// When it reaches a limit of its key.
pub(super) fn count(app: &App, key: &Key, caller: &Caller, record: &Record) -> Result<(), Refusal> {
    ticket(app, key, caller, record, Wish { prompt: 0, answer: Some(0), choices: 1 }).map(drop)
}

fn ticket(app: &App, key: &Key, caller: &Caller, record: &Record, wish: Wish) -> Result<Ticket, Refusal> {
    let person = caller.user.as_deref().filter(|_| key.trust_forwarded);
    let person = person.map(|user| app.pseudonyms.of(Some(&key.name), user));
    app.meters.admit(key, person.as_deref(), wish).map_err(|excess| {
        record.known().limit = Some(excess.reached.name());
        app.metrics.limited(excess.reached.name());
        too_much(excess)
    })
}

/// The refusal of a request that would exceed a limit.
fn too_much(excess: Excess) -> Refusal {
    let Excess { reached, message, retry_after, retry } = excess;
    let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, message);
    // OpenAI's clients try again at once but for this header.
    let (kind, code) = match reached == Reached::Day && !retry {
        true => ("insufficient_quota", "insufficient_quota"),
        false => ("rate_limit_error", "rate_limit_exceeded"),
    };
    Refusal { kind, code: Some(code), retry_after: Some(retry_after), retry: Some(retry), ..refusal }
}

/// A handler with leave for one request.
struct Admitted {
    handler: Arc<dyn Handler>,
    /// The id of its answer.
    id: String,
    bill: Mutex<Option<Bill>>,
}

impl Admitted {
    fn bill(&self) -> Option<Bill> {
        self.bill.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Handler for Admitted {
    fn stream(&self, request: &handler::Request, context: &Context) -> Result<EventStream, HandlerError> {
        let mut bill = self.bill();
        let stream = self.handler.stream(request, context);
        match (&mut bill, &stream) {
            (Some(bill), Err(error)) => bill.failed(error),
            // Its prompt is read from now on, whether or not anybody waits for the first word.
            (Some(bill), Ok(_)) => bill.begun = true,
            (None, _) => {}
        }
        Ok(Box::new(Billed { stream: stream?, id: self.id.clone(), bill }))
    }

    fn complete(&self, request: &handler::Request, context: &Context) -> Result<Completion, HandlerError> {
        let mut bill = self.bill();
        let mut whole = self.handler.complete(request, context);
        if let Ok(whole) = &mut whole {
            whole.start.id.clone_from(&self.id);
        }
        match (&mut bill, &whole) {
            (Some(bill), Ok(whole)) => bill.whole(whole),
            (Some(bill), Err(error)) => {
                bill.failed(error);
                // How far it came nobody knows.
                if bill.begun {
                    bill.usage.completion_tokens = Some(bill.answer);
                }
            }
            (None, _) => {}
        }
        whole
    }

    fn engine(&self) -> Option<Arc<Engine>> {
        self.handler.engine()
    }

    fn gives(&self) -> Gives {
        self.handler.gives()
    }

    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        let mut bill = self.bill();
        let made = self.handler.embed(request, context);
        match (&mut bill, &made) {
            (Some(bill), Ok(made)) => bill.vectors(made),
            (Some(bill), Err(error)) => bill.failed(error),
            (None, _) => {}
        }
        made
    }
}

/// What a request comes to. It is paid when it is dropped.
struct Bill {
    ticket: Option<Ticket>,
    metrics: Arc<super::Metrics>,
    record: Arc<Record>,
    /// Tokens of the prompt, as estimated.
    prompt: u64,
    /// Tokens that the answer may have, as reserved.
    answer: u64,
    begun: bool,
    pieces: u64,
    bytes: usize,
    first: Option<Instant>,
    last: Option<Instant>,
    usage: handler::Usage,
    end: Option<String>,
}

impl Bill {
    fn note(&mut self, item: Option<&Result<Event, HandlerError>>) {
        match item {
            Some(Ok(event)) => match event {
                Event::Start(start) => {
                    self.begun = true;
                    self.record.known().handler = Some(start.handler.clone());
                }
                Event::Delta { .. } | Event::Reasoning { .. } | Event::ToolCall { .. } => self.said(event.text_bytes()),
                // Words of providers are theirs, and any number of them.
                Event::Finish { reason: FinishReason::Other(_), .. } => self.end = Some("other".to_owned()),
                Event::Finish { reason, .. } => self.end = Some(reason.word().to_owned()),
                Event::Usage(usage) => self.usage = *usage,
            },
            Some(Err(error)) => self.failed(error),
            None => {}
        }
    }

    fn said(&mut self, bytes: usize) {
        let now = Instant::now();
        self.first.get_or_insert(now);
        (self.last, self.pieces, self.bytes) = (Some(now), self.pieces + 1, self.bytes + bytes);
    }

    fn whole(&mut self, whole: &Completion) {
        self.begun = true;
        self.bytes = whole.choices.iter().map(|choice| choice.text.len() + choice.reasoning.len()).sum();
        let end = match whole.finish() {
            FinishReason::Other(_) => "other",
            reason => reason.word(),
        };
        (self.usage, self.end) = (whole.usage, Some(end.to_owned()));
        self.record.known().handler = Some(whole.start.handler.clone());
    }

    fn vectors(&mut self, made: &Embeddings) {
        self.begun = true;
        self.usage = handler::Usage { prompt_tokens: made.prompt_tokens, completion_tokens: Some(0) };
        self.end = Some("vectors".to_owned());
        self.record.known().handler = Some(made.handler.clone());
    }

    /// Notes an error, and says to whoever runs the server what the client is not told of it. What a refusal of the request says is not
    /// repeated here: the client has read it, and it may quote what was asked.
    fn failed(&mut self, error: &HandlerError) {
        let is_of_request = matches!(error.kind, handler::Kind::InvalidRequest { .. } | handler::Kind::ContextLength);
        if let Some(detail) = error.detail.as_ref().filter(|_| !is_of_request) {
            line(format_args!("warning: request {}: {detail}", self.record.id));
        }
        self.begun = match error.kind {
            // Work was done, which is paid.
            handler::Kind::Cancelled | handler::Kind::Timeout | handler::Kind::Cut | handler::Kind::Protocol => true,
            handler::Kind::InvalidRequest { .. }
            | handler::Kind::ContextLength
            | handler::Kind::Authentication
            | handler::Kind::NotFound
            | handler::Kind::RateLimited { .. }
            | handler::Kind::Overloaded { .. }
            | handler::Kind::Unavailable
            | handler::Kind::Internal => self.pieces > 0,
        };
        self.end = Some(match error.kind {
            handler::Kind::Cancelled => "left".to_owned(),
            _ => "failed".to_owned(),
        });
    }
}

impl Drop for Bill {
    fn drop(&mut self) {
        let counted = self.pieces.max((self.bytes / BYTES_OF_PAID) as u64);
        let completion = self.usage.completion_tokens.unwrap_or(counted);
        let prompt = if self.begun { self.usage.prompt_tokens.unwrap_or(self.prompt) } else { 0 };
        if let Some(ticket) = &mut self.ticket {
            ticket.pay(prompt.saturating_add(completion));
        }
        let started = self.record.started;
        let first_token = self.first.map(|first| first.saturating_duration_since(started));
        let spoken = self.first.zip(self.last).map(|(first, last)| last.saturating_duration_since(first));
        let speed = spoken.filter(|spoken| *spoken > Duration::ZERO && completion > 1);
        let end = self.end.clone().unwrap_or_else(|| "left".to_owned());
        let mut known = self.record.known();
        // A request may ask several times.
        let Known { prompt_tokens, completion_tokens, .. } = &mut *known;
        for (all, more) in [(prompt_tokens, prompt), (completion_tokens, completion)] {
            *all = Some(all.unwrap_or(0).saturating_add(more));
        }
        (known.first_token, known.finish) = (known.first_token.or(first_token), Some(end.clone()));
        let model = known.model.clone().unwrap_or_default();
        drop(known);
        self.metrics.answered(&Answered {
            model,
            first_token,
            answer: started.elapsed(),
            speed: speed.map(|spoken| (completion - 1) as f64 / spoken.as_secs_f64()),
            prompt_tokens: prompt,
            completion_tokens: completion,
            end,
        });
    }
}

/// The events of an answer, which are counted on their way.
struct Billed {
    stream: EventStream,
    id: String,
    bill: Option<Bill>,
}

impl Iterator for Billed {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut item = self.stream.next();
        if let Some(Ok(Event::Start(start))) = &mut item {
            start.id.clone_from(&self.id);
        }
        if let Some(bill) = &mut self.bill {
            bill.note(item.as_ref());
        }
        // It is paid before the client has read the end, so that its next request finds it paid.
        if matches!(item, None | Some(Err(_) | Ok(Event::Usage(_)))) {
            self.bill = None;
        }
        item
    }
}
