//! What decoding needs, where few rows meet whole weights and caches: products, attention of single queries, and threads for many short jobs.

pub mod attend;
pub mod gemv;
pub mod team;
