//! The file that lists the handlers: `[handlers.NAME]` and `[routes.NAME]`; and says how they are served: `[server]`, `[fine_tuning]`, `[memory]`.
//!
//! The whole file is checked before a model is loaded, and all problems are reported at once. A kind of handler is a file here, with its
//! keys, what is read of them, and what is made of that; so are the tables that say how they are served.

mod anthropic;
mod disabled;
mod endpoint;
pub mod fine_tuning;
mod handlers;
mod key;
mod local;
mod openai;
mod replay;
mod route;
pub mod server;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text};
use homeroom_engine::run::compute::Compute;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use self::anthropic::AnthropicSpec;
pub use self::endpoint::EndpointSpec;
pub use self::handlers::Handlers;
pub use self::local::load_local;
pub use self::openai::OpenAiSpec;
pub use self::route::{Egress, Rules};
use super::limit::Limits;
use super::replay::{Replay, ReplaySpec};
use super::wrap::settings::{self, Bounds, Settings};
use super::{Handler, Secret};
use crate::memory::settings as memory;
use crate::models::ModelRef;
use crate::toml_problems::{Problems, near};

/// Name of the user's file of handlers.
pub const HANDLERS_FILE: &str = "handlers.toml";

/// The user's file of handlers, which is in the data directory.
pub fn handlers_in(data: &Path) -> PathBuf {
    data.join(HANDLERS_FILE)
}

/// A file of handlers, as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Its path, for messages.
    pub path: PathBuf,
    /// `[handlers.NAME]`.
    pub handlers: BTreeMap<String, HandlerSpec>,
    /// `[routes.NAME]`: names that clients give as `model`, and their handlers in order.
    pub routes: BTreeMap<String, Vec<String>>,
    /// What stands around each handler.
    pub settings: BTreeMap<String, Settings>,
    /// What else each route says.
    pub rules: BTreeMap<String, Rules>,
    /// `[server]`.
    pub server: server::Settings,
    /// `[fine_tuning]`.
    pub fine_tuning: Option<fine_tuning::Settings>,
    /// `[memory]`.
    pub memory: Option<memory::Settings>,
}

/// A handler as the file describes it, not loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandlerSpec {
    /// `kind = "local"`, and the type that it computes in.
    Local(ModelRef, Compute),
    /// `kind = "openai"`.
    OpenAi(OpenAiSpec),
    /// `kind = "anthropic"`.
    Anthropic(AnthropicSpec),
    /// `kind = "replay"`.
    Replay(ReplaySpec),
}

impl HandlerSpec {
    /// The endpoint that it asks, if it asks one.
    fn endpoint(&self) -> Option<&EndpointSpec> {
        match self {
            Self::Local(..) | Self::Replay(_) => None,
            Self::OpenAi(spec) => Some(&spec.endpoint),
            Self::Anthropic(spec) => Some(&spec.endpoint),
        }
    }

    /// The host that conversations are sent to, if it is not this machine.
    pub fn far_host(&self) -> Option<&str> {
        self.endpoint().filter(|endpoint| !endpoint.base_url.is_loopback()).map(|endpoint| endpoint.base_url.host())
    }

    /// The variable that holds its key, if it has one.
    pub fn key_variable(&self) -> Option<&str> {
        self.endpoint().and_then(|endpoint| endpoint.api_key_env.as_deref())
    }

    /// Why it is disabled, if it is: its key is not in the environment.
    pub fn disabled(&self) -> Option<String> {
        self.api_key().err()
    }

    fn api_key(&self) -> Result<Option<Secret>, String> {
        self.endpoint().map_or(Ok(None), EndpointSpec::api_key)
    }

    /// How many requests it takes where its table says nothing.
    pub fn limits(&self) -> Limits {
        match self {
            Self::Local(..) => local::LIMITS,
            Self::OpenAi(_) | Self::Anthropic(_) | Self::Replay(_) => ENDPOINT_LIMITS,
        }
    }

    /// What bounds it, with the settings around it and those of the server.
    pub fn bounds(&self, settings: &Settings, server: &server::Settings) -> Bounds {
        let own = settings.total.or(self.answer_timeout());
        let usual = self.endpoint().map(|_| endpoint::ANSWER_TIMEOUT);
        let total_is_default = match own {
            Some(own) => usual == Some(own),
            None => server.answer_timeout == server::Settings::default().answer_timeout,
        };
        Bounds {
            limits: settings.limits.unwrap_or(self.limits()),
            limits_are_default: settings.limits.is_none(),
            total: own.unwrap_or(server.answer_timeout),
            total_is_of_server: own.is_none(),
            total_is_default,
        }
    }

    /// Longest time for a whole answer that its kind sets: that of an endpoint. Other kinds have none of their own.
    pub fn answer_timeout(&self) -> Option<Duration> {
        self.endpoint().map(EndpointSpec::answer_timeout)
    }

    /// Makes it ready to answer, with what stands around it.
    fn load(&self, name: &str, settings: &Settings) -> Result<Arc<dyn Handler>> {
        let handler = match self {
            Self::Local(model, compute) => local::load(name, model.clone(), *compute, settings)?,
            Self::OpenAi(spec) => spec.load(name)?,
            Self::Anthropic(spec) => spec.load(name)?,
            Self::Replay(spec) => Arc::new(Replay::load(name, spec)?),
        };
        settings.around(name, handler, self.limits(), self.answer_timeout())
    }
}

