//! The training loop: batches, accumulation, clipping, updates, and what an observer hears of it.
//!
//! Between two steps a run can go on with another plan: see [`swap`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use homeroom_abi::step::Directive;
use rayon::prelude::*;
use serde::Serialize;

use crate::adapt::adaptation::Adaptation;
use crate::data::Example;
use crate::data::order::epoch_order;
use crate::files::mapped::{Surviving, intact, whole};
use crate::models::BaseModel;
use crate::run::backends::trainer;
use crate::run::batch::{Batch, PASS_ROWS, pass_rows};
use crate::run::compute::Compute;
use crate::run::gradients::Gradients;
use crate::run::outcome::Outcome;
use crate::run::plain::recipe::Pass;
use crate::run::profile::timed;
use crate::run::waist::{Train, Weigh};
use crate::train::optimizer::{AdamW, AdamWConfig};
use crate::train::schedule::{LearningRate, Schedule};

mod end;
pub mod optimizer;
pub mod schedule;
pub mod swap;

pub use end::Broken;
use end::Unusable;
pub use swap::{Candidate, Change, RunEvent, Swap};

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
    /// What products are computed in.
    pub compute: Compute,
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
            compute: Compute::F32,
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
        let counts = [
            ("epochs", self.epochs),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("batch_size", self.batch_size as u64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as u64),
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
    fn per_step(&self) -> usize {
        self.batch_size.saturating_mul(self.gradient_accumulation_steps)
    }
}

/// One step, as it is reported. Field names are those of transformers' `trainer_state.json`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
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
    /// Seconds that the step took.
    pub seconds: f64,
}

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct TrainReport {
    /// All steps.
    pub steps: Vec<StepReport>,
    /// Steps that were planned.
    pub planned_steps: u64,
    /// Whether the observer ended the run before its last step.
    pub interrupted: bool,
    /// What changed between steps: with these at their steps, the run can be repeated.
    pub events: Vec<RunEvent>,
}

