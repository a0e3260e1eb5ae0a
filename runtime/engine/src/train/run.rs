//! A run between two steps: its state beside what it is trained with, and the step itself.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use candle_core::{CpuStorage, DType, Storage, Tensor};
use rayon::prelude::*;

use super::config::TrainConfig;
use super::end::Unusable;
use super::objective::{Objective, RewardSums, Rewards, Sft, UnitLogProbs, sequence_log_probs};
use super::outcome::Outcome;
use super::reduce::Reduce;
use super::report::StepReport;
use super::schedule::LearningRate;
use super::state::{Generation, State};
use crate::adapt::adaptation::Adaptation;
use crate::data::{Example, Unit};
use crate::files::mapped::intact;
use crate::models::BaseModel;
use crate::run::backends::trainer;
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::plain::recipe::Pass;
use crate::run::profile::timed;
use crate::run::waist::{Train, Weigh};

/// What the passes of a step know of the whole of it.
#[derive(Clone, Copy, Debug)]
pub struct Whole {
    /// What the step's loss is a mean over.
    pub(super) n: usize,
    /// The objective's constant of the step.
    pub(super) constant: f64,
}

impl Whole {
    /// What an objective has passes know of all of them, by the model as it is.
    pub(super) fn of(
        objective: &dyn Objective,
        backend: &mut dyn Train,
        evaluation: &Pass<'_>,
        batches: &[Batch],
    ) -> Result<Self> {
        let targets: Vec<Vec<usize>> = batches.iter().flat_map(Batch::targets_of_units).collect();
        let n = objective.count(&targets);
        let numbers: Vec<u32> =
            batches.iter().flat_map(|batch| batch.units.iter().map(|(number, _)| *number)).collect();
        let constant = objective.before(&numbers, &mut |examples: &[(u32, &Example)]| {
            let units: Vec<Unit> = examples.iter().map(|(number, example)| Unit::of(*number, example)).collect();
            sequence_log_probs(&mut *backend, evaluation, &units, &mut |_| Ok(()))
        })?;
        Ok(Self { n, constant })
    }
}

/// A run between two steps.
pub struct Run<'a> {
    pub(super) model: &'a BaseModel,
    pub(super) config: &'a TrainConfig,
    pub(super) objective: &'a dyn Objective,
    pub(super) learning_rate: LearningRate,
    pub(super) backend: Box<dyn Train>,
    pub(super) state: State,
}

impl<'a> Run<'a> {
    /// Before the first of `planned` steps of supervised fine-tuning.
    pub fn new(model: &'a BaseModel, adaptation: &Adaptation, config: &'a TrainConfig, planned: u64) -> Self {
        Self::restore(model, &Sft, config, planned, State::new(model, adaptation, config))
    }

    /// At a state.
    pub fn restore(
        model: &'a BaseModel,
        objective: &'a dyn Objective,
        config: &'a TrainConfig,
        planned: u64,
        state: State,
    ) -> Self {
        let learning_rate = LearningRate {
            peak: config.learning_rate,
            schedule: config.lr_scheduler_type,
            warmup_steps: LearningRate::warmup_steps(config.warmup_ratio, planned),
            total_steps: planned,
        };
        let backend = trainer(model, Some(state.adaptation()), config.compute);
        Self { model, config, objective, learning_rate, backend, state }
    }

    /// What it is between these two steps.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Goes on from another state.
    pub(super) fn replace(&mut self, state: State) {
        self.backend = trainer(self.model, Some(state.adaptation()), self.config.compute);
        self.state = state;
    }

