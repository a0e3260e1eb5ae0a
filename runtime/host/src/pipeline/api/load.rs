//! `load_model` and `load_fine_tuned_model`: tables that describe a model, without reading its weights.

use mlua::{Lua, Value};

use super::Session;
use super::model::{ModelSpec, fine_tuned};
use super::options::Options;
use super::spec::verb;
use crate::pipeline::errors::{Failure, said, short};

/// Describes a base and how it is to be trained.
pub fn load_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("load_model"), argument)?;
    let name = options.needed_text("name");
    let named = ModelSpec::named(session, &name)?;
    let mut spec = ModelSpec { options: options.strategy(session.clock())?, ..named.clone() };
    if named.adapter.is_some() {
        return Err(said(format!("load_model: `{name}` is an adapter; `load_fine_tuned_model` describes it")));
    }
    spec.strategy = Some(strategy_of(&options)?);
    if session.dry && session.locate(&spec.base)?.is_none() {
        spec.load_base(session)?; // Says what is missing.
    }
    Ok(Value::Table(spec.to_table(lua)?))
}

/// Describes a trained model: its adapter, its base and its strategy.
pub fn load_fine_tuned_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("load_fine_tuned_model"), argument)?;
    Ok(Value::Table(fine_tuned(session, &options.needed_text("name"))?.to_table(lua)?))
}

/// Transformers' options that store the base in fewer bits, and the strategies that do.
const LOAD_IN: [(&str, &str); 2] = [("load_in_4bit", "qlora"), ("load_in_8bit", "int8")];

/// The strategy that a call of `load_model` asks for.
fn strategy_of(options: &Options) -> Result<String, Failure> {
    let strategy = options.text("strategy");
    let contradicts = |option: &str, value: bool, strategy: &str| {
        let strategy = short(strategy);
        said(format!("load_model: `{option} = {value}` contradicts `strategy = \"{strategy}\"`; leave one of them out"))
    };
    let mut asked = None;
    for (option, means) in LOAD_IN {
        match (options.flag(option), strategy.as_deref()) {
            (Some(true), Some(other)) if other != means => return Err(contradicts(option, true, other)),
            (Some(false), Some(same)) if same == means => return Err(contradicts(option, false, same)),
            (Some(true), _) if asked.is_some() => {
                return Err(said(
                    "load_model: `load_in_4bit` and `load_in_8bit` are both true; a base is stored one way",
                ));
            }
            (Some(true), _) => asked = Some(means),
            _ => {}
        }
    }
    Ok(strategy.unwrap_or_else(|| asked.unwrap_or("lora").to_owned()))
}
