//! `homeroom chat`.

use anyhow::Result;
use homeroom_engine::generate::{Finish, Sampling, generate, prompt_ids};
use serde_json::json;

use super::{load_model, print};
use crate::cli::{Chat, Done};
use crate::progress::line;

/// Answers one prompt.
pub fn run(arguments: &Chat) -> Result<Done> {
    let (model, adaptation) = load_model(&arguments.model)?;
    let system = arguments.system.iter().map(|text| json!({"role": "system", "content": text}));
    let user = json!({"role": "user", "content": arguments.prompt});
    let messages: Vec<_> = system.chain([user]).collect();
    let prompt = prompt_ids(&model, &messages)?;
    let sampling =
        Sampling { max_tokens: arguments.max_tokens, temperature: arguments.temperature, seed: arguments.seed };
    let answer = generate(&model, adaptation.as_ref(), &prompt, sampling)?;
    print(&answer.text)?;
    if answer.finish == Finish::Length {
        let (tokens, context) = (answer.ids.len(), model.config.max_position_embeddings);
        line(match tokens < arguments.max_tokens {
            true => format!("note: the reply was cut at {tokens} tokens, where the model's context of {context} ends"),
            false => format!("note: the reply was cut at {tokens} tokens; --max-tokens allows more"),
        });
    }
    Ok(Done::Whole)
}
