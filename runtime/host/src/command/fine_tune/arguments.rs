//! What `fine-tune` is told, and the configuration that it makes of it.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use homeroom_engine::data::Columns;
use homeroom_engine::train::TrainConfig;
use homeroom_engine::train::schedule::Schedule;
use serde::{Serialize, Serializer};

use crate::command::arguments::{
    COUNT_MAX, ObjectiveArgs, PluginArgs, RowArgs, Word, above_zero, not_negative, one_of, rate, share, whole,
};
use crate::command::rows::{columns, lossy_paths, lossy_paths_option};
use crate::command::strategy::{PassArgs, StrategyArgs};
use crate::job::defaults::{self, Open};
use crate::progress::line;

/// Arguments of `fine-tune`. As JSON they are the settings of a run: what decides on its result has its flag's name.
#[derive(Args, Serialize)]
#[command(group(ArgGroup::new("place").args(["output_dir", "name"])))]
pub struct Arguments {
    /// Base model: a name on the Hugging Face hub as `owner/name`, a directory, a .gguf file, or a name from `homeroom list-models`
    #[arg(long, value_name = "MODEL")]
    #[serde(serialize_with = "lossy")]
    pub(super) model_name: PathBuf,
    /// Files of rows in a form that the objective learns from: JSONL, JSON, CSV or TSV, also as .gz; a folder, with train and valid files or any; or `-` for the standard input
    #[arg(long, required = true, value_name = "FILE", num_args = 1..)]
    #[serde(serialize_with = "lossy_paths")]
    pub(super) training_file: Vec<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) objective: ObjectiveArgs,
    /// Directory for the result: an adapter, or a model with strategy `full`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub(super) output_dir: Option<PathBuf>,
    /// Name of the result in `homeroom list-models` [default: the training file's, with a number if it is taken]
    #[arg(long, value_name = "NAME")]
    #[serde(skip)]
    pub(super) name: Option<String>,
    /// Replace an earlier result in that directory or of that name, once the new one is whole
    #[arg(long, requires = "place")]
    #[serde(skip)]
    pub(super) overwrite: bool,
    /// Go on with the run of this command that was killed or interrupted; start it if there is none, and leave one that has finished alone
    #[arg(long, conflicts_with = "overwrite")]
    #[serde(skip)]
    pub(super) resume: bool,
    /// Steps between two checkpoints; one is saved after each best evaluation, too
    #[arg(long, alias = "save-steps", value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    #[serde(skip)]
    pub(super) save_every: Option<u64>,
    /// Minutes between two checkpoints; 0 saves none by time [default: 5, or 0 with --save-every]
    #[arg(long, value_name = "M", value_parser = not_negative)]
    #[serde(skip)]
    pub(super) save_minutes: Option<f64>,
    /// Training strategy; `homeroom plugins list` shows what there is
    #[arg(long, default_value = "lora", value_name = "NAME")]
    pub(super) strategy: String,
    /// Passes over the training rows [default: as many, up to 10, as make about 100 steps]
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    pub(super) epochs: Option<u64>,
    /// Stop after this many steps, wherever the epoch is
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    pub(super) max_steps: Option<u64>,
    /// Peak learning rate [default: what the strategy proposes, else 2e-4; of that a tenth for dpo and kto, half for orpo]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(super) learning_rate: Option<f64>,
    /// Factor on the peak learning rate, whoever chose that
    #[arg(long, value_name = "X", value_parser = above_zero)]
    pub(super) learning_rate_multiplier: Option<f64>,
    /// Shape of the learning rate after warm-up
    #[arg(long, default_value = "cosine", value_name = "SHAPE", value_parser = one_of::<Schedule>(&SCHEDULES))]
    pub(super) lr_scheduler_type: Schedule,
    /// Share of the steps in which the learning rate warms up
    #[arg(long, default_value = "0.03", value_name = "SHARE", value_parser = share)]
    pub(super) warmup_ratio: f64,
    /// Weight decay of AdamW
    #[arg(long, default_value = "0", value_name = "X", value_parser = share)]
    pub(super) weight_decay: f64,
    /// Largest norm of the gradients, which are scaled down to it; 0 sets no limit
    #[arg(long, default_value = "1", value_name = "NORM", value_parser = not_negative)]
    pub(super) max_grad_norm: f64,
    /// NEFTune: noise on embeddings while training, in units of 1/√(tokens × width), which helps against learning rows by heart; 5 is usual [default: 0]
    #[arg(long, default_value = "0", hide_default_value = true, value_name = "ALPHA", value_parser = not_negative)]
    pub(super) neftune_noise_alpha: f64,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) strategy_options: StrategyArgs,
    /// Start from the weights of this adapter: a directory, a name from `homeroom list-models` or one on the Hugging Face hub
    #[arg(long, value_name = "MODEL")]
    #[serde(serialize_with = "lossy_option")]
    pub(super) init_from: Option<PathBuf>,
    /// Rows of one batch [default: 8, fewer for a file of fewer than 64 rows]
    #[arg(long, value_name = "ROWS", value_parser = whole::<u32>(1..=COUNT_MAX))]
    pub(super) batch_size: Option<u32>,
    /// Batches of one step [default: 1]
    #[arg(long, value_name = "N", value_parser = whole::<u32>(1..=COUNT_MAX))]
    pub(super) gradient_accumulation_steps: Option<u32>,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) passes: PassArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) rows: RowArgs,
    /// Files of held-out rows; their loss is measured before and after the training [default: those of a folder of --training-file that has such]
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "eval_fraction")]
    #[serde(serialize_with = "lossy_paths_option")]
    pub(super) eval_file: Vec<PathBuf>,
    /// Share of the training rows to hold out instead
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub(super) eval_fraction: Option<f64>,
    /// Steps between two evaluations on the held-out rows
    #[arg(long, alias = "eval-steps", value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    pub(super) eval_every: Option<u64>,
    /// End the training after so many evaluations of --eval-every in a row without a lower loss
    #[arg(long, alias = "patience", requires = "eval_every", value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    pub(super) early_stopping_patience: Option<u64>,
    /// Measure after the training how far the model has moved from its base: on rows of FILE, else on answers of the base's own, which it
    /// draws before; that takes a minute or two with a model of 135 M parameters on two cores
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[serde(skip)]
    pub(super) forgetting: Option<Option<PathBuf>>,
    /// Which column or key is what in the file of --forgetting, as --columns says it of the rows to learn from
    #[arg(long, requires = "forgetting", value_name = "ROLE=COLUMN,…", value_parser = columns)]
    #[serde(skip)]
    pub(super) forgetting_columns: Option<Columns>,
    /// Save what the last step left, even where an earlier evaluation had a lower loss
    #[arg(long)]
    pub(super) keep_last: bool,
    /// Seed of the order of rows, of first values and of dropout
    #[arg(long, default_value = "42", value_name = "N", value_parser = whole::<u64>(0..=u64::MAX))]
    pub(super) seed: u64,
    /// Keep the rows in the order of the file
    #[arg(long)]
    pub(super) no_shuffle: bool,
    /// Where memory would not do, fill passes with fewer rows or compute layers again, so that it does; a step stays what it is, to rounding
    #[arg(long)]
    #[serde(skip)]
    pub(super) fit: bool,
    /// Begin also what needs more memory than can be had
    #[arg(long, conflicts_with = "fit")]
    #[serde(skip)]
    pub(super) no_memory_check: bool,
    /// Say what would be done, what it takes and how the first rows are learned; train and write nothing
    #[arg(long, conflicts_with_all = ["resume", "watch_plugins"])]
    #[serde(skip)]
    pub(super) dry_run: bool,
    /// Watch the strategy's file, and continue with a new build of it between two steps
    #[arg(long)]
    #[serde(skip)]
    pub(super) watch_plugins: bool,
    #[command(flatten)]
    #[serde(skip)]
    pub(super) plugins: PluginArgs,
    /// Print one JSON object at the end
    #[arg(long)]
    #[serde(skip)]
    pub(super) json: bool,
}

