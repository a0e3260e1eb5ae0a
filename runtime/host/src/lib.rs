//! The host: what people type, and the plugins that the engine's work is planned by.
//!
//! [`cli`] reads the command line and hands over to a file of `command/`. [`plugin`] finds, checks and loads strategies.

pub mod cli;
mod command;
mod interrupt;
mod machine;
pub mod plugin;
mod progress;
