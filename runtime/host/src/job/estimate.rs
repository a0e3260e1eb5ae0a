//! What a training will need: by a strategy's own plan for a base of which only the shapes are known, or of a job that is made.

use anyhow::Result;
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_engine::estimate::{Estimate, Request, Sketch, estimate};
use homeroom_engine::memory;
use homeroom_engine::models::BaseModel;
use serde_json::{Map, Value};

use crate::machine::resident_memory_bytes;
use crate::plugin::{Plugin, native};

/// A strategy's plan for a base, and that base as the plan stores it: what any training of the two is estimated by.
pub struct Estimator {
    sketch: Sketch,
    plan: Plan,
}

impl Estimator {
    /// Asks a strategy for its plan. `sketch` is the base as its files have it; as in [`super::Job::new`] it is stored as the plan asks for,
    /// what is quantised already only if `requantize`.
    ///
    /// # Errors
    /// When the strategy refuses the model or the options.
    pub fn new(plugin: &Plugin, options: &Map<String, Value>, sketch: &Sketch, requantize: bool) -> Result<Self> {
        let plan = plugin.plan_to_estimate(&PlanRequest { options: options.clone(), model: sketch.info() })?;
        Ok(Self::of_plan(plugin, plan, sketch, requantize))
    }

    /// As [`Self::new`], of a training that is to be begun here.
    ///
    /// # Errors
    /// As [`Self::new`], and when the parameters alone are more than this machine's memory holds.
    pub fn of_training(
        plugin: &Plugin,
        options: &Map<String, Value>,
        sketch: &Sketch,
        requantize: bool,
    ) -> Result<Self> {
        let plan = plugin.plan(&PlanRequest { options: options.clone(), model: sketch.info() })?;
        Ok(Self::of_plan(plugin, plan, sketch, requantize))
    }

    fn of_plan(plugin: &Plugin, plan: Plan, sketch: &Sketch, requantize: bool) -> Self {
        let block = |name: &str| {
            let codec = native::of_plugin(plugin, name).ok()?;
            Some((codec.block_len(), codec.block_bytes()))
        };
        Self { sketch: sketch.stored_as_planned(&plan, requantize, &block), plan }
    }

    /// What a training takes.
    pub fn estimate(&self, request: &Request) -> Estimate {
        estimate(&self.sketch, &self.plan, request)
    }

    /// Rows of a pass, where nothing else is said.
    pub fn pass_rows(&self) -> usize {
        self.sketch.pass_rows()
    }
}

/// The memory of this process before a job is made, in bytes.
#[derive(Clone, Copy)]
pub struct Before {
    /// Without the weights of the base.
    program: u64,
    /// What the process has and can still get; `None`: the system does not say.
    available: Option<u64>,
}

impl Before {
    /// As it is now. Mapped pages of the base are given back for it, and read again from the system's cache.
    pub fn now(model: &BaseModel) -> Self {
        model.release();
        Self::of_program()
    }

    /// As it is now, where no base is loaded.
    pub fn of_program() -> Self {
        let program = resident_memory_bytes().unwrap_or(0);
        // What it has already is its own, but for pages of files that are nobody's.
        let all = memory::limit().unwrap_or(u64::MAX);
        Self { program, available: memory::obtainable().map(|free| free.saturating_add(program).min(all)) }
    }

    /// Resident memory of the program, in bytes.
    pub fn program_bytes(&self) -> u64 {
        self.program
    }

    /// What there is for a training, its own memory included, in bytes.
    pub fn available(&self) -> Option<u64> {
        self.available
    }

    /// What there is for a training that needs so much, where that is too little.
    pub fn lacking(&self, peak: u64) -> Option<u64> {
        self.available.filter(|available| *available < peak)
    }
}
