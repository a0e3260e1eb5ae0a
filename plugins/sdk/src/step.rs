//! What a strategy hears of a step, and what it answers.

use homeroom_abi::step::{Directive, StepAnswer, StepMetrics, StepRequest};
use serde_json::Value;

/// A step that is done: its metrics, and the directives that come before the next one.
///
/// A pattern is a tensor's name as the adapter's file has it, in which `*` stands for any text: `*lora_A*`.
pub struct Step {
    /// The step.
    pub metrics: StepMetrics,
    /// What was left here after the step before; null at first. It is kept by the host, and outlives a reload.
    pub state: Value,
    directives: Vec<Directive>,
    unused: bool,
}

impl Step {
    pub(crate) fn new(request: StepRequest) -> Self {
        Self { metrics: request.metrics, state: request.state, directives: Vec::new(), unused: false }
    }

    /// `None`: the strategy wants to hear of no step.
    pub(crate) fn into_answer(self) -> Option<StepAnswer> {
        (!self.unused).then_some(StepAnswer { directives: self.directives, state: self.state })
    }

    /// Multiplies the schedule's learning rates from now on; 1 gives them back.
    ///
    /// # Panics
    /// When it is not a number from 0.
    #[track_caller]
    pub fn learning_rate_scale(&mut self, scale: f64) {
        assert!(scale.is_finite() && scale >= 0.0, "learning_rate_scale: {scale} is not a number from 0");
        self.directives.push(Directive::LearningRateScale(scale));
    }

    /// Keeps parameters as they are from now on.
    pub fn freeze(&mut self, pattern: &str) {
        self.directives.push(Directive::Freeze(pattern.to_owned()));
    }

    /// Trains parameters again that were frozen.
    pub fn unfreeze(&mut self, pattern: &str) {
        self.directives.push(Directive::Unfreeze(pattern.to_owned()));
    }

    /// Gives a number that the plan names by `scalar` another value.
    ///
    /// # Panics
    /// When it is not a finite number.
    #[track_caller]
    pub fn scalar(&mut self, name: &str, value: f64) {
        assert!(value.is_finite(), "scalar `{name}`: {value} is not a finite number");
        self.directives.push(Directive::Scalar { name: name.to_owned(), value });
    }

    /// Has the optimizer forget what it knows of parameters.
    pub fn reset_moments(&mut self, pattern: &str) {
        self.directives.push(Directive::ResetMoments(pattern.to_owned()));
    }

    /// Hears of no further step.
    pub(crate) fn unused(&mut self) {
        self.unused = true;
    }
}
