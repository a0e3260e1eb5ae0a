//! Training data: rows as people have them, and the token sequences that they become.
//!
//! [`Sources`] are the files that a user names, [`Reading`] says how they are read. `read` finds out what a file is and yields its rows one by
//! one, through `table` or `json`; `form` finds out what is what in a row and writes it with our own keys; `row` checks it. The text of a
//! row is gone when its tokens are made. Problems are gathered over whole files and told at once, by line.

mod check;
mod columns;
mod dataset;
mod encode;
mod example;
mod form;
mod group;
mod json;
mod names;
pub mod order;
mod ordered;
pub mod preview;
mod problem;
mod read;
pub mod report;
mod row;
mod table;
#[cfg(test)]
mod tests;
mod tokens;
mod unit;

pub use self::check::{check_rows, read_texts};
pub use self::columns::{Columns, ROLES, Role};
pub use self::dataset::{Dataset, EncodedRows, FileOfRows, OfLine, encode_texts, load_groups, note_endless};
pub use self::encode::{Encoder, OnLongRow, end_of_turn};
pub use self::example::Example;
pub use self::group::{Few, Group};
pub use self::problem::{Problem, Problems};
pub use self::read::{OnBadRow, Reading, Recognised, Source, Sources, whole_text};
pub use self::row::{Row, RowFormat, RowKind, check_row, check_row_for};
pub use self::tokens::{Stored, Tokens};
pub use self::unit::Unit;
