//! A log of requests: a line of JSON each, with who answered, how long it took and what came of it. It holds nothing of what was said.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use super::Wrapper;
use crate::handler::{
    Completion, Context, EmbedRequest, Embeddings, Event, EventStream, Handler, HandlerError, Request, Start, Usage,
};
use crate::private;
use crate::progress::line;
use crate::registry::when;

/// Writes a line for each request to a route or a handler.
pub struct Logging(Arc<Log>);

struct Log {
    /// The route's or the handler's name.
    name: String,
    path: PathBuf,
    /// It could not be written, and that was said.
    failed: AtomicBool,
}

impl Logging {
    /// Writes to a file, which is made when it is not there, for its owner alone. A file that is moved away is made anew.
    pub fn new(name: impl Into<String>, path: PathBuf) -> Self {
        Self(Arc::new(Log { name: name.into(), path, failed: AtomicBool::new(false) }))
    }
}

/// Opens a file for further lines; makes one for its owner alone if there is none.
fn append(path: &Path) -> io::Result<File> {
    let mut options = private::options();
    options.append(true).create(true);
    options.open(path)
}

impl Log {
    fn write(&self, entry: &Value) {
        // One call, so that lines of requests that end together do not mix.
        let written = append(&self.path).and_then(|mut file| file.write_all(format!("{entry}\n").as_bytes()));
        match written {
            Ok(()) => self.failed.store(false, Ordering::SeqCst),
            Err(error) if !self.failed.swap(true, Ordering::SeqCst) => {
                line(format_args!(
                    "warning: {}: requests to `{}` cannot be logged: {error}",
                    self.path.display(),
                    self.name
                ));
            }
            Err(_) => {}
        }
    }
}

/// A request under way. What is known of it is written when it is dropped.
struct Entry {
    log: Arc<Log>,
    since: Instant,
    time: SystemTime,
    handler: Option<String>,
    model: Option<String>,
    id: Option<String>,
    first: Option<Instant>,
    usage: Usage,
    outcome: String,
}

impl Entry {
    fn new(log: &Arc<Log>) -> Self {
        Self {
            log: log.clone(),
            since: Instant::now(),
            time: SystemTime::now(),
            handler: None,
            model: None,
            id: None,
            first: None,
            usage: Usage::default(),
            // Until it is known to have ended otherwise, its caller has left.
            outcome: "cancelled".to_owned(),
        }
    }

    fn saw(&mut self, item: &Result<Event, HandlerError>) {
        match item {
            Ok(Event::Start(Start { id, model, handler, .. })) => {
                (self.id, self.model, self.handler) = (Some(id.clone()), Some(model.clone()), Some(handler.clone()));
            }
            // Of several choices the last one tells.
            Ok(Event::Finish { reason, .. }) => self.outcome = reason.word().to_owned(),
            Ok(Event::Usage(usage)) => self.usage = *usage,
            Ok(_) => drop(self.first.get_or_insert_with(Instant::now)),
            Err(error) => self.outcome = error.kind.word().to_owned(),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let ms = |at: Instant| at.duration_since(self.since).as_secs_f64() * 1000.0;
        self.log.write(&json!({
            "time": when::text(self.time),
            "route": self.log.name,
            "handler": self.handler,
            "model": self.model,
            "id": self.id,
            "outcome": self.outcome,
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "first_token_ms": self.first.map(|first| ms(first).round()),
            "total_ms": ms(Instant::now()).round(),
        }));
    }
}

impl Wrapper for Logging {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let mut entry = Entry::new(&self.0);
        match inner.stream(request, context) {
            Ok(mut stream) => {
                let mut entry = Some(entry);
                Ok(Box::new(std::iter::from_fn(move || {
                    let item = stream.next();
                    match (&item, &mut entry) {
                        (Some(item), Some(entry)) => entry.saw(item),
                        // At its end and not when it is dropped, which a slow reader puts off.
                        (None, _) => entry = None,
                        _ => {}
                    }
                    item
                })))
            }
            Err(error) => {
                entry.saw(&Err(error.clone()));
                Err(error)
            }
        }
    }

    fn complete(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<Completion, HandlerError> {
        let mut entry = Entry::new(&self.0);
        let whole = inner.complete(request, context);
        match &whole {
            Ok(whole) => {
                entry.saw(&Ok(Event::Start(whole.start.clone())));
                (entry.usage, entry.outcome) = (whole.usage, whole.finish().word().to_owned());
            }
            Err(error) => error.kind.word().clone_into(&mut entry.outcome),
        }
        whole
    }

    fn embed(
        &self,
        inner: &Arc<dyn Handler>,
        request: &EmbedRequest,
        context: &Context,
    ) -> Result<Embeddings, HandlerError> {
        let mut entry = Entry::new(&self.0);
        let vectors = inner.embed(request, context);
        match &vectors {
            Ok(Embeddings { model, handler, prompt_tokens, .. }) => {
                (entry.model, entry.handler) = (Some(model.clone()), Some(handler.clone()));
                entry.usage.prompt_tokens = *prompt_tokens;
                "vectors".clone_into(&mut entry.outcome);
            }
            Err(error) => error.kind.word().clone_into(&mut entry.outcome),
        }
        vectors
    }
}
