//! `POST /v1/completions`: a text is gone on with as it stands, without a chat template.
//!
//! Control tokens that are typed in a text are text; who sends token ids may send those.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::admit::{Admission, Asker, Need};
use super::answering::{self, Shape};
use super::apart::apart;
use super::reply::{HANDLER, IGNORED, NEVER, Refusal, end, frame, ping, usage};
use super::request::{Given, HARMLESS, not_known, wrong};
use super::{App, body, now};
use crate::handler::{
    self, CHOICES_MAX, Completion, Context, Event, EventStream, Gives, Handler, HandlerError, Prompt, Start,
    TokenLogprob, Usage,
};

/// Longest answer where a request does not say: OpenAI's.
const MAX_TOKENS: usize = 16;
/// Most likely tokens that are named beside each token: OpenAI's.
const LOGPROBS_MAX: usize = 5;

const HONOURED: [&str; 20] = [
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "n",
    "best_of",
    "logprobs",
    "echo",
    "stream",
    "stream_options",
];

/// A request, read.
#[derive(Debug)]
struct Asked {
    model: String,
    /// One for each prompt.
    requests: Vec<handler::Request>,
    /// The prompts stand before the answers.
    echo: bool,
    stream: bool,
    include_usage: bool,
    ignored: Vec<String>,
    user: Option<String>,
}

pub(super) async fn completions(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request).await.unwrap_or_else(IntoResponse::into_response)
}

async fn answer(app: &Arc<App>, request: Request) -> Result<Response, Refusal> {
    let asker = Asker::of(&request);
    let body = body::read(app, request).await?;
    let served = app.clone();
    let (admission, request, stream, shape, ignored) = apart(move || admit(&served, &asker, &body)).await?;
    answering::answer(app, admission, request, stream, shape, ignored).await
}

/// Reads a body and lets in what it asks for: the answers to its prompts, one after another.
fn admit(
    app: &App,
    asker: &Asker,
    body: &[u8],
) -> Result<(Admission, handler::Request, bool, Text, Vec<String>), Refusal> {
    let Asked { model, requests, echo, stream, include_usage, ignored, user } = read(&body::fields(body)?)?;
    let handler = asker.handler(app, &model, Gives::Answers)?;
    let choices = requests[0].choices();
    let prompts: Vec<String> = match echo {
        true => requests.iter().map(|request| text_of(request.prompt.as_ref())).collect(),
        false => Vec::new(),
    };
    let mut all: Vec<(Arc<dyn Handler>, Context, handler::Request)> = Vec::with_capacity(requests.len());
    let mut first_id = None;
    for request in requests {
        let need = Need::Answer(&request);
        let Admission { handler, context, id } = asker.clone().admit(app, handler.clone(), user.as_deref(), &need)?;
        first_id.get_or_insert_with(|| text_id(&id));
        // Whoever leaves wants none of them.
        let context = match all.first() {
            Some((_, first, _)) => context.cancelled_with(first),
            None => context,
        };
        all.push((handler, context, request));
    }
    let (_, context, first) = &all[0];
    let (context, first) = (context.clone(), first.clone());
    let handler: Arc<dyn Handler> = Arc::new(Several { all });
    let shape = Text {
        id: String::new(),
        created: now(),
        model,
        include_usage,
        fingerprint: None,
        early: false,
        prompts,
        choices,
        echoed: Vec::new(),
        offsets: Vec::new(),
    };
    let admission = Admission { handler, context, id: first_id.unwrap_or_default() };
    Ok((admission, first, stream, shape, ignored))
}

/// The id of a completion of a text, as OpenAI writes it.
fn text_id(id: &str) -> String {
    id.replacen("chatcmpl-", "cmpl-", 1)
}

