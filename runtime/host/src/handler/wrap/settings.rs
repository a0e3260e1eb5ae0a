//! Wrappers as a file of handlers describes them, for a handler or for a route.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::breaker::{Breaker, Breaking};
use super::defaults::{Defaulting, Defaults, System};
use super::log::Logging;
use super::record::Recording;
use super::retry::{Retry, Retrying};
use super::timeouts::Timeouts;
use super::total::Total;
use super::words::{Action, Source, Watching, WordsSpec};
use super::{Checking, wrapped};
use crate::handler::Handler;
use crate::handler::limit::{Limited, Limits};
use crate::toml_problems::{Problems, near};

/// Keys that every handler has.
pub const HANDLER_KEYS: [&str; 15] = [
    "system",
    "system_file",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "words",
    "log",
    "answer_timeout_s",
    "first_token_timeout_s",
    "idle_timeout_s",
    "limits",
    "retry",
    "breaker",
    "record",
];
/// Those of them that say what a request does not.
pub const DEFAULT_KEYS: [&str; 6] = ["system", "system_file", "max_tokens", "temperature", "top_p", "stop"];
/// Those of them that a route has, too.
pub const ROUTE_KEYS: [&str; 9] =
    ["system", "system_file", "max_tokens", "temperature", "top_p", "stop", "words", "log", "answer_timeout_s"];
/// Those whose values are numbers, which messages show.
pub const HARMLESS_KEYS: [&str; 6] =
    ["max_tokens", "temperature", "top_p", "answer_timeout_s", "first_token_timeout_s", "idle_timeout_s"];

/// Shortest and longest time, in seconds.
const SECONDS: RangeInclusive<f64> = 0.001..=86_400.0;

/// What stands around a handler or a route; by default nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Values for what a request does not say.
    pub defaults: Defaults,
    /// `words`.
    pub words: Vec<WordsSpec>,
    /// `log`: a file.
    pub log: Option<PathBuf>,
    /// `answer_timeout_s`.
    pub total: Option<Duration>,
    /// `first_token_timeout_s` and `idle_timeout_s`.
    pub timeouts: Timeouts,
    /// `limits`.
    pub limits: Option<Limits>,
    /// `retry`.
    pub retry: Option<Retry>,
    /// `breaker`.
    pub breaker: Option<Breaker>,
    /// `record`: a file.
    pub record: Option<PathBuf>,
}

