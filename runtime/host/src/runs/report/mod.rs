//! `report.html`: a run on one page, for who trained it and for who has to judge it. It is made of the run's folder alone.
//!
//! [`of`] gathers what the folder says as plain data, [`html`] writes the page of it; [`chart`] draws the curves.

mod chart;
mod page;

use std::path::{Path, PathBuf};

use anyhow::Result;
use homeroom_engine::adapt::adapter::{Manifest, read_manifest};
use homeroom_engine::files::gguf::Gguf;
use homeroom_engine::files::{read_text, replace_file};
use serde_json::{Map, Value};

use super::history::{Training, looked_up, plain, saved_models};
use super::list::{Entry, Kind, Record, Status};
use super::{events, trainings};
use crate::command::runs::what;
use crate::progress::thousands;
use crate::registry;

pub use self::page::html;

/// Name of the file in a run's directory.
pub const FILE: &str = "report.html";
/// Most bytes that are read of a licence or a model's description.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Digits of a fingerprint that are shown.
const DIGITS: usize = 16;

/// All that a page says.
#[derive(Clone, Debug)]
pub struct ReportData {
    /// Name of the run.
    pub id: String,
    /// What kind of run it is, in words.
    pub kind: String,
    /// How it stands.
    pub status: Status,
    /// The page's heading.
    pub title: String,
    /// What was done and what came of it, a sentence each.
    pub summary: Vec<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// Its trainings, with steps, evaluations, samples and what happened.
    pub trainings: Vec<Training>,
    /// What to do with the result: in words, and the command.
    pub next: Vec<(String, String)>,
    /// The rows: names and values.
    pub data: Vec<(String, String)>,
    /// Licences of the bases.
    pub licences: Vec<Licence>,
    /// Settings: names and values.
    pub settings: Vec<(String, String)>,
    /// Digests: of what, and which.
    pub digests: Vec<(String, String)>,
    /// Program, processor, dates, command: names and values.
    pub machine: Vec<(String, String)>,
    /// Text of a pipeline's script.
    pub script: Option<String>,
}

/// The licence of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Licence {
    /// The model.
    pub model: String,
    /// Its licence; `None`: its files do not name one.
    pub licence: Option<String>,
    /// Where that stands, or where to look.
    pub source: String,
}

/// Writes the page of a run's directory anew and returns its path.
///
/// # Errors
/// When there is no such run, or the page cannot be written.
pub fn write(run: &Path) -> Result<PathBuf> {
    write_of(&Entry::at(run))
}

/// As [`write`], by the process that works on the run and knows how it ended.
pub(super) fn write_as(run: &Path, status: Status) -> Result<PathBuf> {
    write_of(&Entry { status, ..Entry::at(run) })
}

fn write_of(entry: &Entry) -> Result<PathBuf> {
    let path = entry.path.join(FILE);
    let page = html(&of(entry));
    replace_file(&path, page.as_bytes())?;
    Ok(path)
}

/// The model that came of a run, as it can be named in a command: what its result names, or else the last that it saved
/// under a name, or else the last that it trained to the end.
pub fn result_model(entry: &Entry) -> Option<String> {
    model_directory(entry).map(|path| registry::short(&path))
}

