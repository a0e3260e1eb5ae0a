//! What a strategy cannot say with the SDK: its constructors and destructors, its entry, and what it emits are those of a library that
//! was written by hand, and wrongly.

use std::ffi::c_void;

use homeroom_sdk::abi::native::{NATIVE_CODEC, NativeCodec};
use homeroom_sdk::abi::table::{
    Bytes, Call, Descriptor, EMIT_ERROR, EMIT_RESULT, Emit, FAILED, METHOD_DESCRIBE, METHOD_ON_STEP, METHOD_PLAN, OK,
};
use homeroom_sdk::{descriptor, dispatch};

use crate::{Hostile, asked, misbehave};

/// What is asked for at a stage: `abort` of `entry_abort`.
fn at(stage: &str) -> String {
    asked().strip_prefix(stage).and_then(|how| how.strip_prefix('_')).unwrap_or_default().to_owned()
}

extern "C" fn on_load() {
    misbehave(&at("load"));
}

extern "C" fn on_end() {
    let how = at("end");
    if how == "exit" {
        // SAFETY: it ends the process.
        unsafe { _exit(0) }
    }
    misbehave(&how);
}

unsafe extern "C" {
    fn _exit(code: i32) -> !;
}

// SAFETY: the section holds pointers to functions that take nothing, as the system's loader calls them.
#[cfg_attr(target_os = "linux", unsafe(link_section = ".init_array"))]
#[used]
static ON_LOAD: extern "C" fn() = on_load;
// SAFETY: as above.
#[cfg_attr(target_os = "linux", unsafe(link_section = ".fini_array"))]
#[used]
static ON_END: extern "C" fn() = on_end;

const UNMAPPED: usize = 1 << 16;

fn rubbish<T>() -> *const T {
    std::ptr::without_provenance(UNMAPPED)
}

/// The entry that a host looks up.
// SAFETY: the name is this ABI's own, and a library exports one strategy.
#[unsafe(no_mangle)]
pub extern "C" fn homeroom_strategy_entry() -> *const Descriptor {
    static DESCRIPTOR: Descriptor = descriptor(call, get_extension);
    let changed = |change: fn(&mut Descriptor)| {
        let mut other = descriptor(call, get_extension);
        change(&mut other);
        &raw const *Box::leak(Box::new(other))
    };
    let how = at("entry");
    misbehave(&how);
    match how.as_str() {
        "null" => std::ptr::null(),
        "unmapped" => rubbish(),
        "odd" => (&raw const DESCRIPTOR).wrapping_byte_add(1),
        "last" => std::ptr::without_provenance(usize::MAX - 7),
        "small" => changed(|table| table.struct_size = 12),
        // It is not that large, and the host has no reason to look.
        "large" => changed(|table| table.struct_size = u32::MAX),
        "texts" => changed(|table| {
            let wrong = Bytes { ptr: rubbish(), len: usize::MAX };
            (table.sdk_version, table.rustc, table.target) = (wrong, wrong, wrong);
        }),
        "no_call" => changed(|table| table.call = None),
        "no_extension" => changed(|table| table.get_extension = None),
        "wrong_call" => changed(|table| {
            // SAFETY: there is none: it is no function.
            table.call = Some(unsafe { std::mem::transmute::<*const u8, Call>(rubbish()) });
        }),
        _ => &DESCRIPTOR,
    }
}

