//! Handlers and servers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use super::*;
use crate::support::{homeroom, refused, succeeds};

/// A server that ends with the test.
struct Served {
    child: Child,
    address: String,
    story: Story,
    models: Vec<String>,
    /// What it said before it served.
    said: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    fn new(command: &mut Command) -> Result<Self> {
        let mut child = command.args(["--port", "0"]).stderr(Stdio::piped()).spawn()?;
        let story = Story::of(child.stderr.take().context("a pipe")?);
        let mut served = Self { child, story, address: String::new(), models: Vec::new(), said: String::new() };
        served.said = served.story.until("serving ")?;
        let (lines, named) = (served.said.lines(), |line: &str| Some(line.strip_prefix("model ")?.trim().to_owned()));
        served.models = lines.clone().filter_map(named).collect();
        let url = lines.clone().find_map(|line| line.strip_prefix("serving ")?.split_whitespace().next());
        served.address = url.context("a URL")?.trim_start_matches("http://").trim_end_matches("/v1").to_owned();
        Ok(served)
    }

    /// The body of its answer to a request.
    fn ask(&self, method_and_path: &str, body: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "{method_and_path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (_, body) = text.split_once("\r\n\r\n").context("an answer")?;
        Ok(serde_json::from_str(body)?)
    }

    /// What a model answers.
    fn answer(&self, model: &str) -> Result<String> {
        let body = json!({
            "model": model, "max_tokens": 6, "temperature": 0,
            "messages": [{"role": "user", "content": "hi"}],
        });
        let answer = self.ask("POST /v1/chat/completions", &body.to_string())?;
        let text = answer["choices"][0]["message"]["content"].as_str();
        Ok(text.with_context(|| answer.to_string())?.to_owned())
    }
}

fn handlers(place: &Place, model: &str) -> Result<PathBuf> {
    place.write("etc/handlers.toml", format!("[handlers.tutor]\nkind = \"local\"\nmodel = \"{model}\"\n"))
}

fn chat(hub: &Hub, arguments: &[&str]) -> Result<String> {
    let mut chat = homeroom();
    chat.args(["chat", "--prompt", "hi", "--max-tokens", "6", "--temperature", "0"]).args(arguments);
    Ok(succeeds(hub.seen_by(&mut chat))?.stdout.trim_end().to_owned())
}

#[test]
fn a_handler_answers_with_a_model_of_the_hub() -> Result<()> {
    let place = Place::new()?;
    let hub = Hub::with_model(&place, "llama")?;
    let config = handlers(&place, NAME)?;
    let file = config.to_str().context("a path")?;
    let expected = chat(&hub, &["--model-dir", NAME])?;
    assert_eq!(chat(&hub, &["--config", file])?, expected);
    let mut serve = homeroom();
    let served = Served::new(hub.seen_by(serve.args(["serve", "--config", file])))?;
    assert_eq!(served.answer("tutor")?, expected);
    let mut serve = homeroom();
    let served = Served::new(hub.seen_by(serve.args(["serve", "--model-dir", &format!("{NAME}@main")])))?;
    // One name is listed, and those that a client may have instead are answered.
    assert_eq!(served.models, [NAME]);
    let listed = served.ask("GET /v1/models", "")?;
    assert_eq!((listed["data"].as_array().map(Vec::len), &listed["data"][0]["id"]), (Some(1), &NAME.into()));
    for name in [NAME, "tiny_Llama.v2", &format!("{NAME}@main")] {
        assert_eq!(served.answer(name)?, expected, "{name}");
        assert_eq!(served.ask(&format!("GET /v1/models/{name}"), "")?["id"], NAME, "{name}");
    }
    assert!(served.answer("Llama.v2").is_err());
    // A directory of that name beside the file is what the file means.
    place.copy(&fixture("models/qwen2"), &format!("etc/{NAME}"))?;
    let beside = chat(&hub, &["--config", file])?;
    assert_eq!(beside, chat(&hub, &["--model-dir", &fixture("models/qwen2").display().to_string()])?);
    assert_ne!(beside, expected);
    Ok(())
}

