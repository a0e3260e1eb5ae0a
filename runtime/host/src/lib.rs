//! The host: what people type, and the plugins that the engine's work is planned by.
//!
//! [`cli`] reads the command line and hands over to a file of `command/`. [`plugin`] finds, checks and loads strategies;
//! [`models`] loads models by path or by their name in the [`registry`]; [`job`] trains; [`pipeline`] runs Lua scripts.
//! [`runs`] keeps what they did. [`hub`] knows the models of the Hugging Face hub; [`handler`] answers conversations, [`serve`] does so over HTTP; [`memory`] keeps answers and what was thought of them, by consent.

/// In this crate `eprintln` does not panic when nobody reads stderr any more, as after `2>&1 | head`: that would end a run. Nor does it
/// send a terminal what that would obey.
macro_rules! eprintln {
    () => { $crate::progress::line("") };
    ($($text:tt)+) => { $crate::progress::line(format_args!($($text)+)) };
}

mod address;
pub mod cli;
mod command;
mod data_report;
pub mod handler;
mod hex;
mod html;
pub mod hub;
mod interrupt;
pub mod job;
mod machine;
pub mod memory;
pub mod models;
mod near;
pub mod pipeline;
pub mod plugin;
mod private;
mod processor;
mod progress;
pub mod pseudonym;
mod random;
pub mod registry;
pub mod runs;
pub mod serve;
mod stdout;
mod table;
mod terminal;
mod tips;
pub mod toml_problems;
mod troubles;
mod watch;
