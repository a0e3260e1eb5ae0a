//! `homeroom eval`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use homeroom_engine::data::check_jsonl;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::evaluate_examples;
use serde_json::json;

use super::arguments::{COMPUTE, ModelArgs, RowArgs, one_of};
use super::{Done, print};
use crate::models::{Loaded, Network, is_here, load_rows};
use crate::near::exists;
use crate::progress;

/// Arguments of `eval`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// JSONL file of rows
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
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
    exists(&arguments.file)?;
    let reference = arguments.model.reference();
    if !is_here(&reference)? {
        check_jsonl(&arguments.file)?;
    }
    let Loaded { model, adaptation } = Loaded::load(&reference, Network::Allowed)?;
    let data = load_rows(&arguments.file, &model, arguments.rows.max_seq_len, arguments.rows.on_long_row)?;
    let examples: Vec<_> = data.examples.iter().collect();
    let bar = progress::counting("rows", examples.len());
    let result = evaluate_examples(&model, adaptation.as_deref(), &examples, arguments.compute, |done| {
        bar.set_position(done as u64)
    })?;
    bar.finish_and_clear();
    let (loss, perplexity, accuracy) = (result.loss, result.perplexity, result.token_accuracy);
    if arguments.json {
        let json = json!({
            "loss": loss,
            "perplexity": perplexity,
            "token_accuracy": accuracy,
            "trained_tokens": result.trained_tokens,
            "rows": result.examples,
        });
        print(&json.to_string())?;
    } else {
        let counted = progress::thousands(result.trained_tokens);
        print(&format!(
            "loss            {loss:.4}\nperplexity      {perplexity:.2}\ntoken accuracy  {accuracy:.3}   ({counted} tokens)"
        ))?;
    }
    Ok(Done::Whole)
}
