---@meta
-- Written by the program's tests from runtime/host/src/pipeline/api/spec.rs; see scripts/README.md.

---@alias Row table<string, any>

---A model: what every verb takes as `model`.
---@class Model
---@field model string # the base: a name or path
---@field strategy? string # the strategy that trains it
---@field options table<string, any> # the strategy's options
---@field adapter? string # what was trained: an id or a name; nil for a base

---A model that `fine_tune` trained; a Model too.
---@class Tuned: Model
---@field metrics Metrics # the numbers of the training
---@field stopped string # "finished", or the reason that a callback gave

---The numbers of a training. A loss is the objective's, in nats: of `sft` the mean over trained tokens.
---@class Metrics
---@field eval_loss? number # held-out loss after training; nil without `eval`
---@field eval_loss_before? number # held-out loss before training
---@field eval_reward_accuracy? number # of `dpo` and `orpo`, share of held-out pairs whose chosen answer is preferred after training; of `kto`, of answers on their side
---@field train_loss number # mean loss of all steps
---@field steps number # steps that were done
---@field planned_steps number # steps that were planned
---@field seconds number # time of all steps
---@field peak_memory_bytes? number # most memory that the program has had since `fine_tune` began; nil where the system does not say

---A model in the registry; a Model too.
---@class Saved: Model
---@field name string # its name
---@field path string # its directory

---A file of rows in the user's data directory.
---@class SavedRows
---@field name string # its name
---@field path string # the file
---@field rows number # rows in it

---What answers under a name.
---@class Handler
---@field name string # the name
---@field kind string # "local"
---@field model string # the model, by name or path

---Loss over a dataset.
---@class Evaluation
---@field loss number # mean cross-entropy of trained tokens, in nats
---@field perplexity number # e to the loss
---@field token_accuracy number # share of trained tokens that the model found likeliest
---@field trained_tokens number # how many there are
---@field examples number # sequences that were measured

---How far a trained model has moved from its base.
---@class Forgetting
---@field loss_before number # the base's mean cross-entropy of the rows' trained tokens, in nats
---@field loss number # that of the trained model
---@field kl number # mean KL divergence of the trained model's distribution of a token from the base's, KL(base || trained), in nats a token
---@field tokens number # tokens that were compared

---What `prepare_dataset` finds in rows.
---@class Report
---@field rows number # rows to train on
---@field held_out number # rows to evaluate on
---@field words? Lengths # their lengths in words, system messages aside
---@field findings Finding[] # what should be looked at, the most serious first

---One kind of thing that was found in rows.
---@class Finding
---@field check string # its name, such as `duplicates`, `leaks` or `email`
---@field level string # "warning" or "note"
---@field count number # rows that have it
---@field what string # what it is, in words
---@field rows any[] # the first of these rows: `part` ("train" or "held_out"), `line`, and the row that one is `like`

---Lengths of rows.
---@class Lengths
---@field min number # the least
---@field median number # half of the rows are no longer
---@field p95 number # 95 % are no longer
---@field max number # the most
---@field total number # all together

---What `on_step` gets.
---@class StepReport
---@field step number # number of the step, from 1
---@field steps number # steps that are planned
---@field epoch number # epochs that are done, with the done part of the present one
---@field loss number # loss of the step's rows before the update
---@field grad_norm number # norm of the gradients before clipping
---@field learning_rate number # learning rate of the update
---@field tokens number # tokens of the step's rows
---@field reward_accuracy? number # share of the step's answers that were judged right; nil with `sft`
---@field reward_margin? number # mean reward of good answers less that of bad ones; nil with `sft`
---@field state table<string, any> # what callbacks keep from one call to the next: plain values, saved with checkpoints

---What `on_eval` gets.
---@class EvalReport
---@field step number # number of the step, from 1
---@field steps number # steps that are planned
---@field epoch number # epochs that are done, with the done part of the present one
---@field eval_loss number # held-out loss
---@field perplexity number # e to the loss
---@field token_accuracy number # share of held-out tokens that the model found likeliest
---@field reward_accuracy? number # share of held-out answers that are judged right; nil with `sft`
---@field reward_margin? number # mean reward of good answers less that of bad ones; nil with `sft`
---@field best number # lowest held-out loss so far, this one included
---@field state table<string, any> # what callbacks keep from one call to the next: plain values, saved with checkpoints

