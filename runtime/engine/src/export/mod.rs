//! A trained model as other programs read it: a format a file.

mod floats;
pub mod gguf;
mod gguf_lora;
mod merged;
mod mlx;
pub mod ollama;
mod shards;

pub use self::floats::Floats;
pub use self::gguf_lora::{exportable_lora, save_gguf_lora};
pub use self::merged::{SHARD_BYTES_MAX, exportable, model_bytes, save_model, save_model_in};
pub use self::mlx::mlx_config;
