//! Base models: what a decoder is, where its weights lie, and what both are called.

mod base;
pub mod config;
mod resident;
pub mod weight;

pub use self::base::{BaseModel, EMBEDDING, FINAL_NORM, HEAD, LayerModules, Module, Source};
pub(crate) use self::resident::in_large_pages;