fn model_directory(entry: &Entry) -> Option<PathBuf> {
    let result = entry.record.as_ref()?.result.clone().unwrap_or_default();
    let texts = [result["output_dir"].as_str(), result["path"].as_str(), result["name"].as_str(), result.as_str()];
    let named = texts.into_iter().flatten().filter_map(|text| match registry::is_name(text) {
        true => registry::place(text).ok(),
        false => Some(PathBuf::from(text)).filter(|path| path.is_absolute()),
    });
    let events = events(&entry.path);
    let saved = saved_models(&events).map(PathBuf::from);
    let trainings = trainings(&events);
    // What a training had learned when it failed is kept, and is no result.
    let is_whole = |number: u64| !trainings.iter().any(|training| training.number == number && training.is_cut_short());
    let mut adapters: Vec<(u64, PathBuf)> = std::fs::read_dir(entry.path.join("adapters"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|adapter| Some((adapter.file_name().to_str()?.parse().ok()?, adapter.path())))
        .collect();
    adapters.retain(|(number, _)| is_whole(*number));
    adapters.sort();
    let is_model = |path: &PathBuf| path.join("homeroom.json").is_file() || path.join("adapter_config.json").is_file();
    named.chain(saved).chain(adapters.into_iter().rev().map(|(_, path)| path)).find(is_model)
}

/// What the folder of a run says.
pub fn of(entry: &Entry) -> ReportData {
    let trainings = trainings(&events(&entry.path));
    let directory = model_directory(entry);
    let manifest = directory.as_deref().and_then(|path| read_manifest(path).ok().flatten());
    let record = entry.record.as_ref();
    let empty = Map::new();
    let settings = record.map_or(&empty, |record| &record.settings);
    let script = record.and_then(|record| record.script.as_ref());
    let script = script.and_then(|_| read_text(&entry.path.join("script.lua"), TEXT_BYTES_MAX).ok());
    ReportData {
        id: entry.id.clone(),
        kind: match entry.kind() {
            Some(Kind::Pipeline) => format!("Pipeline run {}", entry.id),
            _ => format!("Training run {}", entry.id),
        },
        status: entry.status,
        title: title(entry, &trainings, manifest.as_ref()),
        summary: summary(entry, &trainings, manifest.as_ref()),
        error: record.and_then(|record| record.error.clone()).or_else(|| entry.problem.clone()),
        next: next(entry, directory.as_deref()),
        data: data(settings, &trainings, manifest.as_ref()),
        licences: licences(settings, &trainings, manifest.as_ref()),
        settings: all_settings(settings, &trainings, manifest.as_ref()),
        digests: digests(record, &trainings, manifest.as_ref()),
        machine: record.map(machine).unwrap_or_default(),
        script,
        trainings,
    }
}

fn text<'a>(settings: &'a Map<String, Value>, keys: &[&str]) -> Option<&'a str> {
    keys.iter().find_map(|key| settings.get(*key)?.as_str())
}

/// The last part of a path; a name on the hub as it is.
fn last_part(name: &str) -> String {
    match Path::new(name).is_absolute() {
        true => Path::new(name).file_name().map_or(name.into(), |name| name.to_string_lossy().into_owned()),
        false => name.to_owned(),
    }
}

fn base_name(entry: &Entry, trainings: &[Training], manifest: Option<&Manifest>) -> Option<String> {
    let of_start = trainings.first().and_then(|training| training.started.get("base")?.as_str().map(last_part));
    let of_manifest = manifest.map(|manifest| {
        let path = manifest.base.path.file_name().map(|name| name.to_string_lossy().into_owned());
        manifest.base.name.clone().or(path).unwrap_or_default()
    });
    let settings = entry.record.as_ref().map(|record| &record.settings);
    let named = settings.and_then(|settings| text(settings, &["model", "model_name"]));
    let named = named.map(last_part);
    of_manifest.filter(|name| !name.is_empty()).or(of_start).or(named)
}

fn title(entry: &Entry, trainings: &[Training], manifest: Option<&Manifest>) -> String {
    let made = model_directory(entry).map(|path| registry::short(&path));
    let made = made.and_then(|name| Path::new(&name).file_name().map(|name| name.to_string_lossy().into_owned()));
    match (entry.kind(), base_name(entry, trainings, manifest)) {
        (Some(Kind::Pipeline), _) => format!("What {} did", what(entry)),
        (_, Some(base)) => match made {
            Some(made) => format!("{made}: what {base} learned"),
            None => format!("What {base} learned"),
        },
        (_, None) => format!("Run {}", entry.id),
    }
}

/// 1 h 2 min, 3 min 4 s, 5 s.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{} h {minutes} min", thousands(hours as usize)),
    }
}

