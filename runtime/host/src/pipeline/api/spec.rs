//! Every function that a script can call: its options, types, documentation and an example that a test runs.
//!
//! From this the checks of a call are made, and so are `scripts/README.md` and the type files for editors.

use mlua::Value;

use super::dataset::Dataset;
use crate::pipeline::errors::{nearest, short};

/// A function of the table `homeroom`, or a method of a dataset.
pub struct Verb {
    /// Its name.
    pub name: &'static str,
    /// What it does: one line, then more.
    pub doc: &'static str,
    /// Its options, in groups that verbs share.
    pub options: &'static [&'static [Opt]],
    /// What it returns, as a type of the type files.
    pub returns: &'static str,
    /// What that is, in words.
    pub returns_doc: &'static str,
    /// Lines that run after the examples before it.
    pub example: &'static str,
}

/// One option of a verb.
pub struct Opt {
    /// Its name.
    pub name: &'static str,
    /// Other names for it, which mean the same.
    pub aliases: &'static [&'static str],
    /// Its type.
    pub kind: Kind,
    /// Whether a call without it is an error.
    pub required: bool,
    /// What it is when it is not given, in words; empty where the documentation says it.
    pub default: &'static str,
    /// One line: what turning it does.
    pub doc: &'static str,
}

/// Type of an option.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A text.
    Text,
    /// One of some texts.
    OneOf(&'static [&'static str]),
    /// A whole number from 1.
    Count,
    /// A whole number from 0.
    Whole,
    /// A number from 0 and below 1.
    Share,
    /// A number from 0.
    Number,
    /// A number above 0.
    Rate,
    /// A number above 0 and at most 10.
    LearningRate,
    /// True or false.
    Flag,
    /// A text or a list of texts.
    Names,
    /// A list of texts.
    Texts,
    /// A list of numbers between 0 and 1.
    Shares,
    /// A list of numbers above 0.
    Rates,
    /// A table from option to value.
    Table,
    /// A table from what a column is to its name.
    Columns,
    /// A model: its name, or what a verb returned.
    Model,
    /// A list of rows.
    Rows,
    /// A dataset.
    Dataset,
    /// A list of datasets.
    Datasets,
    /// A name of a field, or a function from a row.
    Key,
    /// A function from a step's report.
    OnStep,
    /// A function from an evaluation's report.
    OnEval,
}

impl Kind {
    /// Whether a value is of this type.
    pub fn admits(self, value: &Value) -> bool {
        let number = match value {
            Value::Integer(number) => *number as f64,
            Value::Number(number) => *number,
            _ => f64::NAN,
        };
        let list = |admits: &dyn Fn(&Value) -> bool| match value {
            Value::Table(table) => {
                let items = table.sequence_values::<Value>().map_while(|item| item.ok().filter(admits)).count();
                items > 0 && items == table.pairs::<Value, Value>().take(items + 1).count()
            }
            _ => false,
        };
        // Luau's numbers are doubles, exact to 2^53.
        let whole = number.fract() == 0.0 && number <= 9_007_199_254_740_992.0;
        match self {
            Self::Text => value.is_string(),
            Self::OneOf(words) => {
                value.as_string().is_some_and(|text| words.iter().any(|word| text.as_bytes() == word.as_bytes()))
            }
            Self::Count => whole && number >= 1.0,
            Self::Whole => whole && number >= 0.0,
            Self::Share => (0.0..1.0).contains(&number),
            Self::Number => number.is_finite() && number >= 0.0,
            Self::Rate => number.is_finite() && number > 0.0,
            Self::LearningRate => number > 0.0 && number <= 10.0,
            Self::Flag => value.is_boolean(),
            Self::Names => value.is_string() || list(&Value::is_string),
            Self::Texts => list(&Value::is_string),
            Self::Shares => list(&|value| Self::Share.admits(value) && !matches!(value, Value::Integer(0))),
            Self::Rates => list(&|value| Self::Rate.admits(value)),
            Self::Table => value.is_table(),
            Self::Columns => value.is_table() || value.is_string(),
            Self::Model => value.is_string() || value.is_table(),
            Self::Dataset => value.as_userdata().is_some_and(|data| data.is::<Dataset>()),
            Self::Datasets => list(&|value| Self::Dataset.admits(value)),
            Self::Rows => list(&Value::is_table),
            Self::Key => value.is_string() || value.is_function(),
            Self::OnStep | Self::OnEval => value.is_function(),
        }
    }

