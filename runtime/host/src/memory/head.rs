//! `head.json`: number and digest of the last line of the chain, kept beside it: a chain that was cut off or is gone shows.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text, replace_file};
use serde::{Deserialize, Serialize};

/// Name of the file.
pub const FILE: &str = "head.json";

/// The last line of the chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Its number.
    pub number: u64,
    /// Its digest.
    pub digest: String,
}

/// How the chain differs from the head after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apart {
    /// There is no head.
    Missing,
    /// The chain has so many lines behind the head.
    Behind(u64),
    /// The head is of one line more.
    Ahead,
}

impl Apart {
    /// What it is, in words.
    pub fn words(self) -> String {
        match self {
            Self::Missing => format!("{FILE} is not there, which says how far the chain goes"),
            Self::Behind(1) => format!("the chain is one line longer than {FILE} says, as a crash leaves it"),
            Self::Behind(lines) => format!("the chain is {lines} lines longer than {FILE} says, as a crash leaves it"),
            Self::Ahead => format!("the chain is one line shorter than {FILE} says, as a crash leaves it"),
        }
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

impl Head {
    /// The head of a directory, if it has one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        let path = path(directory);
        if path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Ok(None);
        }
        let text = read_text(&path, SMALL_FILE_BYTES_MAX)?;
        let head = serde_json::from_str(&text);
        head.map(Some).with_context(|| {
            format!(
                "{}: is no head of a log\nhint: if it is damaged, remove it: it is made anew from the chain",
                path.display()
            )
        })
    }

    /// Replaces that of a directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        replace_file(&path(directory), &serde_json::to_vec(self)?)
    }
}
