//! Products with weights in blocks of whole numbers as they are stored: nothing of them is rounded. Rows of A are rounded as few rows are
//! when tokens are decoded (see [`gemv`](crate::gemv)), by groups of [`GROUP`].
//!
//! With `w[n, k] = d[n, g] c[n, k] + m[n, g]` and `a[i, k] = s[i, g] q[i, k]`, codes c without a sign,
//! `y[i, n] = Σ_g d[n, g] s[i, g] Σ_{k in g} c[n, k] q[i, k] + m[n, g] s[i, g] Σ_{k in g} q[i, k]`.
//! Sums over a group are exact. A panel holds codes as bytes, by words of four along the sum; a vector of words is multiplied by a word of
//! A that is in all of its lanes, so that no sum is over lanes. By AVX2 the products of bytes are added up in sixteen bits as long as
//! these hold them (of four bits a whole group), by AVX-VNNI in 32.

#![allow(clippy::needless_range_loop, reason = "loops of a constant length become straight code, whatever they index")]

use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;

use super::{Aligned, PANEL, ROWS, Sums, Tile, finish, widen};
use crate::buffer::grown;
use crate::decode::gemv::round_groups;
use crate::element::Element;
use crate::isa::{Dpbusd, Feature, Isa, Run, run};
use crate::matmul::Matrix;
use crate::pool::{Shared, for_ranges};
use crate::storage::Storage;
use crate::storage::format::sub_blocks;
use crate::storage::whole::{Block, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q8_0, SuperBlock, six_bits};
use crate::tile::pack_columns;

/// Values of a row of A that share a scale.
const GROUP: usize = 32;
/// The same by words.
const WORDS: usize = GROUP / 4;
/// Values of a sum that are packed at once, whole blocks: a strip of them and its scales stay in the first cache.
pub(crate) const CHUNK: usize = 1024;
/// Columns of a strip: two vectors.
const STRIP: usize = 2 * LANES;
const LANES: usize = 8;

/// Whether a storage is multiplied as it is.
pub(crate) fn takes(isa: Isa, storage: Storage) -> bool {
    match storage {
        Storage::Q4_0 | Storage::Q4_1 | Storage::Q5_0 | Storage::Q5_1 => isa.has(Feature::Avx2),
        Storage::Q4K | Storage::Q5K | Storage::Q6K => isa.has(Feature::Avx2),
        // Two products of eight bits without a sign are more than sixteen bits hold.
        Storage::Q8_0 => isa.has(Feature::AvxVnni),
        Storage::F32 | Storage::F16 | Storage::BF16 | Storage::Coded | Storage::Native => false,
    }
}

/// Rows of A in groups of eight bits.
pub(crate) struct Rounded {
    /// (m, k / 4).
    words: Vec<u32>,
    /// (m, groups).
    scales: Vec<f32>,
    /// (m, groups): the sum of a group's codes, times its scale.
    sums: Vec<f32>,
    /// (m, 2 groups): the same of its halves.
    halves: Vec<f32>,
    k: usize,
}

/// Rounds `m` rows of k values, `row_step` from one to the next.
pub(crate) fn round<E: Element>(isa: Isa, m: usize, k: usize, a: &[E], row_step: usize) -> Rounded {
    let groups = k / GROUP;
    let mut rounded = Rounded {
        words: vec![0; m * k / 4],
        scales: vec![0.0; m * groups],
        sums: vec![0.0; m * groups],
        halves: vec![0.0; 2 * m * groups],
        k,
    };
    let (words, scales) = (Shared::new(&mut rounded.words), Shared::new(&mut rounded.scales));
    let (sums, halves) = (Shared::new(&mut rounded.sums), Shared::new(&mut rounded.halves));
    for_ranges(m, 16, |rows| {
        let mut row = vec![0f32; k];
        for i in rows {
            widen(isa, &a[i * row_step..][..k], &[], &mut row);
            // SAFETY: no two tasks have a row in common; four codes are a word.
            unsafe {
                let codes = std::slice::from_raw_parts_mut(words.slice(i * k / 4, k / 4).as_mut_ptr().cast::<i8>(), k);
                let halves = halves.slice(2 * i * groups, 2 * groups);
                round_groups(isa, &row, codes, scales.slice(i * groups, groups), halves);
                for (sum, [a, b]) in sums.slice(i * groups, groups).iter_mut().zip(halves.as_chunks::<2>().0) {
                    *sum = a + b;
                }
            }
        }
    });
    rounded
}