    /// Whether a list can be of this type.
    pub fn is_list(self) -> bool {
        matches!(self, Self::Names | Self::Texts | Self::Shares | Self::Rates | Self::Datasets | Self::Rows)
    }

    /// The type in words.
    pub fn words(self) -> String {
        match self {
            Self::Text => "a string",
            Self::OneOf(words) => {
                let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
                return quoted.join(" or ");
            }
            Self::Count => "a whole number from 1",
            Self::Whole => "a whole number from 0",
            Self::Share => "a number from 0 and below 1",
            Self::Number => "a number from 0",
            Self::Rate => "a number above 0",
            Self::LearningRate => "a number above 0 and at most 10",
            Self::Flag => "true or false",
            Self::Names => "a string or a list of strings",
            Self::Texts => "a list of strings",
            Self::Shares => "a list of numbers between 0 and 1",
            Self::Rates => "a list of numbers above 0",
            Self::Table => "a table",
            Self::Columns => "a table such as { prompt = \"Frage\", completion = \"Antwort\" }",
            Self::Model => "a model: its name, a parameter's path, or what a verb returned",
            Self::Dataset => "a dataset",
            Self::Datasets => "a list of datasets",
            Self::Rows => "a list of tables",
            Self::Key => "the name of a field, or a function from a row",
            Self::OnStep | Self::OnEval => "a function",
        }
        .to_owned()
    }

    /// The type in the notation that both type files share.
    pub fn annotation(self) -> String {
        match self {
            Self::Text => "string",
            Self::OneOf(words) => {
                let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
                return quoted.join(" | ");
            }
            Self::Count | Self::Whole | Self::Share | Self::Number | Self::Rate | Self::LearningRate => "number",
            Self::Flag => "boolean",
            Self::Names => "string | {string}",
            Self::Texts => "{string}",
            Self::Shares | Self::Rates => "{number}",
            Self::Table => "{[string]: any}",
            Self::Columns => "string | {[string]: string | number}",
            Self::Model => "string | Model",
            Self::Dataset => "Dataset",
            Self::Datasets => "{Dataset}",
            Self::Rows => "{Row}",
            Self::Key => "string | (row: Row) -> any",
            Self::OnStep => "(report: StepReport) -> Directive?",
            Self::OnEval => "(report: EvalReport) -> Directive?",
        }
        .to_owned()
    }
}

impl Opt {
    /// The option with other names too.
    const fn or(self, aliases: &'static [&'static str]) -> Self {
        Self { aliases, ..self }
    }

    /// All its names, its own first.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }
}

