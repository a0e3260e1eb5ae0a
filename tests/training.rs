//! What a run is between two steps, and what ends it, stops it or takes it back: by the engine alone, its checkpoints in a directory.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{self, Record, StrategyRecord};
use homeroom_engine::data::{Example, Unit};
use homeroom_engine::files::NewDirectory;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::gradients::Gradients;
use homeroom_engine::train::objective::Sft;
use homeroom_engine::train::reduce::Reduce;
use homeroom_engine::train::{
    Broken, Change, Control, Data, Observer, Outcome, Run, RunEvent, State, StepReport, TrainConfig, checkpoint, train,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::invariants::examples;
use crate::support::{adapt, model};

/// An observer that saves every so many steps, ends where it is told to, and can lie about nothing else.
struct Saves<'a> {
    model: &'a BaseModel,
    config: &'a TrainConfig,
    directory: &'a Path,
    every: u64,
    /// Ends the run after this step, as Ctrl-C does.
    ends: Option<u64>,
    /// Halves the learning rate after this step.
    halves: Option<u64>,
    steps: u64,
    saved: Vec<u64>,
    changes: Vec<RunEvent>,
    /// What is done to the parameters after a step: as a bad update does.
    harm: Vec<(u64, f32)>,
    now: Option<Arc<Adaptation>>,
}

impl<'a> Saves<'a> {
    fn new(model: &'a BaseModel, config: &'a TrainConfig, directory: &'a Path, every: u64) -> Self {
        let (ends, saved, changes, harm, now) = (None, Vec::new(), Vec::new(), Vec::new(), None);
        Self { model, config, directory, every, ends, halves: None, steps: 0, saved, changes, harm, now }
    }

    fn path(&self, step: u64) -> PathBuf {
        self.directory.join(format!("step-{step}"))
    }

    fn read(&self, step: u64) -> Result<State> {
        checkpoint::read(&self.path(step), self.model, self.config)
    }
}

impl Observer for Saves<'_> {
    fn on_step(&mut self, report: &StepReport, _: u64) -> Result<Control> {
        self.steps = report.step;
        if let (Some(at), Some(now)) = (self.harm.iter().position(|(step, _)| *step == report.step), &self.now) {
            let (_, factor) = self.harm.remove(at);
            for param in &now.params {
                let values = (param.var.as_detached_tensor() * f64::from(factor))?;
                param.var.set(&values)?;
            }
        }
        if self.halves == Some(report.step) {
            return Ok(Control::ScaleLearningRate(0.5));
        }
        Ok(if self.ends == Some(report.step) { Control::Stop } else { Control::Continue })
    }

    fn is_cancelled(&mut self) -> bool {
        self.ends.is_some_and(|ends| self.steps >= ends)
    }

    fn is_due(&mut self, state: &State) -> bool {
        self.now = Some(state.adaptation().clone());
        let best = state.best.is_some_and(|best| best.step == state.step);
        state.step.is_multiple_of(self.every) || state.report.interrupted || best
    }

    fn save(&mut self, state: &State) -> Result<()> {
        let directory = NewDirectory::start(&self.path(state.step))?;
        let strategy = StrategyRecord::default();
        let (base_files, training) = (Default::default(), Value::Null);
        let record = Record { strategy: &strategy, data_digest: None, base_files, requantize: false, training };
        adapter::save(&directory, self.model, state.adaptation(), record)?;
        checkpoint::write(&directory, state)?;
        directory.publish()?;
        self.saved.push(state.step);
        Ok(())
    }

    fn saved(&mut self, step: u64) -> Result<Option<State>> {
        let newest = self.saved.iter().filter(|saved| **saved <= step).max();
        newest.map(|step| self.read(*step)).transpose()
    }

    fn changed(&mut self, event: &RunEvent, adaptation: &Arc<Adaptation>) -> Result<()> {
        self.changes.push(event.clone());
        self.now = Some(adaptation.clone());
        Ok(())
    }
}

/// A checkpoint of a run's second step below a directory.
pub fn saved(directory: &Path) -> Result<PathBuf> {
    let (model, config) = (model("llama")?, config(4));
    let rows = examples(&model, 9, 1);
    let mut saves = Saves::new(&model, &config, directory, 100);
    saves.ends = Some(2);
    let state = State::new(&model, &lora(&model)?, &config);
    train(&model, state, &data(&rows, 2), &Sft, &config, &mut saves)?;
    Ok(saves.path(2))
}

/// Reads a checkpoint of [`saved`], and makes a step more.
pub fn goes_on(checkpoint: &Path, model: &BaseModel) -> Result<()> {
    let config = config(3);
    let state = checkpoint::read(checkpoint, model, &config)?;
    let rows = examples(model, 9, 1);
    train(model, state, &data(&rows, 2), &Sft, &config, &mut quiet).map(drop)
}

