//! Rows of f32 to ggml's blocks, the way back of [`rows`](super::rows): the bytes that `quantize_row_*_ref` of `ggml-quants.c` writes
//! without an importance matrix, bit by bit.
//!
//! Each sum and each comparison takes its values in ggml's order, as f32 and never fused. What is vectorised are blocks that lie beside
//! each other, one a lane, so a row's bytes depend on the row alone.

mod blocks;
mod super_blocks;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::format::Storage;
use crate::buffer::grown;
use crate::element::Element;
use crate::isa::{isa, per_isa};
use crate::pool::{Shared, for_ranges};

/// Values of a chunk that is encoded at once, roughly: as floats they stay in the second cache.
const CHUNK: usize = 1 << 14;

/// Encodes one row, or several beside each other that are whole blocks each, from f32 to a storage of floats or of ggml's blocks.
///
/// Returns whether what was written can be decoded: a value that is not finite, or too large for the floats or the scales of the
/// storage, cannot.
///
/// # Panics
/// When `bytes` is not `storage.row_bytes(values.len())` long.
pub fn encode_row(storage: Storage, values: &[f32], bytes: &mut [u8]) -> bool {
    assert_eq!(storage.row_bytes(values.len()), Some(bytes.len()), "{storage:?}: bytes for {} values", values.len());
    let isa = isa();
    // Squares of larger values would overflow on the way to a scale.
    let most = if storage == Storage::Q6K { 65_504.0 * 128.0 * 32.0 } else { f32::MAX };
    let fits = magnitude(isa, values) <= most;
    match storage {
        Storage::F32 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
        }
        Storage::F16 => f16s(values, bytes),
        _ => encode(isa, storage, values, bytes),
    }
    fits && are_finite(isa, storage, bytes)
}

/// Encodes a matrix (rows, cols) into `bytes`, on all threads. `values` writes the f32 values of some rows; it is called from all
/// threads.
///
/// # Errors
/// When a value cannot be stored so; the message names the first such row, and the value.
///
/// # Panics
/// When a row is not whole blocks, or `bytes` is not as long as its rows.
pub fn encode_rows(
    storage: Storage,
    (rows, cols): (usize, usize),
    values: &(dyn Fn(Range<usize>, &mut [f32]) + Sync),
    bytes: &mut [u8],
) -> Result<(), String> {
    thread_local!(static VALUES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    let row_bytes = storage.row_bytes(cols).expect("a row is whole blocks");
    assert_eq!(row_bytes * rows, bytes.len(), "{storage:?}: bytes for {rows} rows of {cols} values");
    let problem = Mutex::new(None::<(usize, f32)>);
    let shared = Shared::new(bytes);
    for_ranges(rows, (CHUNK / cols.max(1)).max(1), |range| {
        VALUES.with_borrow_mut(|buffer| {
            let buffer = grown(buffer, range.len() * cols);
            values(range.clone(), buffer);
            // SAFETY: no two tasks have a row in common, and the buffer outlives them.
            let bytes = unsafe { shared.slice(range.start * row_bytes, range.len() * row_bytes) };
            if encode_row(storage, buffer, bytes) {
                return;
            }
            // Again, row by row, to say which one it was.
            for (row, (values, bytes)) in buffer.chunks(cols).zip(bytes.chunks_mut(row_bytes)).enumerate() {
                if !encode_row(storage, values, bytes) {
                    let largest = values.iter().copied().find(|value| !value.is_finite());
                    let largest = largest.unwrap_or_else(|| {
                        values.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(0.0)
                    });
                    let mut problem = problem.lock().unwrap_or_else(PoisonError::into_inner);
                    if problem.is_none_or(|(other, _)| range.start + row < other) {
                        *problem = Some((range.start + row, largest));
                    }
                    break;
                }
            }
        });
    });
    match problem.into_inner().unwrap_or_else(PoisonError::into_inner) {
        None => Ok(()),
        Some((row, value)) if !value.is_finite() => Err(format!("row {row} holds {value}, which is no number")),
        Some((row, value)) => Err(format!("row {row} holds {value:e}, which is too large for {storage:?}")),
    }
}

/// f16, rounded to nearest, ties to even; what is too large becomes infinite.
fn f16s(values: &[f32], bytes: &mut [u8]) {
    let mut rounded = [f16::ZERO; 256];
    for (values, bytes) in values.chunks(rounded.len()).zip(bytes.chunks_mut(2 * rounded.len())) {
        let rounded = &mut rounded[..values.len()];
        rounded.convert_from_f32_slice(values);
        for (rounded, bytes) in rounded.iter().zip(bytes.as_chunks_mut().0) {
            *bytes = rounded.to_le_bytes();
        }
    }
}

per_isa! {
    fn encode(storage: Storage, values: &[f32], bytes: &mut [u8]) {
        match storage {
            Storage::Q4_0 => each(values, bytes, blocks::q4_0),
            Storage::Q4_1 => each(values, bytes, blocks::q4_1),
            Storage::Q5_0 => each(values, bytes, blocks::q5_0),
            Storage::Q5_1 => each(values, bytes, blocks::q5_1),
            Storage::Q8_0 => each(values, bytes, blocks::q8_0),
            Storage::Q4K => super_blocks::q4_k(values, bytes),
            Storage::Q5K => super_blocks::q5_k(values, bytes),
            Storage::Q6K => each(values, bytes, super_blocks::q6_k),
            Storage::BF16 => {
                for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = bf16::of(*value).to_le_bytes();
                }
            }
            Storage::F32 | Storage::F16 => unreachable!("`encode_row` writes them"),
            Storage::Coded | Storage::Native => unreachable!("`encode_row` saw that it has rows of a fixed size"),
        }
    }
}

