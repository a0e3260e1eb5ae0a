//! Records answers, for a handler of kind `replay` to give again: a line of JSON each, with the question and the answer.
//!
//! What is recorded is what was said, word for word: the file is for its owner alone.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
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

/// Whether the last line of a file is whole: what a crash cut short would swallow what comes behind it.
fn ends_in_a_line(path: &Path) -> bool {
    let last = || -> io::Result<u8> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        Ok(last[0])
    };
    // A file without a byte has no last line.
    last().map_or(true, |last| last == b'\n')
}

fn write(path: &Path, recorded: &Recorded) {
    let text = serde_json::to_string(recorded).expect("a record is texts and numbers") + "\n";
    let written = append(path).and_then(|mut file| {
        let text = if ends_in_a_line(path) { text } else { format!("\n{text}") };
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
