//! Bounds on Luau's own libraries. The machine looks at the time between instructions of Lua, and a library function is one
//! instruction, however long it takes.
//!
//! Every function whose work grows with its arguments looks at the time when it begins, so that one that is called again and
//! again by another (a comparator of `table.sort`, a metamethod of `table.find`) is stopped. What one call can do is then bounded
//! by the memory that values take, as long as its work grows no faster than they do. Where it does, the function is replaced
//! here: `string.find` of plain text and `string.split`, which compare at each place, sets in patterns, `table.sort` without a
//! comparator, `string.rep`, whose length wraps round, `table.move` over what is not there, and `os.date`.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int};
use std::sync::Arc;

use mlua::ffi;
use mlua::{Function, Lua, Table, lua_CFunction, lua_State};

use super::clock::Clock;

/// Longest string that `string.rep` makes. Luau's own wraps round for larger ones, and gives an empty string.
const REP_BYTES_MAX: f64 = (64 << 20) as f64;
/// Most elements that `table.move` moves in one call.
const MOVE_MAX: f64 = 10e6;
/// Most comparisons of a character with a character of a set that a pattern may need between two looks at the time.
const SET_COMPARISONS_MAX: usize = 1 << 30;
/// Longest format of `os.date`.
const DATE_FORMAT_BYTES_MAX: usize = 1 << 10;
/// Up to here `table.sort` compares numbers, and strings of at most [`SORTED_BYTES`], without a look at the time.
const SORTED_MAX: usize = 1 << 18;
/// See [`SORTED_MAX`].
const SORTED_BYTES: usize = 256;
/// Characters that make a pattern of a text.
const SPECIALS: &[u8] = b"^$*+?.([%-";

/// Functions whose work grows with their arguments, and which need nothing but a look at the time.
const GUARDED: [(&str, &[&CStr]); 6] = [
    ("string", &[c"byte", c"char", c"format", c"lower", c"pack", c"packsize", c"reverse", c"sub", c"unpack", c"upper"]),
    (
        "table",
        &[
            c"clear",
            c"clone",
            c"concat",
            c"create",
            c"find",
            c"foreach",
            c"foreachi",
            c"insert",
            c"maxn",
            c"pack",
            c"remove",
            c"unpack",
        ],
    ),
    ("utf8", &[c"char", c"codepoint", c"len", c"offset"]),
    ("buffer", &[c"copy", c"create", c"fill", c"fromstring", c"readstring", c"tostring", c"writestring"]),
    ("debug", &[c"traceback"]),
    ("", &[c"select", c"tonumber", c"tostring"]),
];

thread_local! {
    /// The clock of this thread's machine, which has a thread of its own.
    static CLOCK: RefCell<Option<Arc<Clock>>> = const { RefCell::new(None) };
}

/// Puts bounds on the libraries of a machine that belongs to this thread.
///
/// # Errors
/// When memory is out.
pub fn guard(lua: &Lua, clock: Arc<Clock>) -> mlua::Result<()> {
    CLOCK.set(Some(clock));
    let globals = lua.globals();
    let library = |name: &str| if name.is_empty() { Ok(globals.clone()) } else { globals.get::<Table>(name) };
    for (name, functions) in GUARDED {
        for function in functions {
            replace(lua, &library(name)?, function, at_first)?;
        }
    }
    let string = library("string")?;
    for (name, function) in [
        (c"find", find as lua_CFunction),
        (c"match", pattern),
        (c"gmatch", pattern),
        (c"gsub", pattern),
        (c"split", split),
        (c"rep", rep),
    ] {
        replace(lua, &string, name, function)?;
    }
    replace(lua, &library("table")?, c"sort", sort)?;
    replace(lua, &library("table")?, c"move", move_all)?;
    replace(lua, &library("os")?, c"date", date)
}

