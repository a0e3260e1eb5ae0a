//! An error that knows the line of the strategy's source where it arose.

use std::panic::Location;

use homeroom_abi::describe::{PluginError, Source};

/// What a strategy's methods return.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, in words, with its place. Made from a text: `Err("...".into())`, or by `?`.
#[derive(Debug, Clone)]
pub struct Error(pub PluginError);

impl Error {
    /// An error at the caller's line, if that is the author's: a line of this crate would help nobody, as when a user's option is out
    /// of range.
    #[track_caller]
    pub fn new(message: impl Into<String>) -> Self {
        let at = Some(here(Location::caller())).filter(|at| !is_of_sdk(&at.file));
        Self(PluginError { message: message.into(), at })
    }
}

pub(crate) fn here(at: &Location<'_>) -> Source {
    Source { file: at.file().to_owned(), line: at.line() }
}

/// Whether a source file, as the compiler saw it, is one of this crate.
fn is_of_sdk(file: &str) -> bool {
    file!().strip_suffix("error.rs").is_some_and(|directory| file.starts_with(directory))
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0.at {
            Some(at) => write!(f, "{at}: {}", self.0.message),
            None => f.write_str(&self.0.message),
        }
    }
}

impl std::error::Error for Error {}

impl From<String> for Error {
    #[track_caller]
    fn from(message: String) -> Self {
        Self::new(message)
    }
}

impl From<&str> for Error {
    #[track_caller]
    fn from(message: &str) -> Self {
        Self::new(message)
    }
}