/// The kinds of handlers.
const KINDS: [&str; 4] = ["local", "openai", "anthropic", "replay"];
/// Limits of an endpoint: each answer is a connection, and a provider has a queue of its own.
const ENDPOINT_LIMITS: Limits = Limits { running: 32, waiting: 64 };
/// Keys whose values messages show. A key of a provider may stand anywhere else, `base_url` included.
const HARMLESS_KEYS: [&str; 12] = [
    "api_version",
    "unsupported",
    "kind",
    "model",
    "base_model",
    "any_base",
    "compute",
    "connect_timeout_s",
    "read_timeout_s",
    "max_tokens_param",
    "handlers",
    "egress",
];

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or has problems; all of them in one message.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, SMALL_FILE_BYTES_MAX)?;
        Self::parse(path, &text)
    }

    /// Reads the text of a file. Paths of models in it are relative to the file.
    ///
    /// # Errors
    /// When it has problems; all of them in one message.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let harmless =
            [&HARMLESS_KEYS[..], &settings::HARMLESS_KEYS, &server::KEYS, &fine_tuning::KEYS, &memory::KEYS].concat();
        let mut problems = Problems::of_secrets(path, text, &harmless);
        let root = problems.parse();
        problems.unknown_keys(&root, &["handlers", "routes", "server", "fine_tuning", "memory"]);
        let (handlers, routes, settings, rules) = Default::default();
        let mut config = Self {
            path: path.to_owned(),
            handlers,
            routes,
            settings,
            rules,
            server: server::read(&mut problems, &root),
            fine_tuning: fine_tuning::Settings::read(&mut problems, path, &root),
            memory: memory::Settings::read(&mut problems, &root),
        };
        let tables = [named(&mut problems, &root, "handlers"), named(&mut problems, &root, "routes")];
        let [handlers, routes] = tables;
        let names: Vec<&str> = handlers.iter().map(|(name, _, _)| *name).collect();
        for (name, _, table) in &handlers {
            if let Some(spec) = handler(&mut problems, path, name, table) {
                config.handlers.insert((*name).to_owned(), spec);
            }
            if let Some(table) = table.get_ref().as_table() {
                let settings = Settings::parse(&mut problems, path, table);
                config.settings.insert((*name).to_owned(), settings);
            }
        }
        for (name, span, table) in &routes {
            if names.contains(name) {
                problems.at(span.clone(), format!("`{name}`: a handler has this name already; give the route another"));
            }
            let (chain, rules) = route::read(&mut problems, path, span, table, &names, &config.handlers);
            config.routes.insert((*name).to_owned(), chain);
            config.rules.insert((*name).to_owned(), rules);
        }
        problems.into_result()?;
        Ok(config)
    }
}

type NamedTable<'t, 'a> = (&'t str, Range<usize>, &'t Spanned<DeValue<'a>>);

/// The tables `[key.NAME]`.
fn named<'t, 'a>(problems: &mut Problems<'a>, root: &'t DeTable<'a>, key: &str) -> Vec<NamedTable<'t, 'a>> {
    let Some(value) = root.get(key) else { return Vec::new() };
    let Some(table) = value.get_ref().as_table() else {
        problems.wrong_type(key, value, &format!("tables, [{key}.NAME]"));
        return Vec::new();
    };
    let mut found = Vec::new();
    for (name, value) in table.iter() {
        if value.get_ref().as_table().is_none() {
            problems.at(name.span(), format!("`{}`: should be a table, [{key}.NAME]", name.get_ref()));
            continue;
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
        if name.get_ref().is_empty() || !name.get_ref().chars().all(plain) {
            problems.at(name.span(), "a name consists of the letters a to z, A to Z, digits, and . _ - / :");
        }
        found.push((name.get_ref().as_ref(), name.span(), value));
    }
    found
}

fn handler<'a>(
    problems: &mut Problems<'a>,
    path: &Path,
    name: &str,
    value: &Spanned<DeValue<'a>>,
) -> Option<HandlerSpec> {
    let table = value.get_ref().as_table()?;
    let Some(kind) = table.get("kind") else {
        problems.at(value.span(), format!("[handlers.{name}]: `kind` is missing; it is {}", one_of(&KINDS)));
        return None;
    };
    match problems.text("kind", kind)?.as_str() {
        "local" => local::read(problems, path, name, value.span(), table),
        "openai" => openai::read(problems, name, &value.span(), table),
        "anthropic" => anthropic::read(problems, name, &value.span(), table),
        "replay" => replay::read(problems, path, name, value.span(), table),
        other => {
            problems.at(kind.span(), format!("`{other}`: unknown kind, {}", near(other, &KINDS)));
            None
        }
    }
}

/// Words in quotes, of which one is meant.
fn one_of(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    match words.as_slice() {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        words => words.concat(),
    }
}

/// Refuses keys of [`settings::HANDLER_KEYS`] that a handler of some kind would not read.
fn refuse<'a>(problems: &mut Problems<'a>, table: &DeTable<'a>, keys: &[&str], why: &str) {
    for key in keys {
        if let Some(value) = table.get(*key) {
            problems.at(value.span(), format!("`{key}`: {why}; leave it out"));
        }
    }
}

/// The keys of a kind of handler, and those that every handler has.
fn with_settings(keys: &[&'static str]) -> Vec<&'static str> {
    let more = settings::HANDLER_KEYS.into_iter().filter(|key| !keys.contains(key));
    keys.iter().copied().chain(more).collect()
}

fn missing(problems: &mut Problems, span: Range<usize>, name: &str, key: &str) {
    problems.at(span, format!("[handlers.{name}]: `{key}` is missing"));
}
