//! `homeroom chat`.

use anyhow::Result;
use homeroom_engine::generate::{Finish, Sampling, generate, prompt_ids};
use serde_json::json;

use super::{print, reference};
use crate::cli::{Chat, Done};
use crate::models::Loaded;
use crate::progress::line;

/// Answers one prompt.
pub fn run(arguments: &Chat) -> Result<Done> {
    let Loaded { model, adaptation } = Loaded::load(&reference(&arguments.model))?;
    let system = arguments.system.iter().map(|text| json!({"role": "system", "content": text}));
    let user = json!({"role": "user", "content": arguments.prompt});
    let messages: Vec<_> = system.chain([user]).collect();
    let prompt = prompt_ids(&model, &messages)?;
    let sampling =
        Sampling { max_tokens: arguments.max_tokens, temperature: arguments.temperature, seed: arguments.seed };
    let answer = generate(&model, adaptation.as_deref(), &prompt, sampling)?;
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
