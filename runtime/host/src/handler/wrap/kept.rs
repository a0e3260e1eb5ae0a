//! A small text file that is kept in memory, and read anew once it has changed: a system prompt or a list of words that somebody edits
//! while a server runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use homeroom_engine::files::read_text;

use crate::progress::line;

/// Longest file, in bytes.
const BYTES_MAX: u64 = 1 << 20;

/// What a file says, as `T`.
pub struct Kept<T> {
    path: PathBuf,
    parse: fn(&str) -> Result<T>,
    now: Mutex<(Option<Stamp>, Arc<T>)>,
}

/// What tells whether a file is another one: its length and time.
type Stamp = (u64, Option<SystemTime>);

impl<T> Kept<T> {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, or does not say what it should.
    pub fn read(path: &Path, parse: fn(&str) -> Result<T>) -> Result<Self> {
        // Before it is read: an edit in between is a change.
        let stamp = stamp(path);
        let value = load(path, parse)?;
        Ok(Self { path: path.to_owned(), parse, now: Mutex::new((stamp, Arc::new(value))) })
    }

    /// What it says now; if it can no longer be read, which is said once, what it said before.
    pub fn now(&self) -> Arc<T> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = stamp(&self.path);
        if stamp != now.0 {
            now.0 = stamp;
            match load(&self.path, self.parse) {
                Ok(value) => {
                    now.1 = Arc::new(value);
                    line(format_args!("note: {} has changed, and is obeyed from now on", self.path.display()));
                }
                Err(error) => line(format_args!("warning: {error:#}; what it said before is obeyed on")),
            }
        }
        now.1.clone()
    }
}

fn load<T>(path: &Path, parse: fn(&str) -> Result<T>) -> Result<T> {
    let text = read_text(path, BYTES_MAX)?;
    // Some editors put a byte order mark before the first line, which is none of its words.
    parse(text.trim_start_matches('\u{feff}')).with_context(|| path.display().to_string())
}

fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|about| (about.len(), about.modified().ok()))
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;

    #[test]
    fn an_edit_is_read_and_a_bad_one_is_not_obeyed() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("a.txt");
        let parse = |text: &str| {
            ensure!(text != "bad", "it is bad");
            Ok(text.to_owned())
        };
        assert!(Kept::read(&path, parse).is_err());
        fs::write(&path, "one")?;
        let kept = Kept::read(&path, parse)?;
        assert_eq!(*kept.now(), "one");
        fs::write(&path, "three")?;
        assert_eq!(*kept.now(), "three");
        fs::write(&path, "bad")?;
        assert_eq!(*kept.now(), "three");
        fs::remove_file(&path)?;
        assert_eq!(*kept.now(), "three");
        fs::write(&path, "\u{feff}fourth")?;
        assert_eq!(*kept.now(), "fourth");
        Ok(())
    }
}
