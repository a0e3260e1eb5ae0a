//! `kind = "openai"`: an endpoint that speaks OpenAI's API.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use toml::de::DeTable;

use super::{HandlerSpec, key, missing, with_settings};
use crate::handler::openai::{BaseUrl, Endpoint, OpenAi};
use crate::handler::{Handler, Secret};
use crate::toml_problems::Problems;

/// The keys of its table.
const KEYS: [&str; 8] = [
    "kind",
    "base_url",
    "model",
    "api_key",
    "connect_timeout_s",
    "read_timeout_s",
    "answer_timeout_s",
    "max_tokens_param",
];

/// An endpoint whose key is not read yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// `base_url`.
    pub base_url: BaseUrl,
    /// `model`.
    pub model: String,
    /// `api_key = { env = "…" }`: the variable's name.
    pub api_key_env: Option<String>,
    /// `connect_timeout_s`.
    pub connect_timeout_s: u64,
    /// `read_timeout_s`.
    pub read_timeout_s: u64,
    /// `answer_timeout_s`.
    pub answer_timeout_s: u64,
    /// `max_tokens_param`.
    pub max_tokens_param: String,
}

impl EndpointSpec {
    /// The key, from the environment.
    pub(super) fn api_key(&self) -> Result<Option<Secret>, String> {
        self.api_key_env.as_deref().map(key::read).transpose()
    }

    /// Longest time for a whole answer.
    pub(super) fn answer_timeout(&self) -> Duration {
        Duration::from_secs(self.answer_timeout_s)
    }

    /// Makes the handler; connects to nothing.
    pub(super) fn load(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let api_key = self.api_key().map_err(anyhow::Error::msg)?;
        if self.base_url.can_be_overheard() && api_key.is_some() {
            eprintln!(
                "warning: handler `{name}`: its key and conversations are sent to {} unencrypted; use https://",
                self.base_url.host()
            );
        }
        let endpoint = OpenAi::new(Endpoint {
            name: name.to_owned(),
            base_url: self.base_url.clone(),
            model: self.model.clone(),
            api_key,
            connect_timeout: Duration::from_secs(self.connect_timeout_s),
            read_timeout: Duration::from_secs(self.read_timeout_s),
            answer_timeout: self.answer_timeout(),
            max_tokens_param: self.max_tokens_param.clone(),
        });
        Ok(Arc::new(endpoint))
    }
}

/// Reads `[handlers.NAME]`.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    name: &str,
    span: Range<usize>,
    table: &DeTable<'a>,
) -> Option<HandlerSpec> {
    problems.unknown_keys(table, &with_settings(&KEYS));
    for key in ["base_url", "model"] {
        if !table.contains_key(key) {
            missing(problems, span.clone(), name, key);
        }
    }
    let mut text = |key: &str| table.get(key).and_then(|value| problems.text(key, value));
    let (base_url, model, max_tokens_param) = (text("base_url"), text("model"), text("max_tokens_param"));
    let seconds = |problems: &mut Problems<'a>, key: &str, default: i64| {
        let given = table.get(key).map(|value| problems.int(key, value, 1..=3600));
        given.flatten().unwrap_or(default).unsigned_abs()
    };
    let connect_timeout_s = seconds(problems, "connect_timeout_s", 10);
    let read_timeout_s = seconds(problems, "read_timeout_s", 120);
    let answer_timeout_s = seconds(problems, "answer_timeout_s", 600);
    let max_tokens_param = max_tokens_param.unwrap_or_else(|| "max_tokens".to_owned());
    if let Some(value) = table.get("max_tokens_param").filter(|_| max_tokens_param != "max_tokens")
        && max_tokens_param != "max_completion_tokens"
    {
        problems.at(value.span(), "`max_tokens_param`: should be \"max_tokens\" or \"max_completion_tokens\"");
    }
    let api_key_env = table.get("api_key").and_then(|value| key::variable(problems, value));
    let base_url = table.get("base_url").zip(base_url).and_then(|(value, url)| {
        let tell = |why: String| problems.at(value.span(), format!("`base_url`: {why}"));
        BaseUrl::parse(&url).map_err(tell).ok()
    });
    let (base_url, model) = (base_url?, model?);
    Some(HandlerSpec::OpenAi(EndpointSpec {
        base_url,
        model,
        api_key_env,
        connect_timeout_s,
        read_timeout_s,
        answer_timeout_s,
        max_tokens_param,
    }))
}
