//! Whether others than its owner could have written a file: by its own mode, or by putting another in its place.

use std::fs::{File, Metadata};
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Opens a file once and checks what was opened, and all directories above it. What is read from it is what was checked.
///
/// # Errors
/// When it cannot be read, is no file, or others may write it or replace it.
#[cfg(unix)]
pub fn open(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    // A pipe would block until somebody writes to it.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).context("cannot read")?;
    let meta = file.metadata().context("cannot read")?;
    ensure!(meta.is_file(), "not a file");
    check(path, &meta)?;
    let real = path.canonicalize().context("cannot read")?;
    let named = std::path::absolute(path).context("cannot read")?;
    for directory in real.ancestors().skip(1).chain(named.ancestors().skip(1)) {
        check(directory, &directory.metadata().with_context(|| format!("{}: cannot read", directory.display()))?)?;
    }
    Ok(file)
}

/// Opens a file. Modes say little here; its directory's access list is the user's to keep.
///
/// # Errors
/// When it cannot be read, or is no file.
#[cfg(not(unix))]
pub fn open(path: &Path) -> Result<File> {
    let file = File::open(path).context("cannot read")?;
    ensure!(file.metadata().context("cannot read")?.is_file(), "not a file");
    Ok(file)
}

#[cfg(unix)]
fn check(path: &Path, meta: &Metadata) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    // In a directory such as /tmp nobody can replace what another put there.
    if meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o1000 != 0 {
        return Ok(());
    }
    let what = if meta.is_dir() { format!("its directory {}: ", path.display()) } else { String::new() };
    // SAFETY: geteuid has no preconditions.
    let user = unsafe { libc::geteuid() };
    ensure!(
        meta.uid() == user || meta.uid() == 0,
        "{what}it belongs to another user (uid {}); copy the library",
        meta.uid()
    );
    let name = path.display();
    ensure!(meta.mode() & 0o002 == 0, "{what}everybody may write it; run `chmod o-w {name}`");
    // Many systems give each user a group of the same number, which nobody else is in.
    let private_group = meta.gid() == meta.uid();
    ensure!(meta.mode() & 0o020 == 0 || private_group, "{what}its group may write it; run `chmod g-w {name}`");
    Ok(())
}

/// Whether two files have the same owner.
pub fn same_owner(a: &Metadata, b: &Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        a.uid() == b.uid()
    }
    #[cfg(not(unix))]
    {
        let _ = (a, b);
        true
    }
}
