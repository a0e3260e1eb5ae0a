//! `homeroom list-models`.

use anyhow::Result;
use serde_json::to_string;

use super::print;
use crate::cli::{Done, ListModels};
use crate::progress::line;
use crate::registry;

/// Lists the models of the registry.
pub fn run(arguments: &ListModels) -> Result<Done> {
    let entries = registry::list()?;
    if arguments.json {
        print(&to_string(&entries)?)?;
        return Ok(Done::Whole);
    }
    if entries.is_empty() {
        line("no models yet\nhint: `homeroom run` saves one, and so does `homeroom fine-tune --name NAME`");
        return Ok(Done::Whole);
    }
    let width = |of: fn(&registry::Entry) -> usize| entries.iter().map(of).max().unwrap_or(0);
    let (names, strategies) = (width(|entry| entry.name.len()), width(|entry| entry.strategy.len()));
    let lines = entries.iter().map(|entry| match &entry.problem {
        Some(problem) => format!("{:names$}   cannot be read: {problem}", entry.name),
        None => {
            let loss = entry.eval_loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.3}"));
            let from = entry.parent.as_ref().map(|parent| format!(", from {parent}")).unwrap_or_default();
            format!(
                "{:names$}   {:7}   {:strategies$}   held-out loss {loss:>6}   on {}{from}",
                entry.name,
                entry.kind,
                entry.strategy,
                entry.base.display()
            )
        }
    });
    print(&lines.collect::<Vec<_>>().join("\n"))?;
    Ok(Done::Whole)
}
