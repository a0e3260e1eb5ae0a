//! Strategy plugins: where they are found, what is checked before their code runs, and how they are called.

pub mod check;
mod elf;
mod find;
mod load;
pub mod native;
pub mod new;
mod owner;
pub mod probe;
pub mod trust;

pub use find::{Search, StrategyFile, file_name};
pub use load::{Plugin, PluginFile};
pub use probe::Probe;
pub use trust::{Policy, Standing, Trust};
