//! `homeroom run`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::arguments::{PluginArgs, name_value};
use super::{Done, print, this_program};
use crate::hub::{self, HubName};
use crate::interrupt::{self, Interrupted};
use crate::models::{Network, here};
use crate::near::{did_you_mean, exists, file_beside, is_model};
use crate::pipeline::config::{Declared, PipelineConfig};
use crate::pipeline::sandbox::{Reads, shown};
use crate::pipeline::{self, How};
use crate::progress::line;
use crate::runs::Entry;
use crate::watch::{Contents, Files, Tree, content};

/// How often it is looked whether what is running has been edited.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Characters of a line of parameters.
const WIDTH: usize = 80;
/// Most items of a list that are told one by one, if they are kept in a file.
const ITEMS_MAX: usize = 5;

/// Arguments of `run`.
#[derive(Args)]
pub struct Arguments {
    /// TOML file with a [pipeline] table
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Set a parameter of the pipeline; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_value)]
    set: Vec<(String, String)>,
    /// Only check the file and its script, and say what is wrong with them; required parameters need not be set
    #[arg(long, conflicts_with = "dry_run")]
    check: bool,
    /// Run the script without training or writing, and print what it would do
    #[arg(long)]
    dry_run: bool,
    /// Run again when the file, its script or a module of it is changed, in mid-training after the step; a training continues with new builds of its strategy
    #[arg(long, conflicts_with_all = ["check", "json"])]
    watch: bool,
    /// Make everything anew: look up nothing that was made before, and replace it
    #[arg(long, conflicts_with_all = ["check", "dry_run"])]
    fresh: bool,
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
    started(arguments, None)
}

/// Goes on with a run of a pipeline that was killed, interrupted or failed: what it had done is looked up.
pub fn resume(arguments: &Arguments, run: &Entry) -> Result<Done> {
    started(arguments, Some(&run.id))
}

fn started(arguments: &Arguments, resumes: Option<&str>) -> Result<Done> {
    refuse_model(&arguments.config)?;
    exists(&arguments.config)?;
    if arguments.config.extension().is_some_and(|extension| extension == "lua") {
        let config = declaring(&arguments.config);
        let config = config.map_or_else(|| "CONFIG.toml".to_owned(), |config| config.display().to_string());
        bail!(
            "{}: a script, which is run by the TOML file that declares it\nhint: `homeroom run {config}`",
            arguments.config.display()
        );
    }
    if arguments.check {
        return check(arguments);
    }
    let mut network = match arguments.dry_run {
        true => Network::Never("a dry run downloads nothing"),
        false => Network::Allowed,
    };
    if !arguments.watch {
        return once(arguments, &Reads::default(), (network, resumes), &interrupt::asked);
    }
    PipelineConfig::read(&arguments.config, &arguments.set)?;
    let mut is_told = false;
    let mut before = Files::new();
    loop {
        let reads = Reads::default();
        let done = follow(arguments, &reads, network);
        // A file is saved with a name that is half typed.
        network = Network::Never("a name that comes by an edit is not downloaded");
        match done {
            Ok(Ended::Overtaken) => continue,
            Ok(Ended::Done(Done::Interrupted)) => return Ok(Done::Interrupted),
            Ok(Ended::Done(Done::Whole | Done::Unwell)) => {}
            Err(error) if error.is::<Interrupted>() => return Err(error),
            Err(error) => line(format_args!("error: {error:#}")),
        }
        let mut files = reads.files();
        if files.len() == 1 {
            // The file could not be read, and what it names may be what is wrong with it.
            before.into_keys().for_each(|path| _ = files.entry(path).or_insert_with_key(|path| content(path)));
        }
        before = files.clone();
        // What was read is watched, and nothing that a run may write. Its rows are not: what follows them is another run.
        let names: Vec<String> = files.keys().map(|file| shown(file)).collect();
        let (mut tree, problem) = Tree::of_files(files);
        if let Some(problem) = problem.filter(|_| !std::mem::replace(&mut is_told, true)) {
            line(format_args!("note: changes are looked for every 2 s only: {problem}"));
        }
        let waited = interrupt::idly(|| {
            line(format_args!("watching  {}   Ctrl-C ends", names.join(", ")));
            tree.wait(&interrupt::asked)
        });
        let Some(changed) = waited else { return Ok(Done::Interrupted) };
        line(format_args!("changed   {}", shown(&changed)));
    }
}

/// How a run ended that is followed.
enum Ended {
    Done(Done),
    /// What it was run from has changed, and is to be run.
    Overtaken,
}