fn read(fields: &Map<String, Value>) -> Result<Asked, HandlerError> {
    let mut ignored = Vec::new();
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        match field.as_str() {
            "suffix" if value == "" => {}
            "suffix" => {
                let message = "`suffix` is not supported: models here only go on with a text; leave it out";
                return Err(HandlerError::invalid("suffix", message));
            }
            known if HONOURED.contains(&known) => {}
            harmless if HARMLESS.contains(&harmless) => ignored.push(field.clone()),
            other => return Err(not_known(other, &HONOURED)),
        }
    }
    let given = Given(fields);
    let flag = |field: &str| match given.get(field) {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| wrong(field, "true or false")),
    };
    let prompts = read_prompts(given.get("prompt"))?;
    let common = handler::Request { logprobs: given.whole("logprobs", 0, LOGPROBS_MAX)?, ..given.sampling()? };
    if given.get("best_of").is_some_and(|best| best.as_u64() != Some(common.choices() as u64)) {
        return Err(HandlerError::invalid(
            "best_of",
            "`best_of` is not supported; leave it out, or say as many as `n`",
        ));
    }
    if prompts.len() * common.choices() > CHOICES_MAX {
        let message = format!("`prompt`: {CHOICES_MAX} answers a request at most, prompts times `n`");
        return Err(HandlerError::invalid("prompt", message));
    }
    let echo = flag("echo")?;
    if echo && common.logprobs.is_some() {
        let message = "`echo` beside `logprobs` is not supported: tokens of a prompt have no log-probabilities here";
        return Err(HandlerError::invalid("echo", message));
    }
    if echo && prompts.iter().any(|prompt| matches!(prompt, Prompt::Tokens(_))) {
        return Err(HandlerError::invalid("echo", "`echo` of tokens is not supported; send the prompt as text"));
    }
    let max_tokens = common.max_tokens.or(Some(MAX_TOKENS));
    let request = |prompt| handler::Request { prompt: Some(prompt), max_tokens, ..common.clone() };
    Ok(Asked {
        model: given.model()?,
        requests: prompts.into_iter().map(request).collect(),
        echo,
        stream: given.stream()?,
        include_usage: given.include_usage(&mut ignored)?,
        ignored,
        user: given.get("user").and_then(Value::as_str).map(str::to_owned),
    })
}

/// Reads a text, tokens, or a list of either.
fn read_prompts(value: Option<&Value>) -> Result<Vec<Prompt>, HandlerError> {
    let tokens = |list: &[Value]| -> Option<Prompt> {
        let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
        Some(Prompt::Tokens(list.iter().map(id).collect::<Option<Vec<u32>>>()?))
    };
    let one = |value: &Value| match value {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(list) => tokens(list),
        _ => None,
    };
    let prompts = match value {
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_u64) => tokens(list).map(|prompt| vec![prompt]),
        Some(Value::Array(list)) if (1..=CHOICES_MAX).contains(&list.len()) => list.iter().map(one).collect(),
        Some(text @ Value::String(_)) => one(text).map(|prompt| vec![prompt]),
        _ => None,
    };
    let wanted = format!("a text, a list of token ids, or a list of up to {CHOICES_MAX} of either");
    prompts.ok_or_else(|| wrong("prompt", &wanted))
}

fn text_of(prompt: Option<&Prompt>) -> String {
    match prompt {
        Some(Prompt::Text(text)) => text.clone(),
        _ => String::new(),
    }
}

/// The answers to several prompts, one after another, as the choices of one answer.
struct Several {
    all: Vec<(Arc<dyn Handler>, Context, handler::Request)>,
}

impl Handler for Several {
    fn stream(&self, _request: &handler::Request, _context: &Context) -> Result<EventStream, HandlerError> {
        let mut all =
            self.all.iter().map(|(handler, context, request)| (handler.clone(), context.clone(), request.clone()));
        let Some((first, context, request)) = all.next() else { return Ok(Box::new(std::iter::empty())) };
        let (choices, rest) = (request.choices(), all.collect::<Vec<_>>().into_iter());
        let stream = context.watch(first.stream(&request, &context)?);
        Ok(Box::new(OneAfterAnother { stream, rest, choices, offset: 0, usage: Usage::default(), over: false }))
    }
}

struct OneAfterAnother {
    stream: EventStream,
    rest: std::vec::IntoIter<(Arc<dyn Handler>, Context, handler::Request)>,
    /// Choices of each.
    choices: usize,
    /// Choices of those before.
    offset: usize,
    /// The tokens of those before.
    usage: Usage,
    over: bool,
}

