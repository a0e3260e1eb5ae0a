//! What a strategy hears of a step, and what it can have a run do before the next one.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Input of [`crate::table::METHOD_ON_STEP`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRequest {
    /// Options of the run, as the user gave them.
    pub options: Map<String, Value>,
    /// The step that is done.
    pub metrics: StepMetrics,
    /// What the strategy gave as [`StepAnswer::state`] after the step before; null at first.
    #[serde(default)]
    pub state: Value,
}

/// One step, as a strategy hears of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Epochs done, with the part of the present one.
    pub epoch: f64,
    /// Mean cross-entropy of the step's trained tokens, in nats, before the update.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens of the step's examples.
    pub tokens: usize,
}

/// A strategy's answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepAnswer {
    /// What is done before the next step, in this order.
    #[serde(default)]
    pub directives: Vec<Directive>,
    /// What it wants to hear again after the next step: it is kept by the host, and outlives a reload.
    #[serde(default)]
    pub state: Value,
}

/// One thing that a run does before its next step. A pattern is a tensor's name, in which `*` stands for any text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Directive {
    /// The schedule's learning rates are multiplied by this from now on; 1 gives them back.
    LearningRateScale(f64),
    /// Parameters stay as they are from now on.
    Freeze(String),
    /// Parameters that were frozen are trained again.
    Unfreeze(String),
    /// A scalar of the plan has another value from now on.
    Scalar {
        /// Its name, a key of [`crate::plan::Plan::scalars`].
        name: String,
        /// Its value.
        value: f64,
    },
    /// The optimizer forgets what it knows of parameters.
    ResetMoments(String),
}

impl Directive {
    /// Whether a tensor's name is meant by a pattern.
    pub fn matches(pattern: &str, name: &str) -> bool {
        let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
        let Some(mut left) = name.strip_prefix(first) else { return false };
        let (between, last) = rest.rsplit_once('*').unwrap_or(("", rest));
        // The first place of each part is as good as any, so that no choice is ever taken back.
        for part in between.split('*') {
            let Some((_, after)) = left.split_once(part) else { return false };
            left = after;
        }
        left.ends_with(last)
    }
}

impl std::fmt::Display for Directive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::LearningRateScale(scale) => write!(f, "learning rate times {scale}"),
            Self::Freeze(pattern) => write!(f, "freeze {pattern}"),
            Self::Unfreeze(pattern) => write!(f, "unfreeze {pattern}"),
            Self::Scalar { name, value } => write!(f, "{name} = {value}"),
            Self::ResetMoments(pattern) => write!(f, "reset the moments of {pattern}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        for pattern in ["*", "*lora_A*", "*.q_proj.*", "base_model*weight", "*model*model*model*", "**A.weight", name] {
            assert!(Directive::matches(pattern, name), "{pattern}");
        }
        for pattern in ["", "lora_A", "*lora_B*", "*.lora_A", "weight*", "*A.weight*weight", "base_model*base_model*"] {
            assert!(!Directive::matches(pattern, name), "{pattern}");
        }
    }
}
