//! What to type here for a flag or a command of transformers, PEFT, TRL, mlx-lm, LLaMA-Factory, llama.cpp or Ollama.

use std::ffi::OsString;

use clap::Command;
use clap::Error;
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::hub::HubName;
use crate::troubles::CUDA;

/// Flags elsewhere, and what they are here: the first that the command has. Hyphens stand for underscores, too.
const FLAGS: [(&str, &[&str]); 75] = [
    ("adapter", &["--model-dir", "--init-from"]),
    ("adapter-name-or-path", &["--model-dir", "--init-from"]),
    ("adapter-path", &["--model-dir", "--init-from"]),
    ("alpha", &["--lora-alpha"]),
    ("base", &["--base-model", "--model-name"]),
    ("base-model", &["--model-name"]),
    ("bf16", &["--compute bf16"]),
    ("bs", &["--batch-size"]),
    ("ckpt", &["--init-from", "--model-dir"]),
    ("cutoff-len", &["--max-seq-len"]),
    ("data", &["--training-file", "--file"]),
    ("data-path", &["--training-file", "--file"]),
    ("dataset", &["--training-file", "--file"]),
    ("dataset-name", &["--training-file", "--file"]),
    ("dataset-path", &["--training-file", "--file"]),
    ("dropout", &["--lora-dropout"]),
    ("epoch", &["--epochs"]),
    ("eval-dataset", &["--eval-file"]),
    ("eval-file", &["--file"]),
    ("fine-tune-type", &["--strategy"]),
    ("finetuning-type", &["--strategy"]),
    ("fp16", &["--compute bf16"]),
    ("fp32", &["--compute f32"]),
    ("grad-accum", &["--gradient-accumulation-steps"]),
    ("grad-accumulation-steps", &["--gradient-accumulation-steps"]),
    ("grad-checkpoint", &["--gradient-checkpointing"]),
    ("gradient-accumulation", &["--gradient-accumulation-steps"]),
    ("input", &["--training-file", "--file", "--prompt"]),
    ("iters", &["--max-steps"]),
    ("learningrate", &["--learning-rate"]),
    ("load-in-4-bit", &["--strategy qlora"]),
    ("load-in-4bit", &["--strategy qlora"]),
    ("load-in-8-bit", &["--strategy int8"]),
    ("load-in-8bit", &["--strategy int8"]),
    ("lora-rank", &["--lora-r"]),
    ("lora-target", &["--target-modules"]),
    ("lora-target-modules", &["--target-modules"]),
    ("lr", &["--learning-rate"]),
    ("lr-schedule", &["--lr-scheduler-type"]),
    ("lr-scheduler", &["--lr-scheduler-type"]),
    ("max-length", &["--max-seq-len", "--max-tokens"]),
    ("max-new-tokens", &["--max-tokens", "--tokens"]),
    ("max-seq-length", &["--max-seq-len"]),
    ("method", &["--strategy"]),
    ("micro-batch-size", &["--batch-size"]),
    ("model", &["--model-name", "--model-dir"]),
    ("model-id", &["--model-name", "--model-dir"]),
    ("model-name-or-path", &["--model-name", "--model-dir"]),
    ("model-path", &["--model-name", "--model-dir"]),
    ("n-predict", &["--max-tokens", "--tokens"]),
    ("num-epochs", &["--epochs"]),
    ("num-train-epochs", &["--epochs"]),
    ("out", &["--output-dir"]),
    ("outdir", &["--output-dir"]),
    ("output", &["--output-dir"]),
    ("output-path", &["--output-dir"]),
    ("per-device-train-batch-size", &["--batch-size"]),
    ("pretrained-model-name-or-path", &["--model-name", "--model-dir"]),
    ("qlora", &["--strategy qlora"]),
    ("quantization-bit", &["--strategy qlora"]),
    ("rank", &["--lora-r"]),
    ("resume-adapter-file", &["--init-from"]),
    ("save-path", &["--output-dir"]),
    ("steps", &["--max-steps"]),
    ("system-prompt", &["--system"]),
    ("temp", &["--temperature"]),
    ("test-size", &["--eval-fraction"]),
    ("train-batch-size", &["--batch-size"]),
    ("train-file", &["--training-file", "--file"]),
    ("training-file", &["--file"]),
    ("use-dora", &["--set-option use_dora=true"]),
    ("use-rslora", &["--set-option use_rslora=true"]),
    ("val-set-size", &["--eval-fraction"]),
    ("validation-file", &["--eval-file"]),
    ("yes", &["--force"]),
];

