//! Learning-rate schedules: after warm-up as transformers' `get_scheduler` computes them.
//!
//! Warm-up differs from transformers', whose first step has rate zero: a run of one step would save the base as if it had learned.

use std::str::FromStr;

use anyhow::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::words::value_of;

/// Shape of the schedule after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine from the peak to zero.
    #[default]
    Cosine,
    /// A straight line from the peak to zero.
    Linear,
    /// The peak throughout.
    Constant,
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        value_of(word, &[("cosine", Self::Cosine), ("linear", Self::Linear), ("constant", Self::Constant)])
    }
}

impl Schedule {
    /// The word that names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::Linear => "linear",
            Self::Constant => "constant",
        }
    }
}

/// A schedule over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    /// Highest learning rate.
    pub peak: f64,
    /// Shape after warm-up.
    pub schedule: Schedule,
    /// Steps of linear warm-up. Of W, the step with number s from 0 has the share (s + 1) / (W + 1) of the peak, and step W the peak.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
}

impl LearningRate {
    /// Warm-up steps for a share of a run, rounded up as transformers does.
    pub fn warmup_steps(ratio: f64, total_steps: u64) -> u64 {
        (ratio * total_steps as f64).ceil() as u64
    }

    /// Rate of the step with this number, from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = (step - self.warmup_steps) as f64 / rest;
        let factor = match self.schedule {
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Schedule::Linear => 1.0 - done,
            Schedule::Constant => 1.0,
        };
        self.peak * factor.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After 2 warm-up steps of 6, values of transformers' `get_cosine_schedule_with_warmup` and `get_linear_schedule_with_warmup`:
    /// factors 1, then (1 + cos(π k/4)) / 2, or 1 - k/4.
    #[test]
    fn after_warm_up_schedules_have_the_values_of_transformers() {
        let rate = |schedule| LearningRate { peak: 3.0, schedule, warmup_steps: 2, total_steps: 6 };
        let cosine: Vec<f64> = (0..6).map(|step| rate(Schedule::Cosine).at(step) / 3.0).collect();
        let wanted = [1.0 / 3.0, 2.0 / 3.0, 1.0, 0.853_553_390_593_273_8, 0.5, 0.146_446_609_406_726_2];
        for (got, want) in cosine.iter().zip(wanted) {
            assert!((got - want).abs() < 1e-12, "{cosine:?}");
        }
        let linear: Vec<f64> = (0..6).map(|step| rate(Schedule::Linear).at(step)).collect();
        assert_eq!(linear, [1.0, 2.0, 3.0, 2.25, 1.5, 0.75]);
        assert_eq!(rate(Schedule::Constant).at(5), 3.0);
        assert_eq!(LearningRate::warmup_steps(0.03, 20), 1);
    }

    #[test]
    fn every_step_of_a_warm_up_learns_and_none_more_than_the_next() {
        for total_steps in 1..200 {
            let warmup_steps = LearningRate::warmup_steps(0.03, total_steps);
            let rate = LearningRate { peak: 1.0, schedule: Schedule::Constant, warmup_steps, total_steps };
            let rates: Vec<f64> = (0..=warmup_steps).map(|step| rate.at(step)).collect();
            assert!(rates[0] > 0.0 && rates.is_sorted() && rates.last() == Some(&1.0), "{total_steps}: {rates:?}");
        }
    }
}
