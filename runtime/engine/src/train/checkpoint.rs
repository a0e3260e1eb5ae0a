//! A run's state on disk, beside the adapter that it is.
//!
//! `training_state.json` has every number and both plans where one is on trial, `training_state.safetensors` the moments. The
//! parameters are the adapter's own, in `adapter_model.safetensors`, so that a checkpoint is an adapter that can be served; those of a
//! strategy that trains the base's weights, and those that a plan on trial came after, are beside the moments.
//!
//! Numbers are written with as many digits as tell them apart, and read exactly. What is read was written by this program for itself;
//! it is checked as any file is. All steps that were reported are in it, some 250 bytes each.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::Var;
use homeroom_abi::plan::Plan;
use safetensors::Dtype;
use safetensors::tensor::{View, serialize_to_file};
use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::report::TrainReport;
use super::state::{Best, Cut, Generation, State};
use super::swap::Trial;
use super::watchdog::Watchdog;
use crate::adapt::adaptation::{Adaptation, Param};
use crate::adapt::adapter::AdapterFiles;
use crate::files::tensors::{TensorValues, map_safetensors};
use crate::files::{NewDirectory, WEIGHTS_FILE, read_bytes};
use crate::models::BaseModel;

/// The file of numbers.
pub const STATE_FILE: &str = "training_state.json";
/// The file of tensors.
pub const TENSORS_FILE: &str = "training_state.safetensors";
/// Version of the form.
const FORMAT: u64 = 1;
/// Largest file of numbers: some 250 bytes a step.
const STATE_BYTES_MAX: u64 = 4 << 30;

#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u64,
    step: u64,
    script_scale: f64,
    losses: VecDeque<f64>,
    watchdog: Watchdog,
    owes: bool,
    best: Option<Best>,
    cut: Cut,
    report: TrainReport,
    generation: GenerationFile,
    trial: Option<TrialFile>,
}

/// What is read of a file first.
#[derive(Deserialize)]
struct Format {
    format: u64,
}

#[derive(Serialize, Deserialize)]
struct GenerationFile {
    plan: Plan,
    updates: u64,
    scale: f64,
    set_scalars: BTreeMap<String, f64>,
    idle_updates: Vec<Option<u32>>,
    /// Of each trainable parameter, in order.
    optimizer: Vec<StateOfParam>,
    /// Whether the parameters are beside the moments.
    has_values: bool,
}

#[derive(Serialize, Deserialize)]
struct StateOfParam {
    tensor: String,
    missed: u64,
    frozen: bool,
}

#[derive(Serialize, Deserialize)]
struct TrialFile {
    id: String,
    step: u64,
    script_scale: f64,
    losses_mean: Option<f64>,
    losses_kept: usize,
    best: Option<Best>,
    before: GenerationFile,
}

/// What can be known of a checkpoint without its base.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Steps that are done.
    pub step: u64,
    /// Steps that were planned.
    pub planned_steps: u64,
    /// How steps are cut, and which way products take.
    pub cut: Cut,
    /// The plan that is trained.
    pub plan: Plan,
    /// Whether a plan is on trial.
    pub is_on_trial: bool,
    /// All that was reported.
    pub report: TrainReport,
}

/// Writes a state into a directory in the making, which has the adapter's files too, or gets them. The state does not change.
///
/// # Errors
/// When a file cannot be written.
pub fn write(directory: &NewDirectory, state: &State) -> Result<()> {
    let mut tensors = Vec::new();
    let generation = lay_out(&state.generation, "", state.adaptation().is_whole_model(), &mut tensors);
    let trial = state.trial.as_ref().map(|trial| TrialFile {
        id: trial.id.clone(),
        step: trial.step,
        script_scale: trial.script_scale,
        losses_mean: trial.losses_mean,
        losses_kept: trial.losses_kept,
        best: trial.best,
        before: lay_out(&trial.before, "before.", true, &mut tensors),
    });
    let file = StateFile {
        format: FORMAT,
        step: state.step,
        script_scale: state.script_scale,
        losses: state.losses.clone(),
        watchdog: state.watchdog,
        owes: state.owes,
        best: state.best,
        cut: state.cut.clone(),
        report: state.report.clone(),
        generation,
        trial,
    };
    serialize_to_file(tensors, None, &directory.path().join(TENSORS_FILE))
        .with_context(|| directory.cannot_write(TENSORS_FILE))?;
    directory.write(STATE_FILE, &serde_json::to_vec(&file)?)
}