/// Flags elsewhere that no flag here stands for: a flag of the commands that are meant, and what to know.
const NOTES: [(&str, &str, &str); 20] = [
    ("cuda", "compute", ON_PROCESSOR),
    ("device", "compute", ON_PROCESSOR),
    ("device-map", "compute", ON_PROCESSOR),
    ("do-sample", "temperature", "--temperature 0 takes the likeliest token, a higher one samples"),
    ("eval-strategy", "eval-every", EVALUATED),
    ("evaluation-strategy", "eval-every", EVALUATED),
    ("gpu", "compute", ON_PROCESSOR),
    ("gpus", "compute", ON_PROCESSOR),
    ("logging-steps", "training-file", "there is no such flag: the loss of each step is in trainer_state.json"),
    ("n-gpu-layers", "compute", ON_PROCESSOR),
    ("no-cuda", "compute", ON_PROCESSOR),
    ("no-gradient-checkpointing", "gradient-checkpointing", "it is off unless --gradient-checkpointing is given"),
    ("no-stream", "prompt", "there is no such flag: a reply is always printed as it comes"),
    ("packing", "no-packing", "packing is the default, --no-packing turns it off"),
    ("resume-from", "resume", RESUMED),
    ("resume-from-checkpoint", "resume", RESUMED),
    ("save-strategy", "save-every", SAVED),
    ("save-total-limit", "save-every", SAVED),
    ("stream", "prompt", "a reply is printed as it comes already"),
    ("warmup-steps", "warmup-ratio", "--warmup-ratio is a share of the steps: 10 of 200 are --warmup-ratio 0.05"),
];
const ON_PROCESSOR: &str = CUDA.cause;
const EVALUATED: &str = "there is no such flag: the loss on --eval-file is measured before and after the training, and every so many steps with --eval-every";
const RESUMED: &str = "--resume goes on from the last checkpoint of the same command, and `homeroom resume RUN` of a run; --init-from begins another with an adapter's weights";
const SAVED: &str = "there is no such flag: checkpoints are saved every 5 minutes, or as --save-every and --save-minutes say, and the last, the best and two to go back to are kept";

/// Commands elsewhere, and what they are here.
const COMMANDS: [(&str, &str); 39] = [
    ("add", "import"),
    ("ask", "chat --prompt TEXT"),
    ("cache", "list-models"),
    ("complete", "chat --prompt TEXT"),
    ("convert", "export-model"),
    ("copy", "cp"),
    ("delete", "rm"),
    ("diff", "compare"),
    ("download", "pull"),
    ("evaluate", "eval"),
    ("export", "export-model"),
    ("fetch", "pull"),
    ("finetune", "fine-tune"),
    ("fuse", "export-model"),
    ("generate", "chat --prompt TEXT"),
    ("get", "pull"),
    ("history", "runs list"),
    ("info", "show"),
    ("inspect", "show"),
    ("jobs", "runs list"),
    ("list", "list-models"),
    ("logs", "runs show"),
    ("lora", "fine-tune"),
    ("ls", "list-models"),
    ("merge", "export-model"),
    ("models", "list-models"),
    ("perplexity", "eval"),
    ("predict", "chat --prompt TEXT"),
    ("preprocess", "preview"),
    ("remove", "rm"),
    ("scan-cache", "list-models"),
    ("server", "serve"),
    ("sft", "fine-tune"),
    ("start", "serve"),
    ("talk", "chat"),
    ("test", "eval"),
    ("train", "fine-tune"),
    ("tune", "fine-tune"),
    ("uninstall", "rm"),
];

