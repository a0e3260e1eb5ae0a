//! Learning-rate schedules, as transformers' `get_scheduler` computes them.

use serde::{Deserialize, Serialize};

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

/// A schedule over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    /// Highest learning rate.
    pub peak: f64,
    /// Shape after warm-up.
    pub schedule: Schedule,
    /// Steps of linear warm-up from zero; the first step of a warm-up has rate zero.
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
            return self.peak * step as f64 / self.warmup_steps.max(1) as f64;
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

    /// Values of transformers' `get_cosine_schedule_with_warmup` and `get_linear_schedule_with_warmup` for 2 warm-up steps
    /// of 6: factors 0, 1/2, 1, then (1 + cos(π k/4)) / 2, or 1 - k/4.
    #[test]
    fn schedules_have_the_values_of_transformers() {
        let rate = |schedule| LearningRate { peak: 2.0, schedule, warmup_steps: 2, total_steps: 6 };
        let cosine: Vec<f64> = (0..6).map(|step| rate(Schedule::Cosine).at(step)).collect();
        for (got, want) in cosine.iter().zip([0.0, 1.0, 2.0, 1.707_106_781_186_547_5, 1.0, 0.292_893_218_813_452_4]) {
            assert!((got - want).abs() < 1e-12, "{cosine:?}");
        }
        let linear: Vec<f64> = (0..6).map(|step| rate(Schedule::Linear).at(step)).collect();
        assert_eq!(linear, [0.0, 1.0, 2.0, 1.5, 1.0, 0.5]);
        assert_eq!(rate(Schedule::Constant).at(5), 2.0);
        assert_eq!(LearningRate::warmup_steps(0.03, 20), 1);
    }
}
