//! How frozen weights lie in memory, and their values as floats, both ways.

pub mod codec;
pub mod format;
pub mod quantize;
pub mod rows;
#[cfg(target_arch = "x86_64")]
pub(crate) mod whole;

pub use self::format::Storage;
