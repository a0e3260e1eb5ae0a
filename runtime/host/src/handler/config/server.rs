//! The table `[server]` of a file of handlers: where a server listens, who may call it by which name, and how much it takes of a client.

use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::Context as _;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::toml_problems::{Problems, near};

/// Its keys.
pub const KEYS: [&str; 11] = [
    "listen",
    "allowed_hosts",
    "cors_origins",
    "max_body",
    "max_tokens",
    "connections",
    "header_timeout",
    "body_timeout",
    "answer_timeout",
    "drain",
    "log",
];

/// Connections at once: below half of the files that a program may open where nobody raised it.
const CONNECTIONS_MAX: usize = 400;

/// What is said on stderr of a request: never a word of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Log {
    /// Nothing.
    #[default]
    Off,
    /// A line for people.
    Text,
    /// A JSON object.
    Json,
}

impl Log {
    const NAMES: [&str; 3] = ["off", "text", "json"];

    fn named(name: &str) -> Option<Self> {
        [Self::Off, Self::Text, Self::Json]
            .into_iter()
            .zip(Self::NAMES)
            .find(|(_, known)| *known == name)
            .map(|(log, _)| log)
    }
}

impl std::str::FromStr for Log {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        Self::named(name).with_context(|| near(name, &Self::NAMES))
    }
}

/// The settings of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `listen`: host and port, where the command line names none.
    pub listen: Option<(String, u16)>,
    /// `allowed_hosts`: names by which clients may call this server, besides those of this machine. In small letters.
    pub allowed_hosts: Vec<String>,
    /// `cors_origins`: origins of pages elsewhere that may use it, such as `https://tutor.school.example`.
    pub cors_origins: Vec<String>,
    /// `max_body`: largest body of a request, in bytes.
    pub max_body: usize,
    /// `max_tokens`: longest answer that a request may ask for, in tokens.
    pub max_tokens: Option<usize>,
    /// `connections`: connections at once.
    pub connections: usize,
    /// `header_timeout`: time for the headers of a request.
    pub header_timeout: Duration,
    /// `body_timeout`: time for its body.
    pub body_timeout: Duration,
    /// `answer_timeout`: longest time for an answer, including the wait in the queue.
    pub answer_timeout: Duration,
    /// `drain`: how long answers may go on once the server is asked to stop.
    pub drain: Duration,
    /// `log`: what is said of a request.
    pub log: Log,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: None,
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            max_body: 4 << 20,
            max_tokens: None,
            connections: CONNECTIONS_MAX,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(30 * 60),
            drain: Duration::from_secs(30),
            log: Log::Off,
        }
    }
}

impl Settings {
    /// The keys that count only from the next start on, and differ from those of another file.
    pub fn fixed_that_differ(&self, other: &Self) -> Vec<&'static str> {
        let differ = [
            ("listen", self.listen != other.listen),
            ("connections", self.connections != other.connections),
            ("header_timeout", self.header_timeout != other.header_timeout),
            ("body_timeout", self.body_timeout != other.body_timeout),
        ];
        differ.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

/// Reads the table of a file, if there is one.
pub fn read<'a>(problems: &mut Problems<'a>, root: &DeTable<'a>) -> Settings {
    let mut settings = Settings::default();
    let Some(value) = root.get("server") else { return settings };
    let Some(table) = value.get_ref().as_table() else {
        problems.wrong_type("server", value, "a table, [server]");
        return settings;
    };
    problems.unknown_keys(table, &KEYS);
    let day = Duration::from_secs(24 * 3600);
    let second = Duration::from_secs(1);
    for (key, value) in table.iter() {
        let key = key.get_ref().as_ref();
        match key {
            "listen" => settings.listen = listen(problems, value).or(settings.listen),
            "allowed_hosts" => settings.allowed_hosts = list(problems, key, value, host),
            "cors_origins" => settings.cors_origins = list(problems, key, value, origin),
            "max_body" => {
                let bytes = unit(problems, key, value, &SIZES, "a size such as \"4MiB\"", 1 << 10..=1 << 30);
                settings.max_body = bytes.map_or(settings.max_body, |bytes| bytes as usize);
            }
            "max_tokens" => {
                let most = problems.int(key, value, 1..=1 << 20);
                settings.max_tokens = most.map(|most| most.unsigned_abs() as usize);
            }
            "connections" => {
                let most = problems.int(key, value, 1..=10_000);
                settings.connections = most.map_or(settings.connections, |most| most.unsigned_abs() as usize);
            }
            "header_timeout" => time(problems, key, value, second..=day, &mut settings.header_timeout),
            "body_timeout" => time(problems, key, value, second..=day, &mut settings.body_timeout),
            "answer_timeout" => time(problems, key, value, second..=day, &mut settings.answer_timeout),
            "drain" => time(problems, key, value, Duration::ZERO..=day, &mut settings.drain),
            "log" => {
                let Some(name) = problems.text(key, value) else { continue };
                match name.parse::<Log>() {
                    Ok(log) => settings.log = log,
                    Err(hint) => problems.at(value.span(), format!("`log`: `{name}` is unknown, {hint}")),
                }
            }
            // It was noted as unknown.
            _ => {}
        }
    }
    settings
}

