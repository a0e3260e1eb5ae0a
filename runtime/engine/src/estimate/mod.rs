//! What a training will need, before anything is loaded: memory and time from the shapes of a base, the plan of a strategy, and the
//! lengths of rows.
//!
//! Nothing here is fitted. Memory is what the code allocates: the buffers of fused blocks are lent to nobody and counted
//! (`run/cpu/size.rs`), the operations of plain ones are written on a tape of sizes (`run/plain/tape.rs`). Time is that of the kernels,
//! each measured for a moment in the shapes of one layer, and of memory that is read and written at the machine's bandwidth.

mod memory;
mod sketch;
mod time;

use homeroom_abi::plan::Plan;
use serde::Serialize;

pub use self::memory::Outlook;
pub use self::sketch::{NativeBlock, Sketch};
pub use self::time::{Measured, Work};
use crate::run::compute::Compute;

/// How a training goes through its rows.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Rows of one batch.
    pub batch_size: usize,
    /// Batches of one step.
    pub gradient_accumulation_steps: usize,
    /// Tokens of one row, as if all rows were as long.
    pub row_tokens: usize,
    /// Of these, tokens with a loss.
    pub trained_tokens: usize,
    /// Keep only the input of each block.
    pub gradient_checkpointing: bool,
    /// Fill passes with rows as they fit.
    pub packing: bool,
    /// Tokens of a pass at most, where that is not as usual; a longer row is a pass of its own.
    pub pass_rows: Option<usize>,
    /// What products are computed in.
    pub compute: Compute,
    /// Memory of the program without the base, in bytes.
    pub program_bytes: u64,
}

/// Memory by what it is for, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Frozen weights as they are stored. Those that lie in a mapped file count, too: they are read in every step, but for an embedding
    /// in which only tokens are looked up.
    pub weights: u64,
    /// The strategy's parameters, and the copies of them that products take.
    pub parameters: u64,
    /// Both moments of AdamW, and the parameters before the last update where those are kept.
    pub moments: u64,
    /// Gradients of the parameters.
    pub gradients: u64,
    /// What a pass keeps for backward and what it goes through, beside the logits.
    pub activations: u64,
    /// Logits that exist at once.
    pub logits: u64,
    /// Packed panels and other scratch of the kernels, and tables of cosines.
    pub scratch: u64,
    /// What the allocator keeps of memory that passes gave back.
    pub allocator: u64,
    /// The program itself with the tokenizer.
    pub program: u64,
}

impl Parts {
    /// All of them.
    pub fn total(&self) -> u64 {
        let Self { weights, parameters, moments, gradients, activations, logits, scratch, allocator, program } = self;
        weights + parameters + moments + gradients + activations + logits + scratch + allocator + program
    }
}

/// What a training will need.
#[derive(Clone, Debug, Serialize)]
pub struct Estimate {
    /// Highest resident memory.
    pub peak_memory_bytes: u64,
    /// What it is made of.
    pub parts: Parts,
    /// Trained values.
    pub trainable: usize,
    /// Values of the base.
    pub parameters: usize,
    /// Tokens of a step.
    pub tokens_per_step: usize,
    /// Passes of a step.
    pub passes_per_step: usize,
    /// How many of the base's layers run fused, and how many there are.
    pub fused_layers: (usize, usize),
    /// Storage of the base's linear layers.
    pub storage: String,
    /// What products are computed in.
    pub compute: &'static str,
    /// What a step computes, for [`Measured::seconds`].
    #[serde(skip)]
    pub work: Work,
}

/// Estimates the memory of a training, and what its steps compute.
///
/// `sketch` is the base as the plan stores it, see [`Sketch::stored_as_planned`]. Reads no weight and measures nothing.
pub fn estimate(sketch: &Sketch, plan: &Plan, request: &Request) -> Estimate {
    Outlook::new(sketch, plan).estimate(request)
}
