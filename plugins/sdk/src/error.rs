//! An error that knows the line of the strategy's source where it arose.

use std::panic::Location;

use homeroom_abi::describe::{PluginError, Source};

/// What a strategy's methods return.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, in words, with its place. Made from a text: `Err("...".into())`, or by `?`.
#[derive(Debug, Clone)]
pub struct Error(pub PluginError);

impl Error {
    /// An error at the caller's line.
    #[track_caller]
    pub fn new(message: impl Into<String>) -> Self {
        Self(PluginError { message: message.into(), at: Some(here(Location::caller())) })
    }
}

pub(crate) fn here(at: &Location<'_>) -> Source {
    Source { file: at.file().to_owned(), line: at.line() }
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
