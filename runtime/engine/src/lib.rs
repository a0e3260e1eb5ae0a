//! The engine: models, data, recipes, training, generation, model and adapter files.
//!
//! From files to a model: [`gguf`] and [`tensors`] read files that [`mapped`] maps, [`config`] reads a model's numbers, [`tokenizer`] and
//! [`template`] its text side, [`weight`] one frozen matrix, [`model`] all of them by name. From a strategy's plan to
//! numbers: [`adaptation`] makes a plan real, [`recipe`] runs it, [`decoder`] and [`attention`] compose the model,
//! [`block`] loops over it forward and backward, [`frozen_linear`] multiplies by frozen weights. From rows to an adapter:
//! [`data`], [`order`] and [`batch`] lay out tokens, [`train`] with [`optimizer`] and [`schedule`] learns, [`adapter`],
//! [`peft`], [`merge`] and [`files`] write; [`digest`] tells files apart. [`generate`] answers, with weights
//! where `resident` put them; [`embedding`] makes vectors of texts; [`memory`] says how much there is.
//!
//! Nothing here sees TOML, Lua, HTTP or a terminal.

pub mod adaptation;
pub mod adapter;
pub mod attention;
pub mod batch;
mod bitsandbytes;
pub mod block;
pub mod config;
pub mod conformance;
pub mod data;
pub mod decoder;
pub mod digest;
pub mod embedding;
pub mod files;
pub mod frozen_linear;
pub mod fused;
pub mod generate;
pub mod gguf;
mod guard;
pub mod inference;
pub mod mapped;
pub mod memory;
pub mod merge;
pub mod model;
pub mod optimizer;
pub mod order;
pub mod peft;
pub mod profile;
pub mod recipe;
pub mod requantize;
mod resident;
pub mod schedule;
pub mod template;
pub mod tensors;
pub mod tokenizer;
pub mod train;
pub mod weight;
mod words;
