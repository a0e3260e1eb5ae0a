//! `homeroom runs`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Subcommand;
use homeroom_engine::files::utf8;
use serde_json::{Map, Value, json};

use super::{Done, print};
use crate::progress::{line, size, thousands};
use crate::registry;
use crate::runs::history::{Training, forgets, looked_up, plain, saved_models};
use crate::runs::{self, Entry, Kind, Lost, Status, checkpoints, ensure_unused, report, trainings};
use crate::stdout::Stdout;
use crate::table::{Column, lines};
use crate::terminal::cell;
use crate::troubles;

/// What is done with runs.
#[derive(Subcommand)]
pub enum Runs {
    /// Lists trainings and pipelines that were run here: how each stands, when it was started, what it did, what came of it
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Shows all that is known of a run, and the command that goes on with it
    Show {
        /// Name from `homeroom runs list`
        #[arg(value_name = "ID")]
        id: String,
        /// Write the report, a page that a browser opens without a network, and print its path
        #[arg(long)]
        report: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Removes runs with their records and checkpoints; models that were saved stay
    Rm {
        /// Names from `homeroom runs list`
        #[arg(value_name = "ID", required = true)]
        ids: Vec<String>,
        /// Remove what handlers, models or other runs name, too
        #[arg(long)]
        force: bool,
        /// Only say what would be removed, and what would be lost
        #[arg(long)]
        dry_run: bool,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
}

/// Does it.
pub fn run(what: &Runs) -> Result<Done> {
    match what {
        Runs::List { json } => list(*json),
        Runs::Show { id, report: true, .. } => {
            print(utf8(&report::write(&runs::find(id)?.path)?)?)?;
            Ok(Done::Whole)
        }
        Runs::Show { id, json, .. } => show(id, *json),
        Runs::Rm { ids, force, dry_run, json } => rm(ids, *force, *dry_run, *json),
    }
}

/// Name, status, date, what it did, size, the model that came of it, and what else.
const COLUMNS: [Column; 7] = [
    Column { right: false, spare: 0 },
    Column { right: false, spare: 0 },
    Column { right: false, spare: 3 },
    Column { right: false, spare: 2 },
    Column { right: true, spare: 4 },
    Column { right: false, spare: 0 },
    Column { right: false, spare: 0 },
];
const HEADINGS: [&str; 7] = ["run", "status", "started", "what", "size", "model", "result"];

fn list(as_json: bool) -> Result<Done> {
    let all = runs::list()?;
    if as_json {
        let all = all.iter().map(|entry| {
            let mut json = serde_json::to_value(entry)?;
            json["can_go_on"] = entry.can_go_on().into();
            Ok(json)
        });
        print(&all.collect::<Result<Value>>()?.to_string())?;
        return Ok(Done::Whole);
    }
    if all.is_empty() {
        line("no runs yet\nhint: `homeroom fine-tune` and `homeroom run` each leave one");
        return Ok(Done::Whole);
    }
    let row = |entry: &Entry| {
        let when = entry.started().unwrap_or_default().get(..16).unwrap_or_default().replace('T', " ");
        let (what, result) = (cell(&what(entry)), cell(&outcome(entry)));
        let model = cell(&model(entry).unwrap_or_default());
        vec![entry.id.clone(), entry.status.word().to_owned(), when, what, size(entry.bytes), model, result]
    };
    let mut rows: Vec<Vec<String>> = all.iter().map(row).collect();
    let is_empty = |at: usize| rows.iter().all(|row| row[at].is_empty());
    let headings = HEADINGS.iter().enumerate();
    let headings = headings.map(|(at, heading)| if is_empty(at) { String::new() } else { (*heading).to_owned() });
    rows.insert(0, headings.collect());
    print(&lines(&COLUMNS, &rows, Stdout.width()).join("\n"))?;
    let going: Vec<&str> = all.iter().filter(|entry| entry.can_go_on()).map(|entry| entry.id.as_str()).collect();
    if let Some(last) = going.last() {
        let these = if going.len() == 1 { format!("{last} was") } else { format!("{} were", going.join(", ")) };
        line(format_args!("note: {these} ended early and can go on: `homeroom resume {last}`"));
    }
    Ok(Done::Whole)
}

/// What a run did, in a few words: the strategy, the base and the rows, or the script.
pub fn what(entry: &Entry) -> String {
    let Some(record) = &entry.record else { return entry.problem.clone().unwrap_or_default() };
    let setting = |keys: &[&str]| keys.iter().find_map(|key| record.settings.get(*key)?.as_str().map(str::to_owned));
    let file = |path: String| Path::new(&path).file_name().map_or(path.clone(), |name| name.to_string_lossy().into());
    match record.kind {
        Kind::Pipeline => {
            let script = record.script.as_ref().map(|script| script.path.clone()).or_else(|| setting(&["script"]));
            script.map(file).unwrap_or_default()
        }
        Kind::FineTune => {
            let strategy = setting(&["strategy"]);
            let model = setting(&["model_name"]).map(|model| match Path::new(&model).is_absolute() {
                true => format!("on {}", file(model)),
                false => format!("on {model}"),
            });
            let rows = match record.settings.get("training_file") {
                Some(Value::Array(paths)) => {
                    let first = paths.first().and_then(Value::as_str).unwrap_or_default();
                    Some(format!("with {} and {} more", file(first.to_owned()), paths.len().saturating_sub(1)))
                }
                _ => setting(&["training_file"]).map(|path| format!("with {}", file(path))),
            };
            [strategy, model, rows].into_iter().flatten().collect::<Vec<_>>().join(" ")
        }
    }
}

/// What came of a run, in a few words.
fn outcome(entry: &Entry) -> String {
    let Some(record) = &entry.record else { return String::new() };
    if let Some(error) = &record.error {
        return error.lines().next().unwrap_or_default().to_owned();
    }
    if entry.status != Status::Finished {
        let trainings = trainings(&runs::events(&entry.path));
        return trainings.last().map(so_far).unwrap_or_default();
    }
    let result = record.result.clone().unwrap_or_default();
    let number = |key: &str| result[key].as_f64();
    match (number("eval_loss_before"), number("eval_loss"), number("train_loss").or(number("loss"))) {
        (Some(before), Some(after), _) => format!("loss {before:.3} → {after:.3}"),
        (None, Some(after), _) => format!("loss {after:.3}"),
        (_, None, Some(training)) => format!("training loss {training:.3}"),
        // A script's own word.
        (_, None, None) => result.as_str().unwrap_or_default().to_owned(),
    }
}

/// The name of the model that came of a run.
fn model(entry: &Entry) -> Option<String> {
    let result = entry.record.as_ref()?.result.clone().unwrap_or_default();
    let named = result["output_dir"].as_str().or(result["name"].as_str());
    match named {
        Some(name) => Some(registry::short(Path::new(name))),
        None => saved_models(&runs::events(&entry.path)).next().map(|path| registry::short(Path::new(path))),
    }
}

/// How far a training came.
fn so_far(training: &Training) -> String {
    let Some(last) = training.steps.last() else { return String::new() };
    let planned = training.planned().map(|planned| format!(" of {}", thousands(planned as usize))).unwrap_or_default();
    let loss = last.loss.map(|loss| format!(", loss {loss:.3}")).unwrap_or_default();
    format!("step {}{planned}{loss}", thousands(last.step as usize))
}

fn show(id: &str, as_json: bool) -> Result<Done> {
    let entry = runs::find(id)?;
    utf8(&entry.path)?;
    let events = runs::events(&entry.path);
    let trainings = trainings(&events);
    let next = next(&entry);
    let explained = troubles::of_run(&entry);
    if as_json {
        let mut all = serde_json::to_value(&entry)?;
        all["trainings"] = serde_json::to_value(&trainings)?;
        all["checkpoints"] =
            checkpoints(&entry.path).into_iter().map(|(number, steps)| (number, json!(steps))).collect();
        all["can_go_on"] = entry.can_go_on().into();
        all["next"] = next.into();
        all["trouble"] = serde_json::to_value(&explained)?;
        print(&all.to_string())?;
        return Ok(Done::Whole);
    }
    let mut lines = Vec::new();
    let mut add = |key: &str, text: String| {
        if !text.is_empty() {
            lines.push(format!("{key:11} {}", cell(&text)));
        }
    };
    about(&entry, &mut add);
    for training in &trainings {
        trained(training, trainings.len() > 1, &mut add);
    }
    for (run, adapter) in looked_up(&events) {
        add("looked up", format!("{adapter}   of run {run}"));
    }
    if let Some(saved) = saved_models(&events).next() {
        add("saved", registry::short(Path::new(saved)));
    }
    for (training, steps) in checkpoints(&entry.path) {
        let steps = steps.iter().map(|step| format!("step {step}")).collect::<Vec<_>>().join(", ");
        add("checkpoints", if trainings.len() > 1 { format!("training {training}: {steps}") } else { steps });
    }
    if let Some(record) = &entry.record {
        pairs("result", record.result.as_ref().and_then(Value::as_object), &mut add);
        if !record.result.as_ref().is_some_and(Value::is_object) {
            add("result", record.result.as_ref().map(plain).unwrap_or_default());
        }
        for (at, text) in record.error.iter().flat_map(|error| error.lines()).enumerate() {
            add(if at == 0 { "error" } else { "" }, text.to_owned());
        }
    }
    if let Some(explained) = &explained {
        add("because", explained.because.clone());
        add("cause", explained.trouble.cause.to_owned());
        add("remedy", explained.remedy(&entry));
    }
    add("size", size(entry.bytes));
    add("path", entry.path.display().to_string());
    add("problem", entry.problem.clone().unwrap_or_default());
    add("report", format!("`homeroom runs show {id} --report` writes it"));
    add("next", next);
    print(&lines.join("\n"))?;
    Ok(Done::Whole)
}

/// A line a field, under one key.
fn pairs(key: &str, fields: Option<&Map<String, Value>>, add: &mut dyn FnMut(&str, String)) {
    let fields = fields.into_iter().flatten().filter(|(_, value)| !value.is_null());
    for (at, (name, value)) in fields.enumerate() {
        let value = if name == "forgetting" { forgets(value) } else { None }.unwrap_or_else(|| plain(value));
        add(if at == 0 { key } else { "" }, format!("{name} = {value}"));
    }
}

/// What it is, how it stands, and what it was told.
fn about(entry: &Entry, add: &mut dyn FnMut(&str, String)) {
    add("run", entry.id.clone());
    let Some(record) = &entry.record else {
        add("status", entry.status.word().to_owned());
        return;
    };
    let why = match entry.status {
        Status::Killed => "   its process ended without a word",
        Status::Running => "   a process works on it",
        _ => "",
    };
    add("status", format!("{}{why}", entry.status.word()));
    let kind = if record.kind == Kind::Pipeline { "pipeline" } else { "training" };
    add("kind", format!("{kind}   {}", what(entry)));
    add("started", record.started.clone().unwrap_or_default());
    add("resumed", record.resumed.join(", "));
    add("ended", record.finished.clone().unwrap_or_default());
    add("command", typed(&record.command));
    add("", if record.cwd.is_empty() { String::new() } else { format!("in {}", record.cwd) });
    add("program", format!("homeroom {}, processor {}", record.version, record.processor));
    if let Some(script) = &record.script {
        add("script", format!("{}   sha256 {}", script.path, script.sha256.get(..12).unwrap_or_default()));
    }
    pairs("settings", Some(&record.settings), add);
}

/// A word as a shell reads it.
pub fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./:=,@%+".contains(c);
    let plain = !word.is_empty() && word.chars().all(is_plain);
    if plain { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// A command line as it can be typed again.
pub fn typed(command: &[String]) -> String {
    let program =
        command.first().map(|path| Path::new(path).file_name().map_or(path.clone(), |n| n.to_string_lossy().into()));
    program.into_iter().chain(command.iter().skip(1).map(|word| quoted(word))).collect::<Vec<_>>().join(" ")
}

/// Steps, losses, and what happened beside them.
fn trained(training: &Training, of_several: bool, add: &mut dyn FnMut(&str, String)) {
    let number = if of_several { format!("training {}", training.number) } else { "training".to_owned() };
    let planned = training.planned().map(|planned| format!(" of {}", thousands(planned as usize))).unwrap_or_default();
    let done = training.steps.last().map_or(0, |step| step.step);
    let steps = if done == 1 && planned.is_empty() { "step" } else { "steps" };
    add(&number, format!("{}{planned} {steps} done", thousands(done as usize)));
    if let Some((first, last, lowest)) = training.losses() {
        add("loss", format!("{first:.4} at first, {last:.4} at last, {lowest:.4} at best"));
    }
    let loss = |eval: &runs::history::Eval| eval.eval_loss.map(|loss| format!("{loss:.4} at step {}", eval.step));
    let (first, last) = (training.evals.first().and_then(loss), training.evals.last().and_then(loss));
    let best = training.best().and_then(loss).filter(|_| training.evals.len() > 1).map(|best| format!("best {best}"));
    let last = last.filter(|_| training.evals.len() > 1);
    add("held-out", first.into_iter().chain(last).chain(best).collect::<Vec<_>>().join(", "));
    let moments = training.moments.iter().filter(|moment| moment.event != "checkpoint");
    for (at, moment) in moments.enumerate() {
        let step = moment.step.map(|step| format!("step {step}   ")).unwrap_or_default();
        add(if at == 0 { "events" } else { "" }, format!("{step}{}", moment.words()));
    }
}

/// The command that goes on with it.
pub fn next(entry: &Entry) -> String {
    let Some(record) = &entry.record else { return String::new() };
    match entry.status {
        Status::Running => String::new(),
        Status::Finished => match report::result_model(entry) {
            Some(model) => format!("homeroom chat --model-dir {model} --prompt \"...\""),
            None => String::new(),
        },
        _ if entry.can_go_on() => format!("homeroom resume {}", entry.id),
        Status::Interrupted | Status::Killed | Status::Failed => {
            let command = typed(&record.command);
            if command.is_empty() {
                String::new()
            } else {
                format!("nothing of it can go on; {command} starts it anew")
            }
        }
    }
}

fn rm(ids: &[String], force: bool, dry_run: bool, as_json: bool) -> Result<Done> {
    let home = registry::data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    // All are looked at before the first is removed.
    let (mut going, mut problems) = (Vec::new(), Vec::new());
    for id in ids.iter().collect::<BTreeSet<_>>() {
        let looked = runs::find(id).and_then(|entry| {
            ensure!(
                entry.status != Status::Running,
                "run {id}: a process works on it; end that first, with Ctrl-C where it runs"
            );
            Ok(entry)
        });
        let looked =
            looked.and_then(|entry| if dry_run { Ok(entry) } else { ensure_unused(id, &home, force).map(|()| entry) });
        match looked {
            Ok(entry) => going.push((entry.lost(&home), entry)),
            Err(error) => problems.push(format!("{error:#}")),
        }
    }
    if !problems.is_empty() {
        let kept = if going.is_empty() { "" } else { "\nnothing is removed" };
        return Err(anyhow!("{}{kept}", problems.join("\nerror: ")));
    }
    for (lost, entry) in &going {
        if !dry_run && let Err(error) = runs::remove(entry) {
            bail!("{error:#}");
        }
        let (verb, freed) = if dry_run { ("would go", "frees") } else { ("removed", "freed") };
        line(format_args!("{verb:8}  run {}   {freed} {}", entry.id, size(entry.bytes)));
        tell(lost, dry_run);
    }
    if as_json {
        let all = going.iter().map(|(lost, entry)| {
            json!({"id": entry.id, "path": entry.path, "bytes": entry.bytes, "lost": lost, "removed": !dry_run})
        });
        print(&all.collect::<Value>().to_string())?;
    }
    Ok(Done::Whole)
}

/// Says what is lost with a run.
fn tell(lost: &Lost, dry_run: bool) {
    let Lost { unsaved, checkpoint, steps } = lost;
    let was = if dry_run { "is" } else { "was" };
    if !unsaved.is_empty() {
        line(format_args!("          what it trained and {was} saved nowhere else: {}", unsaved.join(", ")));
    }
    if let Some(step) = checkpoint {
        line(format_args!("          its checkpoints, the last of step {step}: it cannot be resumed without"));
    }
    if *steps > 0 {
        line(format_args!("          results of {steps} of its stages, which a resumed run would not make again"));
    }
}