/// A packed chunk.
#[derive(Default)]
pub(crate) struct Packed {
    /// Codes: (words, [`PANEL`]).
    words: Vec<u32>,
    /// What each group's codes are multiplied by, and what is added: (groups of the weight, [`PANEL`]).
    scales: Vec<[f32; PANEL]>,
    mins: Vec<[f32; PANEL]>,
    /// Codes of the columns, one after another.
    codes: Vec<u8>,
    /// A strip of words.
    strip: Vec<u32>,
}

/// Packs the part `sum` of the sum, whole blocks, for rows `columns` of W.
pub(crate) fn pack(isa: Isa, w: &Matrix<'_>, sum: Range<usize>, columns: Range<usize>, to: &mut Packed) {
    let (len, block) = (sum.len(), w.block_len());
    assert!(takes(isa, w.storage) && sum.start.is_multiple_of(block) && len.is_multiple_of(block), "blocks of W");
    assert!(columns.len() <= PANEL && columns.end <= w.rows && sum.end <= w.cols, "a panel of W");
    let groups = len / group_of(w.storage);
    to.scales.resize(groups.max(to.scales.len()), [0.0; PANEL]);
    to.mins.resize(groups.max(to.mins.len()), [0.0; PANEL]);
    let (scales, mins) = (&mut to.scales[..groups], &mut to.mins[..groups]);
    for of_group in scales.iter_mut().chain(mins.iter_mut()) {
        of_group[columns.len()..].fill(0.0);
    }
    let codes = grown(&mut to.codes, columns.len() * len);
    let bytes = |values: usize| values / block * w.storage.block_bytes();
    let mut pointers = [std::ptr::null(); PANEL];
    for (j, codes) in codes.chunks_exact_mut(len).enumerate() {
        let row = &w.bytes[w.order.stored(columns.start + j) * bytes(w.cols)..][bytes(sum.start)..bytes(sum.end)];
        // SAFETY: the processor has AVX2; the row is whole blocks.
        unsafe { read(w.storage, row, codes, scales, mins, j) };
        pointers[j] = codes.as_ptr();
    }
    let words = grown(&mut to.words, len / 4 * PANEL);
    // SAFETY: each pointer is to `len` bytes.
    unsafe { pack_columns(isa, &pointers[..columns.len()], len / 4, words) };
}

/// Values of a weight that share a scale.
fn group_of(storage: Storage) -> usize {
    if storage == Storage::Q6K { GROUP / 2 } else { GROUP }
}

/// Reads blocks: codes without a sign, and of each group column j of scales and of what is added.
///
/// # Safety
/// The processor has AVX2 and F16C.
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
unsafe fn read(
    storage: Storage,
    row: &[u8],
    codes: &mut [u8],
    scales: &mut [[f32; PANEL]],
    mins: &mut [[f32; PANEL]],
    j: usize,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match storage {
            Storage::Q4_0 => blocks::<Q4_0>(row, codes, scales, mins, j),
            Storage::Q4_1 => blocks::<Q4_1>(row, codes, scales, mins, j),
            Storage::Q5_0 => blocks::<Q5_0>(row, codes, scales, mins, j),
            Storage::Q5_1 => blocks::<Q5_1>(row, codes, scales, mins, j),
            Storage::Q8_0 => blocks::<Q8_0>(row, codes, scales, mins, j),
            Storage::Q4K => super_blocks::<Q4K>(row, codes, scales, mins, j),
            Storage::Q5K => super_blocks::<Q5K>(row, codes, scales, mins, j),
            _ => q6k(row, codes, scales, mins, j),
        }
    }
}

