//! The body of a request to an endpoint.

use serde_json::{Map, Value, json};

use super::MaxTokensParam;
use crate::handler::provider::Endpoint;
use crate::handler::{Message, Prompt, Request, Role, Tool};

/// The field that asks for the usage at the end of a stream.
pub(super) const STREAM_OPTIONS: &str = "stream_options";

/// Returns the body of a request: what was asked for, and no more.
pub(super) fn body(
    endpoint: &Endpoint,
    max_tokens_param: MaxTokensParam,
    request: &Request,
    with_usage: bool,
) -> Map<String, Value> {
    // Without `..`: a further field of a request is a further line here.
    let Request {
        messages,
        prompt,
        max_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias,
        seed,
        stop,
        n,
        logprobs,
        tools,
        tool_choice,
        parallel_tool_calls,
        response_format,
        reasoning_effort,
    } = request;
    let mut body = Map::new();
    body.insert("model".into(), json!(endpoint.model));
    let max_tokens_param = match prompt {
        None => {
            body.insert("messages".into(), messages.iter().map(message).collect());
            max_tokens_param.word()
        }
        Some(prompt) => {
            let prompt = match prompt {
                Prompt::Text(text) => json!(text),
                Prompt::Tokens(ids) => json!(ids),
            };
            body.insert("prompt".into(), prompt);
            MaxTokensParam::MaxTokens.word()
        }
    };
    body.insert("stream".into(), json!(true));
    if with_usage {
        body.insert(STREAM_OPTIONS.into(), json!({"include_usage": true}));
    }
    let bias: Map<String, Value> = logit_bias.iter().map(|(id, bias)| (id.to_string(), json!(bias))).collect();
    // Of a conversation's answer they are asked for in two fields, of a text's in one.
    let (wanted, top) = match (logprobs, prompt) {
        (None, _) => (None, None),
        (Some(top), Some(_)) => (Some(json!(top)), None),
        (Some(top), None) => (Some(json!(true)), Some(json!(top)).filter(|_| *top > 0)),
    };
    let some = |value: Value, given: bool| given.then_some(value);
    let optional = [
        (max_tokens_param, max_tokens.map(|n| json!(n))),
        ("temperature", temperature.map(|t| json!(t))),
        ("top_k", top_k.map(|k| json!(k))),
        ("top_p", top_p.map(|p| json!(p))),
        ("min_p", min_p.map(|p| json!(p))),
        ("repetition_penalty", repetition_penalty.map(|p| json!(p))),
        ("frequency_penalty", frequency_penalty.map(|p| json!(p))),
        ("presence_penalty", presence_penalty.map(|p| json!(p))),
        ("logit_bias", some(json!(bias), !bias.is_empty())),
        ("seed", seed.map(|seed| json!(seed))),
        ("stop", some(json!(stop), !stop.is_empty())),
        ("n", n.filter(|n| *n != 1).map(|n| json!(n))),
        ("logprobs", wanted),
        ("top_logprobs", top),
        ("tools", some(tools.iter().map(Tool::json).collect(), !tools.is_empty())),
        // Without tools, endpoints refuse a choice among them.
        ("tool_choice", tool_choice.as_ref().filter(|_| !tools.is_empty()).map(crate::handler::ToolChoice::json)),
        ("parallel_tool_calls", parallel_tool_calls.filter(|_| !tools.is_empty()).map(|several| json!(several))),
        ("response_format", response_format.as_ref().map(crate::handler::ResponseFormat::json)),
        ("reasoning_effort", reasoning_effort.as_ref().map(|effort| json!(effort))),
    ];
    body.extend(optional.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    body
}

fn message(message: &Message) -> Value {
    let mut fields = message.json();
    // Every endpoint knows `system`; OpenAI's make `developer` of it where a model wants that.
    if message.role == Role::Developer {
        fields.insert("role".into(), json!(Role::System));
    }
    // Thoughts are wanted back by those who gave them, and while tools are being called; others refuse the field.
    if message.tool_calls.is_empty() {
        fields.remove("reasoning_content");
    }
    Value::Object(fields)
}