unsafe extern "C" fn get_extension(name: Bytes) -> *const c_void {
    let how = at("extension");
    misbehave(&how);
    // SAFETY: the host keeps `name` readable during the call.
    if how.is_empty() || unsafe { name.as_slice() } != Some(NATIVE_CODEC.as_bytes()) {
        return std::ptr::null();
    }
    let mut table = NativeCodec {
        struct_size: size_of::<NativeCodec>() as u32,
        block_len: 32,
        block_bytes: 128,
        reserved: 0,
        name: Bytes::of(b"raw"),
        encode: Some(encode),
        decode: Some(decode),
    };
    match how.as_str() {
        "unmapped" => return rubbish(),
        "odd" => return std::ptr::without_provenance(UNMAPPED + 1),
        "small" => table.struct_size = 4,
        "no_encode" => table.encode = None,
        "no_decode" => table.decode = None,
        "name_null" => table.name = Bytes { ptr: std::ptr::null(), len: 3 },
        "name_long" => table.name.len = usize::MAX,
        "name_escape" => table.name = Bytes::of(b"\x1b[2J"),
        "name_bytes" => table.name = Bytes::of(b"\xff\xfe"),
        "block_odd" => table.block_len = 33,
        "block_large" => table.block_bytes = u32::MAX,
        // Another length than the functions have.
        "short" => table.block_bytes = 64,
        _ => {}
    }
    (&raw const *Box::leak(Box::new(table))).cast()
}

unsafe extern "C" fn encode(values: *const f32, blocks: usize, bytes: *mut u8) -> i32 {
    let how = at("extension");
    // SAFETY: none where it writes beyond; else the buffers hold that many blocks.
    unsafe {
        match how.as_str() {
            "beyond" => bytes.add(blocks * 128 + 40).write(1),
            "before" => bytes.sub(1).write(1),
            "fails" => return 1,
            "nothing" => return 0,
            _ => {}
        }
        std::ptr::copy_nonoverlapping(values.cast::<u8>(), bytes, blocks * 128);
    }
    0
}

unsafe extern "C" fn decode(bytes: *const u8, blocks: usize, values: *mut f32) -> i32 {
    let how = at("extension");
    // SAFETY: none where it writes beyond; else the buffers hold that many blocks.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes, values.cast::<u8>(), blocks * 128);
        match how.as_str() {
            "decode_beyond" => values.add(blocks * 32).write(1.0),
            "decode_other" => (0..blocks * 32).for_each(|i| *values.add(i) *= 9.0),
            "decode_nan" => values.write(f32::NAN),
            _ => {}
        }
    }
    0
}

