//! The C table: what is exported, who owns what, who may call when.
//!
//! A plugin exports one function, named [`ENTRY`], which returns a [`Descriptor`] that lives as long as the library is
//! mapped. A host reads `magic` first, then `struct_size`, then the rest: fields beyond `struct_size` do not exist.

use std::ffi::c_void;

/// First word of a [`Descriptor`]: the bytes `HOMEROOM`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"HOMEROOM");
/// Raised when an existing field or meaning changes. A host refuses any other major.
pub const ABI_MAJOR: u16 = 1;
/// Raised when something is appended. A host accepts a plugin with a smaller or equal minor.
pub const ABI_MINOR: u16 = 1;
/// Name of the exported function, of type [`Entry`].
pub const ENTRY: &str = "homeroom_strategy_entry";

/// Method of [`Descriptor::call`]: no input; emits one [`crate::describe::Description`].
pub const METHOD_DESCRIBE: u32 = 1;
/// Method of [`Descriptor::call`]: a [`crate::plan::PlanRequest`] in; emits one [`crate::plan::Plan`].
pub const METHOD_PLAN: u32 = 2;
/// Method of [`Descriptor::call`], since minor 1: a [`crate::step::StepRequest`] in; emits one [`crate::step::StepAnswer`].
/// [`UNKNOWN_METHOD`]: the strategy wants to hear of no step, and is not asked again. A host waits for a short while only.
pub const METHOD_ON_STEP: u32 = 3;

/// Kind of an emitted record: the method's result, JSON.
pub const EMIT_RESULT: u32 = 1;
/// Kind of an emitted record: a [`crate::describe::PluginError`], JSON.
pub const EMIT_ERROR: u32 = 2;

/// A call succeeded and emitted its result.
pub const OK: i32 = 0;
/// A call failed and emitted one error record.
pub const FAILED: i32 = 1;
/// The method is not known to this plugin; nothing was emitted.
pub const UNKNOWN_METHOD: i32 = 2;

/// Borrowed bytes. Whoever passes them keeps them alive and unchanged until the call returns. `ptr` may be dangling when
/// `len` is 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bytes {
    /// First byte.
    pub ptr: *const u8,
    /// Number of bytes.
    pub len: usize,
}

impl Bytes {
    /// Borrows a slice. The caller sees to it that the result is not used after the slice is gone.
    pub const fn of(slice: &[u8]) -> Self {
        Self { ptr: slice.as_ptr(), len: slice.len() }
    }

    /// The bytes as a slice.
    ///
    /// `None`: they cannot be bytes, because there are some at null, or more than half of all addresses could hold.
    ///
    /// # Safety
    /// If `ptr` is not null, it must point at `len` readable bytes that nobody writes for as long as `'a`.
    pub unsafe fn as_slice<'a>(self) -> Option<&'a [u8]> {
        if self.len == 0 {
            return Some(&[]);
        }
        if self.ptr.is_null() || self.len > isize::MAX as usize {
            return None;
        }
        // SAFETY: the caller vouches for `ptr` and `len`; what no slice can be was answered above.
        Some(unsafe { std::slice::from_raw_parts(self.ptr, self.len) })
    }
}

/// The host's receiver. Called by the plugin, from the thread that made the call, during the call only. It copies what it
/// is given, never keeps the pointer, and does not unwind. What it cannot take fails the call: a record that cannot be read or is
/// longer than [`crate::limits`] has it, a second result, one from another thread. What comes after the call is ignored.
pub type Emit = unsafe extern "C" fn(ctx: *mut c_void, kind: u32, record: Bytes);

/// Runs one method. Blocks; a host makes one call at a time per library. `input` is UTF-8 JSON, borrowed for the call.
/// Returns [`OK`], [`FAILED`] or [`UNKNOWN_METHOD`]; any other number is taken for a failure. Does not unwind: a panic inside becomes an error record.
pub type Call = unsafe extern "C" fn(method: u32, input: Bytes, emit: Emit, ctx: *mut c_void) -> i32;

/// Looks up an optional extension by its versioned name. Null: the plugin does not have it.
pub type GetExtension = unsafe extern "C" fn(name: Bytes) -> *const c_void;

/// What a plugin says of itself before any of its code but the entry has run.
#[repr(C)]
pub struct Descriptor {
    /// [`MAGIC`].
    pub magic: u64,
    /// `size_of::<Descriptor>()` where the plugin was built.
    pub struct_size: u32,
    /// [`ABI_MAJOR`] where the plugin was built.
    pub abi_major: u16,
    /// [`ABI_MINOR`] where the plugin was built.
    pub abi_minor: u16,
    /// Version of the SDK, UTF-8; for messages.
    pub sdk_version: Bytes,
    /// `rustc --version` of the build, UTF-8; for messages.
    pub rustc: Bytes,
    /// Target triple of the build, UTF-8.
    pub target: Bytes,
    /// 1 when panics unwind (and so can be turned into errors), 0 when they abort: such a plugin is refused.
    pub panic_unwind: u32,
    /// Zero.
    pub reserved: u32,
    /// Runs a method. Never null; a host asks before it calls.
    pub call: Option<Call>,
    /// Looks up an extension. Never null.
    pub get_extension: Option<GetExtension>,
}

// SAFETY: a descriptor is immutable, and its pointers refer to static data of the library that holds it.
unsafe impl Sync for Descriptor {}

/// Type of the exported function [`ENTRY`]. It returns the same pointer each time, never null.
pub type Entry = unsafe extern "C" fn() -> *const Descriptor;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// A field that moves breaks every plugin in the field, so the offsets are pinned.
    #[cfg(target_pointer_width = "64")]
    #[test]
    fn descriptor_layout_is_pinned() {
        assert_eq!(offset_of!(Descriptor, struct_size), 8);
        assert_eq!(offset_of!(Descriptor, abi_major), 12);
        assert_eq!(offset_of!(Descriptor, abi_minor), 14);
        assert_eq!(offset_of!(Descriptor, sdk_version), 16);
        assert_eq!(offset_of!(Descriptor, rustc), 32);
        assert_eq!(offset_of!(Descriptor, target), 48);
        assert_eq!(offset_of!(Descriptor, panic_unwind), 64);
        assert_eq!(offset_of!(Descriptor, call), 72);
        assert_eq!(offset_of!(Descriptor, get_extension), 80);
        assert_eq!(size_of::<Descriptor>(), 88);
    }
}