/// The numbers of a generation; its tensors are added to `tensors`, their names after `prefix`.
fn lay_out<'a>(
    generation: &'a Generation,
    prefix: &str,
    has_values: bool,
    tensors: &mut Vec<(String, Values<'a>)>,
) -> GenerationFile {
    let Generation { adaptation, optimizer, idle_updates, scale, set_scalars } = generation;
    let shape = |param: &Param| param.spec.shape.clone();
    for state in &optimizer.states {
        let param = &adaptation.params[state.param];
        let name = |kind: &str| format!("{prefix}{kind}.{}", param.spec.tensor);
        tensors.push((name("m"), Values { shape: shape(param), of: Source::Slice(&state.m) }));
        tensors.push((name("v"), Values { shape: shape(param), of: Source::Slice(&state.v) }));
    }
    for param in adaptation.params.iter().filter(|_| has_values) {
        let name = format!("{prefix}param.{}", param.spec.tensor);
        tensors.push((name, Values { shape: shape(param), of: Source::Var(&param.var) }));
    }
    let of_param = |state: &super::optimizer::State| StateOfParam {
        tensor: adaptation.params[state.param].spec.tensor.clone(),
        missed: state.missed,
        frozen: state.frozen,
    };
    GenerationFile {
        plan: adaptation.plan.clone(),
        updates: optimizer.updates,
        scale: *scale,
        set_scalars: set_scalars.clone(),
        idle_updates: idle_updates.clone(),
        optimizer: optimizer.states.iter().map(of_param).collect(),
        has_values,
    }
}

/// Values that are turned into bytes one tensor at a time, as the file is written.
struct Values<'a> {
    shape: Vec<usize>,
    of: Source<'a>,
}

enum Source<'a> {
    Slice(&'a [f32]),
    Var(&'a Var),
}

impl View for Values<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect();
        match self.of {
            Source::Slice(values) => Cow::Owned(bytes(values)),
            Source::Var(var) => {
                let values = var.as_detached_tensor().flatten_all().and_then(|values| values.to_vec1::<f32>());
                Cow::Owned(bytes(&values.expect("a parameter of a run is f32, in memory")))
            }
        }
    }

    fn data_len(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}

/// Bytes that a checkpoint of a state takes, to within its JSON.
pub fn bytes(state: &State) -> u64 {
    let of = |generation: &Generation| -> usize {
        let all: usize = generation.adaptation.params.iter().map(|p| p.spec.shape.iter().product::<usize>()).sum();
        let moments: usize = generation.optimizer.states.iter().map(|state| 2 * state.m.len()).sum();
        4 * (all + moments)
    };
    let trial = state.trial.as_ref().map_or(0, |trial| of(&trial.before));
    (of(&state.generation) + trial + 256 * state.report.steps.len() + (64 << 10)) as u64
}

fn read_file(directory: &Path) -> Result<StateFile> {
    let path = directory.join(STATE_FILE);
    let text = read_bytes(&path, STATE_BYTES_MAX)?;
    let damaged = || format!("{}: damaged", path.display());
    let Format { format } = serde_json::from_slice(&text).with_context(damaged)?;
    ensure!(format == FORMAT, "{}: format {format} is not known; this program reads {FORMAT}", path.display());
    serde_json::from_slice(&text).with_context(damaged)
}

/// What can be known of a checkpoint without its base.
///
/// # Errors
/// When it is not there or damaged.
pub fn summary(directory: &Path) -> Result<Summary> {
    let StateFile { step, cut, generation, trial, report, .. } = read_file(directory)?;
    let (planned_steps, is_on_trial) = (report.planned_steps, trial.is_some());
    Ok(Summary { step, planned_steps, cut, plan: generation.plan, is_on_trial, report })
}

