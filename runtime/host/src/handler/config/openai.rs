//! `kind = "openai"`: an endpoint that speaks OpenAI's API.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use toml::de::DeTable;

use super::endpoint::{self, EndpointSpec};
use super::{HandlerSpec, with_settings};
use crate::handler::Handler;
use crate::handler::openai::{MaxTokensParam, OpenAi};
use crate::toml_problems::Problems;

/// The keys of its table.
pub(super) const KEYS: [&str; 8] = [
    "kind",
    "base_url",
    "model",
    "api_key",
    "connect_timeout_s",
    "read_timeout_s",
    "answer_timeout_s",
    "max_tokens_param",
];

/// A handler of this kind whose key is not read yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenAiSpec {
    /// Its address and key.
    pub endpoint: EndpointSpec,
    /// `max_tokens_param`.
    pub max_tokens_param: MaxTokensParam,
}

impl OpenAiSpec {
    /// Makes the handler; connects to nothing.
    pub(super) fn load(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let handler = OpenAi::new(self.endpoint.endpoint(name)?);
        Ok(Arc::new(handler.with_max_tokens_param(self.max_tokens_param)))
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
    let param = table.get("max_tokens_param").and_then(|value| {
        let word = problems.text("max_tokens_param", value)?;
        let param = MaxTokensParam::ALL.into_iter().find(|param| param.word() == word);
        if param.is_none() {
            problems.at(value.span(), "`max_tokens_param`: should be \"max_tokens\" or \"max_completion_tokens\"");
        }
        param
    });
    let endpoint = endpoint::read(problems, name, span, table, None)?;
    Some(HandlerSpec::OpenAi(OpenAiSpec { endpoint, max_tokens_param: param.unwrap_or_default() }))
}
