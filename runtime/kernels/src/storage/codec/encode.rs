//! Values to indices, a few rows at a time: the whole matrix is never there as floats.
//!
//! From f32 the result is that of bitsandbytes 0.50 on a CPU: `quantize_4bit` for blocks of 4-bit indices (each value times
//! `1 / absmax`, in the last, shorter block divided by it; a value on the border between two levels takes the lower),
//! `quantize_blockwise` for nested scales, `int8_vectorwise_quant` for rows of integers. Only the mean that is taken off
//! nested scales is summed in another order. Other code books of 8 bits take the nearest level, which is not always the one
//! that `quantize_blockwise` looks up.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Mutex;

#[cfg(target_arch = "x86_64")]
use super::bisect::{Avx2, Avx512};
use super::{Codec, Encoded, EncodedScales, ScaleStorage};
use crate::buffer::grown;
#[cfg(target_arch = "x86_64")]
use crate::isa::F32Unit;
use crate::isa::{Isa, isa, per_isa};
use crate::pool::{Shared, for_ranges};

/// Which encoding this is: another number where the same values would get other bytes. What was encoded earlier and kept is told by it.
pub const ENCODING: u32 = 1;

/// Values of a chunk that is encoded at once, roughly: as floats they stay in the first cache, where a row does.
const CHUNK: usize = 1 << 12;
/// Values of the chunks that one task takes, roughly: they lie beside each other, so that threads do not fault in the same pages.
const TASK: usize = 1 << 18;

/// Encodes a matrix (rows, cols). `values` writes the f32 values of some rows; it is called from all threads.
///
/// # Errors
/// When the codec cannot be run, or a value is not finite; the message names the row.
pub fn encode(
    codec: &Codec,
    rows: usize,
    cols: usize,
    values: &(dyn Fn(Range<usize>, &mut [f32]) + Sync),
) -> Result<Encoded, String> {
    thread_local!(static VALUES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    codec.check()?;
    let total = rows.checked_mul(cols).ok_or_else(|| format!("{}: {rows} x {cols} is too large", codec.name))?;
    let block_len = codec.block_len(cols);
    let mut codes = vec![0_u8; codec.code_bytes(total)];
    let mut absmax = vec![0f32; total.div_ceil(block_len)];
    let chunk = (CHUNK / cols.max(1)).max(1).next_multiple_of(codec.whole_rows(cols));
    let problem = Mutex::new(None::<usize>);
    let (isa, linear, borders) = (isa(), codec.is_linear(), borders(&codec.code));
    let nibble_borders = (codec.bits == 4).then(|| {
        // No value lies above the borders of levels that a shorter code book lacks.
        let mut all = [f32::INFINITY; 15];
        all[..borders.len()].copy_from_slice(&borders);
        all
    });
    let (shared_codes, shared_absmax) = (Shared::new(&mut codes), Shared::new(&mut absmax));
    let encode_rows = |range: Range<usize>| {
        let (at, count) = (range.start * cols, range.len() * cols);
        VALUES.with_borrow_mut(|buffer| {
            let buffer = grown(buffer, count);
            values(range.clone(), buffer);
            // SAFETY: a chunk starts on whole blocks and whole bytes and ends there or with the matrix, so no two tasks have
            // an index byte or a scale in common; both buffers outlive the tasks.
            let (codes, absmax) = unsafe {
                let first = if codec.bits == 4 { at / 2 } else { at };
                let codes = shared_codes.slice(first, codec.code_bytes(count));
                (codes, shared_absmax.slice(at / block_len, count.div_ceil(block_len)))
            };
            let finite = if linear {
                integers(isa, buffer, block_len, codes, absmax)
            } else if let Some(borders) = &nibble_borders {
                nibbles(isa, buffer, block_len, borders, codes, absmax)
            } else {
                bytes(isa, buffer, block_len, &borders, codes, absmax)
            };
            if !finite {
                let wrong = buffer.iter().position(|value| !value.is_finite());
                let row = range.start + wrong.expect("one of the values is not finite") / cols;
                let mut problem = problem.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                *problem = Some(problem.map_or(row, |other| other.min(row)));
            }
        });
    };
    let task = chunk * (TASK / cols.max(1) / chunk).max(1);
    for_ranges(rows, task, |rows| {
        rows.clone().step_by(chunk).for_each(|row| encode_rows(row..rows.end.min(row + chunk)));
    });
    if let Some(row) = problem.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(format!("{}: row {row} holds a value that is not finite", codec.name));
    }
    let scales = match &codec.scales {
        ScaleStorage::F32 => EncodedScales::F32(absmax),
        ScaleStorage::Nested { block, code } => nested(&absmax, *block, code, mean(&absmax)),
    };
    Ok(Encoded { codes, scales })
}