unsafe extern "C" fn call(method: u32, input: Bytes, emit: Emit, ctx: *mut c_void) -> i32 {
    let how = match method {
        METHOD_DESCRIBE => at("describe"),
        METHOD_PLAN => at("emit"),
        METHOD_ON_STEP => at("step"),
        _ => String::new(),
    };
    misbehave(&how);
    if let ("named", METHOD_DESCRIBE) = (asked().split('_').next().unwrap_or_default(), method) {
        let about = format!(r#"{{"name":"{}","version":"1","doc":"another of many","options":[]}}"#, at("named"));
        // SAFETY: `emit` belongs to `ctx`, and the record is there until it returns.
        unsafe { emit(ctx, EMIT_RESULT, Bytes::of(about.as_bytes())) };
        return OK;
    }
    // SAFETY: `emit` belongs to `ctx`. What is passed to it is what is wrong.
    if let Some(code) = unsafe { emitted(&how, method, emit, ctx) } {
        return code;
    }
    // SAFETY: passed on to the host.
    unsafe { dispatch::<Hostile>(method, input, emit, ctx, "0.1.0") }
}

/// Emits something wrong, and says what is returned; `None`: nothing is wrong.
///
/// # Safety
/// `emit` is callable with `ctx`.
unsafe fn emitted(how: &str, method: u32, emit: Emit, ctx: *mut c_void) -> Option<i32> {
    // SAFETY: the caller vouches for `emit`; a host has to look at what it is given.
    let say = |kind, ptr, len| unsafe { emit(ctx, kind, Bytes { ptr, len }) };
    let text = |kind, text: &str| say(kind, text.as_ptr(), text.len());
    let code = match how {
        "null" => {
            say(EMIT_RESULT, std::ptr::null(), 10);
            OK
        }
        "length" => {
            say(EMIT_RESULT, b"{}".as_ptr(), usize::MAX);
            OK
        }
        "half" => {
            say(EMIT_RESULT, b"{}".as_ptr(), isize::MAX as usize + 1);
            OK
        }
        "unmapped" => {
            say(EMIT_RESULT, rubbish(), 100);
            OK
        }
        "error_null" => {
            say(EMIT_ERROR, std::ptr::null(), 1 << 20);
            FAILED
        }
        "large" => {
            let spaces = vec![b' '; 100 << 20];
            say(EMIT_RESULT, spaces.as_ptr(), spaces.len());
            OK
        }
        "bytes" => {
            say(EMIT_RESULT, b"\xff\xfe\xfd".as_ptr(), 3);
            OK
        }
        "nothing" => OK,
        "code" => 77,
        "unknown" => 2,
        "kind" => {
            text(99, "{}");
            OK
        }
        "twice" => {
            text(EMIT_RESULT, "{}");
            text(EMIT_RESULT, "{}");
            OK
        }
        "many" => {
            (0..3_000_000).for_each(|_| text(EMIT_RESULT, "{}"));
            OK
        }
        "thread" => {
            let ctx = ctx.addr();
            let other = std::thread::spawn(move || {
                // SAFETY: as above; that it is another thread is what is wrong.
                unsafe { emit(std::ptr::without_provenance_mut(ctx), EMIT_RESULT, Bytes::of(b"{}")) }
            });
            drop(other.join());
            OK
        }
        "late" => {
            let ctx = ctx.addr();
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(5));
                // SAFETY: as above; that the call has ended is what is wrong.
                unsafe { emit(std::ptr::without_provenance_mut(ctx), EMIT_RESULT, Bytes::of(b"{}")) }
            });
            return None;
        }
        "deep" => {
            let (open, close) = ("[".repeat(100_000), "]".repeat(100_000));
            match method {
                METHOD_DESCRIBE => text(
                    EMIT_RESULT,
                    &format!(
                        r#"{{"name":"hostile","version":"1","doc":"d","options":[{{"name":"o","kind":"map","doc":"d","default":{open}{close}}}]}}"#
                    ),
                ),
                METHOD_PLAN => text(
                    EMIT_RESULT,
                    &format!(
                        r#"{{"modules":[],"recipes":[],"peft":{{"peft_type":"LORA","fields":{{"x":{open}{close}}}}}}}"#
                    ),
                ),
                _ => text(EMIT_RESULT, &format!(r#"{{"directives":[],"state":{open}{close}}}"#)),
            }
            OK
        }
        "options" => {
            let options = r#"{"name":"o","kind":"int","default":1,"doc":"d"},"#.repeat(2000);
            let options = options.trim_end_matches(',');
            text(EMIT_RESULT, &format!(r#"{{"name":"hostile","version":"1","doc":"d","options":[{options}]}}"#));
            OK
        }
        "name" => {
            text(EMIT_RESULT, r#"{"name":"hos\u001b[2Jtile","version":"1","doc":"d","options":[]}"#);
            OK
        }
        "escapes" => {
            text(
                EMIT_RESULT,
                r#"{"name":"hostile","version":"1\u001b[1m","doc":"d\u001b]0;owned\u0007\u009b2J","options":[
                    {"name":"how","kind":"string","default":"well\u001b[31m","doc":"e\u001b[31m\u202e"}]}"#,
            );
            OK
        }
        "directives" => {
            let all = r#"{"learning_rate_scale":1.0},"#.repeat(5000);
            text(EMIT_RESULT, &format!(r#"{{"directives":[{}]}}"#, all.trim_end_matches(',')));
            OK
        }
        "scale" => {
            text(EMIT_RESULT, r#"{"directives":[{"learning_rate_scale":1e999}]}"#);
            OK
        }
        "pattern" => {
            let pattern = "*".repeat(100_000);
            text(EMIT_RESULT, &format!(r#"{{"directives":[{{"freeze":"{pattern}"}}]}}"#));
            OK
        }
        "escape" => {
            text(EMIT_RESULT, r#"{"directives":[{"freeze":"\u001b[2J"}]}"#);
            OK
        }
        _ => return None,
    };
    Some(code)
}
