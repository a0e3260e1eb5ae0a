//! `generate` by a handler: a model of this machine or an endpoint elsewhere, as the user's `handlers.toml` says.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mlua::{Lua, Value};
use serde_json::{Value as Json, json};

use super::options::Options;
use super::spec::verb;
use super::stored::{Made, stored};
use super::value::to_lua;
use super::{Session, identity};
use crate::handler::config::{Config, HandlerSpec, Handlers};
use crate::handler::{Context, Handler, HandlerError, Kind, Message, PATIENCE, Request, Role};
use crate::models::{Network, locate};
use crate::near::exists;
use crate::pipeline::errors::{Failure, said, short};
use crate::progress;

/// Prompts that are asked at once: a model here reads its weights once for all of them, and a provider bears as many.
const TOGETHER: usize = 8;
/// Times that one that is busy is asked.
const TRIES: usize = 6;
/// The longest wait before it is asked again.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Has a handler answer prompts, or in a dry run looks whether there is one.
pub fn generate(lua: &Lua, session: &Session, options: &Options, name: &str) -> Result<Value, Failure> {
    let handlers = handlers(session)?;
    let chain = handlers.chain(name);
    if chain.is_empty() {
        return Err(no_such(&handlers, name));
    }
    let far: Vec<&str> = chain.iter().filter_map(|(_, spec)| spec.far_host()).collect();
    let prompts = options.texts("prompts");
    if let Some(host) = far.first() {
        allowed(session, &handlers, name, host)?;
    }
    // Whatever answers at an endpoint of this machine may send on what it is asked.
    let is_endpoint = chain.iter().any(|(_, spec)| matches!(spec, HandlerSpec::OpenAi(_)));
    if is_endpoint && !session.named_handlers.iter().any(|named| named == name) {
        return Err(said(format!(
            "generate: `{name}` asks an endpoint, which a script cannot choose\nhint: declare a parameter of type `handler` in the TOML file"
        )));
    }
    if session.dry {
        let where_to = if far.is_empty() { "on this machine".to_owned() } else { format!("at {}", far.join(", ")) };
        session.would(
            lua,
            format!("answer  {} prompts with handler {name}, {where_to}", prompts.len()),
            json!({"verb": "generate", "handler": name, "hosts": far, "prompts": prompts.len()}),
        )?;
        let texts = lua.create_table()?;
        for _ in &prompts {
            session.clock().check()?;
            texts.raw_push("")?;
        }
        return Ok(Value::Table(texts));
    }
    let more = json!({"handler": chain.iter().map(|(_, spec)| described(spec)).collect::<Result<Vec<_>>>()?});
    let answers = stored(lua, session, verb("generate"), options, more, || {
        if !far.is_empty() {
            session.tell(format_args!("asks      {} prompts go to {}", prompts.len(), far.join(", ")));
        }
        let handler = handlers.get(name)?;
        let system = options.text("system");
        let request = |prompt: &str| Request {
            messages: system
                .iter()
                .map(|text| Message::new(Role::System, text))
                .chain([Message::new(Role::User, prompt)])
                .collect(),
            max_tokens: Some(options.whole("max_tokens").unwrap_or(256) as usize),
            temperature: Some(options.number("temperature").unwrap_or(0.0)),
            // An endpoint may not know it.
            seed: options.get("seed").map(|_| options.seed() as i64),
            ..Request::default()
        };
        let requests: Vec<Request> = prompts.iter().map(|prompt| request(prompt)).collect();
        let answers = answers(session, &*handler, &requests)?;
        Ok(Made::plain(json!(answers)))
    })?;
    Ok(to_lua(lua, &answers)?)
}

/// The user's handlers, read once a run.
fn handlers(session: &Session) -> Result<Rc<Handlers>, Failure> {
    if let Some(handlers) = &*session.handlers.borrow() {
        return Ok(handlers.clone());
    }
    let path = super::handler::file().context("generate")?;
    exists(&path)?;
    let handlers = Rc::new(Handlers::new(Config::read(&path)?));
    session.handlers.replace(Some(handlers.clone()));
    Ok(handlers)
}

fn no_such(handlers: &Handlers, name: &str) -> Failure {
    let path = handlers.config().path.display();
    let near = crate::toml_problems::near(name, &handlers.names());
    said(format!("generate: {path}: there is no handler or route `{}`, {near}", short(name)))
}

