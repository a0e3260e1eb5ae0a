//! A thread's buffers, which both directions use.

use std::cell::RefCell;

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

thread_local!(pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default());
