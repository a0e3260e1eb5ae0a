//! `homeroom keys`.

use anyhow::Result;
use clap::Subcommand;
use serde_json::{Value, json};

use super::arguments::whole;
use super::{Done, handlers_of_home, print};
use crate::handler::config::Config;
use crate::progress::{line, thousands};
use crate::serve::keys::file::{self, Key};
use crate::serve::keys::limits::Limits;
use crate::stdout::Stdout;
use crate::table::{Column, lines};
use crate::toml_problems::near;

/// Largest limit.
const LIMIT_MAX: u64 = 1 << 50;

/// What is done with keys.
#[derive(Subcommand)]
pub enum Keys {
    /// Makes a key and prints it once, alone on stdout; only a digest of it is kept
    Add(Add),
    /// Lists the keys: what each may use, and how much
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Removes keys; a server that runs refuses them from its next request on
    Rm {
        /// Names from `homeroom keys list`
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
}

/// Arguments of `keys add`.
#[derive(clap::Args)]
pub struct Add {
    /// What the key is called here, such as class-7b or moodle; what is made with it belongs to this name
    #[arg(value_name = "NAME")]
    name: String,
    /// Models that it may use, by the names of their routes [default: all that are served]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    routes: Option<Vec<String>>,
    /// Most requests in any minute
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=LIMIT_MAX))]
    requests_per_minute: Option<u64>,
    /// Most tokens of prompts and answers in any minute
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=LIMIT_MAX))]
    tokens_per_minute: Option<u64>,
    /// Most tokens of prompts and answers of a day, which ends at midnight where the server is
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=LIMIT_MAX))]
    tokens_per_day: Option<u64>,
    /// The program with this key says for whom it asks (X-OpenWebUI-User-Id, or `user` in the body), and the limits hold for each person
    #[arg(long)]
    trust_forwarded: bool,
}

/// Name, beginning of the key, date, models, limits.
const COLUMNS: [Column; 5] = [
    Column { right: false, spare: 0 },
    Column { right: false, spare: 2 },
    Column { right: false, spare: 1 },
    Column { right: false, spare: 3 },
    Column { right: false, spare: 0 },
];

/// Does it.
pub fn run(what: &Keys) -> Result<Done> {
    match what {
        Keys::Add(add) => make(add)?,
        Keys::List { json } => list(*json)?,
        Keys::Rm { names } => {
            let path = file::place()?;
            for name in names {
                file::remove(&path, name)?;
                line(format_args!("removed  key {name}"));
            }
            if file::read(&path)?.is_empty() {
                line(
                    "note: there is no key left; a server that runs lets nobody in, and one that is started now serves this machine alone",
                );
            }
        }
    }
    Ok(Done::Whole)
}

fn make(add: &Add) -> Result<()> {
    let path = file::place()?;
    let (mut key, text) = Key::make(&add.name)?;
    key.routes.clone_from(&add.routes);
    key.limits = Limits {
        requests_per_minute: add.requests_per_minute,
        tokens_per_minute: add.tokens_per_minute,
        tokens_per_day: add.tokens_per_day,
    };
    key.trust_forwarded = add.trust_forwarded;
    let told = format!("key      {}   {}", key.name, may(&key));
    let is_first = file::read(&path)?.is_empty();
    file::add(&path, key)?;
    line(told);
    add.routes.iter().flatten().filter_map(|route| unknown(route)).for_each(line);
    if is_first {
        line("note: from now on every request to `homeroom serve` wants a key, also one of this machine");
    }
    line("this is the key; it is not shown again. Send it as `Authorization: Bearer KEY`:");
    print(&text)
}

/// What is said of a route that the user's file of handlers does not have.
fn unknown(route: &str) -> Option<String> {
    let Config { routes, handlers, .. } = Config::read(&handlers_of_home()?).ok()?;
    let names: Vec<&String> = if routes.is_empty() { handlers.keys().collect() } else { routes.keys().collect() };
    let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
    (!names.contains(&route))
        .then(|| format!("note: your handlers.toml has no route `{route}`, {}", near(route, &names)))
}

fn list(as_json: bool) -> Result<()> {
    let keys = file::read(&file::place()?)?;
    if as_json {
        return print(&keys.iter().map(object).collect::<Value>().to_string());
    }
    if keys.is_empty() {
        line("no keys yet: `homeroom serve` answers this machine alone\nhint: `homeroom keys add NAME` makes a key");
        return Ok(());
    }
    let row = |key: &Key| {
        let routes = key.routes.as_ref().map_or_else(|| "all models".to_owned(), |routes| routes.join(", "));
        vec![
            key.name.clone(),
            format!("{}…", key.begins),
            key.added[..10.min(key.added.len())].to_owned(),
            routes,
            limits(key),
        ]
    };
    print(&lines(&COLUMNS, &keys.iter().map(row).collect::<Vec<_>>(), Stdout.width()).join("\n"))
}

fn object(key: &Key) -> Value {
    let Limits { requests_per_minute, tokens_per_minute, tokens_per_day } = key.limits;
    json!({
        "name": key.name,
        "begins": key.begins,
        "added": key.added,
        "routes": key.routes,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "trust_forwarded": key.trust_forwarded,
    })
}

/// What a key may do, in words.
fn may(key: &Key) -> String {
    let routes = key.routes.as_ref().map_or_else(|| "all models".to_owned(), |routes| routes.join(", "));
    format!("{routes}   {}", limits(key)).trim_end().to_owned()
}

fn limits(key: &Key) -> String {
    let Limits { requests_per_minute, tokens_per_minute, tokens_per_day } = key.limits;
    let number = |limit: u64| thousands(usize::try_from(limit).unwrap_or(usize::MAX));
    let parts = [
        requests_per_minute.map(|most| format!("{} requests a minute", number(most))),
        tokens_per_minute.map(|most| format!("{} tokens a minute", number(most))),
        tokens_per_day.map(|most| format!("{} tokens a day", number(most))),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    match (parts.is_empty(), key.trust_forwarded) {
        (true, false) => "no limit".to_owned(),
        (true, true) => "no limit, names people".to_owned(),
        (false, false) => parts.join(", "),
        (false, true) => format!("{} for each person", parts.join(", ")),
    }
}
