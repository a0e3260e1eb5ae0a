//! Tiles on any processor.

use std::marker::PhantomData;

use half::bf16;

use super::lanes::{Lanes, registers_only, tile};
use super::operands::{Segment, Store};
use crate::element::Element;

/// Plain Rust, for the compiler to vectorise.
pub struct Portable<E>(PhantomData<E>);

/// `sum + a b`, fused where the baseline has the instruction.
#[inline(always)]
fn multiply_add(sum: f32, a: f32, b: f32) -> f32 {
    if cfg!(target_arch = "aarch64") { a.mul_add(b, sum) } else { sum + a * b }
}

impl<E: PortableDot> Lanes for Portable<E> {
    type Element = E;
    type Sum = [f32; 4];
    type Word = [u32; 4];
    const WIDTH: usize = 4;
    const ROWS: usize = 4;
    const VECTORS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn words(p: *const u32) -> [u32; 4] {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[u32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn broadcast(word: u32) -> [u32; 4] {
        [word; 4]
    }
    #[inline(always)]
    unsafe fn dot(sum: [f32; 4], a: [u32; 4], b: [u32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| E::dot(sum[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 4] {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, sum: [f32; 4]) {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(sum) }
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut E, sum: [f32; 4]) {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[E; 4]>().write_unaligned(sum.map(E::of)) }
    }
    unsafe fn run<const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
        segments: &[Segment],
        step: usize,
        store: Store<E>,
    ) {
        // SAFETY: passed on to the caller.
        unsafe { tile::<Self, ROWS, VECTORS, ALONG_ROWS>(segments, step, store) }
    }
    unsafe fn spin(steps: usize) -> f32 {
        // SAFETY: passed on to the caller.
        unsafe { registers_only::<Self>(steps) }
    }
}

/// `sum + a b` of words.
pub trait PortableDot: Element {
    fn dot(sum: f32, a: u32, b: u32) -> f32;
}

impl PortableDot for f32 {
    #[inline(always)]
    fn dot(sum: f32, a: u32, b: u32) -> f32 {
        multiply_add(sum, f32::from_bits(a), f32::from_bits(b))
    }
}

impl PortableDot for bf16 {
    #[inline(always)]
    fn dot(sum: f32, a: u32, b: u32) -> f32 {
        let (low, high) = (|w: u32| f32::from_bits(w << 16), |w: u32| f32::from_bits(w & 0xFFFF_0000));
        multiply_add(multiply_add(sum, low(a), low(b)), high(a), high(b))
    }
}
