//! A thread's buffers.

use std::cell::RefCell;

use super::cut::DEPTH;
use crate::int8::Packed;
use crate::isa::isa;
use crate::tile::{PANEL, scratch_bytes};

/// A thread's buffers; they keep their size.
#[derive(Default)]
pub(super) struct Scratch {
    /// The packed panel.
    pub(super) panel: Vec<u32>,
    /// The same in integers.
    pub(super) packed: Packed,
    /// The same of codes as they are stored.
    #[cfg(target_arch = "x86_64")]
    pub(super) stored: crate::int8::stored::Packed,
    /// Decoded values for one panel.
    pub(super) decoded: Vec<u32>,
    /// Decoded values for all panels of a wide task.
    pub(super) all: Vec<u32>,
    /// A decoded row on its way to bf16.
    pub(super) floats: Vec<f32>,
    /// Sums of earlier groups.
    pub(super) sums: Vec<f32>,
}

/// Bytes that a thread keeps for products of `m` rows: a packed panel, what was decoded for it, and sums that wait.
pub fn product_scratch_bytes(m: usize) -> usize {
    size_of::<u32>() * PANEL * (2 * DEPTH + m) + scratch_bytes(isa())
}

thread_local!(pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default());
