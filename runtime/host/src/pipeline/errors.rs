//! Failures of what a script calls, and how they are told: at the script's line, and in a bounded number of words.

use std::cell::Cell;
use std::fmt::Display;

use anyhow::anyhow;
use homeroom_abi::describe;
use mlua::{Function, Lua};

use super::clock::Ended;
use super::limits::bytes;

/// Name of the chunk in `prelude.luau`, whose frames are nobody's.
pub const PRELUDE: &str = "[homeroom]";
/// Longest message, in bytes. A script can raise any text and name anything.
const MESSAGE_BYTES_MAX: usize = 8 << 10;
/// Longest name that messages repeat, in characters, and that is compared with the names that are known.
const NAME_CHARS_MAX: usize = 64;

thread_local! {
    /// Memory that values of this thread's machine may take, for the message that says so.
    static MEMORY_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Says how much memory the machine of this thread may take.
pub fn set_memory_bytes(most: usize) {
    MEMORY_BYTES.set(most);
}

/// Why a call fails.
#[derive(Debug)]
pub enum Failure {
    /// The script's own error, or one that has its place in the script.
    Lua(mlua::Error),
    /// An error that gets the place of the call.
    Said(anyhow::Error),
}

impl From<mlua::Error> for Failure {
    fn from(error: mlua::Error) -> Self {
        Self::Lua(error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Said(error)
    }
}

impl From<Ended> for Failure {
    fn from(ended: Ended) -> Self {
        Self::Said(ended.into())
    }
}

impl Failure {
    /// What it says, in one line.
    pub fn brief(&self) -> String {
        let text = match self {
            Self::Lua(error) => message(error),
            Self::Said(error) => format!("{error:#}"),
        };
        text.lines().next().unwrap_or_default().to_owned()
    }

    /// The same with words before it.
    pub fn within(self, words: &str) -> Self {
        match self {
            Self::Said(error) if !error.is::<Ended>() => Self::Said(error.context(words.to_owned())),
            other => other,
        }
    }

    /// As the message that a script gets.
    pub fn told(self, lua: &Lua) -> String {
        match self {
            Self::Lua(error) => message(&error),
            Self::Said(error) => cut(format!("{}{error:#}", here(lua))),
        }
    }

    /// As an error of the command that ran the script.
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Lua(error) => anyhow!(message(&error)),
            Self::Said(error) => error,
        }
    }
}

/// A failure that gets the place of the call.
pub fn said(text: impl Into<String>) -> Failure {
    Failure::Said(anyhow!(text.into()))
}

/// A failure with the place of the script's function that is at fault.
pub fn raised(function: &Function, text: impl Display) -> Failure {
    let info = function.info();
    let place = match (info.short_src, info.line_defined) {
        (Some(source), Some(line)) => format!("{source}:{line}: "),
        _ => String::new(),
    };
    Failure::Lua(mlua::Error::runtime(format!("{place}{text}")))
}

/// `scripts/x.lua:12: `, the script's line that is being run; nothing if there is none.
pub fn here(lua: &Lua) -> String {
    let line = |level| {
        lua.inspect_stack(level, |frame| {
            let (line, source) = (frame.current_line()?, frame.source());
            // The binding and the prelude have chunks of their own, which are no files.
            let is_script = source.source.is_some_and(|name| name.starts_with('@'));
            is_script.then(|| Some(format!("{}:{line}: ", source.short_src?)))?
        })
    };
    (0..32).map_while(line).flatten().next().unwrap_or_default()
}

/// What an error says, without how it came to be.
pub fn message(error: &mlua::Error) -> String {
    parts(error).0
}

/// What an error says, and its stack.
pub fn parts(error: &mlua::Error) -> (String, String) {
    let text = match error {
        mlua::Error::CallbackError { traceback, cause } => {
            let (text, deeper) = parts(cause);
            let trace = if deeper.is_empty() { traceback.clone() } else { deeper };
            return (text, trace);
        }
        mlua::Error::RuntimeError(text) => text,
        mlua::Error::SyntaxError { message, .. } => message,
        // The machine says where it was, if it has the memory for that.
        mlua::Error::MemoryError(text) => {
            let trace = text.split_once("\nstack traceback:\n").map_or("", |(_, trace)| trace);
            return (out_of_memory(), cut(trace.to_owned()));
        }
        other => &other.to_string(),
    };
    // What the script raised may hold these words too; the machine's stand behind it.
    let (text, trace) = text.rsplit_once("\nstack traceback:\n").unwrap_or((text, ""));
    // An error of a library function that the prelude called has its place.
    let text = if is_internal(text) { text.split_once(": ").map_or(text, |(_, text)| text) } else { text };
    (cut(text.to_owned()), cut(trace.to_owned()))
}

/// Whether a message or a line of a stack begins with the name of a chunk that is no script: the prelude or the binding's own.
pub fn is_internal(text: &str) -> bool {
    text.starts_with(PRELUDE) || text.starts_with("__mlua_")
}

/// Says that the script's values are too large.
pub fn out_of_memory() -> String {
    format!("the script's values take more than {} of memory", bytes(MEMORY_BYTES.get()))
}

/// A message in bounds, its end left out if it is longer.
fn cut(mut text: String) -> String {
    if text.len() > MESSAGE_BYTES_MAX {
        let whole = text.len();
        let end = (0..=MESSAGE_BYTES_MAX).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
        text.push_str(&format!("… ({} in all)", bytes(whole)));
        text.shrink_to_fit();
    }
    text
}

/// A name as messages repeat it.
pub fn short(name: &str) -> String {
    match name.char_indices().nth(NAME_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

/// The known name that is nearest to a text, if the text is short enough to be a name. To a single letter, all are.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let is_name = name.len() <= 4 * NAME_CHARS_MAX && name.chars().nth(1).is_some();
    if is_name { describe::nearest(name, known) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_names_are_bounded() {
        let long = "ä".repeat(1 << 20);
        let message = message(&mlua::Error::runtime(&long));
        assert!(message.len() < MESSAGE_BYTES_MAX + 32 && message.ends_with("… (2 MiB in all)"), "{}", message.len());
        assert_eq!(short(&long).chars().count(), NAME_CHARS_MAX + 1);
        assert_eq!(nearest(&long, ["ä"]), None);
        assert_eq!(nearest("g", ["_G"]), None);
        assert_eq!(nearest("prnit", ["print"]), Some("print"));
    }
}
