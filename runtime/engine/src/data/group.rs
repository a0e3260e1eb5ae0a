//! What a row becomes: sequences, and what is known of them.

use std::ops::{Deref, DerefMut};

use super::{Example, Unit};

/// The sequences that a row becomes and an objective weighs together: one, or two answers to one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// One; of a preference the chosen answer and the rejected one, each behind the prompt.
    pub sequences: Few<Example>,
    /// Of a rated answer, whether it is a good one.
    pub label: Option<bool>,
}

impl Group {
    /// Sequences in which the answers, and nothing else, are trained.
    pub fn new(sequences: Vec<Example>, label: Option<bool>) -> Self {
        Self { sequences: sequences.into(), label }
    }

    /// It as the unit of this number.
    pub fn unit(&self, number: u32) -> Unit<'_> {
        let sequences = match &self.sequences {
            Few::One(one) => Few::One(one),
            Few::Several(several) => Few::Several(several.iter().collect()),
        };
        Unit { number, sequences }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a file of two million rows each byte here is two megabytes, while its tokens are spilled.
    #[test]
    fn a_row_with_one_sequence_takes_few_bytes_beside_its_tokens() {
        assert_eq!(size_of::<Example>(), 40);
        assert_eq!(
            size_of::<Few<Example>>(),
            40,
            "the one has a value that it never takes, and needs no mark beside it"
        );
        assert_eq!((size_of::<Group>(), size_of::<Unit<'_>>()), (48, 24));
    }
}
