//! From groups to an objective: what it knows of its units is gathered before the first step.

use std::path::Path;

use anyhow::{Error, Result, ensure};

use super::{Dpo, Kind, Kto, Objective, ObjectiveConfig, Orpo, Reference, Sft, mismatched, reference_log_probs};
use crate::adapt::adaptation::Adaptation;
use crate::data::{Example, Group};
use crate::models::BaseModel;
use crate::run::compute::Compute;
use crate::train::TrainConfig;

/// What an objective is made from.
pub struct Prepare<'a> {
    /// Which, and what it is told.
    pub objective: ObjectiveConfig,
    /// What is trained on: the units from 0.
    pub train: &'a [&'a Group],
    /// What is held out: the units after them.
    pub held_out: &'a [&'a Group],
    /// The base.
    pub model: &'a BaseModel,
    /// What is trained; `None`: nothing, the objective is to measure the base.
    pub adaptation: Option<&'a Adaptation>,
    /// The reference: the base with these values, as of an adapter that the training started from, or `None`, the base alone.
    pub reference: Option<&'a Adaptation>,
    /// What the run is told.
    pub config: &'a TrainConfig,
    /// Where the reference's log-probabilities are kept, and what names the base and how it is stored.
    pub kept: Option<(&'a Path, &'a str)>,
}

/// How many of how many sequences are done under the reference; an error ends that.
pub type Progress<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// Makes the objective. Log-probabilities of the reference are read where they were kept, or computed and kept.
///
/// # Errors
/// When the groups are not those of the objective, or the reference cannot be computed or kept; those of `progress`.
pub fn prepare(from: &Prepare<'_>, progress: &mut Progress<'_>) -> Result<Box<dyn Objective>> {
    let Prepare { objective: config, train, held_out, .. } = from;
    config.check()?;
    let all = || train.iter().chain(*held_out).copied();
    let sequences = if matches!(config.objective, Kind::Dpo | Kind::Orpo) { 2 } else { 1 };
    let name = config.objective.name();
    ensure!(all().all(|group| group.sequences.len() == sequences), "{name} learns from rows with {sequences} answers");
    ensure!(
        config.objective != Kind::Kto || all().all(|group| group.label.is_some()),
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
            let mut others = [*train, *held_out].map(|groups| mismatched(groups, per_step, longest));
            if let ([only], [first, ..]) = (&held_out[..], &train[..]) {
                // One row alone has no other beside it.
                others[1] = mismatched(&[only, first], 2, longest);
                others[1].truncate(1);
            }
            // Own answers first, then those that belong to others, of the rows that are trained on and of those held out alike.
            let [a, b] = [(*train, &others[0]), (*held_out, &others[1])]
                .map(|(groups, others)| sequences_of(groups).into_iter().chain(others).collect::<Vec<_>>());
            let all_log_probs = reference(from, &a, &b, progress)?;
            let (of_train, of_held_out) = all_log_probs.split_at(a.len());
            let [(own, other), (held_own, held_other)] = [of_train, of_held_out].map(|of| of.split_at(of.len() / 2));
            let [mut mismatched, held_mismatched] = others;
            mismatched.extend(held_mismatched);
            Box::new(Kto {
                beta: config.beta,
                desirable_weight: config.desirable_weight,
                undesirable_weight: config.undesirable_weight,
                labels: all().map(|group| group.label == Some(true)).collect(),
                reference: [own, held_own].concat(),
                mismatched,
                mismatched_reference: [other, held_other].concat(),
            })
        }
    })
}

fn sequences_of<'a>(groups: &'a [&'a Group]) -> Vec<&'a Example> {
    groups.iter().flat_map(|group| &group.sequences).collect()
}

/// Log-probabilities of the reference, computed as each set is: what is trained on in the run's compute type, so that both sides of a ratio
/// round alike, and what is held out in f32, as it is evaluated.
fn reference(
    from: &Prepare<'_>,
    train: &[&Example],
    held_out: &[&Example],
    progress: &mut Progress<'_>,
) -> Result<Vec<f64>> {
    let Prepare { model, adaptation, .. } = from;
    let compute = from.config.compute.resolved(*adaptation);
    let all: Vec<&Example> = train.iter().chain(held_out).copied().collect();
    let how = format!("{}, {} in f32", compute.name(), held_out.len());
    let kept =
        from.kept.map(|(path, base)| Ok::<_, Error>((path, Reference::key_of(base, from.reference, &how, &all)?)));
    let kept = kept.transpose()?;
    if let Some((path, key)) = &kept
        && let Some(reference) = Reference::read(path, key, all.len())?
    {
        return Ok(reference.log_probs);
    }
    let mut log_probs = Vec::with_capacity(all.len());
    for (examples, compute) in [(train, compute), (held_out, Compute::F32)] {
        let before = log_probs.len();
        let mut done = |done| progress(before + done, all.len());
        log_probs.append(&mut reference_log_probs(model, from.reference, examples, compute, &mut done)?);
    }
    let Some((path, key)) = kept else { return Ok(log_probs) };
    let reference = Reference { key, log_probs };
    reference.write(path)?;
    Ok(reference.log_probs)
}
