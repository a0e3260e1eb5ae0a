//! The tokens of examples, and which of them are trained: in memory, or spilled to a file where rows have more than should stay there.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::slice::Iter;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::Example;
use crate::files::{Spill, Spilled};

/// Bytes of tokens that stay in memory.
const HELD_BYTES: usize = 32 << 20;

/// Ids of tokens, or whether each is trained. Wherever they are, they are read as a slice.
#[derive(Clone)]
pub struct Tokens<T: Stored>(Place<T>);

#[derive(Clone)]
enum Place<T> {
    /// Behind two pointers: of the many rows of a large file those in memory are few, and all of them are as small as this allows.
    Here(Box<Box<[T]>>),
    Spilled {
        /// The file.
        file: Arc<Spilled>,
        /// Where they begin there, in words of four bytes.
        word: u32,
        len: u32,
    },
}

/// What [`Tokens`] are of.
pub trait Stored: Copy + fmt::Debug + PartialEq + sealed::Stored {}

impl Stored for u32 {}
impl Stored for bool {}

mod sealed {
    pub trait Stored: Sized {
        /// Appends `values` as bytes.
        fn write(values: &[Self], bytes: &mut Vec<u8>);
        /// Reads what `write` made, `bytes` of which begin at a multiple of four.
        fn read(bytes: &[u8]) -> &[Self];
    }

    impl Stored for u32 {
        fn write(values: &[Self], bytes: &mut Vec<u8>) {
            bytes.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
        }

        fn read(bytes: &[u8]) -> &[Self] {
            // SAFETY: any four bytes are a u32.
            let (before, values, behind) = unsafe { bytes.align_to::<u32>() };
            assert!(before.is_empty() && behind.is_empty(), "tokens are spilled as whole words");
            values
        }
    }

    impl Stored for bool {
        fn write(values: &[Self], bytes: &mut Vec<u8>) {
            bytes.extend(values.iter().map(|value| u8::from(*value)));
        }

        fn read(bytes: &[u8]) -> &[Self] {
            assert!(bytes.iter().all(|byte| *byte <= 1), "the temporary file of rows was changed");
            // SAFETY: a bool has the size and alignment of a byte, and 0 and 1 are its values. These bytes were written by `write`, as 0 and
            // 1, to a file without a name, and were just looked at; only its user could change them, through `/proc`. Of a page that its
            // disk has lost, the process is told by a signal, and reads nothing or zeros.
            unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
        }
    }
}

impl<T: Stored> Deref for Tokens<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Place::Here(values) => values,
            Place::Spilled { file, word, len } => {
                let begin = u64::from(*word) * 4;
                T::read(file.bytes(begin..begin + u64::from(*len) * size_of::<T>() as u64))
            }
        }
    }
}

impl<T: Stored> Tokens<T> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Here(values) => values.len(),
            // Read off without a look at the file: lengths are asked of all rows.
            Place::Spilled { len, .. } => *len as usize,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is changed is in memory from then on.
impl<T: Stored> DerefMut for Tokens<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        if let Place::Spilled { .. } = self.0 {
            *self = Self::from(self.to_vec());
        }
        match &mut self.0 {
            Place::Here(values) => values,
            Place::Spilled { .. } => unreachable!("they were just read into memory"),
        }
    }
}

impl<T: Stored> From<Vec<T>> for Tokens<T> {
    fn from(values: Vec<T>) -> Self {
        Self(Place::Here(Box::new(values.into())))
    }
}

impl<T: Stored> FromIterator<T> for Tokens<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Self(Place::Here(Box::new(values.into_iter().collect())))
    }
}

impl<'t, T: Stored> IntoIterator for &'t Tokens<T> {
    type Item = &'t T;
    type IntoIter = Iter<'t, T>;

    fn into_iter(self) -> Iter<'t, T> {
        self.iter()
    }
}

impl<T: Stored> fmt::Debug for Tokens<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: Stored, O: AsRef<[T]> + ?Sized> PartialEq<O> for Tokens<T> {
    fn eq(&self, other: &O) -> bool {
        **self == *other.as_ref()
    }
}

impl<T: Stored> AsRef<[T]> for Tokens<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T: Stored + Eq> Eq for Tokens<T> {}

/// Puts the tokens of examples where they belong: in memory while they are few, and then to a file.
pub(super) struct Keeper {
    spill: Spill,
    /// Bytes that may still stay.
    left: usize,
    buffer: Vec<u8>,
}

impl Default for Keeper {
    fn default() -> Self {
        Self::of(HELD_BYTES)
    }
}

impl Keeper {
    /// One that leaves so many bytes in memory.
    pub fn of(held: usize) -> Self {
        Self { spill: Spill::default(), left: held, buffer: Vec::new() }
    }

    /// Takes an example. One that is spilled can be read when [`Self::finish`] was called.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn take(&mut self, example: &mut Example) -> Result<()> {
        let bytes = example.ids.len() * 5;
        match self.left.checked_sub(bytes) {
            Some(left) => self.left = left,
            None => {
                // Those behind it are spilled, too: small ones in memory between them would be no help.
                self.left = 0;
                self.put(&mut example.ids)?;
                self.put(&mut example.trained)?;
            }
        }
        Ok(())
    }

    fn put<T: Stored>(&mut self, tokens: &mut Tokens<T>) -> Result<()> {
        self.buffer.clear();
        T::write(tokens, &mut self.buffer);
        let begin = self.spill.append(&self.buffer)?;
        let word =
            u32::try_from(begin / 4).context("the rows have more than 16 GiB of tokens; train on a part of them")?;
        *tokens = Tokens(Place::Spilled { file: self.spill.spilled().clone(), word, len: tokens.len() as u32 });
        Ok(())
    }

    /// Makes what was spilled readable.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> Result<()> {
        self.spill.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_read_alike_in_memory_and_in_a_file() -> Result<()> {
        let examples: Vec<Example> = (0..57_u32)
            .map(|n| Example::new((0..n).map(|t| t * 0x0101_0101).collect(), (0..n).map(|t| t % 3 > 0).collect(), 7))
            .collect();
        // All in memory, some, none.
        for held in [usize::MAX, 1000, 0] {
            let mut keeper = Keeper::of(held);
            let mut kept = examples.clone();
            kept.iter_mut().try_for_each(|example| keeper.take(example))?;
            keeper.finish()?;
            assert_eq!(kept, examples);
            let spilled = |example: &Example| matches!(example.ids.0, Place::Spilled { .. });
            assert_eq!(
                kept.iter().filter(|example| spilled(example)).count(),
                match held {
                    usize::MAX => 0,
                    0 => 56,
                    _ => 37,
                }
            );
            let last = &mut kept[56];
            last.trained[0] = true;
            assert!(last.trained[0] && last.trained[1..] == examples[56].trained[1..]);
        }
        Ok(())
    }
}
