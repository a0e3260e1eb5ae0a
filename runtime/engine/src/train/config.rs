//! What a run is told, and how many steps that makes.

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::schedule::Schedule;
use crate::run::compute::Compute;

/// What a run is told.
#[derive(Clone, Debug, Serialize)]
pub struct TrainConfig {
    /// Passes over the examples.
    pub epochs: u64,
    /// Ends the run after so many steps, wherever the epoch is.
    pub max_steps: Option<u64>,
    /// Examples in one forward and backward.
    pub batch_size: usize,
    /// Batches in one step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate.
    pub lr_scheduler_type: Schedule,
    /// Share of the steps that warm up.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Bound on the norm of all gradients together; 0: none.
    pub max_grad_norm: f64,
    /// Seed of order, initial values and dropout.
    pub seed: u64,
    /// Whether each epoch has an order of its own; else examples come as they stand.
    pub shuffle: bool,
    /// Keep only the input of each block and run it again in backward: less memory, a third more time.
    pub gradient_checkpointing: bool,
    /// Whether passes are filled with the rows of a step as they fit, whatever `batch_size` says; else a pass is one batch.
    pub packing: bool,
    /// Tokens of a pass at most, where that is not as [`crate::run::batch::pass_rows`] has it; a longer row is a pass of its own.
    pub pass_rows: Option<usize>,
    /// NEFTune: noise on embeddings while training, α of it; 0: none. 5 is usual.
    pub neftune_noise_alpha: f64,
    /// What products are computed in.
    pub compute: Compute,
    /// Steps between two evaluations on the held-out rows; `None`: before the first step and after the last alone.
    pub eval_steps: Option<u64>,
    /// Ends the run after so many evaluations in a row without a lower held-out loss.
    pub early_stopping_patience: Option<u64>,
    /// Whether the result is what had the lowest held-out loss of the evaluations, not what the last step left.
    pub load_best_model_at_end: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 1,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation_steps: 1,
            learning_rate: 2e-4,
            lr_scheduler_type: Schedule::Cosine,
            warmup_ratio: 0.03,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            seed: 42,
            shuffle: true,
            gradient_checkpointing: false,
            packing: true,
            pass_rows: None,
            neftune_noise_alpha: 0.0,
            compute: Compute::F32,
            eval_steps: None,
            early_stopping_patience: None,
            load_best_model_at_end: true,
        }
    }
}

impl TrainConfig {
    /// Highest learning rate. AdamW moves every parameter by about the rate, so that a tenth of this already leaves nothing of what it was.
    const LEARNING_RATE_MAX: f64 = 10.0;

    /// Refuses numbers that no run can go by.
    ///
    /// # Errors
    /// All of them together, by their names here.
    pub fn check(&self) -> Result<()> {
        let mut problems = Vec::new();
        let mut number = |name: &str, value: f64, admitted: bool, words: &str| {
            if !(value.is_finite() && admitted) {
                problems.push(format!("{name} is {value}, it should be {words}"));
            }
        };
        let rate = self.learning_rate;
        number("learning_rate", rate, rate > 0.0 && rate <= Self::LEARNING_RATE_MAX, "above 0 and at most 10");
        number("warmup_ratio", self.warmup_ratio, (0.0..1.0).contains(&self.warmup_ratio), "from 0 and below 1");
        number("weight_decay", self.weight_decay, (0.0..1.0).contains(&self.weight_decay), "from 0 and below 1");
        number("max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0.0, "from 0");
        let alpha = self.neftune_noise_alpha;
        number("neftune_noise_alpha", alpha, (0.0..=1000.0).contains(&alpha), "from 0 and at most 1000");
        let counts = [
            ("epochs", self.epochs),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("eval_steps", self.eval_steps.unwrap_or(1)),
            ("early_stopping_patience", self.early_stopping_patience.unwrap_or(1)),
            ("batch_size", self.batch_size as u64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as u64),
            ("pass_rows", self.pass_rows.unwrap_or(1) as u64),
        ];
        problems.extend(counts.iter().filter(|(_, n)| *n == 0).map(|(name, _)| format!("{name} is 0, the least is 1")));
        if self.batch_size.checked_mul(self.gradient_accumulation_steps).is_none() {
            let (a, b) = (self.batch_size, self.gradient_accumulation_steps);
            problems.push(format!("batch_size {a} times gradient_accumulation_steps {b} is more than can be counted"));
        }
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(())
    }

    /// Examples of a step.
    pub(super) fn per_step(&self) -> usize {
        self.batch_size.saturating_mul(self.gradient_accumulation_steps)
    }
}

/// Returns the number of steps of a run over so many units: at least one.
///
/// # Errors
/// When there is no example, a number of the configuration is out of range, or there are more steps than can be counted.
pub fn planned_steps(units: usize, config: &TrainConfig) -> Result<u64> {
    config.check()?;
    ensure!(units > 0, "there is no example to train on");
    let an_epoch = units.div_ceil(config.per_step()) as u64;
    let steps = config.max_steps.or_else(|| config.epochs.checked_mul(an_epoch));
    // Dropout is drawn by the step's number, in 32 bits.
    steps.filter(|steps| *steps <= u64::from(u32::MAX)).with_context(|| match config.max_steps {
        Some(steps) => format!("max_steps is {steps}; a run has {} steps at most", u32::MAX),
        None => {
            format!("{} epochs of {an_epoch} steps are too many; a run has {} steps at most", config.epochs, u32::MAX)
        }
    })
}