/// Commands elsewhere that no command here stands for, and what to know.
const NO_COMMANDS: [(&str, &str); 12] = [
    ("create", "there is no such command: `homeroom fine-tune` makes a model, and `homeroom import` takes one in"),
    ("embed", "embeddings are served: `homeroom serve --model-dir NAME` answers /v1/embeddings"),
    (
        "login",
        "there is no such command: HF_TOKEN=... before a command, or `hf auth login`, opens gated and private models",
    ),
    ("mv", "`homeroom cp NAME NEW` and then `homeroom rm NAME` rename a model"),
    ("ps", "nothing runs in the background: `homeroom list-models` shows the models, `homeroom chat` talks to one"),
    (
        "push",
        "there is no such command: models stay on this machine; `homeroom export-model` writes one for other programs",
    ),
    (
        "quantize",
        "`homeroom export-model --dtype bf16` writes 16 bits; in 4 bits a base is trained by --strategy qlora",
    ),
    ("rename", "`homeroom cp NAME NEW` and then `homeroom rm NAME` rename a model"),
    (
        "search",
        "there is no such command: https://huggingface.co/models finds models, `homeroom pull owner/name` downloads one",
    ),
    ("stop", "nothing runs in the background: Ctrl-C ends a command"),
    (
        "upload",
        "there is no such command: models stay on this machine; `homeroom export-model` writes one for other programs",
    ),
    ("version", "`homeroom --version` tells it"),
];

/// Flags elsewhere of models of the hub, and what to know. `MODEL` and `VALUE` stand for what was typed.
const OF_HUB: [(&str, &str); 9] = [
    ("cache-dir", IN_CACHE),
    ("hf-token", TOKEN),
    ("include", "the files that are read are downloaded; of GGUF files one is named behind the model: `MODEL:Q4_K_M`"),
    ("local-dir", IN_CACHE),
    ("quant", "the quantization stands behind the name: `MODEL:VALUE`"),
    ("quantization", "the quantization stands behind the name: `MODEL:VALUE`"),
    ("repo-id", "the name stands by itself: `homeroom pull VALUE`"),
    ("revision", "the revision stands behind the name: `MODEL@VALUE`"),
    ("token", TOKEN),
];
const IN_CACHE: &str = "models lie in Hugging Face's cache: HF_HUB_CACHE=VALUE before the command names another";
const TOKEN: &str = "HF_TOKEN=... before the command, or `hf auth login`, opens gated and private models";

/// Adds a tip to the error about a command line, if there is one.
pub fn add(error: &mut Error, root: &Command, arguments: &[OsString]) {
    let tip = match error.kind() {
        ErrorKind::UnknownArgument => {
            let wrong = text(error, ContextKind::InvalidArg);
            let command = asked(root, arguments);
            wrong.and_then(|wrong| match wrong.strip_prefix("--") {
                Some(flag) => {
                    self::flag(&wrong, flag, command).or_else(|| of_hub(&wrong, command, arguments)).or_else(|| {
                        let is_near = error.get(ContextKind::SuggestedArg).is_some();
                        (!is_near).then(|| parameter(flag, command, arguments))?
                    })
                }
                None => letter(&wrong, command).or_else(|| value(&wrong, command, arguments)),
            })
        }
        ErrorKind::InvalidSubcommand => {
            let wrong = text(error, ContextKind::InvalidSubcommand);
            wrong.and_then(|wrong| subcommand(&wrong, asked(root, arguments)))
        }
        _ => None,
    };
    if let Some(tip) = tip {
        error.remove(ContextKind::SuggestedArg);
        error.remove(ContextKind::SuggestedSubcommand);
        // clap's goes on with the flag that it would have suggested.
        let usage = asked(root, arguments).clone().render_usage();
        error.insert(ContextKind::Usage, ContextValue::StyledStr(usage));
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    }
}

fn text(error: &Error, kind: ContextKind) -> Option<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    }
}

/// The command that the arguments name.
fn asked<'c>(root: &'c Command, arguments: &[OsString]) -> &'c Command {
    let words = arguments.iter().skip(1).map_while(|word| word.to_str().filter(|word| !word.starts_with('-')));
    words
        .map_while({
            let mut at = root;
            move |word| {
                at = at.find_subcommand(word)?;
                Some(at)
            }
        })
        .last()
        .unwrap_or(root)
}

