//! The reference of what scripts can call, and the type files for editors: written from [`super::api::spec`], so that they
//! say what the program does. A test holds the files in `scripts/` equal to these texts.

use std::fmt::Write as _;

use super::api::spec::{LOGS, METHODS, Opt, VERBS, Verb};

/// A table that scripts get or give: its name, what it is, and its fields with type and meaning.
struct Shape {
    name: &'static str,
    doc: &'static str,
    /// In groups that tables share.
    fields: &'static [&'static [Field]],
}

/// Name, type and meaning.
type Field = (&'static str, &'static str, &'static str);

impl Shape {
    fn all(&self) -> impl Iterator<Item = &'static Field> {
        self.fields.iter().copied().flatten()
    }
}

const MODEL_FIELDS: &[Field] = &[
    ("model", "string", "the base: a name or path"),
    ("strategy", "string?", "the strategy that trains it"),
    ("options", "{[string]: any}", "the strategy's options"),
    ("adapter", "string?", "what was trained: an id or a name; nil for a base"),
];

/// What every report of a training says.
const REPORT_FIELDS: &[Field] = &[
    ("step", "number", "number of the step, from 1"),
    ("steps", "number", "steps that are planned"),
    ("epoch", "number", "epochs that are done, with the done part of the present one"),
];

/// What every report has last.
const STATE_FIELD: &[Field] = &[(
    "state",
    "{[string]: any}",
    "what callbacks keep from one call to the next: plain values, saved with checkpoints",
)];

const SHAPES: [Shape; 11] = [
    Shape { name: "Model", doc: "A model: what every verb takes as `model`.", fields: &[MODEL_FIELDS] },
    Shape {
        name: "Tuned",
        doc: "A model that `fine_tune` trained; a Model too.",
        fields: &[&[
            ("metrics", "Metrics", "the numbers of the training"),
            ("stopped", "string", "\"finished\", or the reason that a callback gave"),
        ]],
    },
    Shape {
        name: "Metrics",
        doc: "The numbers of a training. A loss is the objective's, in nats: of `sft` the mean over trained tokens.",
        fields: &[&[
            ("eval_loss", "number?", "held-out loss after training; nil without `eval`"),
            ("eval_loss_before", "number?", "held-out loss before training"),
            (
                "eval_reward_accuracy",
                "number?",
                "of `dpo` and `orpo`, share of held-out pairs whose chosen answer is preferred after training; of `kto`, of answers on their side",
            ),
            ("train_loss", "number", "mean loss of all steps"),
            ("steps", "number", "steps that were done"),
            ("planned_steps", "number", "steps that were planned"),
            ("seconds", "number", "time of all steps"),
            (
                "peak_memory_bytes",
                "number?",
                "most memory that the program has had since `fine_tune` began; nil where the system does not say",
            ),
        ]],
    },
    Shape {
        name: "Saved",
        doc: "A model in the registry; a Model too.",
        fields: &[&[("name", "string", "its name"), ("path", "string", "its directory")]],
    },
    Shape {
        name: "SavedRows",
        doc: "A file of rows in the user's data directory.",
        fields: &[&[("name", "string", "its name"), ("path", "string", "the file"), ("rows", "number", "rows in it")]],
    },
    Shape {
        name: "Handler",
        doc: "What answers under a name.",
        fields: &[&[
            ("name", "string", "the name"),
            ("kind", "string", "\"local\""),
            ("model", "string", "the model, by name or path"),
        ]],
    },
    Shape {
        name: "Evaluation",
        doc: "Loss over a dataset.",
        fields: &[&[
            ("loss", "number", "mean cross-entropy of trained tokens, in nats"),
            ("perplexity", "number", "e to the loss"),
            ("token_accuracy", "number", "share of trained tokens that the model found likeliest"),
            ("trained_tokens", "number", "how many there are"),
            ("examples", "number", "sequences that were measured"),
        ]],
    },
    Shape {
        name: "Forgetting",
        doc: "How far a trained model has moved from its base.",
        fields: &[&[
            ("loss_before", "number", "the base's mean cross-entropy of the rows' trained tokens, in nats"),
            ("loss", "number", "that of the trained model"),
            (
                "kl",
                "number",
                "mean KL divergence of the trained model's distribution of a token from the base's, KL(base || trained), in nats a token",
            ),
            ("tokens", "number", "tokens that were compared"),
        ]],
    },
    Shape {
        name: "StepReport",
        doc: "What `on_step` gets.",
        fields: &[
            REPORT_FIELDS,
            &[
                ("loss", "number", "loss of the step's rows before the update"),
                ("grad_norm", "number", "norm of the gradients before clipping"),
                ("learning_rate", "number", "learning rate of the update"),
                ("tokens", "number", "tokens of the step's rows"),
                ("reward_accuracy", "number?", "share of the step's answers that were judged right; nil with `sft`"),
                ("reward_margin", "number?", "mean reward of good answers less that of bad ones; nil with `sft`"),
            ],
            STATE_FIELD,
        ],
    },
    Shape {
        name: "EvalReport",
        doc: "What `on_eval` gets.",
        fields: &[
            REPORT_FIELDS,
            &[
                ("eval_loss", "number", "held-out loss"),
                ("perplexity", "number", "e to the loss"),
                ("token_accuracy", "number", "share of held-out tokens that the model found likeliest"),
                ("reward_accuracy", "number?", "share of held-out answers that are judged right; nil with `sft`"),
                ("reward_margin", "number?", "mean reward of good answers less that of bad ones; nil with `sft`"),
                ("best", "number", "lowest held-out loss so far, this one included"),
            ],
            STATE_FIELD,
        ],
    },
    Shape {
        name: "Directive",
        doc: "What a callback may return; nil changes nothing.",
        fields: &[&[
            ("stop", "string?", "ends the training after this step; the reason goes to `stopped`"),
            ("learning_rate_scale", "number?", "multiplies the schedule's learning rates from now on"),
        ]],
    },
];