/// The middles between neighbouring levels.
fn borders(code: &[f32]) -> Vec<f32> {
    code.windows(2).map(|pair| ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32).collect()
}

/// The magnitude that stands for the scale of a block of zeros, and for that of any short block below it: bitsandbytes' guard
/// against dividing by zero.
const LEAST: f32 = 1e-38;

/// The largest magnitude. Those of floats are ordered as their bits are, and integers take any order of comparisons.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7FFF_FFFF)))
}

/// How the values of a block are brought to -1..1: bitsandbytes multiplies, and divides in a block that is shorter than the others.
#[derive(Clone, Copy)]
enum Scaling {
    By(f32),
    Over(f32),
}

/// The scaling of a block, and the scale to store; of values that are not all finite, too. `finite` becomes false by those.
#[inline(always)]
fn scaling(values: &[f32], block_len: usize, finite: &mut bool) -> (Scaling, f32) {
    let absmax = largest_magnitude(values);
    *finite &= absmax.is_finite();
    let least = absmax.max(LEAST);
    if values.len() < block_len { (Scaling::Over(least), least) } else { (Scaling::By(1.0 / least), absmax) }
}

/// For each value the number of borders below it, at most 64 of them.
#[inline(always)]
fn levels(values: &[f32], scaling: Scaling, borders: &[f32; 15], indices: &mut [u8; 64]) {
    let mut scaled = [0f32; 64];
    match scaling {
        Scaling::By(factor) => scaled.iter_mut().zip(values).for_each(|(scaled, value)| *scaled = value * factor),
        Scaling::Over(divisor) => scaled.iter_mut().zip(values).for_each(|(scaled, value)| *scaled = value / divisor),
    }
    for (index, scaled) in indices.iter_mut().zip(&scaled) {
        let mut count = 0_u32;
        for border in borders {
            count += u32::from(scaled > border);
        }
        *index = count as u8;
    }
}