/// Runs it once, and meanwhile follows what it was run from. It is stopped for an edit that a check finds nothing wrong with; of any
/// other the problems are told, and it goes on.
fn follow(arguments: &Arguments, reads: &Reads, network: Network) -> Result<Ended> {
    let (is_overtaken, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let overtaken = || is_overtaken.load(Ordering::SeqCst);
    let over = || is_over.load(Ordering::SeqCst);
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut contents, mut refused) = (Contents::default(), None);
            while !over() {
                std::thread::sleep(LOOK_EVERY);
                let files = reads.files();
                let Some(changed) = contents.changed(&files) else { continue };
                let now: Files = files.into_keys().map(|path| (path.clone(), contents.of(&path))).collect();
                // What was refused once is not looked at again before it changes.
                if refused.as_ref() == Some(&now) || over() {
                    continue;
                }
                line(format_args!("changed   {}", shown(&changed)));
                match runnable(arguments) {
                    Ok(()) => {
                        line(
                            "again     it starts again as soon as what runs has ended; a training ends after its step",
                        );
                        is_overtaken.store(true, Ordering::SeqCst);
                        break;
                    }
                    Err(problems) => {
                        line(format_args!(
                            "error: {problems:#}\nhint: what runs goes on as it was; save again when it is right"
                        ));
                        refused = Some(now);
                    }
                }
            }
        });
        let done = once(arguments, reads, (network, None), &|| interrupt::asked() || overtaken());
        is_over.store(true, Ordering::SeqCst);
        done
    });
    if overtaken() && !interrupt::asked() {
        return Ok(Ended::Overtaken);
    }
    done.map(Ended::Done)
}

/// Whether it could be run as it is now.
fn runnable(arguments: &Arguments) -> Result<()> {
    let config = PipelineConfig::read(&arguments.config, &arguments.set)?;
    pipeline::check(&config, arguments.plugins.search()?)
}

/// Behind the help of `run FILE --help`: the parameters that the file declares.
pub fn help(arguments: &[OsString]) {
    let words: Vec<&Path> = arguments.iter().skip(1).map(Path::new).collect();
    let Some(run) = words.iter().position(|word| *word == Path::new("run")) else { return };
    let file = words[run + 1..].iter().find(|word| word.extension().is_some_and(|extension| extension == "toml"));
    let Some(file) = file.filter(|file| file.is_file()) else { return };
    let declared = match PipelineConfig::declared(file) {
        Ok(declared) => declared,
        Err(error) => return line(format_args!("error: {error:#}")),
    };
    let place = file.display();
    if declared.is_empty() {
        let _ = print(&format!("\n{place} declares no parameters"));
        return;
    }
    let rows = declared.into_iter().map(|Declared { name, kind, default, range, doc }| {
        let default = if default.is_empty() { "not set".to_owned() } else { default };
        [name, kind.to_owned(), default, range, doc]
    });
    let rows: Vec<[String; 5]> = rows.collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3].map(width);
    let lines = rows.iter().map(|row| {
        let cells =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell}{:1$}  ", "", width - cell.chars().count()));
        format!("  {}{}", cells.collect::<String>(), row[4]).trim_end().to_owned()
    });
    let lines: Vec<String> = lines.collect();
    let _ = print(&format!("\nParameters of {place}, set with --set NAME=VALUE:\n{}", lines.join("\n")));
}

/// Refuses a model, which `ollama run` would take.
fn refuse_model(config: &Path) -> Result<()> {
    if config.is_file() || config.extension().is_some_and(|extension| extension == "toml" || extension == "lua") {
        return Ok(());
    }
    let name = config.display();
    let is_there = match config.exists() {
        true => is_model(config),
        false => here(config).is_ok_and(|located| located.is_some()),
    };
    if is_there {
        bail!(
            "{name}: a model; what is run is a pipeline's TOML file\nhint: `homeroom chat --model-dir {name}` talks to it"
        );
    }
    if !config.exists() && HubName::typed(config).is_some() {
        bail!(
            "{name}: no such file or directory{}; what is run is a pipeline's TOML file\nhint: `homeroom chat --model-dir {name}` talks to the model of that name on the Hugging Face hub",
            did_you_mean(file_beside(config))
        );
    }
    Ok(())
}

/// The TOML file beside a script, or in `configs` beside its directory, that declares it.
fn declaring(script: &Path) -> Option<PathBuf> {
    let beside = script.parent()?;
    let script = script.canonicalize().ok()?;
    let declares = |config: &PathBuf| -> Option<bool> {
        let table: toml::Table = toml::from_str(&std::fs::read_to_string(config).ok()?).ok()?;
        let named = table.get("pipeline")?.get("script")?.as_str()?;
        Some(config.parent()?.join(named).canonicalize().ok()? == script)
    };
    let dirs = [beside.to_owned(), beside.join("../configs")];
    let files = dirs.iter().flat_map(|dir| {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        std::fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
    });
    let mut found: Vec<PathBuf> =
        files.filter(|file| file.extension().is_some_and(|extension| extension == "toml")).collect();
    found.sort();
    found.into_iter().find(|config| declares(config) == Some(true))
}

/// Says what is wrong with it, or that nothing is.
fn check(arguments: &Arguments) -> Result<Done> {
    let config = pipeline::check_file(&arguments.config, &arguments.set, arguments.plugins.search()?)?;
    line(format_args!(
        "{}: no problems found in it and in {}; what only a run comes to is looked at by --dry-run",
        arguments.config.display(),
        shown(&config.script)
    ));
    for (param, name) in &config.hub_models {
        let state = match hub::find(name)? {
            Some(found) => format!("is in the cache, at {}", found.commit),
            None => match config.network(Network::Allowed).refusal() {
                Some(why) => format!("is not in the cache, and a run does not download it: {why}"),
                None => "is not in the cache; a run downloads it".to_owned(),
            },
        };
        line(format_args!("note: `{param}`: {name} {state}"));
    }
    Ok(Done::Whole)
}