fn summary(entry: &Entry, trainings: &[Training], manifest: Option<&Manifest>) -> Vec<String> {
    let mut sentences = Vec::new();
    let pipeline = entry.kind() == Some(Kind::Pipeline);
    for training in trainings {
        let Some(last) = training.steps.last() else { continue };
        let seconds: f64 = training.steps.iter().filter_map(|step| step.seconds).sum();
        let took = if seconds >= 1.0 { format!(" in {}", duration(seconds)) } else { String::new() };
        let planned = training.planned().filter(|planned| *planned > last.step);
        let planned = planned.map(|planned| format!(" of {}", thousands(planned as usize))).unwrap_or_default();
        let base = base_name(entry, trainings, manifest).filter(|_| !pipeline);
        let who = match base {
            Some(base) => format!("{base} was trained"),
            None => format!("Training {}", training.number),
        };
        let steps = if last.step == 1 && planned.is_empty() { "step" } else { "steps" };
        let verb = if pipeline { "took" } else { "for" };
        sentences.push(format!("{who} {verb} {}{planned} {steps}{took}.", thousands(last.step as usize)));
    }
    for (run, adapter) in looked_up(&events(&entry.path)) {
        sentences.push(format!("The result of a training was there already, from run {run}: {adapter}."));
    }
    if let [training] = trainings {
        let losses =
            training.evals.first().zip(training.evals.last()).and_then(|(a, b)| Some((a.eval_loss?, b.eval_loss?)));
        let kept = training.finished.get("kept_step").and_then(Value::as_u64);
        let of_kept = kept.and_then(|kept| training.evals.iter().find(|eval| eval.step == kept)?.eval_loss);
        if let Some((before, last)) = losses.filter(|_| training.evals.len() > 1) {
            let after = of_kept.unwrap_or(last);
            let meaning = match (training.is_of_surprise(), after < before) {
                (true, true) => ": the right answers surprise it less than before",
                (true, false) => ": the right answers surprise it no less than before",
                (false, _) => "; lower is better",
            };
            sentences.push(format!(
                "Its loss on rows that it never learned from went from {} to {}{meaning}.",
                chart::number(before),
                chart::number(after)
            ));
        }
        if let Some(kept) = kept {
            let kept = thousands(kept as usize);
            sentences.push(format!("What was saved is the model after step {kept}, where that loss was lowest."));
        }
    }
    if sentences.is_empty() {
        sentences.push("It has not taken a step.".to_owned());
    }
    let unfinished = matches!(entry.status, Status::Killed | Status::Interrupted | Status::Failed);
    if unfinished && entry.can_go_on() {
        sentences.push(format!("It ended early and can go on: homeroom resume {}", entry.id));
    }
    sentences
}

fn next(entry: &Entry, model: Option<&Path>) -> Vec<(String, String)> {
    let mut next = Vec::new();
    if entry.can_go_on() {
        next.push(("Go on where it ended".to_owned(), format!("homeroom resume {}", entry.id)));
    }
    if let Some(model) = model {
        let name = registry::short(model);
        for (what, command) in [
            ("Ask it something", format!("homeroom chat --model-dir {name} --prompt \"...\"")),
            ("Talk to it from other programs", format!("homeroom serve --model-dir {name}")),
            ("Measure it on a file of questions", format!("homeroom eval --model-dir {name} --file rows.jsonl")),
            ("Take it to another program", format!("homeroom export-model --model-dir {name}")),
        ] {
            next.push((what.to_owned(), command));
        }
    }
    next
}

/// What `started` of the first training says, as a text.
fn of_start(trainings: &[Training], key: &str) -> Option<String> {
    trainings.first()?.started.get(key).filter(|value| !value.is_null()).map(plain)
}

