//! Where rows come from that a report is made of.

use std::path::Path;

use anyhow::{Error, Result};

use super::Part;
use crate::data::jsonl::read_rows;
use crate::data::{Problem, Row, RowKind};

/// Takes a row: in which part and on which line it stands.
pub type Each<'a> = dyn FnMut(Part, usize, Result<Row, Problem>) -> Result<()> + 'a;

/// Rows that can be read more than once, in the same order.
pub trait Reread {
    /// Calls `each` with every row.
    ///
    /// # Errors
    /// When they cannot be read, or one of `each`.
    fn each(&self, each: &mut Each<'_>) -> Result<()>;
}

/// The rows of files.
pub struct Files<'a> {
    /// Those to train on.
    pub training: &'a Path,
    /// Those that are held out, in a file of their own.
    pub held_out: Option<&'a Path>,
    /// Lines of `training` that are held out, ascending.
    pub held_lines: &'a [usize],
    /// What is to be learned, and its name: rows of another kind are refused.
    pub kind: Option<(RowKind, &'a str)>,
}

impl Reread for Files<'_> {
    fn each(&self, each: &mut Each<'_>) -> Result<()> {
        for (part, path) in [(Part::Train, Some(self.training)), (Part::HeldOut, self.held_out)] {
            let Some(path) = path else { continue };
            let mut failed: Option<Error> = None;
            read_rows(path, self.kind.map(|(kind, _)| kind), |line, _, row| {
                if failed.is_some() {
                    return;
                }
                let row = row.and_then(|row| match self.kind {
                    Some((kind, objective)) => kind.check(row.kind(), objective).map(|()| row),
                    None => Ok(row),
                });
                let part = match part {
                    Part::Train if self.held_lines.binary_search(&line).is_ok() => Part::HeldOut,
                    part => part,
                };
                failed = each(part, line, row).err();
            })?;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(())
    }
}
