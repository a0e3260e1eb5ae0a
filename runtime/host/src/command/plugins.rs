//! `homeroom plugins`.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::print;
use crate::cli::Done;
use crate::plugin::check::{self, Verdict};
use crate::plugin::{Probe, Search, file_name, new};
use crate::progress::line;

/// Lists the strategies that are installed. One that cannot be loaded is listed with the reason.
pub fn list(plugin_dirs: &[PathBuf], as_json: bool) -> Result<Done> {
    let search = Search::new(plugin_dirs);
    let files = search.list();
    let loaded: Vec<_> = files.iter().map(|file| (file, file.load())).collect();
    if as_json {
        let items = loaded.iter().map(|(file, plugin)| match plugin {
            Ok(plugin) => json!({
                "name": file.name,
                "version": plugin.description.version,
                "sha256": plugin.sha256,
                "path": file.path,
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
            Ok(plugin) => {
                let about = &plugin.description;
                out.push(format!("{}   {}   {}", about.name, about.version, about.doc));
                out.push(format!("  {}   sha256 {}", file.path.display(), &plugin.sha256[..16]));
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
                out.push(format!("{}   cannot be loaded", file.name));
                out.push(format!("  {}   {error:#}", file.path.display()));
            }
        }
    }
    if out.is_empty() {
        let dirs: Vec<String> = search.dirs().iter().map(|dir| format!("\n  {}", dir.display())).collect();
        let dirs = dirs.concat();
        line(format_args!("no strategies in:{dirs}\nhint: `cargo build --release` puts them beside the program"));
        return Ok(Done::Whole);
    }
    print(&out.join("\n"))?;
    Ok(Done::Whole)
}

/// Writes a new strategy, and says what to do with it.
pub fn new(name: &str, dir: Option<&Path>) -> Result<Done> {
    let written = new::create(name, dir.unwrap_or(Path::new(name)))?;
    line(format_args!(
        "strategy `{name}` is in {}, its code in src/lib.rs, all that it needs in homeroom/\nhint: there, `cargo test`, `cargo build --release`, `homeroom plugins check target/release/{}`",
        written.display(),
        file_name(name)
    ));
    Ok(Done::Whole)
}

/// Checks a strategy and prints the report; an error when anything failed.
pub fn check(file: &Path, as_json: bool) -> Result<Done> {
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