/// # Safety
/// See [`read`]; inlined into it.
#[inline(always)]
unsafe fn blocks<F: Block>(
    row: &[u8],
    codes: &mut [u8],
    scales: &mut [[f32; PANEL]],
    mins: &mut [[f32; PANEL]],
    j: usize,
) {
    let columns = scales.iter_mut().zip(mins);
    for ((block, codes), (scales, mins)) in row.chunks_exact(F::BYTES).zip(codes.chunks_exact_mut(GROUP)).zip(columns) {
        // SAFETY: the block is whole, and codes are 32.
        unsafe {
            let all = F::codes(block.as_ptr());
            // Those with a sign become greater by 128.
            let all = if F::SIGNED { _mm256_xor_si256(all, _mm256_set1_epi8(i8::MIN)) } else { all };
            _mm256_storeu_si256(codes.as_mut_ptr().cast(), all);
            let halves = _mm_cvtph_ps(_mm_cvtsi32_si128(block.as_ptr().cast::<i32>().read_unaligned()));
            let scale = _mm_cvtss_f32(halves);
            scales[j] = scale;
            mins[j] = match (F::HAS_MIN, F::SIGNED) {
                (true, _) => _mm_cvtss_f32(_mm_movehdup_ps(halves)),
                (false, true) => -128.0 * scale,
                (false, false) => -F::SHIFT * scale,
            };
        }
    }
}

/// # Safety
/// See [`read`]; inlined into it.
#[inline(always)]
unsafe fn super_blocks<F: SuperBlock>(
    row: &[u8],
    codes: &mut [u8],
    scales: &mut [[f32; PANEL]],
    mins: &mut [[f32; PANEL]],
    j: usize,
) {
    let columns = scales.chunks_exact_mut(8).zip(mins.chunks_exact_mut(8));
    let each = row.chunks_exact(F::BYTES).zip(codes.chunks_exact_mut(8 * GROUP)).zip(columns);
    for ((block, codes), (scales, mins)) in each {
        // SAFETY: the block is whole, and codes are 256.
        unsafe {
            let p = block.as_ptr();
            let both = _mm_cvtph_ps(_mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()));
            let (of_scales, of_mins) = sub_blocks(p.add(4));
            let (d, m) = (eight(of_scales, both), eight(of_mins, _mm_movehdup_ps(both)));
            for group in 0..8 {
                (scales[group][j], mins[group][j]) = (d[group], -m[group]);
                let to = codes.as_mut_ptr().add(group * GROUP);
                _mm256_storeu_si256(to.cast(), F::codes(p, group));
            }
        }
    }
}

/// Eight bytes as floats, times a factor.
///
/// # Safety
/// See [`read`]; inlined into it.
#[inline(always)]
unsafe fn eight(bytes: u64, factor: __m128) -> [f32; 8] {
    let mut out = [0f32; 8];
    // SAFETY: there are eight values.
    unsafe {
        let values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)));
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(_mm256_broadcastss_ps(factor), values));
    }
    out
}

/// # Safety
/// See [`read`]; inlined into it.
#[inline(always)]
unsafe fn q6k(row: &[u8], codes: &mut [u8], scales: &mut [[f32; PANEL]], mins: &mut [[f32; PANEL]], j: usize) {
    let columns = scales.chunks_exact_mut(16).zip(mins.chunks_exact_mut(16));
    for ((block, codes), (scales, mins)) in row.chunks_exact(210).zip(codes.chunks_exact_mut(8 * GROUP)).zip(columns) {
        // SAFETY: as above.
        unsafe {
            let p = block.as_ptr();
            let d =
                _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(p.add(208).cast::<u16>().read_unaligned()))));
            for (group, (scales, mins)) in scales.iter_mut().zip(mins).enumerate() {
                let scale = d * f32::from(*p.add(192 + group).cast::<i8>());
                (scales[j], mins[j]) = (scale, -32.0 * scale);
            }
            for group in 0..8 {
                let to = codes.as_mut_ptr().add(group * GROUP);
                _mm256_storeu_si256(to.cast(), six_bits(p, group));
            }
        }
    }
}

/// What codes are.
trait Form {
    /// Words of a group of the weight.
    const WORDS: usize;
    /// Words whose products sixteen bits hold, pair by pair.
    const RUN: usize;
}

