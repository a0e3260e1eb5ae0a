//! A trained model as other programs read it: a format a file.

mod floats;
mod merged;
pub mod ollama;
mod shards;

pub use self::floats::Floats;
pub use self::merged::{SHARD_BYTES_MAX, exportable, model_bytes, save_model, save_model_in};
