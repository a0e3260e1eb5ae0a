//! `kind = "local"`: a model of this machine.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use homeroom_engine::inference::TOGETHER;
use homeroom_engine::run::compute::Compute;
use toml::de::DeTable;

use super::{HandlerSpec, missing, with_settings};
use crate::handler::Handler;
use crate::handler::embedding::Embedder;
use crate::handler::limit::{Limited, Limits};
use crate::handler::local::Local;
use crate::handler::wrap::settings::Settings;
use crate::models::ModelRef;
use crate::toml_problems::{Problems, near};

/// The keys of its table.
pub(super) const KEYS: [&str; 5] = ["kind", "model", "base_model", "any_base", "compute"];
/// Limits of a model of this machine: it samples for so many at once, and twice as many may wait.
pub(super) const LIMITS: Limits = Limits { running: TOGETHER, waiting: 2 * TOGETHER };

/// Reads `[handlers.NAME]`.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    path: &Path,
    name: &str,
    span: Range<usize>,
    table: &DeTable<'a>,
) -> Option<HandlerSpec> {
    problems.unknown_keys(table, &with_settings(&KEYS));
    let mut text = |key: &str| table.get(key).and_then(|value| problems.text(key, value));
    let (model, base_model) = (text("model"), text("base_model"));
    let any_base = table.get("any_base").and_then(|value| problems.bool("any_base", value));
    let compute = table.get("compute").and_then(|value| Some((value, problems.text("compute", value)?)));
    let compute = compute.map_or(Compute::Auto, |(value, name)| {
        let known = ["auto", "bf16", "f32"];
        if !known.contains(&name.as_str()) {
            problems.at(value.span(), format!("`compute`: `{name}` is unknown, {}", near(&name, &known)));
        }
        name.parse().unwrap_or(Compute::Auto)
    });
    if !table.contains_key("model") {
        missing(problems, span, name, "model");
    }
    let at = |name: String| match path.parent().map(|dir| dir.join(&name)) {
        Some(beside) if beside.exists() => beside,
        _ => PathBuf::from(name),
    };
    let model = ModelRef { name: at(model?), base_model: base_model.map(at), any_base: any_base.unwrap_or(false) };
    Some(HandlerSpec::Local(model, compute))
}

/// Loads a model of this machine, which answers or embeds as its files say, and puts a queue in front of it.
///
/// # Errors
/// As [`Local::load`] and [`Embedder::load`].
pub fn load_local(name: &str, model: ModelRef, compute: Compute) -> Result<Arc<dyn Handler>> {
    Ok(Arc::new(Limited::new(load(name, model, compute, &Settings::default())?, LIMITS)))
}

/// Loads a model of this machine, without a queue. `settings`: what will stand around it.
pub(super) fn load(name: &str, model: ModelRef, compute: Compute, settings: &Settings) -> Result<Arc<dyn Handler>> {
    Ok(match Embedder::is_meant(&model.name) {
        true => {
            if let Some(key) = settings.of_answers() {
                bail!("`{key}` is of answers, and this is an embedding model; leave it out");
            }
            Arc::new(Embedder::load(name, &model, compute)?)
        }
        false => Arc::new(Local::load(name, model, compute)?),
    })
}