/// Runs it once, with what it names downloaded if `network` allows it; `reads` gets what was read: the file, its script, and the modules that the script required.
fn once(
    arguments: &Arguments,
    reads: &Reads,
    (network, resumes): (Network, Option<&str>),
    ended: &dyn Fn() -> bool,
) -> Result<Done> {
    reads.note(&std::path::absolute(&arguments.config)?);
    let config = PipelineConfig::read(&arguments.config, &arguments.set)?;
    eprintln!("pipeline  {}   {}", arguments.config.display(), shown(&config.script));
    for line in told(&config) {
        eprintln!("{line}");
    }
    pipeline::fetch(&config, network)?;
    LISTEN.call_once(|| {
        // Without it Ctrl-C ends the run at once.
        let _ = interrupt::listen();
    });
    let mut search = arguments.plugins.search()?;
    if arguments.watch {
        search = search.watched(this_program()?);
    }
    let mut resumed = None;
    if !arguments.dry_run && !arguments.fresh {
        resumed = match resumes {
            Some(run) => Some(run.to_owned()),
            // Where there is no place for runs there is none to go on with.
            None => pipeline::unfinished(&config).ok().flatten().map(|run| run.id),
        };
    }
    if let Some(run) = &resumed {
        line(format_args!("goes on   in run {run}; --fresh starts anew"));
    }
    let how = How { dry: arguments.dry_run, fresh: arguments.fresh, resumed };
    let outcome = pipeline::run(&config, search, how, ended, reads);
    let outcome = match outcome {
        Err(error) if ended() => {
            if interrupt::asked() {
                line(format_args!("{error:#}: the script has ended where it was; the same command goes on from there"));
            }
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
        readable("", &outcome.result, outcome.file.as_deref(), &mut lines);
        let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let lines: Vec<String> = lines.iter().map(|(name, value)| format!("{name:width$}  {value}")).collect();
        print(lines.join("\n").trim())?;
    }
    if let Some(handler) = outcome.handler {
        line(format_args!("next      homeroom chat --handler {handler}"));
    }
    Ok(Done::Whole)
}

/// The values of the parameters, in lines that fit a screen.
fn told(config: &PipelineConfig) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for (name, value) in config.params.iter().filter(|(_, value)| !value.is_null()) {
        let is_path = config.named.iter().any(|(param, _)| param == name);
        let value = match value.as_str().filter(|_| is_path) {
            Some(path) if Path::new(path).is_absolute() => shown(Path::new(path)),
            _ => value.to_string(),
        };
        let next = format!("{name} = {value}");
        match lines.last_mut() {
            Some(line) if line.chars().count() + 3 + next.chars().count() <= WIDTH => {
                line.push_str("   ");
                line.push_str(&next);
            }
            _ => lines.push(format!("{}{next}", if lines.is_empty() { "params    " } else { "          " })),
        }
    }
    lines
}

/// One line a plain value, its names joined by dots. A long list is told by where it is kept, if it is.
fn readable(name: &str, value: &Value, file: Option<&Path>, lines: &mut Vec<(String, String)>) {
    let within = |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}.{part}") };
    match (value, file) {
        (Value::Object(fields), _) => {
            for (part, field) in fields {
                readable(&within(part), field, file, lines);
            }
        }
        (Value::Array(items), Some(file)) if items.len() > ITEMS_MAX => {
            lines.push((name.to_owned(), format!("{} items, in {}", items.len(), shown(file))));
        }
        (Value::Array(items), _) => {
            for (index, item) in items.iter().enumerate() {
                readable(&within(&(index + 1).to_string()), item, file, lines);
            }
        }
        (Value::String(text), _) => lines.push((name.to_owned(), text.clone())),
        (Value::Number(number), _) if number.is_f64() => {
            lines.push((name.to_owned(), rounded(number.as_f64().unwrap_or(f64::NAN))));
        }
        (other, _) => lines.push((name.to_owned(), other.to_string())),
    }
}

/// A number to six digits, for readers.
fn rounded(number: f64) -> String {
    let text = format!("{number:.5e}");
    text.parse::<f64>().map_or(text, |number| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_told_by_where_it_is_kept() {
        let value = json!({"loss": 0.106_589_108, "few": [1, [2.5]], "many": [1, 2, 3, 4, 5, "ü"], "n": 12_345_678});
        let lines = |file: Option<&Path>| {
            let mut lines = Vec::new();
            readable("", &value, file, &mut lines);
            lines.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        let told = "loss=0.106589 few.1=1 few.2.1=2.5 many=6 items, in /runs/x-1/result.json n=12345678";
        assert_eq!(lines(Some(Path::new("/runs/x-1/result.json"))), told);
        // What is kept nowhere is all told.
        assert!(lines(None).ends_with("many.5=5 many.6=ü n=12345678"));
    }
}
