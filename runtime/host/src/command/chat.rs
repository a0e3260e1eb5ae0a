//! `homeroom chat`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::json;

mod lines;

use self::lines::{HISTORY_FILE, Lines, Next};
use super::arguments::{AnswerArgs, COUNT_MAX, ModelArgs, not_negative, signed, whole};
use super::{Done, handlers_of_home};
use crate::handler::config::{Config, Handlers};
use crate::handler::local::Local;
use crate::handler::{Context, Event, FinishReason, Handler, HandlerError, Kind, Message, Request, Role, checked};
use crate::interrupt;
use crate::models::{Answerer, Network};
use crate::near::exists;
use crate::private;
use crate::registry::data_directory;
use crate::stdout::Stdout;
use crate::terminal::Stream;

/// Arguments of `chat`.
#[derive(Args)]
#[command(
    override_usage = "homeroom chat --model-dir <MODEL> [OPTIONS]\n       homeroom chat [--config <FILE>] [--handler <NAME>] [OPTIONS]"
)]
pub struct Arguments {
    #[command(flatten)]
    model: Option<ModelArgs>,
    /// Handler or route to talk to [default: the file's only one]
    #[arg(long, value_name = "NAME", conflicts_with = "model_dir")]
    handler: Option<String>,
    /// TOML file of handlers and routes, as in configs/handlers.toml [default: handlers.toml in $HOMEROOM_HOME]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say this and print the reply; without it each line of stdin is said, and `/help` lists the commands
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Text of the system message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Most tokens of a reply
    #[arg(long, default_value = "256", value_name = "TOKENS", value_parser = whole::<usize>(1..=COUNT_MAX))]
    max_tokens: usize,
    /// Temperature: 0 takes the likeliest token each time, higher varies more [default: the handler's; 0.7 and top-p 0.9 with --model-dir]
    #[arg(long, value_name = "T", value_parser = not_negative)]
    temperature: Option<f64>,
    /// Seed of the sampling, a whole number of either sign [default: the handler's, 42 with --model-dir]
    #[arg(long, value_name = "N", value_parser = signed)]
    seed: Option<i64>,
    /// On a terminal, keep nothing of what is typed for the next time
    #[arg(long)]
    no_history: bool,
    #[command(flatten)]
    answers: AnswerArgs,
}

const HELP: &str = "\
/handler NAME   continue with another handler or route
/system TEXT    set the system message; without TEXT remove it
/save FILE      write the conversation behind the rows of a JSONL file, as a row to learn from
/clear          forget the conversation
/exit           end, as Ctrl-D does
Ctrl-C stops an answer. Any other line is said to the model.";

/// Answers one prompt, or talks until stdin ends.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let handlers = handlers(arguments)?;
    let (name, handler): (String, Arc<dyn Handler>) = match (&arguments.model, &handlers) {
        (Some(model), _) => {
            let name = model.model_dir.display().to_string();
            (
                name.clone(),
                Arc::new(Local::new(
                    name,
                    Answerer::load(&model.reference(), Network::Allowed, arguments.answers.compute)?,
                )),
            )
        }
        (None, Some(handlers)) => {
            let name = match &arguments.handler {
                Some(name) => name,
                None => only(handlers)?,
            };
            if let Some(host) = handlers.far_host(name) {
                eprintln!("note: `{name}` is not on this machine: what is said here goes to {host}");
            }
            (name.to_owned(), handlers.get(name)?)
        }
        (None, None) => bail!(
            "nobody to talk to: name a model with --model-dir, or a handler with --config FILE --handler NAME\nhint: `homeroom list-models` shows your models; a handlers.toml in $HOMEROOM_HOME needs no --config"
        ),
    };
    let mut session = Session {
        name,
        handler,
        handlers,
        system: arguments.system.clone(),
        history: Vec::new(),
        max_tokens: arguments.max_tokens,
        temperature: arguments.temperature,
        seed: arguments.seed.or(arguments.model.is_some().then_some(42)),
    };
    match &arguments.prompt {
        Some(prompt) => session.say(prompt).map(|()| Done::Whole),
        None => session.talk(arguments.no_history),
    }
}

/// The file of handlers that was named, or that of the data directory where no model was named.
fn handlers(arguments: &Arguments) -> Result<Option<Handlers>> {
    let path = match &arguments.config {
        Some(path) => path.clone(),
        None if arguments.model.is_some() => return Ok(None),
        None => {
            let Some(path) = handlers_of_home() else { return Ok(None) };
            eprintln!("handlers  {}", path.display());
            path
        }
    };
    exists(&path)?;
    Config::read(&path).map(|config| Some(Handlers::new(config)))
}

