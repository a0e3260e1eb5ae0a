//! Where a script was at its last call, return or turn of a loop. Of values that are too large the machine does not say at which line they
//! were made: it has no memory left to say it with. So the line is noted before, each time, without any.
//!
//! The machine calls its interrupt at these places anyway. Here that is a function of our own, which notes the line and looks at two flags;
//! only where one of them is set does it call the one that the binding provides, which costs several times as much.

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::Arc;

use mlua::{Lua, ffi, lua_State};

use super::clock::Clock;

/// Longest name of a file that is noted, with the zero behind it: Luau's LUA_IDSIZE, the most of `short_src`.
const NAME_BYTES_MAX: usize = 256;

type Interrupt = unsafe extern "C-unwind" fn(*mut lua_State, c_int);

/// What is known of this thread's machine, which has a thread of its own.
struct Noted {
    clock: RefCell<Option<Arc<Clock>>>,
    /// The binding's.
    interrupt: Cell<Option<Interrupt>>,
    /// The name of the script's file, ended by a zero, and the line; 0: there is none yet.
    name: Cell<[u8; NAME_BYTES_MAX]>,
    line: Cell<c_int>,
}

thread_local! {
    static NOTED: Noted = const {
        Noted {
            clock: RefCell::new(None),
            interrupt: Cell::new(None),
            name: Cell::new([0; NAME_BYTES_MAX]),
            line: Cell::new(0),
        }
    };
}

/// Notes lines from now on, and calls the machine's interrupt, which has just been set, only where the clock has something to say. A machine
/// is begun once, and of several on a thread the last counts.
pub fn begin(lua: &Lua, clock: Arc<Clock>) -> mlua::Result<()> {
    NOTED.with(|noted| {
        noted.clock.replace(Some(clock));
        noted.line.set(0);
    });
    // SAFETY: the callbacks of a machine live as long as it does, and belong to this thread. Nothing is left on the stack.
    unsafe {
        lua.exec_raw((), |state| {
            let callbacks = ffi::lua_callbacks(state);
            NOTED.with(|noted| noted.interrupt.set((*callbacks).interrupt));
            (*callbacks).interrupt = Some(interrupt);
        })
    }
}

/// `FILE:LINE: ` of where the script was; empty: nowhere yet.
pub fn place() -> String {
    NOTED.with(|noted| {
        let (name, line) = (noted.name.get(), noted.line.get());
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        if line == 0 { String::new() } else { format!("{}:{line}: ", String::from_utf8_lossy(name)) }
    })
}

/// # Safety
/// Called by the machine, and by what looks at the time within library functions.
unsafe extern "C-unwind" fn interrupt(state: *mut lua_State, gc: c_int) {
    if gc >= 0 {
        return;
    }
    let binding = NOTED.with(|noted| {
        // SAFETY: the machine gives a valid state.
        unsafe { note(state, noted) };
        let is_quiet = noted.clock.borrow().as_ref().is_some_and(|clock| clock.is_quiet());
        noted.interrupt.get().filter(|_| !is_quiet)
    });
    if let Some(binding) = binding {
        // SAFETY: it is the interrupt of this machine's binding, called as the machine would. It may raise an error, which is a C++ exception:
        // nothing here has a destructor.
        unsafe { binding(state, gc) }
    }
}

/// Notes the line of the function that runs, if it is a script's: the line at which a library's own was called has been noted then.
///
/// # Safety
/// `state` is valid.
unsafe fn note(state: *mut lua_State, noted: &Noted) {
    let mut frame = MaybeUninit::<ffi::lua_Debug>::uninit();
    // SAFETY: with "sl" `lua_getinfo` writes the source and the line if there is a frame, and then returns 1. It allocates nothing and raises
    // nothing. `short_src` ends with a zero, within LUA_IDSIZE bytes, and lies in `frame` or in the name of the chunk, which lives while its
    // function runs.
    unsafe {
        if ffi::lua_getinfo(state, 0, c"sl".as_ptr(), frame.as_mut_ptr()) == 0 {
            return;
        }
        let frame = frame.as_ptr();
        // The binding and the prelude have chunks of their own, which are no files.
        if *(*frame).source.cast::<u8>() != b'@' {
            return;
        }
        let (from, to) = ((*frame).short_src.cast::<u8>(), noted.name.as_ptr().cast::<u8>());
        for at in 0..NAME_BYTES_MAX {
            *to.add(at) = *from.add(at);
            if *from.add(at) == 0 {
                break;
            }
        }
        noted.line.set((*frame).currentline);
    }
}