/// Of four bits: 8 · 2 · 15 · 127 is below 2^15.
struct Four;
/// Of five bits; of four runs of them the largest sums are, too.
struct Five;
/// Of six bits in groups of sixteen.
struct Six;
/// Of eight bits, which sixteen do not hold.
struct Eight;

impl Form for Four {
    const WORDS: usize = WORDS;
    const RUN: usize = WORDS;
}
impl Form for Five {
    const WORDS: usize = WORDS;
    const RUN: usize = 2;
}
impl Form for Six {
    const WORDS: usize = WORDS / 2;
    const RUN: usize = 2;
}
impl Form for Eight {
    const WORDS: usize = WORDS;
    const RUN: usize = 0;
}

/// Multiplies rows of A by a packed chunk, number `chunk` of the sum: `width` columns.
///
/// # Safety
/// The output is writable over rows x `width`, and what is packed is the chunk of `w`.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn rows(
    isa: Isa,
    a: &Rounded,
    rows: Range<usize>,
    chunk: usize,
    w: &Matrix<'_>,
    packed: &mut Packed,
    width: usize,
    sums: Sums,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match w.storage {
            Storage::Q4_0 | Storage::Q4_1 | Storage::Q4K => strips::<Four>(isa, a, rows, chunk, packed, width, sums),
            Storage::Q5_0 | Storage::Q5_1 | Storage::Q5K => strips::<Five>(isa, a, rows, chunk, packed, width, sums),
            Storage::Q6K => strips::<Six>(isa, a, rows, chunk, packed, width, sums),
            _ => strips::<Eight>(isa, a, rows, chunk, packed, width, sums),
        }
    }
}

/// # Safety
/// See [`rows`].
unsafe fn strips<F: Form>(
    isa: Isa,
    a: &Rounded,
    rows: Range<usize>,
    chunk: usize,
    packed: &mut Packed,
    width: usize,
    sums: Sums,
) {
    let len = CHUNK.min(a.k - chunk * CHUNK);
    let groups = len / 4 / F::WORDS;
    assert!(rows.end * a.k / GROUP <= a.scales.len() && width <= PANEL, "{rows:?} by {width}");
    assert!(packed.words.len() >= len / 4 * PANEL && packed.scales.len().min(packed.mins.len()) >= groups, "a chunk");
    let strip = grown(&mut packed.strip, len / 4 * STRIP);
    for column in (0..width).step_by(STRIP) {
        for (to, from) in strip.as_chunks_mut::<STRIP>().0.iter_mut().zip(packed.words.as_chunks::<PANEL>().0) {
            to.copy_from_slice(&from[column..column + STRIP]);
        }
        let job = Job::<F> {
            isa,
            a,
            rows: rows.clone(),
            chunk,
            b: Strip {
                words: strip.as_ptr(),
                scales: packed.scales.as_flattened()[column..].as_ptr(),
                mins: packed.mins.as_flattened()[column..].as_ptr(),
            },
            groups,
            columns: STRIP.min(width - column),
            sums: Sums { out: sums.out.wrapping_add(column), ..sums },
            form: std::marker::PhantomData,
        };
        // SAFETY: the chunk is as large as was seen, and the processor has AVX2; the rest is passed on to the caller.
        unsafe { if isa.has(Feature::AvxVnni) { run(job) } else { by_pairs(job) } }
    }
}

/// Columns of a strip from a chunk's first group on.
#[derive(Clone, Copy)]
struct Strip {
    words: *const u32,
    scales: *const f32,
    mins: *const f32,
}

/// Rows by a strip.
struct Job<'a, F> {
    isa: Isa,
    a: &'a Rounded,
    rows: Range<usize>,
    chunk: usize,
    b: Strip,
    groups: usize,
    columns: usize,
    sums: Sums,
    form: std::marker::PhantomData<F>,
}

/// # Safety
/// The processor has AVX2 and FMA; see [`rows`].
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
unsafe fn by_pairs<F: Form>(job: Job<'_, F>) {
    // SAFETY: passed on to the caller.
    unsafe { job.down::<Pairs>() }
}

