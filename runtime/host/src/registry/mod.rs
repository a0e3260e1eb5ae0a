//! The user's models: `models/<name>/` below `$HOMEROOM_HOME` or the user's data directory; and the bases of the hub beside them.
//!
//! [`names`] says what a name means, [`entries`] what a model is and whether it is whole, [`mod@bases`] which models of the hub are here,
//! [`details`] all that is known of one, [`lineage`] what goes on from it; [`removal`], [`copies`] and [`import`] change what is there,
//! [`when`] writes dates. None of them waits for another process: a model has its name when it is whole, and loses it before it is removed.

mod bases;
mod copies;
mod details;
mod entries;
pub mod import;
mod lineage;
mod names;
mod removal;
pub mod when;

use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use homeroom_engine::adapt::encoded::EncodedBases;
use homeroom_engine::files::{self, Lock};

pub use bases::{Base, Usable, bases};
pub use copies::{Sources, copy};
pub use details::{About, Details, Vectors};
pub use entries::{Entry, entry, list, names};
pub use lineage::{Lineage, Target, Users, users_of};
pub use names::{free_name, is_name, note_ambiguous, place, resolve, short};
pub use removal::{Removal, removal};

use crate::progress::line;

/// `$HOMEROOM_HOME`, or the user's data directory.
pub fn data_directory() -> Option<PathBuf> {
    // A relative one is of the directory that the program was started in: a run is taken up in that where it was begun.
    static STARTED_IN: OnceLock<PathBuf> = OnceLock::new();
    let started_in = STARTED_IN.get_or_init(|| std::env::current_dir().unwrap_or_default());
    match std::env::var_os("HOMEROOM_HOME") {
        Some(home) if !home.is_empty() => Some(started_in.join(home)),
        _ => directories::ProjectDirs::from("", "", "homeroom").map(|dirs| dirs.data_dir().to_owned()),
    }
}

/// Where digests of files are kept, see [`homeroom_engine::files::digest`].
pub fn kept_digests() -> Option<PathBuf> {
    data_directory().map(|data| data.join("digests.json"))
}

/// Says with `off` that encoded bases are not kept.
const ENCODED: &str = "HOMEROOM_ENCODED";

/// Where bases are kept as a codec has them: `encoded/` in the data directory. `None` with `HOMEROOM_ENCODED=off`, or without a data
/// directory.
pub fn encoded_bases() -> Option<EncodedBases> {
    let off = std::env::var(ENCODED).is_ok_and(|value| matches!(value.to_lowercase().as_str(), "off" | "0" | "no"));
    let directory = data_directory().filter(|_| !off)?.join("encoded");
    Some(EncodedBases::new(directory, kept_digests(), |note| line(note)))
}

/// The lock of the data directory, for who reads a file in it, changes that and writes it back: two processes that do so at once would
/// undo each other's changes. What has its directory or name to itself, as a model has, needs none.
///
/// # Errors
/// When there is no data directory, it cannot be written, others could tamper with it, or another process has the lock for a minute.
pub fn lock() -> Result<Lock> {
    let data = data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    files::prepare(&data, |note| line(note))?;
    Lock::take(&data, &mut |note| line(note))
}
