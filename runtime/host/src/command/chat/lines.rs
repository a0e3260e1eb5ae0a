//! What the user types: on a terminal with an editor and what was typed before, else the lines of stdin.

use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal, StdinLock, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use homeroom_engine::files::{make_directory, read_text, replace_file};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::{History, MemHistory};
use rustyline::validate::Validator;
use rustyline::{Config, Context, Editor, Helper};

use crate::private;

/// The file of what was typed, in the data directory.
pub const HISTORY_FILE: &str = "chat_history";
/// Lines that are kept.
const KEPT: usize = 1000;
/// Largest file that is read, in bytes.
const BYTES_MAX: u64 = 16 << 20;

/// What comes next.
pub enum Next {
    /// A line.
    Line(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of stdin.
    End,
}

/// Lines, one after another.
pub enum Lines {
    /// Of a terminal.
    Typed(Box<Typed>),
    /// Of anything else.
    Piped(StdinLock<'static>),
}

impl Lines {
    /// The lines of stdin. `history`: where what is typed is kept; `None`: nowhere. `names`: what `/handler` can be given.
    pub fn of_stdin(history: Option<PathBuf>, names: Vec<String>) -> Self {
        match io::stdin().is_terminal() {
            true => Typed::new(history, names)
                .map_or_else(|| Self::Piped(io::stdin().lock()), |typed| Self::Typed(Box::new(typed))),
            false => Self::Piped(io::stdin().lock()),
        }
    }

    /// Whether a person types them.
    pub fn are_typed(&self) -> bool {
        io::stdin().is_terminal()
    }

    /// The next line.
    ///
    /// # Errors
    /// When stdin cannot be read.
    pub fn next(&mut self) -> Result<Next> {
        match self {
            Self::Typed(typed) => typed.next(),
            Self::Piped(lines) => {
                let mut line = String::new();
                Ok(match lines.read_line(&mut line).context("cannot read stdin")? {
                    0 => Next::End,
                    _ => Next::Line(line),
                })
            }
        }
    }
}

/// An editor, with what was typed before.
pub struct Typed {
    editor: Editor<Commands, MemHistory>,
    history: Option<PathBuf>,
}

impl Typed {
    fn new(history: Option<PathBuf>, names: Vec<String>) -> Option<Self> {
        let config = Config::builder().auto_add_history(false).build();
        let mut memory = MemHistory::with_config(&config);
        for line in history.as_deref().map(read).unwrap_or_default() {
            let _ = memory.add(&line);
        }
        let mut editor = Editor::with_history(config, memory).ok()?;
        editor.set_helper(Some(Commands(names)));
        Some(Self { editor, history })
    }

    fn next(&mut self) -> Result<Next> {
        let line = match self.editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => return Ok(Next::Interrupted),
            Err(ReadlineError::Eof) => return Ok(Next::End),
            Err(error) => return Err(error).context("cannot read stdin"),
        };
        // One that was typed twice in a row, or is empty, is not added.
        if self.editor.add_history_entry(&line).unwrap_or(false)
            && let Some(path) = &self.history
        {
            // Whoever cannot write there types all the same.
            let _ = append(path, &line);
        }
        Ok(Next::Line(line))
    }
}

/// The lines of a history, the oldest first. One that has become long is cut.
fn read(path: &Path) -> Vec<String> {
    let Ok(text) = read_text(path, BYTES_MAX) else { return Vec::new() };
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(KEPT)..];
    if lines.len() > 2 * KEPT {
        let _ = replace_file(path, format!("{}\n", last.join("\n")).as_bytes());
    }
    last.iter().map(|line| unescaped(line)).collect()
}

/// Writes a line behind the others, for the user alone.
fn append(path: &Path, line: &str) -> Result<()> {
    if let Some(directory) = path.parent() {
        make_directory(directory)?;
    }
    let mut options = private::plain_options();
    options.append(true).create(true);
    Ok(options.open(path)?.write_all(format!("{}\n", escaped(line)).as_bytes())?)
}

/// A line that was pasted may have several.
fn escaped(line: &str) -> String {
    line.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r")
}

fn unescaped(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => out.extend(letters.next().map(|letter| match letter {
                'n' => '\n',
                'r' => '\r',
                other => other,
            })),
            letter => out.push(letter),
        }
    }
    out
}

/// Completes commands and the names of handlers.
struct Commands(Vec<String>);

/// The commands of a conversation.
pub const COMMANDS: [&str; 6] = ["/clear", "/exit", "/handler ", "/help", "/save ", "/system "];

impl Completer for Commands {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..pos];
        let all: Vec<String> = match typed.strip_prefix("/handler ") {
            Some(_) => self.0.iter().map(|name| format!("/handler {name}")).collect(),
            None => COMMANDS.map(str::to_owned).into(),
        };
        let fits = |command: &String| typed.starts_with('/') && command.starts_with(typed);
        Ok((0, all.into_iter().filter(fits).collect()))
    }
}

impl Helper for Commands {}
impl Hinter for Commands {
    type Hint = String;
}
impl Validator for Commands {}
impl Highlighter for Commands {
    fn highlight<'l>(&self, line: &'l str, _: usize) -> Cow<'l, str> {
        line.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_typed_is_kept_for_the_user_alone_and_bounded() -> Result<()> {
        let place = tempfile::tempdir()?;
        let path = place.path().join("home/chat_history");
        let typed = ["one", "two\\n\nthree\r", "ü"];
        for line in typed {
            append(&path, line)?;
        }
        assert_eq!(read(&path), typed);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        }
        for number in 0..2 * KEPT {
            append(&path, &number.to_string())?;
        }
        assert_eq!(read(&path).len(), KEPT);
        assert_eq!(std::fs::read_to_string(&path)?.lines().count(), KEPT, "it was cut");
        assert!(read(place.path()).is_empty() && read(&place.path().join("none")).is_empty());
        Ok(())
    }

    #[test]
    fn commands_and_handlers_are_completed() -> rustyline::Result<()> {
        let commands = Commands(vec!["tutor".into(), "tutor-cloud".into()]);
        let history = MemHistory::new();
        let complete =
            |line: &str| commands.complete(line, line.len(), &Context::new(&history)).map(|(_, found)| found);
        assert_eq!(complete("/h")?, ["/handler ", "/help"]);
        assert_eq!(complete("/handler tutor-")?, ["/handler tutor-cloud"]);
        assert_eq!(complete("he")?, Vec::<String>::new());
        Ok(())
    }
}