impl<F: Form> Run for Job<'_, F> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<D: Dpbusd>(self) {
        // SAFETY: passed on to the caller.
        unsafe { self.down::<Fours<D>>() }
    }
}

/// Rows of A of a tile.
struct Rows {
    /// Their words, scales and sums.
    at: [(*const u32, *const f32, *const f32); ROWS],
    /// Words of a group of the weight: a number that the compiler does not know, else it makes straight code of a group and spills its sums.
    group: usize,
}

impl<F: Form> Job<'_, F> {
    /// Tiles below each other.
    ///
    /// # Safety
    /// See [`rows`]; inlined into what has the instructions of `P` enabled.
    #[inline(always)]
    unsafe fn down<P: Products>(self) {
        let Self { a, b, groups, sums, .. } = self;
        let (of_words, of_groups, from) = (a.k / 4, a.k / GROUP, self.chunk * CHUNK);
        let mut aligned = Aligned([[0.0; 64]; ROWS]);
        let out = &mut aligned.0;
        let tallest = P::rows::<F>();
        let mut first = self.rows.start;
        while first < self.rows.end {
            let count = tallest.min(self.rows.end - first);
            let mut at = [(std::ptr::null(), std::ptr::null(), std::ptr::null()); ROWS];
            for (r, at) in at.iter_mut().enumerate() {
                // Rows beyond the last are the last again.
                let row = first + r.min(count - 1);
                let sums = match F::WORDS == WORDS {
                    true => &a.sums[row * of_groups + from / GROUP..],
                    false => &a.halves[2 * (row * of_groups + from / GROUP)..],
                };
                let words = &a.words[row * of_words + from / 4..];
                *at = (words.as_ptr(), a.scales[row * of_groups + from / GROUP..].as_ptr(), sums.as_ptr());
            }
            let rows = Rows { at, group: black_box(F::WORDS) };
            // SAFETY: of each row the chunk's words are there; the rest is passed on to the caller.
            unsafe {
                match count {
                    1 => tile::<P, F, 1>(&rows, b, groups, out),
                    2 => tile::<P, F, 2>(&rows, b, groups, out),
                    3 => tile::<P, F, 3>(&rows, b, groups, out),
                    4 => tile::<P, F, 4>(&rows, b, groups, out),
                    5 => tile::<P, F, 5>(&rows, b, groups, out),
                    _ => tile::<P, F, 6>(&rows, b, groups, out),
                }
            }
            let to = sums.out.wrapping_add((first - self.rows.start) * sums.step);
            finish(self.isa, &out[..count], self.columns, &[], sums.add, to, sums.step);
            first += count;
        }
    }
}

/// Products of codes.
trait Products {
    /// Rows of the largest tile, as many as registers hold.
    fn rows<F: Form>() -> usize;
    /// Sums over a group, whose first word of A is number k and whose words of B are from `b` on.
    ///
    /// # Safety
    /// They are there, and the instructions are enabled.
    unsafe fn group<F: Form, const R: usize>(a: &Rows, k: usize, b: *const u32) -> [[__m256i; 2]; R];
}

/// By pairs.
struct Pairs;

impl Products for Pairs {
    #[inline(always)]
    fn rows<F: Form>() -> usize {
        // Two words of two vectors each take the registers of two rows.
        if F::RUN == WORDS { ROWS } else { 4 }
    }

