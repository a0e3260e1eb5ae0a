//! Strategy plugins: where they are found, what is checked before their code runs, and how they are called.

pub mod check;
mod elf;
mod find;
mod load;
pub mod new;
pub mod probe;

pub use find::{Search, StrategyFile, file_name};
pub use load::Plugin;
pub use probe::Probe;
