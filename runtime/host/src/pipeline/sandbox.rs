//! The virtual machine that a pipeline's script runs in: Luau on a thread of its own, in the bounds of [`Limits`].
//!
//! A script can compute and call what it is given, and nothing else: no files, no processes, no bytecode, no way to change
//! the libraries. What is stopped, and is tried in the tests below and in `tests/hostile_scripts.rs`: endless loops under `pcall`,
//! in coroutines, in patterns, in callbacks and in library functions; values, errors and output without end. What is not: the
//! verbs do what they say, so a script can train for days.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use homeroom_engine::files::read_text;
use mlua::chunk::ChunkMode;
use mlua::{Function, IntoLuaMulti, Lua, MultiValue, Table, Value, VmState};

use super::bytecode::{Functions, Source, compiler};
use super::clock::{Clock, Ended};
use super::errors::{self, Failure, PRELUDE, nearest, parts, said, short};
use super::libraries;
use super::limits::Limits;
use super::noted;
use crate::watch::{Files, content};

/// How often time and Ctrl-C are looked at.
const WATCH_EVERY: Duration = Duration::from_millis(20);
/// Longest script. The compiler cannot be interrupted.
const SCRIPT_BYTES_MAX: u64 = 4 << 20;
/// What Luau says of an error for whose telling something is missing.
const UNTOLD: &str = "error in error handling";
/// Longest name of a module.
const MODULE_BYTES_MAX: usize = 128;

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Nothing of the script is called any more, whatever it has left behind.
        self.lua.remove_interrupt();
    }
}

/// The script and modules that were read or looked for, each as it was then; others see them while the script runs.
#[derive(Clone, Default)]
pub struct Reads(Arc<Mutex<Files>>);

impl Reads {
    /// Notes a file, as it is now.
    pub fn note(&self, path: &Path) {
        self.insert(path, content(path));
    }

