//! Training data: the rows of a JSONL file, and the token sequences that they become.
//!
//! A file holds rows of one shape (see [`RowFormat`]). It is read line by line; the JSON of a row is gone when its
//! tokens are made. Problems are gathered over the whole file and told at once, by line.

mod dataset;
mod encode;
mod example;
mod jsonl;
pub mod order;
mod problem;
mod row;
#[cfg(test)]
mod tests;
mod unit;

pub use self::dataset::{Dataset, load_jsonl, note_endless};
pub use self::encode::{Encoder, OnLongRow, end_of_turn};
pub use self::example::{Example, preview};
pub use self::jsonl::{check_jsonl, parse_rows, read_texts};
pub use self::problem::{Problem, Problems};
pub use self::row::{Row, RowFormat, check_row};
pub use self::unit::Unit;
