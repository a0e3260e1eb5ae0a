//! How hard rows are: by their length, or by the loss of a model that has not learned them.

use anyhow::Context;
use homeroom_engine::data::{Example, check_row_for};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::evaluate_each;
use homeroom_engine::train::objective::Kind;
use mlua::{Lua, MultiValue, Value};
use serde_json::json;

use super::Session;
use super::dataset::Dataset;
use super::methods::{ascending, node, one, parted, quantiles};
use super::model::ModelSpec;
use super::options::Options;
use super::spec::verb;
use super::stored::{Made, stored};
use crate::pipeline::errors::{Failure, said};
use crate::progress::{self, thousands};

/// Sorts rows by their length: in tokens of a model, or in characters.
pub(super) fn by_length(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("by_length"), options)?;
    let mut lengths = Vec::with_capacity(data.len());
    match options.get("model") {
        Some(model) => {
            let spec = ModelSpec::read(session, model)?;
            let _paused = session.clock().pause();
            let model = spec.load_base(session)?;
            for examples in encoded(session, data, &model, "by_length")? {
                lengths.push(match examples.as_slice() {
                    [] => f64::INFINITY,
                    examples => examples.iter().map(|example| example.ids.len()).sum::<usize>() as f64,
                });
            }
        }
        None => {
            for row in data.rows() {
                session.clock().check()?;
                lengths.push(node(row).characters() as f64);
            }
        }
    }
    sorted(lua, session, data, &lengths, "by_length", &options)
}

/// Sorts rows by the loss of a model: what it finds easy comes first.
pub(super) fn by_loss(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("by_loss"), options)?;
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let paused = session.clock().pause();
    let losses = if session.dry {
        let (model, _) = spec.load(session)?;
        encoded(session, data, &model, "by_loss")?;
        session.would(
            lua,
            format!("measure {} on {} rows, one by one", spec.base, thousands(data.len())),
            json!({"verb": "by_loss", "model": spec.base, "rows": data.len()}),
        )?;
        // It forecasts nothing of which row is hard.
        vec![0.0; data.len()]
    } else {
        let more = json!({"rows": data.identity(session.clock())?});
        let measured = stored(lua, session, verb("by_loss"), &options, more, || {
            let (model, adaptation) = spec.load(session)?;
            let rows = encoded(session, data, &model, "by_loss")?;
            let examples: Vec<&Example> = rows.iter().flatten().collect();
            let bar = progress::counting("measuring rows", examples.len());
            let compute = options.word("compute").unwrap_or(Compute::F32);
            let each = evaluate_each(&model, adaptation.as_deref(), &examples, compute, |done| {
                bar.set_position(done as u64);
            });
            bar.finish_and_clear();
            let (_, each) = each.context("by_loss")?;
            let mut each = each.into_iter();
            // A row's loss is a mean over its own tokens: a long row is not hard for its length.
            let losses = rows.iter().map(|examples| {
                let nats: f64 = each.by_ref().take(examples.len()).sum();
                let trained = examples.iter().flat_map(|example| &example.trained).filter(|trained| **trained).count();
                (trained > 0).then(|| nats / trained as f64)
            });
            Ok(Made::plain(losses.collect::<Vec<_>>().into()))
        })?;
        // A row that is skipped as too long has none, and comes last.
        let losses = measured.as_array().into_iter().flatten().map(|loss| loss.as_f64().unwrap_or(f64::INFINITY));
        let losses: Vec<f64> = losses.collect();
        if losses.len() != data.len() {
            return Err(said("by_loss: what was kept of it is damaged; run with --fresh"));
        }
        losses
    };
    drop(paused);
    sorted(lua, session, data, &losses, "by_loss", &options)
}

fn sorted(
    lua: &Lua,
    session: &Session,
    data: &Dataset,
    numbers: &[f64],
    name: &str,
    options: &Options,
) -> Result<MultiValue, Failure> {
    let quantiles = quantiles(name, options)?;
    let order = ascending(numbers);
    match quantiles.is_empty() {
        true => one(lua, data.pick(lua, session, &order)?),
        false => one(lua, parted(lua, session, data, &order, &quantiles)?),
    }
}

/// The examples of each row; none of one that is skipped as too long.
fn encoded(session: &Session, data: &Dataset, model: &BaseModel, name: &str) -> Result<Vec<Vec<Example>>, Failure> {
    let encoder = data.encoder(model)?;
    let mut rows = Vec::with_capacity(data.len());
    for row in data.rows() {
        session.clock().check()?;
        let checked = check_row_for(row.text.json(), Kind::Sft.rows(), Kind::Sft.name());
        let examples = checked.and_then(|checked| encoder.examples(row.line, &checked));
        let examples = examples.map_err(|problem| said(format!("{name}: {}: {problem}", row.place())))?;
        rows.push(examples.map(|(examples, _)| examples).unwrap_or_default());
    }
    Ok(rows)
}
