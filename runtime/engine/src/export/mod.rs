//! A trained model as other programs read it: a format a file.

mod compare;
mod floats;
mod merged;
mod shards;

pub use self::compare::divergence;
pub use self::floats::Floats;
pub use self::merged::{SHARD_BYTES_MAX, exportable, model_bytes, save_model, save_model_in};
