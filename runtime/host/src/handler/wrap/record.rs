//! Records answers, for a handler of kind `replay` to give again: a line of JSON each, with the question and the answer.
//!
//! What is recorded is what was said, word for word: the file is for its owner alone.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Wrapper;
use crate::handler::replay::{BYTES_MAX, Recorded, cut_line};
use crate::handler::{Context, Event, EventStream, Handler, HandlerError, Request, collect};
use crate::private;
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
    if let Err(error) = add(path, text) {
        line(format_args!("warning: {}: an answer was not recorded: {error}", path.display()));
    }
}

/// Adds a line to a file.
fn add(path: &Path, text: String) -> io::Result<()> {
    let mut file = private::options().read(true).write(true).create(true).truncate(false).open(path)?;
    // A line that another is writing would look cut short. Some file systems have no locks.
    let _ = file.lock();
    // More than `replay` reads is of no use.
    if file.metadata()?.len() + text.len() as u64 >= BYTES_MAX {
        return Err(io::Error::other(format!("the file has {} MiB; move it away", BYTES_MAX >> 20)));
    }
    let text = if ends_in_a_line(&mut file, path)? { text } else { format!("\n{text}") };
    file.seek(SeekFrom::End(0))?;
    file.write_all(text.as_bytes())
}

/// Returns true if the last line of a file has its end. One that a crash cut short is dropped first: `replay` would refuse it anywhere but
/// at the end.
fn ends_in_a_line(file: &mut File, path: &Path) -> io::Result<bool> {
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    if last == [b'\n'] {
        return Ok(true);
    }
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    let Some(begins) = cut_line(&bytes) else { return Ok(false) };
    line(format_args!("warning: {}: its last line was cut short, and is removed", path.display()));
    file.set_len(begins as u64)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_that_was_cut_short_is_gone_before_the_next_comes() -> Result<()> {
        let place = tempfile::tempdir()?;
        let path = place.path().join("a.jsonl");
        let record = |user: &str| -> Result<()> {
            write(&path, &serde_json::from_value(json!({"user": user, "answer": "é🦊", "completion_tokens": 2}))?);
            Ok(())
        };
        record("one")?;
        record("zwölf")?;
        let whole = std::fs::read(&path)?;
        let ends: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] == b'\n').collect();
        assert_eq!(ends.len(), 2);
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut])?;
            record("last")?;
            let text = std::fs::read_to_string(&path)?;
            let lines = text.lines().map(serde_json::from_str::<Recorded>);
            let lines: Vec<Recorded> = lines.collect::<Result<_, _>>()?;
            let users: Vec<&str> = lines.iter().map(|line| line.user.as_str()).collect();
            let kept = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(users, [&["one", "zwölf"][..kept], &["last"]].concat(), "cut at {cut}");
        }
        // What no crash leaves is not removed.
        std::fs::write(&path, "to do")?;
        record("last")?;
        assert!(std::fs::read_to_string(&path)?.starts_with("to do\n{"));
        Ok(())
    }
}
