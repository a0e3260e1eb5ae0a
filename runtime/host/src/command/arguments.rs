//! Arguments that several commands take, and how their values are read.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Error, Result};
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use homeroom_engine::data::OnLongRow;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{Kind, ObjectiveConfig};
use serde::Serialize;

use super::rows::ReadArgs;
use crate::models::ModelRef;
use crate::plugin::{Policy, Search, Trust};

/// The model that a command uses.
#[derive(Args)]
pub struct ModelArgs {
    /// Adapter, model directory, .gguf file, a name from `homeroom list-models`, or one on the Hugging Face hub as `owner/name`
    #[arg(long, visible_alias = "model-name", value_name = "MODEL")]
    pub model_dir: PathBuf,
    /// Base model of the adapter, if it has moved since the training
    #[arg(long, value_name = "MODEL")]
    pub base_model: Option<PathBuf>,
    /// Accept a base model with other weights than the adapter was trained on, if its shapes fit
    #[arg(long)]
    pub any_base: bool,
}

impl ModelArgs {
    /// The model that they name.
    pub fn reference(&self) -> ModelRef {
        let Self { model_dir, base_model, any_base } = self;
        ModelRef { name: model_dir.clone(), base_model: base_model.clone(), any_base: *any_base }
    }
}

/// Where strategies are found, and which of them may be loaded.
#[derive(Args)]
pub struct PluginArgs {
    /// Look for strategies in this directory first; may be repeated
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// Which strategies may be loaded [default: $HOMEROOM_PLUGIN_POLICY, else locked]
    #[arg(long, value_enum, value_name = "POLICY")]
    pub plugin_policy: Option<Policy>,
}

impl PluginArgs {
    /// The search that they ask for.
    ///
    /// # Errors
    /// When `plugins.lock` cannot be read or trusted.
    pub fn search(&self) -> Result<Search> {
        Ok(Search::new(&self.plugin_dir, Trust::of_user(self.plugin_policy)?))
    }
}

/// How rows are read and become tokens.
#[derive(Args, Serialize)]
pub struct RowArgs {
    /// How they are read.
    #[command(flatten)]
    #[serde(flatten)]
    pub read: ReadArgs,
    /// Most tokens of one row [default: the model's context, at most 2048]
    #[arg(long, alias = "seq-len", value_name = "TOKENS", value_parser = whole::<usize>(2..=COUNT_MAX))]
    pub max_seq_len: Option<usize>,
    /// What happens to a longer row
    #[arg(long, default_value = "refuse", value_name = "WHAT", value_parser = one_of::<OnLongRow>(&LONG_ROW))]
    pub on_long_row: OnLongRow,
}

/// What is learned from rows, or measured on them.
#[derive(Args, Serialize)]
pub struct ObjectiveArgs {
    /// What is learned, and from which rows
    #[arg(long, default_value = "sft", value_name = "NAME", value_parser = one_of::<Kind>(&OBJECTIVES))]
    pub objective: Kind,
    /// Of dpo and kto, how closely the model is kept to its reference; of orpo, what the preference weighs [default: 0.1]
    #[arg(long, value_name = "BETA", value_parser = above_zero)]
    pub beta: Option<f64>,
    /// Of kto, what an answer weighs that was rated good [default: 1]
    #[arg(long, value_name = "WEIGHT", value_parser = above_zero)]
    pub desirable_weight: Option<f64>,
    /// Of kto, what an answer weighs that was rated bad [default: 1]
    #[arg(long, value_name = "WEIGHT", value_parser = above_zero)]
    pub undesirable_weight: Option<f64>,
}

impl ObjectiveArgs {
    /// The objective that they ask for.
    ///
    /// # Errors
    /// When an option is not one of the objective's.
    pub fn config(&self) -> Result<ObjectiveConfig> {
        let Self { objective, beta, desirable_weight, undesirable_weight } = *self;
        ObjectiveConfig::given(objective, beta, desirable_weight, undesirable_weight)
    }
}

pub const OBJECTIVES: [Word; 4] = [
    ("sft", "The answers of the rows: `messages`, `prompt` and `completion`, or `text`"),
    ("dpo", "To prefer one answer to another: `prompt`, `chosen` and `rejected`, as against the base"),
    ("kto", "To give answers that were rated good, and none that were rated bad: `prompt`, `completion` and `label`"),
    (
        "orpo",
        "The chosen answer, and to prefer it: `prompt`, `chosen` and `rejected`, from a base that is not tuned yet",
    ),
];

