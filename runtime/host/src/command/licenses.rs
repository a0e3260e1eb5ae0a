//! `homeroom licenses`.

use anyhow::Result;

use super::{Done, print};

/// The notice of third-party licences. Written by `licenses.py` beside it, which says what is in it and why.
const NOTICE: &str = include_str!("../../licenses.txt");

/// Prints the notice.
pub fn run() -> Result<Done> {
    print(NOTICE.trim_end())?;
    Ok(Done::Whole)
}