fn data(settings: &Map<String, Value>, trainings: &[Training], manifest: Option<&Manifest>) -> Vec<(String, String)> {
    let mut data = Vec::new();
    let mut add = |name: &str, value: Option<String>| {
        data.extend(value.filter(|value| !value.is_empty() && value != "0").map(|value| (name.to_owned(), value)));
    };
    // Several files are a list.
    let files = |key: &str| match settings.get(key)? {
        Value::String(file) => Some(file.clone()),
        Value::Array(files) => Some(files.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")),
        _ => None,
    };
    add("file", files("training_file").or_else(|| files("dataset")));
    add("file of held-out rows", files("eval_file"));
    let of_training = |key: &str| Some(plain(manifest?.training.get(key)?));
    // Of several trainings each has its own, which stand in the script.
    let of_start = |key: &str| of_start(trainings, key).filter(|_| trainings.len() == 1);
    add("rows learned from", of_start("rows").or_else(|| of_training("rows")));
    add("rows held out", of_start("eval_rows").or_else(|| of_training("eval_rows")));
    let tokens: u64 = trainings.iter().flat_map(|training| &training.steps).filter_map(|step| step.tokens).sum();
    add("tokens read while learning", Some(thousands(tokens as usize).to_string()));
    add("objective", of_start("objective"));
    data
}

/// The settings as they were typed, and what they were resolved to where the training or its result says so.
fn all_settings(
    settings: &Map<String, Value>,
    trainings: &[Training],
    manifest: Option<&Manifest>,
) -> Vec<(String, String)> {
    let mut all = Vec::new();
    flat("", &Value::Object(settings.clone()), &mut all);
    let mut more = Vec::new();
    for key in ["strategy", "base", "base_parameters", "base_stored_as", "trained_parameters"] {
        more.extend(of_start(trainings, key).map(|value| (key.to_owned(), value)));
    }
    let started = trainings.first().map(|training| &training.started);
    for key in ["config", "options"] {
        let of_result = manifest.and_then(|manifest| manifest.training.get(key));
        flat("", started.and_then(|started| started.get(key)).or(of_result).unwrap_or(&Value::Null), &mut more);
    }
    // What was resolved says more than what was typed: nothing, where a default was taken.
    all.retain(|(name, _)| !more.iter().any(|(other, _)| other == name));
    all.extend(more);
    all
}

/// One pair a plain value, its names joined by dots.
fn flat(name: &str, value: &Value, out: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (key, field) in fields {
                flat(&if name.is_empty() { key.clone() } else { format!("{name}.{key}") }, field, out);
            }
        }
        Value::Null => {}
        Value::Array(items) if items.iter().all(|item| !item.is_object() && !item.is_array()) => {
            out.push((name.to_owned(), items.iter().map(plain).collect::<Vec<_>>().join(", ")));
        }
        other => out.push((name.to_owned(), plain(other))),
    }
}

fn digests(record: Option<&Record>, trainings: &[Training], manifest: Option<&Manifest>) -> Vec<(String, String)> {
    let mut digests = Vec::new();
    let mut add = |name: String, digest: &str| {
        let digits = digest.split_once(':').map_or(digest, |(_, digits)| digits);
        if !digits.is_empty() {
            digests.push((name, digits.get(..DIGITS).unwrap_or(digits).to_owned()));
        }
    };
    if let Some(manifest) = manifest {
        add("values of the base".to_owned(), &manifest.base.digest);
        add("training rows".to_owned(), manifest.data_digest.as_deref().unwrap_or_default());
        add("tokenizer".to_owned(), &manifest.tokenizer_digest);
        add("chat template".to_owned(), manifest.template_digest.as_deref().unwrap_or_default());
        let strategy = serde_json::to_value(&manifest.strategy).unwrap_or_default();
        add(format!("strategy {}", manifest.strategy.name), strategy["sha256"].as_str().unwrap_or_default());
        let files = serde_json::to_value(&manifest.base.files).unwrap_or_default();
        for (file, digest) in files.as_object().into_iter().flatten() {
            add(format!("base file {file}"), digest.as_str().unwrap_or_default());
        }
    } else if let Some(record) = record {
        add("values of the base".to_owned(), &of_start(trainings, "base_digest").unwrap_or_default());
        add("training rows".to_owned(), text(&record.settings, &["training_rows"]).unwrap_or_default());
    }
    if let Some(script) = record.and_then(|record| record.script.as_ref()) {
        add("script".to_owned(), &script.sha256);
    }
    digests
}

