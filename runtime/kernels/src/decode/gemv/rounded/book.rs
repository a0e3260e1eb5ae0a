//! Code books of sixteen levels, such as NF4's, for products in whole numbers: each level becomes the nearest of 2^16 even steps, which is
//! off by 2^-16 of the largest level at most. Rounding a value of x to eight bits costs more than a hundred times that.

use crate::element::nearest_whole;
use crate::matmul::Matrix;
use crate::storage::codec::{Coded, Fused};

use super::{GROUP, SPAN};

/// The levels of a book as whole numbers.
pub(super) struct Levels {
    pub whole: [i32; 16],
    /// What these are multiplied by.
    pub factor: f32,
}

impl Levels {
    /// What levels are greater by that have no sign.
    pub const ZERO: i32 = 1 << 15;
    /// The largest magnitude.
    const MOST: f32 = (Self::ZERO - 1) as f32;

    /// What levels are multiplied by to become whole numbers, and those to become levels again; `None` where levels are so large or so
    /// small that there are no such steps.
    #[inline(always)]
    pub fn steps(levels: &[f32; 16]) -> Option<(f32, f32)> {
        Self::steps_to(levels, Self::MOST)
    }

    /// The same where the largest magnitude becomes `most`.
    #[inline(always)]
    fn steps_to(levels: &[f32; 16], most: f32) -> Option<(f32, f32)> {
        let largest = levels[0].abs().max(levels[15].abs());
        let (inverse, factor) = (most / largest, largest / most);
        (inverse.is_normal() && factor.is_normal()).then_some((inverse, factor))
    }

    /// Those of a weight that is stored so, to be split into two bytes with a sign each: the largest number of them is 127 · 2^8 + 127.
    #[cfg(any(test, target_arch = "aarch64"))]
    #[inline(always)]
    pub fn of_signed_bytes(w: &Matrix<'_>) -> Option<Self> {
        Self::to(w, f32::from(127_i16 * 256 + 127))
    }

    /// The upper bytes of the levels plus `zero`, and the lower ones.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn bytes(&self, zero: i32) -> [[u8; 16]; 2] {
        let mut bytes = [[0; 16]; 2];
        for (i, whole) in self.whole.iter().enumerate() {
            [bytes[1][i], bytes[0][i]] = ((whole + zero) as u16).to_le_bytes();
        }
        bytes
    }

    /// Those of a weight that is stored so.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn of(w: &Matrix<'_>) -> Option<Self> {
        Self::to(w, Self::MOST)
    }

    #[inline(always)]
    fn to(w: &Matrix<'_>, most: f32) -> Option<Self> {
        match w.coded.as_ref()?.fused()? {
            Fused::Nibbles(levels) => {
                let (inverse, factor) = Self::steps_to(&levels, most)?;
                Some(Self { whole: levels.map(|level| nearest_whole(level, inverse)), factor })
            }
            Fused::Linear => None,
        }
    }
}

/// Scales of the blocks of a row of W, one row after another.
pub(super) struct BlockScales<'a> {
    coded: &'a Coded<'a>,
    /// Of the row's blocks; after them its last again.
    scales: &'a mut [f32],
    /// Groups of a block.
    groups: usize,
}

impl<'a> BlockScales<'a> {
    /// Of a coded weight whose blocks are whole groups, and its rows whole blocks.
    ///
    /// # Panics
    /// When the weight is stored otherwise.
    pub fn new(w: &'a Matrix<'a>, scratch: &'a mut Vec<f32>) -> Self {
        let coded = w.coded.as_ref().expect("a book's weight is coded");
        let len = coded.block_len();
        Self { coded, scales: crate::buffer::grown(scratch, w.cols / len + SPAN), groups: len / GROUP }
    }

    /// Makes ready for a row.
    #[inline(always)]
    pub fn begin(&mut self, row: usize) {
        let (own, after) = self.scales.split_at_mut(self.scales.len() - SPAN);
        self.coded.scales(row * own.len(), own);
        after.fill(own.last().copied().unwrap_or(0.0));
    }

    /// Of each group of a span; after the row's last group any that there are.
    #[cfg(any(test, target_arch = "aarch64"))]
    #[inline(always)]
    pub fn of_groups(&self, span: usize) -> [f32; SPAN] {
        std::array::from_fn(|group| self.scales[(span * SPAN + group) / self.groups])
    }

    /// The same in a vector.
    ///
    /// # Safety
    /// The row has the span, and the processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn of_span(&self, span: usize) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        let first = span * SPAN / self.groups;
        // SAFETY: there are as many scales as blocks and a span's more.
        unsafe {
            let p = self.scales.as_ptr().add(first);
            match self.groups {
                1 => _mm256_loadu_ps(p),
                2 => {
                    let four = _mm256_castps128_ps256(_mm_loadu_ps(p));
                    _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))
                }
                groups => {
                    let of_group: [f32; SPAN] =
                        std::array::from_fn(|group| *p.add((span * SPAN + group) / groups - first));
                    _mm256_loadu_ps(of_group.as_ptr())
                }
            }
        }
    }
}
