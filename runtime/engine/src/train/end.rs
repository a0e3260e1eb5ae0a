//! The end of a run that cannot go on: what it had learned while its numbers were finite is put back, and goes to the caller with the
//! reason.

use anyhow::{Result, anyhow, ensure};

use super::run::Run;
use super::state::State;
use super::watchdog::Watchdog;
use crate::data::Unit;
use crate::files::mapped::whole;
use crate::run::batch::Batch;
use crate::run::plain::recipe::Pass;

/// A run that ended badly after it had learned something. The parameters are those after the last step of the state's report, whose
/// loss was finite; no further step can follow.
pub struct Broken {
    /// What happened, at which step.
    pub reason: String,
    /// What it had learned.
    pub state: Box<State>,
}

impl std::fmt::Debug for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Broken {}

/// Why a run cannot go on.
#[derive(Debug)]
pub(super) struct Unusable {
    pub(super) reason: String,
    /// The step that failed.
    pub(super) step: u64,
    /// Whether it is the last update's fault, which is to be taken back.
    pub(super) undo: bool,
    /// The last step whose parameters are not suspected; `None`: they are not the reason.
    pub(super) good: Option<u64>,
    /// Whether the numbers are finite, and get worse.
    pub(super) diverged: bool,
}

impl Unusable {
    /// What the parameters come to in a step is not finite: those that the step before left.
    pub(super) fn parameters(step: u64, what: &str) -> Self {
        // Before the first update the parameters are those that the run began with.
        let hint = match step {
            1 => "before anything was learned: the base's weights are damaged, or what it starts from is too large",
            _ => "try a lower learning rate",
        };
        let reason = format!("step {step}: {what}{} {hint}", if step == 1 { "" } else { ";" });
        Self { reason, step, undo: true, good: Some(step.saturating_sub(2)), diverged: false }
    }

    /// What the update of a step made is not finite.
    pub(super) fn update(step: u64, what: &str) -> Self {
        let reason = format!("step {step}: {what}; try a lower learning rate");
        Self { reason, step, undo: true, good: Some(step.saturating_sub(1)), diverged: false }
    }

    /// Held-out rows cannot be measured between two steps.
    pub(super) fn held_out(step: u64, error: &anyhow::Error) -> Self {
        let reason = format!("step {step}: held-out rows: {error:#}");
        Self { reason, step, undo: false, good: None, diverged: false }
    }

    /// The loss of the last steps is worse than it was.
    pub(super) fn diverged(step: u64, what: &str) -> Self {
        let reason = format!("step {step}: {what}; try a lower learning rate");
        Self { reason, step, undo: false, good: Some(step.saturating_sub(Watchdog::SUSPECT)), diverged: true }
    }

    /// The base is not there any more, as it was.
    pub(super) fn base(step: u64, error: &anyhow::Error) -> Self {
        Self { reason: format!("step {step}: {error:#}"), step, undo: false, good: None, diverged: false }
    }
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Unusable {}

impl Run<'_> {
    /// Looks at what the last update made of the parameters, which no step has used yet: by the loss of the shortest sequence of the
    /// step. That the parameters are finite is known from the update; products of them need not be.
    pub(super) fn look(&mut self, units: &[Unit<'_>]) -> Result<()> {
        let step = self.state.step;
        whole().map_err(|error| Unusable::base(step, &error))?;
        let sequences = units.iter().flat_map(|unit| unit.sequences.iter().map(|example| (unit.number, *example)));
        let trains = sequences.filter(|(_, example)| example.trained.iter().skip(1).any(|trained| *trained));
        let Some(row) = trains.min_by_key(|(_, example)| example.ids.len()) else { return Ok(()) };
        let pass = Pass::evaluation(self.model, Some(self.state.adaptation()));
        let loss = self.backend.log_probs(&pass, &Batch::of_examples([row]))?.loss_sum;
        ensure!(loss.is_finite(), Unusable::update(step, &format!("the loss after its update is {loss}")));
        Ok(())
    }

    /// Ends the run for an error: [`Broken`], if the numbers ended it and parameters from before are there.
    pub(super) fn end(mut self, error: anyhow::Error) -> anyhow::Error {
        let Unusable { reason, undo, .. } = match error.downcast::<Unusable>() {
            Ok(unusable) => unusable,
            Err(other) => return other,
        };
        // What was read of a checkpoint was looked at before it was saved.
        let undo = undo && !self.state.generation.optimizer.is_restored();
        let good = if undo { self.state.step.saturating_sub(1) } else { self.state.step };
        if good == 0 {
            return anyhow!("{reason}; nothing that could be saved was learned before");
        }
        let State { generation, report, .. } = &mut self.state;
        match undo.then(|| generation.optimizer.undo(&generation.adaptation)).transpose() {
            Err(error) => return error.context(reason),
            Ok(Some(false)) => {
                return anyhow!(
                    "{reason}; nothing is saved: a copy of so many parameters, from before, would not fit in memory"
                );
            }
            Ok(_) => {}
        }
        report.steps.truncate(good as usize);
        report.interrupted = true;
        Broken { reason, state: Box::new(self.state) }.into()
    }
}