---What a callback may return; nil changes nothing.
---@class Directive
---@field stop? string # ends the training after this step; the reason goes to `stopped`
---@field learning_rate_scale? number # multiplies the schedule's learning rates from now on

---Rows to train on and rows to evaluate on.
---@class Split
---@field train Dataset # rows to train on
---@field eval? Dataset # rows to evaluate on
---@field report Report # what was found in them

---Rows.
---@class Dataset
---@operator len: number
local Dataset = {}

---Keeps the rows for which a function returns true.
---The function has to return something: one without `return` is an error.
---@param keep fun(row: Row): boolean
---@return Dataset # a new dataset
function Dataset:filter(keep) end

---Replaces each row by what a function returns for it: a row, or a list of rows; nil leaves the row out.
---What the function does not touch stays as it was, and a changed row is checked as the rows of a file are. A function that never returns anything is an error.
---@param change fun(row: Row): Row|Row[]|nil
---@return Dataset # a new dataset
function Dataset:map(change) end

---Gives fields of the rows other names.
---It takes a table from a field's name to its new name. A field that no row has is an error, and so are two fields of one name.
---@param names table<string, string>
---@return Dataset # a new dataset
function Dataset:rename(names) end

---@class SplitOptions
---@field eval number # share of the rows to evaluate on; at least one row
---@field seed? number # the same seed gives the same result (default: 42)

---Splits the rows at random into rows to train on and rows to evaluate on.
---@param options SplitOptions
---@return Dataset, Dataset # two datasets: the rows to train on, the rows to evaluate on
function Dataset:split(options) end

---@class BucketOptions
---@field by string | fun(row: Row): any # the number: a field, or what a function returns for a row
---@field quantiles number[] # where to split, ascending: { 0.5 } makes two halves

---Sorts the rows by a number and splits them at quantiles.
---@param options BucketOptions
---@return Dataset[] # one dataset more than there are quantiles, the smallest numbers first
function Dataset:bucket(options) end

---@class ByLengthOptions
---@field model? string | Model # the model in whose tokens length is counted; without one it is in characters (default: none)
---@field quantiles? number[] # splits the sorted rows, ascending: { 0.5 } makes two halves (default: none)

---Sorts the rows by their length, the shortest first.
---@param options? ByLengthOptions
---@return Dataset|Dataset[] # a new dataset; with `quantiles` a list of one dataset more than there are quantiles
function Dataset:by_length(options) end

---@class ByLossOptions
---@field model string | Model # the model that finds them easy or hard: the base, before it learns them
---@field compute? "auto" | "bf16" | "f32" | "int8" # what matrices are multiplied in; auto: what the strategy proposes, else the faster of bf16 and f32 on this processor; int8: frozen weights are multiplied as integers, and their inputs are rounded to 8 bits in groups of 64 (default: "f32")
---@field quantiles? number[] # splits the sorted rows, ascending: { 0.5 } makes two halves (default: none)

---Sorts the rows by how hard a model finds them: by its mean loss on each row's own trained tokens, the lowest first.
---The measured losses are kept, and looked up when the same rows are sorted by the same model again.
---@param options ByLossOptions
---@return Dataset|Dataset[] # a new dataset; with `quantiles` a list of one dataset more than there are quantiles
function Dataset:by_loss(options) end

---@class SampleOptions
---@field n number # number of rows
---@field weights? string | fun(row: Row): any # a number from 0 for each row, in proportion to which it is drawn: a field, or what a function returns for a row (default: equal)
---@field replace? boolean # true: a row may be drawn more than once (default: false)
---@field seed? number # the same seed gives the same result (default: 42)

---Draws rows at random, each at most once; all rows if there are at most `n`.
---@param options SampleOptions
---@return Dataset # a new dataset, in the order of this one
function Dataset:sample(options) end

---Appends the rows of another dataset.
---@param other Dataset
---@return Dataset # a new dataset
function Dataset:concat(other) end

