//! Base models: what a decoder is (a family's file makes an [`Architecture`] of its configuration), where its weights lie, and
//! what both are called in Hugging Face's and llama.cpp's files.

pub mod architecture;
mod base;
mod config;
pub mod families;
pub mod fields;
pub(crate) mod metadata;
mod resident;
pub mod rope;
pub mod weight;

pub use self::architecture::{Architecture, EMBEDDING, FINAL_NORM, HEAD};
pub use self::base::{BaseModel, LayerModules, Module, Source};
pub(crate) use self::resident::in_large_pages;
