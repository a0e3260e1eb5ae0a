//! `homeroom export-model`.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use homeroom_engine::adapt::merge::{Floats, divergence, merge, save_model};
use homeroom_engine::files::{NewDirectory, replaceable, utf8, vacant};
use homeroom_engine::inference::generate::prompt_ids;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::plain::recipe::Pass;
use serde_json::json;

use super::arguments::{ModelArgs, Word, one_of};
use super::{Done, print, spares};
use crate::interrupt;
use crate::models::{Loaded, Network, here, last_part};
use crate::progress::line;

/// Arguments of `export-model`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Format of the export
    #[arg(long, value_enum, default_value = "merged", value_name = "FORMAT")]
    format: Format,
    /// Directory for the export [default: the model's name with -merged behind it, in the working directory]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Number format of the written weights [default: the base's, f32 where it is quantised]
    ///
    /// Weights are rounded to it, and in bf16 some of what a training changed is lost. The KL divergence that is printed is measured on a
    /// few questions of general knowledge; on rows like those of the training the loss is larger, and `homeroom eval` measures it.
    #[arg(long, value_name = "TYPE", value_parser = one_of::<Floats>(&DTYPES))]
    dtype: Option<Floats>,
    /// Replace an earlier export in that directory
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Format of an export.
#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A Hugging Face directory with the adapter merged into the base
    Merged,
}

const DTYPES: [Word; 6] = [
    ("f32", "32 bits; nothing is lost"),
    ("f16", "16 bits, 11 of them of precision"),
    ("bf16", "16 bits, 8 of them of precision"),
    ("float32", ""),
    ("float16", ""),
    ("bfloat16", ""),
];

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
pub fn run(arguments: &Arguments) -> Result<Done> {
    let Format::Merged = arguments.format;
    let output_dir = match &arguments.output_dir {
        Some(directory) => Cow::Borrowed(directory.as_path()),
        None => Cow::Owned(beside(&arguments.model.model_dir)),
    };
    utf8(&std::path::absolute(&output_dir)?)?;
    if !arguments.overwrite {
        vacant(&output_dir)?;
    }
    let Loaded { model, adaptation } = Loaded::load(&arguments.model.reference(), Network::Allowed)?;
    let adaptation = adaptation.with_context(|| {
        format!("{}: not an adapter, so there is nothing to merge; a model directory is what it would be exported as: use it as it is", arguments.model.model_dir.display())
    })?;
    let adapter = here(&arguments.model.model_dir)?.map(|located| located.path);
    spares(&output_dir, [("the base model", Some(model.path.clone())), ("the adapter", adapter)])?;
    if arguments.overwrite {
        replaceable(&output_dir)?;
    }
    if arguments.output_dir.is_none() {
        line(format_args!("export    merged, to {}   --output-dir chooses another directory", output_dir.display()));
    }
    interrupt::end_at_once()?;
    let mut directory = NewDirectory::start(&output_dir)?;
    directory.replaces = arguments.overwrite;
    let floats = arguments.dtype.map_or_else(|| Floats::of(&model), Ok)?;
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
    let same = if kl > FELT { "nearly as" } else { "as" };
    line(format_args!(
        "check     it answers {same} the unmerged model does: KL {kl:.1e} nats a token, in {}",
        floats.name()
    ));
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

/// `NAME-merged` in the working directory, for the model's name or the last part of its path.
fn beside(model: &Path) -> PathBuf {
    format!("{}-merged", last_part(model).unwrap_or_else(|| "model".to_owned())).into()
}
