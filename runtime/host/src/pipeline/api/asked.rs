//! `generate` by a handler: a model of this machine or an endpoint elsewhere, as the user's `handlers.toml` says.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
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
use crate::handler::config::{Config, HandlerSpec, Handlers, Rules};
use crate::handler::wrap::settings::Settings;
use crate::handler::{Context, Handler, HandlerError, Kind, Message, PATIENCE, Request, Role};
use crate::models::{Network, locate};
use crate::near::exists;
use crate::pipeline::errors::{Failure, said, short};
use crate::pipeline::store::{self, Key};
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
    let is_endpoint = chain.iter().any(|(_, spec)| matches!(spec, HandlerSpec::OpenAi(_) | HandlerSpec::Anthropic(_)));
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
    let mut more = json!({"handler": chain.iter().map(|(_, spec)| described(spec)).collect::<Result<Vec<_>>>()?});
    let around = around(&handlers, name, chain.iter().map(|(name, _)| *name));
    if !around.is_empty() {
        more["around"] = json!(around);
    }
    let answers = stored(lua, session, verb("generate"), options, more.clone(), || {
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
        let keys = keys(options, &more, &prompts);
        Ok(Made::plain(json!(answers(session, &*handler, &requests, &keys)?)))
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

/// What a file of handlers puts around a route and its handlers, as far as it does: a system prompt changes answers, for one.
fn around<'a>(handlers: &Handlers, name: &str, chain: impl Iterator<Item = &'a str>) -> Vec<String> {
    let config = handlers.config();
    let rules = config.rules.get(name).filter(|rules| **rules != Rules::default());
    let settings =
        chain.filter_map(|name| config.settings.get(name)).filter(|settings| **settings != Settings::default());
    rules
        .map(|rules| format!("{rules:?}"))
        .into_iter()
        .chain(settings.map(|settings| format!("{settings:?}")))
        .collect()
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
        HandlerSpec::OpenAi(_) | HandlerSpec::Anthropic(_) | HandlerSpec::Replay(_) => Vec::new(),
    };
    Ok(json!([format!("{spec:?}"), files]))
}

/// What the answer to each prompt is kept under by itself: they are paid for one by one. A prompt that comes again is another.
fn keys(options: &Options, more: &Json, prompts: &[String]) -> Vec<Key> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let same = json!({
        "system": options.text("system"),
        "max_tokens": options.whole("max_tokens"),
        "temperature": options.number("temperature"),
        "seed": options.get("seed").map(|_| options.seed()),
        "more": more,
    });
    let key = |prompt| {
        let before = seen.entry(prompt).or_default();
        *before += 1;
        store::key("generate", json!({"prompt": prompt, "again": *before - 1, "of": same}))
    };
    prompts.iter().map(String::as_str).map(key).collect()
}

/// The answers to requests, in their order. Each is kept under its key as it comes, so that a run that ends early is not asked for it again.
fn answers(
    session: &Session,
    handler: &dyn Handler,
    requests: &[Request],
    keys: &[Key],
) -> Result<Vec<String>, Failure> {
    let kept = |key: &Key| Some(session.store.find(key)?.result.as_str()?.to_owned());
    let mut answers: Vec<Option<String>> = keys.iter().map(kept).collect();
    let missing: Vec<usize> = (0..requests.len()).filter(|at| answers[*at].is_none()).collect();
    if missing.len() < requests.len() {
        let had = requests.len() - missing.len();
        session.tell(format_args!("generate  {had} of {} answers were kept", requests.len()));
    }
    let bar = progress::counting("answers", missing.len());
    let context = Context::default();
    let (next, started) = (AtomicUsize::new(0), Instant::now());
    let (said_now, heard) = channel();
    let (mut failed, mut heard_of): (Option<(usize, HandlerError)>, u64) = (None, 0);
    let mut take = |(at, answer): (usize, Result<String, HandlerError>)| match answer {
        Ok(text) => {
            heard_of += 1;
            bar.set_position(heard_of);
            let seconds = started.elapsed().as_secs_f64();
            let put = |run: PathBuf| session.store.put(&run, &keys[at], json!(text), &[], seconds);
            if let Err(error) = session.run_path().and_then(put)
                && !session.unkept.replace(true)
            {
                session.tell(format_args!("note: generate is not kept for later runs: {error:#}"));
            }
            answers[at] = Some(text);
        }
        // Those that were cancelled are so because of another.
        Err(error) if error.kind == Kind::Cancelled => {}
        Err(error) => {
            if failed.as_ref().is_none_or(|(first, _)| at < *first) {
                failed = Some((at, error));
            }
        }
    };
    scope(|threads| {
        for _ in 0..TOGETHER.min(missing.len()) {
            let said_now = said_now.clone();
            let (missing, next, context) = (&missing, &next, &context);
            threads.spawn(move || {
                while let Some(at) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answer = answer(handler, &requests[*at], context);
                    if answer.is_err() {
                        context.cancel();
                    }
                    // It is heard until all have ended.
                    let _ = said_now.send((*at, answer));
                }
            });
        }
        drop(said_now);
        loop {
            match heard.recv_timeout(PATIENCE) {
                Ok(answer) => take(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if session.clock().check().is_err() {
                context.cancel();
            }
        }
    });
    bar.finish_and_clear();
    session.clock().check()?;
    if let Some((at, error)) = failed {
        return Err(said(format!("generate: prompt {}: {error}", at + 1)));
    }
    answers.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| said("generate: an answer is missing"))
}

/// The answer to a request. One that is busy is waited for.
fn answer(handler: &dyn Handler, request: &Request, context: &Context) -> Result<String, HandlerError> {
    for tried in 1.. {
        let error = match handler.complete(request, context) {
            Ok(completion) => return Ok(completion.text().to_owned()),
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
