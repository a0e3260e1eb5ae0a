//! Products of a few rows in eight bits with weights in blocks of whole numbers: sums over a block are of integers and exact, one
//! multiply-add puts the scales of both sides on them.
//!
//! A row of x is cut into groups of [`GROUP`] values; each is rounded to whole numbers from -127 to 127 with a scale of its own,
//! `x[k] = s q[k]`. With a block `w[k] = d c[k] + m` of codes without a sign, the block's part of the product is
//! `d s Σ c[k] q[k] + m s Σ q[k]`: the first sum is one instruction, the second is the same for all rows of W and known
//! beforehand. Rounding x is all that this costs in exactness. It is how ggml multiplies, too (`ggml-quants.c`, `vec_dot`).
//!
//! What an element of the result is depends on its row of x and of W alone, not on how many rows share the call.

use super::FewRows;
use crate::Storage;
use crate::codec::Fused;
use crate::cpu::{Cpu, cpu, per_cpu};
use crate::element::{eight_bit_scale, nearest_whole};
use crate::matmul::Matrix;

/// Values of a row that share a scale.
const GROUP: usize = 32;
/// Scales and sums of a row are padded with zeros to a multiple of this.
const PAD: usize = 16;

/// Rows of x in eight bits.
#[derive(Debug, Default)]
pub struct RoundedRows {
    /// (m, `groups` times [`GROUP`]).
    codes: Vec<i8>,
    /// (m, `padded`): what a group's codes are multiplied by; NaN if a value is not finite.
    scales: Vec<f32>,
    /// (m, `padded`): the sum of a group's codes, times its scale.
    sums: Vec<f32>,
    /// (m, 2 `padded`): the same of its first and second half.
    halves: Vec<f32>,
    groups: usize,
    padded: usize,
}

impl RoundedRows {
    /// Rounds rows of x.
    pub fn new(x: FewRows<'_>) -> Self {
        let (m, groups) = (x.count(), x.step / GROUP);
        let padded = groups.next_multiple_of(PAD);
        let mut rounded = Self {
            codes: vec![0; m * x.step],
            scales: vec![0.0; m * padded],
            sums: vec![0.0; m * padded],
            halves: vec![0.0; 2 * m * padded],
            groups,
            padded,
        };
        for (j, row) in x.values.chunks_exact(x.step).enumerate() {
            let (at, end) = (j * padded, j * padded + groups);
            let codes = &mut rounded.codes[j * x.step..(j + 1) * x.step];
            let (scales, halves) = (&mut rounded.scales[at..end], &mut rounded.halves[2 * at..2 * end]);
            round(cpu(), row, codes, scales, halves);
            let of_halves = halves.as_chunks::<2>().0;
            rounded.sums[at..end].iter_mut().zip(of_halves).for_each(|(sum, [a, b])| *sum = a + b);
        }
        rounded
    }

    /// Whether these are m rows of `step` values.
    pub(super) fn is_of(&self, m: usize, step: usize) -> bool {
        self.groups * GROUP == step && self.codes.len() == m * step
    }
}

per_cpu! {
    /// Codes, scales, and for each half of a group the sum of its codes times the scale.
    fn round(row: &[f32], codes: &mut [i8], scales: &mut [f32], halves: &mut [f32]) {
        let groups = row.as_chunks::<GROUP>().0.iter().zip(codes.as_chunks_mut::<GROUP>().0);
        for ((row, codes), (scale, halves)) in groups.zip(scales.iter_mut().zip(halves.as_chunks_mut::<2>().0)) {
            let inverse;
            (*scale, inverse) = eight_bit_scale(row);
            let mut whole = [0i32; GROUP];
            for (whole, value) in whole.iter_mut().zip(row) {
                *whole = nearest_whole(*value, inverse);
            }
            for (code, whole) in codes.iter_mut().zip(whole) {
                *code = whole as i8;
            }
            for (half, whole) in halves.iter_mut().zip(whole.as_chunks::<{ GROUP / 2 }>().0) {
                *half = *scale * whole.iter().sum::<i32>() as f32;
            }
        }
    }
}

