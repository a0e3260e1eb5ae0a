//! One call of a plugin's method, and what the plugin emits meanwhile.
//!
//! The plugin is given no pointer into this program, but a number: what is emitted under one whose call has ended, from another
//! thread or in another thread's time, finds nothing to write to. What is emitted is copied with [`foreign`], bounded in number
//! and size.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use anyhow::{Context, Result, bail};
use homeroom_abi::describe::PluginError;
use homeroom_abi::limits::ERROR_BYTES_MAX;
use homeroom_abi::table::{Bytes, Call, EMIT_ERROR, EMIT_RESULT, FAILED, OK, UNKNOWN_METHOD};

use super::{foreign, text};

/// Calls that have not ended, by their numbers.
static OPEN: Mutex<BTreeMap<usize, Records>> = Mutex::new(BTreeMap::new());

/// What was emitted during a call.
struct Records {
    /// The thread that made the call.
    thread: ThreadId,
    /// Bytes that the result may have.
    result_max: usize,
    result: Option<Vec<u8>>,
    error: Option<Vec<u8>>,
    /// What cannot be taken; the first of it.
    problem: Option<String>,
}

impl Records {
    fn take(&mut self, kind: u32, record: Bytes) {
        // However often it emits after that, nothing is copied any more.
        if self.problem.is_none() {
            self.problem = self.add(kind, record).err();
        }
    }

    fn add(&mut self, kind: u32, record: Bytes) -> Result<(), String> {
        if thread::current().id() != self.thread {
            return Err("it emitted a record from another thread than it was called in".to_owned());
        }
        let (what, most, place) = match kind {
            EMIT_RESULT => ("a result", self.result_max, &mut self.result),
            EMIT_ERROR => ("an error", ERROR_BYTES_MAX, &mut self.error),
            _ => return Err(format!("it emitted a record of kind {kind}, which this ABI does not have")),
        };
        if place.is_some() {
            return Err(format!("it emitted {what} more than once"));
        }
        let copy = foreign::bytes(record.ptr, record.len, most);
        *place = Some(copy.map_err(|error| format!("it emitted {what} that cannot be taken: {error:#}"))?);
        Ok(())
    }
}

/// A call that has not ended. Dropped, its number stands for nothing.
struct Opened(usize);

impl Opened {
    fn new(result_max: usize) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let records = Records { thread: thread::current().id(), result_max, result: None, error: None, problem: None };
        open().insert(number, records);
        Self(number)
    }

    fn close(self) -> Option<Records> {
        open().remove(&self.0)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        open().remove(&self.0);
    }
}

fn open() -> MutexGuard<'static, BTreeMap<usize, Records>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The result of a method, `result_max` bytes at most; `None`: the plugin does not have the method.
///
/// # Errors
/// What the plugin says, with the author's file and line; or what it emitted or returned that it must not.
///
/// # Safety
/// `call` is a plugin's [`Call`], whose library is mapped.
pub unsafe fn ask(call: Call, method: u32, input: &[u8], result_max: usize) -> Result<Option<Vec<u8>>> {
    let opened = Opened::new(result_max);
    let ctx = std::ptr::without_provenance_mut(opened.0);
    // SAFETY: `input` outlives the call; `receive` takes any `ctx`. The SDK turns panics into errors, and builds that abort were
    // refused.
    let code = unsafe { call(method, Bytes::of(input), receive, ctx) };
    let records = opened.close().context("a call is there until it has ended")?;
    if let Some(problem) = records.problem {
        bail!("{problem}");
    }
    match (code, records.error) {
        (OK, _) => Ok(Some(records.result.context("it succeeded without a result")?)),
        (UNKNOWN_METHOD, _) => Ok(None),
        (_, Some(json)) => match serde_json::from_slice::<PluginError>(&json) {
            Ok(error) => bail!("{}", text::error(&error)),
            Err(error) => bail!("it failed, and its error cannot be read: {error}"),
        },
        (FAILED, None) => bail!("it failed and said nothing"),
        (code, None) => bail!("it returned {code}, which this ABI does not have"),
    }
}

/// Takes a record that a plugin emits.
unsafe extern "C" fn receive(ctx: *mut c_void, kind: u32, record: Bytes) {
    // Nothing in there should panic; if it does, the plugin's frames are not unwound.
    let taken = catch_unwind(|| {
        if let Some(records) = open().get_mut(&ctx.addr()) {
            records.take(kind, record);
        }
    });
    std::mem::forget(taken);
}

