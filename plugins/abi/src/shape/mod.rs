//! Shapes of a recipe's nodes, worked out before anything runs.
//!
//! The SDK checks while it records, so that an error names the author's line; the host checks again whatever it reads.

pub(crate) mod dim;
mod infer;

pub use self::dim::{Dim, Shape, words};
pub use self::infer::{check, check_result, infer};
