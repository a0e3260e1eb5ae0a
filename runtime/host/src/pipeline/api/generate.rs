//! `generate`: the answers of a model, or of a handler, to prompts.

use anyhow::Context;
use homeroom_engine::inference::generate::{Sampling, prompt_ids};
use homeroom_engine::inference::{Adapter, Engine};
use homeroom_engine::run::compute::Compute;
use homeroom_engine::text::block_end::BlockEnd;
use mlua::{Lua, Value};
use serde_json::{Value as Json, json};

use super::model::ModelSpec;
use super::options::Options;
use super::spec::verb;
use super::stored::{Made, stored};
use super::value::to_lua;
use super::{Session, asked};
use crate::pipeline::errors::{Failure, said};

/// Has a model answer prompts, or in a dry run looks whether it could.
pub fn generate(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("generate"), argument)?;
    match (options.get("model"), options.text("handler")) {
        (None, None) => return Err(said("generate: give `model` or `handler`: who answers")),
        (Some(_), Some(_)) => return Err(said("generate: give `model` or `handler`, not both")),
        (None, Some(handler)) => return asked::generate(lua, session, &options, &handler),
        (Some(_), None) => {}
    }
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let prompts = options.texts("prompts");
    let sampling = Sampling {
        max_tokens: options.whole("max_tokens").unwrap_or(256) as usize,
        temperature: options.number("temperature").unwrap_or(0.0),
        seed: options.seed(),
        ..Sampling::default()
    };
    let system = options.text("system").map(|text| json!({"role": "system", "content": text}));
    let messages = |prompt: &str| -> Vec<Json> {
        system.iter().cloned().chain([json!({"role": "user", "content": prompt})]).collect()
    };
    if session.dry {
        let (model, _) = spec.load(session)?;
        let texts = lua.create_table()?;
        for prompt in &prompts {
            session.clock().check()?;
            prompt_ids(&model, &messages(prompt)).context("generate")?;
            texts.raw_push("")?;
        }
        session.would(
            lua,
            format!("answer  {} prompts with {}", prompts.len(), spec.base),
            json!({"verb": "generate", "model": spec.base, "prompts": prompts.len()}),
        )?;
        return Ok(Value::Table(texts));
    }
    Ok(to_lua(
        lua,
        &stored(lua, session, verb("generate"), &options, Json::Null, || {
            let (model, adaptation) = spec.load(session)?;
            let engine = Engine::new(model.clone(), Compute::Auto);
            let adapter = adaptation.map(|adaptation| Adapter::new(engine.inference(), model.clone(), adaptation));
            let adapter = adapter.transpose().context("generate")?;
            // All are asked at once, as they then share the reading of the weights; each answer is what it would be alone.
            let mut asked = Vec::with_capacity(prompts.len());
            for prompt in &prompts {
                session.clock().check()?;
                let ids = prompt_ids(&model, &messages(prompt)).context("generate")?;
                let block_end =
                    BlockEnd::behind(&ids, &model.tokenizer, model.template.as_ref()).context("generate")?;
                asked.push((engine.ask(adapter.as_ref(), &ids, sampling).context("generate")?, block_end));
            }
            let mut texts: Vec<String> = Vec::with_capacity(prompts.len());
            for (tokens, mut block_end) in asked {
                session.clock().check()?;
                let mut ids = Vec::new();
                for id in tokens {
                    session.clock().check()?;
                    ids.push(id.context("generate")?);
                }
                let text = model.tokenizer.decode(&ids, true).context("generate")?;
                texts.push(block_end.push(text) + &block_end.finish());
            }
            Ok(Made::plain(json!(texts)))
        })?,
    )?)
}
