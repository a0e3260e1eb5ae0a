//! `homeroom feedback`: what people thought of answers, as rows to learn from; one person's data; whether the log is as it was written.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{ArgGroup, Args, Subcommand};
use serde_json::Value;

use super::{Done, print};
use crate::memory::rows::{Form, rows};
use crate::memory::{Memory, Whose, verify};
use crate::private;
use crate::progress::line;
use crate::registry::data_directory;
use crate::terminal::cell;

/// What is done.
#[derive(Subcommand)]
pub enum Feedback {
    /// Writes rated answers as rows that `scripts/improve.lua` and `fine-tune --objective kto` learn from
    Export(Export),
    /// Hands out or deletes all that is kept of one person
    Person(Person),
    /// Checks that the log is as it was written, and says the digest of its last line; exit code 1 if it is not
    Verify(Verify),
}

/// Arguments of `feedback export`.
#[derive(Args)]
pub struct Export {
    /// File of rows to write, JSONL
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write corrected answers as pairs instead, for `fine-tune --objective dpo`: prompt, chosen and rejected
    #[arg(long)]
    pairs: bool,
    /// Answers of this model alone, as clients name it
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
}

/// Arguments of `feedback person`.
#[derive(Args)]
#[command(group(ArgGroup::new("what").args(["export", "delete"]).required(true)))]
pub struct Person {
    /// Write all that is kept of this person, JSONL: as the program named them that asked for them, or the name of a key of their own
    #[arg(long, value_name = "USER")]
    export: Option<String>,
    /// Delete it; the log keeps that something was deleted, and when
    #[arg(long, value_name = "USER")]
    delete: Option<String>,
    /// The key whose program named them; required where two keys have a person of that name; "" is those of no key
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// File to write [default: stdout]
    #[arg(long, value_name = "FILE", conflicts_with = "delete")]
    out: Option<PathBuf>,
}

/// Arguments of `feedback verify`.
#[derive(Args)]
pub struct Verify {
    /// A digest that an earlier check said: it has to be in the log still, so that nothing was cut off
    #[arg(long, value_name = "DIGEST")]
    head: Option<String>,
}

/// Runs it.
pub fn run(what: &Feedback) -> Result<Done> {
    let data = data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    match what {
        Feedback::Export(arguments) => export(&data, arguments),
        Feedback::Person(arguments) => person(&data, arguments),
        Feedback::Verify(arguments) => {
            let found = verify(&data, arguments.head.as_deref())?;
            line(format_args!(
                "whole     {} lines; {} contents are as they were written, {} were removed",
                found.lines, found.contents, found.removed
            ));
            print(&found.head)?;
            Ok(Done::Whole)
        }
    }
}

fn export(data: &Path, arguments: &Export) -> Result<Done> {
    let contents = Memory::at(data)?.contents()?;
    let form = if arguments.pairs { Form::Pairs } else { Form::Ratings };
    let rows = rows(&contents, form, arguments.model.as_deref());
    if rows.is_empty() {
        let (what, hint) = match form {
            Form::Ratings => ("no answer was rated", "clients rate by POST /v1/feedback"),
            Form::Pairs => ("no answer was corrected", "without --pairs, ratings are written"),
        };
        let of = arguments.model.as_ref().map(|model| format!(" of model `{}`", cell(model))).unwrap_or_default();
        bail!(
            "{what}{of} whose conversation is kept; nothing is written\nhint: {hint}; [memory] content = \"redacted\" or \"full\" keeps conversations"
        );
    }
    write(&arguments.out, rows.iter())?;
    let liked = rows.iter().filter(|row| row["label"] == true).count();
    let of = if arguments.pairs { String::new() } else { format!(", {liked} of them liked") };
    line(format_args!("saved     {}   {} rows{of}", arguments.out.display(), rows.len()));
    let next = match form {
        Form::Ratings => {
            format!("homeroom run configs/improve.toml --set ratings={} --set name=NAME", arguments.out.display())
        }
        Form::Pairs => {
            format!("homeroom fine-tune --objective dpo --training-file {} --model-name MODEL", arguments.out.display())
        }
    };
    line(format_args!("next      {next}"));
    Ok(Done::Whole)
}

fn person(data: &Path, arguments: &Person) -> Result<Done> {
    let memory = Memory::at(data)?;
    let key = arguments.key.as_deref();
    if let Some(name) = &arguments.delete {
        let count = memory.forget_person(Whose { name, key })?;
        line(format_args!("deleted   {count} contents of {}", cell(name)));
        return Ok(Done::Whole);
    }
    let name = arguments.export.as_deref().context("clap asks for one of both")?;
    let found: Vec<Value> =
        memory.of_person(Whose { name, key })?.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
    match &arguments.out {
        Some(path) => {
            write(path, found.iter())?;
            line(format_args!("saved     {}   {} contents of {}", path.display(), found.len(), cell(name)));
        }
        None => {
            for content in &found {
                print(&content.to_string())?;
            }
            line(format_args!("{} contents of {}", found.len(), cell(name)));
        }
    }
    Ok(Done::Whole)
}

/// Writes rows for the user alone: they are what people said.
fn write<'a>(path: &Path, rows: impl Iterator<Item = &'a Value>) -> Result<()> {
    let failed = || format!("{}: cannot write", path.display());
    let mut options = private::options();
    options.write(true).create(true).truncate(true);
    let mut file = BufWriter::new(options.open(path).with_context(failed)?);
    for row in rows {
        writeln!(file, "{row}").with_context(failed)?;
    }
    file.flush().with_context(failed)
}