impl TrainReport {
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

/// Hears what a run does, between steps, and may have it go on otherwise.
pub trait Observer {
    /// A step is done. Steps that are undone by [`Change::RolledBack`] are done, and heard of, again.
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

/// Steps of a run over so many examples: at least one.
///
/// # Errors
/// When there is no example, a number of the configuration is out of range, or there are more steps than can be counted.
pub fn planned_steps(examples: usize, config: &TrainConfig) -> Result<u64> {
    config.check()?;
    ensure!(examples > 0, "there is no example to train on");
    let an_epoch = examples.div_ceil(config.per_step()) as u64;
    let steps = config.max_steps.or_else(|| config.epochs.checked_mul(an_epoch));
    // Dropout is drawn by the step's number, in 32 bits.
    steps.filter(|steps| *steps <= u64::from(u32::MAX)).with_context(|| match config.max_steps {
        Some(steps) => format!("max_steps is {steps}; a run has {} steps at most", u32::MAX),
        None => {
            format!("{} epochs of {an_epoch} steps are too many; a run has {} steps at most", config.epochs, u32::MAX)
        }
    })
}

/// Trains the parameters of an adaptation in place; those of the plans that an observer has it go on with are others, which
/// the observer is given.
///
/// The loss of a step is the sum over its trained tokens divided by their number, counted over the whole step first: how a
/// step is cut into batches changes nothing but speed. A run goes round the examples again when `max_steps` wants more.
///
/// Losses, gradients and parameters are looked at in every step, and the loss of one row after the last.
///
/// # Errors
/// When a parameter gets no gradient, or one stays all zero for three updates with a learning rate above zero; the message names it.
/// When numbers are no longer finite, or a file of the base is gone: as [`Broken`], if something was learned before, to which the
/// parameters are set back.
pub fn train(
    model: &BaseModel,
    adaptation: &Adaptation,
    examples: &[&Example],
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<TrainReport> {
    let planned = planned_steps(examples.len(), config)?;
    let per_step = config.per_step().min(examples.len());
    let steps_an_epoch = examples.len().div_ceil(per_step) as u64;
    // A base that shrinks costs no more than the step that meets it: `Run::step` looks for that.
    let _surviving = Surviving::begin();
    let mut run = Run::new(model, adaptation, config, planned);
    let mut report = TrainReport { steps: Vec::new(), planned_steps: planned, interrupted: false, events: Vec::new() };
    let (mut order, mut order_of) = (Vec::new(), None);
    while run.step < planned {
        let step = run.step;
        if !run.is_on_trial()
            && let Some(candidate) = observer.candidate()?
        {
            let change = run.swap(candidate);
            report.tell(observer, &run, change)?;
        }
        let (epoch, place) = (step / steps_an_epoch, (step % steps_an_epoch) as usize);
        if order_of != Some(epoch) {
            order_of = Some(epoch);
            order = epoch_order(examples.len(), config.seed, epoch, config.shuffle);
        }
        let rows = &order[place * per_step..examples.len().min((place + 1) * per_step)];
        let rows: Vec<(u32, &Example)> = rows.iter().map(|row| (*row as u32, examples[*row])).collect();
        let batches: Vec<Batch> = match config.packing {
            true => Batch::packed(&rows, pass_rows(model)),
            false => rows.chunks(config.batch_size).map(|rows| Batch::of_examples(rows.iter().copied())).collect(),
        };
        let last = step + 1 == planned;
        let done = run.try_step(&batches).and_then(|done| {
            if last {
                run.look(&rows)?;
            }
            Ok(done)
        });
        let mut done = match done {
            Err(error) if run.is_on_trial() => {
                report.roll_back(observer, &mut run, &error)?;
                continue;
            }
            Err(error) => return Err(run.end(error, report)),
            Ok(done) => done,
        };
        done.epoch = (step + 1) as f64 / steps_an_epoch as f64;
        report.steps.push(done);
        match observer.on_step(&done, planned)? {
            Control::Continue => {}
            Control::ScaleLearningRate(scale) => {
                ensure!(scale.is_finite() && scale >= 0.0, "the learning rate cannot be scaled by {scale}");
                run.script_scale = scale;
            }
            Control::Stop => {
                report.interrupted = !last;
                if !last && let Err(error) = run.look(&rows) {
                    if !run.is_on_trial() {
                        return Err(run.end(error, report));
                    }
                    report.roll_back(observer, &mut run, &error)?;
                    run.look(&rows).map_err(|error| run.end(error, report.clone()))?;
                }
                break;
            }
        }
        for directive in observer.directives(&done, planned)? {
            if let Some(change) = run.direct(directive) {
                report.tell(observer, &run, change)?;
            }
        }
        if let Some(change) = run.passed() {
            report.tell(observer, &run, change)?;
        }
    }
    Ok(report)
}

impl TrainReport {
    /// Takes the plan on trial back, for an error of its.
    fn roll_back(&mut self, observer: &mut dyn Observer, run: &mut Run<'_>, error: &anyhow::Error) -> Result<()> {
        let change = run.roll_back(format!("{error:#}"));
        self.steps.truncate(run.step as usize);
        self.tell(observer, run, change)
    }

    fn tell(&mut self, observer: &mut dyn Observer, run: &Run<'_>, change: Change) -> Result<()> {
        let event = RunEvent { step: run.step, change };
        observer.changed(&event, &run.generation.adaptation)?;
        self.events.push(event);
        Ok(())
    }
}

/// A run between two steps.
pub struct Run<'a> {
    model: &'a BaseModel,
    config: &'a TrainConfig,
    learning_rate: LearningRate,
    /// What the observer has the learning rates multiplied by.
    script_scale: f64,
    generation: Generation,
    backend: Box<dyn Train>,
    step: u64,
    /// Losses of the last steps, for what is on trial to be held to.
    losses: VecDeque<f64>,
    trial: Option<swap::Trial>,
}

/// A plan with all that was learned under it.
struct Generation {
    adaptation: Arc<Adaptation>,
    optimizer: AdamW,
    /// For each parameter, updates in a row with a rate above zero and a gradient of zeros; `None` once it had another.
    idle_updates: Vec<Option<u32>>,
    /// What the strategy has the learning rates multiplied by.
    scale: f64,
    /// The scalars that the strategy has set, with the values that the plan gives them.
    set_scalars: BTreeMap<String, f64>,
}

impl<'a> Run<'a> {
    /// Before the first of `planned` steps.
    pub fn new(model: &'a BaseModel, adaptation: &Adaptation, config: &'a TrainConfig, planned: u64) -> Self {
        let learning_rate = LearningRate {
            peak: config.learning_rate,
            schedule: config.lr_scheduler_type,
            warmup_steps: LearningRate::warmup_steps(config.warmup_ratio, planned),
            total_steps: planned,
        };
        let adamw = AdamWConfig { weight_decay: config.weight_decay, ..AdamWConfig::default() };
        let optimizer = AdamW::new(adaptation, adamw).keeping(model.parameter_count());
        let idle_updates = vec![Some(0); adaptation.params.len()];
        let backend = trainer(model, Some(adaptation), config.compute);
        let adaptation = Arc::new(adaptation.clone());
        let generation = Generation { adaptation, optimizer, idle_updates, scale: 1.0, set_scalars: BTreeMap::new() };
        let (losses, trial) = (VecDeque::new(), None);
        Self { model, config, learning_rate, script_scale: 1.0, generation, backend, step: 0, losses, trial }
    }

