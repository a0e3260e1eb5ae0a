//! From samples to an objective: what it knows of its units is gathered before the first step.

use std::path::Path;

use anyhow::{Result, ensure};

use super::{Dpo, Kind, Kto, Objective, ObjectiveConfig, Orpo, Reference, Sft, mismatched, reference_log_probs};
use crate::adapt::adaptation::Adaptation;
use crate::data::{Example, Sample};
use crate::models::BaseModel;
use crate::run::compute::Compute;
use crate::train::TrainConfig;

/// What an objective is made from.
pub struct Prepare<'a> {
    /// Which, and what it is told.
    pub objective: ObjectiveConfig,
    /// What is trained on: the units from 0.
    pub train: &'a [&'a Sample],
    /// What is held out: the units after them.
    pub held_out: &'a [&'a Sample],
    /// The base.
    pub model: &'a BaseModel,
    /// What is trained, with its first values.
    pub adaptation: &'a Adaptation,
    /// Whether the reference is the base with those values, as of an adapter that the training goes on from, or the base alone.
    pub adapted_reference: bool,
    /// What the run is told.
    pub config: &'a TrainConfig,
    /// Where the reference's log-probabilities are kept, and what names the reference: digests of base and adapter.
    pub kept: Option<(&'a Path, &'a str)>,
}

/// Makes the objective. Log-probabilities of the reference are read where they were kept, or computed and kept. `progress` hears how many
/// of how many sequences are done.
///
/// # Errors
/// When the samples are not those of the objective, or the reference cannot be computed or kept.
pub fn prepare(from: &Prepare<'_>, progress: &mut dyn FnMut(usize, usize)) -> Result<Box<dyn Objective>> {
    let Prepare { objective: config, train, held_out, .. } = from;
    config.check()?;
    let all = || train.iter().chain(*held_out).copied();
    let sequences = if matches!(config.objective, Kind::Dpo | Kind::Orpo) { 2 } else { 1 };
    let name = config.objective.name();
    ensure!(
        all().all(|sample| sample.sequences.len() == sequences),
        "{name} learns from rows with {sequences} answers"
    );
    ensure!(
        config.objective != Kind::Kto || all().all(|sample| sample.label.is_some()),
        "kto learns from rows with a label"
    );
    Ok(match config.objective {
        Kind::Sft => Box::new(Sft),
        Kind::Orpo => Box::new(Orpo::new(config.beta, all())),
        Kind::Dpo => {
            let [train, held_out] = [*train, *held_out].map(sequences_of);
            let reference = reference(from, &train, &held_out, progress)?;
            let pairs = reference.as_chunks::<2>().0;
            Box::new(Dpo { beta: config.beta, reference: pairs.to_vec() })
        }
        Kind::Kto => {
            let longest = from.model.architecture.max_position_embeddings;
            let per_step = from.config.per_step();
            ensure!(
                train.len() >= 2,
                "kto needs two rows or more: its reference point is taken from answers to other prompts"
            );
            let others = [*train, *held_out].map(|samples| mismatched(samples, per_step, longest));
            // Own answers first, then those that belong to others, of the rows that are trained on and of those held out alike.
            let [a, b] = [(*train, &others[0]), (*held_out, &others[1])]
                .map(|(samples, others)| sequences_of(samples).into_iter().chain(others).collect::<Vec<_>>());
            let all_log_probs = reference(from, &a, &b, progress)?;
            let (of_train, of_held_out) = all_log_probs.split_at(a.len());
            let [(own, other), (held_own, held_other)] = [of_train, of_held_out].map(|of| of.split_at(of.len() / 2));
            let [mut mismatched, held_mismatched] = others;
            mismatched.extend(held_mismatched);
            Box::new(Kto {
                beta: config.beta,
                desirable_weight: config.desirable_weight,
                undesirable_weight: config.undesirable_weight,
                labels: all().map(|sample| sample.label == Some(true)).collect(),
                reference: [own, held_own].concat(),
                mismatched,
                mismatched_reference: [other, held_other].concat(),
            })
        }
    })
}

fn sequences_of<'a>(samples: &'a [&'a Sample]) -> Vec<&'a Example> {
    samples.iter().flat_map(|sample| &sample.sequences).collect()
}

/// Log-probabilities of the reference, computed as each set is: what is trained on in the run's compute type, so that both sides of a ratio
/// round alike, and what is held out in f32, as it is evaluated.
fn reference(
    from: &Prepare<'_>,
    train: &[&Example],
    held_out: &[&Example],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<f64>> {
    let Prepare { model, adaptation, .. } = from;
    let compute = from.config.compute.resolved(Some(adaptation));
    let all: Vec<&Example> = train.iter().chain(held_out).copied().collect();
    let key = |name| Reference::key_of(name, &format!("{}, {} in f32", compute.name(), held_out.len()), &all);
    if let Some((path, name)) = from.kept
        && let Some(reference) = Reference::read(path, &key(name), all.len())?
    {
        return Ok(reference.log_probs);
    }
    let adaptation = from.adapted_reference.then_some(*adaptation);
    let mut log_probs = Vec::with_capacity(all.len());
    for (examples, compute) in [(train, compute), (held_out, Compute::F32)] {
        let before = log_probs.len();
        let mut done = |done| progress(before + done, all.len());
        log_probs.append(&mut reference_log_probs(model, adaptation, examples, compute, &mut done)?);
    }
    if let Some((path, name)) = from.kept {
        Reference { key: key(name), log_probs: log_probs.clone() }.write(path)?;
    }
    Ok(log_probs)
}