fn config(steps: u64) -> TrainConfig {
    TrainConfig {
        max_steps: Some(steps),
        batch_size: 3,
        gradient_accumulation_steps: 2,
        learning_rate: 5e-3,
        compute: Compute::F32,
        ..TrainConfig::default()
    }
}

fn values(adaptation: &Adaptation) -> Result<Vec<Vec<u32>>> {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    adaptation.params.iter().map(|param| Ok(bits(param.var.flatten_all()?.to_vec1()?))).collect()
}

fn lora(model: &BaseModel) -> Result<Adaptation> {
    adapt("lora", &json!({"r": 3, "lora_dropout": 0.2}), model, 42)
}

fn data(rows: &[Example], held_out: usize) -> Data<'_> {
    let rows: Vec<&Example> = rows.iter().collect();
    Data::of_examples(&rows[held_out..], &rows[..held_out])
}

/// Seven steps an epoch and a bit, passes of one batch each or packed, dropout, evaluations between: ended after any step, and taken up
/// from the file alone.
#[test]
fn a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits() -> Result<()> {
    let (model, place) = (model("llama")?, TempDir::new()?);
    let rows = examples(&model, 41, 1);
    let data = data(&rows, 5);
    for packing in [true, false] {
        let config = TrainConfig { packing, eval_steps: Some(4), ..config(13) };
        let whole = train(&model, State::new(&model, &lora(&model)?, &config), &data, &Sft, &config, &mut quiet)?;
        for ends in [1, 4, 7, 12] {
            let directory = place.path().join(format!("{packing}-{ends}"));
            let mut first = Saves::new(&model, &config, &directory, 100);
            first.ends = Some(ends);
            let state = State::new(&model, &lora(&model)?, &config);
            let begun = train(&model, state, &data, &Sft, &config, &mut first)?;
            assert!(begun.report.interrupted && begun.step == ends);
            let state = first.read(ends)?;
            assert_eq!(state.report, begun.report);
            let resumed = train(&model, state, &data, &Sft, &config, &mut quiet)?;
            assert_eq!(values(resumed.adaptation())?, values(whole.adaptation())?, "{packing}, {ends}");
            let losses = |state: &State| state.report.steps.iter().map(|step| step.loss.to_bits()).collect::<Vec<_>>();
            assert_eq!(losses(&resumed), losses(&whole));
            assert_eq!(resumed.report.evaluations, whole.report.evaluations);
        }
    }
    Ok(())
}

/// Somebody waits when the evaluation is due: it is made up for, and the scale that was asked for before it holds.
#[test]
fn a_rate_that_is_scaled_where_a_run_is_interrupted_stays_so() -> Result<()> {
    let (model, place) = (model("llama")?, TempDir::new()?);
    let rows = examples(&model, 30, 1);
    let (data, config) = (data(&rows, 5), TrainConfig { eval_steps: Some(4), ..config(11) });
    let mut whole = Saves::new(&model, &config, place.path(), 1000);
    whole.halves = Some(4);
    let whole = train(&model, State::new(&model, &lora(&model)?, &config), &data, &Sft, &config, &mut whole)?;
    let directory = place.path().join("interrupted");
    let mut first = Saves::new(&model, &config, &directory, 1000);
    (first.halves, first.ends) = (Some(4), Some(4));
    let begun = train(&model, State::new(&model, &lora(&model)?, &config), &data, &Sft, &config, &mut first)?;
    assert!(begun.report.interrupted && begun.step == 4);
    let mut second = Saves::new(&model, &config, &directory, 1000);
    second.saved = first.saved.clone();
    let resumed = train(&model, first.read(4)?, &data, &Sft, &config, &mut second)?;
    assert!(values(resumed.adaptation())? == values(whole.adaptation())?);
    assert_eq!(resumed.report.evaluations, whole.report.evaluations);
    // It is another rate that is compared.
    let directory = place.path().join("unscaled");
    let mut unscaled = Saves::new(&model, &config, &directory, 1000);
    let unscaled = train(&model, State::new(&model, &lora(&model)?, &config), &data, &Sft, &config, &mut unscaled)?;
    assert!(unscaled.report.steps[5].learning_rate > 1.9 * whole.report.steps[5].learning_rate);
    Ok(())
}

fn quiet(_: &StepReport, _: u64) -> Result<Control> {
    Ok(Control::Continue)
}

