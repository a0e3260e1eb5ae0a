//! What a run reports: of each step, of each evaluation, and of the whole.

use serde::{Deserialize, Serialize};

use super::evaluate::Evaluation;
use super::objective::Rewards;
use super::swap::RunEvent;

/// One step, as it is reported. Field names are those of transformers' `trainer_state.json`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Epochs done, with the part of the present one.
    pub epoch: f64,
    /// Loss of the step before its update, in nats: of sft the mean cross-entropy of its trained tokens.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens of the step's examples.
    pub tokens: usize,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Rewards, of an objective that has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewards: Option<Rewards>,
}

/// One evaluation on the held-out rows, as it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Steps that were done by then.
    pub step: u64,
    /// Epochs that were done by then.
    pub epoch: f64,
    /// Lowest loss so far, that before the first step included.
    pub lowest: f64,
    /// Loss, perplexity and token accuracy.
    #[serde(flatten)]
    pub evaluation: Evaluation,
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// All steps.
    pub steps: Vec<StepReport>,
    /// Steps that were planned.
    pub planned_steps: u64,
    /// Whether the observer ended the run before its last step.
    pub interrupted: bool,
    /// What changed between steps: with these at their steps, the run can be repeated.
    pub events: Vec<RunEvent>,
    /// Evaluations on the held-out rows: before the first step, between steps, and of the result.
    pub evaluations: Vec<EvalReport>,
    /// Why the run ended before its last step of its own accord.
    pub stopped: Option<String>,
    /// The step whose parameters are the result, where that is not the last.
    pub kept_step: Option<u64>,
}

impl TrainReport {
    /// The evaluation before the first step.
    pub fn before(&self) -> Option<Evaluation> {
        self.evaluations.first().filter(|report| report.step == 0).map(|report| report.evaluation)
    }

    /// The evaluation of the result.
    pub fn after(&self) -> Option<Evaluation> {
        let step = self.kept_step.unwrap_or(self.steps.last()?.step);
        self.evaluations.iter().rfind(|report| report.step == step).map(|report| report.evaluation)
    }

    /// Mean loss of all steps.
    pub fn train_loss(&self) -> f64 {
        self.steps.iter().map(|step| step.loss).sum::<f64>() / self.steps.len().max(1) as f64
    }

    /// Tokens over step time.
    pub fn tokens_per_second(&self) -> f64 {
        let (tokens, seconds) =
            self.steps.iter().fold((0, 0.0), |(tokens, seconds), step| (tokens + step.tokens, seconds + step.seconds));
        if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
    }
}
