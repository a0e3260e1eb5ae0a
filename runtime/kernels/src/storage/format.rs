//! How a frozen weight lies in memory: its element type or its block format, and the one routine that turns rows into floats.
//!
//! Block formats are ggml's (`ggml-common.h` and `ggml-quants.c` define them); a row is a whole number of blocks.

/// The storage of a weight's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Storage {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    /// Indices into a code book, see [`crate::Codec`]; a block is a matter of its own.
    Coded,
    /// Blocks of a codec that is given as functions, see [`crate::BlockCodec`].
    Native,
}

impl Storage {
    /// Values in one block; 1 for plain floats.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 | Self::Coded | Self::Native => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Coded | Self::Native => 1,
        }
    }

    /// Bytes of a row of `cols` values; `None` when `cols` is not a whole number of blocks, the size
    /// overflows, or the storage has no rows of a fixed size.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if matches!(self, Self::Coded | Self::Native) || !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }
}

/// The eight scales and minima of Q4_K and Q5_K, six bits each, as bytes.
///
/// # Safety
/// Twelve bytes are readable at `p`.
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
pub(crate) unsafe fn sub_blocks(p: *const u8) -> (u64, u64) {
    // SAFETY: passed on to the caller.
    let [a, b, c] = [0, 1, 2].map(|i| unsafe { p.add(4 * i).cast::<u32>().read_unaligned() });
    // The first four whole, the last four split.
    let (low, split) = (0x3F3F_3F3F, 0x0303_0303);
    let scales = u64::from(a & low) | u64::from((c & 0x0F0F_0F0F) | (a >> 6 & split) << 4) << 32;
    let mins = u64::from(b & low) | u64::from((c >> 4 & 0x0F0F_0F0F) | (b >> 6 & split) << 4) << 32;
    (scales, mins)
}
