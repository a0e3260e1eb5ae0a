//! The command line. stdout is the result, stderr the story.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use homeroom_engine::block::Compute;
use homeroom_engine::data::OnLongRow;
use homeroom_engine::files::keep_private;
use homeroom_engine::merge::Floats;
use homeroom_engine::requantize::StoredAs;
use homeroom_engine::schedule::Schedule;
use homeroom_kernels::{Codec, Cpu};

use crate::command;
use crate::plugin::{Policy, Search, Trust, probe};
use crate::{interrupt, progress, registry, stdout, terminal};

/// Fine-tunes open-weight language models on your own machine.
///
/// Exit codes: 0 done, 1 failed (the message says where, what and what next), 2 the command line is wrong, 130 interrupted.
#[derive(Parser)]
#[command(name = "homeroom", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Trains a model on rows of text or conversations, and saves an adapter
    FineTune(Box<FineTune>),
    /// Runs a pipeline: a Lua script that a TOML file declares
    Run(Run),
    /// Measures loss, perplexity and token accuracy on a file of rows
    Eval(Eval),
    /// Talks with a model, or answers one prompt; the reply alone goes to stdout
    Chat(Chat),
    /// Lists the models that were trained here
    ListModels(ListModels),
    /// Writes a trained model in a form that other programs load
    ExportModel(ExportModel),
    /// Serves models to programs that speak OpenAI's API, on this machine
    Serve(Serve),
    /// Lists, writes, builds, checks and locks training strategies
    #[command(subcommand)]
    Plugins(Plugins),
    /// Measures speed and memory
    #[command(subcommand)]
    Bench(Bench),
}

/// Where a model is.
#[derive(Args)]
pub struct ModelArgs {
    /// Adapter, model directory or .gguf file
    #[arg(long, value_name = "DIR")]
    pub model_dir: PathBuf,
    /// Base model of the adapter, if it is not where it was trained
    #[arg(long, value_name = "MODEL")]
    pub base_model: Option<PathBuf>,
    /// Take a base model with other weights than the adapter was trained on, if its shapes fit
    #[arg(long)]
    pub any_base: bool,
}

/// Where strategies are, and which may be loaded.
#[derive(Args)]
pub struct PluginArgs {
    /// Look for strategies here first
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// Which strategies may be loaded [default: $HOMEROOM_PLUGIN_POLICY, else locked]
    #[arg(long, value_enum)]
    pub plugin_policy: Option<Policy>,
}

impl PluginArgs {
    /// The search that they ask for.
    ///
    /// # Errors
    /// When what the user trusts cannot be read.
    pub fn search(&self) -> Result<Search> {
        Ok(Search::new(&self.plugin_dir, Trust::of_user(self.plugin_policy)?))
    }
}

/// How rows become tokens.
#[derive(Args)]
pub struct RowArgs {
    /// Tokens that a row may have [default: the model's context, at most 2048]
    #[arg(long, value_name = "N", value_parser = at_least_two)]
    pub max_seq_len: Option<usize>,
    /// What to do with a longer row
    #[arg(long, value_enum, default_value = "refuse")]
    pub on_long_row: LongRow,
}

/// What to do with a row that is too long.
#[derive(Clone, Copy, ValueEnum)]
#[allow(missing_docs)]
pub enum LongRow {
    /// Refuse the file, naming the lines
    Refuse,
    /// Keep its beginning
    Truncate,
    /// Leave it out
    Skip,
}

impl From<LongRow> for OnLongRow {
    fn from(choice: LongRow) -> Self {
        match choice {
            LongRow::Refuse => Self::Refuse,
            LongRow::Truncate => Self::Truncate,
            LongRow::Skip => Self::Skip,
        }
    }
}

/// Shape of the learning rate.
#[derive(Clone, Copy, ValueEnum)]
#[allow(missing_docs)]
pub enum Scheduler {
    Cosine,
    Linear,
    Constant,
}

