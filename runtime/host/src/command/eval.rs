//! `homeroom eval`.

use anyhow::Result;
use homeroom_engine::train::evaluate_examples;
use serde_json::json;

use super::{print, reference};
use crate::cli::{Done, Eval};
use crate::models::{Loaded, load_rows};
use crate::progress;

/// Measures a model on rows.
pub fn run(arguments: &Eval) -> Result<Done> {
    let Loaded { model, adaptation } = Loaded::load(&reference(&arguments.model))?;
    let data = load_rows(&arguments.file, &model, arguments.rows.max_seq_len, arguments.rows.on_long_row.into())?;
    let examples: Vec<_> = data.examples.iter().collect();
    let bar = progress::counting("rows", examples.len());
    let compute = arguments.compute.into();
    let result =
        evaluate_examples(&model, adaptation.as_deref(), &examples, compute, |done| bar.set_position(done as u64))?;
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
