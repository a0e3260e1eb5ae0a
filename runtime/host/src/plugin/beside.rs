//! The directories beside the program, where a build and an installation put strategies.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::owner;

/// Where a build and an installation put strategies: the directory of this program, links resolved, and `../lib/homeroom/plugins`
/// beside that.
pub fn beside_program() -> Vec<PathBuf> {
    let program = std::env::current_exe().and_then(|program| program.canonicalize());
    let Some(dir) = program.ok().and_then(|program| Some(program.parent()?.to_owned())) else { return Vec::new() };
    let installed = dir.parent().map(|above| above.join("lib/homeroom/plugins"));
    std::iter::once(dir).chain(installed).collect()
}

/// Whether a file lies in one of [`beside_program`] and has the program's owner.
///
/// # Errors
/// When a path or an owner cannot be read.
pub(super) fn is_beside_program(path: &Path, file: &File) -> Result<bool> {
    let program = std::env::current_exe()?.canonicalize()?;
    let path = path.canonicalize()?;
    let here = |dir: &PathBuf| dir.canonicalize().is_ok_and(|dir| path.parent() == Some(&dir));
    Ok(beside_program().iter().any(here) && owner::same_owner(&file.metadata()?, &program.metadata()?))
}