impl From<Scheduler> for Schedule {
    fn from(choice: Scheduler) -> Self {
        match choice {
            Scheduler::Cosine => Self::Cosine,
            Scheduler::Linear => Self::Linear,
            Scheduler::Constant => Self::Constant,
        }
    }
}

/// What products are computed in.
#[derive(Clone, Copy, ValueEnum)]
#[allow(missing_docs)]
pub enum ComputeArg {
    /// What the strategy proposes, else the faster one on this processor: bf16 or f32
    Auto,
    /// Activations in bf16
    Bf16,
    /// Activations in f32
    F32,
    /// As bf16 (f32 where the processor lacks it), with frozen weights multiplied in integers where that is possible:
    /// they and their inputs are rounded to 8 bits in groups of 64
    Int8,
}

impl From<ComputeArg> for Compute {
    fn from(choice: ComputeArg) -> Self {
        match choice {
            ComputeArg::Auto => Self::Auto,
            ComputeArg::Bf16 => Self::Bf16,
            ComputeArg::F32 => Self::F32,
            ComputeArg::Int8 => Self::Int8,
        }
    }
}

/// What answers are computed in.
#[derive(Clone, Copy, ValueEnum)]
pub enum ReadIn {
    /// Prompts in the faster of bf16 and f32 on this processor; drawn tokens in 8 bits where weights are quantised
    Auto,
    /// Prompts in bf16, drawn tokens as with auto
    Bf16,
    /// All in f32
    F32,
}

impl From<ReadIn> for Compute {
    fn from(choice: ReadIn) -> Self {
        match choice {
            ReadIn::Auto => Self::Auto,
            ReadIn::Bf16 => Self::Bf16,
            ReadIn::F32 => Self::F32,
        }
    }
}