---@class ReplayOptions
---@field rows Dataset # rows of before: of an earlier lesson, or answers that the base gave
---@field share? number # their share of the result; where they are too few, they come again (default: 0.1)
---@field seed? number # the same seed gives the same result (default: 42)

---Spreads rows of what was learned before among the rows, so that it is not forgotten.
---@param options ReplayOptions
---@return Dataset # a new dataset
function Dataset:replay(options) end

---@class ShuffleOptions
---@field seed? number # the same seed gives the same result (default: 42)

---Shuffles the rows. (Training takes them in another order in each epoch anyway.)
---@param options? ShuffleOptions
---@return Dataset # a new dataset
function Dataset:shuffle(options) end

---@class DedupeOptions
---@field by? string | fun(row: Row): any # what is compared: a field, or what a function returns for a row (default: the whole row)

---Keeps the first of equal rows.
---Two rows are equal if their values are, in whatever order their keys are. A row for which `by` gives nothing or null is an error.
---@param options? DedupeOptions
---@return Dataset # a new dataset
function Dataset:dedupe(options) end

---Puts placeholders in the place of likely personal data: `[EMAIL_1]`, the same value the same one.
---What is likely is told by its form: e-mail addresses, telephone numbers, addresses on the net, bank accounts, cards, and numbers of persons with check digits. Names are not. Redact before `split`, so that a value has one placeholder on both sides. A row in which something is found is written anew.
---@return Dataset # a new dataset
function Dataset:redact() end

---Counts the rows.
---@return number # the number of rows; `#dataset` is the same
function Dataset:len() end

---Returns all rows as tables: for small datasets.
---@return Row[] # a list of tables
function Dataset:rows() end

homeroom = {}

---The null of JSON, as an item of a list.
---@type any
homeroom.null = nil

---@class LoadModelOptions
---@field name string # a directory or a .gguf file, which a parameter names or which lies below the TOML file; a name from `homeroom list-models`; or `owner/name`, a model of the Hugging Face hub
---@field strategy? string # how the model is trained; `homeroom plugins list` shows what there is (default: "lora")
---@field load_in_4bit? boolean # true: the base is stored in 4 bits, NF4; strategy `qlora` (default: false)
---@field load_in_8bit? boolean # true: the base is stored in 8 bits; strategy `int8` (default: false)
---@field r? number # rank of the adapter: a higher rank learns more and costs more memory and time (default: the strategy's)
---@field lora_r? number # another name for `r`
---@field lora_alpha? number # strength of the adapter: its update is scaled by lora_alpha / r (default: the strategy's)
---@field lora_dropout? number # dropout on the adapter's input, in training only (default: the strategy's)
---@field target_modules? string | string[] # the modules to adapt: "all-linear", endings of names, or one regular expression (default: the strategy's)
---@field options? table<string, any> # any other options of the strategy; `homeroom plugins list` shows them (default: {})

---Describes a base model and the strategy to train it with.
---It reads no weights: `fine_tune` loads them, when all options are known.
---@param options LoadModelOptions
---@return Model # the `model` of `fine_tune`, `evaluate` and `generate`
function homeroom.load_model(options) end

---@class PrepareDatasetOptions
---@field path string | string[] # the file, or a list of files: a parameter of type `path`, or a file below the TOML file, its path relative to the script; of a folder its train files and, as `eval`, its valid files, or all its files
---@field columns? string | table<string, string | number> # which column or key is what, where its name does not say it: by the names `prompt`, `input` (behind the prompt), `completion`, `system`, `text`, `messages`, `chosen`, `rejected`, `label` and `tools`; by number where a table has no header; or one string, as `--columns` takes it (default: by their names)
---@field system? string # system message of rows that have none of their own: whom the model is to be (default: none)
---@field on_bad_row? "refuse" | "skip" # what to do with a row that is refused, as one without an answer: refuse the file, or leave the row out (default: "refuse")
---@field eval? number # share of the rows that is held out, to evaluate on; not of a folder that has held-out files (default: 0)
---@field max_seq_len? number # most tokens that a row may have (default: the model's context, at most 2048)
---@field max_length? number # another name for `max_seq_len`
---@field max_seq_length? number # another name for `max_seq_len`
---@field on_long_row? "refuse" | "truncate" | "skip" # what to do with a longer row: refuse the file, cut the row, or leave it out (default: "refuse")
---@field seed? number # the same seed gives the same result (default: 42)

