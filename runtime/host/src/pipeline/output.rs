//! What a script prints: to stderr, in bounds.

use std::cell::Cell;

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
