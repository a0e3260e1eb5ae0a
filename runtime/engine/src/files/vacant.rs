//! Whether a name is free for a directory, once what killed processes were putting there is in its place.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::litter;

/// Refuses to write over something.
///
/// # Errors
/// When `path` is a file, or a directory that is not empty, or a link that leads nowhere.
pub fn vacant(path: &Path) -> Result<()> {
    recover(path);
    match fs::read_dir(path) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => bail!("{}: the directory is not empty; name a new one, or pass --overwrite", path.display()),
        },
        Err(error) if error.kind() == ErrorKind::NotFound && fs::symlink_metadata(path).is_ok() => {
            bail!("{}: a link that leads nowhere; remove it, or name another directory", path.display())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("{}: cannot write a directory here", path.display())),
    }
}

/// Puts a directory under its name that a process was just putting there when it was killed, where that takes more than one operation.
/// Does nothing if the name is taken.
pub fn recover(path: &Path) {
    if let (Err(_), Some(parent)) = (fs::symlink_metadata(path), path.parent()) {
        litter::recover(if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    }
}

/// The same for all names in a directory.
pub fn recover_all(directory: &Path) {
    litter::recover(directory);
}
