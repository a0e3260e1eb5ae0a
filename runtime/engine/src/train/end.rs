//! The end of a run that cannot go on: what it had learned while its numbers were finite is put back, and goes to the caller with the
//! reason.

use anyhow::{Result, anyhow, ensure};

use super::{Run, TrainReport};
use crate::data::Example;
use crate::files::mapped::whole;
use crate::run::batch::Batch;
use crate::run::plain::recipe::Pass;

/// A run that ended badly after it had learned something. The parameters are those after the last step of the report, whose loss
/// was finite.
#[derive(Debug)]
pub struct Broken {
    /// What happened, at which step.
    pub reason: String,
    /// The steps that count.
    pub report: TrainReport,
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
    reason: String,
    /// Whether it is the last update's fault, which is to be taken back.
    undo: bool,
}

impl Unusable {
    /// What the parameters come to in a step is not finite.
    pub(super) fn parameters(step: u64, what: &str) -> Self {
        // Before the first update the parameters are those that the run began with.
        let hint = match step {
            1 => "before anything was learned: the base's weights are damaged, or what it starts from is too large",
            _ => "try a lower learning rate",
        };
        Self { reason: format!("step {step}: {what}{} {hint}", if step == 1 { "" } else { ";" }), undo: true }
    }

    /// What the update of a step made is not finite.
    pub(super) fn update(step: u64) -> Self {
        Self { reason: format!("step {step}: its update is beyond all numbers; try a lower learning rate"), undo: true }
    }

    /// The base is not there any more, as it was.
    pub(super) fn base(step: u64, error: &anyhow::Error) -> Self {
        Self { reason: format!("step {step}: {error:#}"), undo: false }
    }
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Unusable {}

impl Run<'_> {
    /// Looks at what the last update made of the parameters, which no step has used yet: by the loss of the shortest row of the
    /// step. That the parameters are finite is known from the update; products of them need not be.
    pub(super) fn look(&mut self, rows: &[(u32, &Example)]) -> Result<()> {
        whole().map_err(|error| Unusable::base(self.step, &error))?;
        let trains = |example: &Example| example.trained.iter().skip(1).any(|trained| *trained);
        let shortest = rows.iter().filter(|(_, example)| trains(example)).min_by_key(|(_, example)| example.ids.len());
        let Some(row) = shortest else { return Ok(()) };
        let pass = Pass::evaluation(self.model, Some(&self.generation.adaptation));
        let loss = self.backend.log_probs(&pass, &Batch::of_examples([*row]))?.loss_sum;
        let what = format!("the loss after its update is {loss}; try a lower learning rate");
        ensure!(loss.is_finite(), Unusable { reason: format!("step {}: {what}", self.step), undo: true });
        Ok(())
    }

    /// What becomes of an error that ends the run: [`Broken`], if the numbers ended it and parameters from before are there.
    pub(super) fn end(&mut self, error: anyhow::Error, mut report: TrainReport) -> anyhow::Error {
        let Unusable { reason, undo } = match error.downcast::<Unusable>() {
            Ok(unusable) => unusable,
            Err(other) => return other,
        };
        let good = if undo { self.step.saturating_sub(1) } else { self.step };
        if good == 0 {
            return anyhow!("{reason}; nothing that could be saved was learned before");
        }
        match undo.then(|| self.generation.optimizer.undo(&self.generation.adaptation)).transpose() {
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
        Broken { reason, report }.into()
    }
}
