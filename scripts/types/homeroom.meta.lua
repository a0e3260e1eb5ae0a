---@meta
-- Written by the program's tests from runtime/host/src/pipeline/api/spec.rs; see scripts/README.md.

---@alias Row table<string, any>

---A model: what `model` takes, in every verb.
---@class Model
---@field model string # the base: a name or path
---@field strategy? string # the strategy that trains it
---@field options table<string, any> # the strategy's options
---@field adapter? string # id of what was trained, if something was

---A model that `fine_tune` trained; a Model too.
---@class Tuned: Model
---@field metrics Metrics # what came of the training
---@field stopped string # "finished", or the reason that a callback gave

---What came of a training. Losses are means over trained tokens, in nats.
---@class Metrics
---@field eval_loss? number # held-out loss after; nil without `eval`
---@field eval_loss_before? number # held-out loss before
---@field train_loss number # mean loss of all steps
---@field steps number # steps that were done
---@field planned_steps number # steps that were planned

---A model in the registry; a Model too.
---@class Saved: Model
---@field name string # its name
---@field path string # its directory

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

---What `on_step` is told.
---@class StepReport
---@field step number # number of the step, from 1
---@field steps number # steps that are planned
---@field epoch number # epochs done, with the part of the present one
---@field loss number # loss of the step's rows before the update
---@field grad_norm number # norm of the gradients before clipping
---@field learning_rate number # learning rate of the update
---@field tokens number # tokens of the step's rows

---What `on_eval` is told.
---@class EvalReport
---@field step number # number of the step, from 1
---@field steps number # steps that are planned
---@field epoch number # epochs done, with the part of the present one
---@field eval_loss number # held-out loss
---@field perplexity number # e to the loss
---@field token_accuracy number # share of held-out tokens that the model found likeliest
---@field best number # lowest held-out loss so far, this one included

---What a callback may return; nil changes nothing.
---@class Directive
---@field stop? string # no further step; the reason goes to `stopped`
---@field learning_rate_scale? number # from now on the schedule's learning rates times this

---Rows to train on and rows to evaluate on.
---@class Split
---@field train Dataset # rows to train on
---@field eval? Dataset # rows to evaluate on

---Rows.
---@class Dataset
---@operator len: number
local Dataset = {}

---Keeps the rows for which a function returns true.
---@param keep fun(row: Row): boolean
---@return Dataset # a new dataset
function Dataset:filter(keep) end

---Replaces each row by what a function returns for it; nil leaves the row out.
---A new row is checked as the rows of a file are.
---@param change fun(row: Row): Row?
---@return Dataset # a new dataset
function Dataset:map(change) end

---@class SplitOptions
---@field eval number # share of the rows to evaluate on; at least one row
---@field seed? number # the same seed gives the same result (default: 42)

---Parts the rows by chance into those to train on and those to evaluate on.
---@param options SplitOptions
---@return Dataset, Dataset # two datasets: the rows to train on, the rows to evaluate on
function Dataset:split(options) end

---@class BucketOptions
---@field by string | fun(row: Row): any # the number: a field, or a function from a row
---@field quantiles number[] # where to part, ascending: { 0.5 } makes two halves

---Sorts the rows by a number and parts them at quantiles.
---@param options BucketOptions
---@return Dataset[] # one dataset more than there are quantiles, the smallest numbers first
function Dataset:bucket(options) end

---@class SampleOptions
---@field n number # number of rows
---@field seed? number # the same seed gives the same result (default: 42)

---Draws rows by chance, each at most once; all rows if there are no more than `n`.
---@param options SampleOptions
---@return Dataset # a new dataset, in the order of this one
function Dataset:sample(options) end

---Adds the rows of another dataset at the end.
---@param other Dataset
---@return Dataset # a new dataset
function Dataset:concat(other) end

---@class ShuffleOptions
---@field seed? number # the same seed gives the same result (default: 42)

---Puts the rows in another order. (Training has its own order for each epoch without it.)
---@param options? ShuffleOptions
---@return Dataset # a new dataset
function Dataset:shuffle(options) end

