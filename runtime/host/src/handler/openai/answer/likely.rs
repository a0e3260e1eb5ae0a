//! Log-probabilities, in the forms of chat completions and of the completions before them.

use serde_json::Value;

use crate::handler::{TOP_LOGPROBS_MAX, TokenLogprob};

/// Reads the log-probabilities of a choice. What is not understood is left out: no text is lost by that.
pub(super) fn read(logprobs: &Value) -> Vec<TokenLogprob> {
    match (&logprobs["content"], &logprobs["tokens"]) {
        (Value::Array(tokens), _) => tokens.iter().filter_map(with_top).collect(),
        (_, Value::Array(tokens)) => {
            let legacy = |(i, token): (usize, &Value)| {
                let (token, bytes) = (token.as_str()?.to_owned(), None);
                let logprob = logprobs["token_logprobs"][i].as_f64()?;
                let one = |(token, logprob): (&String, &Value)| {
                    Some(TokenLogprob {
                        token: token.clone(),
                        bytes: None,
                        logprob: logprob.as_f64()?,
                        top: Vec::new(),
                    })
                };
                let top = logprobs["top_logprobs"][i].as_object().into_iter().flatten();
                let mut top: Vec<TokenLogprob> = top.filter_map(one).take(TOP_LOGPROBS_MAX).collect();
                top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
                Some(TokenLogprob { token, bytes, logprob, top })
            };
            tokens.iter().enumerate().filter_map(legacy).collect()
        }
        _ => Vec::new(),
    }
}

fn with_top(token: &Value) -> Option<TokenLogprob> {
    let top = token["top_logprobs"].as_array().into_iter().flatten();
    Some(TokenLogprob { top: top.filter_map(one).take(TOP_LOGPROBS_MAX).collect(), ..one(token)? })
}

fn one(token: &Value) -> Option<TokenLogprob> {
    let byte = |byte: &Value| byte.as_u64().and_then(|byte| u8::try_from(byte).ok());
    let bytes = token["bytes"].as_array().and_then(|bytes| bytes.iter().map(byte).collect());
    Some(TokenLogprob {
        token: token["token"].as_str()?.to_owned(),
        bytes,
        logprob: token["logprob"].as_f64()?,
        top: Vec::new(),
    })
}
