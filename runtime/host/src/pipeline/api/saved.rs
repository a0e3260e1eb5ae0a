//! What of a trained model goes into the registry: its files by their names, and nothing else that lies beside them.

use std::fs::{File, OpenOptions};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapter::{CONFIG_FILE, HOMEROOM_FILE, is_adapter};
use homeroom_engine::files::RESULT_FILES;

/// Refuses a directory that is no trained model.
///
/// # Errors
/// When neither file says that it is one.
pub fn ensure_trained(from: &Path) -> Result<()> {
    let trained = is_adapter(from) || from.join(HOMEROOM_FILE).exists();
    ensure!(trained, "{}: not a trained model: it has neither {CONFIG_FILE} nor {HOMEROOM_FILE}", from.display());
    Ok(())
}

/// Copies a trained model from the directory `from` into `to`, which becomes the user's alone, as the copies are.
///
/// # Errors
/// When one of its files is a link or no regular file, or one cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(to, mode).with_context(|| to.display().to_string())?;
    }
    for name in RESULT_FILES {
        let path = from.join(name);
        let Ok(kind) = path.symlink_metadata() else { continue };
        ensure!(
            kind.is_file(),
            "{}: not a regular file, and only such are copied; put the file itself in its place",
            path.display()
        );
        let mut source = open(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        let kind = source.metadata().with_context(|| path.display().to_string())?;
        ensure!(kind.is_file(), "{}: it has changed while it was copied", path.display());
        let mut write = || std::io::copy(&mut source, &mut create(&to.join(name))?);
        write().with_context(|| format!("{}: cannot copy", path.display()))?;
    }
    Ok(())
}

/// Opens a file that is no link, without waiting for anybody.
fn open(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options.open(path)
}

fn create(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}