#[test]
fn saving_changes_no_bit() -> Result<()> {
    let (model, place) = (model("llama")?, TempDir::new()?);
    let rows = examples(&model, 20, 1);
    let (data, config) = (data(&rows, 3), config(9));
    let run = |observer: &mut dyn Observer| {
        train(&model, State::new(&model, &lora(&model)?, &config), &data, &Sft, &config, observer)
    };
    let unsaved = run(&mut quiet)?;
    let mut saves = Saves::new(&model, &config, place.path(), 1);
    let saved = run(&mut saves)?;
    assert_eq!(saves.saved, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(values(saved.adaptation())?, values(unsaved.adaptation())?);
    Ok(())
}

/// The held-out rows say nothing of the training rows, so that their loss soon rises.
#[test]
fn a_run_stops_when_the_held_out_loss_no_longer_falls_and_the_best_is_kept() -> Result<()> {
    let (model, place) = (model("llama")?, TempDir::new()?);
    let (trained, held_out) = (examples(&model, 6, 1), examples(&model, 9, 77));
    let data = Data::of_examples(&trained.iter().collect::<Vec<_>>(), &held_out.iter().collect::<Vec<_>>());
    let patience =
        TrainConfig { eval_steps: Some(2), early_stopping_patience: Some(3), learning_rate: 3e-2, ..config(400) };
    let mut saves = Saves::new(&model, &patience, place.path(), 1000);
    let state = train(&model, State::new(&model, &lora(&model)?, &patience), &data, &Sft, &patience, &mut saves)?;
    let report = &state.report;
    let losses: Vec<(u64, f64)> =
        report.evaluations.iter().filter(|eval| eval.step > 0).map(|eval| (eval.step, eval.evaluation.loss)).collect();
    let best = losses.iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a }).context("it was evaluated")?;
    assert_eq!(losses.last().map(|last| last.0), Some(best.0 + 6), "{losses:?}");
    assert!(report.stopped.as_deref().is_some_and(|why| why.contains("in 3 evaluations")), "{:?}", report.stopped);
    assert_eq!((report.kept_step, state.step), (Some(best.0), best.0));
    assert_eq!(report.after().map(|after| after.loss), Some(best.1));
    assert!(!report.interrupted);
    let of_best = saves.read(best.0)?;
    assert_eq!(values(state.adaptation())?, values(of_best.adaptation())?);
    // What the last step left, for who wants that.
    let last = TrainConfig { load_best_model_at_end: false, ..patience };
    let mut saves = Saves::new(&model, &last, place.path(), 1000);
    let state = train(&model, State::new(&model, &lora(&model)?, &last), &data, &Sft, &last, &mut saves)?;
    assert_eq!((state.report.kept_step, state.step), (None, best.0 + 6));
    Ok(())
}

/// Parameters that a step leaves at infinity, or so far off that the loss is worse than at the beginning.
#[test]
fn a_run_that_goes_wrong_is_taken_back_once_and_goes_on_with_half_the_rate() -> Result<()> {
    let (model, place) = (model("llama")?, TempDir::new()?);
    let rows = examples(&model, 20, 1);
    let data = data(&rows, 0);
    for (name, factor, planned) in [("infinite", f32::INFINITY, 12), ("diverges", -400.0, 90)] {
        let config = config(planned);
        let directory = place.path().join(name);
        let mut saves = Saves::new(&model, &config, &directory, 5);
        saves.harm = vec![(if planned == 12 { 8 } else { 40 }, factor)];
        let state = State::new(&model, &lora(&model)?, &config);
        let done = train(&model, state, &data, &Sft, &config, &mut saves)?;
        let [RunEvent { step, change: Change::Rewound { from, reason, rate_scale } }] = &saves.changes[..] else {
            panic!("{name}: {:?}", saves.changes);
        };
        assert_eq!(*rate_scale, 0.5);
        assert!(step < from && step.is_multiple_of(5), "{step} {from}: {reason}");
        assert_eq!(done.report.steps.len() as u64, planned);
        assert!(done.report.steps.iter().enumerate().all(|(at, report)| report.step == at as u64 + 1));
        // Half the rate, from there on.
        let rate = |step: u64, of: &State| of.report.steps[step as usize - 1].learning_rate;
        let before = saves.read(*step)?;
        assert_eq!(rate(*step, &done), rate(*step, &before));
        assert!(rate(*step + 1, &done) < 0.6 * rate(*step, &done), "{name}");
        let losses: Vec<f64> = done.report.steps.iter().map(|step| step.loss).collect();
        assert!(losses[losses.len() - 1] < losses[0], "{losses:?}");
    }
    Ok(())
}

