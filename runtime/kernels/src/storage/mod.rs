//! How frozen weights lie in memory, and their values as floats, both ways.

pub mod codec;
pub mod format;
pub mod rows;

pub use self::format::Storage;
