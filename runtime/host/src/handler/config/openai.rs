//! `kind = "openai"`: an endpoint that speaks OpenAI's API.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use toml::de::DeTable;

use super::endpoint::{self, EndpointSpec};
use super::{HandlerSpec, with_settings};
use crate::handler::Handler;
use crate::handler::openai::OpenAi;
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

/// Makes the handler; connects to nothing.
pub(super) fn load(spec: &EndpointSpec, name: &str) -> Result<Arc<dyn Handler>> {
    Ok(Arc::new(OpenAi::new(spec.endpoint(name)?)))
}

/// Reads `[handlers.NAME]`.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    name: &str,
    span: &Range<usize>,
    table: &DeTable<'a>,
) -> Option<HandlerSpec> {
    problems.unknown_keys(table, &with_settings(&KEYS));
    let param =
        table.get("max_tokens_param").and_then(|value| Some((value, problems.text("max_tokens_param", value)?)));
    if let Some((value, param)) = &param
        && !["max_tokens", "max_completion_tokens"].contains(&param.as_str())
    {
        problems.at(value.span(), "`max_tokens_param`: should be \"max_tokens\" or \"max_completion_tokens\"");
    }
    let mut spec = endpoint::read(problems, name, span, table, None)?;
    if let Some((_, param)) = param {
        spec.max_tokens_param = param;
    }
    Some(HandlerSpec::OpenAi(spec))
}