/// Puts `by` in the place of a C function, which it gets as its first upvalue.
fn replace(lua: &Lua, library: &Table, name: &'static CStr, by: lua_CFunction) -> mlua::Result<()> {
    let key = name.to_str().map_err(mlua::Error::external)?;
    let original: Function = library.raw_get(key)?;
    // SAFETY: `exec_raw` has pushed the original, which is the only value that the closure takes, and the closure is the only value
    // that is left on the stack. The machine keeps the address of the name, which is static.
    let replacement: Function =
        unsafe { lua.exec_raw(original, |state| ffi::lua_pushcclosurek(state, by, name.as_ptr(), 1, None))? };
    library.raw_set(key, replacement)
}

/// Calls the function that was replaced with the arguments that lie on the stack.
///
/// # Safety
/// `state` is that of a C function made by [`replace`], whose arguments have been left as they were.
unsafe fn original(state: *mut lua_State) -> c_int {
    // SAFETY: `replace` gave the closure a C function without upvalues of its own as its first upvalue. Called directly, it sees
    // the frame of this closure: the same arguments, and the same line of the caller for its errors.
    unsafe {
        match ffi::lua_tocfunction(state, ffi::lua_upvalueindex(1)) {
            Some(function) => function(state),
            None => 0,
        }
    }
}

/// Raises an error if the script is to end.
///
/// # Safety
/// `state` is that of a running C function. No value with a destructor may be alive: the error is a C++ exception.
unsafe fn look(state: *mut lua_State) {
    let ended = CLOCK.with_borrow(|clock| clock.as_ref().is_some_and(|clock| clock.ended().is_some()));
    if ended {
        // SAFETY: the callbacks of a machine live as long as it does. The interrupt, if there is one, is that of `noted`, which
        // calls mlua's where the script is to end. Both may be called from C functions, as Luau's pattern matcher does; mlua's raises what
        // the sandbox's interrupt returns.
        unsafe {
            if let Some(interrupt) = (*ffi::lua_callbacks(state)).interrupt {
                interrupt(state, -1);
            }
        }
    }
}

/// Raises an error at the line of the caller.
///
/// # Safety
/// As [`look`].
unsafe fn refuse(state: *mut lua_State, message: &'static CStr) -> ! {
    // SAFETY: the format takes one C string, and gets one.
    unsafe { ffi::luaL_error(state, c"%s".as_ptr(), message.as_ptr()) }
}

/// The bytes of an argument that is a string or a number; `None`: it is neither, which the original says.
///
/// # Safety
/// `state` is that of a running C function. The slice is valid while the argument stays where it is.
unsafe fn text<'a>(state: *mut lua_State, index: c_int) -> Option<&'a [u8]> {
    // SAFETY: the pointer is to `length` bytes of a string that the stack keeps alive and the collector does not move.
    unsafe {
        let kind = ffi::lua_type(state, index);
        if kind != ffi::LUA_TSTRING && kind != ffi::LUA_TNUMBER {
            return None;
        }
        let mut length = 0;
        let start = ffi::lua_tolstring(state, index, &raw mut length);
        (!start.is_null()).then(|| std::slice::from_raw_parts(start.cast::<u8>(), length))
    }
}

/// # Safety
/// Called by the machine, as all functions below are: `state` is that of a C function made by [`replace`].
unsafe extern "C-unwind" fn at_first(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor, and the arguments are as they were.
    unsafe {
        look(state);
        original(state)
    }
}

/// `string.find`: plain text is looked for in a time that grows with the lengths' sum, where Luau's own grows with their product.
///
/// # Safety
/// As [`at_first`].
unsafe extern "C-unwind" fn find(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor when `pattern`, `look` or the original raise; `memmem::find` borrows and raises nothing.
    unsafe {
        let (Some(all), Some(wanted)) = (text(state, 1), text(state, 2)) else { return original(state) };
        let plain = ffi::lua_toboolean(state, 4) != 0 || !wanted.iter().any(|c| SPECIALS.contains(c));
        let start = match ffi::lua_type(state, 3) {
            ffi::LUA_TNONE | ffi::LUA_TNIL => 1.0,
            ffi::LUA_TNUMBER => ffi::lua_tonumber(state, 3).trunc(),
            // A number as text, or what the original refuses.
            _ => return pattern(state),
        };
        if !plain || all.len().saturating_mul(wanted.len()) < 1 << 16 {
            return pattern(state);
        }
        look(state);
        let start = match start {
            past if past > all.len() as f64 + 1.0 => {
                ffi::lua_pushnil(state);
                return 1;
            }
            back if back < 0.0 => (all.len() as f64 + back).max(0.0) as usize,
            start => (start - 1.0).max(0.0) as usize,
        };
        match memchr::memmem::find(&all[start..], wanted) {
            Some(at) => {
                ffi::lua_pushnumber(state, (start + at + 1) as f64);
                ffi::lua_pushnumber(state, (start + at + wanted.len()) as f64);
                2
            }
            None => {
                ffi::lua_pushnil(state);
                1
            }
        }
    }
}