/// A path as text. One that is none is refused before a run has it.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// As [`lossy`].
#[allow(clippy::ref_option)] // serde's signature
fn lossy_option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(Path::to_string_lossy).serialize(serializer)
}

const SCHEDULES: [Word; 3] = [
    ("cosine", "Half a cosine from the peak to zero"),
    ("linear", "A straight line from the peak to zero"),
    ("constant", "The peak throughout"),
];

/// The configuration; what was left open is chosen by the number of rows, and said, once that is known.
pub(super) fn config(arguments: &Arguments, proposed: Option<f64>, rows: Option<usize>) -> TrainConfig {
    let (config, chosen) = chosen(arguments, proposed, rows);
    chosen.iter().for_each(|chosen| line(format_args!("note: {chosen}")));
    config
}

/// The same, and what was chosen in words.
pub(super) fn chosen(
    arguments: &Arguments,
    proposed: Option<f64>,
    rows: Option<usize>,
) -> (TrainConfig, Option<String>) {
    let default = TrainConfig::default();
    let mut config = TrainConfig {
        epochs: arguments.epochs.unwrap_or(default.epochs),
        max_steps: arguments.max_steps,
        batch_size: arguments.batch_size.map_or(default.batch_size, |rows| rows as usize),
        gradient_accumulation_steps: arguments.gradient_accumulation_steps.unwrap_or(1) as usize,
        learning_rate: arguments.learning_rate.unwrap_or_else(|| {
            proposed.unwrap_or(defaults::LEARNING_RATE) * arguments.objective.objective.learning_rate_scale()
        }) * arguments.learning_rate_multiplier.unwrap_or(1.0),
        lr_scheduler_type: arguments.lr_scheduler_type,
        warmup_ratio: arguments.warmup_ratio,
        weight_decay: arguments.weight_decay,
        max_grad_norm: arguments.max_grad_norm,
        seed: arguments.seed,
        shuffle: !arguments.no_shuffle,
        gradient_checkpointing: arguments.passes.gradient_checkpointing,
        packing: !arguments.passes.no_packing,
        pass_rows: arguments.passes.pass_tokens,
        neftune_noise_alpha: arguments.neftune_noise_alpha,
        compute: arguments.passes.compute,
        eval_steps: arguments.eval_every,
        early_stopping_patience: arguments.early_stopping_patience,
        load_best_model_at_end: !arguments.keep_last,
    };
    let open = Open {
        epochs: arguments.epochs.or(arguments.max_steps).is_none(),
        batch_size: arguments.batch_size.or(arguments.gradient_accumulation_steps).is_none()
            && arguments.epochs.or(arguments.max_steps).is_none(),
    };
    let chosen = rows.and_then(|rows| defaults::choose(&mut config, open, rows));
    (config, chosen)
}
