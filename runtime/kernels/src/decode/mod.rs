//! What decoding needs, where few rows meet whole weights and caches: products, and attention of single queries.

pub mod attend;
pub mod gemv;
