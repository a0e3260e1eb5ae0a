//! `homeroom handlers`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use clap::Subcommand;
use serde_json::{Value, json};

use super::{Done, handlers_of_home, print};
use crate::handler::config::{Config, Egress, EndpointSpec, HandlerSpec, Handlers, fine_tuning};
use crate::handler::wrap::settings::Bounds;
use crate::handler::{Context, EmbedRequest, Gives, Handler, Input, Message, Request, Role};
use crate::models::{ModelRef, is_here};
use crate::near::exists;
use crate::stdout::Stdout;
use crate::terminal::cell;

/// Longest wait for the one token of `--live`.
const LIVE_TIME_MAX: Duration = Duration::from_secs(120);

/// What is done with files of handlers.
#[derive(Subcommand)]
pub enum What {
    /// Shows each route with its handlers and what stands around them, where conversations go, and what is missing; exit code 1 if a
    /// handler could not answer
    Check {
        /// TOML file of handlers and routes [default: handlers.toml in $HOMEROOM_HOME]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Ask each handler for one token: models are loaded, and providers count it
        #[arg(long)]
        live: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Does it.
pub fn run(what: &What) -> Result<Done> {
    let What::Check { config, live, json } = what;
    let path = match config {
        Some(path) => path.clone(),
        None => handlers_of_home()
            .context("nothing to check: name a file with --config; there is no handlers.toml in $HOMEROOM_HOME")?,
    };
    exists(&path)?;
    let handlers = Handlers::new(Config::read(&path)?);
    let report = Report::of(&handlers, *live);
    if *json {
        print(&report.json().to_string())?;
    } else {
        Stdout.text(&report.text()).context("cannot write the result")?;
    }
    Ok(if report.is_well() { Done::Whole } else { Done::Unwell })
}

/// What is known of a file's routes.
struct Report {
    path: String,
    routes: Vec<Route>,
    unrouted: Vec<String>,
    fine_tuning: Option<fine_tuning::Settings>,
}

/// A route, or a handler that is served under its own name.
struct Route {
    name: String,
    /// `None`: it is no route, and nothing that it is asked leaves this machine.
    egress: Option<Egress>,
    fallback_on: Option<Vec<String>>,
    around: Vec<String>,
    links: Vec<Link>,
}

/// A handler of a route.
struct Link {
    name: String,
    kind: &'static str,
    target: String,
    /// The host that conversations go to, if it is not this machine.
    host: Option<String>,
    /// The variable of its key, and whether that is set.
    key: Option<(String, bool)>,
    /// It is asked only when a conversation is too long for another.
    for_long: bool,
    around: Vec<String>,
    bounds: Bounds,
    /// Why it could not answer.
    problem: Option<String>,
    /// How long its one token took, in seconds.
    live_s: Option<f64>,
}

impl Report {
    fn of(handlers: &Handlers, live: bool) -> Self {
        let config = handlers.config();
        let routes: Vec<&String> = match config.routes.is_empty() {
            true => {
                config.handlers.iter().filter(|(_, spec)| spec.far_host().is_none()).map(|(name, _)| name).collect()
            }
            false => config.routes.keys().collect(),
        };
        let route = |name: &&String| {
            let rules = config.rules.get(*name);
            let is_long =
                |handler: &str| config.routes.get(*name).is_some_and(|chain| !chain.iter().any(|n| n == handler));
            let links = handlers.chain(name).into_iter().map(|(handler, spec)| {
                let settings = config.settings.get(handler).cloned().unwrap_or_default();
                let bounds = spec.bounds(&settings, &config.server);
                let mut around = settings.described(Some(&bounds));
                if spec.far_host().is_some() && rules.is_some_and(|rules| rules.egress == Egress::Redact) {
                    around.insert(0, "redaction".to_owned());
                }
                let mut link = Link::of(handler, spec, is_long(handler), around, bounds);
                if live && link.problem.is_none() {
                    match ask(handlers, handler) {
                        Ok(seconds) => link.live_s = Some(seconds),
                        Err(error) => link.problem = Some(format!("{error:#}")),
                    }
                }
                link
            });
            Route {
                name: (*name).clone(),
                egress: rules.map(|rules| rules.egress),
                fallback_on: rules.and_then(|rules| rules.fallback_on.clone()),
                around: rules.map_or_else(Vec::new, |rules| rules.settings.described(None)),
                links: links.collect(),
            }
        };
        let routes = routes.iter().map(route).collect();
        let (path, fine_tuning) = (config.path.display().to_string(), config.fine_tuning.clone());
        Self { path, routes, unrouted: handlers.unrouted(), fine_tuning }
    }

    fn is_well(&self) -> bool {
        !self.routes.is_empty() && self.routes.iter().flat_map(|route| &route.links).all(|link| link.problem.is_none())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |indent: usize, words: &str| text.push_str(&format!("{:indent$}{}\n", "", cell(words)));
        for Route { name, egress, fallback_on, around, links } in &self.routes {
            line(0, &format!("{name}   {}", verdict(*egress, links)));
            for words in around {
                line(2, words);
            }
            if let Some(on) = fallback_on {
                line(2, &format!("fallback on {}", on.join(", ")));
            }
            for link in links {
                let long = if link.for_long { "   for long conversations" } else { "" };
                line(2, &format!("{}   {}   {}{long}   {}", link.name, link.kind, link.target, link.state()));
                if let Some((variable, is_set)) = &link.key {
                    line(4, &format!("key {variable} is {}", if *is_set { "set" } else { "not set" }));
                }
                for words in &link.around {
                    line(4, words);
                }
            }
        }
        if self.routes.is_empty() {
            line(0, &format!("{}: nothing can be served: add [routes.NAME]", self.path));
        }
        if !self.unrouted.is_empty() {
            line(0, &format!("in no route, and not served: {}", self.unrouted.join(", ")));
        }
        if let Some(settings) = &self.fine_tuning {
            let bases: Vec<&str> = settings.bases.keys().map(String::as_str).collect();
            let by = settings.keys.as_ref().map_or_else(|| "all keys".to_owned(), |keys| keys.join(", "));
            line(0, &format!("fine-tuning of {}   by {by}", bases.join(", ")));
            line(2, &settings.of_key());
        }
        text
    }

    fn json(&self) -> Value {
        let routes = self.routes.iter().map(|route| {
            let links = route.links.iter().map(|link| {
                json!({
                    "name": link.name,
                    "kind": link.kind,
                    "target": link.target,
                    "host": link.host,
                    "key": link.key.as_ref().map(|(variable, is_set)| json!({"env": variable, "is_set": is_set})),
                    "for_long_conversations": link.for_long,
                    "around": link.around,
                    "limits": {
                        "running": link.bounds.limits.running,
                        "waiting": link.bounds.limits.waiting,
                        "is_default": link.bounds.limits_are_default,
                    },
                    "answer_timeout": {
                        "seconds": link.bounds.total.as_secs_f64(),
                        "is_of_server": link.bounds.total_is_of_server,
                        "is_default": link.bounds.total_is_default,
                    },
                    "problem": link.problem,
                    "live_s": link.live_s,
                })
            });
            json!({
                "name": route.name,
                "egress": route.egress.map(Egress::word),
                "verdict": verdict(route.egress, &route.links),
                "fallback_on": route.fallback_on,
                "around": route.around,
                "handlers": links.collect::<Vec<_>>(),
            })
        });
        json!({
            "path": self.path,
            "is_well": self.is_well(),
            "routes": routes.collect::<Vec<_>>(),
            "unrouted": self.unrouted,
            "fine_tuning": self.fine_tuning.as_ref().map(|settings| json!({
                "bases": settings.bases.keys().collect::<Vec<_>>(),
                "keys": settings.keys,
                "key_files_mib_max": settings.files.key_bytes >> 20,
                "key_uploads": settings.files.key_uploads,
                "key_jobs": settings.key_jobs,
            })),
        })
    }
}

/// Where conversations go.
fn verdict(egress: Option<Egress>, links: &[Link]) -> String {
    let mut hosts: Vec<&str> = links.iter().filter_map(|link| link.host.as_deref()).collect();
    hosts.dedup();
    match (egress, hosts.is_empty()) {
        (Some(Egress::Deny) | None, _) => "egress deny: conversations stay on this machine".to_owned(),
        (Some(egress), true) => format!("egress {}: conversations stay on this machine nevertheless", egress.word()),
        (Some(Egress::Redact), _) => {
            format!(
                "egress redact: conversations go to {}, with placeholders for what is likely personal",
                hosts.join(", ")
            )
        }
        (Some(egress), _) => format!("egress {}: conversations go to {}", egress.word(), hosts.join(", ")),
    }
}

impl Link {
    fn of(name: &str, spec: &HandlerSpec, for_long: bool, around: Vec<String>, bounds: Bounds) -> Self {
        let at = |endpoint: &EndpointSpec| format!("{} at {}", endpoint.model, endpoint.base_url.host());
        let (kind, target, problem) = match spec {
            HandlerSpec::Local(model, _) => ("local", model.name.display().to_string(), missing(model)),
            HandlerSpec::OpenAi(spec) => ("openai", at(&spec.endpoint), None),
            HandlerSpec::Anthropic(spec) => ("anthropic", at(&spec.endpoint), None),
            HandlerSpec::Replay(replay) => {
                let is_there = replay.file.is_file();
                let problem = (!is_there).then(|| format!("{} is not there", replay.file.display()));
                ("replay", replay.file.display().to_string(), problem)
            }
        };
        let disabled = spec.disabled();
        let key = spec.key_variable().map(|variable| (variable.to_owned(), disabled.is_none()));
        let problem = disabled.map(|why| format!("disabled: {why}")).or(problem);
        let host = spec.far_host().map(str::to_owned);
        Self { name: name.to_owned(), kind, target, host, key, for_long, around, bounds, problem, live_s: None }
    }

    fn state(&self) -> String {
        match (&self.problem, self.live_s) {
            (Some(problem), _) => format!("PROBLEM: {problem}"),
            (None, Some(seconds)) => format!("answered in {seconds:.2} s"),
            (None, None) => "ready".to_owned(),
        }
    }
}

/// What of a model is not on this machine.
fn missing(model: &ModelRef) -> Option<String> {
    match is_here(model) {
        Ok(true) => None,
        Ok(false) => {
            Some("the model, or its base, is not on this machine; `homeroom list-models` shows what is".to_owned())
        }
        Err(error) => Some(format!("{error:#}")),
    }
}

/// Asks a handler for one token, or for the vector of a word. Returns the seconds that it took, loading not included.
fn ask(handlers: &Handlers, name: &str) -> Result<f64> {
    let handler: Arc<dyn Handler> = handlers.get(name)?;
    let context = Context::default().within(LIVE_TIME_MAX);
    let since = Instant::now();
    let done = match handler.gives() {
        Gives::Vectors => {
            let request = EmbedRequest { input: vec![Input::Text("hello".into())], ..EmbedRequest::default() };
            handler.embed(&request, &context).map(drop)
        }
        Gives::Answers | Gives::Either => {
            let messages = vec![Message::new(Role::User, "Say hello.")];
            handler.complete(&Request { messages, max_tokens: Some(1), ..Request::default() }, &context).map(drop)
        }
    };
    done.map_err(|error| anyhow!("{error}"))?;
    Ok(since.elapsed().as_secs_f64())
}