---Reads files of rows and checks them all: JSONL, JSON, CSV and TSV, also packed with gzip.
---A row has `messages`, or `prompt` and `completion`, or `text`; where answers are judged, `prompt`, `chosen` and `rejected`, or `prompt`, `completion` and `label`. Rows in other forms (a table with columns such as Question and Answer, Alpaca's, ShareGPT's) are recognised, and a script sees them with these names. Rows become tokens when a model uses them. What should be looked at is said, and is in `report`: rows that stand twice or on both sides of the split, nearly or exactly, questions with two answers, turns that say nothing, and likely personal data.
---@param options PrepareDatasetOptions
---@return Split # `{train =, eval =, report =}`: two datasets, of which `eval` is nil if no rows are held out, and what was found in them
function homeroom.prepare_dataset(options) end

---@class ReadPassagesOptions
---@field path string # the file, UTF-8: a parameter of type `path`, or a file below the TOML file, its path relative to the script
---@field max_words? number # most words of a passage (default: 200)
---@field min_words? number # a passage of fewer words is left out: such as a title, or a link (default: 20)

---Reads a text, plain or Markdown, as rows of one passage each.
---A passage is whole paragraphs, as many as `max_words` allows, and never goes over a heading of Markdown; a longer paragraph is cut between sentences. A row has `text`, `heading` (the headings above it), `source` (the file's name) and `line`.
---@param options ReadPassagesOptions
---@return Dataset # a dataset
function homeroom.read_passages(options) end

---@class DatasetOptions
---@field rows Row[] # the rows

---Makes a dataset of tables.
---They are checked as the rows of a file are.
---@param options DatasetOptions
---@return Dataset # a dataset
function homeroom.dataset(options) end

---@class SaveDatasetOptions
---@field dataset Dataset # the rows
---@field name string # its name: small letters, digits, dots, dashes and underscores

---Writes the rows to `datasets/NAME.jsonl` in the user's data directory, whole or not at all.
---A file with other rows that has the name already keeps them under another, NAME-1.jsonl, as somebody may have worked on it.
---@param options SaveDatasetOptions
---@return SavedRows # `{name =, path =, rows =}`
function homeroom.save_dataset(options) end

---@class InterleaveOptions
---@field datasets Dataset[] # what is mixed
---@field shares? number[] # how much of each dataset, in proportion: { 3, 1 } takes three rows of the first and one of the second (default: equal)
---@field probabilities? number[] # another name for `shares`
---@field stopping_strategy? "first_exhausted" | "all_exhausted" # first_exhausted: ends where a dataset has no more rows; all_exhausted: a dataset that has no more begins anew, until all rows of all were taken (default: "first_exhausted")

---Mixes datasets: takes their rows by turns, so that everywhere in the result each dataset has its share.
---The rows of each dataset stay in order. Train with `shuffle = false` to learn them in this order.
---@param options InterleaveOptions
---@return Dataset # a new dataset
function homeroom.interleave(options) end

---@class FineTuneOptions
---@field model string | Model # what to train
---@field dataset Dataset # rows to train on
---@field eval? Dataset # held-out rows to evaluate on, before and after (default: none)
---@field objective? "sft" | "dpo" | "kto" | "orpo" # what is learned: sft: the answers of the rows; dpo and orpo: to prefer `chosen` to `rejected`; kto: to answer as is rated good by `label` (default: "sft")
---@field beta? number # of dpo and kto, how closely the model is kept to its reference; of orpo, what the preference weighs (default: 0.1)
---@field desirable_weight? number # of kto, what an answer weighs that was rated good (default: 1)
---@field undesirable_weight? number # of kto, what an answer weighs that was rated bad (default: 1)
---@field num_train_epochs? number # passes over the rows (default: 1)
---@field epochs? number # another name for `num_train_epochs`
---@field max_steps? number # ends after so many steps, in the middle of an epoch too (default: all of the epochs)
---@field steps? number # another name for `max_steps`
---@field per_device_train_batch_size? number # rows in one forward and backward pass (default: 8)
---@field batch_size? number # another name for `per_device_train_batch_size`
---@field gradient_accumulation_steps? number # batches in one step (default: 1)
---@field learning_rate? number # the highest learning rate, after warm-up (default: the strategy's, else 2e-4; a tenth for dpo and kto, half for orpo)
---@field lr? number # another name for `learning_rate`
---@field lr_scheduler_type? "cosine" | "linear" | "constant" # how the learning rate falls after warm-up (default: "cosine")
---@field schedule? "cosine" | "linear" | "constant" # another name for `lr_scheduler_type`
---@field warmup_ratio? number # share of the steps in which the learning rate rises (default: 0.03)
---@field warmup? number # another name for `warmup_ratio`
---@field weight_decay? number # decoupled weight decay (default: 0)
---@field max_grad_norm? number # gradients are scaled down to this norm; 0: never (default: 1)
---@field neftune_noise_alpha? number # NEFTune: noise on embeddings while training, which helps against learning rows by heart; 5 is usual (default: 0)
---@field r? number # rank of the adapter: a higher rank learns more and costs more memory and time (default: the strategy's)
---@field lora_r? number # another name for `r`
---@field lora_alpha? number # strength of the adapter: its update is scaled by lora_alpha / r (default: the strategy's)
---@field lora_dropout? number # dropout on the adapter's input, in training only (default: the strategy's)
---@field target_modules? string | string[] # the modules to adapt: "all-linear", endings of names, or one regular expression (default: the strategy's)
---@field options? table<string, any> # any other options of the strategy; `homeroom plugins list` shows them (default: {})
---@field init_from? string | Model # the adapter whose weights training starts from (default: what `model` carries)
---@field shuffle? boolean # true: each epoch takes the rows in another order; false: in the order of the dataset (default: true)
---@field gradient_checkpointing? boolean # true: saves memory, and runs each layer again in the backward pass (default: false)
---@field packing? boolean # true: the rows of a step fill passes as they fit; false: a pass is one batch (default: true)
---@field pass_tokens? number # tokens of one pass at most, which changes memory and not the step; a longer row is a pass of its own (default: 1024, or 512 over a base in 4 or 8 bits)
---@field fit? boolean # true: where memory would not do, passes are made smaller or layers are run again, so that it does; a step stays what it is, to rounding (default: false)
---@field memory_check? boolean # true: what needs more memory than can be had is refused before it begins; false: it is begun all the same (default: true)
---@field requantize? boolean # true: a base that is quantised already (GGUF) is quantised again as the strategy asks; false: it stays as it is (default: false)
---@field compute? "auto" | "bf16" | "f32" | "int8" # what matrices are multiplied in; auto: what the strategy proposes, else the faster of bf16 and f32 on this processor; int8: frozen weights are multiplied as integers, and their inputs are rounded to 8 bits in groups of 64 (default: "auto")
---@field seed? number # the same seed gives the same result (default: 42)
---@field eval_steps? number # evaluate on `eval` every so many steps (default: only before and after)
---@field eval_every? number # another name for `eval_steps`
---@field early_stopping_patience? number # ends the training after so many evaluations in a row without a lower loss (default: none)
---@field load_best_model_at_end? boolean # true: of what `eval_steps` evaluated the result is the best; false: what the last step left (default: true)
---@field save_steps? number # steps between two checkpoints, from which a run that was killed goes on (default: by time)
---@field save_every? number # another name for `save_steps`
---@field save_minutes? number # minutes between two checkpoints; 0: time does not matter (default: 5)
---@field on_step? fun(report: StepReport): Directive? # called after each step; may return a directive (default: none)
---@field on_eval? fun(report: EvalReport): Directive? # called after each evaluation of `eval_steps`; may return a directive (default: none)
---@field key? string # a text that stands for the callbacks: a training with the same key and options is looked up, whatever they do (default: what the callbacks do and take from around them)

---Trains a model. The result is kept with the run; `save_model` gives it a name.
---If `model` was trained before, training goes on from its adapter, with its strategy and options. Callbacks run between steps and cannot start another training. An error in a callback ends the training after that step, and is raised then.
---A training that was made before, of the same model, rows, options and callbacks, is looked up: its callbacks are not called then, and print nothing. What they keep has to be in `report.state`: a training whose callbacks change variables outside of them is made again in each run.
---@param options FineTuneOptions
---@return Tuned # a model, with `adapter` (its id), `metrics` and `stopped`: "finished", or the reason that a callback gave
function homeroom.fine_tune(options) end

---@class SaveModelOptions
---@field model string | Model # what `fine_tune` returned
---@field name string # its name: small letters, digits, dots, dashes and underscores

---Saves a trained model under a name. A model that has the name already is replaced.
---@param options SaveModelOptions
---@return Saved # a model, with `name` and `path`
function homeroom.save_model(options) end

---@class LoadFineTunedModelOptions
---@field name string # a name from `homeroom list-models`, the `adapter` that `fine_tune` returned, or a directory that a parameter names

---Describes a trained model: its adapter, its base and its strategy.
---@param options LoadFineTunedModelOptions
---@return Model # the `model` of `fine_tune`, `evaluate` and `generate`
function homeroom.load_fine_tuned_model(options) end

---@class CreateHandlerOptions
---@field name string # its name: small letters, digits, dots, dashes and underscores
---@field model string | Model # a saved model

---Lets a model answer under a name: writes `[handlers.NAME]` to `handlers.toml` in the user's data directory.
---The rest of that file stays as it is.
---@param options CreateHandlerOptions
---@return Handler # `{name =, kind =, model =}`
function homeroom.create_handler(options) end

---@class EvaluateOptions
---@field model string | Model # the model to measure
---@field dataset Dataset # the rows to measure it on
---@field compute? "auto" | "bf16" | "f32" | "int8" # what matrices are multiplied in; auto: what the strategy proposes, else the faster of bf16 and f32 on this processor; int8: frozen weights are multiplied as integers, and their inputs are rounded to 8 bits in groups of 64 (default: "f32")

---Measures the loss of a model on a dataset.
---@param options EvaluateOptions
---@return Evaluation # `loss` in nats, `perplexity`, `token_accuracy`, `trained_tokens` and `examples`
function homeroom.evaluate(options) end

---@class ForgettingOptions
---@field model string | Model # the trained model
---@field dataset? Dataset # rows of the kind that must not be forgotten (default: answers of the base's own)
---@field rows? Dataset # another name for `dataset`
---@field base? string | Model # the base that it is compared with (default: what `model` was trained from)

---Measures how far a trained model has moved from its base, on rows that it was not to change on.
---Without `dataset` the base answers a few dozen plain requests in several languages, at temperature 1 and always the same. Both models are compared in f32 over the whole vocabulary. That takes about as long as some answers of the base: with a model of 135 M parameters a minute or two on two cores, at the second call much less.
---@param options ForgettingOptions
---@return Forgetting # `loss_before` and `loss` on these rows, `kl` in nats a token, and `tokens`
function homeroom.forgetting(options) end

---@class GenerateOptions
---@field model? string | Model # the model that answers (default: none)
---@field handler? string # the handler or route that answers, in place of `model` (default: none)
---@field prompts string[] # the user's messages, one a conversation
---@field system? string # the system message of each conversation (default: none)
---@field max_tokens? number # longest answer, in tokens (default: 256)
---@field max_new_tokens? number # another name for `max_tokens`
---@field temperature? number # 0: always the likeliest token; higher: more random (default: 0)
---@field seed? number # the same seed gives the same result (default: 42)

---Lets a model or a handler answer prompts, each in a conversation of its own.
---A handler is one of `handlers.toml` in the user's data directory. One that sends prompts to another machine is asked only if `--set` names it for a parameter of type `handler`, and it is a route that allows that (`egress = "allow"`); that is said in a line.
---@param options GenerateOptions
---@return string[] # the answers, in the order of the prompts
function homeroom.generate(options) end

homeroom.log = {}

---Writes a line to stderr, with the fields behind it.
---@param message string
---@param fields? table<string, any>
function homeroom.log.info(message, fields) end

---Writes a warning to stderr: say what to do about it.
---@param message string
---@param fields? table<string, any>
function homeroom.log.warn(message, fields) end

---The parameters of the pipeline, as its TOML file declares them.
---@type table<string, any>
params = {}
