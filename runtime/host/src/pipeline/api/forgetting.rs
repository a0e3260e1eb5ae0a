//! `forgetting`: how far a trained model has moved from its base.

use std::sync::Arc;

use anyhow::Context;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::forgetting::Forgetting;
use homeroom_engine::models::BaseModel;
use homeroom_engine::train::objective::Kind;
use mlua::{Lua, Value};
use serde_json::json;

use super::model::ModelSpec;
use super::options::Options;
use super::spec::verb;
use super::stored::{Made, stored};
use super::value::to_lua;
use super::{Session, identity};
use crate::job::ForgettingRows;
use crate::pipeline::errors::{Failure, said};

/// What a dry run says of a model that is not there.
const IMAGINED: Forgetting = Forgetting { loss_before: 1.0, loss_after: 1.05, kl: 0.05, tokens: 0 };

/// Measures, or in a dry run says what would be measured.
pub fn forgetting(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("forgetting"), argument)?;
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let base = options.get("base").map(|base| ModelSpec::read(session, base)).transpose()?;
    if base.as_ref().is_some_and(|base| base.adapter.is_some()) {
        return Err(said(
            "forgetting: `base` is a trained model; leave it out, or name the base that `model` was trained from",
        ));
    }
    if base.is_none() && spec.adapter.is_none() {
        return Err(said(
            "forgetting: this model does not say what it was trained from; `fine_tune` returns one that does, or `base` names it",
        ));
    }
    let data = options.dataset("dataset");
    if session.dry {
        let what = data.as_ref().map_or_else(|| "its own answers".to_owned(), |data| format!("{} rows", data.len()));
        session.would(
            lua,
            format!("compare what was trained with {} on {what}", spec.base),
            json!({"verb": "forgetting", "model": spec.base, "rows": data.as_ref().map(super::dataset::Dataset::len)}),
        )?;
        let table = lua.create_table()?;
        table.set("loss_before", IMAGINED.loss_before)?;
        table.set("loss", IMAGINED.loss_after)?;
        table.set("kl", IMAGINED.kl)?;
        table.set("tokens", IMAGINED.tokens)?;
        return Ok(Value::Table(table));
    }
    // Of a model whose weights were all trained, the options do not say what its base is.
    let more = json!({"base": identity::base(session, base.as_ref().unwrap_or(&spec))?});
    let measured = stored(lua, session, verb("forgetting"), &options, more, || {
        let (model, adaptation) = spec.load(session)?;
        let base = base_of(session, base, &spec, (&model, adaptation.as_deref()))?;
        let rows = match data {
            Some(data) => {
                let data = data.encode(session, &base, Kind::Sft).context("forgetting: dataset")?;
                ForgettingRows::given(data.groups, "the rows".to_owned())
            }
            None => {
                let run = session.run.borrow().as_ref().map(|(run, _)| run.path().to_owned());
                ForgettingRows::own(&base, run.as_deref()).context("forgetting")?
            }
        };
        let measured = rows.measure((&*base, None), (&*model, adaptation.as_deref())).context("forgetting")?;
        session.tell(rows.words(&measured));
        let Forgetting { loss_before, loss_after, kl, tokens } = measured;
        let numbers = [loss_before, loss_after, kl];
        if !numbers.iter().all(|number| number.is_finite()) {
            return Err(said("forgetting: the numbers of the trained model are not finite: its weights are of no use"));
        }
        Ok(Made::plain(json!({"loss_before": loss_before, "loss": loss_after, "kl": kl, "tokens": tokens})))
    })?;
    Ok(to_lua(lua, &measured)?)
}

/// What a model is compared with: what was named, else what it was trained from.
fn base_of(
    session: &Session,
    named: Option<ModelSpec>,
    spec: &ModelSpec,
    (model, adaptation): (&Arc<BaseModel>, Option<&Adaptation>),
) -> Result<Arc<BaseModel>, Failure> {
    Ok(match (named, adaptation) {
        (Some(base), _) => base.load_base(session)?,
        // Stored as the training had it.
        (None, Some(_)) => model.clone(),
        // All of its weights were trained, so the base is another model.
        (None, None) => ModelSpec { base: spec.base.clone(), ..ModelSpec::default() }.load_base(session)?,
    })
}
