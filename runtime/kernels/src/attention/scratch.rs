//! A thread's buffers, which both directions use.

use std::cell::RefCell;

use super::forward::QUERIES;
use crate::tile::PANEL;

#[derive(Default)]
pub(super) struct Scratch {
    pub(super) keys: Vec<u32>,
    pub(super) values: Vec<u32>,
    pub(super) scores: Vec<f32>,
    pub(super) weights: Vec<u32>,
    pub(super) packed: Vec<u32>,
    pub(super) turned: Vec<u32>,
    pub(super) sums: Vec<f32>,
}

/// Bytes that a thread keeps for attention within a sequence of `t` rows, each value of a head taking `element`: packed keys and values,
/// and scores with their weights.
pub fn attention_scratch_bytes(t: usize, head_dim: usize, element: usize) -> usize {
    let (t, strips) = (t.next_multiple_of(PANEL), head_dim.next_multiple_of(PANEL));
    2 * t * strips * element + t * QUERIES * (size_of::<f32>() + element)
}

thread_local!(pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default());