/// Arguments of `fine-tune`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct FineTune {
    /// Base model: a Hugging Face directory or a .gguf file
    #[arg(long, value_name = "MODEL")]
    pub model_name: PathBuf,
    /// JSONL file of rows: messages, prompt and completion, or text
    #[arg(long, value_name = "FILE")]
    pub training_file: PathBuf,
    /// Directory that is written: an adapter, or a model for strategy `full`
    #[arg(long, value_name = "DIR", required_unless_present = "name", conflicts_with = "name")]
    pub output_dir: Option<PathBuf>,
    /// Name in `homeroom list-models`, in place of a directory
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Replace what is there of that directory or name
    #[arg(long)]
    pub overwrite: bool,
    /// Training strategy, see `homeroom plugins list`
    #[arg(long, default_value = "lora", value_name = "NAME")]
    pub strategy: String,
    /// Passes over the rows
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub epochs: u64,
    /// End after so many steps, wherever the epoch is
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_steps: Option<u64>,
    /// Peak learning rate [default: what the strategy proposes, else 2e-4]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub learning_rate: Option<f64>,
    /// Shape of the learning rate after warm-up
    #[arg(long, value_enum, default_value = "cosine")]
    pub lr_scheduler_type: Scheduler,
    /// Share of the steps that warm up
    #[arg(long, default_value_t = 0.03, value_name = "SHARE", value_parser = share)]
    pub warmup_ratio: f64,
    /// Weight decay
    #[arg(long, default_value_t = 0.0, value_name = "X", value_parser = share)]
    pub weight_decay: f64,
    /// Bound on the norm of the gradients; 0: none
    #[arg(long, default_value_t = 1.0, value_name = "NORM", value_parser = not_negative)]
    pub max_grad_norm: f64,
    /// Rank of the adapter [default: 16]
    #[arg(long, alias = "r", value_name = "R")]
    pub lora_r: Option<u64>,
    /// Strength of the adapter [default: 2 r]
    #[arg(long, value_name = "ALPHA", value_parser = above_zero)]
    pub lora_alpha: Option<f64>,
    /// Dropout on the adapter's input [default: 0]
    #[arg(long, value_name = "P", value_parser = share)]
    pub lora_dropout: Option<f64>,
    /// Adapted modules: all-linear, names separated by commas, or one regular expression [default: all-linear]
    #[arg(long, value_name = "NAMES")]
    pub target_modules: Option<String>,
    /// Any other option of the strategy, its value as JSON or text; see `homeroom plugins list`
    #[arg(long = "set-option", value_name = "KEY=VALUE", value_parser = key_value)]
    pub options: Vec<(String, serde_json::Value)>,
    /// Start from the weights of this adapter
    #[arg(long, value_name = "DIR")]
    pub init_from: Option<PathBuf>,
    /// Rows in one forward and backward pass
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_size: u32,
    /// Batches in one step
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub gradient_accumulation_steps: u32,
    /// Save memory: keep only the input of each layer and run it again in the backward pass
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Run each batch as a pass of its own; else passes are filled with the rows of a step as they fit
    #[arg(long)]
    pub no_packing: bool,
    /// Encode a base that is quantised already (GGUF) anew as the strategy asks; else it keeps its storage
    #[arg(long)]
    pub requantize: bool,
    /// What products are computed in
    #[arg(long, value_enum, default_value = "auto")]
    pub compute: ComputeArg,
    #[command(flatten)]
    pub rows: RowArgs,
    /// Held-out rows to evaluate on, before and after
    #[arg(long, value_name = "FILE", conflicts_with = "eval_fraction")]
    pub eval_file: Option<PathBuf>,
    /// Share of the training rows to hold out and evaluate on
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub eval_fraction: Option<f64>,
    /// Seed of the order, the first values and dropout
    #[arg(long, default_value_t = 42, value_name = "N")]
    pub seed: u64,
    /// Take the rows in the order of the file
    #[arg(long)]
    pub no_shuffle: bool,
    /// Watch the strategy's file, and go on with a new build of it between two steps
    #[arg(long)]
    pub watch_plugins: bool,
    #[command(flatten)]
    pub plugins: PluginArgs,
    /// Print one JSON object at the end
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `run`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct Run {
    /// TOML file with a [pipeline]
    #[arg(value_name = "CONFIG")]
    pub config: PathBuf,
    /// Set a parameter of the pipeline
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_value)]
    pub set: Vec<(String, String)>,
    /// Only say what is wrong with the file and its script
    #[arg(long, conflicts_with = "dry_run")]
    pub check: bool,
    /// Walk the script and say what it would do, without training or writing
    #[arg(long)]
    pub dry_run: bool,
    /// Run again when the file or a script beside its script is saved, and go on with new builds of a strategy that trains
    #[arg(long, conflicts_with_all = ["check", "json"])]
    pub watch: bool,
    #[command(flatten)]
    pub plugins: PluginArgs,
    /// Print what the script returns as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `eval`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct Eval {
    #[command(flatten)]
    pub model: ModelArgs,
    /// JSONL file of rows
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub rows: RowArgs,
    /// What products are computed in
    #[arg(long, value_enum, default_value = "f32")]
    pub compute: ComputeArg,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `chat`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct Chat {
    #[command(flatten)]
    pub model: Option<ModelArgs>,
    /// Handler or route to talk with, of the file that --config names
    #[arg(
        long,
        value_name = "NAME",
        required_unless_present = "model_dir",
        conflicts_with = "model_dir",
        requires = "config"
    )]
    pub handler: Option<String>,
    /// File of handlers and routes, such as configs/handlers.toml
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What the user says; without it the lines of stdin are a conversation, `/help` in it says more
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// What the system message says
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Longest reply, in tokens
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = at_least_one)]
    pub max_tokens: usize,
    /// 0: always the likeliest word; higher is freer [default: the handler's, 0.7 for models of this machine]
    #[arg(long, value_name = "T", value_parser = not_negative)]
    pub temperature: Option<f64>,
    /// Seed of the draw [default: the handler's, 42 with --model-dir]
    #[arg(long, value_name = "N")]
    pub seed: Option<i64>,
    /// What answers are computed in
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "config")]
    pub compute: ReadIn,
}

