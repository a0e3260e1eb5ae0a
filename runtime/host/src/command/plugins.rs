//! `homeroom plugins`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use serde_json::{Value, json};

use super::arguments::PluginArgs;
use super::{Done, print};
use crate::interrupt;
use crate::plugin::build::build;
use crate::plugin::check::{self, Verdict};
use crate::plugin::find::NONE_HINT;
use crate::plugin::install::{self, Installed, library, sources};
use crate::plugin::{PluginFile, Probe, Search, Standing, StrategyFile, Trust, new, probe, trust};
use crate::progress::line;
use crate::watch::Tree;

/// What is done with strategies.
#[derive(Subcommand)]
pub enum Plugins {
    /// Lists each strategy: name, version, digest, file, whether it may be loaded, and options
    List {
        #[command(flatten)]
        plugins: PluginArgs,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Writes the crate of a new strategy, which builds without a network
    New {
        /// Name of the strategy: small letters, digits and underscores
        name: String,
        /// Directory of the crate [default: NAME in the working directory]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Checks that a strategy loads, plans, learns, merges and saves as it should; exit code 1 if a check fails
    Check {
        /// Crate of the strategy, which is built, its library, such as target/release/libNAME.so, or its name; its code is run
        #[arg(value_name = "CRATE-OR-FILE")]
        path: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Builds a strategy's crate now and after each change of its source; a training with --watch-plugins takes each build over
    Watch {
        /// Directory of the crate
        #[arg(value_name = "CRATE")]
        dir: PathBuf,
    },
    /// Copies strategies to the data directory, where every copy of this program finds them, and trusts them; their code is run
    Install {
        /// Crates, which are built, or libraries [default: the strategies that come with this program]
        #[arg(value_name = "CRATE-OR-FILE")]
        paths: Vec<PathBuf>,
    },
    /// Trusts strategies: writes the digests of their files into plugins.lock; their code is run, to ask for their versions
    Lock {
        /// Strategies [default: all that are found but those beside the program]
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Look for strategies in this directory first; may be repeated
        #[arg(long, value_name = "DIR")]
        plugin_dir: Vec<PathBuf>,
    },
    /// Loads a strategy and answers another process of this program
    #[command(hide = true)]
    Probe { file: PathBuf, deadline_s: u32 },
}

/// Does it.
pub fn run(plugins: &Plugins) -> Result<Done> {
    match plugins {
        Plugins::List { plugins, json } => list(plugins, *json),
        Plugins::New { name, dir } => new(name, dir.as_deref()),
        Plugins::Check { path, json } => check(path, *json),
        Plugins::Install { paths } => install(paths),
        Plugins::Watch { dir } => watch(dir),
        Plugins::Lock { names, plugin_dir } => lock(names, plugin_dir),
        Plugins::Probe { file, deadline_s } => probe::answer(file, *deadline_s).map(|()| Done::Whole),
    }
}

/// Lists the strategies that are installed. One that cannot be loaded is listed with the reason.
fn list(arguments: &PluginArgs, as_json: bool) -> Result<Done> {
    let search = arguments.search()?;
    let files = search.list();
    let loaded: Vec<_> = files.iter().map(|file| (file, search.load_file(file))).collect();
    if as_json {
        let items = loaded.iter().map(|(file, plugin)| match plugin {
            Ok((plugin, standing)) => json!({
                "name": file.name,
                "version": plugin.description.version,
                "sha256": plugin.sha256,
                "path": file.path,
                "trust": standing.word(),
                "doc": plugin.description.doc,
                "options": plugin.description.options,
            }),
            Err(error) => json!({"name": file.name, "path": file.path, "error": format!("{error:#}")}),
        });
        print(&Value::Array(items.collect()).to_string())?;
        return Ok(Done::Whole);
    }
    let mut out = Vec::new();
    for (file, plugin) in &loaded {
        match plugin {
            Ok((plugin, standing)) => {
                let about = &plugin.description;
                out.push(format!("{}   {}   {}", about.name, about.version, about.doc));
                out.push(format!("  {}   sha256 {}   {}", file.path.display(), &plugin.sha256[..16], standing.word()));
                let width = about.options.iter().map(|option| option.name.len()).max().unwrap_or(0);
                for option in &about.options {
                    let default = match &option.default {
                        Value::Null => String::new(),
                        default => format!(" (default {default})"),
                    };
                    out.push(format!("    {:width$}   {}{default}", option.name, option.doc));
                }
            }
            Err(error) => {
                out.push(format!("{}   not loaded", file.name));
                out.push(format!("  {}   {}", file.path.display(), format!("{error:#}").replace('\n', "\n    ")));
            }
        }
    }
    if out.is_empty() {
        let dirs: Vec<String> = search.dirs().iter().map(|dir| format!("\n  {}", dir.display())).collect();
        line(format_args!("no strategies in:{}\nhint: {NONE_HINT}", dirs.concat()));
        return Ok(Done::Whole);
    }
    print(&out.join("\n"))?;
    Ok(Done::Whole)
}

/// Writes a new strategy, and says what to do with it.
fn new(name: &str, dir: Option<&Path>) -> Result<Done> {
    interrupt::end_at_once()?;
    let written = new::create(name, dir.unwrap_or(Path::new(name)))?;
    line(format_args!(
        "strategy `{name}` is in {}, its code in src/lib.rs, all that it needs in homeroom/\nhint: there, `cargo test` and `homeroom plugins check .`; `homeroom plugins install .` when it is as you want it",
        written.display()
    ));
    Ok(Done::Whole)
}

/// Checks a strategy and prints the report; an error when anything failed.
fn check(path: &Path, as_json: bool) -> Result<Done> {
    let file = &library(path, &Search::new(&[], Trust::default()))?;
    let report = check::check(file, &Probe::this_program()?)?;
    let (failed, all) = (report.failed(), report.checks.len());
    if as_json {
        print(&json!({"file": file, "ok": failed == 0, "checks": report.checks}).to_string())?;
    } else {
        let width = report.checks.iter().map(|line| line.check.len()).max().unwrap_or(0);
        let lines = report.checks.iter().map(|line| {
            let verdict = match line.verdict {
                Verdict::Ok => "ok",
                Verdict::Note => "note",
                Verdict::Failed => "FAILED",
            };
            format!("{verdict:6}   {:width$}   {}", line.check, line.why)
        });
        print(&lines.collect::<Vec<_>>().join("\n"))?;
    }
    ensure!(failed == 0, "{}: {failed} of {all} checks failed", file.display());
    Ok(Done::Whole)
}

/// Installs strategies, one after the other, and says what became of each.
fn install(paths: &[PathBuf]) -> Result<Done> {
    let probe = Probe::this_program()?;
    for path in sources(paths)? {
        let Installed { entry, replaced, unchanged } = install::install(&path, &probe)?;
        let what = match replaced {
            Some(version) => format!("installed, in place of {version}"),
            None if unchanged => "unchanged".to_owned(),
            None => "installed".to_owned(),
        };
        print(&format!("{}   {}   {what}   {}", entry.name, entry.version, entry.path.display()))?;
    }
    Ok(Done::Whole)
}

/// Writes digests into `plugins.lock`.
fn lock(names: &[String], plugin_dirs: &[PathBuf]) -> Result<Done> {
    let search = Search::new(plugin_dirs, Trust::default());
    let found = search.list();
    let mut entries = Vec::new();
    let wanted: Vec<&StrategyFile> = match names {
        [] => found.iter().filter(|file| !matches!(search.read(file), Ok((_, Standing::Beside)))).collect(),
        names => names
            .iter()
            .map(|name| {
                let dirs: Vec<String> = search.dirs().iter().map(|dir| format!("\n  {}", dir.display())).collect();
                let file = found.iter().find(|file| file.name == *name);
                file.with_context(|| format!("no strategy `{name}` in:{}", dirs.concat()))
            })
            .collect::<Result<_>>()?,
    };
    ensure!(!wanted.is_empty(), "there is nothing to lock: all strategies that are found lie beside the program");
    let probe = Probe::this_program()?;
    for file in wanted {
        let place = || format!("plugin {}", file.path.display());
        let staged = PluginFile::read(&file.path).and_then(|read| read.stage()).with_context(place)?;
        let answers = probe.ask(&staged, &[]).with_context(place)?;
        let named = answers.description.name;
        ensure!(named == file.name, "{}: it calls itself `{named}`; rename the file", place());
        let path = file.path.canonicalize().with_context(place)?;
        entries.push(trust::Entry { name: named, version: answers.description.version, sha256: staged.sha256, path });
    }
    let lines = entries
        .iter()
        .map(|entry| format!("{}   {}   {}   {}", entry.name, entry.version, entry.sha256, entry.path.display()));
    let lines = lines.collect::<Vec<_>>().join("\n");
    let path = trust::lock(entries)?;
    line(format_args!("locked in {}", path.display()));
    print(&lines)?;
    Ok(Done::Whole)
}

/// Builds a crate now and after each change of its source, until it is interrupted.
fn watch(dir: &Path) -> Result<Done> {
    let manifest = dir.join("Cargo.toml");
    ensure!(manifest.exists(), "{}: no crate is there\nhint: `homeroom plugins new NAME` writes one", dir.display());
    interrupt::listen()?;
    let (mut tree, problem) = Tree::new(vec![manifest, dir.join("src")]);
    if let Some(problem) = problem {
        line(format_args!("note: changes are looked for every 2 s only: {problem}"));
    }
    loop {
        let started = Instant::now();
        match build(dir) {
            Ok(library) => {
                line(format_args!("built     {}   {:.1} s", library.display(), started.elapsed().as_secs_f64()));
            }
            Err(error) => line(format_args!("not built: {error:#}; the last build stays")),
        }
        let Some(changed) = interrupt::idly(|| tree.wait(&interrupt::asked)) else { return Ok(Done::Interrupted) };
        line(format_args!("changed   {}", changed.display()));
    }
}
