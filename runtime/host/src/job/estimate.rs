//! What a training will need, by a strategy's own plan for a base of which only the shapes are known.

use anyhow::Result;
use homeroom_abi::plan::PlanRequest;
use homeroom_engine::estimate::{Estimate, Request, Sketch, estimate};
use serde_json::{Map, Value};

use crate::plugin::{Plugin, native};

/// Asks a strategy for its plan, and estimates a training by it. `sketch` is the base as its files have it; as in [`super::Job::new`] it
/// is stored as the plan asks for, what is quantised already only if `requantize`.
///
/// # Errors
/// When the strategy refuses the model or the options.
pub fn estimate_plan(
    plugin: &Plugin,
    options: &Map<String, Value>,
    sketch: &Sketch,
    requantize: bool,
    request: &Request,
) -> Result<Estimate> {
    let plan = plugin.plan(&PlanRequest { options: options.clone(), model: sketch.info() })?;
    let block = |name: &str| {
        let codec = native::of_plugin(plugin, name).ok()?;
        Some((codec.block_len(), codec.block_bytes()))
    };
    Ok(estimate(&sketch.stored_as_planned(&plan, requantize, &block), &plan, request))
}
