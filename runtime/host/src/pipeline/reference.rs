//! The reference of what scripts can call, and the type files for editors: written from [`super::api::spec`], so that they
//! say what the program does. A test holds the files in `scripts/` equal to these texts.

use std::fmt::Write as _;

use super::api::spec::{LOGS, METHODS, Opt, VERBS, Verb};

/// A table that scripts get or give: its name, what it is, and its fields with type and meaning.
struct Shape {
    name: &'static str,
    doc: &'static str,
    fields: &'static [(&'static str, &'static str, &'static str)],
}

const MODEL_FIELDS: [(&str, &str, &str); 4] = [
    ("model", "string", "the base: a name or path"),
    ("strategy", "string?", "the strategy that trains it"),
    ("options", "{[string]: any}", "the strategy's options"),
    ("adapter", "string?", "id of what was trained, if something was"),
];

const SHAPES: [Shape; 9] = [
    Shape { name: "Model", doc: "A model: what `model` takes, in every verb.", fields: &MODEL_FIELDS },
    Shape {
        name: "Tuned",
        doc: "A model that `fine_tune` trained; a Model too.",
        fields: &[
            ("metrics", "Metrics", "what came of the training"),
            ("stopped", "string", "\"finished\", or the reason that a callback gave"),
        ],
    },
    Shape {
        name: "Metrics",
        doc: "What came of a training. Losses are means over trained tokens, in nats.",
        fields: &[
            ("eval_loss", "number?", "held-out loss after; nil without `eval`"),
            ("eval_loss_before", "number?", "held-out loss before"),
            ("train_loss", "number", "mean loss of all steps"),
            ("steps", "number", "steps that were done"),
            ("planned_steps", "number", "steps that were planned"),
        ],
    },
    Shape {
        name: "Saved",
        doc: "A model in the registry; a Model too.",
        fields: &[("name", "string", "its name"), ("path", "string", "its directory")],
    },
    Shape {
        name: "Handler",
        doc: "What answers under a name.",
        fields: &[
            ("name", "string", "the name"),
            ("kind", "string", "\"local\""),
            ("model", "string", "the model, by name or path"),
        ],
    },
    Shape {
        name: "Evaluation",
        doc: "Loss over a dataset.",
        fields: &[
            ("loss", "number", "mean cross-entropy of trained tokens, in nats"),
            ("perplexity", "number", "e to the loss"),
            ("token_accuracy", "number", "share of trained tokens that the model found likeliest"),
            ("trained_tokens", "number", "how many there are"),
            ("examples", "number", "sequences that were measured"),
        ],
    },
    Shape {
        name: "StepReport",
        doc: "What `on_step` is told.",
        fields: &[
            ("step", "number", "number of the step, from 1"),
            ("steps", "number", "steps that are planned"),
            ("epoch", "number", "epochs done, with the part of the present one"),
            ("loss", "number", "loss of the step's rows before the update"),
            ("grad_norm", "number", "norm of the gradients before clipping"),
            ("learning_rate", "number", "learning rate of the update"),
            ("tokens", "number", "tokens of the step's rows"),
        ],
    },
    Shape {
        name: "EvalReport",
        doc: "What `on_eval` is told.",
        fields: &[
            ("step", "number", "number of the step, from 1"),
            ("steps", "number", "steps that are planned"),
            ("epoch", "number", "epochs done, with the part of the present one"),
            ("eval_loss", "number", "held-out loss"),
            ("perplexity", "number", "e to the loss"),
            ("token_accuracy", "number", "share of held-out tokens that the model found likeliest"),
            ("best", "number", "lowest held-out loss so far, this one included"),
        ],
    },
    Shape {
        name: "Directive",
        doc: "What a callback may return; nil changes nothing.",
        fields: &[
            ("stop", "string?", "no further step; the reason goes to `stopped`"),
            ("learning_rate_scale", "number?", "from now on the schedule's learning rates times this"),
        ],
    },
];

