//! The engine: models, data, training, answers and their files. The binary that people run is the host's; this knows nothing of
//! TOML, Lua, HTTP or a terminal.
//!
//! - [`models`]: what a decoder is, its frozen modules by name; [`files`]: the forms in which they come, and writing what is whole or not there
//! - [`text`]: tokenizers and chat templates; [`data`]: rows to examples
//! - [`adapt`]: a strategy's plan made real, PEFT's files, merging
//! - [`run`]: the waist, what a backend does, and the backends: `plain`, which runs anything, and `cpu`, which is fast
//! - [`train`]: the loop above it, optimizer and schedule; [`inference`]: the scheduler of answers, sampler, prefix cache
//! - [`estimate`]: memory and time of a training from shapes alone
//! - [`export`]: a trained model as other programs read it
//! - [`difference`]: how far two models' predictions are apart; [`forgetting`]: how far a trained model has moved from its base; [`embedding`]: vectors of texts; [`memory`]: how much there is

pub mod adapt;
pub mod data;
pub mod difference;
pub mod embedding;
pub mod estimate;
pub mod export;
pub mod files;
pub mod forgetting;
mod guard;
pub mod inference;
pub mod memory;
pub mod models;
pub mod run;
pub mod text;
pub mod train;
mod words;
