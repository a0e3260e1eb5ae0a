//! What a training is between two steps: one value, which a run goes on from as if it had never been ended.
//!
//! Order, dropout and first values are functions of the seed and of a place, so nothing of them is kept.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anyhow::Result;
use candle_core::Var;
use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::optimizer::{AdamW, AdamWConfig};
use super::report::TrainReport;
use super::swap::{Change, RunEvent, Trial};
use super::watchdog::Watchdog;
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::run::batch::pass_rows;

/// What a training is between two steps.
pub struct State {
    /// Steps that are done.
    pub step: u64,
    /// What is trained, with all that was learned.
    pub(super) generation: Generation,
    /// The generation before, while its successor is on trial.
    pub(super) trial: Option<Trial>,
    /// Losses of the last steps, for what is on trial to be held to.
    pub(super) losses: VecDeque<f64>,
    /// What the observer has the learning rates multiplied by.
    pub(super) script_scale: f64,
    pub(super) watchdog: Watchdog,
    /// Whether the evaluation after the last step, and what follows it, is still to be made: the run was ended before.
    pub(super) owes: bool,
    /// The evaluation with the lowest held-out loss since the first step.
    pub best: Option<Best>,
    /// How steps are cut into passes, and which way products take.
    pub cut: Cut,
    /// All that was reported.
    pub report: TrainReport,
}

/// An evaluation that no later one was better than.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps that were done by then.
    pub step: u64,
    /// Its loss.
    pub eval_loss: f64,
    /// Evaluations since.
    pub since: u64,
}

/// How steps are cut into passes and which way products take: of these a result's bits depend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Rows of a pass.
    pub pass_rows: usize,
    /// Whether passes are cut by that also where they would be whole batches: somebody asked for it, or memory was short.
    #[serde(default)]
    pub is_bounded: bool,
    /// Whether only the inputs of blocks are kept from now on, whatever the configuration says. It changes no bit.
    #[serde(default)]
    pub gradient_checkpointing: bool,
    /// What products are computed in: [`crate::run::compute::Compute::name`], resolved.
    pub compute: String,
    /// The instructions of the kernels, as `HOMEROOM_CPU` names them.
    pub cpu: String,
}

/// How a step is gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passes {
    /// Rows of a pass.
    pub pass_rows: usize,
    /// Whether only the inputs of blocks are kept.
    pub gradient_checkpointing: bool,
}

/// Passes of fewer rows than these cost more time than computing layers again.
const PASS_ROWS_CHEAP: usize = 256;

impl Passes {
    /// Ways to go through the same step in less memory, over units of which the longest has so many rows: smaller passes cost least down
    /// to some hundred rows, then that layers are computed again, then passes of single units.
    pub fn lower(self, longest: usize) -> Vec<Self> {
        let least = longest.max(1);
        let halves =
            std::iter::successors(Some(self.pass_rows), |rows| Some((rows / 2).max(least)).filter(|half| half < rows));
        let smaller: Vec<usize> = halves.skip(1).collect();
        let of = |gradient_checkpointing: bool| {
            move |pass_rows: &usize| Self { pass_rows: *pass_rows, gradient_checkpointing }
        };
        if self.gradient_checkpointing {
            return smaller.iter().map(of(true)).collect();
        }
        let cheap = smaller.iter().filter(|rows| **rows >= PASS_ROWS_CHEAP).map(of(false));
        let again = Self { gradient_checkpointing: true, ..self };
        cheap.chain([again]).chain(smaller.iter().map(of(true))).collect()
    }
}

/// A plan with all that was learned under it.
pub(super) struct Generation {
    pub(super) adaptation: Arc<Adaptation>,
    pub(super) optimizer: AdamW,
    /// For each parameter, updates in a row with a rate above zero and a gradient of zeros; `None` once it had another.
    pub(super) idle_updates: Vec<Option<u32>>,
    /// What the strategy has the learning rates multiplied by.
    pub(super) scale: f64,
    /// The scalars that the strategy has set, with the values that the plan gives them.
    pub(super) set_scalars: BTreeMap<String, f64>,
}