/// Refuses to send what a script says to another machine, unless the user has said both that this route may and that it is asked.
fn allowed(session: &Session, handlers: &Handlers, name: &str, host: &str) -> Result<(), Failure> {
    let config = handlers.config();
    if !config.routes.contains_key(name) {
        return Err(said(format!(
            "generate: handler `{name}` sends prompts to {host}, and no route allows that\nhint: add [routes.NAME] with handlers = [\"{name}\"] and \
             egress = \"allow\" to {}, and name the route",
            config.path.display()
        )));
    }
    if !session.typed_handlers.iter().any(|typed| typed == name) {
        return Err(said(format!(
            "generate: route `{name}` sends prompts to {host}, which neither a script nor its TOML file can choose\nhint: declare a parameter of type \
             `handler` in the TOML file, and set it: --set handler={name}"
        )));
    }
    if session.offline {
        return Err(said(format!(
            "generate: route `{name}` sends prompts to {host}, and the TOML file says `offline = true`"
        )));
    }
    Ok(())
}

/// What a handler answers by: of a model here the digests of its files, too.
fn described(spec: &HandlerSpec) -> Result<Json> {
    let files = match spec {
        HandlerSpec::Local(model, _) => {
            let located = locate(&model.name, Network::Never("a handler's model is not downloaded"))?;
            let base = model.base_model.as_deref().map(Path::to_owned);
            [Some(located.path), base]
                .into_iter()
                .flatten()
                .map(|path| identity::files(&path))
                .collect::<Result<_>>()?
        }
        HandlerSpec::OpenAi(_) => Vec::new(),
    };
    Ok(json!([format!("{spec:?}"), files]))
}

/// The answers to requests, in their order.
fn answers(session: &Session, handler: &dyn Handler, requests: &[Request]) -> Result<Vec<String>, Failure> {
    let bar = progress::counting("answers", requests.len());
    let context = Context::default();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let answers: Mutex<Vec<Option<Result<String, HandlerError>>>> = Mutex::new(vec![None; requests.len()]);
    let work = || {
        while let Some((at, request)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, requests.get(at)?)))
        {
            let answer = answer(handler, request, &context);
            if answer.is_err() {
                context.cancel();
            }
            answers.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some(answer);
            done.fetch_add(1, Ordering::Relaxed);
        }
    };
    scope(|threads| {
        let workers: Vec<_> = (0..TOGETHER.min(requests.len())).map(|_| threads.spawn(work)).collect();
        while !workers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            if session.clock().check().is_err() {
                context.cancel();
            }
            bar.set_position(done.load(Ordering::Relaxed) as u64);
            sleep(PATIENCE);
        }
    });
    bar.finish_and_clear();
    session.clock().check()?;
    let answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Those that were cancelled are so because of another.
    let cause = |answer: &&Option<Result<String, HandlerError>>| matches!(answer, Some(Err(error)) if error.kind != Kind::Cancelled);
    if let Some((at, Some(Err(error)))) = answers.iter().enumerate().find(|(_, answer)| cause(answer)) {
        return Err(said(format!("generate: prompt {}: {error}", at + 1)));
    }
    let texts = answers.into_iter().map(|answer| answer.and_then(Result::ok));
    texts.collect::<Option<Vec<_>>>().ok_or_else(|| said("generate: an answer is missing"))
}

/// The answer to a request. One that is busy is waited for.
fn answer(handler: &dyn Handler, request: &Request, context: &Context) -> Result<String, HandlerError> {
    for tried in 1.. {
        let error = match handler.complete(request, context) {
            Ok(completion) => return Ok(completion.text),
            Err(error) => error,
        };
        let wait = match &error.kind {
            Kind::Overloaded { retry_after } => *retry_after,
            Kind::RateLimited { retry_after } => retry_after.unwrap_or(Duration::from_secs(1 << tried.min(5))),
            _ => return Err(error),
        };
        if tried == TRIES {
            return Err(error);
        }
        let until = Instant::now() + wait.min(WAIT_MAX);
        while Instant::now() < until {
            context.check()?;
            sleep(PATIENCE);
        }
    }
    unreachable!("it ends by a return")
}