    /// One update from the gradients of some batches.
    ///
    /// # Errors
    /// See [`train`].
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepReport> {
        let start = Instant::now();
        let (outcome, gradients) = self.gradients(batches)?;
        let loss = outcome.loss_sum / outcome.trained as f64;
        let learning_rate = self.rate();
        let step = self.step + 1;
        intact().map_err(|error| Unusable::base(step, &error))?;
        ensure!(loss.is_finite(), Unusable::parameters(step, &format!("the loss is {loss}")));
        let grad_norm = timed("gradient norm", || self.norm(&gradients, learning_rate))?;
        ensure!(grad_norm.is_finite(), Unusable::parameters(step, "a gradient is not finite"));
        // As torch's clip_grad_norm_, whose 1e-6 is part of the definition.
        let clip = match self.config.max_grad_norm {
            bound if bound > 0.0 => (bound / (grad_norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        let Generation { adaptation, optimizer, .. } = &mut self.generation;
        let finite = timed("optimizer", || optimizer.step(adaptation, &gradients, learning_rate, clip))?;
        self.step = step;
        ensure!(finite, Unusable::update(step));
        let tokens = batches.iter().map(|batch| batch.tokens).sum();
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepReport { step, epoch: 0.0, loss, grad_norm, learning_rate, tokens, seconds })
    }

    /// Learning rate of the next update.
    fn rate(&self) -> f64 {
        let peak = self.config.learning_rate * self.script_scale * self.generation.scale;
        LearningRate { peak, ..self.learning_rate }.at(self.step)
    }

    /// Loss and gradients of a step: of the mean over all trained tokens of its batches.
    ///
    /// # Errors
    /// When no token is trained, or a tensor operation fails.
    pub fn gradients(&mut self, batches: &[Batch]) -> Result<(Outcome, Gradients)> {
        let trained: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        ensure!(trained > 0, "step {}: no token of its examples is trained", self.step + 1);
        let update = self.step as u32;
        let adaptation = &self.generation.adaptation;
        let pass = Pass::training(self.model, adaptation, self.config.seed, update);
        let mut gradients = Gradients::new(adaptation.params.len());
        let mut total = Outcome::default();
        for batch in batches {
            let recompute = self.config.gradient_checkpointing;
            let weigh = Weigh::Alike(1.0 / trained as f64);
            total.add(&self.backend.forward_backward(&pass, batch, weigh, recompute, &mut gradients)?);
        }
        Ok((total, gradients))
    }

    /// Norm of all gradients together; watches for parameters that get none.
    fn norm(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<f64> {
        let Generation { adaptation, optimizer, idle_updates, .. } = &mut self.generation;
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
    let gradient = gradient.flatten_all()?;
    Ok(match gradient.dtype() {
        DType::F32 => gradient.to_vec1::<f32>()?.iter().map(|g| f64::from(*g).powi(2)).sum(),
        _ => gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?,
    })
}

/// Loss over examples, without gradients: a mean over all trained tokens.
///
/// # Errors
/// When no token is trained, a tensor operation fails, or the loss is not finite.
pub fn evaluate_examples(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    examples: &[&Example],
    compute: Compute,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation> {
    let pass = Pass::evaluation(model, adaptation);
    let mut backend = trainer(model, adaptation, compute);
    let numbered: Vec<(u32, &Example)> = examples.iter().map(|example| (0, *example)).collect();
    let (mut total, mut done) = (Outcome::default(), 0);
    for batch in Batch::packed(&numbered, PASS_ROWS) {
        total.add(&backend.log_probs(&pass, &batch)?);
        done += batch.sequences.len();
        progress(done);
    }
    ensure!(total.trained > 0, "no token of these examples is trained, so there is no loss");
    whole()?;
    let loss = total.loss_sum / total.trained as f64;
    ensure!(
        loss.is_finite(),
        "the loss of these examples is {loss}: the model's numbers overflow, or its weights are damaged"
    );
    Ok(Evaluation {
        loss,
        // A number that JSON has, whatever the loss.
        perplexity: loss.exp().min(f64::MAX),
        token_accuracy: total.correct as f64 / total.trained as f64,
        trained_tokens: total.trained,
        examples: examples.len(),
    })
}

/// Loss over a set of examples.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Evaluation {
    /// Mean cross-entropy of trained tokens, in nats.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Share of trained tokens whose most likely prediction was right.
    pub token_accuracy: f64,
    /// Trained tokens.
    pub trained_tokens: usize,
    /// Examples.
    pub examples: usize,
}
