//! What a script prints: to stderr, in bounds, and without the controls of a terminal, which could rewrite what is on the screen.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Write as _;

use super::clock::Clock;
use super::limits::bytes;
use crate::progress;

/// The output of one run.
pub struct Output {
    written: Cell<usize>,
    most: usize,
}

impl Output {
    /// With nothing written yet.
    pub fn new(most: usize) -> Self {
        Self { written: Cell::new(0), most }
    }

    /// Writes a line of the script's.
    ///
    /// # Errors
    /// When that is more than a run may print.
    pub fn print(&self, clock: &Clock, text: &str) -> anyhow::Result<()> {
        if self.written.get().saturating_add(text.len() + 1) > self.most {
            self.written.set(self.most);
            self.check()?;
        }
        self.line(clock, text);
        Ok(())
    }

    /// Writes a line of a verb's. It counts, and is written even if it is one too many: the verb has done what it says.
    pub fn line(&self, clock: &Clock, text: &str) {
        let text = plain(text);
        self.written.set(self.written.get().saturating_add(text.len() + 1));
        let _waiting = clock.wait();
        progress::line(text);
    }

    /// Refuses to begin what would print more.
    ///
    /// # Errors
    /// When the run has printed all that it may.
    pub fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.written.get() < self.most,
            "the script has printed all that a run may print, {}\nhint: what it returns goes to stdout",
            bytes(self.most)
        );
        Ok(())
    }
}

/// A text with its controls written out, newlines and tabs left as they are.
pub fn plain(text: &str) -> Cow<'_, str> {
    let control = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if control(c) {
            let _ = write!(out, "{}", c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_are_written_out_and_lines_stay_lines() {
        assert_eq!(plain("a\x1b[2Jb\r\nc\t\u{9b}d"), "a\\u{1b}[2Jb\\u{d}\nc\t\\u{9b}d");
        assert!(matches!(plain("plain ä"), Cow::Borrowed(_)));
    }
}