/// Arguments of `serve`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct Serve {
    #[command(flatten)]
    pub model: Option<ModelArgs>,
    /// File of handlers; its routes are what clients name as `model`
    #[arg(long, value_name = "FILE", required_unless_present = "model_dir", conflicts_with = "model_dir")]
    pub config: Option<PathBuf>,
    /// What answers are computed in
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "config")]
    pub compute: ReadIn,
    /// Port; 0: a free one
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    pub port: u16,
    /// Address of this machine to listen on
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    pub host: String,
}

/// Arguments of `list-models`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct ListModels {
    /// Print one JSON array
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `export-model`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct ExportModel {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Form of the export
    #[arg(long, value_enum)]
    pub format: ExportFormat,
    /// Directory that is written
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    /// Floats that are written [default: the base's, f32 where it is quantised]
    ///
    /// What training changed is rounded to them, and bf16 loses some of that. The KL divergence that is printed is over a few questions of
    /// general knowledge; on rows like those that were trained on the loss is larger, and `homeroom eval` measures it.
    #[arg(long, value_enum)]
    pub dtype: Option<FloatsArg>,
    /// Replace the output directory if it is there
    #[arg(long)]
    pub overwrite: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    pub json: bool,
}

/// Floats of an export.
#[derive(Clone, Copy, ValueEnum)]
pub enum FloatsArg {
    /// 32 bits: nothing is lost
    #[value(alias = "float32")]
    F32,
    /// 16 bits, as transformers' float16
    #[value(alias = "float16")]
    F16,
    /// 16 bits, as transformers' bfloat16
    #[value(alias = "bfloat16")]
    Bf16,
}

impl From<FloatsArg> for Floats {
    fn from(choice: FloatsArg) -> Self {
        match choice {
            FloatsArg::F32 => Self::F32,
            FloatsArg::F16 => Self::F16,
            FloatsArg::Bf16 => Self::Bf16,
        }
    }
}

/// Form of an export.
#[derive(Clone, Copy, ValueEnum)]
pub enum ExportFormat {
    /// A Hugging Face directory with the adapter merged into the base
    Merged,
}

/// Subcommands of `bench`.
#[derive(Subcommand)]
pub enum Bench {
    /// Trains on random tokens, all of them, and prints tokens a second, the share of the processor's limit, and peak memory
    Train(Box<BenchTrain>),
    /// Reads a prompt of random tokens and prints tokens a second and the share of the processor's limit
    Prefill(BenchPrefill),
    /// Draws tokens and prints tokens a second and the share of what memory yields
    Decode(BenchDecode),
}

/// What `bench prefill` and `bench decode` have in common.
#[derive(Args)]
#[allow(missing_docs)]
pub struct BenchModel {
    #[command(flatten)]
    pub model: ModelArgs,
    /// What answers are computed in
    #[arg(long, value_enum, default_value = "auto")]
    pub compute: ReadIn,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `bench prefill`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct BenchPrefill {
    #[command(flatten)]
    pub model: BenchModel,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = at_least_two)]
    pub tokens: usize,
    /// How often it is read, after once that is not counted
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
}

/// Arguments of `bench decode`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct BenchDecode {
    #[command(flatten)]
    pub model: BenchModel,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = at_least_two)]
    pub prompt: usize,
    /// Tokens that are drawn
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = at_least_two)]
    pub tokens: usize,
    /// Chats that are answered at once
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub chats: u32,
}

/// How a base is stored.
#[derive(Clone, Copy, ValueEnum)]
pub enum StorageArg {
    /// 16-bit floats
    Bf16,
    /// 32-bit floats
    F32,
    /// 4-bit NormalFloat in blocks of 64, with double quantisation
    Nf4,
    /// 8-bit integers by rows
    Int8,
}