/// `string.match`, `gmatch` and `gsub`. Luau looks at the time at each step of a match but one: as many characters as a set admits.
///
/// # Safety
/// As [`at_first`].
unsafe extern "C-unwind" fn pattern(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor, and the arguments are as they were.
    unsafe {
        look(state);
        if let (Some(all), Some(pattern)) = (text(state, 1), text(state, 2))
            && all.len().saturating_mul(longest_set(pattern)) > SET_COMPARISONS_MAX
        {
            refuse(state, c"a set of the pattern is too long for so long a text");
        }
        original(state)
    }
}

/// Length of the longest `[…]` of a pattern.
fn longest_set(pattern: &[u8]) -> usize {
    let (mut at, mut longest) = (0, 0);
    while at < pattern.len() {
        match pattern[at] {
            b'%' => at += 2,
            b'[' => {
                let start = at;
                at += 1 + usize::from(pattern.get(at + 1) == Some(&b'^'));
                // The first character is one of the set even if it is a bracket.
                loop {
                    at += if pattern.get(at) == Some(&b'%') { 2 } else { 1 };
                    if at >= pattern.len() || pattern[at] == b']' {
                        break;
                    }
                }
                longest = longest.max(at.min(pattern.len()) - start);
            }
            _ => at += 1,
        }
    }
    longest
}

/// `string.split`, with a look at the time for each part.
///
/// # Safety
/// As [`at_first`].
unsafe extern "C-unwind" fn split(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor when something raises. `all` and `separator` are arguments, which stay on the stack;
    // two more slots are what C functions may always use.
    unsafe {
        look(state);
        let all = text(state, 1);
        let separator = match ffi::lua_type(state, 2) {
            ffi::LUA_TNONE | ffi::LUA_TNIL => Some(b",".as_slice()),
            _ => text(state, 2),
        };
        let (Some(all), Some(separator)) = (all, separator) else { return original(state) };
        if separator.is_empty() {
            return original(state);
        }
        let (mut start, mut count) = (0, 0);
        ffi::lua_createtable(state, 0, 0);
        loop {
            look(state);
            let found = memchr::memmem::find(&all[start..], separator);
            let part = &all[start..found.map_or(all.len(), |at| start + at)];
            ffi::lua_pushlstring_(state, part.as_ptr().cast::<c_char>(), part.len());
            count += 1;
            ffi::lua_rawseti_(state, -2, count);
            match found {
                Some(at) => start += at + separator.len(),
                None => return 1,
            }
        }
    }
}

/// `string.rep`, bounded.
///
/// # Safety
/// As [`at_first`].
unsafe extern "C-unwind" fn rep(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor; the second argument becomes a whole number that the original reads.
    unsafe {
        look(state);
        if let Some(text) = text(state, 1)
            && ffi::lua_type(state, 2) == ffi::LUA_TNUMBER
        {
            let count = ffi::lua_tonumber(state, 2);
            if text.is_empty() {
                ffi::lua_settop(state, 1);
                return 1;
            }
            if text.len() as f64 * count > REP_BYTES_MAX {
                refuse(state, c"string.rep: so many bytes are too many for one string, whose most are 64 MiB");
            }
            // What is below 1 is none; what is far below wraps round.
            if count.is_nan() || count < 1.0 {
                ffi::lua_pushnumber(state, 0.0);
                ffi::lua_replace(state, 2);
            }
        }
        original(state)
    }
}