fn has(command: &Command, flag: &str) -> bool {
    let name = flag.trim_start_matches('-').split(' ').next();
    command.get_arguments().any(|argument| argument.get_long() == name)
}

/// The tip for a flag that a command does not know.
fn flag(wrong: &str, flag: &str, command: &Command) -> Option<String> {
    let flag = flag.split('=').next().unwrap_or(flag).to_lowercase().replace('_', "-");
    let same = format!("--{flag}");
    if has(command, &same) {
        return Some(format!("'{wrong}' is '{same}' here"));
    }
    if let Some((.., note)) = NOTES.iter().find(|(elsewhere, of, _)| *elsewhere == flag && has(command, of)) {
        return Some(format!("'{wrong}': {note}"));
    }
    let (_, here) = FLAGS.iter().find(|(elsewhere, _)| *elsewhere == flag)?;
    let here = here.iter().find(|flag| has(command, flag))?;
    Some(format!("'{wrong}' is '{here}' here"))
}

/// The tip for a flag about a model of the hub, which is a part of its name here or a variable of the environment.
fn of_hub(wrong: &str, command: &Command, arguments: &[OsString]) -> Option<String> {
    let names_model = command.get_name() == "pull" || ["model-dir", "model-name"].iter().any(|flag| has(command, flag));
    let flag = wrong.trim_start_matches('-').split('=').next()?.to_lowercase().replace('_', "-");
    let (_, note) = OF_HUB.iter().find(|(elsewhere, _)| *elsewhere == flag && names_model)?;
    let words: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
    let at = words.iter().position(|word| word.split('=').next() == wrong.split('=').next())?;
    let (value, behind) = match words[at].split_once('=') {
        Some((_, value)) => (Some(value), at),
        None => (words.get(at + 1).copied().filter(|word| !word.starts_with('-')), at + 1),
    };
    let others = words.iter().enumerate().filter(|(other, _)| *other != behind).map(|(_, word)| *word);
    let model = others.filter(|word| !word.starts_with('-')).find(|word| HubName::parse(word).is_some());
    let note = note.replace("MODEL", model.unwrap_or("owner/name"));
    Some(format!(
        "'{wrong}': {}",
        note.replace("VALUE", value.unwrap_or(if flag == "revision" { "main" } else { "..." }))
    ))
}

/// The tip for a flag of one letter.
fn letter(wrong: &str, command: &Command) -> Option<String> {
    let is_force = ["-f", "-y", "-rf"].contains(&wrong) && has(command, "--force");
    is_force.then(|| format!("'{wrong}' is '--force' here"))
}

/// The tip for a pipeline's parameter that is written as a flag.
fn parameter(flag: &str, command: &Command, arguments: &[OsString]) -> Option<String> {
    if command.get_name() != "run" {
        return None;
    }
    let name = flag.split('=').next()?;
    let mut rest = arguments.iter().filter_map(|word| word.to_str());
    let word = rest.find(|word| word.strip_prefix("--").is_some_and(|word| word.split('=').next() == Some(name)))?;
    let value = match word.split_once('=') {
        Some((_, value)) => Some(value),
        None => rest.next().filter(|word| !word.starts_with("--")),
    };
    let name = name.replace('-', "_");
    Some(format!("set a parameter of the pipeline by --set {name}={}", value.unwrap_or("VALUE")))
}

/// The tip for a word that belongs to no flag.
fn value(wrong: &str, command: &Command, arguments: &[OsString]) -> Option<String> {
    let at = arguments.iter().position(|argument| argument == wrong)?;
    let before = arguments.get(at.checked_sub(1)?)?.to_str()?;
    // transformers' switches take `true`.
    if before.starts_with("--")
        && has(command, before)
        && ["true", "false", "True", "False", "0", "1", "yes", "no"].contains(&wrong)
    {
        return Some(format!("'{before}' takes no value: leave out '{wrong}', and the flag for false"));
    }
    // PEFT's scripts take names of modules one after the other.
    let flag =
        arguments[..at].iter().rev().find_map(|argument| argument.to_str().filter(|word| word.starts_with("--")));
    if flag == Some("--target-modules") {
        return Some(format!("separate the names of modules by commas: --target-modules {before},{wrong}"));
    }
    if command.get_name() == "run" && wrong.contains('=') && !wrong.starts_with('-') {
        return Some(format!("set a parameter of the pipeline by --set {wrong}"));
    }
    // Ollama's and mlx-lm's positional models and files.
    if before != command.get_name() || wrong.starts_with('-') {
        return None;
    }
    let flags = match wrong.rsplit('.').next() {
        Some("json" | "jsonl" | "csv" | "tsv" | "gz") => ["--training-file", "--file"],
        _ => ["--model-name", "--model-dir"],
    };
    let flag = flags.into_iter().find(|flag| has(command, flag))?;
    Some(format!("name it with a flag: {flag} {wrong}"))
}