impl OneAfterAnother {
    /// Goes on with the next prompt; `None` if there is none.
    fn next_stream(&mut self) -> Option<Result<(), HandlerError>> {
        let (handler, context, request) = self.rest.next()?;
        Some(handler.stream(&request, &context).map(|stream| {
            self.stream = context.watch(stream);
            self.offset += self.choices;
        }))
    }
}

impl Iterator for OneAfterAnother {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            let mut event = match self.stream.next()? {
                Ok(event) => event,
                Err(error) => {
                    self.over = true;
                    return Some(Err(error));
                }
            };
            match &mut event {
                Event::Start(_) if self.offset > 0 => continue,
                Event::Start(_) => {}
                Event::Delta { choice, .. }
                | Event::Reasoning { choice, .. }
                | Event::ToolCall { choice, .. }
                | Event::Finish { choice, .. } => *choice += self.offset,
                Event::Usage(usage) => {
                    let sum = |a: Option<u64>, b: Option<u64>| Some(a?.saturating_add(b?));
                    if self.offset > 0 {
                        usage.prompt_tokens = sum(self.usage.prompt_tokens, usage.prompt_tokens);
                        usage.completion_tokens = sum(self.usage.completion_tokens, usage.completion_tokens);
                    }
                    self.usage = *usage;
                    match self.next_stream() {
                        None => self.over = true,
                        Some(Ok(())) => continue,
                        Some(Err(error)) => {
                            self.over = true;
                            return Some(Err(error));
                        }
                    }
                }
            }
            return Some(Ok(event));
        }
        None
    }
}

/// The shape of text completions.
struct Text {
    id: String,
    created: u64,
    model: String,
    include_usage: bool,
    fingerprint: Option<String>,
    /// The first piece names the handler, since the headers were sent before it was known.
    early: bool,
    /// The prompts, if they stand before the answers.
    prompts: Vec<String>,
    /// Choices of each prompt.
    choices: usize,
    /// Choices whose prompt was sent.
    echoed: Vec<usize>,
    /// Letters of each choice that were sent.
    offsets: Vec<usize>,
}

