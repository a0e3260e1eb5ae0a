//! What the kinds of handlers have in common that ask an endpoint.

use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use toml::de::DeTable;

use super::{key, missing};
use crate::handler::Secret;
use crate::handler::provider::{BaseUrl, Endpoint};
use crate::toml_problems::Problems;

/// Longest time for a whole answer where the file does not say.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

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
}

impl EndpointSpec {
    /// The key, from the environment.
    pub(super) fn api_key(&self) -> Result<Option<Secret>, String> {
        self.api_key_env.as_deref().map(key::read).transpose()
    }

    /// Longest time for a whole answer.
    pub fn answer_timeout(&self) -> Duration {
        Duration::from_secs(self.answer_timeout_s)
    }

    /// Reads the key, for a handler of this name.
    pub(super) fn endpoint(&self, name: &str) -> Result<Endpoint> {
        let api_key = self.api_key().map_err(anyhow::Error::msg)?;
        if self.base_url.can_be_overheard() && api_key.is_some() {
            eprintln!(
                "warning: handler `{name}`: its key and conversations are sent to {} unencrypted; use https://",
                self.base_url.host()
            );
        }
        Ok(Endpoint {
            name: name.to_owned(),
            base_url: self.base_url.clone(),
            model: self.model.clone(),
            api_key,
            connect_timeout: Duration::from_secs(self.connect_timeout_s),
            read_timeout: Duration::from_secs(self.read_timeout_s),
            answer_timeout: self.answer_timeout(),
        })
    }
}

/// Reads the keys of an endpoint. `default_url`: its address if the file gives none.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    name: &str,
    span: &Range<usize>,
    table: &DeTable<'a>,
    default_url: Option<&str>,
) -> Option<EndpointSpec> {
    for key in ["base_url", "model"] {
        if !table.contains_key(key) && (key != "base_url" || default_url.is_none()) {
            missing(problems, span.clone(), name, key);
        }
    }
    let mut text = |key: &str| table.get(key).and_then(|value| problems.text(key, value));
    let (base_url, model) = (text("base_url"), text("model"));
    let seconds = |problems: &mut Problems<'a>, key: &str, default: i64| {
        let given = table.get(key).map(|value| problems.int(key, value, 1..=3600));
        given.flatten().unwrap_or(default).unsigned_abs()
    };
    let connect_timeout_s = seconds(problems, "connect_timeout_s", 10);
    let read_timeout_s = seconds(problems, "read_timeout_s", 120);
    let answer_timeout_s = seconds(problems, "answer_timeout_s", ANSWER_TIMEOUT.as_secs().cast_signed());
    let api_key_env = table.get("api_key").and_then(|value| key::variable(problems, value));
    let base_url = match (table.get("base_url"), default_url) {
        (Some(value), _) => base_url.and_then(|url| {
            let tell = |why: String| problems.at(value.span(), format!("`base_url`: {why}"));
            BaseUrl::parse(&url).map_err(tell).ok()
        }),
        (None, url) => url.and_then(|url| BaseUrl::parse(url).ok()),
    };
    Some(EndpointSpec {
        base_url: base_url?,
        model: model?,
        api_key_env,
        connect_timeout_s,
        read_timeout_s,
        answer_timeout_s,
    })
}
