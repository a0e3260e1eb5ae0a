//! The body of `POST /v1/chat/completions`, read field by field.
//!
//! A field that is not supported or not known is refused by name: an answer that silently ignores it is worse than none. A field that
//! does not change the answer is ignored, and named in the header `x-ignored-params`. What a handler cannot do, it refuses by itself.

mod messages;
pub(super) mod tools;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::handler::{CHOICES_MAX, HandlerError, Request, TOP_LOGPROBS_MAX};
use crate::toml_problems::near;

/// A request, read.
#[derive(Debug)]
pub struct Asked {
    /// The model, by our name for it.
    pub model: String,
    /// The request for the handler.
    pub request: Request,
    /// The answer is sent as a stream.
    pub stream: bool,
    /// The stream ends with the usage.
    pub include_usage: bool,
    /// Fields that were ignored.
    pub ignored: Vec<String>,
    /// The person for whom a program asks.
    pub user: Option<String>,
}

/// Returns, for a field that changes the answer and is not supported, whether its value asks for nothing.
fn asks_for_nothing(field: &str, value: &Value) -> Option<bool> {
    let is_empty = || value.as_array().is_some_and(Vec::is_empty);
    Some(match field {
        "store" => value == false,
        "functions" => is_empty(),
        "function_call" => value == "none",
        "verbosity" => value == "medium",
        "modalities" => value.as_array().is_some_and(|list| list.iter().all(|item| item == "text")),
        "audio" | "prediction" | "web_search_options" => false,
        _ => return None,
    })
}

/// Reads a body.
///
/// # Errors
/// When it is not JSON, or a field is wrong, not supported or not known; names the field.
#[cfg(test)]
pub fn read(body: &[u8]) -> Result<Asked, HandlerError> {
    of_fields(&super::body::fields(body)?)
}

/// Reads the fields of a body.
///
/// # Errors
/// When a field is wrong, not supported or not known; names the field.
pub fn of_fields(fields: &Map<String, Value>) -> Result<Asked, HandlerError> {
    let mut ignored = Vec::new();
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        match asks_for_nothing(field, value) {
            Some(true) => {}
            Some(false) => {
                let instead = match field.as_str() {
                    "functions" => "send `tools`",
                    "function_call" => "send `tool_choice`",
                    _ => "leave it out",
                };
                return Err(HandlerError::invalid(field, format!("`{field}` is not supported; {instead}")));
            }
            None if HONOURED.contains(&field.as_str()) => {}
            None if HARMLESS.contains(&field.as_str()) => ignored.push(field.clone()),
            None => return Err(not_known(field, &HONOURED)),
        }
    }
    let given = Given(fields);
    let messages = given.get("messages").ok_or_else(|| HandlerError::invalid("messages", "`messages` is missing"))?;
    let tools = given.get("tools").map_or(Ok(Vec::new()), tools::read)?;
    let tool_choice = given.get("tool_choice").map(|choice| tools::read_choice(choice, &tools)).transpose()?;
    let parallel_tool_calls = given.get("parallel_tool_calls").map(|value| flag("parallel_tool_calls", value));
    if parallel_tool_calls.is_some() && tools.is_empty() {
        ignored.push("parallel_tool_calls".to_owned());
    }
    let request = Request {
        messages: messages::read(messages, &mut ignored)?,
        tools,
        tool_choice,
        parallel_tool_calls: parallel_tool_calls.transpose()?,
        response_format: given.get("response_format").map(tools::read_format).transpose()?,
        reasoning_effort: given.get("reasoning_effort").map(read_effort).transpose()?,
        logprobs: given.logprobs()?,
        ..given.sampling()?
    };
    let (model, stream) = (given.model()?, given.stream()?);
    let include_usage = given.include_usage(&mut ignored)?;
    let user = ["user", "safety_identifier"].into_iter().find_map(|field| given.get(field)?.as_str());
    let user = user.map(str::to_owned);
    Ok(Asked { model, request, stream, include_usage, ignored, user })
}

const HONOURED: [&str; 25] = [
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
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
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "reasoning_effort",
    "stream",
    "stream_options",
];

/// Fields of OpenAI's API that do not change the answer.
pub(super) const HARMLESS: [&str; 7] = [
    "user",
    "safety_identifier",
    "metadata",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
];

/// Most tokens that a bias is given for.
const BIASES_MAX: usize = 1024;
/// OpenAI's words for how long a model thinks.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// Refuses a field that is not known.
pub(super) fn not_known(field: &str, known: &[&str]) -> HandlerError {
    let name: String = field.chars().take(80).collect();
    HandlerError::invalid(&name, format!("`{name}` is not known here, {}", near(&name, known)))
}

fn unknown(at: &str, field: &str) -> HandlerError {
    let field: String = field.chars().take(80).collect();
    HandlerError::invalid(&format!("{at}.{field}"), format!("`{at}.{field}` is not known here; leave it out"))
}

pub(super) fn wrong(field: &str, wanted: &str) -> HandlerError {
    HandlerError::invalid(field, format!("`{field}` should be {wanted}"))
}

fn flag(field: &str, value: &Value) -> Result<bool, HandlerError> {
    value.as_bool().ok_or_else(|| wrong(field, "true or false"))
}

fn read_effort(value: &Value) -> Result<String, HandlerError> {
    let word = value.as_str().filter(|word| EFFORTS.contains(word));
    word.map(str::to_owned).ok_or_else(|| wrong("reasoning_effort", &format!("one of {}", EFFORTS.join(", "))))
}

