//! `homeroom preview`: rows as the model sees them, and what is to be known of a file before it is learned.
//!
//! [`rendered`] makes rows ready to be shown, [`text`] shows them on a terminal and off it, [`page`] as one HTML file.

mod page;
mod rendered;
mod text;

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use homeroom_engine::adapt::adapter::{AdapterFiles, is_adapter};
use homeroom_engine::data::report::personal::Redactor;
use homeroom_engine::data::report::{Files, PLACES_NAMED, Survey};
use homeroom_engine::data::{Reading, Source, read_texts};
use homeroom_engine::files::ClaimedFile;
use homeroom_engine::models::BaseModel;
use homeroom_engine::train::objective::Kind;
use serde_json::json;

pub use self::rendered::{Rendered, render};
pub use self::text::{Look, rows as rows_as_text};
use super::arguments::{COUNT_MAX, OBJECTIVES, RowArgs, one_of, share, whole};
use super::rows::{is_input, named, to_learn_from, to_measure_on};
use super::{Done, is_same, print};
use crate::data_report;
use crate::interrupt;
use crate::models::{Network, base_of, encoder, load_base, locate, shown, with_text};
use crate::progress::{line, thousands};
use crate::stdout::Stdout;

/// Arguments of `preview`.
#[derive(Args)]
pub struct Arguments {
    /// Files of rows: JSONL, JSON, CSV or TSV, also as .gz; a folder; or `-` for the standard input
    #[arg(value_name = "FILE", required_unless_present = "training_file")]
    files: Vec<PathBuf>,
    /// The same, as `fine-tune` has it
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "files")]
    training_file: Vec<PathBuf>,
    /// The model that is to learn them: a directory, a .gguf file, a name from `homeroom list-models`, or one on the Hugging Face hub as `owner/name`; without it rows are not shown, and lengths are in words
    #[arg(long, visible_alias = "model-dir", value_name = "MODEL")]
    model_name: Option<PathBuf>,
    /// Refuse rows from which this does not learn, as `fine-tune` does [default: rows of any kind are shown]
    #[arg(long, value_name = "NAME", value_parser = one_of::<Kind>(&OBJECTIVES))]
    objective: Option<Kind>,
    #[command(flatten)]
    limits: RowArgs,
    /// Files of held-out rows, to find those that stand among the others [default: those of a folder that has such]
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "eval_fraction")]
    eval_file: Vec<PathBuf>,
    /// Share of the rows to hold out instead, as `fine-tune` does
    #[arg(long, value_name = "SHARE", value_parser = share)]
    eval_fraction: Option<f64>,
    /// Seed of that
    #[arg(long, default_value = "42", value_name = "N", value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// Rows to show; 0 shows the report alone
    #[arg(long, default_value = "3", value_name = "N", value_parser = whole::<u32>(0..=COUNT_MAX))]
    rows: u32,
    /// Write rows and report into this HTML file, which needs no other and no network
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write a copy of the rows into this file, with placeholders in the place of likely personal data: [EMAIL_1], the same value the same one
    #[arg(long, value_name = "FILE")]
    redact: Option<PathBuf>,
    /// Replace such a file if it is there
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A page holds no more rows than a browser shows.
const ROWS_OF_PAGE: u32 = 500;

