//! CPU kernels over slices. No candle and no I/O: what comes in and goes out is `&[f32]` and bytes.
//!
//! - `cpu`: which instructions they may use; `element`: f32 or bf16; `pool`: the threads
//! - `storage`, `decode`: how a stored weight lies in memory, and rows of it as floats
//! - `codec`: storage as data, a code book over blocks of values: encoding and decoding
//! - `tile`, `panel`, `product`: products with frozen weights and adapters, for training
//! - `norm`, `rope`, `attention`, `gated`, `residual`, `soft_cap`, `cross_entropy`: the rest of a decoder layer and its loss, forward
//!   and backward
//! - `gemv`, `attend`, `team`: products (exact, or with rows of x in eight bits, and low-rank updates) and attention for a few rows,
//!   as in decoding, and the threads that share many short jobs
//! - `softmax`: the weights that a token is drawn by
//! - `peak`: the limits of the machine
//! - `matmul`, `dot`: products in f32 and f64 for the plain path and for a few rows
//! - `philox`: random numbers as a function of a counter

mod attend;
mod attention;
mod codec;
mod cpu;
mod cross_entropy;
mod decode;
mod dot;
mod element;
mod gated;
mod gemv;
mod int8;
mod matmul;
mod norm;
mod panel;
mod peak;
mod philox;
mod pool;
mod product;
mod residual;
mod rope;
mod soft_cap;
mod softmax;
mod storage;
mod team;
mod tile;

pub use attend::{attend, attend_join, attend_tasks, attend_values};
pub use attention::{Attention, KeyValueGradients, attention, attention_backward, attention_kept};
pub use codec::{CheckedCodec, Codec, CodecBlock, Coded, Encoded, EncodedScales, ScaleStorage, encode};
pub use cpu::{Cpu, VARIABLE as CPU_VARIABLE, cpu, with_cpu};
pub use cross_entropy::{LogitCap, cross_entropy, target_logits};
pub use decode::decode_row;
pub use element::Element;
pub use gated::{Gate, gate, gated, gated_backward};
pub use gemv::{FewRows, Panels, RoundedRows, gemv};
pub use half::{bf16, f16};
pub use matmul::{BlockCodec, Float, Matrix, RowOrder, matmul, matmul_t};
pub use norm::{
    ColumnNorm, norm_columns, norm_columns_backward, normalise, normalise_columns, rms_norm, rms_norm_add,
    rms_norm_add_backward, rms_norm_backward, scale_columns,
};
pub use panel::to_elements;
pub use peak::{read_gigabytes, register_loop_gflops};
pub use philox::{Stream, dropout_mask, philox4x32};
pub use pool::{on_pool, threads};
pub use product::{Columns, Finish, Left, Output, ProductElement, Right, Term, outer, product};
pub use residual::{add_gradient, add_scaled, to_elements_scaled};
pub use rope::{RotaryTable, rotate};
pub use soft_cap::soft_cap;
pub use softmax::softmax_weights;
pub use storage::Storage;
pub use team::{Team, lead};