#[test]
fn a_server_answers_with_what_a_branch_is_at_now() -> Result<()> {
    let place = Place::new()?;
    let hub = Hub::with_model(&place, "llama")?;
    let mut serve = homeroom();
    let branch = format!("{NAME}@main");
    let served = Served::new(hub.seen_by(serve.args(["serve", "--model-dir", &branch])))?;
    let first = served.answer("tiny_Llama.v2")?;
    hub.add(NAME, SECOND, &files_of(&fixture("models/qwen2"))?)?;
    assert_eq!(served.answer("tiny_Llama.v2")?, first, "nothing moved");
    hub.set(NAME, "main", SECOND)?;
    let second = served.answer("tiny_Llama.v2")?;
    assert_eq!(second, chat(&hub, &["--model-dir", &format!("{NAME}@{SECOND}")])?);
    assert_ne!(second, first);
    served.story.until("its files have changed; the new ones answer")?;
    // Of a commit that is not whole, as while Python fetches it, nothing is taken.
    hub.set(NAME, "main", &"0".repeat(40))?;
    assert_eq!(served.answer("tiny_Llama.v2")?, second);
    served.story.until("the older ones go on answering")?;
    // Where no branch is named, that is as if its newest were not known: the newest that is whole answers.
    hub.set(NAME, "main", SECOND)?;
    let mut serve = homeroom();
    let unnamed = Served::new(hub.seen_by(serve.args(["serve", "--model-dir", NAME])))?;
    hub.set(NAME, "main", &"0".repeat(40))?;
    assert_eq!(unnamed.answer(NAME)?, second);
    unnamed.story.until(&format!("commit {SECOND} is used"))?;
    Ok(())
}

#[test]
fn a_handler_that_no_route_has_is_named_when_it_is_not_served() -> Result<()> {
    let place = Place::new()?;
    let hub = Hub::with_model(&place, "llama")?;
    let file = |routes: &str| {
        let one = |name: &str| format!("[handlers.{name}]\nkind = \"local\"\nmodel = \"{NAME}\"\n");
        place.write("etc/handlers.toml", format!("{}{}{}{routes}", one("embed"), one("gguf"), one("tutor-local")))
    };
    let config = file("[routes.tutor]\nhandlers = [\"tutor-local\"]\n")?;
    let mut serve = homeroom();
    let served = Served::new(hub.seen_by(serve.args(["serve", "--config"]).arg(&config)))?;
    assert_eq!(served.models, ["tutor"]);
    assert!(served.said.contains("note: handlers in no route, and not served: embed, gguf\n"), "{}", served.said);
    let refusal = served.answer("embed").expect_err("it is not served").to_string();
    assert!(refusal.contains("`embed` is a handler, but in no route"), "{refusal}");
    file("[routes.tutor]\nhandlers = [\"tutor-local\", \"gguf\"]\n")?;
    let story = served.story.until("reload   ")?;
    assert!(story.contains("not served: embed\n"), "{story}");
    Ok(())
}

#[test]
fn a_server_and_a_file_of_handlers_download_nothing() -> Result<()> {
    let place = Place::new()?;
    let (hub, nobody) = (Hub::with_model(&place, "llama")?, Nobody::new()?);
    let why = "neither `serve` nor a file of handlers downloads anything";
    let words = ["Org-8/not-here", why, "hint: `homeroom pull Org-8/not-here` downloads it"];
    let missing = handlers(&place, "Org-8/not-here")?;
    let file = missing.to_str().context("a path")?;
    for arguments in [
        ["serve", "--port", "0", "--model-dir", "Org-8/not-here"].as_slice(),
        &["serve", "--port", "0", "--config", file],
        &["chat", "--prompt", "hi", "--config", file],
    ] {
        let mut command = homeroom();
        refused(nobody.seen_by(hub.seen_by(command.args(arguments)))?, &words)?;
    }
    // Nor does a server once the file names one, or when somebody asks for one.
    let config = handlers(&place, NAME)?;
    let mut serve = homeroom();
    serve.args(["serve", "--config"]).arg(&config);
    let served = Served::new(nobody.seen_by(hub.seen_by(&mut serve))?)?;
    let before = served.answer("tutor")?;
    assert!(served.answer("Org-8/not-here").is_err());
    handlers(&place, "Org-8/not-here")?;
    let story = served.story.until("what was served is served on")?;
    assert!(story.contains("reload   refused") && story.contains(why), "{story}");
    assert_eq!(served.answer("tutor")?, before);
    nobody.was_left_alone()
}