fn machine(record: &Record) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut add = |name: &str, value: String| {
        if !value.is_empty() {
            all.push((name.to_owned(), value));
        }
    };
    add("program", format!("homeroom {}", record.version));
    add("machine", record.machine.clone());
    add("kernels for", record.processor.clone());
    add("started", record.started.clone().unwrap_or_default());
    add("taken up again", record.resumed.join(", "));
    add("ended", record.finished.clone().unwrap_or_default());
    add("command", crate::command::runs::typed(&record.command));
    add("typed in", record.cwd.clone());
    all
}

/// The licence of the base, from the files beside it.
fn licences(settings: &Map<String, Value>, trainings: &[Training], manifest: Option<&Manifest>) -> Vec<Licence> {
    let path = manifest.map(|manifest| manifest.base.path.clone());
    let path = path.or_else(|| of_start(trainings, "base_path").map(PathBuf::from));
    let name = manifest.and_then(|manifest| manifest.base.name.clone()).or_else(|| of_start(trainings, "base"));
    let name = name.or_else(|| text(settings, &["model_name"]).map(str::to_owned));
    let Some(name) = name.or_else(|| path.as_ref().map(|path| path.display().to_string())) else { return Vec::new() };
    let found = path.as_deref().and_then(licence_of);
    let (licence, source) = match found {
        Some((licence, source)) => (Some(licence), source),
        None if name.contains('/') && !name.starts_with('/') => (
            None,
            format!("its page names it: https://huggingface.co/{}", name.split(['@', ':']).next().unwrap_or(&name)),
        ),
        None => (None, "neither a README.md nor a LICENSE file beside it names one".to_owned()),
    };
    vec![Licence { model: last_part(&name), licence, source }]
}

/// What the files of a model say of its licence, and which says so.
fn licence_of(model: &Path) -> Option<(String, String)> {
    let is_gguf = model.extension().is_some_and(|extension| extension == "gguf");
    if is_gguf && let Ok(file) = Gguf::open(model) {
        let said = |key: &str| file.str(key).ok().flatten().map(str::to_owned);
        if let Some(licence) = said("general.license.name").or_else(|| said("general.license")) {
            return Some((licence, "in the file's metadata".to_owned()));
        }
    }
    let directory = if model.is_dir() { model } else { model.parent()? };
    let read = |name: &str| read_text(&directory.join(name), TEXT_BYTES_MAX).ok();
    if let Some(licence) = read("README.md").and_then(|text| of_readme(&text)) {
        return Some((licence, "in its README.md".to_owned()));
    }
    ["LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING"].iter().find_map(|name| {
        let text = read(name)?;
        let first = text.lines().map(|line| line.trim_matches(['#', ' ', '*'])).find(|line| !line.is_empty())?;
        Some((first.chars().take(120).collect(), format!("first line of its {name}")))
    })
}

/// The licence in the head of a README.md, as the hub has it: YAML between two lines `---`.
fn of_readme(text: &str) -> Option<String> {
    let head = text.strip_prefix('\u{feff}').unwrap_or(text).strip_prefix("---")?;
    let head = head.split("\n---").next()?;
    let field = |key: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let value = line.trim().trim_matches(['"', '\'']);
        (!value.is_empty()).then(|| value.to_owned())
    };
    // `other` is named by a second field.
    match (field("license"), field("license_name"), field("license_link")) {
        (Some(licence), Some(name), link) if licence == "other" => {
            Some(link.map_or_else(|| name.clone(), |link| format!("{name}, {link}")))
        }
        (licence, name, _) => licence.or(name),
    }
}

#[cfg(test)]
mod tests;
