//! `homeroom run`.

use anyhow::Result;
use serde_json::{Value, json};

use super::print;
use crate::cli::{Done, Run};
use crate::interrupt;
use crate::pipeline::config::PipelineConfig;
use crate::pipeline::{self, sandbox::shown};

/// Runs a pipeline, or says what it would do, or what is wrong with it.
pub fn run(arguments: &Run) -> Result<Done> {
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
    interrupt::listen()?;
    let outcome = pipeline::run(&config, arguments.plugins.search()?, arguments.dry_run, &interrupt::asked);
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
