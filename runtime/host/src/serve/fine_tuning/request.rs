//! The body of `POST /v1/fine_tuning/jobs`. A field that is not known, or cannot be honoured here, is refused by name.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use serde_json::{Map, Value};

use super::job::{Method, MethodKind};
use crate::serve::query::refused;
use crate::serve::reply::Refusal;
use crate::toml_problems::near;

const KNOWN: [&str; 9] = [
    "model",
    "training_file",
    "validation_file",
    "suffix",
    "seed",
    "hyperparameters",
    "method",
    "metadata",
    "integrations",
];
/// Longest suffix, in characters.
const SUFFIX_MAX: usize = 64;
/// Most entries of `metadata`, longest key and value, in characters.
const METADATA_MAX: (usize, usize, usize) = (16, 64, 512);

/// What a client asks for.
#[derive(Debug, PartialEq)]
pub struct Order {
    /// The model to train.
    pub model: String,
    /// Id of the file to learn from.
    pub training_file: String,
    /// Id of the file to measure on.
    pub validation_file: Option<String>,
    /// Words for the name.
    pub suffix: Option<String>,
    /// Seed.
    pub seed: u64,
    /// How to learn.
    pub method: Method,
    /// What is written on it.
    pub metadata: BTreeMap<String, String>,
}

/// Reads the fields of a body.
///
/// # Errors
/// When one is missing, unknown or wrong.
pub fn read(fields: &Map<String, Value>) -> Result<Order, Refusal> {
    known(fields, &KNOWN, "")?;
    let integrations = fields.get("integrations").filter(|value| !value.is_null());
    if integrations.is_some_and(|list| list.as_array().is_none_or(|list| !list.is_empty())) {
        return Err(refused("integrations", "`integrations`: nothing is sent from here; leave it out"));
    }
    let needed = |name: &str| text(fields, name)?.ok_or_else(|| refused(name, format!("`{name}` is missing")));
    let suffix = text(fields, "suffix")?;
    if suffix.as_ref().is_some_and(|suffix| suffix.chars().count() > SUFFIX_MAX) {
        return Err(refused("suffix", format!("`suffix`: should have at most {SUFFIX_MAX} characters")));
    }
    let seed = match fields.get("seed").filter(|seed| !seed.is_null()) {
        None => 42,
        Some(seed) => seed.as_u64().ok_or_else(|| refused("seed", "`seed`: should be a whole number, 0 or more"))?,
    };
    let method = match (given(fields, "method"), given(fields, "hyperparameters")) {
        (Some(_), Some(_)) => {
            return Err(refused("hyperparameters", "`hyperparameters`: is said in `method` already; leave one out"));
        }
        (Some(method), None) => self::method(object(method, "method")?)?,
        (None, hyperparameters) => {
            let hyperparameters = hyperparameters.map(|value| object(value, "hyperparameters")).transpose()?;
            self::hyperparameters(hyperparameters, "hyperparameters", MethodKind::Supervised)?
        }
    };
    Ok(Order {
        model: needed("model")?,
        training_file: needed("training_file")?,
        validation_file: text(fields, "validation_file")?,
        suffix: suffix.filter(|suffix| !suffix.is_empty()),
        seed,
        method,
        metadata: metadata(fields)?,
    })
}

fn given<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

fn object<'a>(value: &'a Value, name: &str) -> Result<&'a Map<String, Value>, Refusal> {
    value.as_object().ok_or_else(|| refused(name, format!("`{name}`: should be an object")))
}

fn known(fields: &Map<String, Value>, known: &[&str], within: &str) -> Result<(), Refusal> {
    let Some(other) = fields.keys().find(|name| !known.contains(&name.as_str())) else { return Ok(()) };
    let shown: String = other.chars().take(80).collect();
    Err(refused(&format!("{within}{shown}"), format!("`{within}{shown}`: unknown field, {}", near(other, known))))
}

fn text(fields: &Map<String, Value>, name: &str) -> Result<Option<String>, Refusal> {
    let Some(value) = given(fields, name) else { return Ok(None) };
    let text = value.as_str().filter(|text| text.len() <= 1024);
    text.map(|text| Some(text.to_owned())).ok_or_else(|| refused(name, format!("`{name}`: should be a short text")))
}

fn method(fields: &Map<String, Value>) -> Result<Method, Refusal> {
    known(fields, &["type", "supervised", "dpo", "reinforcement"], "method.")?;
    let kind = match given(fields, "type").map(Value::as_str) {
        Some(Some("supervised")) => MethodKind::Supervised,
        Some(Some("dpo")) => MethodKind::Dpo,
        Some(Some("reinforcement")) => {
            let message =
                "`method.type`: reinforcement needs a grader, and there is none here; supervised and dpo are trained";
            return Err(refused("method.type", message));
        }
        _ => return Err(refused("method.type", "`method.type`: should be supervised or dpo")),
    };
    let (own, other) = match kind {
        MethodKind::Supervised => ("supervised", "dpo"),
        MethodKind::Dpo => ("dpo", "supervised"),
    };
    for other in [other, "reinforcement"] {
        if given(fields, other).is_some() {
            let name = format!("method.{other}");
            return Err(refused(&name, format!("`{name}`: the type is {own}; leave it out")));
        }
    }
    let name = format!("method.{own}");
    let of_kind = given(fields, own).map(|value| object(value, &name)).transpose()?;
    let Some(of_kind) = of_kind else { return hyperparameters(None, &name, kind) };
    known(of_kind, &["hyperparameters"], &format!("{name}."))?;
    let name = format!("{name}.hyperparameters");
    let fields = given(of_kind, "hyperparameters").map(|value| object(value, &name)).transpose()?;
    hyperparameters(fields, &name, kind)
}