/// Calls `block` with the values and the bytes of each block in turn.
#[inline(always)]
fn each<const L: usize, const B: usize>(values: &[f32], bytes: &mut [u8], block: impl Fn(&[f32; L], &mut [u8; B])) {
    for (x, b) in values.as_chunks().0.iter().zip(bytes.as_chunks_mut().0) {
        block(x, b);
    }
}

per_isa! {
    /// The largest magnitude; of values that are not finite that of one of them. Those of floats are ordered as their bits are.
    fn magnitude(values: &[f32]) -> f32 {
        let (chunks, rest) = values.as_chunks::<32>();
        let mut most = [0; 32];
        for chunk in chunks {
            for (most, value) in most.iter_mut().zip(chunk) {
                *most = (*most).max(value.to_bits() & 0x7FFF_FFFF);
            }
        }
        let rest = rest.iter().map(|value| value.to_bits() & 0x7FFF_FFFF);
        f32::from_bits(most.into_iter().chain(rest).fold(0, u32::max))
    }
}

per_isa! {
    /// Whether the scales of blocks, or the values of floats, are finite.
    fn are_finite(storage: Storage, bytes: &[u8]) -> bool {
        match storage {
            // What it was made of is.
            Storage::F32 | Storage::Coded | Storage::Native => true,
            Storage::BF16 => halves(bytes, 0x7F80),
            Storage::F16 => halves(bytes, 0x7C00),
            Storage::Q4_0 => scales::<18>(bytes, [0]),
            Storage::Q4_1 => scales::<20>(bytes, [0, 2]),
            Storage::Q5_0 => scales::<22>(bytes, [0]),
            Storage::Q5_1 => scales::<24>(bytes, [0, 2]),
            Storage::Q8_0 => scales::<34>(bytes, [0]),
            Storage::Q4K => scales::<144>(bytes, [0, 2]),
            Storage::Q5K => scales::<176>(bytes, [0, 2]),
            Storage::Q6K => scales::<210>(bytes, [208]),
        }
    }
}

/// Whether no half has all of these bits.
#[inline(always)]
fn halves(bytes: &[u8], exponent: u16) -> bool {
    bytes
        .as_chunks()
        .0
        .iter()
        .fold(0, |wrong, half| wrong | u16::from(u16::from_le_bytes(*half) & exponent == exponent))
        == 0
}

