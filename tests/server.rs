//! The server as programs in a school meet it: keys, limits, Ollama's API, what whoever runs it sees, and clients who mean harm.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use homeroom::handler::config::server::Settings;
use homeroom::handler::{Context, Event, EventStream, FinishReason, Handler, HandlerError, Request, Usage};
use homeroom::serve::keys::days::Days;
use homeroom::serve::keys::{Key, Keys};
use homeroom::serve::{Bounds, Models, Running, Serving, bind, routes, start_as};
use serde_json::{Value, json};

use crate::handlers::{chat_body, http, local};

mod access;
mod hostile;
mod limits;
mod ollama;
mod operations;
mod program;
mod waiting;

/// Longer than anything here takes.
const GUARD: Duration = Duration::from_secs(30);

/// A server with a file of keys of its own.
struct Site {
    server: Running,
    directory: tempfile::TempDir,
}

impl Site {
    /// Serves models as some settings say, to whoever has one of the keys.
    fn new(models: Models, keys: &[Key], settings: Settings) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("keys.json");
        write_keys(&path, keys)?;
        let days = Days::at(directory.path().join("serve").join("usage.json"));
        let bounds = Bounds::from(&settings);
        let serving = Serving { bounds, settings, keys: Keys::at(path), days, ..Serving::default() };
        let server = start_as(models, bind("127.0.0.1", 0)?, serving)?;
        Ok(Self { server, directory })
    }

    fn at(&self) -> SocketAddr {
        self.server.address
    }

    fn set_keys(&self, keys: &[Key]) -> Result<()> {
        write_keys(&self.directory.path().join("keys.json"), keys)
    }

    /// What an address answers to a method, with some more headers: `name: value`, a line each.
    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> Result<(u16, String, String)> {
        let more = if headers.is_empty() { String::new() } else { format!("\r\n{}", headers.replace('\n', "\r\n")) };
        let has_host = headers.lines().any(|line| line.to_lowercase().starts_with("host:"));
        let host = if has_host { "" } else { "\r\nhost: localhost" };
        http(self.at(), &format!("{method} {path} HTTP/1.1{host}{more}"), body)
    }

    /// The same with a key and a body of JSON.
    fn post(&self, path: &str, key: &str, body: &Value) -> Result<(u16, String, String)> {
        let headers = format!("authorization: Bearer {key}\ncontent-type: application/json");
        self.ask("POST", path, &headers, &body.to_string())
    }

    fn get(&self, path: &str, key: &str) -> Result<(u16, String, Value)> {
        let (status, headers, body) = self.ask("GET", path, &format!("authorization: Bearer {key}"), "")?;
        Ok((status, headers, serde_json::from_str(&body).unwrap_or(Value::Null)))
    }

    fn end(self) -> Result<()> {
        self.server.stop();
        self.server.wait()
    }
}

fn write_keys(path: &PathBuf, keys: &[Key]) -> Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, json!({ "keys": keys }).to_string())?;
    #[cfg(unix)]
    std::fs::set_permissions(&beside, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(std::fs::rename(beside, path)?)
}

fn models(names: &[&str]) -> Result<Models> {
    let model = local()?;
    Ok(names.iter().map(|name| ((*name).to_owned(), model.clone())).collect())
}

/// A chat for a model.
fn chat(model: &str, more: &Value) -> Value {
    let mut body = chat_body(more);
    body["model"] = json!(model);
    body
}

/// Says so many words, each after a while.
struct Words {
    count: u64,
    pause: Duration,
}

impl Handler for Words {
    fn stream(&self, _: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let (pause, context, count) = (self.pause, context.clone(), self.count);
        let word = move |_| {
            let over = Instant::now() + pause;
            while Instant::now() < over {
                context.check()?;
                std::thread::sleep(Duration::from_millis(2).min(pause));
            }
            Ok(Event::text("word "))
        };
        let usage = Usage { prompt_tokens: Some(10), completion_tokens: Some(count) };
        let end = [Event::finish(FinishReason::Stop), Event::Usage(usage)];
        let start = std::iter::once(Ok(Event::start("i", "m", "words")));
        Ok(Box::new(start.chain((0..count).map(word)).chain(end.map(Ok))))
    }
}

fn words(count: u64, pause_ms: u64) -> Arc<dyn Handler> {
    Arc::new(Words { count, pause: Duration::from_millis(pause_ms) })
}

/// The lines of a body that are JSON: between them stand the lengths of chunks.
fn objects(body: &str) -> Result<Vec<Value>> {
    let lines = body.lines().filter(|line| line.starts_with('{'));
    Ok(lines.map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// Waits until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + GUARD;
    while !is_so()? {
        anyhow::ensure!(Instant::now() < deadline, "{what}: not after {GUARD:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
