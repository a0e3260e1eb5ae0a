//! Strategy plugins: where they are found, what is checked before their code runs, and how they are called.

mod elf;
mod find;
pub mod generation;
mod load;
pub mod probe;
pub mod reload;
mod stage;
mod watch;

pub use find::{Search, StrategyFile};
pub use load::Plugin;
pub use probe::Probe;