impl Matrix<'_> {
    /// Whether a few rows of x in eight bits are multiplied with this weight: if it is stored as whole numbers by blocks, and the
    /// processor has AVX2.
    pub fn takes_rounded(&self) -> bool {
        let whole = match self.storage {
            Storage::Q4_0 | Storage::Q4_1 | Storage::Q5_0 | Storage::Q5_1 | Storage::Q8_0 => true,
            Storage::Q4K | Storage::Q5K | Storage::Q6K => true,
            Storage::Coded => self.coded.as_ref().is_some_and(|coded| matches!(coded.fused(), Some(Fused::Linear))),
            Storage::F32 | Storage::F16 | Storage::BF16 | Storage::Native => false,
        };
        whole && cpu() >= Cpu::Avx2
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::run;

/// 256 bits at a time, with the products of bytes that the processor has.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop, reason = "loops of a constant length become straight code, whatever they index")]
mod x86 {
    use std::arch::is_x86_feature_detected;
    use std::arch::x86_64::*;

    use super::super::{Job, sub_blocks};
    use super::{GROUP, RoundedRows};
    use crate::Storage;

    /// Computes a job of M rows of x from the `first` on.
    ///
    /// # Safety
    /// The job is as [`super::super::gemv`] checked it, [`Matrix::takes_rounded`](crate::Matrix::takes_rounded) of its weight, and the processor has AVX2, FMA and F16C.
    pub unsafe fn run<const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize, vnni: bool) {
        // SAFETY: passed on to the caller.
        unsafe {
            if vnni && is_x86_feature_detected!("avx512vnni") {
                by_storage_vnni::<M>(job, x, first);
            } else {
                by_storage_avx2::<M>(job, x, first);
            }
        }
    }

    /// See [`run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
    unsafe fn by_storage_vnni<const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
        // SAFETY: passed on to the caller.
        unsafe { by_storage::<Vnni, M>(job, x, first) }
    }

    /// See [`run`].
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    unsafe fn by_storage_avx2<const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
        // SAFETY: passed on to the caller.
        unsafe { by_storage::<Avx2, M>(job, x, first) }
    }

    /// # Safety
    /// See [`run`]. It and all that it calls is inlined into code with the processor's instructions.
    #[inline(always)]
    unsafe fn by_storage<I: Instructions, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            match job.w.storage {
                Storage::Q4_0 => by_blocks::<Q4_0, I, M>(job, x, first),
                Storage::Q4_1 => by_blocks::<Q4_1, I, M>(job, x, first),
                Storage::Q5_0 => by_blocks::<Q5_0, I, M>(job, x, first),
                Storage::Q5_1 => by_blocks::<Q5_1, I, M>(job, x, first),
                Storage::Q8_0 => by_blocks::<Q8_0, I, M>(job, x, first),
                Storage::Q4K => by_super_blocks::<Q4K, I, M>(job, x, first),
                Storage::Q5K => by_super_blocks::<Q5K, I, M>(job, x, first),
                Storage::Q6K => q6k::<I, M>(job, x, first),
                _ => linear::<I, M>(job, x, first),
            }
        }
    }

    /// Products of bytes.
    trait Instructions {
        /// What is added to codes with a sign before they are multiplied.
        const SHIFT: f32;
        /// Sums of four products each, of codes without a sign below 64 with codes from -127 to 127.
        unsafe fn dot(w: __m256i, x: __m256i) -> __m256i;
        /// The same of codes with a sign, each greater by [`Self::SHIFT`].
        unsafe fn dot_signed(w: __m256i, x: __m256i) -> __m256i;
        /// Adds 16 to the codes whose bit is set.
        unsafe fn fifth(w: __m256i, bits: u32) -> __m256i;
    }

    struct Vnni;

    impl Instructions for Vnni {
        const SHIFT: f32 = 128.0;

        #[inline(always)]
        unsafe fn dot(w: __m256i, x: __m256i) -> __m256i {
            // SAFETY: the processor has it; so for all below.
            unsafe { _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x) }
        }

        #[inline(always)]
        unsafe fn dot_signed(w: __m256i, x: __m256i) -> __m256i {
            // SAFETY: see `dot`.
            unsafe { Self::dot(_mm256_xor_si256(w, _mm256_set1_epi8(-128)), x) }
        }

        #[inline(always)]
        unsafe fn fifth(w: __m256i, bits: u32) -> __m256i {
            // SAFETY: see `dot`.
            unsafe { _mm256_mask_add_epi8(w, bits, w, _mm256_set1_epi8(16)) }
        }
    }

    struct Avx2;

    impl Instructions for Avx2 {
        const SHIFT: f32 = 0.0;

        #[inline(always)]
        unsafe fn dot(w: __m256i, x: __m256i) -> __m256i {
            // SAFETY: see `Vnni`. Two products are below 2^15 in magnitude.
            unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)) }
        }

        #[inline(always)]
        unsafe fn dot_signed(w: __m256i, x: __m256i) -> __m256i {
            // SAFETY: see `Vnni`. 2 · 128 · 127 is below 2^15.
            unsafe { Self::dot(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) }
        }

        #[inline(always)]
        unsafe fn fifth(w: __m256i, bits: u32) -> __m256i {
            // SAFETY: see `Vnni`.
            unsafe {
                // Each byte of the bits over eight lanes, and of each lane its bit.
                let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
                let own = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), spread);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, own), own);
                _mm256_or_si256(w, _mm256_and_si256(set, _mm256_set1_epi8(16)))
            }
        }
    }

    /// What is summed for a row of W and each row of x.
    struct Sums<const M: usize> {
        /// Products, in two turns.
        products: [[__m256; 2]; M],
        /// Offsets: minima, or scales that are still to be multiplied by a block's common offset.
        offsets: [__m256; M],
    }

    impl<const M: usize> Sums<M> {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the processor has it.
            let zero = unsafe { _mm256_setzero_ps() };
            Self { products: [[zero; 2]; M], offsets: [zero; M] }
        }

        /// Adds a block's sums of products, times a factor.
        #[inline(always)]
        unsafe fn add(&mut self, j: usize, turn: usize, dot: __m256i, factor: __m256) {
            let to = &mut self.products[j][turn];
            // SAFETY: the processor has it.
            *to = unsafe { _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, *to) };
        }

        /// Adds the products of block number `N` of those from `p`, which meet the groups of x from `from`.
        ///
        /// # Safety
        /// They are there.
        #[inline(always)]
        unsafe fn block<F: Block, I: Instructions, const N: usize>(
            &mut self,
            p: *const u8,
            x: &[Row; M],
            from: usize,
            factors: &[[f32; 8]; M],
        ) {
            // SAFETY: passed on to the caller.
            unsafe {
                let codes = F::codes::<I>(p.add(N * F::BYTES));
                for j in 0..M {
                    let x = x[j].group(from + N);
                    let dot = if F::SIGNED { I::dot_signed(codes, x) } else { I::dot(codes, x) };
                    self.add(j, N % 2, dot, _mm256_set1_ps(factors[j][N]));
                }
            }
        }

        /// Writes a row's results: `factor` times products and `offset` times offsets.
        ///
        /// # Safety
        /// See [`run`].
        #[inline(always)]
        unsafe fn finish(self, job: &Job<'_>, i: usize, factor: f32, offset: f32) {
            // SAFETY: passed on to the caller.
            unsafe {
                for j in 0..M {
                    let [a, b] = self.products[j];
                    let both = _mm256_fmadd_ps(_mm256_set1_ps(offset), self.offsets[j], _mm256_add_ps(a, b));
                    *job.out.0.add(i * job.out.1 + j) = factor * fold(both);
                }
            }
        }
    }

    /// Adds lanes by halves.
    #[inline(always)]
    unsafe fn fold(lanes: __m256) -> f32 {
        // SAFETY: the processor has it.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    /// A row of x.
    struct Row {
        codes: *const i8,
        scales: *const f32,
        sums: *const f32,
        halves: *const f32,
    }

    /// The M rows of x from the `first` on.
    #[inline(always)]
    fn rows<const M: usize>(x: &RoundedRows, first: usize) -> [Row; M] {
        std::array::from_fn(|j| {
            let (row, at) = (first + j, (first + j) * x.padded);
            Row {
                codes: x.codes[row * x.groups * GROUP..].as_ptr(),
                scales: x.scales[at..].as_ptr(),
                sums: x.sums[at..].as_ptr(),
                halves: x.halves[2 * at..].as_ptr(),
            }
        })
    }

    impl Row {
        /// The codes of a group.
        #[inline(always)]
        unsafe fn group(&self, group: usize) -> __m256i {
            // SAFETY: the caller asks for groups that there are.
            unsafe { _mm256_loadu_si256(self.codes.add(group * GROUP).cast()) }
        }
    }

    /// Blocks of [`GROUP`] codes that begin with a half-precision scale, and perhaps a minimum.
    trait Block {
        const BYTES: usize;
        /// Whether a minimum follows the scale.
        const HAS_MIN: bool = false;
        /// Whether codes have a sign.
        const SIGNED: bool = false;
        /// What codes without a sign are greater by.
        const SHIFT: f32 = 0.0;
        /// Its codes in order.
        ///
        /// # Safety
        /// A whole block is readable at `p`.
        unsafe fn codes<I: Instructions>(p: *const u8) -> __m256i;
    }

    /// Sixteen bytes as 32 codes: the low halves of all, then the high ones.
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> __m256i {
        // SAFETY: the caller has sixteen bytes at the pointer.
        unsafe {
            let both = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
            let shifted = _mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4));
            _mm256_and_si256(shifted, _mm256_set1_epi8(15))
        }
    }

    /// The halves at `p` and at the same place of the seven blocks that follow, as floats.
    #[inline(always)]
    unsafe fn halves<F: Block>(p: *const u8) -> __m256 {
        // SAFETY: the caller has eight blocks at the pointer.
        unsafe {
            let mut bits = _mm_cvtsi32_si128(i32::from(p.cast::<u16>().read_unaligned()));
            bits = _mm_insert_epi16::<1>(bits, i32::from(p.add(F::BYTES).cast::<u16>().read_unaligned()));
            bits = _mm_insert_epi16::<2>(bits, i32::from(p.add(2 * F::BYTES).cast::<u16>().read_unaligned()));
            bits = _mm_insert_epi16::<3>(bits, i32::from(p.add(3 * F::BYTES).cast::<u16>().read_unaligned()));
            bits = _mm_insert_epi16::<4>(bits, i32::from(p.add(4 * F::BYTES).cast::<u16>().read_unaligned()));
            bits = _mm_insert_epi16::<5>(bits, i32::from(p.add(5 * F::BYTES).cast::<u16>().read_unaligned()));
            bits = _mm_insert_epi16::<6>(bits, i32::from(p.add(6 * F::BYTES).cast::<u16>().read_unaligned()));
            bits = _mm_insert_epi16::<7>(bits, i32::from(p.add(7 * F::BYTES).cast::<u16>().read_unaligned()));
            _mm256_cvtph_ps(bits)
        }
    }

    macro_rules! block {
        ($name:ident, $bytes:literal, { $($constant:ident: $type:ty = $value:expr;)* }, |$p:ident| $body:expr) => {
            struct $name;
            impl Block for $name {
                const BYTES: usize = $bytes;
                $(const $constant: $type = $value;)*
                #[inline(always)]
                unsafe fn codes<I: Instructions>($p: *const u8) -> __m256i {
                    // SAFETY: the caller has a whole block at the pointer.
                    unsafe { $body }
                }
            }
        };
    }

    block!(Q4_0, 18, { SHIFT: f32 = 8.0; }, |p| nibbles(p.add(2)));
    block!(Q4_1, 20, { HAS_MIN: bool = true; }, |p| nibbles(p.add(4)));
    block!(Q5_0, 22, { SHIFT: f32 = 16.0; }, |p| {
        I::fifth(nibbles(p.add(6)), p.add(2).cast::<u32>().read_unaligned())
    });
    block!(Q5_1, 24, { HAS_MIN: bool = true; }, |p| {
        I::fifth(nibbles(p.add(8)), p.add(4).cast::<u32>().read_unaligned())
    });
    block!(Q8_0, 34, { SIGNED: bool = true; }, |p| _mm256_loadu_si256(p.add(2).cast()));

    /// # Safety
    /// See [`run`].
    #[inline(always)]
    unsafe fn by_blocks<F: Block, I: Instructions, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
        let blocks = job.w.cols / GROUP;
        let x = rows::<M>(x, first);
        let offset = match (F::HAS_MIN, F::SIGNED) {
            (true, _) => 1.0,
            (false, true) => -I::SHIFT,
            (false, false) => -F::SHIFT,
        };
        for (i, row) in job.rows.clone().enumerate() {
            // SAFETY: a row of W is `blocks` blocks; a row of x has as many groups, and scales and sums for whole turns of them.
            unsafe {
                let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * blocks * F::BYTES);
                let mut sums = Sums::<M>::zero();
                for from in (0..blocks - blocks % 8).step_by(8) {
                    let p = w.add(from * F::BYTES);
                    prefetch(p, 8 * F::BYTES);
                    let scale = halves::<F>(p);
                    let min = if F::HAS_MIN { halves::<F>(p.add(2)) } else { scale };
                    let mut factors = [[0f32; 8]; M];
                    for j in 0..M {
                        let factor = _mm256_mul_ps(scale, _mm256_loadu_ps(x[j].scales.add(from)));
                        _mm256_storeu_ps(factors[j].as_mut_ptr(), factor);
                        let of_x = _mm256_loadu_ps(x[j].sums.add(from));
                        sums.offsets[j] = _mm256_fmadd_ps(min, of_x, sums.offsets[j]);
                    }
                    sums.block::<F, I, 0>(p, &x, from, &factors);
                    sums.block::<F, I, 1>(p, &x, from, &factors);
                    sums.block::<F, I, 2>(p, &x, from, &factors);
                    sums.block::<F, I, 3>(p, &x, from, &factors);
                    sums.block::<F, I, 4>(p, &x, from, &factors);
                    sums.block::<F, I, 5>(p, &x, from, &factors);
                    sums.block::<F, I, 6>(p, &x, from, &factors);
                    sums.block::<F, I, 7>(p, &x, from, &factors);
                }
                for block in blocks - blocks % 8..blocks {
                    let p = w.add(block * F::BYTES);
                    let scale = _mm_cvtph_ps(_mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()));
                    let min = if F::HAS_MIN { _mm_movehdup_ps(scale) } else { scale };
                    let mut factors = [[0f32; 8]; M];
                    for j in 0..M {
                        factors[j][0] = _mm_cvtss_f32(scale) * *x[j].scales.add(block);
                        let of_x = _mm_load_ss(x[j].sums.add(block));
                        let offset = _mm256_zextps128_ps256(_mm_mul_ss(_mm_move_ss(_mm_setzero_ps(), min), of_x));
                        sums.offsets[j] = _mm256_add_ps(sums.offsets[j], offset);
                    }
                    sums.block::<F, I, 0>(p, &x, block, &factors);
                }
                sums.finish(job, i, 1.0, offset);
            }
        }
    }

    /// Blocks of eight groups of codes without a sign, each with a scale and a minimum.
    trait SuperBlock {
        const BYTES: usize;
        /// The codes of a group.
        ///
        /// # Safety
        /// A whole block is readable at `p`.
        unsafe fn codes<I: Instructions>(p: *const u8, group: usize) -> __m256i;
    }

    struct Q4K;

    impl SuperBlock for Q4K {
        const BYTES: usize = 144;

        #[inline(always)]
        unsafe fn codes<I: Instructions>(p: *const u8, group: usize) -> __m256i {
            // SAFETY: the caller has a whole block at the pointer.
            unsafe { half_bytes(p.add(16), group) }
        }
    }

    struct Q5K;

    impl SuperBlock for Q5K {
        const BYTES: usize = 176;

        #[inline(always)]
        unsafe fn codes<I: Instructions>(p: *const u8, group: usize) -> __m256i {
            // SAFETY: the caller has a whole block at the pointer.
            unsafe {
                // Bit `group` of each byte becomes the fifth.
                let fifths = _mm256_loadu_si256(p.add(16).cast());
                let bit = _mm256_set1_epi8((1u8 << group) as i8);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(fifths, bit), bit);
                _mm256_or_si256(half_bytes(p.add(48), group), _mm256_and_si256(set, _mm256_set1_epi8(16)))
            }
        }
    }

    /// Four-bit codes of a group: 32 bytes hold those of two.
    #[inline(always)]
    unsafe fn half_bytes(p: *const u8, group: usize) -> __m256i {
        // SAFETY: the caller has so many bytes at the pointer.
        unsafe {
            let both = _mm256_loadu_si256(p.add(group / 2 * 32).cast());
            let one = if group.is_multiple_of(2) { both } else { _mm256_srli_epi16::<4>(both) };
            _mm256_and_si256(one, _mm256_set1_epi8(15))
        }
    }

    /// How far ahead memory is asked for.
    const AHEAD: usize = 4096;

    /// Asks for the memory that will be read some blocks later, in place of `len` bytes at `p`.
    #[inline(always)]
    unsafe fn prefetch(p: *const u8, len: usize) {
        for line in 0..len.div_ceil(64) {
            // SAFETY: nothing is read; an address that nothing lies at does no harm.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + 64 * line).cast()) };
        }
    }

    /// Eight bytes as floats, times a factor.
    #[inline(always)]
    unsafe fn eight(bytes: u64, factor: __m256) -> __m256 {
        // SAFETY: the processor has it.
        unsafe { _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)))) }
    }

    /// # Safety
    /// See [`run`].
    #[inline(always)]
    unsafe fn by_super_blocks<F: SuperBlock, I: Instructions, const M: usize>(
        job: &Job<'_>,
        x: &RoundedRows,
        first: usize,
    ) {
        let blocks = job.w.cols / (8 * GROUP);
        let x = rows::<M>(x, first);
        for (i, row) in job.rows.clone().enumerate() {
            // SAFETY: a row of W is `blocks` blocks, a row of x eight times as many groups.
            unsafe {
                let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * blocks * F::BYTES);
                let mut sums = Sums::<M>::zero();
                for block in 0..blocks {
                    let (p, at) = (w.add(block * F::BYTES), 8 * block);
                    prefetch(p, F::BYTES);
                    let both = _mm_cvtph_ps(_mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()));
                    let d = _mm256_broadcastss_ps(both);
                    let d_min = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
                    let (scales, mins) = sub_blocks(p.add(4));
                    let (scales, mins) = (eight(scales, d), eight(mins, d_min));
                    let mut factors = [[0f32; 8]; M];
                    for j in 0..M {
                        let of_x = _mm256_loadu_ps(x[j].scales.add(at));
                        _mm256_storeu_ps(factors[j].as_mut_ptr(), _mm256_mul_ps(scales, of_x));
                        sums.offsets[j] = _mm256_fmadd_ps(mins, _mm256_loadu_ps(x[j].sums.add(at)), sums.offsets[j]);
                    }
                    for group in 0..8 {
                        let codes = F::codes::<I>(p, group);
                        for j in 0..M {
                            let dot = I::dot(codes, x[j].group(at + group));
                            sums.add(j, group % 2, dot, _mm256_set1_ps(factors[j][group]));
                        }
                    }
                }
                sums.finish(job, i, 1.0, -1.0);
            }
        }
    }

    /// Q6_K: sixteen scales of sixteen codes each, which are greater by 32.
    ///
    /// # Safety
    /// See [`run`].
    #[inline(always)]
    unsafe fn q6k<I: Instructions, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
        const BYTES: usize = 210;
        let blocks = job.w.cols / (8 * GROUP);
        let x = rows::<M>(x, first);
        for (i, row) in job.rows.clone().enumerate() {
            // SAFETY: a row of W is `blocks` blocks, a row of x eight times as many groups.
            unsafe {
                let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * blocks * BYTES);
                let mut sums = Sums::<M>::zero();
                for block in 0..blocks {
                    let (p, at) = (w.add(block * BYTES), 8 * block);
                    prefetch(p, BYTES);
                    let d = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(p.add(208).cast::<u16>().read_unaligned())));
                    let d = _mm256_broadcastss_ps(d);
                    let signed = _mm_loadu_si128(p.add(192).cast());
                    let first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed));
                    let second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(signed, signed)));
                    let scales = [_mm256_mul_ps(d, first), _mm256_mul_ps(d, second)];
                    for j in 0..M {
                        for (half, scales) in scales.into_iter().enumerate() {
                            let of_x = _mm256_loadu_ps(x[j].halves.add(2 * at + 8 * half));
                            sums.offsets[j] = _mm256_fmadd_ps(scales, of_x, sums.offsets[j]);
                        }
                    }
                    for group in 0..8 {
                        let (half, quarter) = (group / 4, group % 4);
                        let low = _mm256_loadu_si256(p.add(64 * half + 32 * (quarter % 2)).cast());
                        let low = if quarter < 2 { low } else { _mm256_srli_epi16::<4>(low) };
                        let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
                        let high = _mm256_loadu_si256(p.add(128 + 32 * half).cast());
                        // Two bits each, to the fifth and sixth place.
                        let high = match quarter {
                            0 => _mm256_slli_epi16::<4>(high),
                            1 => _mm256_slli_epi16::<2>(high),
                            2 => high,
                            _ => _mm256_srli_epi16::<2>(high),
                        };
                        let codes = _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
                        let lane = 2 * quarter as i32;
                        let lanes = _mm256_setr_epi32(lane, lane, lane, lane, lane + 1, lane + 1, lane + 1, lane + 1);
                        let scale = _mm256_permutevar8x32_ps(scales[half], lanes);
                        for j in 0..M {
                            let factor = _mm256_mul_ps(scale, _mm256_set1_ps(*x[j].scales.add(at + group)));
                            sums.add(j, group % 2, I::dot(codes, x[j].group(at + group)), factor);
                        }
                    }
                }
                sums.finish(job, i, 1.0, -32.0);
            }
        }
    }

    /// Eight bits a value, `(index - 127) · scale / 127`, a scale for each row.
    ///
    /// # Safety
    /// See [`run`].
    #[inline(always)]
    unsafe fn linear<I: Instructions, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
        let cols = job.w.cols;
        let x = rows::<M>(x, first);
        let Some(coded) = job.w.coded.as_ref() else { return };
        for (i, row) in job.rows.clone().enumerate() {
            // SAFETY: a row is `cols` bytes, a multiple of 32; a row of x has a group for each 32 of them.
            unsafe {
                let w = job.w.bytes.as_ptr().add(row * cols);
                let mut sums = Sums::<M>::zero();
                for group in 0..cols / GROUP {
                    let codes = _mm256_loadu_si256(w.add(group * GROUP).cast());
                    let codes = _mm256_min_epu8(codes, _mm256_set1_epi8(254u8 as i8));
                    let codes = _mm256_sub_epi8(codes, _mm256_set1_epi8(127));
                    for j in 0..M {
                        let dot = I::dot_signed(codes, x[j].group(group));
                        sums.add(j, group % 2, dot, _mm256_set1_ps(*x[j].scales.add(group)));
                    }
                }
                if I::SHIFT != 0.0 {
                    for eight in (0..cols / GROUP).step_by(8) {
                        for j in 0..M {
                            sums.offsets[j] = _mm256_add_ps(sums.offsets[j], _mm256_loadu_ps(x[j].sums.add(eight)));
                        }
                    }
                }
                sums.finish(job, i, coded.scale(row) / 127.0, -I::SHIFT);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gemv;
    use super::super::tests::{BLOCKS, cpus, ggml, padded, random};
    use super::*;
    use crate::codec::{Codec, encode};
    use crate::cpu::with_cpu;
    use crate::{Encoded, RowOrder, Stream};

    /// Values (n, r) as a coded matrix.
    fn encoded(values: &[f32], n: usize, r: usize) -> Encoded {
        let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&values[rows.start * r..rows.end * r]);
        };
        encode(&Codec::int8(), n, r, &read).unwrap()
    }

    /// Holds the product with `w` to that of its values with the rounded values of x in f64, and its rows to those of a call of
    /// their own; and what rounding costs to a bound.
    fn check(w: &Matrix, label: &str) {
        let (n, k, m) = (w.rows, w.cols, 6);
        let mut decoded = vec![0f32; n * k];
        w.decode_rows(0..n, &mut decoded);
        let mut stream = Stream::new(9, 1);
        let (x, step) = (padded(&random(&mut stream, m * k), m, k), FewRows::padded(k));
        for cpu in cpus().filter(|cpu| *cpu >= Cpu::Avx2) {
            let product = |rows: std::ops::Range<usize>, of: std::ops::Range<usize>| {
                let mut out = vec![f32::NAN; rows.len() * of.len()];
                with_cpu(cpu, || {
                    assert!(w.takes_rounded(), "{label}, {cpu:?}");
                    let few = FewRows { values: &x[of.start * step..of.end * step], step, rounded: None };
                    let rounded = RoundedRows::new(few);
                    gemv(FewRows { rounded: Some(&rounded), ..few }, w, rows, &mut out);
                });
                out
            };
            let all = product(0..n, 0..m);
            for j in 0..m {
                let alone: Vec<f32> = (0..n).flat_map(|row| product(row..row + 1, j..j + 1)).collect();
                let of_all: Vec<f32> = all.iter().skip(j).step_by(m).copied().collect();
                assert_eq!(alone, of_all, "{label}, {cpu:?}: row {j} alone");
            }
            let rounded = RoundedRows::new(FewRows { values: &x, step, rounded: None });
            for j in 0..m {
                let (mut away, mut norm) = (0f64, 0f64);
                for row in 0..n {
                    let w = &decoded[row * k..(row + 1) * k];
                    let largest = f64::from(w.iter().fold(0f32, |most, w| most.max(w.abs())));
                    let (mut exact, mut wanted, mut size) = (0f64, 0f64, 0f64);
                    for (i, w) in w.iter().enumerate() {
                        let scale = f64::from(rounded.scales[j * rounded.padded + i / GROUP]);
                        let value = f64::from(rounded.codes[j * step + i]) * scale;
                        let product = f64::from(*w) * f64::from(x[j * step + i]);
                        exact += product;
                        norm += product.powi(2);
                        wanted += f64::from(*w) * value;
                        // Codes without a sign are up to 16 times as large as the values that they stand for.
                        size += value.abs() * largest * 16.0;
                    }
                    let got = f64::from(all[row * m + j]);
                    let error = (got - wanted).abs();
                    assert!(error <= size * 8.0 * f64::from(f32::EPSILON), "{label}, {cpu:?}: off by {error:e}");
                    away += (got - exact).powi(2);
                }
                assert!(away.sqrt() < 0.02 * norm.sqrt() + 1e-6, "{label}, {cpu:?}: {} away", (away / norm).sqrt());
            }
        }
    }

    #[test]
    fn rows_in_eight_bits_are_multiplied_by_every_block_format() {
        for (storage, name) in BLOCKS {
            let (bytes, rows, cols) = ggml(storage, name);
            check(&Matrix::new(storage, &bytes, rows, cols, RowOrder::Natural).unwrap(), name);
            // The same bytes as longer rows, whose blocks are taken by eights.
            let blocks = rows * 2;
            for wide in [8, 11, 18].into_iter().filter(|wide| *wide <= blocks) {
                let (rows, cols) = (blocks / wide, wide * storage.block_len());
                let bytes = &bytes[..rows * storage.row_bytes(cols).unwrap()];
                let label = format!("{name}, {wide} blocks a row");
                check(&Matrix::new(storage, bytes, rows, cols, RowOrder::Natural).unwrap(), &label);
            }
            if rows.is_multiple_of(2) {
                let order = RowOrder::Interleaved { head_dim: rows };
                check(&Matrix::new(storage, &bytes, rows, cols, order).unwrap(), "rows in another order");
            }
        }
    }

    #[test]
    fn and_by_codes_on_a_straight_line() {
        let mut stream = Stream::new(3, 1);
        for k in [32, 64, 256, 288, 576] {
            let n = 5;
            let Encoded { codes, scales } = encoded(&random(&mut stream, n * k), n, k);
            check(&Matrix::coded(&Codec::int8(), &codes, &scales, n, k).unwrap(), &format!("{k} columns"));
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_and_zeros_and_tiny_values_are_zeros() {
        let (bytes, n, k) = ggml(Storage::Q4_0, "q4_0");
        let w = Matrix::new(Storage::Q4_0, &bytes, n, k, RowOrder::Natural).unwrap();
        if !w.takes_rounded() {
            return;
        }
        let product = |value: f32| {
            let values = vec![value; k];
            let x = FewRows { values: &values, step: k, rounded: None };
            let rounded = RoundedRows::new(x);
            let mut out = vec![1.0; n];
            gemv(FewRows { rounded: Some(&rounded), ..x }, &w, 0..n, &mut out);
            out
        };
        assert!([f32::NAN, f32::INFINITY].into_iter().flat_map(product).all(f32::is_nan));
        assert!([0.0, -0.0, 1e-42].into_iter().flat_map(product).all(|sum| sum.abs() < 1e-30));
    }
}
