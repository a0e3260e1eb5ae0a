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
        encode: Some(encode::<C>),
        decode: Some(decode::<C>),
    }
}

/// The table, if it is asked for by its name.
///
/// # Safety
/// `name` must be readable during the call.
pub unsafe fn extension(name: Bytes, codec: &'static NativeCodec) -> *const c_void {
    // SAFETY: passed on to the caller.
    let asked = unsafe { name.as_slice() };
    if asked == Some(NATIVE_CODEC.as_bytes()) { (&raw const *codec).cast() } else { std::ptr::null() }
}

/// Lengths of the values and bytes of so many blocks; `None`: no memory holds as many.
const fn lengths<C: Codec>(blocks: usize) -> Option<(usize, usize)> {
    let (Some(values), Some(bytes)) = (blocks.checked_mul(C::BLOCK_LEN), blocks.checked_mul(C::BLOCK_BYTES)) else {
        return None;
    };
    let most = isize::MAX as usize;
    if values > most / size_of::<f32>() || bytes > most { None } else { Some((values, bytes)) }
}

unsafe extern "C" fn encode<C: Codec>(values: *const f32, blocks: usize, bytes: *mut u8) -> i32 {
    let Some((values_len, bytes_len)) = lengths::<C>(blocks) else { return 1 };
    if values.is_null() || bytes.is_null() {
        return i32::from(blocks > 0);
    }
    // SAFETY: the host passes buffers of these sizes, for the call; what no buffer can be was answered above.
    let (values, bytes) =
        unsafe { (std::slice::from_raw_parts(values, values_len), std::slice::from_raw_parts_mut(bytes, bytes_len)) };
    let blocks = values.chunks_exact(C::BLOCK_LEN).zip(bytes.chunks_exact_mut(C::BLOCK_BYTES));
    code(|| blocks.for_each(|(values, bytes)| C::encode(values, bytes)))
}

unsafe extern "C" fn decode<C: Codec>(bytes: *const u8, blocks: usize, values: *mut f32) -> i32 {
    let Some((values_len, bytes_len)) = lengths::<C>(blocks) else { return 1 };
    if values.is_null() || bytes.is_null() {
        return i32::from(blocks > 0);
    }
    // SAFETY: the host passes buffers of these sizes, for the call; what no buffer can be was answered above.
    let (bytes, values) =
        unsafe { (std::slice::from_raw_parts(bytes, bytes_len), std::slice::from_raw_parts_mut(values, values_len)) };
    let blocks = bytes.chunks_exact(C::BLOCK_BYTES).zip(values.chunks_exact_mut(C::BLOCK_LEN));
    code(|| blocks.for_each(|(bytes, values)| C::decode(bytes, values)))
}

/// 1 if `work` panics. What the panic carries is kept: dropping it may panic again.
fn code(work: impl FnOnce()) -> i32 {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(()) => 0,
        Err(payload) => {
            std::mem::forget(payload);
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Twice;

    impl Codec for Twice {
        const NAME: &'static str = "twice";
        const BLOCK_LEN: usize = 2;
        const BLOCK_BYTES: usize = 8;

        fn encode(values: &[f32], bytes: &mut [u8]) {
            assert!(values[0] != 7.0, "as asked");
            for (bytes, value) in bytes.chunks_exact_mut(4).zip(values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }

        fn decode(bytes: &[u8], values: &mut [f32]) {
            for (bytes, value) in bytes.chunks_exact(4).zip(values) {
                *value = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
            }
        }
    }

    /// The host is trusted no further than it has to be.
    #[test]
    fn a_codec_takes_no_null_and_no_length_that_memory_cannot_have() {
        let table = native_codec::<Twice>();
        let (encode, decode) = (table.encode.expect("there is one"), table.decode.expect("there is one"));
        let (values, mut bytes, mut back) = ([1.5_f32, -2.0], [0_u8; 8], [0_f32; 2]);
        let null = (std::ptr::null::<f32>(), std::ptr::null_mut::<u8>());
        // SAFETY: buffers hold one block each; other counts come with null, or are refused before anything is read.
        unsafe {
            assert_eq!(encode(values.as_ptr(), 1, bytes.as_mut_ptr()), 0);
            assert_eq!(decode(bytes.as_ptr(), 1, back.as_mut_ptr()), 0);
            assert_eq!(encode([7.0_f32, 0.0].as_ptr(), 1, bytes.as_mut_ptr()), 1);
            assert_eq!((encode(null.0, 0, null.1), encode(null.0, 1, null.1)), (0, 1));
            for blocks in [usize::MAX, usize::MAX / 2 + 1, 1 << 60, (isize::MAX as usize) / 8 + 1] {
                assert_eq!(encode(values.as_ptr(), blocks, bytes.as_mut_ptr()), 1, "{blocks}");
                assert_eq!(decode(bytes.as_ptr(), blocks, back.as_mut_ptr()), 1, "{blocks}");
            }
        }
        assert_eq!(back, values);
    }

    #[test]
    fn another_extension_or_a_name_at_null_is_none() {
        static TABLE: NativeCodec = native_codec::<Twice>();
        // SAFETY: each name is readable, or cannot be and is not read.
        let asked = |name: Bytes| unsafe { extension(name, &TABLE) };
        assert_eq!(asked(Bytes::of(NATIVE_CODEC.as_bytes())), (&raw const TABLE).cast());
        for name in [
            Bytes::of(b"other/1"),
            Bytes { ptr: std::ptr::null(), len: 23 },
            Bytes { ptr: [0].as_ptr(), len: usize::MAX },
        ] {
            assert!(asked(name).is_null());
        }
    }
}
