//! Writes a file so that it is there whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

use super::sync::sync_directory;
use super::{litter, modes, temporary};

/// Writes a private file, whole or not at all, in place of an older one of its name. If that is a link, what it leads to is replaced.
/// The caller holds the [`super::Lock`] of the directory, so that what another writer left there under a temporary name is litter.
///
/// # Errors
/// When it cannot be written; the older one is then still there.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let there = fs::symlink_metadata(path);
    let kept = if there.is_ok() { "; what is in it stays" } else { "" };
    let failed = || format!("{}: cannot write{kept}", path.display());
    let target = match there.is_ok_and(|meta| meta.is_symlink()) {
        true => path.canonicalize().with_context(failed)?,
        false => path.to_owned(),
    };
    let directory = target.parent().context("a file has a directory")?;
    modes::make_directory(directory)?;
    litter::sweep_files(directory);
    let write = || -> io::Result<()> {
        let mut file = temporary::file(directory)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(&target)?;
        Ok(())
    };
    write().with_context(failed)?;
    sync_directory(directory);
    Ok(())
}
