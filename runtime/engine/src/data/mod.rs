//! Training data: the rows of a JSONL file, and the token sequences that they become.
//!
//! A file holds rows of one shape (see [`RowFormat`]). It is read line by line; the JSON of a row is gone when its
//! tokens are made. Problems are gathered over the whole file and told at once, by line.

mod dataset;
mod encode;
mod example;
mod group;
mod jsonl;
pub mod order;
pub mod preview;
mod problem;
pub mod report;
mod row;
#[cfg(test)]
mod tests;
mod unit;

pub use self::dataset::{Dataset, OfLine, load_groups, load_jsonl, note_endless};
pub use self::encode::{Encoder, OnLongRow, end_of_turn};
pub use self::example::Example;
pub use self::group::Group;
pub use self::jsonl::{check_jsonl, check_rows, parse_rows, read_texts};
pub use self::problem::{Problem, Problems};
pub use self::row::{Row, RowFormat, RowKind, check_row, check_row_for};
pub use self::unit::Unit;