/// The tip for a command that is not known.
fn subcommand(wrong: &str, command: &Command) -> Option<String> {
    let word = wrong.to_lowercase().replace('_', "-");
    let same = command.find_subcommand(&word).map(Command::get_name);
    // They are commands of the program, not of its commands.
    let is_program = command.get_name() == "homeroom";
    if let Some((_, note)) = NO_COMMANDS.iter().find(|(elsewhere, _)| is_program && *elsewhere == word) {
        return Some(format!("'{wrong}': {note}"));
    }
    let here = || COMMANDS.iter().find(|(elsewhere, _)| is_program && *elsewhere == word);
    let here = same.or_else(|| here().map(|(_, here)| *here))?;
    Some(format!("'{wrong}' is '{here}' here"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    /// A table that names a flag that no command has gives no tip, and nobody would see.
    #[test]
    fn every_tip_names_what_some_command_has() {
        fn all<'c>(command: &'c Command, found: &mut Vec<&'c Command>) {
            found.push(command);
            command.get_subcommands().for_each(|command| all(command, found));
        }
        let (root, mut commands) = (cli::command(), Vec::new());
        all(&root, &mut commands);
        for (elsewhere, here) in FLAGS {
            assert!(!elsewhere.contains('_') && !here.is_empty(), "{elsewhere}");
            for flag in here {
                let name = flag.trim_start_matches('-').split(' ').next();
                let known = |command: &&Command| command.get_arguments().any(|argument| argument.get_long() == name);
                assert!(commands.iter().any(known), "{elsewhere}: {flag}");
            }
            let mut without = commands.iter().filter(|command| !has(command, elsewhere));
            let tip = without.find_map(|command| flag(&format!("--{elsewhere}"), elsewhere, command));
            assert!(tip.is_some_and(|tip| tip.contains(here[0]) || here.len() > 1), "{elsewhere}");
        }
        for (elsewhere, of, note) in NOTES {
            assert!(FLAGS.iter().all(|(flag, _)| *flag != elsewhere), "{elsewhere}");
            let tip = |command: &&Command| has(command, of) && flag("", elsewhere, command).is_some();
            assert!(commands.iter().any(tip), "{elsewhere}: {of}");
            let named = note.split_whitespace().filter(|word| word.starts_with("--"));
            for flag in named.map(|word| word.trim_end_matches([',', ';'])) {
                assert!(commands.iter().any(|command| has(command, flag)), "{elsewhere}: {flag}");
            }
        }
        for (elsewhere, here) in COMMANDS {
            assert!(root.find_subcommand(elsewhere).is_none(), "{elsewhere}");
            assert!(here.split(' ').next().is_some_and(|here| root.find_subcommand(here).is_some()), "{here}");
        }
        for (elsewhere, _) in NO_COMMANDS {
            assert!(root.find_subcommand(elsewhere).is_none(), "{elsewhere}");
            assert!(COMMANDS.iter().all(|(other, _)| *other != elsewhere), "{elsewhere}");
        }
        for (elsewhere, _) in OF_HUB {
            let is_known = FLAGS.iter().any(|(flag, _)| *flag == elsewhere)
                || commands.iter().any(|command| has(command, elsewhere));
            assert!(!is_known, "{elsewhere}");
        }
        assert!(NO_COMMANDS.is_sorted() && OF_HUB.is_sorted());
        assert!(FLAGS.is_sorted() && NOTES.is_sorted() && COMMANDS.is_sorted());
    }
}
