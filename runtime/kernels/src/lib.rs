//! CPU kernels over slices. No candle and no I/O: what comes in and goes out is `&[f32]` and bytes.
//!
//! - `isa`: which instructions they may use, and what products are made of; `fastest`: which kind of product is faster; `peak`: the limits of
//!   the machine; `prefetch`: memory ahead of its turn; `pool`: the threads; `team`: threads that share many short jobs
//! - `element`: f32 or bf16, and sums over rows of them; `round`: from f32 to either; `buffer`: buffers that keep their size
//! - `compiled`: the large loops over them, compiled here
//! - `storage`: how a stored weight lies in memory, and rows of it as floats; `codec`: storage as data, a code book over blocks of values,
//!   encoding and decoding
//! - `neon`: the instructions that kernels for AArch64 are written in
//! - `tile`: the innermost loops, one file a processor family; `product`: products with frozen weights and adapters, for training;
//!   `int8`: the same in integers
//! - `attention`: of all queries, forward and backward
//! - `layer`: norms, rotary embedding, gated units, sums in the residual stream, the loss: the rest of a decoder layer, forward and
//!   backward; and the weights that a token is drawn by
//! - `decode`: products (exact, or with rows of x in eight bits, and low-rank updates) and attention for a few rows, as in decoding
//! - `matmul`, `dot`: stored matrices, and products in f32 and f64 for the plain path and for a few rows
//! - `philox`: random numbers as a function of a counter

// Tests of `tests/layer` are the crate's own tests, too: see `neon`.
#[cfg(all(test, not(target_arch = "aarch64")))]
extern crate self as homeroom_kernels;

mod attention;
mod buffer;
mod compiled;
mod decode;
mod dot;
mod element;
mod fastest;
mod int8;
mod isa;
mod layer;
mod matmul;
#[cfg(any(test, target_arch = "aarch64"))]
mod neon;
mod peak;
mod philox;
mod pool;
mod prefetch;
mod product;
mod round;
mod shared;
mod storage;
mod team;
mod tile;

pub use attention::{
    Attention, KeyValueGradients, attention, attention_backward, attention_kept, attention_scratch_bytes,
    key_value_gradient_bytes,
};
pub use decode::attend::{attend, attend_join, attend_tasks, attend_values};
pub use decode::gemv::{FewRows, Panels, RoundedRows, gemv};
pub use element::Element;
pub use half::{bf16, f16};
pub use int8::rounded_bytes;
#[doc(hidden)]
pub use isa::emulate;
pub use isa::{Bf16Unit, F32Unit, Feature, Int8Unit, Isa, VARIABLE as ISA_VARIABLE, isa, keep_to, with_isa};
pub use layer::cross_entropy::{LogitCap, cross_entropy, target_logits};
pub use layer::gain::gain_backward;
pub use layer::gated::{Gate, gate, gated, gated_backward};
pub use layer::norm::{
    ColumnNorm, norm_columns, norm_columns_backward, normalise, normalise_columns, rms_norm, rms_norm_add,
    rms_norm_add_backward, rms_norm_backward, scale_columns,
};
pub use layer::residual::{add_gradient, add_scaled};
pub use layer::rope::{RotaryTable, rotate};
pub use layer::soft_cap::soft_cap;
pub use layer::softmax::softmax_weights;
pub use matmul::{BlockCodec, Float, Matrix, RowOrder, matmul, matmul_t};
pub use peak::{bf16_register_loop_gflops, f32_register_loop_gflops, read_gigabytes};
pub use philox::{Stream, add_noise, dropout_mask, philox4x32};
pub use pool::{on_each_thread, on_pool, threads, use_threads};
pub use product::{
    Columns, Finish, Gain, Left, Output, ProductElement, Right, Term, outer, product, product_scratch_bytes,
    product_with_gain,
};
pub use round::{to_elements, to_elements_scaled};
pub use storage::Storage;
pub use storage::codec::{
    CheckedCodec, Codec, CodecBlock, Coded, ENCODING, Encoded, EncodedScales, ScaleStorage, Scales, encode,
};
pub use storage::quantize::{encode_row, encode_rows};
pub use storage::rows::decode_row;
pub use team::{Team, lead};
