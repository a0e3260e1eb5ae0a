//! What a strategy changes in a model: a plan made real, the files that keep it, and the model that it amounts to.

pub mod adaptation;
pub mod adapter;
pub mod conformance;
pub mod encoded;
pub mod merge;
pub mod peft;
pub mod requantize;
