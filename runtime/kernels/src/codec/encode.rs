//! Values to indices, a few rows at a time: the whole matrix is never there as floats.
//!
//! From f32 the result is that of bitsandbytes 0.50 on a CPU: `quantize_4bit` for blocks of 4-bit indices (each value times
//! `1 / absmax`, in the last, shorter block divided by it; a value on the border between two levels takes the lower),
//! `quantize_blockwise` for nested scales, `int8_vectorwise_quant` for rows of integers. Only the mean that is taken off
//! nested scales is summed in another order.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Mutex;

use super::{Codec, CodecBlock, Encoded, EncodedScales, ScaleStorage};
use crate::cpu::{Cpu, cpu, per_cpu};
use crate::element::largest;
use crate::pool::{Shared, for_each};
use crate::product::grown;

/// Values of a chunk that one task encodes, roughly.
const CHUNK: usize = 1 << 17;

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
    // Rows whose values are whole blocks and whole bytes.
    let whole = match codec.block {
        CodecBlock::Row => 2 / gcd(2, cols.max(1)),
        CodecBlock::Flat(len) => {
            let len = len * 2 / gcd(2, len);
            len / gcd(len, cols.max(1))
        }
    };
    let chunk = (CHUNK / cols.max(1)).max(1).next_multiple_of(whole);
    let problem = Mutex::new(None::<usize>);
    let (cpu, linear, borders) = (cpu(), codec.is_linear(), borders(&codec.code));
    let (shared_codes, shared_absmax) = (Shared::new(&mut codes), Shared::new(&mut absmax));
    for_each(rows.div_ceil(chunk), |task| {
        let range = task * chunk..rows.min((task + 1) * chunk);
        let (at, count) = (range.start * cols, range.len() * cols);
        VALUES.with_borrow_mut(|buffer| {
            let buffer = grown(buffer, count);
            values(range.clone(), buffer);
            if let Some(wrong) = buffer.iter().position(|value| !value.is_finite()) {
                let row = range.start + wrong / cols;
                let mut problem = problem.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                *problem = Some(problem.map_or(row, |other| other.min(row)));
                return;
            }
            // SAFETY: a chunk starts on whole blocks and whole bytes and ends there or with the matrix, so no two tasks have
            // an index byte or a scale in common; both buffers outlive the tasks.
            let (codes, absmax) = unsafe {
                let first = if codec.bits == 4 { at / 2 } else { at };
                let codes = shared_codes.slice(first, codec.code_bytes(count));
                (codes, shared_absmax.slice(at / block_len, count.div_ceil(block_len)))
            };
            for (block, (values, absmax)) in buffer.chunks(block_len).zip(absmax).enumerate() {
                let from = block * block_len;
                if linear {
                    *absmax = largest_magnitude(cpu, values);
                    integers(cpu, values, *absmax, &mut codes[from..from + values.len()]);
                } else {
                    let short = values.len() < block_len;
                    *absmax = one_block(cpu, codec.bits, values, short, &borders, from, codes);
                }
            }
        });
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

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The middles between neighbouring levels.
fn borders(code: &[f32]) -> Vec<f32> {
    code.windows(2).map(|pair| ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32).collect()
}

/// Encodes one block and returns its scale.
fn one_block(cpu: Cpu, bits: u8, values: &[f32], short: bool, borders: &[f32], from: usize, codes: &mut [u8]) -> f32 {
    const LEAST: f32 = 1e-38;
    let absmax = largest_magnitude(cpu, values);
    let clamped = absmax.max(LEAST);
    let mut indices = [0_u8; 256];
    let mut done = 0;
    for values in values.chunks(indices.len()) {
        let indices = &mut indices[..values.len()];
        if short {
            levels(cpu, values, clamped, true, borders, indices);
        } else {
            levels(cpu, values, 1.0 / clamped, false, borders, indices);
        }
        if bits == 8 {
            codes[from + done..from + done + indices.len()].copy_from_slice(indices);
        } else if (from + done).is_multiple_of(2) {
            let codes = &mut codes[(from + done) / 2..];
            let (pairs, single) = indices.as_chunks::<2>();
            for (code, [first, second]) in codes.iter_mut().zip(pairs) {
                *code = first << 4 | second;
            }
            if let [last] = single {
                // What no value fills holds the index of 0.
                let zero = borders.iter().filter(|border| 0.0 > **border).count() as u8;
                codes[pairs.len()] = last << 4 | zero;
            }
        } else {
            // A block that starts in the middle of a byte.
            for (i, index) in indices.iter().enumerate() {
                let at = from + done + i;
                let code = &mut codes[at / 2];
                *code = if at.is_multiple_of(2) { index << 4 } else { *code & 0xF0 | index };
            }
        }
        done += values.len();
    }
    if short { clamped } else { absmax }
}

per_cpu! {
    fn largest_magnitude(values: &[f32]) -> f32 {
        let mut most = 0f32;
        let (chunks, rest) = values.as_chunks::<16>();
        let mut lanes = [0f32; 16];
        for chunk in chunks {
            for lane in 0..16 {
                let magnitude = chunk[lane].abs();
                lanes[lane] = if magnitude > lanes[lane] { magnitude } else { lanes[lane] };
            }
        }
        most = most.max(largest(&lanes));
        for value in rest {
            most = most.max(value.abs());
        }
        most
    }
}

per_cpu! {
    /// The number of borders below each value, once it is scaled: by a factor, or by a divisor.
    fn levels(values: &[f32], scale: f32, divide: bool, borders: &[f32], indices: &mut [u8]) {
        let (chunks, rest) = values.as_chunks::<16>();
        let (outs, out_rest) = indices.as_chunks_mut::<16>();
        for (values, out) in chunks.iter().zip(outs) {
            let mut scaled = [0f32; 16];
            let mut counts = [0_u32; 16];
            for lane in 0..16 {
                scaled[lane] = if divide { values[lane] / scale } else { values[lane] * scale }.clamp(-1.0, 1.0);
            }
            for border in borders {
                for lane in 0..16 {
                    counts[lane] += u32::from(scaled[lane] > *border);
                }
            }
            for lane in 0..16 {
                out[lane] = counts[lane] as u8;
            }
        }
        for (value, index) in rest.iter().zip(out_rest) {
            let scaled = if divide { value / scale } else { value * scale }.clamp(-1.0, 1.0);
            *index = borders.iter().filter(|border| scaled > **border).count() as u8;
        }
    }
}

per_cpu! {
    /// `round(x (1 / absmax · 127))`, ties to even, as indices from 0 for -127.
    fn integers(values: &[f32], absmax: f32, codes: &mut [u8]) {
        // Adding and taking off 1.5 · 2^23 rounds to an integer, ties to even.
        const SHIFT: f32 = 12_582_912.0;
        let factor = if absmax > 0.0 { 1.0 / absmax * 127.0 } else { 0.0 };
        for (value, code) in values.iter().zip(codes) {
            let rounded = (value * factor + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
            *code = (rounded.clamp(-127, 127) + 127) as u8;
        }
    }
}

/// Mean of the scales.
pub(super) fn mean(absmax: &[f32]) -> f32 {
    (absmax.iter().map(|value| f64::from(*value)).sum::<f64>() / absmax.len().max(1) as f64) as f32
}

/// Scales in 8 bits: less their mean, over blocks, each the nearest level as bitsandbytes finds it.
pub(super) fn nested(absmax: &[f32], block: usize, code: &[f32], offset: f32) -> EncodedScales {
    let mut codes = vec![0_u8; absmax.len()];
    let mut scales = Vec::with_capacity(absmax.len().div_ceil(block));
    for (values, codes) in absmax.chunks(block).zip(codes.chunks_mut(block)) {
        let most = values.iter().map(|value| (value - offset).abs()).fold(0f32, f32::max);
        for (value, index) in values.iter().zip(codes) {
            // Where all are the mean, any level times zero is right; bitsandbytes takes the first.
            let normed = if most > 0.0 { (value - offset) / most } else { -1.0 };
            // bitsandbytes looks the level up in a table of 2^16 places; so what counts is the place, not the value.
            const PLACES: f32 = 65_535.0;
            let place = ((normed + 1.0) * (PLACES / 2.0) + 0.5).floor();
            let normed = f64::from(place) / f64::from(PLACES / 2.0) - 1.0;
            let right = code.partition_point(|level| f64::from(*level) <= normed);
            let left = right.saturating_sub(1);
            let distance = |at: usize| (normed - f64::from(code[at])).abs();
            *index = if right < code.len() && distance(right) < distance(left) { right } else { left } as u8;
        }
        scales.push(most);
    }
    EncodedScales::Nested { codes, absmax: scales, offset }
}
