//! What is kept of each row, as words: in memory while rows are few, and then in a file that is gone through again.

use std::sync::Arc;

use anyhow::Result;

use crate::files::{Spill, Spilled};

/// Rows whose words stay in memory.
const HELD_ROWS: usize = 1 << 17;
/// Rows that are read at once.
const ROWS_READ: usize = 1 << 14;
/// Bytes of a word.
const WORD: usize = size_of::<u32>();

/// The `W` words of each row.
#[derive(Default)]
pub(super) struct Records<const W: usize> {
    here: Vec<[u32; W]>,
    spill: Spill,
    /// Rows that are spilled.
    spilled: usize,
}

impl<const W: usize> Records<W> {
    /// Adds a row behind those before.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(&mut self, words: [u32; W]) -> Result<()> {
        self.push_beyond(HELD_ROWS, words)
    }

    pub(super) fn push_beyond(&mut self, held: usize, words: [u32; W]) -> Result<()> {
        if self.here.len() < held {
            self.here.push(words);
            return Ok(());
        }
        self.spilled += 1;
        self.spill.append(words.map(u32::to_ne_bytes).as_flattened()).map(drop)
    }

    /// All of them, to be read.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn finish(self) -> Result<Finished<W>> {
        let Self { here, spill, spilled } = self;
        let file = spill.spilled().clone();
        spill.finish()?;
        Ok(Finished { here, file, spilled })
    }
}

/// The words of all rows.
pub(super) struct Finished<const W: usize> {
    here: Vec<[u32; W]>,
    file: Arc<Spilled>,
    spilled: usize,
}

impl<const W: usize> Finished<W> {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.here.len() + self.spilled
    }

    /// Calls `each` with the words of every row, in their order.
    pub fn each(&self, mut each: impl FnMut(&[u32; W])) {
        self.here.iter().for_each(&mut each);
        let mut words = [0; W];
        for from in (0..self.spilled).step_by(ROWS_READ) {
            let to = self.spilled.min(from + ROWS_READ);
            let bytes = self.file.bytes((from * W * WORD) as u64..(to * W * WORD) as u64);
            for row in bytes.chunks_exact(W * WORD) {
                for (word, bytes) in words.iter_mut().zip(row.as_chunks().0) {
                    *word = u32::from_ne_bytes(*bytes);
                }
                each(&words);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_alike_in_memory_and_in_a_file() -> Result<()> {
        let rows: Vec<[u32; 3]> =
            (0..ROWS_READ as u32 + 57).map(|row| [row, row.wrapping_mul(0x9e37_79b9), !row]).collect();
        // All in memory, some, none.
        for held in [usize::MAX, 113, 0] {
            let mut records = Records::default();
            rows.iter().try_for_each(|row| records.push_beyond(held, *row))?;
            assert_eq!(records.here.len(), held.min(rows.len()));
            let finished = records.finish()?;
            let mut read = Vec::new();
            finished.each(|row| read.push(*row));
            assert_eq!((finished.len(), read), (rows.len(), rows.clone()));
        }
        Ok(())
    }
}
