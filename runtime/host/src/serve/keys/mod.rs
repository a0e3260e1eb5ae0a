//! Keys: who may use a server that is for more than its own machine.
//!
//! [`file`] is where they are kept, [`limits`] how much may be asked with one, [`days`] what was used today. A server looks at the file at
//! every request, so that a key that is removed is none from then on.

pub mod days;
pub mod file;
pub mod given;
pub mod limits;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::Result;

pub use file::Key;

use crate::progress::line;

/// The keys of a server, as their file has them now.
///
/// A key is wanted once there was one: by the file that it began with, or later. A server that wants one does so until it ends, also if
/// all are removed. If the file cannot be read, nobody is let in.
pub struct Keys {
    path: Option<PathBuf>,
    /// Whoever has it looks at the file.
    look: Mutex<()>,
    /// Nobody who has it waits for the disk.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Of the file that was read last, if one was there; `None` before the first look.
    identity: Option<Option<Identity>>,
    keys: Arc<[Key]>,
    problem: Option<String>,
    wanted: bool,
}

/// What changes when a file is written anew.
type Identity = (u64, SystemTime, [i64; 4]);

/// Whether a key is wanted, and which there are.
pub struct Wanted {
    keys: Arc<[Key]>,
}

impl Wanted {
    /// Finds the key that a text is.
    pub fn find(&self, text: &str) -> Option<&Key> {
        file::find(&self.keys, text)
    }
}

impl Keys {
    /// No keys, and none is wanted.
    pub fn none() -> Self {
        Self { path: None, look: Mutex::default(), state: Mutex::default() }
    }

    /// The keys of a file, which need not be there.
    pub fn at(path: PathBuf) -> Self {
        Self { path: Some(path), look: Mutex::default(), state: Mutex::default() }
    }

    /// The keys of the data directory.
    pub fn of_home() -> Self {
        file::place().map_or_else(|_| Self::none(), Self::at)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether a key was wanted when the file was last looked at, without a look.
    pub fn was_wanted(&self) -> bool {
        self.state().wanted
    }

    /// Returns the keys if one is wanted. It waits for the disk.
    ///
    /// # Errors
    /// When the file cannot be read. What is wrong is told on stderr once and not to clients.
    pub fn wanted(&self) -> Result<Option<Wanted>> {
        let Some(path) = &self.path else { return Ok(None) };
        let _look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = Some(std::fs::metadata(path).ok().as_ref().map(identity));
        let is_known = {
            let state = self.state();
            identity == state.identity && state.problem.is_none()
        };
        if !is_known {
            match file::read(path) {
                Ok(keys) => {
                    let mut state = self.state();
                    state.wanted |= !keys.is_empty();
                    (state.identity, state.keys, state.problem) = (identity, keys.into(), None);
                }
                Err(error) => {
                    let problem = format!("{error:#}");
                    let is_told = self.state().problem.as_ref() == Some(&problem);
                    if !is_told {
                        line(format_args!("error: {problem}\n         nobody is let in until it is put right"));
                    }
                    let mut state = self.state();
                    (state.identity, state.keys, state.wanted) = (identity, Arc::new([]), true);
                    state.problem = Some(problem);
                }
            }
        }
        let state = self.state();
        if state.problem.is_some() {
            anyhow::bail!("the keys cannot be read; whoever runs this server finds why in its messages");
        }
        Ok(state.wanted.then(|| Wanted { keys: state.keys.clone() }))
    }
}

fn identity(about: &std::fs::Metadata) -> Identity {
    #[cfg(unix)]
    let more = {
        use std::os::unix::fs::MetadataExt;
        [about.ino().cast_signed(), about.ctime(), about.ctime_nsec(), i64::from(about.mode())]
    };
    #[cfg(not(unix))]
    let more = [0; 4];
    (about.len(), about.modified().unwrap_or(SystemTime::UNIX_EPOCH), more)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &std::path::Path, keys: &[&Key]) -> Result<()> {
        let text = serde_json::json!({ "keys": keys }).to_string();
        homeroom_engine::files::replace_file(path, text.as_bytes())
    }

    #[test]
    fn a_key_counts_from_when_it_is_there_to_when_it_is_not() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("keys.json");
        let keys = Keys::at(path.clone());
        assert!(keys.wanted()?.is_none(), "there is no file");
        write(&path, &[])?;
        assert!(keys.wanted()?.is_none(), "there is no key");
        let ((a, a_text), (b, b_text)) = (Key::make("a")?, Key::make("b")?);
        write(&path, &[&a, &b])?;
        let now = keys.wanted()?.expect("a key is wanted");
        assert!(now.find(&a_text).is_some() && now.find(&b_text).is_some() && now.find("x").is_none());
        write(&path, &[&b])?;
        let now = keys.wanted()?.expect("a key is wanted");
        assert!(now.find(&a_text).is_none() && now.find(&b_text).is_some());
        std::fs::write(&path, "{")?;
        assert!(keys.wanted().is_err());
        std::fs::remove_file(&path)?;
        assert!(keys.wanted()?.expect("a key is wanted still").find(&b_text).is_none());
        assert!(Keys::at(path).wanted()?.is_none(), "a server that begins now has none");
        Ok(())
    }
}