/// What a verb takes that has no table of options.
fn arguments(verb: &Verb) -> Vec<(&'static str, &'static str)> {
    match verb.name {
        "filter" => vec![("keep", "(row: Row) -> boolean")],
        "map" => vec![("change", "(row: Row) -> Row?")],
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
    for Shape { name, doc, fields } in &SHAPES {
        let _ = write!(out, "\n### {name}\n\n{doc}\n\n| field | type | |\n| --- | --- | --- |\n");
        for (field, kind, doc) in *fields {
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
            let alias = option.alias.map(|alias| format!(" (or `{alias}`)")).unwrap_or_default();
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
    for Shape { name, doc, fields } in &SHAPES {
        let parent = if matches!(*name, "Tuned" | "Saved") { ": Model" } else { "" };
        let _ = write!(out, "\n---{doc}\n---@class {name}{parent}\n");
        for (field, kind, doc) in *fields {
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
    out.push_str("\nhomeroom = {}\n");
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
            for name in [Some(option.name), option.alias].into_iter().flatten() {
                let mark = if option.required { "" } else { "?" };
                let _ =
                    writeln!(out, "---@field {name}{mark} {} # {}", ls_type(&option.kind.annotation()), told(option));
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
        "(row: Row) -> boolean" => "fun(row: Row): boolean",
        "(row: Row) -> Row?" => "fun(row: Row): Row?",
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
    for Shape { name, doc, fields } in &SHAPES {
        let _ = write!(out, "\n-- {doc}\nexport type {name} = {{\n");
        let inherited = matches!(*name, "Tuned" | "Saved");
        for (field, kind, doc) in MODEL_FIELDS.iter().filter(|_| inherited).chain(*fields) {
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
    out.push_str("  log: {\n");
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
        let names = [Some(option.name), option.alias].into_iter().flatten();
        names.map(|name| {
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

const GENERATED: &str =
    "Written by the program's tests from runtime/host/src/pipeline/api/spec.rs; see scripts/README.md.";

const DATASETS: &str = "A dataset is rows in an order. Its methods change nothing: each gives a new dataset, and rows are shared. A row is the
table that its line in the file is, all fields included; functions get a copy of one row at a time. A field that is null in
the file is nil, so it is gone from a row that `map` returns. An error in a function names its own line and the row's.
";

const INTRODUCTION: &str = r#"# Pipelines in Lua

A pipeline is a Lua script that loads, trains, measures and saves; a TOML file declares its parameters
([configs/](../configs/README.md)). To write one, copy the nearest script here and change it:

| script | what it does |
| --- | --- |
| `quickstart.lua` | teaches the pocket model a rule, and asks it before and after |
| `fine_tune.lua` | trains on a file, holds some rows out, saves the adapter, answers with it |
| `curriculum.lua` | trains from easy rows to hard ones in stages, each gated on the same held-out rows |

```
homeroom run configs/fine_tune.toml --set model=MODEL --set dataset=rows.jsonl
homeroom run configs/fine_tune.toml --check        # says what is wrong, without running anything
homeroom run configs/fine_tune.toml --dry-run      # says what it would do and train, without doing it
```

What the script returns is printed on stdout (`--json`: as JSON); what it prints, and the story of the run, goes to stderr.
Ctrl-C ends a training after its step, and a script that computes at once; the exit code is 130.

## The language

Scripts are [Luau](https://luau.org), which is Lua 5.1 with `+=`, `continue`, `//` and types. Numbers are doubles. Editors know the
verbs: `types/homeroom.meta.lua` is for LuaLS (add `scripts/types` to `workspace.library`), `types/homeroom.d.luau` for luau-lsp.

- `params` holds the declared parameters, checked and read-only. Paths among them are absolute.
- A path in a script is relative to the script, and has to lie below the directory of the TOML file, symbolic links resolved; what
  is elsewhere is named by a parameter of type `path` or `model`. Only regular files are read.
- A verb takes one table of options. An unknown option, or one of another type, is an error at the script's line.
- Verbs return plain tables and strings, which can be stored; only datasets are objects. A model's table is looked up as its
  names are: a script can write one, and gets no further with it.
- An error of a verb is a string that begins with the script's line; `pcall` catches it.
- A name that nobody defined is an error, and so is a global: write `local`.
- `require("lib/x")` runs `lib/x.lua` beside the script, once; names are small letters, digits and underscores.
- `print` and `homeroom.log` write to stderr, 16 MiB a run, controls of a terminal as `\u{1b}`.
- In a dry run losses are not numbers (`nan`), and comparisons with them are false.

A script can compute and call verbs, and nothing else: there are no files, no processes and no bytecode, and libraries are
read-only. Its values may take 256 MiB, and the rows of its datasets half of the machine's memory, at most 8 GiB; what it returns,
logs or makes of one row 64 MiB. Its own time, work on datasets included, is bounded by `lua_seconds`; library functions are bounded
too: `string.rep` to 64 MiB, `table.move` to 10 million elements, patterns by their longest set times the text. That stops accidents
and hostile scripts; it does not bound what verbs do: a script can train for days, and overwrite the models that it names.

What is trained is kept in `runs/SCRIPT-NUMBER/` in the data directory (`$HOMEROOM_HOME`) until it is deleted; `save_model` copies
the model's own files to the registry, for the user alone.
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
