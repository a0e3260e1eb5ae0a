//! `homeroom run`.

use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::arguments::{PluginArgs, name_value};
use super::{Done, print, this_program};
use crate::interrupt;
use crate::near::exists;
use crate::pipeline::config::PipelineConfig;
use crate::pipeline::{self, sandbox::shown};
use crate::progress::line;
use crate::watch::Tree;

/// Arguments of `run`.
#[derive(Args)]
pub struct Arguments {
    /// TOML file with a [pipeline] table
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Set a parameter of the pipeline; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_value)]
    set: Vec<(String, String)>,
    /// Only check the file and its script, and say what is wrong with them
    #[arg(long, conflicts_with = "dry_run")]
    check: bool,
    /// Run the script without training or writing, and print what it would do
    #[arg(long)]
    dry_run: bool,
    /// Run again when the file or a script beside its script is saved; a training continues with new builds of its strategy
    #[arg(long, conflicts_with_all = ["check", "json"])]
    watch: bool,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Print what the script returns as JSON
    #[arg(long)]
    json: bool,
}

/// Ctrl-C is listened for once a process.
static LISTEN: Once = Once::new();

/// Runs a pipeline, or says what it would do, or what is wrong with it; with `--watch` again after each change.
pub fn run(arguments: &Arguments) -> Result<Done> {
    exists(&arguments.config)?;
    if !arguments.watch {
        return once(arguments);
    }
    let config = PipelineConfig::read(&arguments.config, &arguments.set)?;
    let scripts = config.script.parent().unwrap_or(Path::new(".")).to_owned();
    let (mut tree, problem) = Tree::new(vec![arguments.config.clone(), scripts.clone()]);
    if let Some(problem) = problem {
        line(format_args!("note: changes are looked for every 2 s only: {problem}"));
    }
    loop {
        match once(arguments) {
            Ok(Done::Interrupted) => return Ok(Done::Interrupted),
            Ok(_) => {}
            Err(error) => line(format_args!("error: {error:#}")),
        }
        line(format_args!("watching  {} and {}   Ctrl-C ends", arguments.config.display(), shown(&scripts)));
        let Some(changed) = tree.wait(&interrupt::asked) else { return Ok(Done::Interrupted) };
        line(format_args!("changed   {}", shown(&changed)));
    }
}

fn once(arguments: &Arguments) -> Result<Done> {
    let config = PipelineConfig::read(&arguments.config, &arguments.set)?;
    if arguments.check {
        pipeline::check(&config)?;
        eprintln!("{}: no problems found in it and in {}", arguments.config.display(), shown(&config.script));
        return Ok(Done::Whole);
    }
    eprintln!("pipeline  {}   {}", arguments.config.display(), shown(&config.script));
    for (name, value) in config.params.iter().filter(|(_, value)| !value.is_null()) {
        eprintln!("  {name} = {value}");
    }
    LISTEN.call_once(|| {
        // Without it Ctrl-C ends the run at once.
        let _ = interrupt::listen();
    });
    let mut search = arguments.plugins.search()?;
    if arguments.watch {
        search = search.watched(this_program()?);
    }
    let outcome = pipeline::run(&config, search, arguments.dry_run, &interrupt::asked);
    let outcome = match outcome {
        Err(error) if interrupt::asked() => {
            eprintln!("{error:#}: the script has ended where it was");
            return Ok(Done::Interrupted);
        }
        outcome => outcome?,
    };
    if arguments.dry_run {
        let (words, actions): (Vec<String>, Vec<Value>) = outcome.actions.into_iter().unzip();
        print(&match arguments.json {
            true => json!({"would": actions}).to_string(),
            false => format!("would\n  {}", words.join("\n  ")),
        })?;
    } else if arguments.json {
        print(&outcome.result.to_string())?;
    } else if !outcome.result.is_null() {
        let mut lines = Vec::new();
        readable("", &outcome.result, &mut lines);
        let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let lines: Vec<String> = lines.iter().map(|(name, value)| format!("{name:width$}  {value}")).collect();
        print(lines.join("\n").trim())?;
    }
    Ok(Done::Whole)
}

/// One line a plain value, its names joined by dots.
fn readable(name: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    let within = |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}.{part}") };
    match value {
        Value::Object(fields) => {
            for (part, field) in fields {
                readable(&within(part), field, lines);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                readable(&within(&(index + 1).to_string()), item, lines);
            }
        }
        Value::String(text) => lines.push((name.to_owned(), text.clone())),
        other => lines.push((name.to_owned(), other.to_string())),
    }
}
