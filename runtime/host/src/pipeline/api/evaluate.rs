//! `evaluate`: the loss of a model on rows.

use anyhow::Context;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::{evaluate_examples, objective};
use mlua::{Lua, Value};
use serde_json::{Value as Json, json};

use super::model::ModelSpec;
use super::options::Options;
use super::spec::verb;
use super::stored::{Made, stored};
use super::value::to_lua;
use super::{Session, imagined};
use crate::pipeline::errors::Failure;
use crate::progress::{self, thousands};

/// Measures a model on rows, or in a dry run says that it would.
pub fn evaluate(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("evaluate"), argument)?;
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let rows = options.dataset("dataset").context("`read` saw that a required option is there")?;
    if session.dry {
        let (model, _) = spec.load(session)?;
        let data = rows.encode(session, &model, objective::Kind::Sft).context("evaluate: dataset")?;
        let table = lua.create_table()?;
        session.would(
            lua,
            format!("measure {} on {} examples", spec.base, thousands(data.groups.len())),
            json!({"verb": "evaluate", "model": spec.base, "examples": data.groups.len(), "tokens": data.tokens()}),
        )?;
        let steps = session.imagined.steps(&spec);
        let loss = imagined::loss(&model, steps);
        table.set("loss", loss)?;
        table.set("perplexity", loss.exp())?;
        table.set("token_accuracy", imagined::accuracy(&model, steps))?;
        table.set("trained_tokens", data.tokens())?;
        table.set("examples", data.groups.len())?;
        return Ok(Value::Table(table));
    }
    Ok(to_lua(
        lua,
        &stored(lua, session, verb("evaluate"), &options, Json::Null, || {
            let (model, adaptation) = spec.load(session)?;
            let data = rows.encode(session, &model, objective::Kind::Sft).context("evaluate: dataset")?;
            let examples: Vec<_> = data.groups.iter().flat_map(|group| &group.sequences).collect();
            let bar = progress::counting("evaluating", examples.len());
            let compute = options.word("compute").unwrap_or(Compute::F32);
            let result = evaluate_examples(&model, adaptation.as_deref(), &examples, compute, |done| {
                bar.set_position(done as u64)
            });
            bar.finish_and_clear();
            let result = result?;
            Ok(Made::plain(json!({
                "loss": result.loss,
                "perplexity": result.perplexity,
                "token_accuracy": result.token_accuracy,
                "trained_tokens": result.trained_tokens,
                "examples": result.examples,
            })))
        })?,
    )?)
}
