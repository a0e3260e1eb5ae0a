//! What is known of a request: one line of a log, and never a word of what is asked or answered.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::HeaderMap;
use serde_json::{Map, Value, json};

use crate::handler::config::server::Log;
use crate::pseudonym::Pseudonyms;
use crate::random;
use crate::registry::when;
use crate::terminal::shown;

/// The header with the id of a request, which a client or a proxy may choose.
pub const REQUEST_ID: &str = "x-request-id";
/// Longest id that is taken over, in bytes.
const ID_BYTES_MAX: usize = 64;

/// A request, from its headers to the last byte of its answer.
pub struct Record {
    /// Its id.
    pub id: String,
    /// When its headers were there.
    pub started: Instant,
    method: String,
    /// The path as the table of routes has it, so that nothing of what clients write there is kept.
    pub route: String,
    known: Mutex<Known>,
}

/// What is found out on the way.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The name of the key.
    pub key: Option<String>,
    /// The person for whom a program asks; a pseudonym is logged.
    pub user: Option<String>,
    /// The model, by our name for it.
    pub model: Option<String>,
    /// The handler that answered.
    pub handler: Option<String>,
    /// It was to wait behind others.
    pub background: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer.
    pub completion_tokens: Option<u64>,
    /// From the headers to the first text.
    pub first_token: Option<Duration>,
    /// Why the answer ended.
    pub finish: Option<String>,
    /// The limit that was reached.
    pub limit: Option<&'static str>,
}

impl Record {
    /// The record of a request.
    pub fn new(headers: &HeaderMap, method: &str, route: &str) -> Self {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let given = given.filter(|id| !id.is_empty() && id.len() <= ID_BYTES_MAX && id.chars().all(plain));
        Self {
            id: given.map_or_else(|| format!("req-{}", random::id()), str::to_owned),
            started: Instant::now(),
            method: method.to_owned(),
            route: route.to_owned(),
            known: Mutex::default(),
        }
    }

    /// What is known so far.
    pub fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its method.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The line of the log, once the answer is over.
    pub fn line(&self, log: Log, pseudonyms: &Pseudonyms, status: u16, whole: bool) -> Option<String> {
        let person = || {
            let known = self.known();
            known.user.as_deref().map(|user| pseudonyms.of(known.key.as_deref(), user))
        };
        match log {
            Log::Off => None,
            Log::Text => Some(self.text(person(), status, whole)),
            Log::Json => Some(self.json(person(), status, whole).to_string()),
        }
    }

    fn json(&self, person: Option<String>, status: u16, whole: bool) -> Value {
        let known = self.known().clone();
        let ms = |time: Duration| json!(time.as_millis() as u64);
        let mut line = Map::new();
        let fields = [
            ("time", json!(when::text(SystemTime::now()))),
            ("id", json!(self.id)),
            ("method", json!(self.method)),
            ("route", json!(self.route)),
            ("status", json!(status)),
            ("ms", ms(self.started.elapsed())),
            ("key", json!(known.key)),
            ("user", json!(person)),
            ("model", json!(known.model)),
            ("handler", json!(known.handler)),
            ("prompt_tokens", json!(known.prompt_tokens)),
            ("completion_tokens", json!(known.completion_tokens)),
            ("first_token_ms", known.first_token.map_or(Value::Null, ms)),
            ("finish", json!(known.finish)),
            ("limit", json!(known.limit)),
            ("background", if known.background { json!(true) } else { Value::Null }),
            ("whole", if whole { Value::Null } else { json!(false) }),
        ];
        line.extend(
            fields.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.to_owned(), value)),
        );
        Value::Object(line)
    }

    fn text(&self, person: Option<String>, status: u16, whole: bool) -> String {
        let known = self.known().clone();
        let mut line = format!(
            "{}   {} {} {status}   {:.2} s",
            when::text(SystemTime::now()),
            self.method,
            self.route,
            self.started.elapsed().as_secs_f64()
        );
        let mut say = |part: String| line += &format!("   {part}");
        match (&known.model, &known.handler) {
            (Some(model), Some(handler)) if model != handler => say(format!("{model} by {handler}")),
            (Some(model), _) => say(model.clone()),
            _ => {}
        }
        if let Some(prompt) = known.prompt_tokens {
            say(format!("{prompt} + {} tokens", known.completion_tokens.unwrap_or(0)));
        }
        if let Some(first) = known.first_token {
            say(format!("first after {:.2} s", first.as_secs_f64()));
        }
        for (name, value) in [("limit", known.limit.map(str::to_owned)), ("key", known.key), ("user", person)] {
            if let Some(value) = value {
                say(format!("{name} {value}"));
            }
        }
        if known.background {
            say("background".to_owned());
        }
        if !whole {
            say("left before the end".to_owned());
        }
        say(self.id.clone());
        shown(&line).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_what_happened_and_nobody() {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, "from-caddy.1".parse().expect("a value"));
        let record = Record::new(&headers, "POST", "/v1/chat/completions");
        *record.known() = Known {
            key: Some("moodle".into()),
            user: Some("anna@school.example".into()),
            model: Some("tutor".into()),
            handler: Some("near".into()),
            prompt_tokens: Some(12),
            completion_tokens: Some(40),
            first_token: Some(Duration::from_millis(120)),
            finish: Some("stop".into()),
            ..Known::default()
        };
        let pseudonyms = Pseudonyms::default();
        let text = record.line(Log::Text, &pseudonyms, 200, true).expect("it is logged");
        assert!(
            text.contains("POST /v1/chat/completions 200") && text.contains("tutor by near   12 + 40 tokens"),
            "{text}"
        );
        let json = record.line(Log::Json, &pseudonyms, 200, false).expect("it is logged");
        let line: Value = serde_json::from_str(&json).expect("it is JSON");
        assert_eq!(
            (&line["id"], &line["key"], &line["whole"]),
            (&json!("from-caddy.1"), &json!("moodle"), &json!(false))
        );
        assert_eq!((&line["first_token_ms"], line.get("limit")), (&json!(120), None));
        let anna = pseudonyms.of(Some("moodle"), "anna@school.example");
        for line in [text, json] {
            assert!(line.contains(&anna) && !line.contains("anna"), "{line}");
        }
        assert_eq!(record.line(Log::Off, &pseudonyms, 200, true), None);
        for bad in ["", "a b", "a\"", &"x".repeat(65)] {
            headers.insert(REQUEST_ID, bad.parse().expect("a value"));
            assert!(Record::new(&headers, "GET", "/").id.starts_with("req-"), "{bad}");
        }
    }
}