/// Whether no f16 at these offsets of blocks of B bytes is other than finite.
#[inline(always)]
fn scales<const B: usize>(bytes: &[u8], at: impl IntoIterator<Item = usize> + Copy) -> bool {
    let finite = |block: &[u8; B], at: usize| block[at + 1] & 0x7C != 0x7C;
    bytes.as_chunks().0.iter().all(|block| at.into_iter().all(|at| finite(block, at)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, with_isa};
    use crate::storage::rows::decode_row;

    macro_rules! file {
        ($name:literal) => {
            include_bytes!(concat!("../../../../../tests/fixtures/ggml/", $name, ".bin"))
        };
    }

    /// Rows of 256 values, as `make_quantized.py` writes them.
    fn rows() -> Vec<f32> {
        file!("values").as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
    }

    const FILES: [(Storage, &[u8]); 10] = [
        (Storage::F16, file!("quantized_f16")),
        (Storage::BF16, file!("quantized_bf16")),
        (Storage::Q4_0, file!("quantized_q4_0")),
        (Storage::Q4_1, file!("quantized_q4_1")),
        (Storage::Q5_0, file!("quantized_q5_0")),
        (Storage::Q5_1, file!("quantized_q5_1")),
        (Storage::Q8_0, file!("quantized_q8_0")),
        (Storage::Q4K, file!("quantized_q4_k")),
        (Storage::Q5K, file!("quantized_q5_k")),
        (Storage::Q6K, file!("quantized_q6_k")),
    ];

    #[test]
    fn encoding_equals_ggml_byte_by_byte_on_every_processor() {
        let values = rows();
        for isa in Isa::tested() {
            for (storage, want) in FILES {
                let mut bytes = vec![0xAA; want.len()];
                assert!(with_isa(isa, || encode_row(storage, &values, &mut bytes)), "{storage:?}");
                assert_eq!(bytes, want, "{storage:?} by {isa:?}");
            }
        }
    }

    #[test]
    fn a_row_has_the_bytes_that_it_has_alone() {
        let (values, cols) = (rows(), 256);
        for (storage, want) in FILES {
            let row_bytes = storage.row_bytes(cols).unwrap();
            let mut alone = vec![0; row_bytes];
            for (row, want) in values.chunks(cols).zip(want.chunks(row_bytes)) {
                assert!(encode_row(storage, row, &mut alone));
                assert_eq!(alone, want, "{storage:?}");
            }
            // As rows of other lengths, on all threads.
            for cols in [512, 1280] {
                let mut bytes = vec![0; want.len()];
                let read = |rows: Range<usize>, out: &mut [f32]| {
                    out.copy_from_slice(&values[rows.start * cols..rows.end * cols]);
                };
                encode_rows(storage, (values.len() / cols, cols), &read, &mut bytes).unwrap();
                assert_eq!(bytes, want, "{storage:?}: rows of {cols}");
            }
        }
    }

    #[test]
    fn what_was_decoded_is_encoded_to_the_same_values() {
        for (storage, bytes) in FILES {
            // The best scales of what lies on levels need not be those that it was made with in these.
            if matches!(storage, Storage::Q4K | Storage::Q5K | Storage::Q6K) {
                continue;
            }
            let mut values = vec![0.0; rows().len()];
            decode_row(storage, bytes, &mut values);
            let mut again = vec![0; bytes.len()];
            assert!(encode_row(storage, &values, &mut again));
            let mut decoded = vec![0.0; values.len()];
            decode_row(storage, &again, &mut decoded);
            let apart = values.iter().zip(&decoded).map(|(a, b)| (a - b).abs() / a.abs().max(1e-4)).fold(0.0, f32::max);
            assert!(apart < 2e-3, "{storage:?}: {apart}");
        }
    }

    #[test]
    fn a_value_that_cannot_be_stored_is_refused_with_its_row() {
        let refused = |storage: Storage, value: f32| {
            let read = |rows: Range<usize>, out: &mut [f32]| {
                for (row, out) in rows.zip(out.chunks_mut(256)) {
                    out.fill(0.25);
                    out[77] = if row >= 131 { value } else { 1.0 };
                }
            };
            let mut bytes = vec![0; 140 * storage.row_bytes(256).unwrap()];
            encode_rows(storage, (140, 256), &read, &mut bytes).unwrap_err()
        };
        for (storage, _) in FILES {
            for (value, word) in [(f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf"), (f32::NAN, "NaN")] {
                assert_eq!(refused(storage, value), format!("row 131 holds {word}, which is no number"));
            }
            assert_eq!(
                refused(storage, -f32::MAX),
                format!("row 131 holds -3.4028235e38, which is too large for {storage:?}")
            );
        }
        let read = |_: Range<usize>, out: &mut [f32]| out.fill(f32::MAX);
        assert_eq!(encode_rows(Storage::F32, (1, 3), &read, &mut [0; 12]), Ok(()));
    }
}
