//! `homeroom list-models`.

use anyhow::Result;
use clap::Args;
use homeroom_engine::files::utf8;
use serde_json::{Value, to_value};

use super::{Done, print};
use crate::progress::{line, size, thousands};
use crate::registry::{self, Base, Entry};
use crate::stdout::Stdout;
use crate::table::{Column, lines};
use crate::terminal::cell;

/// Arguments of `list-models`.
#[derive(Args)]
pub struct Arguments {
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// Name, kind, strategy, rows, loss, size, date, and what it is on.
const TUNED: [Column; 8] = [
    Column { right: false, spare: 0 },
    Column { right: false, spare: 5 },
    Column { right: false, spare: 2 },
    Column { right: true, spare: 6 },
    Column { right: false, spare: 1 },
    Column { right: true, spare: 4 },
    Column { right: false, spare: 3 },
    Column { right: false, spare: 0 },
];

/// Name, kind, form, size, date of the download, and what is to be known of it.
const BASES: [Column; 6] = [
    Column { right: false, spare: 0 },
    Column { right: false, spare: 4 },
    Column { right: false, spare: 2 },
    Column { right: true, spare: 1 },
    Column { right: false, spare: 3 },
    Column { right: false, spare: 0 },
];

/// Lists the models of the registry, and the bases in the cache.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let entries = registry::list()?;
    // What is wrong with a cache hides no model of the registry.
    let bases = registry::bases().unwrap_or_else(|error| {
        line(format_args!("note: the bases are not listed: {error:#}"));
        Vec::new()
    });
    if arguments.json {
        let mut paths = entries.iter().map(|entry| &entry.path).chain(bases.iter().map(|base| &base.path));
        paths.try_for_each(|path| utf8(path).map(drop))?;
        let entries = entries.iter().map(to_value).chain(bases.iter().map(to_value));
        print(&entries.collect::<Result<Value, _>>()?.to_string())?;
        return Ok(Done::Whole);
    }
    if entries.is_empty() && bases.is_empty() {
        line(
            "no models yet\nhint: `homeroom pull owner/name` downloads a base of the Hugging Face hub, and `homeroom fine-tune --model-name owner/name --training-file rows.jsonl` trains a model of yours on it",
        );
        return Ok(Done::Whole);
    }
    let width = Stdout.width();
    let has_problem =
        entries.iter().any(|entry| entry.problem.is_some()) || bases.iter().any(|base| base.problem.is_some());
    let tuned = lines(&TUNED, &entries.iter().map(tuned).collect::<Vec<_>>(), width);
    let bases = lines(&BASES, &bases.iter().flat_map(base).collect::<Vec<_>>(), width);
    // What reads a pipe tells them by their second column.
    let groups = match Stdout.is_terminal() && !tuned.is_empty() && !bases.is_empty() {
        true => [vec!["your models".to_owned()], tuned, vec![String::new(), "bases".to_owned()], bases].concat(),
        false => [tuned, bases].concat(),
    };
    print(&groups.join("\n"))?;
    if width.is_some() && has_problem {
        line("hint: `homeroom show NAME` tells all of a problem");
    }
    Ok(Done::Whole)
}

/// Other people's adapters say what they like of themselves; each keeps to its line.
fn tuned(entry: &Entry) -> Vec<String> {
    let rows = entry.rows.map(|rows| format!("{} rows", thousands(rows as usize))).unwrap_or_default();
    let problem = entry.problem.as_ref().map(|problem| format!("problem: {}   ", cell(problem))).unwrap_or_default();
    let base = entry.base_name.clone().unwrap_or_else(|| entry.base.display().to_string());
    let on = match (base.is_empty(), entry.kind) {
        (false, _) => format!("on {}", cell(&base)),
        // Of a model that was imported there is none.
        (true, "adapter") => "on an unknown base".to_owned(),
        (true, _) => String::new(),
    };
    let from = entry.parent.as_ref().map(|parent| format!(", from {}", cell(parent))).unwrap_or_default();
    vec![
        entry.name.clone(),
        entry.kind.to_owned(),
        cell(&entry.strategy),
        rows,
        loss(entry),
        size(entry.bytes),
        day(entry.date.as_deref()),
        format!("{problem}{on}{from}").trim_end().to_owned(),
    ]
}

/// A line for each name that can be typed for a base.
fn base(base: &Base) -> Vec<Vec<String>> {
    let problem = base.problem.as_ref().map(|problem| format!("problem: {}", cell(problem)));
    let shared = base.shared.then(|| format!("shared, in {}", cell(&base.path.display().to_string())));
    let known = problem.into_iter().chain(shared).collect::<Vec<_>>().join("   ");
    let line = |name: &str, form: &str, bytes: u64| {
        let (date, kind) = (day(base.date.as_deref()), base.kind.to_owned());
        vec![name.to_owned(), kind, cell(form), size(bytes), date, known.clone()]
    };
    if base.usable.is_empty() {
        return vec![line(&base.name, "", base.bytes)];
    }
    base.usable.iter().map(|usable| line(&usable.name, &usable.form, usable.bytes)).collect()
}

/// The loss on rows that were held out, or else on those that were trained on.
fn loss(entry: &Entry) -> String {
    match (entry.eval_loss_before, entry.eval_loss, entry.train_loss) {
        (Some(before), Some(after), _) => format!("loss {} → {}", number(before), number(after)),
        (None, Some(after), _) => format!("loss {}", number(after)),
        (_, None, Some(training)) => format!("training loss {}", number(training)),
        (_, None, None) => String::new(),
    }
}

/// A loss with three digits behind the point; one that another program wrote may be of any size.
fn number(loss: f64) -> String {
    if loss.abs() < 1e6 { format!("{loss:.3}") } else { format!("{loss:.3e}") }
}

fn day(date: Option<&str>) -> String {
    date.and_then(|date| date.split('T').next()).unwrap_or_default().to_owned()
}