/// The fields of a body. One that is null counts as not given.
pub(super) struct Given<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Given<'a> {
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn model(&self) -> Result<String, HandlerError> {
        let model = self.get("model").ok_or_else(|| HandlerError::invalid("model", "`model` is missing"))?;
        Ok(model.as_str().ok_or_else(|| wrong("model", "a text"))?.to_owned())
    }

    pub(super) fn stream(&self) -> Result<bool, HandlerError> {
        self.get("stream").map_or(Ok(false), |value| flag("stream", value))
    }

    /// Reads whether a stream ends with the usage.
    pub(super) fn include_usage(&self, ignored: &mut Vec<String>) -> Result<bool, HandlerError> {
        let Some(options) = self.get("stream_options") else { return Ok(false) };
        let options = options.as_object().ok_or_else(|| wrong("stream_options", "an object"))?;
        for key in options.keys().filter(|key| *key != "include_usage") {
            if key != "include_obfuscation" {
                return Err(unknown("stream_options", key));
            }
            ignored.push(format!("stream_options.{key}"));
        }
        Self(options).get("include_usage").map_or(Ok(false), |value| flag("stream_options.include_usage", value))
    }

    pub(super) fn number(&self, field: &str, bottom: f64, top: f64) -> Result<Option<f64>, HandlerError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().filter(|number| (bottom..=top).contains(number));
        number.map(Some).ok_or_else(|| wrong(field, &format!("a number from {bottom} to {top}")))
    }

    /// Reads a whole number of a range.
    pub(super) fn whole(&self, field: &str, bottom: usize, top: usize) -> Result<Option<usize>, HandlerError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        let number = number.filter(|number| (bottom..=top).contains(number));
        number.map(Some).ok_or_else(|| wrong(field, &format!("a whole number from {bottom} to {top}")))
    }

    /// Reads how the answer is drawn and where it ends.
    pub(super) fn sampling(&self) -> Result<Request, HandlerError> {
        let mut max_tokens = None;
        for field in ["max_tokens", "max_completion_tokens"] {
            if let Some(value) = self.get(field) {
                let count = value.as_u64().filter(|count| *count >= 1);
                let count = count.ok_or_else(|| wrong(field, "a whole number from 1"))?;
                max_tokens = Some(usize::try_from(count).unwrap_or(usize::MAX));
            }
        }
        // 0 and -1 are both in use for "all".
        let top_k = self.get("top_k").map(|value| match value.as_i64() {
            Some(-1) => Ok(0),
            Some(count @ 0..) => Ok(usize::try_from(count).unwrap_or(usize::MAX)),
            _ => Err(wrong("top_k", "a whole number from 0, which is off")),
        });
        let mut repetition_penalty = None;
        for field in ["repetition_penalty", "repeat_penalty"] {
            repetition_penalty = self.number(field, 0.01, 100.0)?.or(repetition_penalty);
        }
        let seed =
            self.get("seed").map(|value| value.as_i64().ok_or_else(|| wrong("seed", "a whole number of 64 bits")));
        Ok(Request {
            max_tokens,
            temperature: self.number("temperature", 0.0, 2.0)?,
            top_k: top_k.transpose()?,
            top_p: self.number("top_p", 0.0, 1.0)?,
            min_p: self.number("min_p", 0.0, 1.0)?,
            repetition_penalty,
            frequency_penalty: self.number("frequency_penalty", -2.0, 2.0)?,
            presence_penalty: self.number("presence_penalty", -2.0, 2.0)?,
            logit_bias: self.get("logit_bias").map_or(Ok(BTreeMap::new()), read_bias)?,
            seed: seed.transpose()?,
            stop: self.get("stop").map_or(Ok(Vec::new()), read_stop)?,
            n: self.whole("n", 1, CHOICES_MAX)?,
            ..Request::default()
        })
    }

    /// Reads how many log-probabilities are asked for beside each token's own.
    fn logprobs(&self) -> Result<Option<usize>, HandlerError> {
        let wanted = self.get("logprobs").map_or(Ok(false), |value| flag("logprobs", value))?;
        let top = self.whole("top_logprobs", 0, TOP_LOGPROBS_MAX)?.unwrap_or(0);
        if top > 0 && !wanted {
            return Err(HandlerError::invalid("top_logprobs", "`top_logprobs` needs `logprobs`: true beside it"));
        }
        Ok(wanted.then_some(top))
    }
}

fn read_bias(value: &Value) -> Result<BTreeMap<u32, f64>, HandlerError> {
    let one = |(token, bias): (&String, &Value)| {
        Some((token.parse().ok()?, bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?))
    };
    let biases = value.as_object().filter(|biases| biases.len() <= BIASES_MAX);
    let biases = biases.and_then(|biases| biases.iter().map(one).collect());
    biases.ok_or_else(|| {
        wrong("logit_bias", &format!("an object of up to {BIASES_MAX} token ids, each with a number from -100 to 100"))
    })
}

fn read_stop(value: &Value) -> Result<Vec<String>, HandlerError> {
    let texts = match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(texts) => texts.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let texts = texts.filter(|texts| texts.len() <= 4 && texts.iter().all(|text| !text.is_empty()));
    texts.ok_or_else(|| wrong("stop", "a text, or a list of up to 4, none empty"))
}

#[cfg(test)]
mod tests;
