//! Models of the Hugging Face hub, by their names there.
//!
//! What was downloaded lies in Hugging Face's own cache, which Python's programs read and fill as well: [`cache`] reads it, without a
//! network. A lab may share a second, read-only store of the same layout, `$HOMEROOM_BASES`, and say in [`policy`] which models are used.

pub mod cache;
mod gguf;
mod name;
mod offline;
pub mod policy;
mod whole;

pub use cache::{Found, find};
pub use name::HubName;
pub use offline::{offline, set_offline};