    #[inline(always)]
    unsafe fn group<F: Form, const R: usize>(a: &Rows, k: usize, b: *const u32) -> [[__m256i; 2]; R] {
        // SAFETY: passed on to the caller.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            if F::RUN == F::WORDS {
                for word in 0..a.group {
                    let b = b.add(word * STRIP);
                    let of_b = [_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(LANES).cast())];
                    for row in 0..R {
                        let x = _mm256_set1_epi32(*a.at[row % ROWS].0.add(k + word) as i32);
                        for v in 0..2 {
                            sums[row][v] = _mm256_add_epi16(sums[row][v], _mm256_maddubs_epi16(of_b[v], x));
                        }
                    }
                }
                for row in 0..R {
                    for v in 0..2 {
                        sums[row][v] = _mm256_madd_epi16(sums[row][v], ones);
                    }
                }
            } else {
                for word in (0..a.group).step_by(2) {
                    let b = b.add(word * STRIP);
                    let first = [_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(LANES).cast())];
                    let second =
                        [_mm256_loadu_si256(b.add(STRIP).cast()), _mm256_loadu_si256(b.add(STRIP + LANES).cast())];
                    for row in 0..R {
                        let x = a.at[row % ROWS].0.add(k + word);
                        let (x, y) = (_mm256_set1_epi32(*x as i32), _mm256_set1_epi32(*x.add(1) as i32));
                        for v in 0..2 {
                            let pairs =
                                _mm256_add_epi16(_mm256_maddubs_epi16(first[v], x), _mm256_maddubs_epi16(second[v], y));
                            sums[row][v] = _mm256_add_epi32(sums[row][v], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
            }
            sums
        }
    }
}

/// By fours.
struct Fours<D>(std::marker::PhantomData<D>);

impl<D: Dpbusd> Products for Fours<D> {
    #[inline(always)]
    fn rows<F: Form>() -> usize {
        ROWS
    }

    #[inline(always)]
    unsafe fn group<F: Form, const R: usize>(a: &Rows, k: usize, b: *const u32) -> [[__m256i; 2]; R] {
        // SAFETY: passed on to the caller.
        unsafe {
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            for word in 0..a.group {
                let b = b.add(word * STRIP);
                let of_b = [_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(LANES).cast())];
                for row in 0..R {
                    let x = _mm256_set1_epi32(*a.at[row % ROWS].0.add(k + word) as i32);
                    for v in 0..2 {
                        sums[row][v] = D::dpbusd(sums[row][v], of_b[v], x);
                    }
                }
            }
            sums
        }
    }
}

/// # Safety
/// Each row of A and the strip have so many groups of the weight; inlined into what has the instructions of `P` enabled.
#[inline(always)]
unsafe fn tile<P: Products, F: Form, const R: usize>(a: &Rows, b: Strip, groups: usize, out: &mut Tile) {
    // SAFETY: passed on to the caller.
    unsafe {
        for out in &mut out[..R] {
            for v in 0..2 {
                _mm256_storeu_ps(out.as_mut_ptr().add(LANES * v), _mm256_setzero_ps());
            }
        }
        for group in 0..groups {
            let k = group * F::WORDS;
            let sums = P::group::<F, R>(a, k, b.words.add(k * STRIP));
            let (scales, mins) = (b.scales.add(group * PANEL), b.mins.add(group * PANEL));
            // One by one, so that sums stay in registers.
            macro_rules! rows_of {
                ($($row:literal)*) => {
                    $(if $row < R {
                        let (_, scale, sum) = a.at[$row];
                        let (scale, sum) = (*scale.add(k / WORDS), *sum.add(group));
                        put(sums[$row % R], (scales, mins), scale, sum, &mut out[$row]);
                    })*
                };
            }
            rows_of!(0 1 2 3 4 5);
        }
    }
}

/// Adds a group's sums to a row of the tile: times the scales of B and of A, and what B adds to each value times the sum of A's.
///
/// # Safety
/// Scales and minima are two vectors each; called from what has AVX2 and FMA enabled.
#[inline(always)]
unsafe fn put(sums: [__m256i; 2], (scales, mins): (*const f32, *const f32), scale: f32, sum: f32, out: &mut [f32; 64]) {
    // SAFETY: passed on to the caller; the row is two vectors at least.
    unsafe {
        let (scale, sum) = (_mm256_set1_ps(scale), _mm256_set1_ps(sum));
        for v in 0..2 {
            let at = LANES * v;
            let out = out.as_mut_ptr().add(at);
            let so_far = _mm256_fmadd_ps(_mm256_loadu_ps(mins.add(at)), sum, _mm256_loadu_ps(out));
            let products = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[v]), _mm256_loadu_ps(scales.add(at)));
            _mm256_storeu_ps(out, _mm256_fmadd_ps(products, scale, so_far));
        }
    }
}
