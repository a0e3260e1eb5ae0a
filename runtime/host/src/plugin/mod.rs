//! Strategy plugins: where they are found, what is checked before their code runs, and how they are called.

mod beside;
pub mod build;
mod call;
pub mod check;
mod demand;
mod elf;
pub mod find;
mod foreign;
pub mod generation;
pub mod install;
mod library;
mod load;
pub mod native;
pub mod new;
mod owner;
mod peft;
mod private;
pub mod probe;
pub mod reload;
mod stage;
mod text;
pub mod trust;

pub use beside::beside_program;
pub use find::{Search, StrategyFile, file_name};
pub use load::Plugin;
pub use probe::Probe;
pub use stage::PluginFile;
pub use trust::{Policy, Standing, Trust};
