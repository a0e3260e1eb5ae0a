//! Records answers, for a handler of kind `replay` to give again: a line of JSON each, with the question and the answer.
//!
//! What is recorded is what was said, word for word: the file is for its owner alone.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Wrapper;
use super::log::append;
use crate::handler::replay::{BYTES_MAX, Recorded};
use crate::handler::{Context, Event, EventStream, Handler, HandlerError, Request, collect};
use crate::progress::line;

/// Writes each whole answer to a file. Answers that break off are not recorded.
pub struct Recording(PathBuf);

impl Recording {
    /// Writes to a file, which is made when it is not there.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }
}

impl Wrapper for Recording {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let mut stream = inner.stream(request, context)?;
        let (path, request, mut seen) = (self.0.clone(), request.clone(), Vec::new());
        Ok(Box::new(std::iter::from_fn(move || {
            let item = stream.next();
            if let Some(Ok(event)) = &item {
                seen.push(event.clone());
                if matches!(event, Event::Usage(_)) {
                    let events = std::mem::take(&mut seen).into_iter().map(Ok);
                    if let Ok(whole) = collect(Box::new(events)) {
                        write(&path, &Recorded::of(&request, whole));
                    }
                }
            }
            item
        })))
    }
}

fn write(path: &Path, recorded: &Recorded) {
    let text = serde_json::to_string(recorded).expect("a record is texts and numbers") + "\n";
    let written = append(path).and_then(|mut file| {
        // More than `replay` reads is of no use.
        if file.metadata()?.len() + text.len() as u64 > BYTES_MAX {
            return Err(io::Error::other(format!("the file has {} MiB; move it away", BYTES_MAX >> 20)));
        }
        file.write_all(text.as_bytes())
    });
    if let Err(error) = written {
        line(format_args!("warning: {}: an answer was not recorded: {error}", path.display()));
    }
}