/// Looks at all that can be looked at without the base.
///
/// # Errors
/// When a file is missing, or is not whole.
pub fn check(directory: &Path) -> Result<u64> {
    let file = read_file(directory)?;
    let place = || directory.display().to_string();
    let known = file.step <= file.report.planned_steps && file.report.steps.len() as u64 == file.step;
    ensure!(known, "{}: {STATE_FILE} is at step {}, and knows of {}", place(), file.step, file.report.steps.len());
    let scales = [file.script_scale, file.generation.scale, file.watchdog.rate_scale];
    ensure!(scales.iter().all(|scale| scale.is_finite() && *scale >= 0.0), "{}: {STATE_FILE} is damaged", place());
    map_safetensors(&directory.join(TENSORS_FILE))?;
    if !file.generation.has_values {
        let tensors = AdapterFiles::read(directory)?;
        tensors.ensure_finite().with_context(place)?;
    }
    Ok(file.step)
}

/// Reads the state of a directory. `model`: the base, stored as the plan of the [`summary`] asks for.
///
/// # Errors
/// When a file is missing or damaged, or the base is another.
pub fn read(directory: &Path, model: &BaseModel, config: &TrainConfig) -> Result<State> {
    let file = read_file(directory)?;
    let place = || directory.display().to_string();
    let mut tensors = TensorValues::new();
    for (name, tensor) in map_safetensors(&directory.join(TENSORS_FILE))? {
        tensors.insert(name, (tensor.shape.clone(), tensor.values()?));
    }
    let own = match file.generation.has_values {
        true => None,
        false => Some(AdapterFiles::read(directory)?.into_tensors(model)?),
    };
    let generation = generation(file.generation, "", own, &mut tensors, model, config).with_context(place)?;
    let trial = file.trial.map(|TrialFile { id, step, script_scale, losses_mean, losses_kept, best, before }| {
        let before = self::generation(before, "before.", None, &mut tensors, model, config)?;
        Ok::<_, anyhow::Error>(Trial { id, before, step, script_scale, losses_mean, losses_kept, best })
    });
    let trial = trial.transpose().with_context(place)?;
    ensure!(
        tensors.is_empty(),
        "{}: {} tensors of {TENSORS_FILE} belong to no parameter",
        directory.display(),
        tensors.len()
    );
    Ok(State {
        step: file.step,
        generation,
        trial,
        losses: file.losses,
        script_scale: file.script_scale,
        watchdog: file.watchdog,
        owes: file.owes,
        best: file.best,
        cut: file.cut,
        report: file.report,
    })
}

/// A generation by its numbers, its moments, and its parameters: `own`, or those beside the moments.
fn generation(
    file: GenerationFile,
    prefix: &str,
    own: Option<TensorValues>,
    tensors: &mut TensorValues,
    model: &BaseModel,
    config: &TrainConfig,
) -> Result<Generation> {
    let mut adaptation = Adaptation::with_values(model, file.plan, |spec, _| {
        Ok(Var::zeros(spec.shape.clone(), candle_core::DType::F32, &candle_core::Device::Cpu)?)
    })?;
    let mut take = |kind: &str, param: &Param| {
        let name = format!("{prefix}{kind}.{}", param.spec.tensor);
        let (shape, values) = tensors.remove(&name).with_context(|| format!("tensor `{name}` is missing"))?;
        ensure!(shape == param.spec.shape, "tensor `{name}` is {shape:?}, it should be {:?}", param.spec.shape);
        Ok(values)
    };
    match own {
        Some(own) => adaptation.load(own).with_context(|| WEIGHTS_FILE.to_owned())?,
        None => {
            for param in &adaptation.params {
                let values = candle_core::Tensor::from_vec(
                    take("param", param)?,
                    param.spec.shape.clone(),
                    &candle_core::Device::Cpu,
                )?;
                param.var.set(&values)?;
            }
        }
    }
    let mut generation = Generation::new(model, Arc::new(adaptation), config);
    ensure!(
        file.optimizer.len() == generation.optimizer.states.len()
            && file.idle_updates.len() == generation.idle_updates.len(),
        "{STATE_FILE} has another number of parameters than its plan"
    );
    generation.optimizer.updates = file.updates;
    for (state, file) in generation.optimizer.states.iter_mut().zip(file.optimizer) {
        let param = &generation.adaptation.params[state.param];
        ensure!(param.spec.tensor == file.tensor, "`{}` stands where `{}` should", file.tensor, param.spec.tensor);
        (state.m, state.v) = (take("m", param)?, take("v", param)?);
        (state.missed, state.frozen) = (file.missed, file.frozen);
    }
    (generation.idle_updates, generation.scale, generation.set_scalars) =
        (file.idle_updates, file.scale, file.set_scalars);
    Ok(generation)
}
