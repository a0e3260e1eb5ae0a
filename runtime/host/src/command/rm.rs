//! `homeroom rm`.

use std::collections::BTreeSet;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde_json::{Value, json};

use super::{Done, print};
use crate::near::LIST_HINT;
use crate::progress::{line, size};
use crate::registry::{self, Removal, Target, Users};
use crate::terminal::cell;

/// Arguments of `rm`.
#[derive(Args)]
pub struct Arguments {
    /// Names from `homeroom list-models`: models of yours, or bases in the cache as owner/name
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// Remove what adapters or handlers need, too
    #[arg(long)]
    force: bool,
    /// Only say what would be removed, and what needs it
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// Removes models, or says what that would do.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let entries = registry::list()?;
    // All are looked at before the first is removed.
    let (mut removals, mut problems) = (Vec::new(), Vec::new());
    for name in arguments.names.iter().collect::<BTreeSet<_>>() {
        match registry::removal(name, &entries) {
            Ok(removal) => removals.push(removal),
            Err(error) => problems.push(format!("{error:#}")),
        }
    }
    let kept = if removals.is_empty() { "" } else { "\nnothing is removed" };
    if !problems.is_empty() {
        // The same hint is said once.
        let last = problems.len() - 1;
        let said = |(at, problem): (usize, &String)| match problem.strip_suffix(LIST_HINT).filter(|_| at < last) {
            Some(problem) => problem.to_owned(),
            None => problem.clone(),
        };
        let said: Vec<String> = problems.iter().enumerate().map(said).collect();
        return Err(anyhow!("{}{kept}", said.join("\nerror: ")));
    }
    // What goes as well is not orphaned, and goes first, so that none of it is without its base meanwhile.
    let going: BTreeSet<String> = removals.iter().map(|removal| removal.name.clone()).collect();
    removals.sort_by_key(|removal| removal.users.adapters.len());
    for removal in &mut removals {
        removal.users.adapters.retain(|name| !going.contains(name));
        removal.users.models.retain(|name| !going.contains(name));
    }
    let orphaning: Vec<&Removal> = removals.iter().filter(|removal| removal.users.are_orphaned()).collect();
    let refused = !orphaning.is_empty() && !arguments.force;
    for removal in removals.iter().filter(|_| arguments.dry_run || refused) {
        tell(removal, "would go", "frees");
    }
    if arguments.dry_run {
        let bytes = removals.iter().map(|removal| removal.bytes).sum();
        let but = if refused { "; it is refused without --force" } else { "" };
        line(format_args!("dry run   nothing is removed; {} would be freed{but}", size(bytes)));
    } else if refused {
        let names: Vec<&str> = orphaning.iter().map(|removal| removal.name.as_str()).collect();
        bail!(
            "{}: still needed by {}; nothing is removed\nhint: `homeroom rm --force {}` removes it all the same",
            names.join(", "),
            needed_by(&orphaning),
            arguments.names.join(" ")
        );
    } else {
        for removal in &removals {
            removal.carry_out()?;
            tell(removal, "removed", "freed");
        }
    }
    if arguments.json {
        let all = removals.iter().map(|removal| {
            let Removal { name, path, bytes, users, .. } = removal;
            json!({"name": name, "path": path, "bytes": bytes, "needed_by": users, "removed": !arguments.dry_run})
        });
        print(&all.collect::<Value>().to_string())?;
    }
    Ok(Done::Whole)
}

/// Says what is removed, what it frees, and what that does to others.
fn tell(removal: &Removal, verb: &str, freed: &str) {
    let Removal { name, path, target, bytes, is_link, users } = removal;
    let freed = match is_link {
        true => "the link alone; what it leads to stays".to_owned(),
        false => format!("{freed} {}", size(*bytes)),
    };
    line(format_args!("{verb:8}  {name}   {freed}   {}", path.display()));
    if let Target::Base { .. } = target {
        line("          it lies in the cache that Python's programs use, too: they would have to download it again");
    }
    let Users { adapters, runs, handlers, models } = users;
    let list = |names: &[String]| names.iter().map(|name| cell(name)).collect::<Vec<_>>().join(", ");
    if !adapters.is_empty() {
        line(format_args!("          adapters on it, which do not run without it: {}", list(adapters)));
    }
    if !runs.is_empty() {
        line(format_args!("          adapters of runs on it, which do not run without it: {}", list(runs)));
    }
    if !handlers.is_empty() {
        line(format_args!("          handlers that answer with it, in handlers.toml: {}", list(handlers)));
    }
    if !models.is_empty() {
        line(format_args!("          models that went on from it, which are whole without it: {}", list(models)));
    }
}

/// By how many of what they are needed.
fn needed_by(removals: &[&Removal]) -> String {
    let count = |of: fn(&Users) -> usize, one: &str| {
        let count: usize = removals.iter().map(|removal| of(&removal.users)).sum();
        (count > 0).then(|| format!("{count} {one}{}", if count == 1 { "" } else { "s" }))
    };
    let counts = [
        count(|users| users.adapters.len() + users.runs.len(), "adapter"),
        count(|users| users.handlers.len(), "handler"),
    ];
    counts.into_iter().flatten().collect::<Vec<_>>().join(" and ")
}