/// `table.move`, bounded: it moves what is not there, too.
///
/// # Safety
/// As [`at_first`].
unsafe extern "C-unwind" fn move_all(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor, and the arguments are as they were.
    unsafe {
        look(state);
        let (first, last) = (ffi::lua_tonumber(state, 2), ffi::lua_tonumber(state, 3));
        if last - first > MOVE_MAX {
            refuse(state, c"table.move: too many elements to move at once");
        }
        original(state)
    }
}

/// `os.date`, its format bounded.
///
/// # Safety
/// As [`at_first`].
unsafe extern "C-unwind" fn date(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor, and the arguments are as they were.
    unsafe {
        look(state);
        if text(state, 1).is_some_and(|format| format.len() > DATE_FORMAT_BYTES_MAX) {
            refuse(state, c"os.date: the format is too long");
        }
        original(state)
    }
}

/// `table.sort`: where it may take long, its comparator looks at the time.
///
/// # Safety
/// As [`at_first`].
unsafe extern "C-unwind" fn sort(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor. The stack holds the table and, after `settop`, the comparator or nil; the closure
    // takes the place of the second.
    unsafe {
        look(state);
        if ffi::lua_type(state, 1) != ffi::LUA_TTABLE {
            return original(state);
        }
        ffi::lua_settop(state, 2);
        let by = ffi::lua_type(state, 2);
        // A comparator in Lua is looked at as all Lua is.
        let is_slow = match by {
            ffi::LUA_TNIL => !is_quickly_sorted(state),
            ffi::LUA_TFUNCTION => ffi::lua_iscfunction(state, 2) != 0,
            _ => false,
        };
        if is_slow {
            ffi::lua_pushcclosurek(state, compare, c"sort".as_ptr(), 1, None);
        }
        original(state)
    }
}

/// Whether the elements of the table at index 1 are few and quickly compared. A table without a length has none here.
///
/// # Safety
/// `state` is that of a running C function whose first argument is a table.
unsafe fn is_quickly_sorted(state: *mut lua_State) -> bool {
    // SAFETY: one slot is used, and is free again.
    unsafe {
        let count = ffi::lua_objlen(state, 1);
        if count > SORTED_MAX {
            return false;
        }
        (1..=count as c_int).all(|index| {
            let kind = ffi::lua_rawgeti_(state, 1, index);
            let quick = match kind {
                ffi::LUA_TSTRING => ffi::lua_objlen(state, -1) <= SORTED_BYTES,
                _ => kind == ffi::LUA_TNUMBER,
            };
            ffi::lua_settop(state, 2);
            quick
        })
    }
}

/// Compares two elements by the function that is its upvalue, or as `<` does, after a look at the time.
///
/// # Safety
/// Called by the machine's `table.sort`, with two arguments.
unsafe extern "C-unwind" fn compare(state: *mut lua_State) -> c_int {
    // SAFETY: nothing here has a destructor. The slots of a C function are more than the three that are used.
    unsafe {
        look(state);
        ffi::lua_settop(state, 2);
        if ffi::lua_type(state, ffi::lua_upvalueindex(1)) == ffi::LUA_TNIL {
            let less = ffi::lua_lessthan(state, 1, 2);
            ffi::lua_pushboolean(state, less);
        } else {
            ffi::lua_pushvalue(state, ffi::lua_upvalueindex(1));
            ffi::lua_insert(state, 1);
            ffi::lua_call(state, 2, 1);
        }
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_measured_as_luau_reads_them() {
        for (pattern, length) in [
            ("abc", 0),
            ("[abc]*", 4),
            ("%[abc", 0),
            ("[]abc]", 5),
            ("[^]]x", 3),
            ("x[%]abc]y", 6),
            ("[a][bcd]", 4),
            ("[abc", 4),
            ("[", 1),
            ("[%", 2),
        ] {
            assert_eq!(longest_set(pattern.as_bytes()), length, "{pattern}");
        }
    }
}
