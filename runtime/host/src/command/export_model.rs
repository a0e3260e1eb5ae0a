//! `homeroom export-model`.

use anyhow::{Context, Result, ensure};
use homeroom_engine::files::{NewDirectory, replaceable, vacant};
use homeroom_engine::generate::prompt_ids;
use homeroom_engine::merge::{Floats, divergence, merge, save_model};
use homeroom_engine::model::BaseModel;
use homeroom_engine::recipe::Pass;
use serde_json::json;

use super::{print, reference, spares};
use crate::cli::{Done, ExportFormat, ExportModel};
use crate::interrupt;
use crate::models::Loaded;
use crate::progress::line;
use crate::registry;

/// Texts that the export is compared with the trained model on.
const PROBES: [&str; 4] = [
    "What is the capital of France, and why did it become the capital?",
    "Explain photosynthesis to a ten-year-old in three sentences.",
    "If a train travels 120 kilometres in 90 minutes, how fast is it?",
    "Write a short poem about the sea in winter.",
];

/// A divergence in nats a token, on a few questions, from which on the loss on rows like those that were trained on can be seen to rise: by
/// some hundred times as much, as it is what was learned last that is rounded away.
const FELT: f64 = 1e-4;

/// Writes a trained model for other programs, and says how far its answers are from the trained model's.
pub fn run(arguments: &ExportModel) -> Result<Done> {
    let ExportFormat::Merged = arguments.format;
    if !arguments.overwrite {
        vacant(&arguments.output_dir)?;
    }
    let Loaded { model, adaptation } = Loaded::load(&reference(&arguments.model))?;
    let adaptation = adaptation.with_context(|| {
        format!("{}: not an adapter, so there is nothing to merge", arguments.model.model_dir.display())
    })?;
    let adapter = registry::resolve(&arguments.model.model_dir);
    spares(&arguments.output_dir, [("the base model", Some(model.path.clone())), ("the adapter", Some(adapter))])?;
    if arguments.overwrite {
        replaceable(&arguments.output_dir)?;
    }
    interrupt::end_at_once()?;
    let mut directory = NewDirectory::start(&arguments.output_dir)?;
    directory.replaces = arguments.overwrite;
    let floats = arguments.dtype.map_or_else(|| Floats::of(&model), |chosen| Ok(chosen.into()))?;
    save_model(&directory, &merge(&model, &adaptation)?, &model, floats)?;
    // Compared as it was written, so that rounding to the file's type counts.
    let written = BaseModel::load(directory.path()).context("the export cannot be read back")?;
    let sequences = PROBES.map(|probe| match model.template {
        Some(_) => prompt_ids(&model, &[json!({"role": "user", "content": probe})]),
        None => Ok(model.tokenizer.encode(probe, true)?.ids),
    });
    let sequences = sequences.into_iter().collect::<Result<Vec<_>>>()?;
    let trained = Pass::evaluation(&model, Some(&adaptation));
    let kl = divergence(&trained, &Pass::evaluation(&written, None), &sequences)?;
    drop(written);
    ensure!(
        kl.is_finite(),
        "the model's answers are no finite numbers, so nothing is saved; `homeroom eval` shows its loss"
    );
    let output_dir = directory.publish()?;
    line(format_args!("saved     {}", output_dir.display()));
    line(format_args!("KL        {kl:.2e} nats a token from the unmerged model, in {}", floats.name()));
    if kl > FELT && floats != Floats::F32 {
        let keeps = if floats == Floats::Bf16 {
            "`--dtype f16` (as small) and `--dtype f32` keep"
        } else {
            "`--dtype f32` keeps"
        };
        line(
            "          more of what was learned is rounded away on rows like those trained on: `homeroom eval` measures it,",
        );
        line(format_args!("          {keeps} it"));
    }
    if arguments.json {
        print(&json!({"output_dir": output_dir, "kl": kl, "dtype": floats.name()}).to_string())?;
    }
    Ok(Done::Whole)
}
