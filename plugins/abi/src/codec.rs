//! How a strategy wants frozen weights stored, as data: a code book over blocks with one scale each.
//!
//! A value is `code[index] * absmax[block]`. NF4 is 4 bits over blocks of 64 (Dettmers et al. 2023,
//! <https://arxiv.org/abs/2305.14314>, section 3); row-wise int8 is 8 bits with one block a row.

use serde::{Deserialize, Serialize};

/// A block codec with a code book.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Codec {
    /// Name for messages and files, e.g. `nf4`.
    pub name: String,
    /// Bits of one index: 4 or 8.
    pub bits: u8,
    /// Values that share a scale.
    pub block: Block,
    /// Values of the indices, ascending; `2^bits` of them at most.
    pub code: Vec<f32>,
    /// How the scales themselves are stored.
    pub absmax: Absmax,
}

/// Which values share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// So many values in row-major order; the last block may be shorter.
    Flat(usize),
    /// One row of the matrix.
    Row,
}

/// Storage of the scales.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Absmax {
    /// One f32 a block.
    F32,
    /// Double quantisation: scales minus their mean, coded by blocks in turn.
    Nested {
        /// Scales that share a second-level scale.
        block: usize,
        /// Values of the 8-bit indices.
        code: Vec<f32>,
    },
}