impl State {
    /// Before the first step. The adaptation's parameters are trained in place.
    pub fn new(model: &BaseModel, adaptation: &Adaptation, config: &TrainConfig) -> Self {
        let generation = Generation::new(model, Arc::new(adaptation.clone()), config);
        Self {
            step: 0,
            generation,
            trial: None,
            losses: VecDeque::new(),
            script_scale: 1.0,
            watchdog: Watchdog::default(),
            owes: false,
            best: None,
            cut: Cut::here(model, adaptation, config),
            report: TrainReport::default(),
        }
    }

    /// Takes less memory from the next step on, as what is asked for says; a step's rows and the number that its loss is divided by
    /// stay. It is one of the state's events.
    pub fn lower(&mut self, passes: Passes, reason: String) -> RunEvent {
        let Passes { pass_rows, gradient_checkpointing } = passes;
        (self.cut.pass_rows, self.cut.is_bounded) = (pass_rows, true);
        self.cut.gradient_checkpointing = gradient_checkpointing;
        let event = RunEvent { step: self.step, change: Change::Lowered { pass_rows, gradient_checkpointing, reason } };
        self.report.events.push(event.clone());
        event
    }

    /// What takes less memory than passes that hold `fullest` rows at most, over units of which the longest has `longest`; `None`:
    /// nothing does.
    pub(super) fn lower_passes(&self, fullest: usize, longest: usize) -> Option<Passes> {
        let now = Passes { pass_rows: fullest, gradient_checkpointing: self.cut.gradient_checkpointing };
        now.lower(longest).into_iter().next()
    }

    /// A copy that shares no parameter with it.
    ///
    /// # Errors
    /// When a parameter cannot be copied.
    pub fn copy(&self) -> Result<Self> {
        Ok(Self {
            generation: self.generation.copy()?,
            trial: self.trial.as_ref().map(Trial::copy).transpose()?,
            losses: self.losses.clone(),
            cut: self.cut.clone(),
            report: self.report.clone(),
            ..*self
        })
    }

    /// What is trained.
    pub fn adaptation(&self) -> &Arc<Adaptation> {
        &self.generation.adaptation
    }

    /// Steps whose parameters may be the result: the best so far, and the best before a plan that is on trial.
    pub fn steps_of_best(&self) -> [Option<u64>; 2] {
        [self.best, self.trial.as_ref().and_then(|trial| trial.best)].map(|best| best.map(|best| best.step))
    }

    /// Whether a plan is on trial.
    pub fn is_on_trial(&self) -> bool {
        self.trial.is_some()
    }
}

impl Generation {
    /// Before the first update.
    pub(super) fn new(model: &BaseModel, adaptation: Arc<Adaptation>, config: &TrainConfig) -> Self {
        let adamw = AdamWConfig { weight_decay: config.weight_decay, ..AdamWConfig::default() };
        let optimizer = AdamW::new(&adaptation, adamw).keeping(model.parameter_count());
        let idle_updates = vec![Some(0); adaptation.params.len()];
        Self { adaptation, optimizer, idle_updates, scale: 1.0, set_scalars: BTreeMap::new() }
    }

    /// A copy that shares no parameter with it.
    pub(super) fn copy(&self) -> Result<Self> {
        let mut adaptation = Adaptation::clone(&self.adaptation);
        for param in &mut adaptation.params {
            param.var = Var::from_tensor(&param.var.as_detached_tensor())?;
        }
        Ok(Self {
            adaptation: Arc::new(adaptation),
            optimizer: self.optimizer.clone(),
            idle_updates: self.idle_updates.clone(),
            scale: self.scale,
            set_scalars: self.set_scalars.clone(),
        })
    }
}

impl Cut {
    /// As a run that begins here is cut.
    pub fn here(model: &BaseModel, adaptation: &Adaptation, config: &TrainConfig) -> Self {
        Self {
            pass_rows: config.pass_rows.unwrap_or(pass_rows(model)),
            is_bounded: config.pass_rows.is_some(),
            gradient_checkpointing: config.gradient_checkpointing,
            compute: config.compute.resolved(Some(adaptation)).name().to_owned(),
            cpu: homeroom_kernels::isa().name(),
        }
    }
}
