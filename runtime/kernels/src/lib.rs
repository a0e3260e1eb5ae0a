//! CPU kernels over slices. No candle and no I/O: what comes in and goes out is `&[f32]` and bytes.
//!
//! - `storage`: the element types and block formats of a stored weight
//! - `decode`: stored rows to floats
//! - `matmul`: products with a stored weight
//! - `dot`: the same for a few rows
//! - `philox`: random numbers as a function of a counter

mod decode;
mod dot;
mod matmul;
mod philox;
mod storage;

pub use decode::decode_row;
pub use matmul::{Float, Matrix, RowOrder, matmul, matmul_t};
pub use philox::{Stream, dropout_mask, philox4x32};
pub use storage::Storage;