#[test]
fn a_run_that_goes_wrong_again_ends_and_says_what_to_change() -> Result<()> {
    let (model, place) = (model("llama")?, TempDir::new()?);
    let rows = examples(&model, 20, 1);
    let data = data(&rows, 0);
    let config = config(40);
    let mut saves = Saves::new(&model, &config, place.path(), 5);
    saves.harm = vec![(8, f32::INFINITY), (8, f32::INFINITY)];
    let state = State::new(&model, &lora(&model)?, &config);
    let error = train(&model, state, &data, &Sft, &config, &mut saves).err().context("it cannot be trained")?;
    let rewinds = saves.changes.iter().filter(|event| matches!(event.change, Change::Rewound { .. })).count();
    assert_eq!(rewinds, 1, "{:?}", saves.changes);
    let broken = error.downcast::<Broken>()?;
    assert!(broken.reason.contains("try a lower learning rate"), "{}", broken.reason);
    let finite = |values: &[Vec<u32>]| values.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite());
    assert!(finite(&values(broken.state.adaptation())?));
    Ok(())
}

#[test]
fn a_checkpoint_that_is_damaged_is_refused_in_words() -> Result<()> {
    let (model, place) = (model("llama")?, TempDir::new()?);
    let rows = examples(&model, 12, 1);
    let (data, config) = (data(&rows, 0), config(3));
    let mut saves = Saves::new(&model, &config, place.path(), 3);
    train(&model, State::new(&model, &lora(&model)?, &config), &data, &Sft, &config, &mut saves)?;
    let path = saves.path(3);
    for (file, words) in [
        (checkpoint::STATE_FILE, "damaged"),
        (checkpoint::TENSORS_FILE, "training_state.safetensors"),
        ("adapter_model.safetensors", "adapter_model.safetensors"),
    ] {
        let whole = std::fs::read(path.join(file))?;
        for bytes in [&whole[..whole.len() / 2], &[][..]] {
            std::fs::write(path.join(file), bytes)?;
            let error = saves.read(3).err().map(|error| format!("{error:#}")).context("it is damaged")?;
            assert!(error.contains(words), "{file}: {error}");
        }
        std::fs::write(path.join(file), whole)?;
    }
    let text = std::fs::read_to_string(path.join(checkpoint::STATE_FILE))?;
    std::fs::write(path.join(checkpoint::STATE_FILE), text.replace("\"format\":1", "\"format\":9"))?;
    let error = saves.read(3).err().map(|error| format!("{error:#}")).context("a newer program wrote it")?;
    assert!(error.contains("format 9 is not known"), "{error}");
    Ok(())
}

/// Every worker has the whole step and its parameters, runs the passes that it is dealt, and adds their gradients where all meet.
#[test]
fn gradients_have_the_same_bytes_for_any_number_of_workers_and_however_passes_are_dealt() -> Result<()> {
    let model = model("llama")?;
    let rows = examples(&model, 23, 5);
    let numbered: Vec<Unit> = (0..).zip(&rows).map(|(number, row)| Unit::of(number, row)).collect();
    let batches: Vec<Batch> = numbered.chunks(3).map(Batch::of_units).collect();
    let config = config(1);
    for adaptation in [lora(&model)?, adapt("full", &json!({}), &model, 42)?] {
        let bits = |gradients: &Gradients| -> Result<Vec<u32>> {
            let mut bits = Vec::new();
            for gradient in (0..adaptation.params.len()).filter_map(|param| gradients.get(param)) {
                bits.extend(gradient.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
            }
            Ok(bits)
        };
        let alone = bits(&Run::new(&model, &adaptation, &config, 1).gradients(&batches)?.1)?;
        assert!(alone.len() >= adaptation.trainable_count());
        for workers in [1, 2, 3, 5, 20] {
            let reduce = Mutex::new(Reduce::new(batches.len()));
            // The first is dealt half of the passes and the last ones none.
            let dealt = |index: usize| if index < batches.len() / 2 { 0 } else { index % workers };
            let work = |worker: usize| -> Result<()> {
                let mut run = Run::new(&model, &adaptation, &config, 1);
                let whole = run.whole(&batches)?;
                // From the last on, so that leaves come in no order.
                for (index, batch) in batches.iter().enumerate().rev().filter(|(index, _)| dealt(*index) == worker) {
                    let (mut total, mut leaf) = (Outcome::default(), Gradients::new(adaptation.params.len()));
                    run.pass(batch, &whole, &mut total, &mut leaf)?;
                    reduce.lock().unwrap_or_else(PoisonError::into_inner).push(index, leaf)?;
                }
                Ok(())
            };
            let work = &work;
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..workers).map(|worker| scope.spawn(move || work(worker))).collect();
                threads.into_iter().try_for_each(|thread| thread.join().expect("a worker panicked"))
            })?;
            let sum = reduce.into_inner().unwrap_or_else(PoisonError::into_inner).finish()?;
            assert_eq!(bits(&sum)?, alone, "{workers} workers");
        }
    }
    Ok(())
}