impl From<StorageArg> for StoredAs {
    fn from(choice: StorageArg) -> Self {
        match choice {
            StorageArg::Bf16 => Self::Bf16,
            StorageArg::F32 => Self::F32,
            StorageArg::Nf4 => Self::Codec(Codec::nf4()),
            StorageArg::Int8 => Self::Codec(Codec::int8()),
        }
    }
}

/// Arguments of `bench train`.
#[derive(Args)]
#[allow(missing_docs)]
pub struct BenchTrain {
    /// Base model: a Hugging Face directory or a .gguf file
    #[arg(long, value_name = "MODEL")]
    pub model_name: PathBuf,
    /// Training strategy, see `homeroom plugins list`
    #[arg(long, default_value = "lora", value_name = "NAME")]
    pub strategy: String,
    /// Rank of the adapter [default: 16]
    #[arg(long, alias = "r", value_name = "R")]
    pub lora_r: Option<u64>,
    /// Any other option of the strategy, its value as JSON or text
    #[arg(long = "set-option", value_name = "KEY=VALUE", value_parser = key_value)]
    pub options: Vec<(String, serde_json::Value)>,
    /// Rows of a step
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_size: u32,
    /// Tokens of a row
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = at_least_two)]
    pub seq_len: usize,
    /// Steps that are measured
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..1_000_000))]
    pub steps: u32,
    /// Steps before that
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(..1_000_000))]
    pub warmup: u32,
    /// What products are computed in
    #[arg(long, value_enum, default_value = "auto")]
    pub compute: ComputeArg,
    /// How the base is stored: its linear layers through a codec, or all of it as floats [default: as it is]
    #[arg(long, value_enum)]
    pub storage: Option<StorageArg>,
    /// Keep only the input of each layer and run it again in the backward pass
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Print where the time goes, by operation
    #[arg(long)]
    pub profile: bool,
    #[command(flatten)]
    pub plugins: PluginArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Subcommands of `plugins`.
#[derive(Subcommand)]
#[allow(missing_docs)]
pub enum Plugins {
    /// Name, version, digest and file of each strategy, whether it may be loaded, and its options
    List {
        #[command(flatten)]
        plugins: PluginArgs,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Writes a new strategy: a crate that builds without a network
    New {
        /// Its name: small letters, digits and underscores
        name: String,
        /// Where it is written [default: NAME, here]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Checks a strategy's file: that it loads, plans, learns, merges and saves as it should. Exit code 1 if anything failed
    Check {
        /// Its library, such as target/release/libNAME.so. Its code is run
        file: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Builds a strategy's crate now and whenever its source is saved; a training with --watch-plugins takes the result over
    Watch {
        /// Directory of the crate
        #[arg(value_name = "CRATE")]
        dir: PathBuf,
    },
    /// Trusts strategies as their files are now: writes their digests into plugins.lock. Their code is run, to ask their versions
    Lock {
        /// Strategies [default: all that are found and not beside the program]
        name: Vec<String>,
        /// Look here first
        #[arg(long, value_name = "DIR")]
        plugin_dir: Vec<PathBuf>,
    },
    /// Loads a strategy and answers another process of this program
    #[command(hide = true)]
    Probe { file: PathBuf, deadline_s: u32 },
}

fn share(text: &str) -> Result<f64, String> {
    number(text, |number| (0.0..1.0).contains(&number), "a number from 0 and below 1")
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |number| number >= 0.0, "a number from 0")
}

fn rate(text: &str) -> Result<f64, String> {
    number(text, |number| number > 0.0 && number <= 10.0, "a number above 0 and at most 10, such as 2e-4")
}

fn above_zero(text: &str) -> Result<f64, String> {
    number(text, |number| number > 0.0 && (number as f32).is_finite(), "a number above 0 that f32 holds, such as 32")
}

fn number(text: &str, admits: impl Fn(f64) -> bool, words: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && admits(*number));
    number.ok_or_else(|| format!("it should be {words}"))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number >= 1);
    number.ok_or_else(|| "it should be a whole number from 1".to_owned())
}