---@class DedupeOptions
---@field by? string | fun(row: Row): any # what is compared: a field, or a function from a row (default: the whole row)

---Keeps the first of rows that are alike.
---@param options? DedupeOptions
---@return Dataset # a new dataset
function Dataset:dedupe(options) end

---Counts the rows.
---@return number # the number of rows; `#dataset` is the same
function Dataset:len() end

---Gives the rows as plain tables, all of them: for small datasets.
---@return Row[] # a list of tables
function Dataset:rows() end

homeroom = {}

---@class LoadModelOptions
---@field name string # a Hugging Face directory or a .gguf file, by a parameter or below the TOML file; or a name from `homeroom list-models`
---@field strategy? string # training strategy; `homeroom plugins list` shows them (default: "lora")
---@field r? number # rank of the adapter: more learns more, and costs memory and time (default: the strategy's)
---@field lora_r? number # rank of the adapter: more learns more, and costs memory and time (default: the strategy's)
---@field lora_alpha? number # strength of the adapter: its update is scaled by lora_alpha / r (default: the strategy's)
---@field lora_dropout? number # dropout on the adapter's input, in training only (default: the strategy's)
---@field target_modules? string | string[] # adapted modules: "all-linear", name endings, or one regular expression (default: the strategy's)
---@field options? table<string, any> # any other option of the strategy; `homeroom plugins list` shows them (default: {})

---Describes a base model and the strategy to train it with.
---Nothing is read yet: the weights are loaded when `fine_tune` knows its options.
---@param options LoadModelOptions
---@return Model # what `fine_tune`, `evaluate` and `generate` take as `model`
function homeroom.load_model(options) end

---@class PrepareDatasetOptions
---@field path string # the file: a parameter of type `path`, or below the TOML file, relative to the script
---@field eval? number # share of the rows to hold out and evaluate on (default: 0)
---@field max_seq_len? number # tokens that a row may have (default: the model's context, at most 2048)
---@field on_long_row? "refuse" | "truncate" | "skip" # what to do with a longer row (default: "refuse")
---@field seed? number # the same seed gives the same result (default: 42)

---Reads a JSONL file of rows and checks all of them.
---Rows are `messages`, `prompt` and `completion`, or `text`. They become tokens when a model uses them.
---@param options PrepareDatasetOptions
---@return Split # `{train =, eval =}`, two datasets; without `eval` rows, `eval` is nil
function homeroom.prepare_dataset(options) end

---@class FineTuneOptions
---@field model string | Model # what to train
---@field dataset Dataset # rows to train on
---@field eval? Dataset # held-out rows to evaluate on, before and after (default: none)
---@field epochs? number # passes over the rows (default: 1)
---@field steps? number # ends after so many steps, wherever the epoch is (default: all of the epochs)
---@field batch_size? number # rows in one forward and backward pass (default: 8)
---@field gradient_accumulation_steps? number # batches in one step (default: 1)
---@field learning_rate? number # peak of the learning rate (default: the strategy's, else 2e-4)
---@field schedule? "cosine" | "linear" | "constant" # shape of the learning rate after warm-up (default: "cosine")
---@field warmup? number # share of the steps that warm up (default: 0.03)
---@field weight_decay? number # decoupled weight decay (default: 0)
---@field max_grad_norm? number # bound on the norm of the gradients; 0: none (default: 1)
---@field r? number # rank of the adapter: more learns more, and costs memory and time (default: the strategy's)
---@field lora_r? number # rank of the adapter: more learns more, and costs memory and time (default: the strategy's)
---@field lora_alpha? number # strength of the adapter: its update is scaled by lora_alpha / r (default: the strategy's)
---@field lora_dropout? number # dropout on the adapter's input, in training only (default: the strategy's)
---@field target_modules? string | string[] # adapted modules: "all-linear", name endings, or one regular expression (default: the strategy's)
---@field options? table<string, any> # any other option of the strategy; `homeroom plugins list` shows them (default: {})
---@field init_from? string | Model # start from the weights of this adapter (default: what `model` carries)
---@field shuffle? boolean # whether each epoch has an order of its own (default: true)
---@field gradient_checkpointing? boolean # save memory: run each layer again in the backward pass (default: false)
---@field packing? boolean # fill passes with the rows of a step as they fit; false: a pass is one batch (default: true)
---@field requantize? boolean # encode a base that is quantised already (GGUF) anew as the strategy asks; it keeps its storage else (default: false)
---@field compute? "auto" | "bf16" | "f32" | "int8" # what products are computed in; auto: what the strategy proposes, else the faster of bf16 and f32 on this processor; int8: frozen weights are multiplied in integers, their inputs rounded to 8 bits in groups of 64 (default: "auto")
---@field seed? number # the same seed gives the same result (default: 42)
---@field eval_every? number # evaluate on `eval` each so many steps (default: only before and after)
---@field on_step? fun(report: StepReport): Directive? # called after each step; may return a directive (default: none)
---@field on_eval? fun(report: EvalReport): Directive? # called after each evaluation of `eval_every`; may return a directive (default: none)