/// What a verb takes that has no table of options.
fn arguments(verb: &Verb) -> Vec<(&'static str, &'static str)> {
    match verb.name {
        "filter" => vec![("keep", "(row: Row) -> boolean")],
        "map" => vec![("change", "(row: Row) -> (Row | {Row})?")],
        "rename" => vec![("names", "{[string]: string}")],
        "concat" => vec![("other", "Dataset")],
        "info" | "warn" => vec![("message", "string"), ("fields", "{[string]: any}?")],
        _ => Vec::new(),
    }
}

/// All examples as one script, in the order of the reference.
pub fn examples() -> String {
    let verbs = VERBS.iter().chain(METHODS).chain(LOGS);
    verbs.map(|verb| format!("{}\n", verb.example)).collect()
}

/// `scripts/README.md`.
pub fn markdown() -> String {
    let mut out = INTRODUCTION.to_owned();
    out.push_str("\n## Verbs\n");
    for verb in VERBS {
        section(&mut out, &format!("homeroom.{}", verb.name), verb);
    }
    out.push_str("\n## Datasets\n\n");
    out.push_str(DATASETS);
    for verb in METHODS {
        section(&mut out, &format!("dataset:{}", verb.name), verb);
    }
    out.push_str("\n## Log\n");
    for verb in LOGS {
        section(&mut out, &format!("homeroom.log.{}", verb.name), verb);
    }
    out.push_str("\n## Tables\n");
    for shape @ Shape { name, doc, .. } in &SHAPES {
        let _ = write!(out, "\n### {name}\n\n{doc}\n\n| field | type | |\n| --- | --- | --- |\n");
        for (field, kind, doc) in shape.all() {
            let _ = writeln!(out, "| `{field}` | {} | {} |", cell(kind), cell(doc));
        }
    }
    out
}