const LONG_ROW: [Word; 3] = [
    ("refuse", "The file is refused; the message names the lines"),
    ("truncate", "The row is cut at the limit"),
    ("skip", "The row is left out"),
];

/// What `--compute` may be in training and evaluation.
pub const COMPUTE: [Word; 4] = [
    ("auto", "What the strategy proposes, else the faster of bf16 and f32 on this processor"),
    ("bf16", "Activations in bf16"),
    ("f32", "Activations in f32"),
    (
        "int8",
        "Frozen weights are multiplied in integers where possible: they and their inputs are rounded to 8 bits in groups of 64. The rest is as with bf16, or f32 where the processor lacks it",
    ),
];

/// What answers are computed in, for commands whose handlers may say so instead: those of a file do.
#[derive(Args)]
pub struct AnswerArgs {
    /// Number format of the products
    #[arg(
        long,
        default_value = "auto",
        value_name = "FORMAT",
        conflicts_with = "config",
        requires = "model_dir",
        value_parser = one_of::<Compute>(&ANSWER_COMPUTE)
    )]
    pub compute: Compute,
}

/// What `--compute` may be in answers.
pub const ANSWER_COMPUTE: [Word; 3] = [
    (
        "auto",
        "Prompts in the fastest of bf16, f32 and, of quantised weights, 8 bits on this processor; new tokens in 8 bits where weights are quantised",
    ),
    ("bf16", "Prompts in bf16, new tokens as with auto"),
    ("f32", "Everything in f32"),
];

/// The largest count that is taken: rows of a pass are counted in 32 bits.
pub const COUNT_MAX: u64 = u32::MAX as u64;

/// A word that an option takes, and what it does; one without the latter is another spelling, which help does not list.
pub type Word = (&'static str, &'static str);

/// Reads one of some words.
pub fn one_of<T>(words: &'static [Word]) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = Error> + Clone + Send + Sync + 'static,
{
    word(words).try_map(|word| word.parse::<T>())
}

/// Takes one of some words.
pub fn word(words: &'static [Word]) -> PossibleValuesParser {
    let values = words.iter().map(|(word, help)| PossibleValue::new(*word).help(*help).hide(help.is_empty()));
    PossibleValuesParser::new(values)
}

/// Reads a whole number in a range.
pub fn whole<T: TryFrom<u64>>(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let (least, most) = (*range.start(), *range.end());
        let number = text.parse::<u128>().ok();
        if number.is_some_and(|number| number > most.into()) {
            return Err(format!("it should be at most {most}"));
        }
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| match most {
            ..1_000_000 => format!("it should be a whole number from {least} to {most}"),
            _ => format!("it should be a whole number from {least}"),
        })
    }
}

/// Reads a number from 0 and below 1.
pub fn share(text: &str) -> Result<f64, String> {
    number(text, |number| (0.0..1.0).contains(&number), "a number from 0 and below 1")
}

/// Reads a number from 0.
pub fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |number| number >= 0.0, "a number from 0")
}

/// Reads a learning rate.
pub fn rate(text: &str) -> Result<f64, String> {
    number(text, |number| number > 0.0 && number <= 10.0, "a number above 0 and at most 10, such as 2e-4")
}

/// Reads a number above 0.
pub fn above_zero(text: &str) -> Result<f64, String> {
    number(text, |number| number > 0.0 && (number as f32).is_finite(), "a number above 0 that f32 holds, such as 32")
}

fn number(text: &str, admits: impl Fn(f64) -> bool, words: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && admits(*number));
    number.ok_or_else(|| format!("it should be {words}"))
}

/// Reads a seed of either sign.
pub fn signed(text: &str) -> Result<i64, String> {
    text.parse().map_err(|_| "it should be a whole number".to_owned())
}

/// Reads `NAME=VALUE`.
pub fn name_value(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it should be NAME=VALUE")?;
    Ok((name.trim().to_owned(), value.to_owned()))
}

/// Reads `KEY=VALUE`, the value being JSON or else a text.
pub fn key_value(text: &str) -> Result<(String, serde_json::Value), String> {
    let (key, value) = text.split_once('=').ok_or("it should be KEY=VALUE")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((key.to_owned(), value))
}