---Trains, and keeps the result until `save_model` gives it a name.
---A `model` that was trained goes on from where it is: its adapter is carried over, with its strategy and options. Callbacks run between steps, never inside one, and begin no training; an error in one ends the training after that step and is raised.
---@param options FineTuneOptions
---@return Tuned # a model, with `adapter` (its id), `metrics` and `stopped`: "finished", or the reason that a callback gave
function homeroom.fine_tune(options) end

---@class SaveModelOptions
---@field model string | Model # what `fine_tune` returned
---@field name string # small letters, digits, dots, dashes and underscores

---Gives a trained model a name in the registry; one of that name is replaced.
---@param options SaveModelOptions
---@return Saved # a model, with `name` and `path`
function homeroom.save_model(options) end

---@class LoadFineTunedModelOptions
---@field name string # a name from `homeroom list-models`, the id of a training, or a parameter's directory

---Describes a trained model: an adapter with its base and its strategy.
---@param options LoadFineTunedModelOptions
---@return Model # what `fine_tune`, `evaluate` and `generate` take as `model`
function homeroom.load_fine_tuned_model(options) end

---@class CreateHandlerOptions
---@field name string # small letters, digits, dots, dashes and underscores
---@field model string | Model # a saved model

---Has a name answered by a model: writes `[handlers.NAME]` to `handlers.toml` in the user's data directory.
---The rest of that file stays as it is.
---@param options CreateHandlerOptions
---@return Handler # `{name =, kind =, model =}`
function homeroom.create_handler(options) end

---@class EvaluateOptions
---@field model string | Model # what to measure
---@field dataset Dataset # rows to measure on
---@field compute? "auto" | "bf16" | "f32" | "int8" # what products are computed in; auto: what the strategy proposes, else the faster of bf16 and f32 on this processor; int8: frozen weights are multiplied in integers, their inputs rounded to 8 bits in groups of 64 (default: "f32")

---Measures a model on a dataset, without training it.
---@param options EvaluateOptions
---@return Evaluation # `loss` in nats, `perplexity`, `token_accuracy`, `trained_tokens` and `examples`
function homeroom.evaluate(options) end

---@class GenerateOptions
---@field model string | Model # what answers
---@field prompts string[] # what the user says
---@field system? string # what the system message says (default: none)
---@field max_tokens? number # longest answer, in tokens (default: 256)
---@field temperature? number # 0: always the likeliest word; higher is freer (default: 0)
---@field seed? number # the same seed gives the same result (default: 42)

---Answers prompts with a model, each as a conversation of its own.
---@param options GenerateOptions
---@return string[] # the answers, in the order of the prompts
function homeroom.generate(options) end

homeroom.log = {}

---Tells a line on stderr, with fields if there are any.
---@param message string
---@param fields? table<string, any>
function homeroom.log.info(message, fields) end

---Tells a warning on stderr: say what to do about it.
---@param message string
---@param fields? table<string, any>
function homeroom.log.warn(message, fields) end

---The parameters of the pipeline, as its TOML file declares them.
---@type table<string, any>
params = {}