/// Shows rows, and reports.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let files: &[PathBuf] = if arguments.files.is_empty() { &arguments.training_file } else { &arguments.files };
    let both = files.iter().chain(&arguments.eval_file).filter(|path| is_input(path)).count();
    ensure!(both < 2, "-: the standard input cannot be both the rows to learn from and those held out");
    let sources = to_learn_from(files, Source::standard_input)?;
    let eval_file = arguments.eval_file.as_slice();
    let held_out = match eval_file {
        [] if arguments.eval_fraction.is_some() => Vec::new(),
        [] => sources.held_out,
        files => to_measure_on(files, Source::standard_input)?,
    };
    let reading = arguments.limits.read.reading();
    let all = || sources.files.iter().chain(&held_out);
    if let (Some(html), Some(copy)) = (&arguments.html, &arguments.redact) {
        ensure!(
            !is_same(html, copy) && html != copy,
            "{}: --html and --redact both write it; name two files",
            html.display()
        );
    }
    ensure!(
        arguments.redact.is_none() || held_out.is_empty(),
        "--redact copies the rows of one set, and there are held-out rows beside them\nhint: copy each file in a call of its own"
    );
    for output in [&arguments.html, &arguments.redact].into_iter().flatten() {
        ensure!(!is_input(output), "-: the result goes to a file; name one, such as rows.jsonl");
        let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty());
        ensure!(folder.is_none_or(Path::is_dir), "{}: its folder is not there\nhint: make it first", output.display());
        ensure!(!output.is_dir(), "{}: a folder; name a file in it", output.display());
        for input in all() {
            ensure!(
                !is_same(output, &input.name),
                "{}: the rows are read from it; name another file",
                output.display()
            );
        }
        ensure!(
            arguments.overwrite || fs::symlink_metadata(output).is_err(),
            "{}: it is there already\nhint: --overwrite replaces it",
            output.display()
        );
    }
    ensure!(
        arguments.html.is_none() || arguments.rows <= ROWS_OF_PAGE,
        "--rows {}: a page shows at most {ROWS_OF_PAGE} rows",
        arguments.rows
    );
    let model = arguments.model_name.as_deref().map(model).transpose()?;
    let encoder = match &model {
        Some(model) => Some(encoder(model, arguments.limits.max_seq_len, arguments.limits.on_long_row)?),
        None => None,
    };
    let survey = Survey {
        encoder,
        context: model.as_ref().map_or(usize::MAX, |model| model.architecture.max_position_embeddings),
        hold_out: arguments.eval_fraction.filter(|share| *share > 0.0).map(|share| (share, arguments.seed)),
        shown: arguments.rows as usize,
        // Who reads JSON counts on all of them.
        named: if arguments.json { usize::MAX } else { PLACES_NAMED },
        check: &interrupt::stop_if_asked,
    };
    let source = Files::new(&sources.files, &held_out, &reading);
    let source = match arguments.objective {
        Some(kind) => source.of_kind(kind.rows(), kind.name()),
        None => source,
    };
    let (report, rows) = survey.run(&source)?;
    if report.rows + report.held_out == 0 {
        bail!("{}: no rows", named(files));
    }
    let limit = encoder.map(|encoder| encoder.max_seq_len);
    let rows: Vec<Rendered> = match &model {
        Some(model) => rows.iter().map(|row| render(row, &report, &model.tokenizer, limit)).collect(),
        None => Vec::new(),
    };
    let name = model.as_ref().zip(arguments.model_name.as_ref()).map(|(model, name)| shown(model, name));
    if let Some(path) = &arguments.html {
        let head = page::Head { file: &named(files), model: name.as_deref(), limit };
        write(path, page::html(&head, &rows, &report).as_bytes())?;
        line(format_args!("written   {}", path.display()));
    }
    let redacted = arguments.redact.as_deref().map(|to| redact(&sources.files, &reading, to)).transpose()?;
    if arguments.json {
        let json = json!({
            "file": named(files),
            "model": name,
            "max_seq_len": limit,
            "rows": rows,
            "report": report,
            "redacted": redacted.map(|redactor| {
                let of = |(kind, (places, values)): (&&str, &(usize, usize))| ((*kind).to_owned(), json!({"places": places, "values": values}));
                redactor.counts().iter().map(of).collect::<serde_json::Map<_, _>>()
            }),
        });
        return print(&json.to_string()).map(|()| Done::Whole);
    }
    let mut out = String::new();
    if let (Some(name), Some(model), Some(limit)) = (&name, &model, limit) {
        let context = model.architecture.max_position_embeddings;
        let how = if model.template.is_some() { "with its chat template" } else { "without a chat template" };
        out += &format!(
            "model     {name}   {how}, reads {} tokens; rows up to {}\n",
            thousands(context),
            thousands(limit)
        );
    }
    let out = crate::terminal::shown(&out).into_owned();
    let look = Look::of_stdout();
    let mut shown = text::rows(&rows, look);
    if !rows.is_empty() {
        shown.push('\n');
    }
    let of_file = |(name, words): (PathBuf, Option<String>)| match words {
        Some(words) => format!("file      {}   {words}\n", name.display()),
        None => format!("file      {}\n", name.display()),
    };
    let recognised: String = source.recognised().into_iter().map(of_file).collect();
    let report = recognised + &data_report::whole(&report);
    // Colours are our own, all else is made harmless before they are put around it.
    let all = format!("{out}{shown}{}", crate::terminal::shown(&report));
    print_shown(&mut Stdout, &all)?;
    if let (Some(redactor), Some(path)) = (redacted, &arguments.redact) {
        line(format_args!("redacted  {}   {}", path.display(), data_report::redacted(redactor.counts())));
    }
    Ok(Done::Whole)
}

/// Prints a text in which nothing is left that a terminal would obey but our own colours. A reader that has gone away is no failure.
pub fn print_shown(to: &mut impl Write, text: &str) -> Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write the result"),
        _ => Ok(()),
    }
}

/// The model that is to learn: a base, or one that was trained here, with the tokenizer and template that it has.
fn model(name: &Path) -> Result<Arc<BaseModel>> {
    let located = locate(name, Network::Allowed)?;
    if !is_adapter(&located.path) {
        return Ok(Arc::new(load_base(&located)?));
    }
    let base = base_of(&AdapterFiles::read(&located.path)?, Network::Allowed)?;
    with_text(&located.path, Arc::new(load_base(&base)?))
}

/// Writes a copy of the rows with placeholders, as JSONL. Rows with our own keys are otherwise the text that they were.
fn redact(sources: &[Source], reading: &Reading, to: &Path) -> Result<Redactor> {
    let mut redactor = Redactor::default();
    let mut left_out = Vec::new();
    into(to, |file| {
        let mut file = BufWriter::new(file);
        for source in sources {
            let (_, note) = read_texts(&source.name, source.open()?, reading, |_, text| {
                interrupt::stop_if_asked()?;
                let row = serde_json::from_str(&text).context("rows are JSON")?;
                match redactor.row(&row) {
                    Some(row) => writeln!(file, "{row}")?,
                    None => writeln!(file, "{text}")?,
                }
                Ok(())
            })?;
            left_out.extend(note);
        }
        file.flush().with_context(|| to.display().to_string())
    })?;
    left_out.iter().for_each(line);
    Ok(redactor)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    into(path, |file| file.write_all(bytes).with_context(|| path.display().to_string()))
}

/// Makes a file whole or not at all. It may hold what is private: only its owner reads it.
fn into(path: &Path, fill: impl FnOnce(&mut &fs::File) -> Result<()>) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let cannot = || format!("{}: cannot write", path.display());
    let file = ClaimedFile::new(directory).with_context(cannot)?;
    fill(&mut file.file())?;
    file.file().sync_all().with_context(cannot)?;
    file.finish(&directory.join(path.file_name().with_context(cannot)?))
}