fn at_least_two(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number >= 2);
    number.ok_or_else(|| "it should be a whole number from 2".to_owned())
}

fn name_value(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it should be NAME=VALUE")?;
    Ok((name.trim().to_owned(), value.to_owned()))
}

fn key_value(text: &str) -> Result<(String, serde_json::Value), String> {
    let (key, value) = text.split_once('=').ok_or("it should be KEY=VALUE")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((key.to_owned(), value))
}

/// The command line, or the exit code of one that is wrong or asks for help.
fn parsed(arguments: Vec<OsString>) -> Result<Cli, ExitCode> {
    let error = match Cli::try_parse_from(&arguments) {
        Ok(cli) => return Ok(cli),
        Err(error) => error,
    };
    // Names of files, which the shell puts in the place of `*`, may hold what a terminal obeys. What is wrong is the same without it.
    let plain = arguments.iter().map(|argument| terminal::shown(&argument.to_string_lossy()).into_owned());
    match Cli::try_parse_from(plain) {
        Err(shown) => drop(shown.print()),
        Ok(_) => progress::prompt(error.render()),
    }
    Err(ExitCode::from(error.exit_code() as u8))
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match parsed(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    // What `plugins watch` starts, the compiler, writes as the user's shell would have it.
    if !matches!(cli.command, Command::Plugins(Plugins::Watch { .. })) {
        keep_private(registry::data_directory(), |note| progress::line(note));
    }
    if let Err(problem) = Cpu::allowed() {
        progress::line(format_args!("error: {problem}"));
        return ExitCode::FAILURE;
    }
    if let Err(problem) = stdout::set_apart() {
        progress::line(format_args!("error: cannot set stdout apart: {problem}"));
        return ExitCode::FAILURE;
    }
    probe::this_is_the_program();
    let done = match cli.command {
        Command::FineTune(arguments) => command::fine_tune::run(&arguments),
        Command::Run(arguments) => command::run::run(&arguments),
        Command::Eval(arguments) => command::eval::run(&arguments),
        Command::Chat(arguments) => command::chat::run(&arguments),
        Command::ListModels(arguments) => command::list_models::run(&arguments),
        Command::ExportModel(arguments) => command::export_model::run(&arguments),
        Command::Serve(arguments) => command::serve::run(&arguments),
        Command::Bench(Bench::Train(arguments)) => command::bench::train(&arguments),
        Command::Bench(Bench::Prefill(arguments)) => command::bench::prefill(&arguments),
        Command::Bench(Bench::Decode(arguments)) => command::bench::decode(&arguments),
        Command::Plugins(Plugins::List { plugins, json }) => command::plugins::list(&plugins, json),
        Command::Plugins(Plugins::Lock { name, plugin_dir }) => command::plugins::lock(&name, &plugin_dir),
        Command::Plugins(Plugins::Watch { dir }) => command::plugins::watch(&dir),
        Command::Plugins(Plugins::New { name, dir }) => command::plugins::new(&name, dir.as_deref()),
        Command::Plugins(Plugins::Check { file, json }) => command::plugins::check(&file, json),
        Command::Plugins(Plugins::Probe { file, deadline_s }) => probe::answer(&file, deadline_s).map(|()| Done::Whole),
    };
    interrupt::await_end();
    match done {
        Ok(Done::Whole) => ExitCode::SUCCESS,
        Ok(Done::Interrupted) => ExitCode::from(interrupt::EXIT_CODE),
        Err(error) => {
            progress::line(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// How a command ended that did not fail.
pub enum Done {
    /// It did all it was asked for.
    Whole,
    /// It was interrupted, and saved what it had.
    Interrupted,
}