fn section(out: &mut String, title: &str, verb: &Verb) {
    let signature = match verb.options.is_empty() {
        true => {
            let names: Vec<&str> = arguments(verb).iter().map(|(name, _)| *name).collect();
            format!("{title}({})", names.join(", "))
        }
        false => format!("{title} {{…}}"),
    };
    let _ = write!(out, "\n### `{signature}`\n\n{}\n", verb.doc.replacen('\n', "\n\n", 1));
    if !verb.options.is_empty() {
        out.push_str("\n| option | type | default | |\n| --- | --- | --- | --- |\n");
        for option in verb.all() {
            let alias: String = option.aliases.iter().map(|alias| format!(" or `{alias}`")).collect();
            let default = if option.required { "required" } else { option.default };
            let (words, doc) = (cell(&option.kind.words()), cell(option.doc));
            let _ = writeln!(out, "| `{}`{alias} | {words} | {} | {doc} |", option.name, cell(default));
        }
    }
    let _ = write!(out, "\nReturns {}.\n\n```lua\n{}\n```\n", verb.returns_doc, verb.example);
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// `scripts/types/homeroom.meta.lua`, for the Lua language server (LuaLS).
pub fn lua_ls() -> String {
    let mut out = format!("---@meta\n-- {GENERATED}\n\n---@alias Row table<string, any>\n");
    for shape @ Shape { name, doc, .. } in &SHAPES {
        let parent = if matches!(*name, "Tuned" | "Saved") { ": Model" } else { "" };
        let _ = write!(out, "\n---{doc}\n---@class {name}{parent}\n");
        for (field, kind, doc) in shape.all() {
            let (field, kind) = match kind.strip_suffix('?') {
                Some(kind) => (format!("{field}?"), kind),
                None => ((*field).to_owned(), *kind),
            };
            let _ = writeln!(out, "---@field {field} {} # {doc}", ls_type(kind));
        }
    }
    out.push_str(
        "\n---Rows to train on and rows to evaluate on.\n---@class Split\n---@field train Dataset # rows to train on\n",
    );
    out.push_str("---@field eval? Dataset # rows to evaluate on\n");
    out.push_str("\n---Rows.\n---@class Dataset\n---@operator len: number\nlocal Dataset = {}\n");
    for verb in METHODS {
        ls_function(&mut out, &format!("Dataset:{}", verb.name), verb);
    }
    let _ = write!(out, "\nhomeroom = {{}}\n\n---{NULL}\n---@type any\nhomeroom.null = nil\n");
    for verb in VERBS {
        ls_function(&mut out, &format!("homeroom.{}", verb.name), verb);
    }
    out.push_str("\nhomeroom.log = {}\n");
    for verb in LOGS {
        ls_function(&mut out, &format!("homeroom.log.{}", verb.name), verb);
    }
    out.push_str("\n---The parameters of the pipeline, as its TOML file declares them.\n---@type table<string, any>\nparams = {}\n");
    out
}

fn ls_function(out: &mut String, name: &str, verb: &Verb) {
    let class = format!("{}Options", pascal(verb.name));
    if !verb.options.is_empty() {
        let _ = write!(out, "\n---@class {class}\n");
        for option in verb.all() {
            for name in option.names() {
                let mark = if option.required { "" } else { "?" };
                let kind = ls_type(&option.kind.annotation());
                let doc =
                    if name == option.name { told(option) } else { format!("another name for `{}`", option.name) };
                let _ = writeln!(out, "---@field {name}{mark} {kind} # {doc}");
            }
        }
    }
    let _ = write!(out, "\n---{}\n", verb.doc.replace('\n', "\n---"));
    let mut names = Vec::new();
    if !verb.options.is_empty() {
        let optional = if verb.all().any(|option| option.required) { "" } else { "?" };
        let _ = writeln!(out, "---@param options{optional} {class}");
        names.push("options");
    }
    for (argument, kind) in arguments(verb) {
        let (mark, kind) = kind.strip_suffix("}?").map_or(("", kind.to_owned()), |kind| ("?", format!("{kind}}}")));
        let _ = writeln!(out, "---@param {argument}{mark} {}", ls_type(&kind));
        names.push(argument);
    }
    if verb.returns != "()" {
        let kinds: Vec<String> = verb.returns.split(", ").map(ls_type).collect();
        let _ = writeln!(out, "---@return {} # {}", kinds.join(", "), verb.returns_doc);
    }
    let _ = writeln!(out, "function {name}({}) end", names.join(", "));
}

/// A type as LuaLS writes it.
fn ls_type(kind: &str) -> String {
    match kind {
        "{string}" => "string[]",
        "{number}" => "number[]",
        "{Row}" => "Row[]",
        "{Dataset}" => "Dataset[]",
        "string | {string}" => "string | string[]",
        "{[string]: any}" => "table<string, any>",
        "string | {[string]: string | number}" => "string | table<string, string | number>",
        "(row: Row) -> boolean" => "fun(row: Row): boolean",
        "(row: Row) -> (Row | {Row})?" => "fun(row: Row): Row|Row[]|nil",
        "{[string]: string}" => "table<string, string>",
        "Dataset | {Dataset}" => "Dataset|Dataset[]",
        "string | (row: Row) -> any" => "string | fun(row: Row): any",
        "(report: StepReport) -> Directive?" => "fun(report: StepReport): Directive?",
        "(report: EvalReport) -> Directive?" => "fun(report: EvalReport): Directive?",
        other => other,
    }
    .to_owned()
}

/// `scripts/types/homeroom.d.luau`, for luau-lsp.
pub fn luau() -> String {
    let mut out = format!("-- {GENERATED}\n\nexport type Row = {{[string]: any}}\n");
    for shape @ Shape { name, doc, .. } in &SHAPES {
        let _ = write!(out, "\n-- {doc}\nexport type {name} = {{\n");
        let inherited = matches!(*name, "Tuned" | "Saved");
        for (field, kind, doc) in MODEL_FIELDS.iter().filter(|_| inherited).chain(shape.all()) {
            let _ = writeln!(out, "  {field}: {kind}, -- {doc}");
        }
        out.push_str("}\n");
    }
    out.push_str("\ndeclare class Dataset\n");
    for verb in METHODS {
        let rest = luau_arguments(verb);
        let comma = if rest.is_empty() { "" } else { ", " };
        let returns = if verb.returns.contains(", ") { format!("({})", verb.returns) } else { verb.returns.to_owned() };
        let line = first_line(verb.doc);
        let _ = write!(out, "  -- {line}\n  function {}(self{comma}{rest}): {returns}\n", verb.name);
    }
    out.push_str("end\n\nexport type Split = { train: Dataset, eval: Dataset? }\n\ndeclare homeroom: {\n");
    for verb in VERBS {
        let line = first_line(verb.doc);
        let _ = write!(out, "  -- {line}\n  {}: ({}) -> {},\n", verb.name, luau_arguments(verb), verb.returns);
    }
    let _ = write!(out, "  -- {NULL}\n  null: any,\n  log: {{\n");
    for verb in LOGS {
        let _ = writeln!(out, "    {}: ({}) -> {},", verb.name, luau_arguments(verb), verb.returns);
    }
    out.push_str("  },\n}\n\ndeclare params: {[string]: any}\n");
    out
}

fn luau_arguments(verb: &Verb) -> String {
    if verb.options.is_empty() {
        let arguments = arguments(verb).into_iter().map(|(name, kind)| format!("{name}: {kind}"));
        return arguments.collect::<Vec<_>>().join(", ");
    }
    let field = |option: &'static Opt| {
        option.names().map(|name| {
            let kind = option.kind.annotation();
            match option.required {
                true => format!("{name}: {kind}"),
                false => format!("{name}: ({kind})?"),
            }
        })
    };
    let fields: Vec<String> = verb.all().flat_map(field).collect();
    let optional = if verb.all().any(|option| option.required) { "" } else { "?" };
    format!("options: {{ {} }}{optional}", fields.join(", "))
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn told(option: &Opt) -> String {
    match option.default {
        "" => option.doc.to_owned(),
        default => format!("{} (default: {default})", option.doc),
    }
}

/// `fine_tune` as `FineTune`.
fn pascal(name: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').map(capital).collect()
}

const NULL: &str = "The null of JSON, as an item of a list.";

const GENERATED: &str =
    "Written by the program's tests from runtime/host/src/pipeline/api/spec.rs; see scripts/README.md.";

const DATASETS: &str = "A dataset is a list of rows. Its methods change nothing: each returns a new dataset. A row is a table with all fields of its line
in the file; a function gets a copy of one row at a time. An error in a function names its own line and the row's.

What a script does not touch stays as it was. `filter`, `sample` and the others pass rows on, and `map` writes only what differs from
what the function was given: the order of keys stays, and so do nulls and the spelling of numbers (`1.0`, 9007199254740993). A field
that is null is nil in Lua; an item of a list that is null is `homeroom.null`, which a script can also write. A table that the function
makes itself keeps the nulls of the one in its place if it has all the other fields of that one.
";

const INTRODUCTION: &str = r#"# Pipelines in Lua

A pipeline is a Lua script that loads a model, trains it, measures it and saves it. A TOML file names the script and declares its
parameters ([configs/](../configs/README.md)). To write your own, copy the nearest of these scripts and change it:

| script | what it does |
| --- | --- |
| `quickstart.lua` | teaches the pocket model a rule, and asks it before and after |
| `fine_tune.lua` | trains on a file, measures on held-out rows, saves the adapter, lets it answer |
| `curriculum.lua` | trains on easy rows first and on hard ones last; a stage counts if the held-out loss falls |
| `improve.lua` | trains on rated answers; the new model replaces the present one if it is better and has not forgotten |
| `questions.lua` | writes question and answer rows from a text, with a model or a handler |
| `compare.lua` | trains with several strategies or settings on the same rows, and prints a table |

```
homeroom run configs/fine_tune.toml --set model=MODEL --set dataset=rows.jsonl
homeroom run CONFIG --check        # says what is wrong, and runs nothing; required parameters need not be set
homeroom run CONFIG --dry-run      # says what it would do, train and need, and does none of it
homeroom run CONFIG --watch        # runs again when the TOML file, the script or a module has changed
homeroom run CONFIG --fresh        # makes everything anew
homeroom run CONFIG --help         # lists the parameters of the file
homeroom new NAME                  # writes a pipeline to start from
```

What `fine_tune`, `evaluate`, `forgetting`, `generate` and `save_model` make is looked up when it was made before: of the same model, rows and options, by the
same strategy, program and kind of processor, and with the same callbacks. So a changed stage runs anew with those behind it, and the
others do not; a run that was killed or interrupted goes on where it was when it is started again. A callback is what it does, the
variables that it takes from around it and the parameters that it reads; where that cannot be told, it is the whole script. Results whose
files are gone or altered are made again. With `--watch` a change in mid-training stops it after its step, if the new script has no
problems that `--check` finds.

What the script returns is the result: it goes to stdout, and with `--json` as JSON. What it prints goes to stderr, beside the
progress. Without `--json` a list of more than five items is not printed if the run trained something: it is in `result.json` in the
run's directory. Ctrl-C ends a training after its step and a script at once, with exit code 130.

## The language

Scripts are [Luau](https://luau.org): Lua 5.1 with `+=`, `continue`, `//` and types. Numbers are doubles. For completion in an editor,
`types/homeroom.meta.lua` is for LuaLS (add `scripts/types` to `workspace.library`), `types/homeroom.d.luau` for luau-lsp.

- `params` holds the declared parameters, checked and read-only. Paths in it are absolute.
- A path that a script writes is relative to the script and has to lie below the TOML file's directory; symbolic links are followed
  first. A file elsewhere has to be named by a parameter of type `path` or `model`. Only regular files are read.
- A model of the Hugging Face hub is `owner/name`, with `@revision` or `:Q4_K_M` (one of its GGUF files) behind it. It is read from Hugging
  Face's cache. What is not there is downloaded before the script starts, if a parameter of type `model` names it; a name that the
  script writes is never downloaded, since it could carry what the script has read.
- A verb takes one table of options. An unknown option or a value of the wrong type is an error at the script's line.
- Options have the names of transformers and PEFT. Where the table of a verb says "or", both names mean the same option.
- Verbs return plain tables and strings; only datasets are objects. A model is a table of names, and verbs check these names again: a
  table that a script writes itself opens nothing that the script may not read.
- The error of a verb is a string that begins with the script's line. `pcall` catches it.
- An undefined name is an error, and so is a global variable: write `local`.
- `require("lib/x")` runs `lib/x.lua` beside the script, once. A module's name has small letters, digits and underscores.
- `print` and `homeroom.log` write to stderr, at most 16 MiB a run. Control characters appear as `\u{1b}`.
- In a dry run losses are imagined: they fall as trainings go on, and forecast nothing. Callbacks are called once each, with a sample.

A script can compute and call verbs, and nothing else: it has no files, no processes and no bytecode, and libraries are read-only.
Its values may take 256 MiB. The rows of its datasets may take half of the machine's memory, at most 8 GiB. What it returns, logs or
makes of one row may take 64 MiB. `lua_seconds` limits its own time, its work on datasets included. Library functions have limits
too: `string.rep` makes 64 MiB, `table.move` moves 10 million elements, and a long set in a pattern is refused for a long text. These
limits stop accidents and hostile scripts. They do not limit what verbs do: a script can train for days, and replace the models that
it names.

What `fine_tune` makes stays in `runs/SCRIPT-NUMBER/` in the data directory (`$HOMEROOM_HOME`) until `homeroom runs rm` removes it. Of more than
50 runs, or 10 GB of them, a new run removes the oldest that have ended and that nobody names. `save_model` copies the model's own files to the
registry, where only you can read them.
"#;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_function_has_a_doc_an_example_and_options_that_are_told() {
        for verb in VERBS.iter().chain(METHODS).chain(LOGS) {
            assert!(!verb.doc.is_empty() && verb.doc.lines().all(|line| line.ends_with(['.', ')'])), "{}", verb.name);
            assert!(verb.example.contains(verb.name) || verb.name == "len", "{} has no example of its own", verb.name);
            for option in verb.all() {
                assert!(!option.doc.is_empty(), "{}.{}", verb.name, option.name);
                assert!(option.required || !option.default.is_empty(), "{}.{}: no default", verb.name, option.name);
            }
        }
    }

    /// With HOMEROOM_BLESS=1 the files are written instead of compared.
    #[test]
    fn the_committed_reference_is_what_the_program_says() {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts");
        for (name, text) in
            [("README.md", markdown()), ("types/homeroom.meta.lua", lua_ls()), ("types/homeroom.d.luau", luau())]
        {
            let path = scripts.join(name);
            if std::env::var_os("HOMEROOM_BLESS").is_some() {
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(&path, &text).unwrap();
            }
            let committed = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(committed == text, "scripts/{name} is out of date: run the tests with HOMEROOM_BLESS=1");
        }
    }
}