fn listen<'a>(problems: &mut Problems<'a>, value: &Spanned<DeValue<'a>>) -> Option<(String, u16)> {
    let text = problems.text("listen", value)?;
    let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    match parts.filter(|(host, _)| !host.is_empty() && (!host.contains(':') || host.starts_with('['))) {
        Some((host, port)) => Some((host.trim_matches(['[', ']']).to_owned(), port)),
        None => {
            problems.at(
                value.span(),
                "`listen`: should be an address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"",
            );
            None
        }
    }
}

/// A list of texts, each as a check has it.
fn list<'a>(
    problems: &mut Problems<'a>,
    key: &str,
    value: &Spanned<DeValue<'a>>,
    check: fn(&str) -> Result<String, String>,
) -> Vec<String> {
    let Some(items) = value.get_ref().as_array() else {
        problems.wrong_type(key, value, "a list of texts");
        return Vec::new();
    };
    let mut list = Vec::new();
    for item in items.iter() {
        let Some(text) = problems.text(key, item) else { continue };
        match check(&text) {
            Ok(text) => list.push(text),
            Err(why) => problems.at(item.span(), format!("`{key}`: {why}")),
        }
    }
    list
}

/// A name as it stands in the header `Host`, without a port.
fn host(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return Ok(text.to_ascii_lowercase());
    }
    Err("should be a host's name without scheme and port, such as \"tutor.school.example\"".to_owned())
}

/// An origin as browsers send it.
fn origin(text: &str) -> Result<String, String> {
    if text == "*" {
        return Err("`*` would let every page in the world use this server; name the origins".to_owned());
    }
    let parts = text.split_once("://").filter(|(scheme, _)| !scheme.is_empty());
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    match parts {
        Some((_, host)) if !host.is_empty() && host.chars().all(plain) => Ok(text.to_ascii_lowercase()),
        _ => Err("should be an origin without a path, such as \"https://tutor.school.example\"".to_owned()),
    }
}

const SIZES: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)];
const TIMES: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

/// A whole number with a unit, in the smallest one.
fn unit<'a>(
    problems: &mut Problems<'a>,
    key: &str,
    value: &Spanned<DeValue<'a>>,
    units: &[(&str, u64)],
    wanted: &str,
    range: RangeInclusive<u64>,
) -> Option<u64> {
    let text = value.get_ref().as_str().unwrap_or_default();
    let number = units.iter().find_map(|(unit, factor)| {
        let digits = text.strip_suffix(unit)?.trim_end();
        // Else "5ms" would be read as so many of "s".
        let digits = digits.chars().all(|c| c.is_ascii_digit()).then_some(digits)?;
        digits.parse::<u64>().ok()?.checked_mul(*factor)
    });
    let Some(number) = number else {
        match text.is_empty() {
            true => problems.wrong_type(key, value, wanted),
            false => problems.at(value.span(), format!("`{key}`: `{text}` should be {wanted}")),
        }
        return None;
    };
    if !range.contains(&number) {
        problems.at(value.span(), format!("`{key}`: is out of range; {wanted} is usual"));
        return None;
    }
    Some(number)
}