impl Text {
    fn envelope(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    /// The prompt of a choice, the first time.
    fn echo(&mut self, choice: usize) -> String {
        let prompt = self.prompts.get(choice / self.choices).cloned().unwrap_or_default();
        if prompt.is_empty() || self.echoed.contains(&choice) {
            return String::new();
        }
        self.echoed.push(choice);
        prompt
    }

    fn logprobs(&mut self, choice: usize, tokens: &[TokenLogprob]) -> Value {
        if self.offsets.len() <= choice {
            self.offsets.resize(choice + 1, 0);
        }
        let logprob = |token: &TokenLogprob| token.logprob.max(NEVER);
        let top = |token: &TokenLogprob| -> Map<String, Value> {
            token.top.iter().map(|token| (token.token.clone(), json!(logprob(token)))).collect()
        };
        let offset = &mut self.offsets[choice];
        let mut offsets = Vec::with_capacity(tokens.len());
        for token in tokens {
            offsets.push(*offset);
            *offset += token.token.chars().count();
        }
        json!({
            "tokens": tokens.iter().map(|token| &token.token).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }

    fn piece(&self, choice: Value) -> String {
        let mut piece = self.envelope(vec![choice]);
        if self.include_usage {
            piece["usage"] = Value::Null;
        }
        frame(&piece)
    }

    fn choice(&mut self, index: usize, text: &str, tokens: &[TokenLogprob]) -> Value {
        let text = self.echo(index) + text;
        let logprobs = if tokens.is_empty() { Value::Null } else { self.logprobs(index, tokens) };
        json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": null})
    }

    fn start(&mut self, start: &Start) {
        self.id = text_id(&start.id);
        self.fingerprint.clone_from(&start.fingerprint);
    }
}

impl Shape for Text {
    fn stream_type(&self) -> &'static str {
        "text/event-stream"
    }

    fn whole(&mut self, whole: &Completion) -> Value {
        self.start(&whole.start);
        let mut choices = Vec::with_capacity(whole.choices.len());
        for (index, answered) in whole.choices.iter().enumerate() {
            let mut choice = self.choice(index, &answered.text, &answered.logprobs);
            end(&mut choice, &answered.finish);
            choices.push(choice);
        }
        let mut body = self.envelope(choices);
        body["usage"] = usage(whole.usage);
        body
    }

    fn begins_early(&mut self) {
        self.early = true;
    }

    fn event(&mut self, event: Event) -> String {
        match event {
            Event::Start(start) => {
                self.start(&start);
                if !self.early {
                    return String::new();
                }
                let mut first = self.envelope(Vec::new());
                first[HANDLER] = json!(start.handler);
                first[IGNORED] = json!(start.ignored.join(","));
                frame(&first)
            }
            Event::Delta { choice, text, logprobs } => {
                let choice = self.choice(choice, &text, &logprobs);
                self.piece(choice)
            }
            // A text that is gone on with has neither.
            Event::Reasoning { .. } | Event::ToolCall { .. } => String::new(),
            Event::Finish { choice, reason } => {
                let mut choice = self.choice(choice, "", &[]);
                end(&mut choice, &reason);
                self.piece(choice)
            }
            Event::Usage(cost) => {
                let mut frames = String::new();
                if self.include_usage {
                    let mut last = self.envelope(Vec::new());
                    last["usage"] = usage(cost);
                    frames = frame(&last);
                }
                frames + "data: [DONE]\n\n"
            }
        }
    }

    fn error(&mut self, refusal: &Refusal) -> String {
        frame(&refusal.body())
    }

    fn silence(&mut self, before: usize) -> String {
        ping(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::Kind;

    fn with(more: &Value) -> Result<Asked, HandlerError> {
        let mut body = json!({"model": "m", "prompt": "a"});
        for (key, value) in more.as_object().expect("fields") {
            body[key] = value.clone();
        }
        read(body.as_object().expect("fields"))
    }

    #[test]
    fn all_forms_of_a_prompt_are_read_and_the_rest_is_refused_by_name() -> Result<(), HandlerError> {
        let prompts = |prompt: Value| -> Result<Vec<Prompt>, HandlerError> {
            Ok(with(&json!({"prompt": prompt}))?.requests.into_iter().filter_map(|request| request.prompt).collect())
        };
        let (a, b) = (Prompt::Text("a".into()), Prompt::Text("b".into()));
        assert_eq!(prompts(json!("a"))?.len(), 1);
        assert_eq!(prompts(json!(["a", "b"]))?, [a, b]);
        assert_eq!(prompts(json!([1, 2]))?, [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts(json!([[1], [2]]))?, [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2])]);
        let asked = with(&json!({"logprobs": 0, "best_of": 1, "suffix": null, "user": "u", "echo": false}))?;
        assert_eq!((asked.requests[0].logprobs, asked.requests[0].max_tokens), (Some(0), Some(MAX_TOKENS)));
        assert_eq!((asked.ignored, asked.user.as_deref()), (vec!["user".to_owned()], Some("u")));
        for (more, param) in [
            (json!({"prompt": null}), "prompt"),
            (json!({"prompt": []}), "prompt"),
            (json!({"prompt": [1, -2]}), "prompt"),
            (json!({"prompt": ["a", 1]}), "prompt"),
            (json!({"prompt": vec!["a"; 9]}), "prompt"),
            (json!({"prompt": ["a", "b"], "n": 5}), "prompt"),
            (json!({"suffix": "x"}), "suffix"),
            (json!({"logprobs": 6}), "logprobs"),
            (json!({"logprobs": true}), "logprobs"),
            (json!({"echo": true, "logprobs": 1}), "echo"),
            (json!({"echo": true, "prompt": [1]}), "echo"),
            (json!({"best_of": 3}), "best_of"),
            (json!({"messages": []}), "messages"),
            (json!({"tools": []}), "tools"),
        ] {
            let refused = with(&more).expect_err(param).kind;
            assert_eq!(refused, Kind::InvalidRequest { param: Some(param.into()) }, "{more}");
        }
        Ok(())
    }
}
