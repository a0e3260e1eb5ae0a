//! The C side of a plugin: the descriptor, and the dispatch of calls to a [`Strategy`].

use std::cell::RefCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Once;

use homeroom_abi::describe::{Description, PluginError, Source};
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_abi::step::{StepAnswer, StepRequest};
use homeroom_abi::table::{
    self, ABI_MAJOR, ABI_MINOR, Bytes, Call, Descriptor, EMIT_ERROR, EMIT_RESULT, Emit, FAILED, GetExtension, MAGIC,
    OK, UNKNOWN_METHOD,
};

use crate::strategy::{Strategy, describe, on_step, trace};
use crate::{Error, Result};

thread_local! {
    /// Where the panic on this thread arose; the hook writes it before unwinding starts.
    static PANIC: RefCell<Option<PluginError>> = const { RefCell::new(None) };
}

/// Exports a [`Strategy`] as this library's entry, and with `codec = C` a [`crate::native::Codec`] beside it. Once in a crate,
/// which must be a `cdylib`.
#[macro_export]
macro_rules! export_strategy {
    ($strategy:ty) => {
        $crate::export_strategy!(@entry $strategy, $crate::no_extension);
    };
    ($strategy:ty, codec = $codec:ty) => {
        #[doc(hidden)]
        unsafe extern "C" fn homeroom_extension(name: $crate::abi::table::Bytes) -> *const ::std::ffi::c_void {
            static CODEC: $crate::abi::native::NativeCodec = $crate::native::native_codec::<$codec>();
            // SAFETY: the host keeps `name` readable during the call.
            unsafe { $crate::native::extension(name, &CODEC) }
        }
        $crate::export_strategy!(@entry $strategy, homeroom_extension);
    };
    (@entry $strategy:ty, $extension:expr) => {
        #[doc(hidden)]
        unsafe extern "C" fn homeroom_call(
            method: u32,
            input: $crate::abi::table::Bytes,
            emit: $crate::abi::table::Emit,
            ctx: *mut ::std::ffi::c_void,
        ) -> i32 {
            // SAFETY: the host keeps `input` readable during the call and gives an `emit` that belongs to `ctx`.
            unsafe { $crate::dispatch::<$strategy>(method, input, emit, ctx, env!("CARGO_PKG_VERSION")) }
        }

        /// The entry that a host looks up.
        // SAFETY: the name is this ABI's own, and a library exports one strategy.
        #[unsafe(no_mangle)]
        pub extern "C" fn homeroom_strategy_entry() -> *const $crate::abi::table::Descriptor {
            static DESCRIPTOR: $crate::abi::table::Descriptor = $crate::descriptor(homeroom_call, $extension);
            &DESCRIPTOR
        }
    };
}

/// The descriptor of a plugin built with this SDK.
pub const fn descriptor(call: Call, get_extension: GetExtension) -> Descriptor {
    Descriptor {
        magic: MAGIC,
        struct_size: size_of::<Descriptor>() as u32,
        abi_major: ABI_MAJOR,
        abi_minor: ABI_MINOR,
        sdk_version: Bytes::of(env!("CARGO_PKG_VERSION").as_bytes()),
        rustc: Bytes::of(env!("HOMEROOM_RUSTC").as_bytes()),
        target: Bytes::of(env!("HOMEROOM_TARGET").as_bytes()),
        panic_unwind: cfg!(panic = "unwind") as u32,
        reserved: 0,
        call: Some(call),
        get_extension: Some(get_extension),
    }
}

/// The answer of a plugin without extensions.
///
/// # Safety
/// Any name is fine: it is not read.
pub unsafe extern "C" fn no_extension(_name: Bytes) -> *const c_void {
    std::ptr::null()
}