fn time<'a>(
    problems: &mut Problems<'a>,
    key: &str,
    value: &Spanned<DeValue<'a>>,
    range: RangeInclusive<Duration>,
    setting: &mut Duration,
) {
    let range = range.start().as_millis() as u64..=range.end().as_millis() as u64;
    if let Some(time) = unit(problems, key, value, &TIMES, "a time such as \"30s\" or \"5m\"", range) {
        *setting = Duration::from_millis(time);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read_text(text: &str) -> Result<Settings, String> {
        let mut problems = Problems::new(Path::new("h.toml"), text);
        let root = problems.parse();
        let settings = read(&mut problems, &root);
        problems.into_result().map(|()| settings).map_err(|error| error.to_string())
    }

    #[test]
    fn a_table_says_what_differs_from_the_usual() {
        assert_eq!(read_text(""), Ok(Settings::default()));
        let settings = read_text(
            r#"
[server]
listen = "[::1]:8081"
allowed_hosts = ["Tutor.school.example"]
cors_origins = ["https://tutor.school.example", "tauri://localhost"]
max_body = "16MiB"
max_tokens = 2048
connections = 50
header_timeout = "5s"
body_timeout = "1m"
answer_timeout = "1h"
drain = "500ms"
log = "json"
"#,
        );
        let settings = settings.expect("it is right");
        assert_eq!(settings.listen, Some(("::1".to_owned(), 8081)));
        assert_eq!(settings.allowed_hosts, ["tutor.school.example"]);
        assert_eq!(settings.cors_origins, ["https://tutor.school.example", "tauri://localhost"]);
        assert_eq!((settings.max_body, settings.max_tokens, settings.log), (16 << 20, Some(2048), Log::Json));
        assert_eq!((settings.answer_timeout, settings.drain), (Duration::from_secs(3600), Duration::from_millis(500)));
        assert_eq!(
            (settings.connections, settings.header_timeout, settings.body_timeout),
            (50, Duration::from_secs(5), Duration::from_secs(60))
        );
        assert_eq!(settings.fixed_that_differ(&Settings::default()).len(), 4);
    }

    #[test]
    fn what_is_wrong_is_said_by_name() {
        for (line, wanted) in [
            ("listen = \"127.0.0.1\"", "`listen`: should be an address and a port"),
            ("listen = \"::1:80\"", "`listen`: should be an address and a port"),
            ("listen = 8080", "`listen`: is a whole number"),
            ("allowed_hosts = \"a\"", "`allowed_hosts`: is a text, should be a list"),
            ("allowed_hosts = [\"https://a\"]", "without scheme and port"),
            ("cors_origins = [\"*\"]", "name the origins"),
            ("cors_origins = [\"https://a/b\"]", "without a path"),
            ("max_body = 4", "`max_body`: is a whole number, should be a size such as \"4MiB\""),
            ("max_body = \"4MB\"", "should be a size such as \"4MiB\""),
            ("max_body = \"5000GiB\"", "`max_body`: is out of range"),
            ("max_tokens = 0", "`max_tokens`: should be from 1"),
            ("drain = 30", "should be a time such as \"30s\""),
            ("drain = \"-3s\"", "should be a time"),
            ("header_timeout = \"5ms\"", "`header_timeout`: is out of range"),
            ("answer_timeout = \"99999999999999999h\"", "should be a time"),
            ("log = \"jsn\"", "`jsn` is unknown, did you mean `json`?"),
            ("max_bdy = \"4MiB\"", "did you mean `max_body`?"),
        ] {
            let refused = read_text(&format!("[server]\n{line}\n")).expect_err(line);
            assert!(refused.contains(wanted), "{line}: {refused}");
        }
        assert!(read_text("server = 1").expect_err("it is none").contains("should be a table, [server]"));
    }
}
