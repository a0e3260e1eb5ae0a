//! A plugin's file before any of its code runs: read once, checked, and copied to where nobody else changes it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom_abi::table::ENTRY;
use homeroom_engine::files::replace_file;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::beside::is_beside_program;
use super::{owner, private};

use crate::hex::hex;

/// Size of the largest library that is read: with all its debug information, a strategy has some ten megabytes.
pub const BYTES_MAX: u64 = 1 << 29;

/// A library's bytes, read once. None of its code has run.
pub struct PluginFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// SHA-256 of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// Whether it lies in a directory of [`super::beside_program`] and has the program's owner.
    pub beside_program: bool,
    bytes: Vec<u8>,
}

impl PluginFile {
    /// Opens a library once; what is checked, hashed and loaded later is what this reads.
    ///
    /// # Errors
    /// When others may write the file or a directory above it, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = owner::open(path)?;
        let written = |file: &File| -> Result<_> {
            let meta = file.metadata().context("cannot read")?;
            Ok((meta.len(), meta.modified().ok()))
        };
        let before = written(&file)?;
        ensure!(before.0 <= BYTES_MAX, "not a library: {} bytes, {BYTES_MAX} are the most", before.0);
        // A buffer that grows is memory that is cleared and copied several times over.
        let mut bytes = Vec::with_capacity(before.0 as usize);
        (&mut file).take(BYTES_MAX).read_to_end(&mut bytes).context("cannot read")?;
        let whole = bytes.len() as u64 == before.0 && written(&file)? == before;
        ensure!(whole, "it was written while it was read; try again");
        let sha256 = hex(&Sha256::digest(&bytes));
        let beside_program = is_beside_program(path, &file).unwrap_or(false);
        Ok(Self { path: path.to_owned(), sha256, beside_program, bytes })
    }

    /// As [`PluginFile::open`], and [`PluginFile::check`].
    ///
    /// # Errors
    /// As those.
    pub fn read(path: &Path) -> Result<Self> {
        let file = Self::open(path)?;
        file.check()?;
        Ok(file)
    }

    /// Looks at the bytes.
    ///
    /// # Errors
    /// When they are not a whole library for this machine with the entry of a strategy.
    pub fn check(&self) -> Result<()> {
        if cfg!(target_os = "linux") {
            super::elf::check(&self.bytes)?;
        }
        ensure!(names_entry(&self.bytes), "not a strategy: it has no function `{ENTRY}`");
        Ok(())
    }

    /// Writes a private copy of the bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn stage(&self) -> Result<Staged> {
        let dir = private::temporary_directory("homeroom-plugin-").context("cannot make a private copy")?;
        // Who can replace the directory can replace the copy before it is loaded.
        owner::check_directories(dir.path()).context("cannot make a private copy")?;
        let copy = dir.path().join(self.path.file_name().context("a library has a file name")?);
        private::write(&copy, &self.bytes, 0o500)
            .with_context(|| format!("cannot make a private copy in {}", dir.path().display()))?;
        Ok(Staged { source: self.path.clone(), sha256: self.sha256.clone(), copy, _dir: dir })
    }

    /// Writes the bytes as a file, in place of what has its name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        replace_file(path, &self.bytes)
    }
}

/// A private copy of a library that was checked.
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

/// Whether bytes hold the entry's name. Asked first, since loading a library runs its constructors.
pub(super) fn names_entry(bytes: &[u8]) -> bool {
    let name = ENTRY.as_bytes();
    bytes.windows(name.len()).any(|window| window == name)
}
