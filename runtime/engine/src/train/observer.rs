//! Who observes a run: a progress bar, a script, a strategy beside it, who keeps its checkpoints.

use std::sync::Arc;

use anyhow::Result;
use homeroom_abi::step::Directive;
use serde_json::Value;

use super::report::{EvalReport, StepReport};
use super::state::State;
use super::swap::{Candidate, RunEvent};
use crate::adapt::adaptation::Adaptation;

/// What an observer has a run do before its next step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Go on with the schedule's learning rates times this, from now on.
    ScaleLearningRate(f64),
    /// No further step.
    Stop,
}

/// Observes a run between steps and can change its course.
pub trait Observer {
    /// A step is done. Steps that are undone by [`super::swap::Change::RolledBack`] are done, and heard of, again.
    ///
    /// # Errors
    /// Ends the run with that error.
    fn on_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Control>;

    /// What a strategy has the run do after a step. Asked after [`Observer::on_step`].
    ///
    /// # Errors
    /// Ends the run with that error.
    fn directives(&mut self, report: &StepReport, planned_steps: u64) -> Result<Vec<Directive>> {
        let _ = (report, planned_steps);
        Ok(Vec::new())
    }

    /// The next step is about to begin, and no plan is on trial: here is one to go on with.
    ///
    /// # Errors
    /// Ends the run with that error.
    fn candidate(&mut self) -> Result<Option<Candidate>> {
        Ok(None)
    }

    /// An evaluation between two steps is done. Asked after [`Observer::on_step`], whose scale of the learning rate it may replace.
    ///
    /// # Errors
    /// Ends the run with that error.
    fn on_eval(&mut self, report: &EvalReport, planned_steps: u64) -> Result<Control> {
        let _ = (report, planned_steps);
        Ok(Control::Continue)
    }

    /// Examples of an evaluation are done, of all.
    fn evaluating(&mut self, done: usize, all: usize) {
        let _ = (done, all);
    }

    /// An evaluation is done, also one before the first step or of the result.
    fn evaluated(&mut self, report: &EvalReport) {
        let _ = report;
    }

    /// What the observer needs beside the state to go on from here, kept with it.
    ///
    /// # Errors
    /// When it cannot be told.
    fn memory(&mut self) -> Result<Value> {
        Ok(Value::Null)
    }

    /// The run is taken back to where [`Observer::memory`] gave this.
    fn recall(&mut self, memory: &Value) {
        let _ = memory;
    }

    /// Whether somebody waits for the end, so that nothing more is evaluated.
    fn is_cancelled(&mut self) -> bool {
        false
    }

    /// Whether the state is to be saved now, between two steps.
    fn is_due(&mut self, state: &State) -> bool {
        let _ = state;
        false
    }

    /// Why it ends the run, where that is its own doing and nobody's who interrupts it. It is asked after [`Control::Stop`].
    fn reason(&self) -> Option<String> {
        None
    }

    /// Saves the state, whose parameters give a finite loss. It must not change it.
    ///
    /// # Errors
    /// Ends the run with that error.
    fn save(&mut self, state: &State) -> Result<()> {
        let _ = state;
        Ok(())
    }

    /// A state that was saved after this step or before it, the latest; `None`: there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    fn saved(&mut self, step: u64) -> Result<Option<State>> {
        let _ = step;
        Ok(None)
    }

    /// Why the steps from now on are to take less memory, if they are. It is asked after each step.
    fn lowers(&mut self) -> Option<String> {
        None
    }

    /// Nothing takes less memory than what is done already.
    fn cannot_lower(&mut self) {}

    /// Something has changed; this is what is trained from now on.
    ///
    /// # Errors
    /// Ends the run with that error.
    fn changed(&mut self, event: &RunEvent, adaptation: &Arc<Adaptation>) -> Result<()> {
        let _ = (event, adaptation);
        Ok(())
    }
}

impl<F: FnMut(&StepReport, u64) -> Result<Control>> Observer for F {
    fn on_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Control> {
        self(report, planned_steps)
    }
}
