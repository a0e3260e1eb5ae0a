//! Models of the Hugging Face hub, by their names there.
//!
//! What was downloaded lies in Hugging Face's own cache, which Python's programs read and fill as well: [`cache`] reads it, without a
//! network. A lab may share a second, read-only store of the same layout, `$HOMEROOM_BASES`.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

pub mod cache;
mod name;

pub use cache::{Found, find};
pub use name::HubName;

static OFFLINE: AtomicBool = AtomicBool::new(false);

/// Has nothing downloaded by this process.
pub fn set_offline(offline: bool) {
    OFFLINE.store(offline, Ordering::Relaxed);
}

/// Whether nothing is downloaded: `--offline`, or `HF_HUB_OFFLINE`.
pub fn offline() -> bool {
    let set = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    OFFLINE.load(Ordering::Relaxed) || matches!(set.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

/// Downloads a model into the cache.
pub fn fetch(name: &HubName) -> Result<Found> {
    bail!("{name}: not in the cache; downloading comes with the hub's client")
}
