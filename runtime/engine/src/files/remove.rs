//! Takes what has a name away from it, whole.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use super::sync::sync_directory;
use super::temporary;

/// Takes a directory or a link away from its name in one operation, so that whoever is killed meanwhile leaves it whole or gone, and then
/// removes it. A link is removed itself, and what it leads to stays. What a killed process had not removed yet is litter, which is swept
/// where a directory is made beside it.
///
/// # Errors
/// When it cannot be taken away, and is whole as it was; or when not all of it can be removed: the name is free then, and the message
/// says what is left.
pub fn take_away(path: &Path) -> Result<()> {
    let failed = || format!("{}: cannot remove; it is as it was", path.display());
    let parent = path.parent().with_context(failed)?;
    let is_directory = fs::symlink_metadata(path).with_context(failed)?.is_dir();
    if !is_directory {
        return fs::remove_file(path).with_context(failed);
    }
    // Under this name nobody takes it for a model any more, and nobody has to hold a lock on what may go.
    let aside = temporary::free_name(parent).with_context(failed)?;
    fs::rename(path, &aside).with_context(failed)?;
    sync_directory(parent);
    match fs::remove_dir_all(&aside) {
        // Another process may have swept it.
        Err(error) if error.kind() != ErrorKind::NotFound && fs::symlink_metadata(&aside).is_ok() => Err(error)
            .with_context(|| format!("{}: it is removed, but for what is left in {}", path.display(), aside.display())),
        _ => Ok(()),
    }
}
