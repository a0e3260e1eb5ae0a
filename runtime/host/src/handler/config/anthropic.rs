//! `kind = "anthropic"`: Anthropic's API.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use toml::de::DeTable;

use super::endpoint::{self, EndpointSpec};
use super::{HandlerSpec, refuse, with_settings};
use crate::handler::Handler;
use crate::handler::anthropic::{Anthropic, ApiVersion};
use crate::toml_problems::{Problems, near};

/// The keys of its table.
pub(super) const KEYS: [&str; 9] = [
    "kind",
    "base_url",
    "model",
    "api_key",
    "api_version",
    "unsupported",
    "connect_timeout_s",
    "read_timeout_s",
    "answer_timeout_s",
];
/// Where the provider's own API is.
const URL: &str = "https://api.anthropic.com";
/// Longest answer where neither a request nor the file says.
const MAX_TOKENS: usize = 4096;

/// A handler of this kind whose key is not read yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnthropicSpec {
    /// Its address and key.
    pub endpoint: EndpointSpec,
    /// `api_version`.
    pub version: ApiVersion,
    /// `unsupported = "drop"`.
    pub drop_unsupported: bool,
}

impl AnthropicSpec {
    /// Makes the handler; connects to nothing.
    pub(super) fn load(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let (version, drop_unsupported) = (self.version, self.drop_unsupported);
        let endpoint = self.endpoint.endpoint(name)?;
        Ok(Arc::new(Anthropic { endpoint, version, drop_unsupported, max_tokens: MAX_TOKENS }))
    }
}

/// Reads `[handlers.NAME]`.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    name: &str,
    span: &Range<usize>,
    table: &DeTable<'a>,
) -> Option<HandlerSpec> {
    problems.unknown_keys(table, &with_settings(&KEYS));
    let mut word = |key: &str, known: &[&str]| {
        let value = table.get(key)?;
        let word = problems.text(key, value)?;
        if !known.contains(&word.as_str()) {
            problems.at(value.span(), format!("`{key}`: `{word}` is unknown, {}", near(&word, known)));
        }
        Some(word)
    };
    let version = word("api_version", &ApiVersion::ALL.map(ApiVersion::word));
    let unsupported = word("unsupported", &["reject", "drop"]);
    let endpoint = endpoint::read(problems, name, span, table, Some(URL))?;
    let version = ApiVersion::ALL.into_iter().find(|known| version.as_deref() == Some(known.word()));
    if version == Some(ApiVersion::V2026) {
        refuse(problems, table, &["temperature", "top_p"], "this version of the API does not know it");
    } else if let Some(value) = table.get("temperature") {
        // The API's range, which is less than that of others.
        problems.number("temperature", value, 0.0..=1.0);
    }
    Some(HandlerSpec::Anthropic(AnthropicSpec {
        endpoint,
        version: version.unwrap_or(ApiVersion::V2023),
        drop_unsupported: unsupported.as_deref() == Some("drop"),
    }))
}