const fn opt(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Opt {
    Opt { name, aliases: &[], kind, required: false, default, doc }
}

const fn required(name: &'static str, kind: Kind, doc: &'static str) -> Opt {
    Opt { name, aliases: &[], kind, required: true, default: "", doc }
}

const QUANTILES: Opt =
    opt("quantiles", Kind::Shares, "none", "splits the sorted rows, ascending: { 0.5 } makes two halves");

const SEED: &[Opt] = &[opt("seed", Kind::Whole, "42", "the same seed gives the same result")];

/// What products are computed in.
const fn compute(default: &'static str) -> Opt {
    let doc = "what matrices are multiplied in; auto: what the strategy proposes, else the faster of bf16 and f32 on this processor; int8: frozen weights are multiplied as integers, and their inputs are rounded to 8 bits in groups of 64";
    opt("compute", Kind::OneOf(&["auto", "bf16", "f32", "int8"]), default, doc)
}

/// Options that a strategy takes, by PEFT's names.
pub const STRATEGY: &[Opt] = &[
    opt(
        "r",
        Kind::Count,
        "the strategy's",
        "rank of the adapter: a higher rank learns more and costs more memory and time",
    )
    .or(&["lora_r"]),
    opt("lora_alpha", Kind::Rate, "the strategy's", "strength of the adapter: its update is scaled by lora_alpha / r"),
    opt("lora_dropout", Kind::Share, "the strategy's", "dropout on the adapter's input, in training only"),
    opt(
        "target_modules",
        Kind::Names,
        "the strategy's",
        "the modules to adapt: \"all-linear\", endings of names, or one regular expression",
    ),
    opt("options", Kind::Table, "{}", "any other options of the strategy; `homeroom plugins list` shows them"),
];

/// The names of [`STRATEGY`], `options` left out.
pub const STRATEGY_NAMES: [&str; 4] = ["r", "lora_alpha", "lora_dropout", "target_modules"];

/// The functions of `homeroom`.
pub const VERBS: &[Verb] = &[
    Verb {
        name: "load_model",
        doc: "Describes a base model and the strategy to train it with.\nIt reads no weights: `fine_tune` loads them, when all options are known.",
        options: &[
            &[
                required(
                    "name",
                    Kind::Text,
                    "a directory or a .gguf file, which a parameter names or which lies below the TOML file; a name from `homeroom list-models`; or `owner/name`, a model of the Hugging Face hub",
                ),
                opt(
                    "strategy",
                    Kind::Text,
                    "\"lora\"",
                    "how the model is trained; `homeroom plugins list` shows what there is",
                ),
                opt("load_in_4bit", Kind::Flag, "false", "true: the base is stored in 4 bits, NF4; strategy `qlora`"),
                opt("load_in_8bit", Kind::Flag, "false", "true: the base is stored in 8 bits; strategy `int8`"),
            ],
            STRATEGY,
        ],
        returns: "Model",
        returns_doc: "the `model` of `fine_tune`, `evaluate` and `generate`",
        example: "local model = homeroom.load_model { name = params.model, strategy = \"lora\", r = 4 }",
    },
    Verb {
        name: "prepare_dataset",
        doc: "Reads files of rows and checks them all: JSONL, JSON, CSV and TSV, also packed with gzip.\nA row has `messages`, or `prompt` and `completion`, or `text`; where answers are judged, `prompt`, `chosen` and `rejected`, or `prompt`, `completion` and `label`. Rows in other forms (a table with columns such as Question and Answer, Alpaca's, ShareGPT's) are recognised, and a script sees them with these names. Rows become tokens when a model uses them. What should be looked at is said, and is in `report`: rows that stand twice or on both sides of the split, nearly or exactly, questions with two answers, turns that say nothing, and likely personal data.",
        options: &[
            &[
                required(
                    "path",
                    Kind::Names,
                    "the file, or a list of files: a parameter of type `path`, or a file below the TOML file, its path relative to the script; of a folder its train files and, as `eval`, its valid files, or all its files",
                ),
                opt(
                    "columns",
                    Kind::Columns,
                    "by their names",
                    "which column or key is what, where its name does not say it: by the names `prompt`, `input` (behind the prompt), `completion`, `system`, `text`, `messages`, `chosen`, `rejected`, `label` and `tools`; by number where a table has no header; or one string, as `--columns` takes it",
                ),
                opt(
                    "system",
                    Kind::Text,
                    "none",
                    "system message of rows that have none of their own: whom the model is to be",
                ),
                opt(
                    "on_bad_row",
                    Kind::OneOf(&["refuse", "skip"]),
                    "\"refuse\"",
                    "what to do with a row that is refused, as one without an answer: refuse the file, or leave the row out",
                ),
                opt(
                    "eval",
                    Kind::Share,
                    "0",
                    "share of the rows that is held out, to evaluate on; not of a folder that has held-out files",
                ),
                opt("max_seq_len", Kind::Count, "the model's context, at most 2048", "most tokens that a row may have")
                    .or(&["max_length", "max_seq_length"]),
                opt(
                    "on_long_row",
                    Kind::OneOf(&["refuse", "truncate", "skip"]),
                    "\"refuse\"",
                    "what to do with a longer row: refuse the file, cut the row, or leave it out",
                ),
            ],
            SEED,
        ],
        returns: "Split",
        returns_doc: "`{train =, eval =, report =}`: two datasets, of which `eval` is nil if no rows are held out, and what was found in them",
        example: "local data = homeroom.prepare_dataset { path = params.dataset, eval = 0.25 }",
    },
    Verb {
        name: "read_passages",
        doc: "Reads a text, plain or Markdown, as rows of one passage each.\nA passage is whole paragraphs, as many as `max_words` allows, and never goes over a heading of Markdown; a longer paragraph is cut between sentences. A row has `text`, `heading` (the headings above it), `source` (the file's name) and `line`.",
        options: &[&[
            required(
                "path",
                Kind::Text,
                "the file, UTF-8: a parameter of type `path`, or a file below the TOML file, its path relative to the script",
            ),
            opt("max_words", Kind::Count, "200", "most words of a passage"),
            opt("min_words", Kind::Whole, "20", "a passage of fewer words is left out: such as a title, or a link"),
        ]],
        returns: "Dataset",
        returns_doc: "a dataset",
        example: "local passages = homeroom.read_passages { path = params.text, max_words = 150, min_words = 5 }",
    },
    Verb {
        name: "dataset",
        doc: "Makes a dataset of tables.\nThey are checked as the rows of a file are.",
        options: &[&[required("rows", Kind::Rows, "the rows")]],
        returns: "Dataset",
        returns_doc: "a dataset",
        example: "local own = homeroom.dataset { rows = { { prompt = \"2 + 2?\", completion = \"4\" } } }",
    },
    Verb {
        name: "save_dataset",
        doc: "Writes the rows to `datasets/NAME.jsonl` in the user's data directory, whole or not at all.\nA file with other rows that has the name already keeps them under another, NAME-1.jsonl, as somebody may have worked on it.",
        options: &[&[
            required("dataset", Kind::Dataset, "the rows"),
            required("name", Kind::Text, "its name: small letters, digits, dots, dashes and underscores"),
        ]],
        returns: "SavedRows",
        returns_doc: "`{name =, path =, rows =}`",
        example: "local kept = homeroom.save_dataset { dataset = own, name = \"sums\" }",
    },
    Verb {
        name: "interleave",
        doc: "Mixes datasets: takes their rows by turns, so that everywhere in the result each dataset has its share.\nThe rows of each dataset stay in order. Train with `shuffle = false` to learn them in this order.",
        options: &[&[
            required("datasets", Kind::Datasets, "what is mixed"),
            opt(
                "shares",
                Kind::Rates,
                "equal",
                "how much of each dataset, in proportion: { 3, 1 } takes three rows of the first and one of the second",
            )
            .or(&["probabilities"]),
            opt(
                "stopping_strategy",
                Kind::OneOf(&["first_exhausted", "all_exhausted"]),
                "\"first_exhausted\"",
                "first_exhausted: ends where a dataset has no more rows; all_exhausted: a dataset that has no more begins anew, until all rows of all were taken",
            ),
        ]],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local mixture = homeroom.interleave { datasets = { data.train, data.eval }, shares = { 3, 1 } }",
    },
    Verb {
        name: "fine_tune",
        doc: "Trains a model. The result is kept with the run; `save_model` gives it a name.\nIf `model` was trained before, training goes on from its adapter, with its strategy and options. Callbacks run between steps and cannot start another training. An error in a callback ends the training after that step, and is raised then.\nA training that was made before, of the same model, rows, options and callbacks, is looked up: its callbacks are not called then, and print nothing. What they keep has to be in `report.state`: a training whose callbacks change variables outside of them is made again in each run.",
        options: &[
            &[
                required("model", Kind::Model, "what to train"),
                required("dataset", Kind::Dataset, "rows to train on"),
                opt("eval", Kind::Dataset, "none", "held-out rows to evaluate on, before and after"),
                opt(
                    "objective",
                    Kind::OneOf(&["sft", "dpo", "kto", "orpo"]),
                    "\"sft\"",
                    "what is learned: sft: the answers of the rows; dpo and orpo: to prefer `chosen` to `rejected`; kto: to answer as is rated good by `label`",
                ),
                opt(
                    "beta",
                    Kind::Rate,
                    "0.1",
                    "of dpo and kto, how closely the model is kept to its reference; of orpo, what the preference weighs",
                ),
                opt("desirable_weight", Kind::Rate, "1", "of kto, what an answer weighs that was rated good"),
                opt("undesirable_weight", Kind::Rate, "1", "of kto, what an answer weighs that was rated bad"),
                opt("num_train_epochs", Kind::Count, "1", "passes over the rows").or(&["epochs"]),
                opt(
                    "max_steps",
                    Kind::Count,
                    "all of the epochs",
                    "ends after so many steps, in the middle of an epoch too",
                )
                .or(&["steps"]),
                opt("per_device_train_batch_size", Kind::Count, "8", "rows in one forward and backward pass")
                    .or(&["batch_size"]),
                opt("gradient_accumulation_steps", Kind::Count, "1", "batches in one step"),
                opt(
                    "learning_rate",
                    Kind::LearningRate,
                    "the strategy's, else 2e-4; a tenth for dpo and kto, half for orpo",
                    "the highest learning rate, after warm-up",
                )
                .or(&["lr"]),
                opt(
                    "lr_scheduler_type",
                    Kind::OneOf(&["cosine", "linear", "constant"]),
                    "\"cosine\"",
                    "how the learning rate falls after warm-up",
                )
                .or(&["schedule"]),
                opt("warmup_ratio", Kind::Share, "0.03", "share of the steps in which the learning rate rises")
                    .or(&["warmup"]),
                opt("weight_decay", Kind::Share, "0", "decoupled weight decay"),
                opt("max_grad_norm", Kind::Number, "1", "gradients are scaled down to this norm; 0: never"),
                opt(
                    "neftune_noise_alpha",
                    Kind::Number,
                    "0",
                    "NEFTune: noise on embeddings while training, which helps against learning rows by heart; 5 is usual",
                ),
            ],
            STRATEGY,
            &[
                opt("init_from", Kind::Model, "what `model` carries", "the adapter whose weights training starts from"),
                opt(
                    "shuffle",
                    Kind::Flag,
                    "true",
                    "true: each epoch takes the rows in another order; false: in the order of the dataset",
                ),
                opt(
                    "gradient_checkpointing",
                    Kind::Flag,
                    "false",
                    "true: saves memory, and runs each layer again in the backward pass",
                ),
                opt(
                    "packing",
                    Kind::Flag,
                    "true",
                    "true: the rows of a step fill passes as they fit; false: a pass is one batch",
                ),
                opt(
                    "pass_tokens",
                    Kind::Count,
                    "1024, or 512 over a base in 4 or 8 bits",
                    "tokens of one pass at most, which changes memory and not the step; a longer row is a pass of its own",
                ),
                opt(
                    "fit",
                    Kind::Flag,
                    "false",
                    "true: where memory would not do, passes are made smaller or layers are run again, so that it does; a step stays what it is, to rounding",
                ),
                opt(
                    "memory_check",
                    Kind::Flag,
                    "true",
                    "true: what needs more memory than can be had is refused before it begins; false: it is begun all the same",
                ),
                opt(
                    "requantize",
                    Kind::Flag,
                    "false",
                    "true: a base that is quantised already (GGUF) is quantised again as the strategy asks; false: it stays as it is",
                ),
                compute("\"auto\""),
            ],
            SEED,
            &[
                opt("eval_steps", Kind::Count, "only before and after", "evaluate on `eval` every so many steps")
                    .or(&["eval_every"]),
                opt(
                    "early_stopping_patience",
                    Kind::Count,
                    "none",
                    "ends the training after so many evaluations in a row without a lower loss",
                ),
                opt(
                    "load_best_model_at_end",
                    Kind::Flag,
                    "true",
                    "true: of what `eval_steps` evaluated the result is the best; false: what the last step left",
                ),
                opt(
                    "save_steps",
                    Kind::Count,
                    "by time",
                    "steps between two checkpoints, from which a run that was killed goes on",
                )
                .or(&["save_every"]),
                opt("save_minutes", Kind::Number, "5", "minutes between two checkpoints; 0: time does not matter"),
                opt("on_step", Kind::OnStep, "none", "called after each step; may return a directive"),
                opt(
                    "on_eval",
                    Kind::OnEval,
                    "none",
                    "called after each evaluation of `eval_steps`; may return a directive",
                ),
                opt(
                    "key",
                    Kind::Text,
                    "what the callbacks do and take from around them",
                    "a text that stands for the callbacks: a training with the same key and options is looked up, whatever they do",
                ),
            ],
        ],
        returns: "Tuned",
        returns_doc: "a model, with `adapter` (its id), `metrics` and `stopped`: \"finished\", or the reason that a callback gave",
        example: "local tuned = homeroom.fine_tune {\n  model = model, dataset = data.train, eval = data.eval, max_steps = 3, batch_size = 4, eval_steps = 2,\n  on_eval = function(report)\n    if report.eval_loss > 1.5 * report.best then return { stop = \"it gets worse\" } end\n  end,\n}\nprint((\"loss %.3f before, %.3f after\"):format(tuned.metrics.eval_loss_before, tuned.metrics.eval_loss))",
    },
    Verb {
        name: "save_model",
        doc: "Saves a trained model under a name. A model that has the name already is replaced.",
        options: &[&[
            required("model", Kind::Model, "what `fine_tune` returned"),
            required("name", Kind::Text, "its name: small letters, digits, dots, dashes and underscores"),
        ]],
        returns: "Saved",
        returns_doc: "a model, with `name` and `path`",
        example: "local saved = homeroom.save_model { model = tuned, name = \"algebra-tutor\" }",
    },
    Verb {
        name: "load_fine_tuned_model",
        doc: "Describes a trained model: its adapter, its base and its strategy.",
        options: &[&[required(
            "name",
            Kind::Text,
            "a name from `homeroom list-models`, the `adapter` that `fine_tune` returned, or a directory that a parameter names",
        )]],
        returns: "Model",
        returns_doc: "the `model` of `fine_tune`, `evaluate` and `generate`",
        example: "local tutor = homeroom.load_fine_tuned_model { name = \"algebra-tutor\" }",
    },
    Verb {
        name: "create_handler",
        doc: "Lets a model answer under a name: writes `[handlers.NAME]` to `handlers.toml` in the user's data directory.\nThe rest of that file stays as it is.",
        options: &[&[
            required("name", Kind::Text, "its name: small letters, digits, dots, dashes and underscores"),
            required("model", Kind::Model, "a saved model"),
        ]],
        returns: "Handler",
        returns_doc: "`{name =, kind =, model =}`",
        example: "local handler = homeroom.create_handler { name = \"tutor\", model = saved }",
    },
    Verb {
        name: "evaluate",
        doc: "Measures the loss of a model on a dataset.",
        options: &[&[
            required("model", Kind::Model, "the model to measure"),
            required("dataset", Kind::Dataset, "the rows to measure it on"),
            compute("\"f32\""),
        ]],
        returns: "Evaluation",
        returns_doc: "`loss` in nats, `perplexity`, `token_accuracy`, `trained_tokens` and `examples`",
        example: "local score = homeroom.evaluate { model = tutor, dataset = data.eval }\nprint(score.loss, score.perplexity)",
    },
    Verb {
        name: "forgetting",
        doc: "Measures how far a trained model has moved from its base, on rows that it was not to change on.\nWithout `dataset` the base answers a few dozen plain requests in several languages, at temperature 1 and always the same. Both models are compared in f32 over the whole vocabulary. That takes about as long as some answers of the base: with a model of 135 M parameters a minute or two on two cores, at the second call much less.",
        options: &[&[
            required("model", Kind::Model, "the trained model"),
            opt("dataset", Kind::Dataset, "answers of the base's own", "rows of the kind that must not be forgotten")
                .or(&["rows"]),
            opt("base", Kind::Model, "what `model` was trained from", "the base that it is compared with"),
        ]],
        returns: "Forgetting",
        returns_doc: "`loss_before` and `loss` on these rows, `kl` in nats a token, and `tokens`",
        example: "local forgotten = homeroom.forgetting { model = tuned }\nif forgotten.kl > 0.1 then homeroom.log.warn(\"it forgets\", { kl = forgotten.kl }) end",
    },
    Verb {
        name: "generate",
        doc: "Lets a model or a handler answer prompts, each in a conversation of its own.\nA handler is one of `handlers.toml` in the user's data directory. One that sends prompts to another machine is asked only if `--set` names it for a parameter of type `handler`, and it is a route that allows that (`egress = \"allow\"`); that is said in a line.",
        options: &[
            &[
                opt("model", Kind::Model, "none", "the model that answers"),
                opt("handler", Kind::Text, "none", "the handler or route that answers, in place of `model`"),
                required("prompts", Kind::Texts, "the user's messages, one a conversation"),
                opt("system", Kind::Text, "none", "the system message of each conversation"),
                opt("max_tokens", Kind::Count, "256", "longest answer, in tokens").or(&["max_new_tokens"]),
                opt("temperature", Kind::Number, "0", "0: always the likeliest token; higher: more random"),
            ],
            SEED,
        ],
        returns: "{string}",
        returns_doc: "the answers, in the order of the prompts",
        example: "local answers = homeroom.generate { model = tutor, prompts = { \"2 + 2?\" }, max_tokens = 4 }\nprint(answers[1])",
    },
];

/// The methods of a dataset.
pub const METHODS: &[Verb] = &[
    Verb {
        name: "filter",
        doc: "Keeps the rows for which a function returns true.\nThe function has to return something: one without `return` is an error.",
        options: &[],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local short = data.train:filter(function(row) return #row.messages < 8 end)",
    },
    Verb {
        name: "map",
        doc: "Replaces each row by what a function returns for it: a row, or a list of rows; nil leaves the row out.\nWhat the function does not touch stays as it was, and a changed row is checked as the rows of a file are. A function that never returns anything is an error.",
        options: &[],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local polite = data.train:map(function(row)\n  table.insert(row.messages, 1, { role = \"system\", content = \"You are patient.\" })\n  return row\nend)",
    },
    Verb {
        name: "rename",
        doc: "Gives fields of the rows other names.\nIt takes a table from a field's name to its new name. A field that no row has is an error, and so are two fields of one name.",
        options: &[],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local tagged = data.train:map(function(row)\n  row.topic = \"sums\"\n  return row\nend):rename { topic = \"subject\" }",
    },
    Verb {
        name: "split",
        doc: "Splits the rows at random into rows to train on and rows to evaluate on.",
        options: &[&[required("eval", Kind::Share, "share of the rows to evaluate on; at least one row")], SEED],
        returns: "Dataset, Dataset",
        returns_doc: "two datasets: the rows to train on, the rows to evaluate on",
        example: "local pool, held_out = data.train:split { eval = 0.2, seed = 7 }",
    },
    Verb {
        name: "bucket",
        doc: "Sorts the rows by a number and splits them at quantiles.",
        options: &[&[
            required("by", Kind::Key, "the number: a field, or what a function returns for a row"),
            required("quantiles", Kind::Shares, "where to split, ascending: { 0.5 } makes two halves"),
        ]],
        returns: "{Dataset}",
        returns_doc: "one dataset more than there are quantiles, the smallest numbers first",
        example: "local easy, hard = table.unpack(pool:bucket { by = function(row) return #row.messages end, quantiles = { 0.5 } })",
    },
    Verb {
        name: "by_length",
        doc: "Sorts the rows by their length, the shortest first.",
        options: &[&[
            opt(
                "model",
                Kind::Model,
                "none",
                "the model in whose tokens length is counted; without one it is in characters",
            ),
            QUANTILES,
        ]],
        returns: "Dataset | {Dataset}",
        returns_doc: "a new dataset; with `quantiles` a list of one dataset more than there are quantiles",
        example: "local shortest_first = pool:by_length { model = model }",
    },
    Verb {
        name: "by_loss",
        doc: "Sorts the rows by how hard a model finds them: by its mean loss on each row's own trained tokens, the lowest first.\nThe measured losses are kept, and looked up when the same rows are sorted by the same model again.",
        options: &[&[
            required("model", Kind::Model, "the model that finds them easy or hard: the base, before it learns them"),
            compute("\"f32\""),
            QUANTILES,
        ]],
        returns: "Dataset | {Dataset}",
        returns_doc: "a new dataset; with `quantiles` a list of one dataset more than there are quantiles",
        example: "local known, new = table.unpack(pool:by_loss { model = model, quantiles = { 0.5 } })",
    },
    Verb {
        name: "sample",
        doc: "Draws rows at random, each at most once; all rows if there are at most `n`.",
        options: &[
            &[
                required("n", Kind::Count, "number of rows"),
                opt(
                    "weights",
                    Kind::Key,
                    "equal",
                    "a number from 0 for each row, in proportion to which it is drawn: a field, or what a function returns for a row",
                ),
                opt("replace", Kind::Flag, "false", "true: a row may be drawn more than once"),
            ],
            SEED,
        ],
        returns: "Dataset",
        returns_doc: "a new dataset, in the order of this one",
        example: "local some = easy:sample { n = 3, seed = 1 }\nlocal long_ones = pool:sample { n = 2, weights = function(row) return #row.messages[1].content end }",
    },
    Verb {
        name: "concat",
        doc: "Appends the rows of another dataset.",
        options: &[],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local mixed = hard:concat(some)",
    },
    Verb {
        name: "replay",
        doc: "Spreads rows of what was learned before among the rows, so that it is not forgotten.",
        options: &[
            &[
                required("rows", Kind::Dataset, "rows of before: of an earlier lesson, or answers that the base gave"),
                opt("share", Kind::Share, "0.1", "their share of the result; where they are too few, they come again"),
            ],
            SEED,
        ],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local lesson = hard:replay { rows = easy, share = 0.2 }",
    },
    Verb {
        name: "shuffle",
        doc: "Shuffles the rows. (Training takes them in another order in each epoch anyway.)",
        options: &[SEED],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local shuffled = mixed:shuffle { seed = 3 }",
    },
    Verb {
        name: "dedupe",
        doc: "Keeps the first of equal rows.\nTwo rows are equal if their values are, in whatever order their keys are. A row for which `by` gives nothing or null is an error.",
        options: &[&[opt(
            "by",
            Kind::Key,
            "the whole row",
            "what is compared: a field, or what a function returns for a row",
        )]],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local unique = mixed:dedupe { by = \"messages\" }",
    },
    Verb {
        name: "redact",
        doc: "Puts placeholders in the place of likely personal data: `[EMAIL_1]`, the same value the same one.\nWhat is likely is told by its form: e-mail addresses, telephone numbers, addresses on the net, bank accounts, cards, and numbers of persons with check digits. Names are not. Redact before `split`, so that a value has one placeholder on both sides. A row in which something is found is written anew.",
        options: &[],
        returns: "Dataset",
        returns_doc: "a new dataset",
        example: "local clean = unique:redact()",
    },
    Verb {
        name: "len",
        doc: "Counts the rows.",
        options: &[],
        returns: "number",
        returns_doc: "the number of rows; `#dataset` is the same",
        example: "print(unique:len())",
    },
    Verb {
        name: "rows",
        doc: "Returns all rows as tables: for small datasets.",
        options: &[],
        returns: "{Row}",
        returns_doc: "a list of tables",
        example: "for _, row in ipairs(some:rows()) do print(row.messages[1].content) end",
    },
];

/// The functions of `homeroom.log`.
pub const LOGS: &[Verb] = &[
    Verb {
        name: "info",
        doc: "Writes a line to stderr, with the fields behind it.",
        options: &[],
        returns: "()",
        returns_doc: "nothing",
        example: "homeroom.log.info(\"trained\", { loss = tuned.metrics.eval_loss })",
    },
    Verb {
        name: "warn",
        doc: "Writes a warning to stderr: say what to do about it.",
        options: &[],
        returns: "()",
        returns_doc: "nothing",
        example: "homeroom.log.warn(\"few rows: add more to \" .. params.dataset)",
    },
];

impl Verb {
    /// All options.
    pub fn all(&self) -> impl Iterator<Item = &'static Opt> {
        self.options.iter().copied().flatten()
    }

    /// The option that has that name.
    pub fn option(&self, name: &str) -> Option<&'static Opt> {
        self.all().find(|option| option.names().any(|known| known == name))
    }

    /// What is wrong with an option's name, if it is.
    pub fn unknown(&self, name: &str) -> Option<String> {
        // The names that `rename` takes are those of fields.
        if self.option(name).is_some() || self.name == "rename" {
            return None;
        }
        let near = nearest(name, self.all().flat_map(Opt::names));
        let hint = match near {
            Some(near) => format!("did you mean `{near}`?"),
            None if self.options.is_empty() => "it takes none".to_owned(),
            None => format!("known are {}", self.all().map(|option| option.name).collect::<Vec<_>>().join(", ")),
        };
        Some(format!("{}: unknown option `{}`, {hint}", self.name, short(name)))
    }
}

/// The verb of that name.
pub fn verb(name: &str) -> &'static Verb {
    VERBS.iter().chain(METHODS).chain(LOGS).find(|verb| verb.name == name).expect("every verb is in the lists above")
}
