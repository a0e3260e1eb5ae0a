//! A plugin's file before any of its code runs: read once, checked, and copied to where nobody else changes it.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom_abi::table::ENTRY;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::load::{Plugin, names_entry};

/// A private copy of a library, checked.
pub struct Staged {
    /// The file that was read.
    pub source: PathBuf,
    /// SHA-256 of its bytes, in hexadecimal digits.
    pub sha256: String,
    /// The copy: a new name and inode, because the linker answers a known name or inode with the library it already has, and
    /// a file that is overwritten in place changes code that is running.
    pub copy: PathBuf,
    _dir: TempDir,
}

impl Staged {
    /// Reads a library once, through one handle, and checks what was read.
    ///
    /// # Errors
    /// When others may write the file, or it is not a whole library for this machine, or no strategy.
    pub fn read(path: &Path) -> Result<Self> {
        let (_, bytes) = bytes(path)?;
        Self::of_bytes(path, &bytes)
    }

    /// Checks and copies what [`bytes`] read.
    ///
    /// # Errors
    /// As [`Staged::read`].
    pub fn of_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        if cfg!(target_os = "linux") {
            super::elf::check(bytes)?;
        }
        ensure!(names_entry(bytes), "not a strategy: it has no function `{ENTRY}`");
        let dir =
            tempfile::Builder::new().prefix("homeroom-plugin-").tempdir().context("cannot make a private copy")?;
        let copy = dir.path().join(path.file_name().context("a library has a file name")?);
        fs::write(&copy, bytes).with_context(|| format!("cannot make a private copy in {}", dir.path().display()))?;
        #[cfg(unix)]
        fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o500))?;
        Ok(Self { source: path.to_owned(), sha256: digest(bytes), copy, _dir: dir })
    }

    /// Loads the copy.
    ///
    /// # Errors
    /// As [`Plugin::load`].
    pub fn load(&self) -> Result<Plugin> {
        Plugin::open(self)
    }
}

/// SHA-256 and bytes of a file whose owner may be trusted.
///
/// # Errors
/// When it cannot be read, or others may write it.
pub fn bytes(path: &Path) -> Result<(String, Vec<u8>)> {
    let mut file = File::open(path).context("cannot read")?;
    check_owner(path, &file)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).context("cannot read")?;
    Ok((digest(&bytes), bytes))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses a file that others than its owner could have written.
#[cfg(unix)]
fn check_owner(path: &Path, file: &File) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let meta = file.metadata().context("cannot read")?;
    ensure!(meta.is_file(), "not a file");
    // SAFETY: geteuid has no preconditions.
    let user = unsafe { libc::geteuid() };
    ensure!(meta.uid() == user || meta.uid() == 0, "it belongs to another user (uid {}); copy it", meta.uid());
    ensure!(meta.mode() & 0o002 == 0, "everybody may write it; run `chmod o-w {}`", path.display());
    // Many systems give each user a group of the same number, which nobody else is in.
    let private_group = meta.gid() == meta.uid();
    ensure!(meta.mode() & 0o020 == 0 || private_group, "its group may write it; run `chmod g-w {}`", path.display());
    Ok(())
}

#[cfg(not(unix))]
fn check_owner(_: &Path, _: &File) -> Result<()> {
    Ok(())
}