/// Runs one method of `S` and emits its result, or an error. Never unwinds.
///
/// # Safety
/// `input` must be readable during the call, and `emit` callable with `ctx`.
pub unsafe fn dispatch<S: Strategy>(method: u32, input: Bytes, emit: Emit, ctx: *mut c_void, version: &str) -> i32 {
    static HOOK: Once = Once::new();
    // A plugin has a standard library of its own, so this hook sees the plugin's panics only.
    HOOK.call_once(|| std::panic::set_hook(Box::new(remember_panic)));
    // SAFETY: the caller keeps `input` readable during the call.
    let input = unsafe { input.as_slice() };
    let outcome = catch_unwind(AssertUnwindSafe(|| match input {
        Some(input) => answer::<S>(method, input, version),
        None => Err(Error::new("the host passed an input that cannot be in memory")),
    }));
    let outcome = outcome.unwrap_or_else(|payload| {
        // What a panic carries may panic itself when it is dropped, and this function must not unwind.
        std::mem::forget(payload);
        let error = PANIC.take().unwrap_or(PluginError { message: "panicked".into(), at: None });
        Err(Error(error))
    });
    let (kind, record, code) = match outcome {
        Ok(Some(json)) => (EMIT_RESULT, json, OK),
        Ok(None) => return UNKNOWN_METHOD,
        Err(error) => {
            let json = json::of_error(&error);
            (EMIT_ERROR, json, FAILED)
        }
    };
    // SAFETY: the caller vouches for `emit` and `ctx`; `record` outlives the call.
    unsafe { emit(ctx, kind, Bytes::of(record.as_bytes())) };
    code
}

/// The JSON answer to one method; `None` when there is no such method.
fn answer<S: Strategy>(method: u32, input: &[u8], version: &str) -> Result<Option<String>> {
    Ok(Some(match method {
        table::METHOD_DESCRIBE => json::of_description(&describe::<S>(version))?,
        table::METHOD_PLAN => json::of_plan(&trace::<S>(&json::plan_request(input)?)?)?,
        table::METHOD_ON_STEP => {
            let Some(answer) = on_step::<S>(json::step_request(input)?)? else { return Ok(None) };
            json::of_answer(&answer)?
        }
        _ => return Ok(None),
    }))
}

/// What is the same for every strategy: compiled once with this crate, and not with each build of a plugin.
mod json {
    use homeroom_abi::limits::ERROR_BYTES_MAX;

    use super::{Description, Error, Plan, PlanRequest, Result, StepAnswer, StepRequest};

    fn wrong(error: serde_json::Error) -> Error {
        Error::new(format!("not the JSON that was expected: {error}"))
    }

    pub fn plan_request(json: &[u8]) -> Result<PlanRequest> {
        serde_json::from_slice(json).map_err(wrong)
    }

    pub fn step_request(json: &[u8]) -> Result<StepRequest> {
        serde_json::from_slice(json).map_err(wrong)
    }

    pub fn of_description(description: &Description) -> Result<String> {
        serde_json::to_string(description).map_err(wrong)
    }

    pub fn of_plan(plan: &Plan) -> Result<String> {
        serde_json::to_string(plan).map_err(wrong)
    }

    pub fn of_answer(answer: &StepAnswer) -> Result<String> {
        serde_json::to_string(answer).map_err(wrong)
    }

    pub fn of_error(error: &Error) -> String {
        let mut error = error.0.clone();
        // JSON takes six bytes for a control character.
        let most = ERROR_BYTES_MAX / 8;
        if error.message.len() > most {
            let end = (0..=most).rfind(|end| error.message.is_char_boundary(*end)).unwrap_or(0);
            error.message.truncate(end);
            error.message.push('…');
        }
        serde_json::to_string(&error).unwrap_or_else(|_| "{}".to_owned())
    }
}

fn remember_panic(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let words = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let words = words.or_else(|| payload.downcast_ref::<String>().cloned());
    let message = format!("panicked: {}", words.unwrap_or_else(|| "no message".to_owned()));
    let at = info.location().map(|at| Source { file: at.file().to_owned(), line: at.line() });
    PANIC.set(Some(PluginError { message, at }));
}
