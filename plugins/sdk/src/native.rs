//! A codec as functions, for storage that no code book can say; see [`homeroom_abi::native`].

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use homeroom_abi::native::{NATIVE_CODEC, NativeCodec};
use homeroom_abi::table::Bytes;

/// Stores values by blocks. Exported beside the strategy: `export_strategy!(MyStrategy, codec = MyCodec)`, and used by
/// [`crate::Planner::store_natively`].
pub trait Codec {
    /// Name for messages and files.
    const NAME: &'static str;
    /// Values of a block: a power of two, 256 at most.
    const BLOCK_LEN: usize;
    /// Bytes of a block.
    const BLOCK_BYTES: usize;

    /// Encodes one block: [`Codec::BLOCK_LEN`] finite values into [`Codec::BLOCK_BYTES`] bytes.
    fn encode(values: &[f32], bytes: &mut [u8]);

    /// Decodes one block. The same bytes give the same values each time.
    fn decode(bytes: &[u8], values: &mut [f32]);
}

/// The table of a codec.
pub const fn native_codec<C: Codec>() -> NativeCodec {
    assert!(C::BLOCK_LEN.is_power_of_two() && C::BLOCK_LEN <= 256, "a block is a power of two of values, 256 at most");
    assert!(C::BLOCK_BYTES > 0 && C::BLOCK_BYTES <= 4096, "a block takes 1 to 4096 bytes");
    NativeCodec {
        struct_size: size_of::<NativeCodec>() as u32,
        block_len: C::BLOCK_LEN as u32,
        block_bytes: C::BLOCK_BYTES as u32,
        reserved: 0,
        name: Bytes::of(C::NAME.as_bytes()),
        encode: encode::<C>,
        decode: decode::<C>,
    }
}

/// The table, if it is asked for by its name.
///
/// # Safety
/// `name` must be readable during the call.
pub unsafe fn extension(name: Bytes, codec: &'static NativeCodec) -> *const c_void {
    // SAFETY: passed on to the caller.
    let asked = unsafe { name.as_slice() };
    if asked == NATIVE_CODEC.as_bytes() { (&raw const *codec).cast() } else { std::ptr::null() }
}

unsafe extern "C" fn encode<C: Codec>(values: *const f32, blocks: usize, bytes: *mut u8) -> i32 {
    // SAFETY: the host passes buffers of these sizes, for the call.
    let (values, bytes) = unsafe {
        (
            std::slice::from_raw_parts(values, blocks * C::BLOCK_LEN),
            std::slice::from_raw_parts_mut(bytes, blocks * C::BLOCK_BYTES),
        )
    };
    let blocks = values.chunks_exact(C::BLOCK_LEN).zip(bytes.chunks_exact_mut(C::BLOCK_BYTES));
    let done = catch_unwind(AssertUnwindSafe(|| blocks.for_each(|(values, bytes)| C::encode(values, bytes))));
    i32::from(done.is_err())
}

unsafe extern "C" fn decode<C: Codec>(bytes: *const u8, blocks: usize, values: *mut f32) -> i32 {
    // SAFETY: the host passes buffers of these sizes, for the call.
    let (bytes, values) = unsafe {
        (
            std::slice::from_raw_parts(bytes, blocks * C::BLOCK_BYTES),
            std::slice::from_raw_parts_mut(values, blocks * C::BLOCK_LEN),
        )
    };
    let blocks = bytes.chunks_exact(C::BLOCK_BYTES).zip(values.chunks_exact_mut(C::BLOCK_LEN));
    let done = catch_unwind(AssertUnwindSafe(|| blocks.for_each(|(bytes, values)| C::decode(bytes, values))));
    i32::from(done.is_err())
}
