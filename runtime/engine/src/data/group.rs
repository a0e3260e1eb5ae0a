//! What a row becomes: sequences, and what is known of them.

use std::ops::{Deref, DerefMut};

use super::{Example, Unit};

/// The sequences that a row becomes and an objective weighs together: one, or two answers to one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// One; of a preference the chosen answer and the rejected one, each behind the prompt.
    pub sequences: Few<Example>,
    /// For each sequence, how many of its tokens come before the first trained one: the prompt.
    pub prompts: Few<usize>,
    /// Of a rated answer, whether it is a good one.
    pub label: Option<bool>,
}

impl Group {
    /// Sequences in which the answers, and nothing else, are trained.
    pub fn new(sequences: Vec<Example>, label: Option<bool>) -> Self {
        let prompt = |example: &Example| example.trained.iter().position(|trained| *trained).unwrap_or(0);
        let prompts: Vec<usize> = sequences.iter().map(prompt).collect();
        Self { sequences: sequences.into(), prompts: prompts.into(), label }
    }

    /// It as the unit of this number.
    pub fn unit(&self, number: u32) -> Unit<'_> {
        Unit { number, sequences: self.sequences.iter().collect() }
    }
}

/// Values of which there is nearly always one: it lies here, and several elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Few<T> {
    /// The one.
    One(T),
    /// Several, or none.
    Several(Box<[T]>),
}

impl<T> From<Vec<T>> for Few<T> {
    fn from(mut values: Vec<T>) -> Self {
        match values.pop() {
            Some(one) if values.is_empty() => Self::One(one),
            last => {
                values.extend(last);
                Self::Several(values.into())
            }
        }
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(several) => several,
        }
    }
}

impl<T> DerefMut for Few<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::One(one) => std::slice::from_mut(one),
            Self::Several(several) => several,
        }
    }
}

impl<T> IntoIterator for Few<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        match self {
            Self::One(one) => vec![one].into_iter(),
            Self::Several(several) => several.into_vec().into_iter(),
        }
    }
}

impl<'f, T> IntoIterator for &'f Few<T> {
    type Item = &'f T;
    type IntoIter = std::slice::Iter<'f, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
