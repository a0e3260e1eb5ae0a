//! `homeroom list-models`.

use anyhow::Result;
use clap::Args;
use homeroom_engine::files::utf8;
use serde_json::to_string;

use super::{Done, print};
use crate::progress::line;
use crate::registry;
use crate::terminal::cell;

/// Arguments of `list-models`.
#[derive(Args)]
pub struct Arguments {
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// Lists the models of the registry.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let entries = registry::list()?;
    if arguments.json {
        entries.iter().try_for_each(|entry| utf8(&entry.path).map(drop))?;
        print(&to_string(&entries)?)?;
        return Ok(Done::Whole);
    }
    if entries.is_empty() {
        line("no models yet\nhint: `homeroom fine-tune` saves one, and so does `homeroom run`");
        return Ok(Done::Whole);
    }
    // Other people's adapters say what they like of themselves; each keeps to its line.
    let strategies: Vec<String> = entries.iter().map(|entry| cell(&entry.strategy)).collect();
    let names = entries.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
    let width = strategies.iter().map(|strategy| strategy.chars().count()).max().unwrap_or(0);
    let lines = entries.iter().zip(&strategies).map(|(entry, strategy)| {
        let problem =
            entry.problem.as_ref().map(|problem| format!("   problem: {}", cell(problem))).unwrap_or_default();
        let loss = entry.eval_loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.3}"));
        let from = entry.parent.as_ref().map(|parent| format!(", from {}", cell(parent))).unwrap_or_default();
        let base = entry.base.display().to_string();
        let base = if base.is_empty() { "an unknown base".to_owned() } else { cell(&base) };
        format!(
            "{:names$}   {:7}   {strategy:width$}   held-out loss {loss:>6}   on {base}{from}{problem}",
            entry.name, entry.kind
        )
    });
    print(&lines.collect::<Vec<_>>().join("\n"))?;
    Ok(Done::Whole)
}