#[cfg(test)]
mod tests {
    use super::*;
    use homeroom_abi::table::Emit;

    /// Asks a plugin that is one function.
    fn refused(call: Call) -> String {
        // SAFETY: the function is of this test.
        match unsafe { ask(call, 1, b"{}", 100) } {
            Ok(result) => panic!("it was answered {result:?}"),
            Err(error) => format!("{error:#}"),
        }
    }

    macro_rules! plugin {
        (|$emit:ident, $ctx:ident| $body:expr) => {{
            unsafe extern "C" fn call(_: u32, _: Bytes, $emit: Emit, $ctx: *mut c_void) -> i32 {
                #[allow(unused_unsafe)]
                // SAFETY: what is wrong here is what is tested.
                unsafe {
                    $body
                }
            }
            call as Call
        }};
    }

    const NULL: *const u8 = std::ptr::null();

    #[test]
    fn a_record_that_cannot_be_one_fails_the_call() {
        for (call, words) in [
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 1, Bytes { ptr: NULL, len: 10 });
                    0
                }),
                "at null",
            ),
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 1, Bytes { ptr: b"{}".as_ptr(), len: usize::MAX });
                    0
                }),
                "18446744073709551615 bytes, 100 are the most",
            ),
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 1, Bytes { ptr: b"{}".as_ptr(), len: 101 });
                    0
                }),
                "101 bytes, 100 are the most",
            ),
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 2, Bytes { ptr: NULL, len: 1 << 40 });
                    1
                }),
                "an error that cannot be taken",
            ),
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 1, Bytes { ptr: std::ptr::without_provenance(4096), len: 10 });
                    0
                }),
                "cannot be read",
            ),
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 7, Bytes::of(b"{}"));
                    0
                }),
                "a record of kind 7",
            ),
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 1, Bytes::of(b"{}"));
                    emit(ctx, 1, Bytes::of(b"{}"));
                    0
                }),
                "a result more than once",
            ),
            (
                plugin!(|emit, ctx| {
                    emit(ctx, 2, Bytes::of(b"rubbish"));
                    1
                }),
                "its error cannot be read",
            ),
            (plugin!(|_emit, _ctx| 0), "it succeeded without a result"),
            (plugin!(|_emit, _ctx| 1), "it failed and said nothing"),
            (plugin!(|_emit, _ctx| -77), "it returned -77"),
        ] {
            let error = refused(call);
            assert!(error.contains(words), "no `{words}` in: {error}");
        }
    }

    #[test]
    fn a_million_records_are_counted_and_not_kept() {
        let call = plugin!(|emit, ctx| {
            (0..1_000_000).for_each(|_| emit(ctx, 1, Bytes::of(&[b' '; 100])));
            0
        });
        assert!(refused(call).contains("more than once"));
    }

    #[test]
    fn a_record_of_another_thread_or_of_an_ended_call_is_not_taken() {
        static LATE: Mutex<Option<(Emit, usize)>> = Mutex::new(None);
        let call = plugin!(|emit, ctx| {
            *LATE.lock().expect("no test panics with it") = Some((emit, ctx.addr()));
            let ctx = ctx.addr();
            thread::spawn(move || emit(std::ptr::without_provenance_mut(ctx), 1, Bytes::of(b"{}")))
                .join()
                .expect("it ends");
            0
        });
        assert!(refused(call).contains("from another thread"));
        let (emit, ctx) = LATE.lock().expect("no test panics with it").expect("it was called");
        for ctx in [ctx, 0, usize::MAX] {
            // SAFETY: `receive` takes any `ctx`.
            unsafe { emit(std::ptr::without_provenance_mut(ctx), 1, Bytes::of(b"{}")) };
        }
    }

    /// A plugin may call the host while it is in a call of another library.
    #[test]
    fn a_call_in_a_call_gets_its_own_records() {
        let call = plugin!(|emit, ctx| {
            let inner = plugin!(|emit, ctx| {
                emit(ctx, 1, Bytes::of(b"inner"));
                0
            });
            let inner = ask(inner, 1, b"{}", 100).expect("it answers");
            emit(ctx, 1, Bytes::of(&[b"outer of ", &inner.expect("a result")[..]].concat()));
            0
        });
        // SAFETY: the function is of this test.
        let answer = unsafe { ask(call, 1, b"{}", 100) }.expect("it answers");
        assert_eq!(answer.as_deref(), Some(&b"outer of inner"[..]));
    }
}
