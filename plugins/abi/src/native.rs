//! A codec as functions, where code books over blocks cannot say it: an optional extension, looked up as [`NATIVE_CODEC`].
//!
//! Values are stored by blocks of a fixed number of values in a fixed number of bytes, as ggml's formats are; a row of a weight is
//! a whole number of blocks. An adapter that was trained over such a base needs the plugin to run: its weights cannot be read
//! without it.

use crate::table::Bytes;

/// Name of the extension, of type [`NativeCodec`]. Another number at its end will be another table.
pub const NATIVE_CODEC: &str = "homeroom.native-codec/1";

/// A codec as functions. They may be called from any thread, several at once, and do not unwind. Buffers are the host's, for the
/// call only; those that are read and those that are written do not overlap.
#[repr(C)]
pub struct NativeCodec {
    /// `size_of::<NativeCodec>()` where the plugin was built.
    pub struct_size: u32,
    /// Values of a block: a power of two, 256 at most.
    pub block_len: u32,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Zero.
    pub reserved: u32,
    /// Name for messages and files, UTF-8, static.
    pub name: Bytes,
    /// Encodes `blocks` blocks: reads `blocks * block_len` values, all finite, and writes all of `blocks * block_bytes` bytes. 0: done.
    /// Never null.
    pub encode: Option<Encode>,
    /// Decodes `blocks` blocks: reads `blocks * block_bytes` bytes, which this codec has written, and writes
    /// `blocks * block_len` values. The same bytes give the same values each time. 0: done.
    /// Never null.
    pub decode: Option<Decode>,
}

/// Type of [`NativeCodec::encode`].
pub type Encode = unsafe extern "C" fn(values: *const f32, blocks: usize, bytes: *mut u8) -> i32;
/// Type of [`NativeCodec::decode`].
pub type Decode = unsafe extern "C" fn(bytes: *const u8, blocks: usize, values: *mut f32) -> i32;

// SAFETY: a table is immutable, and its pointers refer to static data of the library that holds it.
unsafe impl Sync for NativeCodec {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[cfg(target_pointer_width = "64")]
    #[test]
    fn table_layout_is_pinned() {
        assert_eq!(offset_of!(NativeCodec, block_len), 4);
        assert_eq!(offset_of!(NativeCodec, block_bytes), 8);
        assert_eq!(offset_of!(NativeCodec, name), 16);
        assert_eq!(offset_of!(NativeCodec, encode), 32);
        assert_eq!(offset_of!(NativeCodec, decode), 40);
        assert_eq!(size_of::<NativeCodec>(), 48);
    }
}