/// The only route of a file, or its only handler if it has no route. One that sends conversations away has to be named.
fn only(handlers: &Handlers) -> Result<&String> {
    let config = handlers.config();
    let (routes, others): (Vec<&String>, Vec<&String>) =
        (config.routes.keys().collect(), config.handlers.keys().collect());
    match (routes.as_slice(), others.as_slice()) {
        ([name], _) => Ok(name),
        ([], [name]) => match handlers.far_host(name) {
            None => Ok(name),
            Some(host) => bail!(
                "{}: `{name}` sends conversations to {host}, and no route allows that\nhint: name it with --handler {name}, or add [routes.NAME] with handlers = [\"{name}\"] and egress = \"allow\"",
                config.path.display()
            ),
        },
        ([], []) => bail!("{}: it has no handler", config.path.display()),
        _ => {
            let names: Vec<&str> = routes.into_iter().chain(others).map(String::as_str).collect();
            bail!("{}: name one of its handlers with --handler: {}", config.path.display(), names.join(", "))
        }
    }
}

/// Where Ctrl-C finds a conversation.
static STATE: AtomicU8 = AtomicU8::new(LISTENING);
/// Waiting for the user.
const LISTENING: u8 = 0;
/// Ctrl-C was pressed while waiting; once more ends the program.
const WARNED: u8 = 1;
/// The model speaks.
const ANSWERING: u8 = 2;
/// Ctrl-C was pressed while it spoke.
const STOPPING: u8 = 3;

fn pressed() {
    match STATE.load(Ordering::SeqCst) {
        LISTENING => {
            STATE.store(WARNED, Ordering::SeqCst);
            eprintln!("\npress Ctrl-C again to end, or type /exit");
        }
        ANSWERING => STATE.store(STOPPING, Ordering::SeqCst),
        // Twice: whoever presses that often wants out.
        _ => std::process::exit(i32::from(interrupt::EXIT_CODE)),
    }
}

/// A conversation.
struct Session {
    name: String,
    handler: Arc<dyn Handler>,
    handlers: Option<Handlers>,
    system: Option<String>,
    history: Vec<Message>,
    max_tokens: usize,
    temperature: Option<f64>,
    seed: Option<i64>,
}

impl Session {
    /// Takes lines of stdin until it ends.
    fn talk(&mut self, no_history: bool) -> Result<Done> {
        interrupt::on_press(pressed)?;
        let names = self.handlers.iter().flat_map(|handlers| handlers.names()).map(str::to_owned).collect();
        let history = data_directory().filter(|_| !no_history).map(|data| data.join(HISTORY_FILE));
        let mut lines = Lines::of_stdin(history, names);
        let terminal = lines.are_typed();
        if terminal {
            eprintln!("{}   /help lists the commands", self.name);
        }
        loop {
            let line = match lines.next()? {
                Next::Line(line) => line,
                Next::Interrupted => {
                    pressed();
                    continue;
                }
                Next::End => {
                    if terminal {
                        eprintln!();
                    }
                    return Ok(Done::Whole);
                }
            };
            let line = line.trim();
            STATE.store(LISTENING, Ordering::SeqCst);
            let done = match line.strip_prefix('/') {
                _ if line.is_empty() => Ok(()),
                Some("exit" | "quit") => return Ok(Done::Whole),
                Some(command) => self.obey(command),
                None => self.say(line),
            };
            if let Err(error) = done {
                // A person can say something else; a script has gone wrong.
                if !terminal {
                    return Err(error);
                }
                eprintln!("error: {error:#}");
            }
        }
    }

