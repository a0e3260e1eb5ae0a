//! What to type here for a flag or a command of transformers, PEFT, TRL, mlx-lm, LLaMA-Factory, llama.cpp or Ollama.

use std::ffi::OsString;

use clap::Command;
use clap::Error;
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Flags elsewhere, and what they are here: the first that the command has. Hyphens stand for underscores, too.
const FLAGS: [(&str, &[&str]); 73] = [
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
];

/// Flags elsewhere that no flag here stands for: a flag of the commands that are meant, and what to know.
const NOTES: [(&str, &str, &str); 16] = [
    ("do-sample", "temperature", "--temperature 0 takes the likeliest token, a higher one samples"),
    ("eval-steps", "eval-file", EVALUATED),
    ("eval-strategy", "eval-file", EVALUATED),
    ("evaluation-strategy", "eval-file", EVALUATED),
    ("logging-steps", "training-file", "there is no such flag: the loss of each step is in trainer_state.json"),
    ("no-gradient-checkpointing", "gradient-checkpointing", "it is off unless --gradient-checkpointing is given"),
    ("no-stream", "prompt", "there is no such flag: a reply is always printed as it comes"),
    ("packing", "no-packing", "packing is the default, --no-packing turns it off"),
    ("resume", "init-from", RESUMED),
    ("resume-from", "init-from", RESUMED),
    ("resume-from-checkpoint", "init-from", RESUMED),
    ("save-steps", "output-dir", SAVED),
    ("save-strategy", "output-dir", SAVED),
    ("save-total-limit", "output-dir", SAVED),
    ("stream", "prompt", "a reply is printed as it comes already"),
    ("warmup-steps", "warmup-ratio", "--warmup-ratio is a share of the steps: 10 of 200 are --warmup-ratio 0.05"),
];
const EVALUATED: &str = "there is no such flag: the loss on --eval-file is measured before and after the training; a pipeline's fine_tune has eval_steps";
const RESUMED: &str = "a training cannot be resumed yet; --init-from begins another with an adapter's weights";
const SAVED: &str = "there is no such flag: what is trained is saved at the end, and where Ctrl-C stops it";

/// Commands elsewhere, and what they are here.
const COMMANDS: [(&str, &str); 24] = [
    ("add", "import"),
    ("cache", "list-models"),
    ("copy", "cp"),
    ("delete", "rm"),
    ("evaluate", "eval"),
    ("export", "export-model"),
    ("finetune", "fine-tune"),
    ("fuse", "export-model"),
    ("generate", "chat --prompt TEXT"),
    ("info", "show"),
    ("inspect", "show"),
    ("list", "list-models"),
    ("lora", "fine-tune"),
    ("ls", "list-models"),
    ("merge", "export-model"),
    ("models", "list-models"),
    ("perplexity", "eval"),
    ("predict", "chat --prompt TEXT"),
    ("remove", "rm"),
    ("server", "serve"),
    ("sft", "fine-tune"),
    ("start", "serve"),
    ("train", "fine-tune"),
    ("tune", "fine-tune"),
];

/// Adds a tip to the error about a command line, if there is one.
pub fn add(error: &mut Error, root: &Command, arguments: &[OsString]) {
    let tip = match error.kind() {
        ErrorKind::UnknownArgument => {
            let wrong = text(error, ContextKind::InvalidArg);
            let command = asked(root, arguments);
            wrong.and_then(|wrong| match wrong.strip_prefix("--") {
                Some(flag) => self::flag(&wrong, flag, command).or_else(|| {
                    let is_near = error.get(ContextKind::SuggestedArg).is_some();
                    (!is_near).then(|| parameter(flag, command, arguments))?
                }),
                None => value(&wrong, command, arguments),
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
        Some("json" | "jsonl") => ["--training-file", "--file"],
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
    let here = || COMMANDS.iter().find(|(elsewhere, _)| command.get_name() == "homeroom" && *elsewhere == word);
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
        assert!(FLAGS.is_sorted() && NOTES.is_sorted() && COMMANDS.is_sorted());
    }
}
