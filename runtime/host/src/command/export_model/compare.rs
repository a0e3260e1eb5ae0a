//! How far what was written answers from what was trained, on rows of the user or on a few questions.

use std::path::Path;

use anyhow::{Context, Result};
use homeroom_engine::data::{Example, Group, Source};
use homeroom_engine::difference::{Difference, Measured, difference};
use homeroom_engine::inference::generate::prompt_ids;
use homeroom_engine::models::BaseModel;
use homeroom_engine::train::objective::Kind;
use serde_json::json;

use super::super::rows;
use super::held_out::held_out;
use super::{Arguments, Export, Written};
use crate::models::load_rows;
use crate::progress;

/// Texts that an export is compared with the trained model on where the user gives no rows.
const PROBES: [&str; 4] = [
    "What is the capital of France, and why did it become the capital?",
    "Explain photosynthesis to a ten-year-old in three sentences.",
    "If a train travels 120 kilometres in 90 minutes, how fast is it?",
    "Write a short poem about the sea in winter.",
];
/// A divergence in nats a token, on a few questions, from which on the loss on rows like those that were trained on can be seen to rise: by
/// some hundred times as much, as it is what was learned last that is rounded away.
const FELT: f64 = 1e-4;
/// A divergence from which on every few answers are others.
const OTHERWISE: f64 = 5e-3;

/// Products that are spent where nobody named the rows,
const PRODUCTS_MAX: usize = 4_000_000_000_000;
/// unless so few tokens take more.
const TOKENS_MIN: usize = 256;

/// What an export is compared on.
pub struct Compared {
    examples: Vec<Example>,
    /// The rows, in words; `None`: our own questions.
    rows: Option<String>,
}

impl Compared {
    /// Of what is copied as it is.
    pub fn nothing() -> Self {
        Self { examples: Vec::new(), rows: None }
    }

    /// The rows of `--file`; else some of those that the run of the training held out; else a few questions. `result`: where what is exported
    /// lies.
    ///
    /// # Errors
    /// When a file is missing or a row is refused.
    pub fn of(arguments: &Arguments, model: &BaseModel, result: Option<&Path>) -> Result<Self> {
        if arguments.file.is_empty() {
            let held_out = result.and_then(|result| held_out(result, model)).map(|rows| few(rows, model));
            return match held_out.filter(|rows| !rows.is_empty()) {
                Some(examples) => {
                    let rows = Some(format!("{} held-out rows of the training", examples.len()));
                    Ok(Self { examples, rows })
                }
                None => Ok(Self { examples: questions(model)?, rows: None }),
            };
        }
        let sources = rows::to_measure_on(&arguments.file, Source::standard_input)?;
        let (limits, reading) = (&arguments.rows, arguments.rows.read.reading());
        let data = load_rows(&sources, &reading, model, limits.max_seq_len, limits.on_long_row, Kind::Sft)?;
        rows::tell(&data);
        let sequences = data.examples.into_iter().flat_map(|group: Group| group.sequences);
        Ok(Self { examples: sequences.collect(), rows: Some(rows::named(&arguments.file)) })
    }
}

/// The first of some rows, as many as a few cores compare in a minute or so: two passes of a model are 4 products a parameter and token.
fn few(rows: Vec<Example>, model: &BaseModel) -> Vec<Example> {
    let mut tokens = (PRODUCTS_MAX / (4 * model.parameter_count().max(1))).max(TOKENS_MIN);
    let fits = |row: &Example| {
        let fits = row.ids.len() <= tokens;
        tokens = tokens.saturating_sub(row.ids.len());
        fits
    };
    rows.into_iter().take_while(fits).collect()
}

/// A few questions as prompts. What comes after each is compared, too, and what it is does not matter.
fn questions(model: &BaseModel) -> Result<Vec<Example>> {
    let end = model.tokenizer.eos_id.or(model.tokenizer.bos_id).unwrap_or(0);
    let example = |probe| {
        // Some templates refuse a question alone; the model reads it all the same.
        let asked =
            model.template.as_ref().and_then(|_| prompt_ids(model, &[json!({"role": "user", "content": probe})]).ok());
        let mut ids = match asked {
            Some(ids) => ids,
            None => model.tokenizer.encode(probe, true)?.ids,
        };
        ids.push(end);
        let trained = vec![true; ids.len()];
        Ok(Example::new(ids, trained, 0))
    };
    PROBES.into_iter().map(example).collect()
}

/// Compares what was written, read back, with what was trained.
///
/// # Errors
/// When it cannot be read back, or a number is not finite.
pub fn compare(export: &Export<'_>, written: Measured<'_>) -> Result<Difference> {
    let Compared { examples, .. } = export.compared;
    let examples: Vec<&Example> = examples.iter().collect();
    let bar = progress::counting("compared", examples.len());
    let trained = (export.model, export.adaptation);
    let found = difference(trained, written, &examples, true, |done| {
        bar.set_position(done as u64);
        Ok(())
    });
    bar.finish_and_clear();
    found.context("the export and the trained model cannot be compared, so nothing is saved")
}

/// Says how far an export's answers are from the trained model's. `form`: what it is written in; `keeps`: what to do where too much is
/// rounded away.
pub fn tell(export: &Export<'_>, found: &Difference, form: &str, keeps: Option<&str>, written: &mut Written) {
    let Difference { loss, loss_other, kl, largest, tokens } = *found;
    let felt = kl > FELT;
    let same = match kl {
        kl if kl > OTHERWISE => "in part otherwise than",
        kl if kl > FELT => "nearly as",
        _ => "as",
    };
    let trained = if export.adaptation.is_some() { "the unmerged model" } else { "the base" };
    written.line(format!("check     it answers {same} {trained} does: KL {kl:.1e} nats a token, in {form}"));
    written.line(format!("          largest difference of a log-probability {largest:.1e}, over {tokens} tokens"));
    match &export.compared.rows {
        Some(rows) => {
            let change = match loss_other - loss {
                change if change.abs() < 5e-5 => "stays".to_owned(),
                change if change < 0.0 => format!("falls by {:.1e}, from {loss:.4} to", -change),
                change => format!("rises by {change:.1e}, from {loss:.4} to"),
            };
            written.line(format!("          loss on {rows} {change} {loss_other:.4}"));
            written.field("loss", loss);
            written.field("loss_exported", loss_other);
        }
        None if felt => written.line(
            "          on rows like those that will be asked it may be more: `--file` with such rows measures it,"
                .to_owned(),
        ),
        None => {}
    }
    if let Some(keeps) = keeps.filter(|_| felt) {
        written.line(format!("          {keeps} it"));
    }
    written.field("kl", kl);
    written.field("largest_difference", largest);
    written.field("compared_on", export.compared.rows.as_deref().unwrap_or("questions"));
    written.field("compared_tokens", tokens);
}
