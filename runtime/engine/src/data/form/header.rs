//! The columns of a table.

use super::super::columns::Columns;
use super::super::names::{Sure, plain, role_of};
use super::super::row::RowKind;
use super::mapping::{Mapping, map};
use super::unclear::{flag, unclear_header};

/// The columns of a table.
pub(in crate::data) struct Header {
    /// Their names; empty where a column has none.
    pub names: Vec<String>,
    /// Which is what.
    pub(super) mapping: Mapping,
    /// Whether the first row is the header, and not the first of the rows.
    pub is_row: bool,
}

impl Header {
    /// Of the first row of a table.
    ///
    /// # Errors
    /// When it is not clear which column is what: how to say it.
    pub fn of(
        first: &[&str],
        second: Option<&[&str]>,
        columns: &Columns,
        wanted: Option<RowKind>,
    ) -> Result<Self, String> {
        let names: Vec<&str> = first.iter().map(|name| name.trim().trim_start_matches('\u{feff}')).collect();
        // Empty columns behind the last one are none.
        let width = names.iter().rposition(|name| !name.is_empty()).map_or(0, |last| last + 1);
        let names = &names[..width];
        let by_number = columns.iter().all(|(_, name)| !names.contains(&name) && name.parse::<usize>().is_ok());
        let is_header = names.iter().any(|name| role_of(name).is_some_and(|(_, sure)| sure > Sure::Perhaps));
        let is_row = !by_number || columns.is_empty() || is_header;
        let mapping = map(names, columns, wanted).map_err(|unclear| unclear_header(unclear, names, second))?;
        for (_, at) in &mapping.roles {
            let is_twice = |(other, name): (usize, &&str)| other != *at && plain(name) == plain(names[*at]);
            if is_row && names.iter().enumerate().any(is_twice) && !by_number {
                return Err(format!(
                    "two columns are named `{}`\nhint: rename one of them, or name columns by their numbers, such as `{}`",
                    names[*at],
                    flag(&by_numbers(&mapping))
                ));
            }
        }
        let mut own: Vec<String> = Vec::new();
        for name in names {
            // Of two other columns of one name the first is kept.
            let is_new = is_row && !own.iter().any(|other| other == name);
            own.push(if is_new { (*name).to_owned() } else { String::new() });
        }
        Ok(Self { names: own, mapping, is_row })
    }

    /// What a column is called.
    pub fn name(&self, at: usize) -> String {
        match self.names.get(at).filter(|name| !name.is_empty()) {
            Some(name) => name.clone(),
            None => format!("column {}", at + 1),
        }
    }
}

fn by_numbers(mapping: &Mapping) -> String {
    let pairs = mapping.roles.iter().map(|(role, at)| format!("{}={}", role.name(), at + 1));
    pairs.collect::<Vec<_>>().join(",")
}

/// Whether the first row of a table is a header that says what is what.
pub(in crate::data) fn is_known(first: &[&str], columns: &Columns, wanted: Option<RowKind>) -> bool {
    let names: Vec<&str> = first.iter().map(|name| name.trim()).collect();
    // Of one cell every text would be.
    (names.len() > 1 || names.iter().all(|name| plain(name) == "text")) && map(&names, columns, wanted).is_ok()
}