    /// One update from the gradients of some batches.
    ///
    /// # Errors
    /// See [`super::train`].
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepReport> {
        let start = Instant::now();
        let (outcome, gradients) = self.gradients(batches)?;
        let loss = outcome.loss_sum / outcome.n as f64;
        let learning_rate = self.rate();
        let step = self.state.step + 1;
        intact().map_err(|error| Unusable::base(step, &error))?;
        ensure!(loss.is_finite(), Unusable::parameters(step, &format!("the loss is {loss}")));
        let grad_norm = timed("gradient norm", || self.norm(&gradients, learning_rate))?;
        ensure!(grad_norm.is_finite(), Unusable::parameters(step, "a gradient is not finite"));
        // As torch's clip_grad_norm_, whose 1e-6 is part of the definition.
        let clip = match self.config.max_grad_norm {
            bound if bound > 0.0 => (bound / (grad_norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        let Generation { adaptation, optimizer, .. } = &mut self.state.generation;
        let finite = timed("optimizer", || optimizer.step(adaptation, &gradients, learning_rate, clip))?;
        self.state.step = step;
        ensure!(finite, Unusable::update(step, "its update is beyond all numbers"));
        let tokens = batches.iter().map(|batch| batch.tokens).sum();
        let rewards = outcome.rewards.map(RewardSums::means);
        // JSON has no other, and a checkpoint has them.
        let is_finite =
            |rewards: Rewards| [rewards.chosen, rewards.rejected, rewards.margin].iter().all(|r| r.is_finite());
        ensure!(rewards.is_none_or(is_finite), Unusable::parameters(step, "a reward is not finite"));
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepReport { step, epoch: 0.0, loss, grad_norm, learning_rate, tokens, seconds, rewards })
    }

    /// Learning rate of the next update.
    fn rate(&self) -> f64 {
        let State { generation, script_scale, watchdog, step, .. } = &self.state;
        let peak = self.config.learning_rate * script_scale * generation.scale * watchdog.rate_scale;
        LearningRate { peak, ..self.learning_rate }.at(*step)
    }

    /// Loss and gradients of a step, each batch one pass of it: of the objective's mean over the whole step.
    ///
    /// # Errors
    /// When no token is trained, or a tensor operation fails.
    pub fn gradients(&mut self, batches: &[Batch]) -> Result<(Outcome, Gradients)> {
        let whole = self.whole(batches)?;
        let mut reduce = Reduce::new(batches.len());
        let mut total = Outcome { n: whole.n, ..Outcome::default() };
        for (index, batch) in batches.iter().enumerate() {
            let mut leaf = Gradients::new(self.state.adaptation().params.len());
            self.pass(batch, &whole, &mut total, &mut leaf)?;
            reduce.push(index, leaf)?;
        }
        Ok((total, reduce.finish()?))
    }

    /// What the passes of a step are to know of the whole of it: any of them can then be run anywhere.
    ///
    /// # Errors
    /// When no token is trained, or a tensor operation fails.
    pub fn whole(&mut self, batches: &[Batch]) -> Result<Whole> {
        let trained: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        ensure!(trained > 0, "step {}: no token of its examples is trained", self.state.step + 1);
        // As a pass without gradients, and without dropout.
        let evaluation = Pass::evaluation(self.model, Some(self.state.adaptation()));
        Whole::of(self.objective, &mut *self.backend, &evaluation, batches)
    }

    /// One pass of a step: its loss is added to `total`, its gradients to `leaf`.
    ///
    /// # Errors
    /// When the objective does not know the batch's units, or a tensor operation fails.
    pub fn pass(&mut self, batch: &Batch, whole: &Whole, total: &mut Outcome, leaf: &mut Gradients) -> Result<()> {
        let Whole { n, constant } = *whole;
        let adaptation = &self.state.generation.adaptation;
        let mut pass = Pass::training(self.model, adaptation, self.config.seed, self.state.step as u32);
        pass.neftune_noise_alpha = self.config.neftune_noise_alpha;
        let (objective, mut weighed) = (self.objective, None);
        let mut weigh = |log_probs: &[f64]| {
            let weighed = weighed.insert(objective.weigh(&UnitLogProbs::of(batch, log_probs), n, constant)?);
            Ok(std::mem::take(&mut weighed.weights))
        };
        let weigh = match objective.alike(n) {
            Some(weight) => Weigh::Alike(weight),
            None => Weigh::By(&mut weigh),
        };
        let recompute = self.config.gradient_checkpointing || self.state.cut.gradient_checkpointing;
        let log_probs = self.backend.forward_backward(&pass, batch, weigh, recompute, leaf)?;
        total.add(&log_probs, weighed.as_ref());
        Ok(())
    }

    /// Norm of all gradients together; watches for parameters that get none.
    fn norm(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<f64> {
        let Generation { adaptation, optimizer, idle_updates, .. } = &mut self.state.generation;
        let trained = optimizer.states.iter().filter(|state| !state.frozen);
        let trained: Vec<usize> = trained.map(|state| state.param).collect();
        // Each parameter's share is summed by one thread, and the shares in order.
        let squares = trained.par_iter().map(|index| gradients.get(*index).map(sum_of_squares).transpose());
        let squares: Vec<Option<f64>> = squares.collect::<Result<_>>()?;
        let mut total = 0.0;
        for (index, squared) in trained.into_iter().zip(squares) {
            let name = &adaptation.params[index].spec.tensor;
            let Some(squared) = squared else {
                bail!("parameter `{name}` gets no gradient: the recipe does not depend on it, or cuts it off");
            };
            total += squared;
            if let Some(idle) = idle_updates[index] {
                idle_updates[index] = match (squared == 0.0, learning_rate > 0.0) {
                    (false, _) => None,
                    (true, true) => Some(idle + 1),
                    (true, false) => Some(idle),
                };
                if idle_updates[index] == Some(4) {
                    bail!("parameter `{name}` still has a gradient of zeros after three updates: it learns nothing");
                }
            }
        }
        Ok(total.sqrt())
    }
}

/// Σ g², in f64.
fn sum_of_squares(gradient: &Tensor) -> Result<f64> {
    let gradient = gradient.flatten_all()?.contiguous()?;
    Ok(match gradient.dtype() {
        DType::F32 => {
            let (storage, at) = gradient.storage_and_layout();
            let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) = (&*storage, at.contiguous_offsets())
            else {
                bail!("a gradient that is not contiguous")
            };
            values[start..end].iter().map(|g| f64::from(*g).powi(2)).sum()
        }
        _ => gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?,
    })
}