/// Blocks of values to indices of 4 bits; returns whether all values are finite.
fn nibbles(
    isa: Isa,
    values: &[f32],
    block_len: usize,
    borders: &[f32; 15],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    fn avx512(values: &[f32], block_len: usize, borders: &[f32; 15], codes: &mut [u8], absmax: &mut [f32]) -> bool {
        let bisect = Avx512::new(borders);
        let whole = |values: &[f32; 64], factor, codes: &mut [u8; 32]| bisect.nibbles(values, factor, codes);
        nibbles_by((values, block_len), borders, (codes, absmax), whole)
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,bmi2")]
    fn avx2(values: &[f32], block_len: usize, borders: &[f32; 15], codes: &mut [u8], absmax: &mut [f32]) -> bool {
        let bisect = Avx2::new(borders);
        let whole = |values: &[f32; 64], factor, codes: &mut [u8; 32]| bisect.nibbles(values, factor, codes);
        nibbles_by((values, block_len), borders, (codes, absmax), whole)
    }
    match isa.f32_unit() {
        // SAFETY: the set comes from `isa` or `with_isa`, which hold no more than the processor has.
        #[cfg(target_arch = "x86_64")]
        F32Unit::Avx512 => unsafe { avx512(values, block_len, borders, codes, absmax) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        F32Unit::Avx2 => unsafe { avx2(values, block_len, borders, codes, absmax) },
        _ => nibbles_by((values, block_len), borders, (codes, absmax), |values, factor, codes| {
            let mut indices = [0_u8; 64];
            levels(values, Scaling::By(factor), borders, &mut indices);
            for (code, [first, second]) in codes.iter_mut().zip(indices.as_chunks::<2>().0) {
                *code = first << 4 | second;
            }
        }),
    }
}

/// See [`nibbles`]. `whole` takes 64 values by a factor.
#[inline(always)]
fn nibbles_by(
    (values, block_len): (&[f32], usize),
    borders: &[f32; 15],
    (codes, absmax): (&mut [u8], &mut [f32]),
    whole: impl Fn(&[f32; 64], f32, &mut [u8; 32]),
) -> bool {
    // What no value fills at the end holds the index of 0.
    let zero = borders.iter().filter(|border| 0.0 > **border).count() as u8;
    let mut indices = [0_u8; 64];
    let mut finite = true;
    for (block, (values, absmax)) in values.chunks(block_len).zip(absmax).enumerate() {
        let (scaling, scale) = scaling(values, block_len, &mut finite);
        *absmax = scale;
        for (part, values) in values.chunks(indices.len()).enumerate() {
            let at = block * block_len + part * 64;
            if let (Ok(values), Scaling::By(factor), true) = (values.try_into(), scaling, at.is_multiple_of(2))
                && let Some(codes) = codes[at / 2..].first_chunk_mut()
            {
                whole(values, factor, codes);
                continue;
            }
            levels(values, scaling, borders, &mut indices);
            let indices = &indices[..values.len()];
            if at.is_multiple_of(2) {
                let codes = &mut codes[at / 2..];
                let (pairs, single) = indices.as_chunks::<2>();
                for (code, [first, second]) in codes.iter_mut().zip(pairs) {
                    *code = first << 4 | second;
                }
                if let [last] = single {
                    codes[pairs.len()] = last << 4 | zero;
                }
            } else {
                // A block that starts in the middle of a byte.
                for (at, index) in (at..).zip(indices) {
                    let code = &mut codes[at / 2];
                    *code = if at.is_multiple_of(2) { index << 4 | zero } else { *code & 0xF0 | index };
                }
            }
        }
    }
    finite
}

per_isa! {
    /// Blocks of values to indices of 8 bits into any code book; returns whether all values are finite.
    fn bytes(values: &[f32], block_len: usize, borders: &[f32], codes: &mut [u8], absmax: &mut [f32]) -> bool {
        let mut finite = true;
        for ((values, codes), absmax) in values.chunks(block_len).zip(codes.chunks_mut(block_len)).zip(absmax) {
            let (scaling, scale) = scaling(values, block_len, &mut finite);
            *absmax = scale;
            for (code, value) in codes.iter_mut().zip(values) {
                let scaled = match scaling {
                    Scaling::By(factor) => value * factor,
                    Scaling::Over(divisor) => value / divisor,
                };
                *code = borders.partition_point(|border| *border < scaled) as u8;
            }
        }
        finite
    }
}

per_isa! {
    /// `round(x (1 / absmax · 127))`, ties to even, as indices from 0 for -127; returns whether all values are finite.
    fn integers(values: &[f32], block_len: usize, codes: &mut [u8], absmax: &mut [f32]) -> bool {
        // Adding and taking off 1.5 · 2^23 rounds to an integer, ties to even.
        const SHIFT: f32 = 12_582_912.0;
        let mut finite = true;
        for ((values, codes), absmax) in values.chunks(block_len).zip(codes.chunks_mut(block_len)).zip(absmax) {
            *absmax = largest_magnitude(values);
            finite &= absmax.is_finite();
            // Below 3.7e-37 the factor would be infinite; such a block is all zeros, as it is to bitsandbytes.
            let factor = 1.0 / *absmax * 127.0;
            let factor = if factor.is_finite() { factor } else { 0.0 };
            for (value, code) in values.iter().zip(codes) {
                let rounded = (value * factor + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
                *code = (rounded.clamp(-127, 127) + 127) as u8;
            }
        }
        finite
    }
}

/// Mean of the scales.
pub(super) fn mean(absmax: &[f32]) -> f32 {
    (absmax.iter().map(|value| f64::from(*value)).sum::<f64>() / absmax.len().max(1) as f64) as f32
}

/// Scales in 8 bits: less their mean, over blocks, each at the level that bitsandbytes finds.
///
/// Its `quantize_blockwise` on a CPU does not search for the nearest level but looks it up by the nearest of 2^16 places in
/// -1..1 (`csrc/cpu_ops.cpp`, `build_quantize_lut` and `norm_to_lut_index`), so close to zero a level can be another one.
pub(super) fn nested(absmax: &[f32], block: usize, code: &[f32], offset: f32) -> EncodedScales {
    const PLACES: usize = 1 << 16;
    const LAST: f32 = (PLACES - 1) as f32;
    let borders: Vec<f32> = code.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect();
    let value = |place: usize| -1.0 + 2.0 * place as f32 / LAST;
    let mut places = vec![0_u8; PLACES];
    let mut from = 0;
    for (index, border) in borders.iter().enumerate() {
        // Where values above this border begin: about here, and not before.
        let mut to = (((border + 1.0) * 0.5 * LAST) as usize).saturating_sub(2).clamp(from, PLACES);
        while to < PLACES && value(to) <= *border {
            to += 1;
        }
        places[from..to].fill(index as u8);
        from = to;
    }
    places[from..].fill(borders.len() as u8);
    let mut codes = vec![0_u8; absmax.len()];
    let mut scales = Vec::with_capacity(absmax.len().div_ceil(block));
    let mut values = Vec::with_capacity(block);
    for (absmax, codes) in absmax.chunks(block).zip(codes.chunks_mut(block)) {
        values.clear();
        values.extend(absmax.iter().map(|value| value - offset));
        let most = largest_magnitude(&values);
        scales.push(most);
        if most == 0.0 {
            continue; // Any level times zero is right; the first, as theirs.
        }
        let factor = 1.0 / most;
        for (value, code) in values.iter().zip(codes) {
            let scaled = (value * factor).clamp(-1.0, 1.0);
            *code = places[((scaled + 1.0) * 0.5 * LAST + 0.5) as usize];
        }
    }
    EncodedScales::Nested { codes, absmax: scales, offset }
}