fn hyperparameters(fields: Option<&Map<String, Value>>, within: &str, kind: MethodKind) -> Result<Method, Refusal> {
    let mut method = Method { kind, ..Method::default() };
    let Some(fields) = fields else { return Ok(method) };
    let all: &[&str] = match kind {
        MethodKind::Supervised => &["n_epochs", "batch_size", "learning_rate_multiplier"],
        MethodKind::Dpo => &["n_epochs", "batch_size", "learning_rate_multiplier", "beta"],
    };
    known(fields, all, &format!("{within}."))?;
    let value = |name: &str| given(fields, name).filter(|value| value.as_str() != Some("auto"));
    let wrong = |name: &str, wanted: &str| {
        let name = format!("{within}.{name}");
        refused(&name, format!("`{name}`: should be \"auto\" or {wanted}"))
    };
    let whole = |name: &str, most: u64| {
        let found = value(name).map(|value| value.as_u64().filter(|number| (1..=most).contains(number)));
        found.map(|number| number.ok_or_else(|| wrong(name, &format!("a whole number from 1 to {most}")))).transpose()
    };
    let above_zero = |name: &str| {
        let found = value(name).map(|value| value.as_f64().filter(|number| *number > 0.0 && *number <= 1e6));
        found.map(|number| number.ok_or_else(|| wrong(name, "a number above 0"))).transpose()
    };
    method.n_epochs = whole("n_epochs", 1000)?;
    method.batch_size = whole("batch_size", 4096)?.map(|rows| rows as u32);
    method.learning_rate_multiplier = above_zero("learning_rate_multiplier")?;
    method.beta = above_zero("beta")?;
    Ok(method)
}

fn metadata(fields: &Map<String, Value>) -> Result<BTreeMap<String, String>, Refusal> {
    let Some(value) = given(fields, "metadata") else { return Ok(BTreeMap::new()) };
    let (entries, key, text) = METADATA_MAX;
    let message = format!("`metadata`: should have at most {entries} texts of {text} characters, with keys of {key}");
    let wrong =
        || Refusal { param: Some("metadata".to_owned()), ..Refusal::new(StatusCode::BAD_REQUEST, message.clone()) };
    let found = value.as_object().filter(|found| found.len() <= entries).ok_or_else(wrong)?;
    found
        .iter()
        .map(|(name, value)| {
            let short = value.as_str().filter(|value| value.chars().count() <= text && name.chars().count() <= key);
            Ok((name.clone(), short.ok_or_else(wrong)?.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn order(body: Value) -> Result<Order, String> {
        let Value::Object(fields) = body else { panic!("an object") };
        read(&fields).map_err(|refusal| format!("{}: {}", refusal.param.unwrap_or_default(), refusal.message))
    }

    #[test]
    fn an_order_is_read_with_either_spelling_of_its_method() -> Result<(), String> {
        let plain = order(
            json!({"model": "m", "training_file": "file-1", "hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}),
        )?;
        let wordy = order(
            json!({"model": "m", "training_file": "file-1", "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}}),
        )?;
        assert_eq!(plain, wordy);
        assert_eq!((plain.seed, plain.method.n_epochs, plain.method.batch_size), (42, Some(3), None));
        let dpo = order(
            json!({"model": "m", "training_file": "f", "seed": 7, "suffix": "", "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}}),
        )?;
        assert_eq!((dpo.method.kind, dpo.method.beta, dpo.seed, dpo.suffix), (MethodKind::Dpo, Some(0.2), 7, None));
        Ok(())
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let with = |more: Value| {
            let mut body = json!({"model": "m", "training_file": "f"});
            body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            order(body).expect_err("it is refused")
        };
        for (more, words) in [
            (json!({"modle": 1}), "modle: `modle`: unknown field, did you mean `model`?"),
            (json!({"training_file": null}), "training_file: `training_file` is missing"),
            (json!({"model": 7}), "model: `model`: should be a short text"),
            (json!({"seed": -1}), "seed: `seed`: should be"),
            (json!({"seed": 1.5}), "seed: `seed`: should be"),
            (json!({"suffix": "x".repeat(65)}), "suffix: `suffix`: should have at most 64"),
            (json!({"integrations": [{"type": "wandb"}]}), "integrations: "),
            (json!({"hyperparameters": {"n_epochs": 0}}), "hyperparameters.n_epochs: "),
            (
                json!({"hyperparameters": {"epochs": 1}}),
                "hyperparameters.epochs: `hyperparameters.epochs`: unknown field, did you mean `n_epochs`?",
            ),
            (
                json!({"hyperparameters": {"learning_rate_multiplier": "high"}}),
                "should be \"auto\" or a number above 0",
            ),
            (json!({"hyperparameters": {"beta": 1}}), "hyperparameters.beta"),
            (json!({"hyperparameters": {}, "method": {"type": "dpo"}}), "hyperparameters: "),
            (json!({"method": {"type": "reinforcement"}}), "method.type: `method.type`: reinforcement needs a grader"),
            (json!({"method": {"type": "dpo", "supervised": {}}}), "method.supervised: "),
            (json!({"method": []}), "method: `method`: should be an object"),
            (json!({"metadata": {"a": 1}}), "metadata: "),
        ] {
            let seen = with(more);
            assert!(seen.contains(words), "{words}\n{seen}");
        }
    }
}