    fn obey(&mut self, command: &str) -> Result<()> {
        let (command, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match command {
            "help" => eprintln!("{HELP}"),
            "clear" => self.history.clear(),
            "save" => self.save(rest)?,
            "system" => self.system = Some(rest.to_owned()).filter(|text| !text.is_empty()),
            "handler" => {
                let handlers =
                    self.handlers.as_ref().context("there are no other handlers: start with --config FILE")?;
                if rest.is_empty() {
                    bail!("/handler NAME: there are {}", handlers.names().join(", "));
                }
                self.handler = handlers.get(rest)?;
                rest.clone_into(&mut self.name);
                match handlers.far_host(rest) {
                    None => eprintln!("{rest} answers from now on"),
                    Some(host) => eprintln!(
                        "{rest} answers from now on; it is not on this machine: what is said, with the conversation so far, goes to {host}"
                    ),
                }
            }
            other => bail!("/{other}: unknown; /help lists the commands"),
        }
        Ok(())
    }

    /// Writes the conversation as a row behind those of a file, for the user alone.
    fn save(&self, file: &str) -> Result<()> {
        ensure!(!file.is_empty(), "/save FILE: name a file, such as rows.jsonl");
        ensure!(!self.history.is_empty(), "nothing was said yet");
        let system = self.system.iter().map(|text| Message::new(Role::System, text));
        let messages: Vec<_> = system.chain(self.history.iter().cloned()).map(|message| message.json()).collect();
        let mut options = private::options();
        options.append(true).create(true);
        let row = format!("{}\n", json!({"messages": messages}));
        let written = options.open(file).and_then(|mut file| file.write_all(row.as_bytes()));
        written.with_context(|| format!("{file}: cannot write"))?;
        eprintln!("saved {file}: a row of {} messages", messages.len());
        Ok(())
    }

    /// Says something and writes the answer to stdout as it comes. What the model did not answer to is not kept.
    fn say(&mut self, text: &str) -> Result<()> {
        let system = self.system.iter().map(|text| Message::new(Role::System, text));
        let user = Message::new(Role::User, text);
        let messages: Vec<Message> = system.chain(self.history.iter().cloned()).chain([user.clone()]).collect();
        let request = Request {
            messages,
            max_tokens: Some(self.max_tokens),
            temperature: self.temperature,
            seed: self.seed,
            ..Request::default()
        };
        STATE.store(ANSWERING, Ordering::SeqCst);
        let answer = answer(self.handler.clone(), request);
        STATE.store(LISTENING, Ordering::SeqCst);
        let Answer { text, ended } = answer?;
        match ended {
            Ok(FinishReason::Length) => {
                eprintln!(
                    "note: the reply was cut at {} tokens or the end of the context; --max-tokens allows more",
                    self.max_tokens
                );
            }
            Ok(FinishReason::Stop) => {}
            Ok(other) => eprintln!("note: the provider ended the reply: {}", other.word()),
            Err(error) if error.kind == Kind::Cancelled => eprintln!("stopped"),
            Err(error) if error.kind == Kind::ContextLength && !self.history.is_empty() => {
                bail!("{error}; /clear forgets what was said")
            }
            Err(error) => return Err(error.into()),
        }
        self.history.extend([user, Message::new(Role::Assistant, text)]);
        Ok(())
    }
}

/// What came of a request: the text, and how it ended.
struct Answer {
    text: String,
    ended: Result<FinishReason, HandlerError>,
}

/// Streams an answer to stdout, with a line's end behind it.
fn answer(handler: Arc<dyn Handler>, request: Request) -> Result<Answer> {
    let context = Context::default();
    // In a thread of its own, so that Ctrl-C is obeyed while a provider is silent.
    let (sender, events) = sync_channel(64);
    let theirs = context.clone();
    std::thread::spawn(move || {
        let stream = match handler.stream(&request, &theirs) {
            Ok(stream) => checked(stream),
            Err(error) => Box::new(std::iter::once(Err(error))),
        };
        for event in stream {
            if sender.send(event).is_err() {
                break;
            }
        }
    });
    let mut out = Output { stdout: Stdout, terminal: Stdout.is_terminal().then(Stream::default), open: true };
    let mut text = String::new();
    let mut ended = Err(HandlerError::new(Kind::Internal, "the handler ended without an answer"));
    loop {
        if STATE.load(Ordering::SeqCst) == STOPPING {
            context.cancel();
            ended = Err(HandlerError::new(Kind::Cancelled, "stopped"));
            break;
        }
        match events.recv_timeout(Duration::from_millis(50)) {
            Ok(Ok(Event::Delta { text: piece, .. })) => {
                out.write(&piece)?;
                text.push_str(&piece);
            }
            Ok(Ok(Event::Finish { reason, .. })) => ended = Ok(reason),
            Ok(Ok(Event::Start(_) | Event::Reasoning { .. } | Event::ToolCall { .. } | Event::Usage(_)))
            | Err(RecvTimeoutError::Timeout) => {}
            Ok(Err(error)) => {
                ended = Err(error);
                break;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if ended.is_ok() || !text.is_empty() {
        out.end()?;
    }
    Ok(Answer { text, ended })
}

/// stdout. A reader that has gone away is no failure of ours.
struct Output {
    stdout: Stdout,
    /// On a terminal, what it would obey is shown: a model may say anything.
    terminal: Option<Stream>,
    open: bool,
}

impl Output {
    fn write(&mut self, text: &str) -> Result<()> {
        match &mut self.terminal {
            Some(stream) => {
                let text = stream.shown(text);
                self.send(&text)
            }
            None => self.send(text),
        }
    }

    /// The end of an answer and its line.
    fn end(&mut self) -> Result<()> {
        let waiting = self.terminal.as_mut().map(Stream::end).unwrap_or_default();
        self.send(&(waiting + "\n"))
    }

    fn send(&mut self, text: &str) -> Result<()> {
        if !self.open {
            return Ok(());
        }
        match self.stdout.write_all(text.as_bytes()).and_then(|()| self.stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.open = false,
            other => other.context("cannot write the reply")?,
        }
        Ok(())
    }
}
