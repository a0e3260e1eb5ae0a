//! Rows that are read and checked, and not encoded yet: before a model is fetched for them, and for scripts.

use std::io::Read;
use std::path::Path;

use anyhow::{Result, anyhow, ensure};

use super::problem::Problems;
use super::read::{Reading, Recognised, Source, read_rows};
use super::row::RowKind;

/// Checks the rows of files for `objective`, which learns from those of one kind, and keeps none.
///
/// # Errors
/// When a file cannot be read, holds no rows, or any row is refused whatever the model: one message tells all problems by line.
pub fn check_rows(sources: &[Source], reading: &Reading, kind: RowKind, objective: &str) -> Result<()> {
    of_all(sources, |source| {
        let mut problems = Problems::by("line");
        let found = read_rows(&source.name, source.open()?, reading, Some(kind), &mut |number, row| {
            if let Err(problem) = row.and_then(|(_, row)| kind.check(row.kind(), objective)) {
                problems.add(number, problem);
            }
            Ok(())
        })?;
        ensure!(found.rows > 0, "{}: no rows", source.name.display());
        problems.settle(&source.name, found.unit, found.rows, reading.on_bad_row).map(drop)
    })
}

/// Calls `each` with every file, and tells what is wrong with all of them together.
///
/// # Errors
/// What `each` returns of any.
pub(super) fn of_all(sources: &[Source], mut each: impl FnMut(&Source) -> Result<()>) -> Result<()> {
    let mut wrong = sources.iter().filter_map(|source| each(source).err()).collect::<Vec<_>>();
    match wrong.len() {
        0 => Ok(()),
        1 => Err(wrong.remove(0)),
        _ => Err(anyhow!(wrong.iter().map(|error| format!("{error:#}")).collect::<Vec<_>>().join("\n"))),
    }
}

/// Calls `each` with the number and the text of each row of an open file, a JSON object with our own keys. `name` is what messages call the
/// file. Returns what it was found to be, and what is said of rows that are left out.
///
/// # Errors
/// As [`check_rows`], and whatever `each` returns.
pub fn read_texts(
    name: &Path,
    file: impl Read,
    reading: &Reading,
    mut each: impl FnMut(usize, String) -> Result<()>,
) -> Result<(Recognised, Option<String>)> {
    let mut problems = Problems::by("line");
    let mut read = 0;
    let recognised = read_rows(name, file, reading, None, &mut |number, row| match row {
        Ok((text, _)) => {
            read += 1;
            each(number, text.into_owned())
        }
        Err(problem) => {
            problems.add(number, problem);
            Ok(())
        }
    })?;
    let left_out = problems.settle(name, recognised.unit, recognised.rows, reading.on_bad_row)?;
    ensure!(read > 0, "{}: no rows", name.display());
    Ok((recognised, left_out))
}