impl Settings {
    /// Reads them from a handler's or a route's table. Paths are relative to the file, which is at `path`.
    pub fn parse<'a>(problems: &mut Problems<'a>, path: &Path, table: &DeTable<'a>) -> Self {
        let beside =
            |name: String| path.parent().map_or_else(|| PathBuf::from(&name), |directory| directory.join(&name));
        let mut settings = Self { defaults: defaults(problems, &beside, table), ..Self::default() };
        if let Some(value) = table.get("words") {
            let lists = value.get_ref().as_array().map_or(std::slice::from_ref(value), |lists| &lists[..]);
            settings.words = lists.iter().filter_map(|list| words(problems, &beside, list)).collect();
        }
        let mut file = |key: &str| table.get(key).and_then(|value| problems.text(key, value)).map(&beside);
        (settings.log, settings.record) = (file("log"), file("record"));
        let mut seconds = |key: &str| {
            let seconds = table.get(key).and_then(|value| problems.number(key, value, SECONDS));
            seconds.map(Duration::from_secs_f64)
        };
        settings.timeouts = Timeouts { first_token: seconds("first_token_timeout_s"), idle: seconds("idle_timeout_s") };
        // An endpoint has read this one already, and has the same limit on each of its requests.
        let kind = table.get("kind").and_then(|kind| kind.get_ref().as_str());
        if !matches!(kind, Some("openai" | "anthropic")) {
            settings.total = seconds("answer_timeout_s");
        }
        settings.limits = inner(problems, table, "limits", &["running", "waiting"], |problems, table| Limits {
            running: whole(problems, table, "running", 1..=1024, 4),
            waiting: whole(problems, table, "waiting", 0..=4096, 16),
        });
        settings.retry = inner(problems, table, "retry", &["max", "base_s", "cap_s"], |problems, table| Retry {
            max: whole(problems, table, "max", 0..=10, 2) as u32,
            base: time(problems, table, "base_s", 0.5),
            cap: time(problems, table, "cap_s", 8.0),
        });
        settings.breaker =
            inner(problems, table, "breaker", &["failures", "window_s", "open_s"], |problems, table| Breaker {
                failures: whole(problems, table, "failures", 1..=1000, 5),
                window: time(problems, table, "window_s", 60.0),
                open: time(problems, table, "open_s", 30.0),
            });
        settings
    }

    /// The first key of those that only answers have, if one is said. Vectors have none of them.
    pub fn of_answers(&self) -> Option<&'static str> {
        let Self { defaults, words, timeouts, record, .. } = self;
        let replaces = |words: &WordsSpec| matches!(words.action, Action::Replace(_)) || !words.question;
        let said = [
            (defaults.key(), defaults.key().is_some()),
            // Vectors of other words would be those of another text.
            (Some("words"), words.iter().any(replaces)),
            (Some("first_token_timeout_s"), timeouts.first_token.is_some()),
            (Some("idle_timeout_s"), timeouts.idle.is_some()),
            (Some("record"), record.is_some()),
        ];
        said.into_iter().find_map(|(key, is_said)| key.filter(|_| is_said))
    }

    /// Puts them around a handler, which is asked by a bounded number at once.
    ///
    /// # Errors
    /// When a file that they name cannot be read.
    pub fn around(
        &self,
        name: &str,
        handler: Arc<dyn Handler>,
        limits: Limits,
        total: Option<Duration>,
    ) -> Result<Arc<dyn Handler>> {
        let mut handler = wrapped(handler, Checking);
        if let Some(path) = &self.record {
            handler = wrapped(handler, Recording::new(path.clone()));
        }
        if self.timeouts != Timeouts::default() {
            handler = wrapped(handler, self.timeouts);
        }
        if let Some(retry) = self.retry {
            handler = wrapped(handler, Retrying { name: name.to_owned(), retry });
        }
        if let Some(breaker) = self.breaker {
            handler = wrapped(handler, Breaking::new(name, breaker));
        }
        let limited = Arc::new(Limited::new(handler, self.limits.unwrap_or(limits)));
        self.around_all(name, limited, self.total.or(total))
    }

    /// Puts those that a route has around its handlers.
    ///
    /// # Errors
    /// As [`Settings::around`].
    pub fn around_route(&self, name: &str, route: Arc<dyn Handler>) -> Result<Arc<dyn Handler>> {
        self.around_all(name, route, self.total)
    }

    fn around_all(
        &self,
        name: &str,
        mut handler: Arc<dyn Handler>,
        total: Option<Duration>,
    ) -> Result<Arc<dyn Handler>> {
        if let Some(total) = total {
            handler = wrapped(handler, Total(total));
        }
        if !self.defaults.is_empty() {
            handler = wrapped(handler, Defaulting::load(self.defaults.clone()).context("system_file")?);
        }
        // Outside of the defaults: a teacher's own words are not searched.
        for words in self.words.iter().rev() {
            handler = wrapped(handler, Watching::load(words.clone()).context("words")?);
        }
        if let Some(path) = &self.log {
            handler = wrapped(handler, Logging::new(name, path.clone()));
        }
        Ok(handler)
    }

    /// What stands around a route or a handler, the outermost first, in words. `bounds`: those of the handler.
    pub fn described(&self, bounds: Option<&Bounds>) -> Vec<String> {
        let Self { defaults, words, log, total, timeouts, limits: _, retry, breaker, record } = self;
        let s = |time: Duration| format!("{} s", time.as_secs_f64());
        let mut all = Vec::new();
        all.extend(log.iter().map(|path| format!("log {}", path.display())));
        all.extend(words.iter().map(WordsSpec::described));
        all.extend(defaults.described());
        match bounds {
            Some(bounds) => all.extend(bounds.described()),
            None => all.extend(total.map(|total| format!("answer timeout {}", s(total)))),
        }
        all.extend(breaker.map(|Breaker { failures, window, open }| {
            format!("breaker {failures} failures in {} open for {}", s(window), s(open))
        }));
        all.extend(retry.map(|Retry { max, base, cap }| format!("retry {max} times after {} to {}", s(base), s(cap))));
        all.extend(timeouts.first_token.map(|time| format!("first token timeout {}", s(time))));
        all.extend(timeouts.idle.map(|time| format!("idle timeout {}", s(time))));
        all.extend(record.iter().map(|path| format!("record {}", path.display())));
        all
    }
}

/// What bounds a handler, whether its table says it or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// How many requests it takes.
    pub limits: Limits,
    /// Its table does not say them.
    pub limits_are_default: bool,
    /// Longest time for a whole answer.
    pub total: Duration,
    /// It is that of `[server]`, which bounds all answers that are served.
    pub total_is_of_server: bool,
    /// Nobody chose it.
    pub total_is_default: bool,
}

impl Bounds {
    /// They, in words.
    fn described(&self) -> [String; 2] {
        let default = |is_default: bool| if is_default { " (default)" } else { "" };
        let Self { limits: Limits { running, waiting }, limits_are_default, total, .. } = *self;
        let of_server = if self.total_is_of_server { ", [server] answer_timeout" } else { "" };
        [
            format!("answer timeout {} s{of_server}{}", total.as_secs_f64(), default(self.total_is_default)),
            format!("limits {running} running, {waiting} waiting{}", default(limits_are_default)),
        ]
    }
}

