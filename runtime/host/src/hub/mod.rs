//! Models of the Hugging Face hub, by their names there.
//!
//! What was downloaded lies in Hugging Face's own cache, which Python's programs read and fill as well: [`cache`] reads it, without a
//! network. A lab may share a second, read-only store of the same layout, `$HOMEROOM_BASES`, and say in [`policy`] which models are used.

mod blob;
pub mod cache;
pub mod carried;
mod choose;
mod client;
mod digest;
mod download;
mod endpoint;
mod explain;
pub mod gguf;
mod listing;
mod name;
mod offline;
mod patience;
mod place;
pub mod policy;
mod proxy;
mod space;
pub mod stores;
mod token;
mod verify;
mod whole;

pub use cache::{Found, find};
pub use download::{Hub, Pulled, config, pull, reach};
pub use endpoint::Endpoint;
pub use name::{COMMIT_TOLD, HubName};
pub use offline::{offline, set_offline};
pub use patience::Patience;
pub use stores::directory;
pub use token::Token;
