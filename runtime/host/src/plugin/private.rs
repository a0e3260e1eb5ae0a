//! Files and directories with modes of their own, whatever the user's umask: one that leaves a group or everybody their rights would
//! let others write what is trusted, and one that takes the owner's would leave nothing to use.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use tempfile::TempDir;

/// A new directory in the system's place for temporary ones, the user's alone.
///
/// # Errors
/// When it cannot be made.
pub fn temporary_directory(prefix: &str) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700));
    let dir = builder.tempdir()?;
    set_mode(dir.path(), 0o700)?;
    Ok(dir)
}

/// Writes a new file.
///
/// # Errors
/// When it is there already, or cannot be written.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    set_mode(path, mode)
}

/// Takes the right to write from all but the owner, of a directory and all in it.
///
/// # Errors
/// When it cannot be listed or changed.
#[cfg(unix)]
pub fn close_to_others(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let close = |path: &Path, meta: &fs::Metadata| {
        let mode = meta.permissions().mode() & 0o7777;
        if mode & 0o022 == 0 { Ok(()) } else { set_mode(path, mode & !0o022) }
    };
    close(directory, &fs::metadata(directory)?)?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_dir() {
            close_to_others(&entry.path())?;
        } else if meta.is_file() {
            close(&entry.path(), &meta)?;
        }
    }
    Ok(())
}

/// Nothing: modes say little here.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn close_to_others(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

#[cfg(not(unix))]
fn set_mode(_: &Path, _: u32) -> io::Result<()> {
    Ok(())
}