fn defaults<'a>(problems: &mut Problems<'a>, beside: &impl Fn(String) -> PathBuf, table: &DeTable<'a>) -> Defaults {
    let mut text = |key: &str| table.get(key).and_then(|value| problems.text(key, value));
    let system = match (text("system"), text("system_file")) {
        (Some(_), Some(_)) => {
            let at = table.get("system_file").map(Spanned::span);
            problems.at(at, "`system_file`: there is a `system` already; leave one of them out");
            None
        }
        (Some(text), None) => Some(System::Text(text)),
        (None, path) => path.map(|path| System::File(beside(path))),
    };
    let mut number = |key: &str, range| table.get(key).and_then(|value| problems.number(key, value, range));
    let (temperature, top_p) = (number("temperature", 0.0..=2.0), number("top_p", 0.0..=1.0));
    let max_tokens = table.get("max_tokens").and_then(|value| problems.int("max_tokens", value, 1..=1_000_000));
    let stop = table.get("stop").map_or_else(Vec::new, |value| {
        let stop = problems.texts("stop", value);
        if stop.len() > 4 || stop.iter().any(String::is_empty) {
            problems.at(value.span(), "`stop`: should be one to four texts, none of them empty");
        }
        stop
    });
    Defaults { system, max_tokens: max_tokens.map(|most| most.unsigned_abs() as usize), temperature, top_p, stop }
}

fn words<'a>(
    problems: &mut Problems<'a>,
    beside: &impl Fn(String) -> PathBuf,
    value: &Spanned<DeValue<'a>>,
) -> Option<WordsSpec> {
    let Some(table) = value.get_ref().as_table() else {
        problems.wrong_type(
            "words",
            value,
            "a table such as { list = [\"…\"], action = \"refuse\" }, or a list of such",
        );
        return None;
    };
    problems.unknown_keys(table, &["list", "file", "action", "with", "in"]);
    let source = match (table.get("list"), table.get("file")) {
        (Some(list), None) => Source::List(problems.texts("list", list)),
        (None, Some(file)) => Source::File(beside(problems.text("file", file)?)),
        _ => {
            problems.at(value.span(), "`words`: should have either `list` or `file`");
            return None;
        }
    };
    if let (Source::List(words), Some(list)) = (&source, table.get("list"))
        && let Err(why) = super::words::List::new(words.iter().map(String::as_str))
    {
        problems.at(list.span(), format!("`list`: {why}"));
    }
    let mut text = |key: &str| table.get(key).and_then(|value| Some((problems.text(key, value)?, value.span())));
    let (action, with) = (text("action"), text("with"));
    let action = match action.as_ref().map(|(action, span)| (action.as_str(), span)) {
        None | Some(("refuse", _)) => Action::Refuse,
        Some(("replace", _)) => {
            Action::Replace(with.as_ref().map_or_else(|| "***".to_owned(), |(with, _)| with.clone()))
        }
        Some((other, span)) => {
            problems
                .at(span.clone(), format!("`action`: `{other}` is unknown, {}", near(other, &["refuse", "replace"])));
            return None;
        }
    };
    if let (Action::Refuse, Some((_, span))) = (&action, &with) {
        problems.at(span.clone(), "`with`: goes with action = \"replace\"");
    }
    let places = table.get("in").map(|value| (problems.texts("in", value), value.span()));
    let has = |place: &str| places.as_ref().is_none_or(|(places, _)| places.iter().any(|other| other == place));
    let (question, answer) = (has("question"), has("answer"));
    if let Some((places, span)) = &places {
        let known = ["question", "answer"];
        for other in places.iter().filter(|place| !known.contains(&place.as_str())) {
            problems.at(span.clone(), format!("`in`: `{other}` is unknown, {}", near(other, &known)));
        }
        if places.is_empty() {
            problems.at(span.clone(), "`in`: the list is empty; leave it out to search both");
        }
    }
    Some(WordsSpec { source, action, question, answer })
}

/// Reads a table in the table.
fn inner<'a, T>(
    problems: &mut Problems<'a>,
    table: &DeTable<'a>,
    key: &str,
    keys: &[&str],
    read: impl FnOnce(&mut Problems<'a>, &DeTable<'a>) -> T,
) -> Option<T> {
    let value = table.get(key)?;
    let Some(table) = value.get_ref().as_table() else {
        problems.wrong_type(key, value, &format!("a table with {}", keys.join(", ")));
        return None;
    };
    problems.unknown_keys(table, keys);
    Some(read(problems, table))
}

fn whole<'a>(
    problems: &mut Problems<'a>,
    table: &DeTable<'a>,
    key: &str,
    range: RangeInclusive<i64>,
    default: usize,
) -> usize {
    let given = table.get(key).and_then(|value| problems.int(key, value, range));
    given.map_or(default, |given| given.unsigned_abs() as usize)
}

fn time<'a>(problems: &mut Problems<'a>, table: &DeTable<'a>, key: &str, default: f64) -> Duration {
    let given = table.get(key).and_then(|value| problems.number(key, value, SECONDS));
    Duration::from_secs_f64(given.unwrap_or(default))
}
