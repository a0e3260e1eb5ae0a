//! `events.jsonl`: one JSON object a line, in the order in which things happened.
//!
//! A line is written in one piece behind the others. Of a process that was killed the last line may be torn: it is dropped by who reads,
//! and cut off by who goes on. After a resume, lines of the steps behind the checkpoint come again, and the last one of a step counts.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::private;
use crate::progress::line;
use crate::registry::when;

/// Name of the file in a run's directory.
pub const FILE: &str = "events.jsonl";
/// Longest line that is read, in bytes; a sample is far shorter.
const LINE_BYTES_MAX: u64 = 8 << 20;

/// Writes events.
pub struct Events(Mutex<Writer>);

struct Writer {
    file: File,
    path: PathBuf,
    /// Bytes of whole lines.
    whole: u64,
    /// Whether it was said that a line could not be written.
    told: bool,
}

impl Events {
    /// Opens the file of a run, for its owner alone, and cuts off a torn last line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        let place = || format!("{}: cannot write", path.display());
        let mut options = private::options();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).with_context(place)?;
        let whole = whole_lines(&mut file).with_context(place)?;
        file.set_len(whole).with_context(place)?;
        file.seek(SeekFrom::Start(whole)).with_context(place)?;
        Ok(Self(Mutex::new(Writer { file, path, whole, told: false })))
    }

    /// Writes an event with the time. A disk that is full ends no training: it is said once, and the line is left out.
    pub fn write(&self, event: &Value) {
        let mut timed = Map::from_iter([("time".to_owned(), when::text(SystemTime::now()).into())]);
        timed.extend(event.as_object().cloned().unwrap_or_default());
        let text = format!("{}\n", Value::Object(timed));
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match writer.file.write_all(text.as_bytes()) {
            Ok(()) => writer.whole += text.len() as u64,
            Err(error) => {
                let whole = writer.whole;
                let _ = writer.file.set_len(whole).and_then(|()| writer.file.seek(SeekFrom::Start(whole)));
                if !std::mem::replace(&mut writer.told, true) {
                    line(format_args!(
                        "warning: {}: cannot write ({error}); the run goes on, and its record has gaps",
                        writer.path.display()
                    ));
                }
            }
        }
    }

    /// Waits until what was written is on the disk.
    pub fn sync(&self) {
        // What does not get there is in the result all the same.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).file.sync_data();
    }
}

/// Bytes up to the last end of a line.
fn whole_lines(file: &mut File) -> std::io::Result<u64> {
    const PIECE: u64 = 64 << 10;
    let mut end = file.metadata()?.len();
    let mut piece = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(PIECE);
        file.seek(SeekFrom::Start(start))?;
        piece.clear();
        file.take(end - start).read_to_end(&mut piece)?;
        if let Some(at) = piece.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// The events of a run in order. Lines that are no JSON objects, as a torn one is, are left out.
pub fn events(directory: &Path) -> Vec<Value> {
    let Ok(file) = File::open(directory.join(FILE)) else { return Vec::new() };
    if !file.metadata().is_ok_and(|about| about.is_file()) {
        return Vec::new();
    }
    let mut reader = BufReader::new(file);
    let (mut found, mut text) = (Vec::new(), Vec::new());
    loop {
        text.clear();
        match reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut text) {
            Ok(0) | Err(_) => return found,
            Ok(_) => found.extend(serde_json::from_slice::<Value>(&text).ok().filter(Value::is_object)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn steps(directory: &Path) -> Vec<u64> {
        events(directory).iter().filter_map(|event| event["step"].as_u64()).collect()
    }

    #[test]
    fn a_line_that_a_kill_tore_is_dropped_and_the_next_one_is_whole() -> Result<()> {
        let place = tempfile::tempdir()?;
        let log = Events::open(place.path())?;
        (1..=3).for_each(|step| log.write(&json!({"event": "step", "step": step, "text": "ü\n"})));
        drop(log);
        let path = place.path().join(FILE);
        let whole = std::fs::read(&path)?;
        // Wherever the last line was torn, also within a letter.
        let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').context("three lines")? + 1;
        for cut in last..whole.len() {
            std::fs::write(&path, &whole[..cut])?;
            let read = steps(place.path());
            // A line that lacks only its end is read, and written again by who goes on.
            assert!(read == [1, 2] || cut + 1 == whole.len() && read == [1, 2, 3], "{cut}: {read:?}");
            Events::open(place.path())?.write(&json!({"event": "step", "step": 9}));
            assert_eq!(steps(place.path()), [1, 2, 9], "{cut}");
        }
        Ok(())
    }

    #[test]
    fn a_long_torn_line_and_an_empty_file_are_no_events() -> Result<()> {
        let place = tempfile::tempdir()?;
        let path = place.path().join(FILE);
        for (bytes, count) in
            [(Vec::new(), 0), (vec![b'x'; 200_000], 0), ([b"{\"a\":1}\n", &[b'x'; 200_000][..]].concat(), 1)]
        {
            std::fs::write(&path, bytes)?;
            assert_eq!(events(place.path()).len(), count);
            drop(Events::open(place.path())?);
            assert_eq!(std::fs::metadata(&path)?.len(), 8 * count as u64);
        }
        assert!(events(&place.path().join("nothing")).is_empty());
        Ok(())
    }
}