    fn insert(&self, path: &Path, content: crate::watch::Content) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), content);
    }

    /// All of them so far.
    pub fn files(&self) -> Files {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A virtual machine with its bounds, on the thread that it belongs to.
pub struct Sandbox {
    lua: Lua,
    /// What scripts see as globals; read-only once the sandbox is closed.
    globals: Table,
    /// Time of the script.
    pub clock: Arc<Clock>,
    /// What the script may take.
    pub limits: Limits,
    scripts: PathBuf,
    read: Read,
    prelude: Prelude,
}

/// What was read of a script and its modules.
#[derive(Clone, Default)]
struct Read {
    files: Reads,
    /// Texts by the names that messages give their files.
    texts: Rc<RefCell<HashMap<String, String>>>,
}

/// The functions of `prelude.luau`.
#[derive(Clone)]
pub struct Prelude {
    wrap: Function,
    print_with: Function,
}

/// Runs `work` with a sandbox on a thread of its own, and ends its script when `cancelled` says so or its time is spent.
/// `require` finds modules below `scripts`; `reads` gets what is read. `give_up` hears when the script is to end and has not, and since when: what it is in
/// looks at no time, and no thread can be ended from outside.
///
/// # Errors
/// What `work` returns.
pub fn run<T: Send>(
    scripts: &Path,
    reads: &Reads,
    limits: Limits,
    cancelled: &dyn Fn() -> bool,
    give_up: &dyn Fn(Ended, Duration, &str),
    work: impl FnOnce(&Sandbox) -> Result<T> + Send,
) -> Result<T> {
    let clock = Arc::new(Clock::new(limits.lua_time));
    let (done, wait) = channel::<()>();
    std::thread::scope(|scope| {
        let (theirs, reads) = (clock.clone(), reads.clone());
        let thread = std::thread::Builder::new().name("lua".into()).stack_size(32 << 20);
        let thread = thread.spawn_scoped(scope, move || {
            let _done = done; // Dropped when this thread ends, however it ends.
            work(&Sandbox::new(scripts, reads, limits, theirs)?)
        });
        let thread = thread.context("cannot start a thread for the script")?;
        let mut since: Option<(Ended, Instant)> = None;
        while wait.recv_timeout(WATCH_EVERY) == Err(RecvTimeoutError::Timeout) {
            clock.watch(cancelled);
            since = match (clock.ended().filter(|_| !clock.in_verb()), since) {
                (Some(ended), Some((before, since))) if before == ended => {
                    give_up(ended, since.elapsed(), &clock.place());
                    Some((ended, since))
                }
                (ended, _) => ended.map(|ended| (ended, Instant::now())),
            };
        }
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

impl Prelude {
    fn load(lua: &Lua) -> mlua::Result<Self> {
        let chunk = lua.load(include_str!("prelude.luau")).set_name(format!("={PRELUDE}")).set_mode(ChunkMode::Text);
        let (wrap, print_with) = chunk.call(())?;
        Ok(Self { wrap, print_with })
    }

    /// A function for scripts, of at most two arguments. What it fails with is raised as a string, at the caller's line.
    ///
    /// # Errors
    /// When memory is out.
    pub fn function<R: IntoLuaMulti>(
        &self,
        lua: &Lua,
        call: impl Fn(&Lua, Value, Value) -> Result<R, Failure> + 'static,
    ) -> mlua::Result<Function> {
        let raw =
            lua.create_function(move |lua, (first, second): (Value, Value)| answer(lua, call(lua, first, second)))?;
        self.wrap.call(raw)
    }

    /// `print`, for a function that writes a line.
    ///
    /// # Errors
    /// When memory is out.
    pub fn print(&self, lua: &Lua, write: impl Fn(&str) -> Result<(), Failure> + 'static) -> mlua::Result<Function> {
        let raw = lua.create_function(move |lua, line: mlua::LuaString| {
            answer(lua, write(&String::from_utf8_lossy(&line.as_bytes())))
        })?;
        self.print_with.call(raw)
    }
}

/// What the prelude takes: true and the results, or false and a message. An error of mlua's would be a value outside of the
/// script's memory, with a trace of its own, and scripts can keep those.
fn answer(lua: &Lua, result: Result<impl IntoLuaMulti, Failure>) -> mlua::Result<MultiValue> {
    match result {
        Ok(results) => {
            let mut results = results.into_lua_multi(lua)?;
            results.push_front(Value::Boolean(true));
            Ok(results)
        }
        Err(failure) => (false, failure.told(lua)).into_lua_multi(lua),
    }
}

impl Sandbox {
    fn new(scripts: &Path, files: Reads, limits: Limits, clock: Arc<Clock>) -> Result<Self> {
        errors::set_memory_bytes(limits.memory_bytes);
        let failed = |error: mlua::Error| anyhow!("cannot set up Lua: {error}");
        let lua = Lua::new();
        let (globals, prelude) = (lua.globals(), Prelude::load(&lua).map_err(failed)?);
        let read = Read { files, texts: Rc::default() };
        let sandbox = Self { lua, globals, clock, limits, scripts: scripts.to_owned(), read, prelude };
        sandbox.guard().map_err(failed)?;
        Ok(sandbox)
    }

    /// The machine, to make values in.
    pub fn lua(&self) -> &Lua {
        &self.lua
    }

    /// The functions of the scripts that were read, which can be asked for after the script has begun.
    pub fn sources(&self) -> Sources {
        Sources { texts: self.read.texts.clone(), known: Rc::default() }
    }

    /// What makes functions for scripts.
    pub fn prelude(&self) -> &Prelude {
        &self.prelude
    }

    /// The globals that scripts see.
    pub fn names(&self) -> Vec<String> {
        self.globals.pairs::<String, Value>().filter_map(|pair| Some(pair.ok()?.0)).collect()
    }

    /// Gives scripts a global. Tables are frozen.
    ///
    /// # Errors
    /// When memory is out.
    pub fn provide(&self, name: &str, value: impl mlua::IntoLua) -> mlua::Result<()> {
        let value = self.lua.pack(value)?;
        if let Value::Table(table) = &value {
            freeze(table)?;
        }
        self.globals.raw_set(name, value)
    }

    fn guard(&self) -> mlua::Result<()> {
        let (lua, globals) = (&self.lua, &self.globals);
        lua.set_memory_limit(self.limits.memory_bytes)?;
        for name in ["loadstring", "getfenv", "setfenv", "newproxy", "collectgarbage"] {
            globals.set(name, Value::Nil)?;
        }
        libraries::guard(lua, self.clock.clone())?;
        self.provide_require()?;
        // A name that nobody defined is a slip, and so is a global that a script makes.
        let strict = lua.create_table()?;
        let known = globals.clone();
        let unknown = self.prelude.function(lua, move |_, _, name| -> Result<(), Failure> {
            let name = name_of(&name);
            let names = known.pairs::<String, Value>().filter_map(|pair| Some(pair.ok()?.0)).collect::<Vec<_>>();
            let near = nearest(&name, names.iter().map(String::as_str));
            let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
            Err(said(format!("unknown name `{}`{near}", short(&name))))
        })?;
        let made = self.prelude.function(lua, |_, _, name| -> Result<(), Failure> {
            let name = short(&name_of(&name));
            Err(said(format!("`{name}` is not declared; write `local {name} = …`")))
        })?;
        strict.set("__index", unknown)?;
        strict.set("__newindex", made)?;
        strict.set("__metatable", "locked")?;
        strict.set_readonly(true);
        globals.set_metatable(Some(strict))
    }

    /// `require("lib/x")`: the module `lib/x.lua` below the scripts' directory, run once.
    fn provide_require(&self) -> mlua::Result<()> {
        let (scripts, globals, read) = (self.scripts.clone(), self.globals.clone(), self.read.clone());
        let loaded: Rc<RefCell<HashMap<PathBuf, Option<Value>>>> = Rc::default();
        let require = self.prelude.function(&self.lua, move |lua, name, _| {
            let Value::String(name) = name else {
                return Err(said(format!("require: it takes the name of a module, not {}", short(&name_of(&name)))));
            };
            let name = name.to_string_lossy();
            let file = module_file(&scripts, &name)?;
            let path = module_path(&scripts, &name).inspect_err(|_| read.files.insert(&file, None))?;
            match loaded.borrow().get(&path) {
                Some(Some(module)) => return Ok(module.clone()),
                Some(None) => return Err(said(format!("`{name}` is required by itself"))),
                None => {}
            }
            loaded.borrow_mut().insert(path.clone(), None);
            let module = chunk(lua, &path, &globals, &read).and_then(|chunk| Ok(chunk.call::<Value>(())?));
            match module {
                Ok(module @ (Value::Table(_) | Value::Function(_))) => {
                    loaded.borrow_mut().insert(path, Some(module.clone()));
                    Ok(module)
                }
                other => {
                    loaded.borrow_mut().remove(&path);
                    other?;
                    Err(said(format!("`{name}` returns no table: a module ends with `return`")))
                }
            }
        })?;
        self.globals.set("require", require)
    }

    /// Closes the sandbox: from here on nothing that was provided can be changed, and time counts.
    ///
    /// # Errors
    /// When memory is out.
    pub fn close(&self) -> mlua::Result<()> {
        self.lua.sandbox(true)?;
        let clock = self.clock.clone();
        self.lua.set_interrupt(move |lua| match clock.check() {
            Ok(()) => {
                if clock.asks() {
                    clock.note(errors::here(lua));
                }
                Ok(VmState::Continue)
            }
            Err(ended) => {
                clock.note(errors::here(lua));
                Err(mlua::Error::runtime(Failure::from(ended).told(lua)))
            }
        });
        noted::begin(&self.lua, self.clock.clone())
    }

    /// Compiles a script.
    ///
    /// # Errors
    /// When it cannot be read or is not Lua; the message names the line.
    pub fn compile(&self, script: &Path) -> Result<Function> {
        chunk(&self.lua, script, &self.globals, &self.read).map_err(|failure| match failure {
            Failure::Lua(error) => self.tell(&error, script),
            Failure::Said(error) => error,
        })
    }

    /// Runs a compiled script and returns what it returns. `script` is where it is from.
    ///
    /// # Errors
    /// What the script raises, with its line; or that it was stopped.
    pub fn call(&self, function: &Function, script: &Path) -> Result<Value> {
        let _running = self.clock.resume();
        function.call::<Value>(()).map_err(|error| self.tell(&error, script))
    }

    /// A Lua error as users read it: what was raised, and the lines that led there.
    fn tell(&self, error: &mlua::Error, script: &Path) -> anyhow::Error {
        let (text, trace) = parts(error);
        // What a machine cannot tell has no place either.
        let frames: Vec<&str> = trace.lines().map(str::trim).filter(|line| is_frame(line)).collect();
        let raised_at = || frames.first().map_or_else(|| shown(script), |frame| place(frame).to_string());
        let last = noted::place();
        let last = if last.is_empty() { format!("{}: ", shown(script)) } else { last };
        let text = match text {
            text if text == errors::out_of_memory() => match frames.first() {
                Some(frame) => format!("{}: {text}", place(frame)),
                None => format!("{last}{text}"),
            },
            text if text.starts_with(UNTOLD) => {
                format!("{last}{UNTOLD}: no memory or no stack was left to tell it")
            }
            text => match text.split_once(": 0x") {
                Some((kind @ ("table" | "function" | "thread" | "buffer"), _)) => {
                    format!("{}: the script raised a {kind}, not a message", raised_at())
                }
                _ if text == "nil" => format!("{}: the script raised nil, not a message", raised_at()),
                _ => text,
            },
        };
        if let Some(ended) = self.clock.ended() {
            // What the script raised when it was ended may be anything; where it was is worth telling.
            let words = ended.to_string();
            let last = Some(self.clock.place()).filter(|place| !place.is_empty()).unwrap_or(last);
            return if text.ends_with(&words) { anyhow!(text) } else { anyhow!("{last}{words}") };
        }
        // The first frame is where the message says that it is.
        let callers: String =
            frames.iter().skip(1).take(8).map(|frame| format!("\n  called from {}", place(frame))).collect();
        anyhow!("{text}{callers}")
    }
}

/// The functions of scripts, told by the file and line that they begin at.
#[derive(Clone)]
pub struct Sources {
    texts: Rc<RefCell<HashMap<String, String>>>,
    known: Rc<RefCell<HashMap<String, Rc<Functions>>>>,
}

impl Sources {
    /// What a function is; `None`: it is of no script, or is the script itself.
    pub fn of(&self, function: &Function) -> Option<Source> {
        let info = function.info();
        let (file, line) = (info.source?.strip_prefix('@')?.to_owned(), info.line_defined?);
        self.functions(&file)?.at(line)
    }

    /// The line of the `return` that a script ends with.
    pub fn last_return(&self, script: &Path) -> Option<usize> {
        self.functions(&shown(script))?.last_return()
    }

    fn functions(&self, file: &str) -> Option<Rc<Functions>> {
        if let Some(known) = self.known.borrow().get(file) {
            return Some(known.clone());
        }
        let functions = Rc::new(Functions::of(self.texts.borrow().get(file)?).ok()?);
        self.known.borrow_mut().insert(file.to_owned(), functions.clone());
        Some(functions)
    }
}

/// A key as a name. What is no text has none, and is not asked for one: it could have a function to answer with.
pub fn name_of(key: &Value) -> String {
    match key {
        Value::String(name) => name.to_string_lossy(),
        Value::Boolean(_) | Value::Integer(_) | Value::Number(_) => key.to_string().unwrap_or_default(),
        Value::LightUserData(null) if null.0.is_null() => "null".to_owned(),
        // The only objects that scripts get.
        Value::UserData(_) => "a dataset".to_owned(),
        other => format!("a {}", other.type_name()),
    }
}

fn is_frame(line: &str) -> bool {
    !line.is_empty() && !line.starts_with('[') && !line.starts_with("stack traceback") && !errors::is_internal(line)
}

/// `x.lua:12` of a line such as `x.lua:12 function f` or `x.lua:12: in function 'f'`.
fn place(frame: &str) -> &str {
    let line = frame.find(".lua:").map_or(0, |at| at + ".lua:".len());
    let digits = frame[line..].find(|c: char| !c.is_ascii_digit()).map_or(frame.len(), |at| line + at);
    &frame[..digits]
}

/// A compiled chunk, from text and never from bytecode, which is trusted by the machine.
fn chunk(lua: &Lua, path: &Path, globals: &Table, read: &Read) -> Result<Function, Failure> {
    read.files.note(path);
    let (text, name) = (script_text(path)?, shown(path));
    read.texts.borrow_mut().insert(name.clone(), text.clone());
    let chunk = lua.load(text).set_name(format!("@{name}")).set_mode(ChunkMode::Text).set_compiler(compiler());
    Ok(chunk.set_environment(globals.clone()).into_function()?)
}

/// The text of a script or module.
///
/// # Errors
/// When it is no regular file, cannot be read or is too long.
pub fn script_text(path: &Path) -> Result<String> {
    read_text(path, SCRIPT_BYTES_MAX).with_context(|| shown(path))
}

/// A path as messages show it: as users would type it from where they are.
pub fn shown(path: &Path) -> String {
    static HERE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let here = HERE.get_or_init(|| std::env::current_dir().and_then(|dir| dir.canonicalize()).ok());
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let short = here.as_ref().and_then(|here| path.strip_prefix(here).ok());
    short.unwrap_or(&path).display().to_string()
}

/// Where a module of that name would be.
///
/// # Errors
/// When it is no name of a module.
fn module_file(scripts: &Path, name: &str) -> Result<PathBuf> {
    if name.len() > MODULE_BYTES_MAX {
        bail!("a module's name has at most {MODULE_BYTES_MAX} characters, not {}", name.len());
    }
    let part =
        |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !name.split('/').all(part) {
        bail!("`{name}` is not a module's name: small letters, digits, underscores, and / between directories");
    }
    Ok(scripts.join(format!("{name}.lua")))
}

/// Where a required module is.
///
/// # Errors
/// When the name is not one, there is no such module, or it lies outside of the scripts' directory.
pub fn module_path(scripts: &Path, name: &str) -> Result<PathBuf> {
    let path = module_file(scripts, name)?;
    let (Ok(real), Ok(root)) = (path.canonicalize(), scripts.canonicalize()) else {
        bail!("there is no module `{name}`: {} is not there", path.display());
    };
    if !real.starts_with(&root) {
        bail!("module `{name}` lies outside of {}", scripts.display());
    }
    Ok(real)
}

/// Makes a table and all tables in it read-only.
pub fn freeze(table: &Table) -> mlua::Result<()> {
    for pair in table.pairs::<Value, Value>() {
        if let (_, Value::Table(inner)) = pair? {
            freeze(&inner)?;
        }
    }
    table.set_readonly(true);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(400);

    /// Runs a script in a directory of its own, with a budget; returns what it returns as text, and the time that it took.
    fn play(script: &str, cancelled: &dyn Fn() -> bool) -> (Result<String>, Duration) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("s.lua"), script).unwrap();
        in_directory(dir.path(), cancelled)
    }

    fn in_directory(dir: &Path, cancelled: &dyn Fn() -> bool) -> (Result<String>, Duration) {
        let mut spent = Duration::ZERO;
        let limits = Limits { lua_time: BUDGET, ..Limits::default() };
        let result = run(dir, &Reads::default(), limits, cancelled, &|_, _, _| {}, |sandbox| {
            let lua = sandbox.lua();
            let api = lua.create_table().unwrap();
            let work = lua.create_function(|_, ()| Ok(7)).unwrap();
            api.set("work", work).unwrap();
            sandbox.provide("api", api).unwrap();
            sandbox.close().unwrap();
            let script = sandbox.compile(&dir.join("s.lua"))?;
            let start = thread_time();
            let value = sandbox.call(&script, &dir.join("s.lua"));
            spent = thread_time() - start;
            Ok(value?.to_string().unwrap_or_default())
        });
        (result, spent)
    }

    /// What this thread has computed: time that other programs take from it on a busy machine is not the script's.
    #[cfg(target_os = "linux")]
    fn thread_time() -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the clock is there on Linux, and `time` is ours to write.
        assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    #[cfg(not(target_os = "linux"))]
    fn thread_time() -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }

    fn error(script: &str) -> String {
        format!("{:#}", play(script, &|| false).0.expect_err(script))
    }

    /// The scripts that stop no other machine, each in its own budget and at most as much again.
    #[test]
    fn every_hostile_script_is_stopped_in_time() {
        let spins = "used its 0.40 s of Lua time";
        let memory = "more than 256 MiB of memory";
        let cases = [
            ("while true do end", spins),
            ("local function spin() while true do end end while true do pcall(spin) end", spins),
            ("local function spin() while true do end end while true do pcall(coroutine.wrap(spin)) end", spins),
            ("local function spin() while true do end end while true do xpcall(spin, spin) end", spins),
            ("local function f() pcall(function() pcall(f) while true do end end) return f() end f()", spins),
            ("local function f() pcall(f) f() end f()", ""),
            (
                "local function spin() while true do end end while true do pcall(string.gsub, 'aaa', 'a', spin) end",
                spins,
            ),
            ("local function spin() while true do end end while true do pcall(table.sort, {3, 1, 2}, spin) end", spins),
            ("string.find(('a'):rep(40), ('a-'):rep(40) .. 'b')", spins),
            ("while true do pcall(string.find, ('a'):rep(40), ('a-'):rep(40) .. 'b') end", spins),
            ("string.find(('a'):rep(1e5), '.-.-.-.-b$')", spins),
            ("string.rep('x', 1e9)", "too many for one string"),
            ("string.rep('x', 1e10)", "too many for one string"),
            ("return #(('x'):rep(2^33))", "too many for one string"),
            ("local s = 'x' while true do s = s .. s end", memory),
            ("local t = {} while true do t[#t + 1] = { t } end", ""),
            ("local t = {} for i = 1, 1e9 do t[i] = ('x'):rep(1e6) .. i end", memory),
            ("return (('x'):rep(6e7)):gsub('.', ('y'):rep(1e6))", memory),
            ("buffer.create(2^30)", memory),
            ("table.create(6e7, 1)", memory),
            ("table.move({}, 1, 2^31 - 3, 1)", "too many elements"),
            ("setmetatable({}, { __gc = function() while true do end end }) while true do end", spins),
            ("local t = setmetatable({}, { __index = function(t, k) return t[k + 1] end }) return t[1]", ""),
            (
                "local co co = coroutine.wrap(function() while true do coroutine.yield() end end) while true do co() end",
                spins,
            ),
        ];
        for (script, expected) in cases {
            let (result, time) = play(script, &|| false);
            let message = format!("{:#}", result.expect_err(script));
            // On a busy machine a script's time may be over before its memory is.
            let stopped = message.contains(expected) || (expected == memory && message.contains(spins));
            assert!(stopped, "{script}\n{message}");
            assert!(time < 2 * BUDGET, "{script}: {time:?}");
        }
    }

    #[test]
    fn nothing_leads_out_of_the_sandbox() {
        for (script, expected) in [
            ("loadstring('return 1')", "unknown name `loadstring`"),
            ("load('return 1')", "unknown name `load`"),
            ("dofile('x')", "unknown name `dofile`"),
            ("getfenv()", "unknown name `getfenv`"),
            ("setfenv(1, {})", "unknown name `setfenv`"),
            ("newproxy(true)", "unknown name `newproxy`"),
            ("collectgarbage('stop')", "unknown name `collectgarbage`"),
            ("io.open('x')", "unknown name `io`"),
            ("package.loadlib('x', 'y')", "unknown name `package`"),
            ("os.execute('true')", "attempt to call a nil value"),
            ("os.remove('s.lua')", "attempt to call a nil value"),
            ("os.exit(1)", "attempt to call a nil value"),
            ("os.getenv('HOME')", "attempt to call a nil value"),
            ("string.dump(function() end)", "attempt to call a nil value"),
            ("debug.getregistry()", "attempt to call a nil value"),
            ("getmetatable('').__index = {}", "readonly table"),
            ("_G.print = 1", "readonly table"),
            ("print = 1", "readonly table"),
            ("string.rep = nil", "readonly table"),
            ("api.work = nil", "readonly table"),
            ("api.more = 1", "readonly table"),
            ("rawset(api, 'work', 1)", "readonly table"),
            ("rawset(_G, 'x', 1)", "readonly table"),
            ("setmetatable(_G, {})", "protected metatable"),
            ("setmetatable(api, {})", "readonly table"),
            ("table.insert(_G, 1)", "readonly table"),
            ("return table.clear(string)", "readonly table"),
        ] {
            let message = error(script);
            assert!(message.contains(expected), "{script}\n{message}");
        }
        let dir = tempfile::tempdir().unwrap();
        // Bytecode is trusted by the machine, so it must not come in as a script.
        let lua = Lua::new();
        let code = mlua::chunk::Compiler::new().compile("return 1").unwrap();
        drop(lua);
        std::fs::write(dir.path().join("s.lua"), &code).unwrap();
        assert!(in_directory(dir.path(), &|| false).0.is_err());
        assert_eq!(play("getmetatable(_G)", &|| false).0.unwrap(), "nil");
        assert_eq!(play("return getmetatable(_G)", &|| false).0.unwrap(), "locked");
    }

    #[test]
    fn a_slip_in_a_name_is_an_error_at_its_line() {
        assert!(error("local x = 1\nprnit(x)").ends_with("s.lua:2: unknown name `prnit`, did you mean `print`?"));
        let message = error("local x = 1\ncount = x");
        assert!(message.contains("s.lua:2: `count` is not declared; write `local count = …`"), "{message}");
        let message =
            error("local function f()\n  error('no')\nend\nlocal function g()\n  f()\n  return 1\nend\ng()\nreturn 2");
        assert!(message.contains("s.lua:2: no\n  called from"), "{message}");
        assert!(message.contains("s.lua:5\n") && message.ends_with("s.lua:8"), "{message}");
        assert!(error("local = 3").contains("s.lua:1:"));
    }

    #[test]
    fn scripts_compute_as_usual() {
        for (script, expected) in [
            ("return ('ab'):rep(3)", "ababab"),
            ("return #string.rep('x', 0) + #string.rep('x', -3)", "0"),
            ("return table.concat(table.move({1, 2, 3}, 2, 3, 1), ',')", "2,3,3"),
            ("local t = table.move({1, 2}, 1, 2, 1, {}) return #t", "2"),
            ("return api.work() + 1", "8"),
            ("return select('#', pcall(error, 'x'))", "2"),
        ] {
            assert_eq!(play(script, &|| false).0.unwrap(), expected, "{script}");
        }
    }

    #[test]
    fn a_script_ends_when_the_user_wants_it_to() {
        let (result, time) = play("while true do pcall(function() while true do end end) end", &|| true);
        assert!(format!("{:#}", result.unwrap_err()).contains("interrupted"));
        assert!(time < BUDGET, "{time:?}");
    }

    #[test]
    fn time_in_a_verb_is_not_the_scripts() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("s.lua"), "wait() return 1").unwrap();
        let limits = Limits { lua_time: Duration::from_millis(100), ..Limits::default() };
        let result = run(dir.path(), &Reads::default(), limits, &|| false, &|_, _, _| {}, |sandbox| {
            let clock = sandbox.clock.clone();
            let wait = sandbox.lua().create_function(move |_, ()| {
                let _paused = clock.pause();
                std::thread::sleep(Duration::from_millis(300));
                Ok(())
            });
            sandbox.provide("wait", wait.unwrap()).unwrap();
            sandbox.close().unwrap();
            let script = dir.path().join("s.lua");
            sandbox.call(&sandbox.compile(&script)?, &script).map(|_| ())
        });
        result.unwrap();
    }

    #[test]
    fn modules_are_found_below_the_scripts_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join("scripts").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        std::fs::write(dir.path().join("out.lua"), "return {}").unwrap();
        write("lib/x.lua", "local n = 0 return { next = function() n += 1 return n end }");
        write("lib/self.lua", "return require('lib/self')");
        write("lib/none.lua", "local x = 1");
        write("lib/bad.lua", "\n\nprnit(1)");
        #[cfg(unix)]
        std::os::unix::fs::symlink(dir.path().join("out.lua"), dir.path().join("scripts/lib/link.lua")).unwrap();
        let play = |script: &str| {
            write("s.lua", script);
            in_directory(&dir.path().join("scripts"), &|| false).0.map_err(|error| format!("{error:#}"))
        };
        assert_eq!(play("require('lib/x').next() return require('lib/x').next()").unwrap(), "2");
        for (script, expected) in [
            ("\nrequire('../out')", "s.lua:2: `../out` is not a module's name"),
            ("require('/etc/passwd')", "not a module's name"),
            ("require('lib/gone')", "there is no module `lib/gone`"),
            ("require('lib/self')", "required by itself"),
            ("require('lib/none')", "returns no table"),
            ("require('lib/bad')", "lib/bad.lua:3: unknown name `prnit`"),
            #[cfg(unix)]
            ("require('lib/link')", "lies outside of"),
        ] {
            let message = play(script).expect_err(script);
            assert!(message.contains(expected), "{script}\n{message}");
        }
    }
}
