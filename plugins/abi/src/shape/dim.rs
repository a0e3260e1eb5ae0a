//! Shapes, and the dimensions that they are made of.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One dimension: the number of rows of a batch, known only when it runs, or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// The rows of the batch; -1 in files.
    Rows,
    /// A fixed size.
    Fixed(usize),
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rows => f.write_str("N"),
            Self::Fixed(size) => size.fmt(f),
        }
    }
}

impl Serialize for Dim {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Rows => serializer.serialize_i64(-1),
            Self::Fixed(size) => serializer.serialize_u64(size as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Dim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match i64::deserialize(deserializer)? {
            -1 => Ok(Self::Rows),
            size => usize::try_from(size).map(Self::Fixed).map_err(serde::de::Error::custom),
        }
    }
}

/// Shape of a node.
pub type Shape = Vec<Dim>;

/// A shape in words, e.g. `(N, 576)`.
pub fn words(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
    format!("({})", dims.join(", "))
}
