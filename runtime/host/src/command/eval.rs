//! `homeroom eval`.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use homeroom_engine::data::{Group, Source, check_rows};
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{Prepare, Rewards, prepare};
use homeroom_engine::train::{Data, TrainConfig, evaluate_units};
use serde_json::json;

use super::arguments::{COMPUTE, ModelArgs, ObjectiveArgs, RowArgs, one_of};
use super::{Done, print, rows};
use crate::models::{Loaded, Network, is_here, load_rows};
use crate::progress;

/// Arguments of `eval`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Files of rows (JSONL, JSON, CSV, TSV, also as .gz), a folder, whose held-out rows are taken, or `-` for the standard input
    #[arg(long, required = true, value_name = "FILE", num_args = 1..)]
    file: Vec<PathBuf>,
    #[command(flatten)]
    objective: ObjectiveArgs,
    #[command(flatten)]
    rows: RowArgs,
    /// Number format of the products
    #[arg(long, default_value = "f32", value_name = "FORMAT", value_parser = one_of::<Compute>(&COMPUTE))]
    compute: Compute,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Measures a model on rows.
pub fn run(arguments: &Arguments) -> Result<Done> {
    // Before a model is loaded, or downloaded.
    let objective = arguments.objective.config()?;
    let kind = objective.objective;
    let (files, reading) =
        (rows::to_measure_on(&arguments.file, Source::standard_input)?, arguments.rows.read.reading());
    let reference = arguments.model.reference();
    if !is_here(&reference)? {
        check_rows(&files, &reading, kind.rows(), kind.name())?;
    }
    let Loaded { model, adaptation } = Loaded::load(&reference, Network::Allowed)?;
    let adaptation = adaptation.as_deref();
    ensure!(
        !kind.has_reference() || adaptation.is_some(),
        "{}: {} measures an adapter against its base, and this is none",
        arguments.model.model_dir.display(),
        kind.name()
    );
    let RowArgs { max_seq_len, on_long_row, .. } = arguments.rows;
    let data = load_rows(&files, &reading, &model, max_seq_len, on_long_row, kind)?;
    rows::tell(&data);
    let groups: Vec<&Group> = data.examples.iter().collect();
    let from = Prepare {
        objective,
        train: &groups,
        held_out: &[],
        model: &model,
        adaptation,
        reference: None,
        config: &TrainConfig { compute: arguments.compute, ..TrainConfig::default() },
        kept: None,
    };
    let mut bar = None;
    let objective = prepare(&from, &mut |done, all| {
        let bar = bar.get_or_insert_with(|| progress::counting("reference", all));
        bar.set_position(done as u64);
        Ok(())
    })?;
    bar.into_iter().for_each(|bar| bar.finish_and_clear());
    let units = Data::of_groups(&groups, &[]).units;
    let bar = progress::counting("rows", units.len());
    let result = evaluate_units(&model, adaptation, &units, &*objective, arguments.compute, |done| {
        bar.set_position(done as u64)
    })?;
    bar.finish_and_clear();
    let (loss, perplexity, accuracy) = (result.loss, result.perplexity, result.token_accuracy);
    if arguments.json {
        let mut json = json!({
            "objective": kind.name(),
            "loss": loss,
            "perplexity": perplexity,
            "token_accuracy": accuracy,
            "trained_tokens": result.trained_tokens,
            "rows": result.examples,
        });
        if let Some(rewards) = result.rewards {
            json["rewards"] = json!(rewards);
        }
        print(&json.to_string())?;
    } else {
        if let Some(Rewards { chosen, rejected, accuracy, margin }) = result.rewards {
            return print(&format!(
                "loss             {loss:.4}   {}, {} rows\nreward accuracy  {accuracy:.3}\nreward margin    {margin:.4}   {chosen:.4} for good answers, {rejected:.4} for bad ones",
                arguments.objective.config()?.words(),
                progress::thousands(result.examples),
            ))
            .map(|()| Done::Whole);
        }
        let counted = progress::thousands(result.trained_tokens);
        print(&format!(
            "loss            {loss:.4}\nperplexity      {perplexity:.2}\ntoken accuracy  {accuracy:.3}   ({counted} tokens)"
        ))?;
    }
    Ok(Done::Whole)
}
