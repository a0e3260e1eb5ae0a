//! The virtual machine that a pipeline's script runs in: Luau on a thread of its own, with bounds on memory and time.
//!
//! A script can compute and call what it is given, and nothing else: no files, no processes, no bytecode, no way to change
//! the libraries. What is stopped, and is tried in the tests below: endless loops under `pcall`, in coroutines, in patterns
//! and in callbacks; strings and tables without end. What is not: the verbs do what they say, so a script can train for days.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use mlua::chunk::ChunkMode;
use mlua::{Function, Lua, LuaString, Table, Value, Variadic, VmState};

/// Memory that a script's own values may take.
pub const MEMORY_BYTES_MAX: usize = 256 << 20;
/// Longest string that `string.rep` makes. Luau's own wraps round for larger ones, and gives an empty string.
const REP_BYTES_MAX: f64 = (64 << 20) as f64;
/// Most elements that `table.move` moves in one call: it is one loop in C, which nothing interrupts.
const MOVE_MAX: f64 = 10e6;
/// How often time and Ctrl-C are looked at.
const WATCH_EVERY: Duration = Duration::from_millis(20);

const RUNNING: u8 = 0;
const CANCELLED: u8 = 1;
const EXPIRED: u8 = 2;

/// Time that a script has spent in Lua; it stands still while a verb works.
pub struct Clock {
    start: Instant,
    spent_us: AtomicU64,
    /// Since when Lua runs, in microseconds after `start`, plus 1; 0: it does not.
    since_us: AtomicU64,
    state: AtomicU8,
    budget: Duration,
}

/// Sets a clock back to what it did, when dropped.
pub struct Turned<'a>(Option<(&'a Clock, bool)>);

impl Clock {
    fn new(budget: Duration) -> Self {
        let (spent_us, since_us, state) = Default::default();
        Self { start: Instant::now(), spent_us, since_us, state, budget }
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64 + 1
    }

    fn set(&self, run: bool) {
        let since = self.since_us.swap(if run { self.now_us() } else { 0 }, Ordering::SeqCst);
        if since > 0 {
            self.spent_us.fetch_add(self.now_us() - since, Ordering::SeqCst);
        }
    }

    fn turn(&self, run: bool) -> Turned<'_> {
        let runs = self.since_us.load(Ordering::SeqCst) > 0;
        if runs == run {
            return Turned(None);
        }
        self.set(run);
        Turned(Some((self, runs)))
    }

    /// The clock stands still until the guard is dropped: a verb works.
    pub fn pause(&self) -> Turned<'_> {
        self.turn(false)
    }

    /// The clock runs until the guard is dropped: a script's function is called.
    pub fn resume(&self) -> Turned<'_> {
        self.turn(true)
    }

    /// Whether the script is to end because the user wants it to.
    pub fn cancelled(&self) -> bool {
        self.state.load(Ordering::Relaxed) == CANCELLED
    }

    /// Refuses to go on with a script that is to end.
    ///
    /// # Errors
    /// When it was cancelled, or has used up its time.
    pub fn check(&self) -> mlua::Result<()> {
        match self.state.load(Ordering::Relaxed) {
            RUNNING => Ok(()),
            CANCELLED => Err(mlua::Error::runtime("interrupted")),
            _ => Err(mlua::Error::runtime(format!(
                "the script has used its {} of Lua time\nhint: `lua_seconds` in [pipeline] allows more",
                words(self.budget)
            ))),
        }
    }

    fn watch(&self, cancelled: &dyn Fn() -> bool) {
        if self.state.load(Ordering::SeqCst) != RUNNING {
            return;
        }
        let since = self.since_us.load(Ordering::SeqCst);
        let running = if since > 0 { self.now_us().saturating_sub(since) } else { 0 };
        let spent = Duration::from_micros(self.spent_us.load(Ordering::SeqCst) + running);
        if cancelled() {
            self.state.store(CANCELLED, Ordering::SeqCst);
        } else if spent > self.budget {
            self.state.store(EXPIRED, Ordering::SeqCst);
        }
    }
}

fn words(time: Duration) -> String {
    match time.as_secs_f64() {
        whole if whole.fract() == 0.0 => format!("{whole} s"),
        part => format!("{part:.2} s"),
    }
}

impl Drop for Turned<'_> {
    fn drop(&mut self) {
        if let Some((clock, runs)) = self.0 {
            clock.set(runs);
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Nothing of the script is called any more, whatever it has left behind.
        self.lua.remove_interrupt();
    }
}

/// A virtual machine with its bounds, on the thread that it belongs to.
pub struct Sandbox {
    lua: Lua,
    /// What scripts see as globals; read-only once the sandbox is closed.
    globals: Table,
    /// Time in Lua.
    pub clock: Arc<Clock>,
    scripts: PathBuf,
}

/// Runs `work` with a sandbox on a thread of its own, and ends its script when `cancelled` says so or `lua_time` is spent.
/// `require` finds modules below `scripts`.
///
/// # Errors
/// What `work` returns.
pub fn run<T: Send>(
    scripts: &Path,
    lua_time: Duration,
    cancelled: &dyn Fn() -> bool,
    work: impl FnOnce(&Sandbox) -> Result<T> + Send,
) -> Result<T> {
    let clock = Arc::new(Clock::new(lua_time));
    let (done, wait) = channel::<()>();
    std::thread::scope(|scope| {
        let theirs = clock.clone();
        let thread = std::thread::Builder::new().name("lua".into()).stack_size(32 << 20);
        let thread = thread.spawn_scoped(scope, move || {
            let _done = done; // Dropped when this thread ends, however it ends.
            work(&Sandbox::new(scripts, theirs)?)
        });
        let thread = thread.context("cannot start a thread for the script")?;
        while wait.recv_timeout(WATCH_EVERY) == Err(RecvTimeoutError::Timeout) {
            clock.watch(cancelled);
        }
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

impl Sandbox {
    fn new(scripts: &Path, clock: Arc<Clock>) -> Result<Self> {
        let lua = Lua::new();
        let globals = lua.globals();
        let sandbox = Self { lua, globals, clock, scripts: scripts.to_owned() };
        sandbox.guard().map_err(|error| anyhow!("cannot set up Lua: {error}"))?;
        Ok(sandbox)
    }

    /// The machine, to make values in.
    pub fn lua(&self) -> &Lua {
        &self.lua
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
        lua.set_memory_limit(MEMORY_BYTES_MAX)?;
        for name in ["loadstring", "getfenv", "setfenv", "newproxy", "collectgarbage"] {
            globals.set(name, Value::Nil)?;
        }
        let string: Table = globals.get("string")?;
        let rep: Function = string.get("rep")?;
        let guarded = lua.create_function(move |_, (text, count): (LuaString, f64)| {
            let bytes = text.as_bytes().len() as f64 * count;
            if bytes > REP_BYTES_MAX || count > REP_BYTES_MAX {
                return Err(mlua::Error::runtime(format!("string.rep: {bytes} bytes are too many for one string")));
            }
            rep.call::<LuaString>((text, count))
        })?;
        string.set("rep", guarded)?;
        let table: Table = globals.get("table")?;
        let move_all: Function = table.get("move")?;
        let guarded =
            lua.create_function(move |_, (from, first, last, rest): (Table, f64, f64, Variadic<Value>)| {
                if last - first > MOVE_MAX {
                    return Err(mlua::Error::runtime("table.move: too many elements to move at once"));
                }
                move_all.call::<Table>((from, first, last, rest))
            })?;
        table.set("move", guarded)?;
        self.provide_require()?;
        // A name that nobody defined is a slip, and so is a global that a script makes.
        let strict = lua.create_table()?;
        let known = globals.clone();
        let unknown = lua.create_function(move |_, (_, name): (Value, Value)| -> mlua::Result<()> {
            let name = name.to_string().unwrap_or_default();
            let names = known.pairs::<String, Value>().filter_map(|pair| Some(pair.ok()?.0)).collect::<Vec<_>>();
            let near = homeroom_abi::describe::nearest(&name, names.iter().map(String::as_str));
            let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
            Err(mlua::Error::runtime(format!("unknown name `{name}`{near}")))
        })?;
        let made = lua.create_function(|_, (_, name, _): (Value, Value, Value)| -> mlua::Result<()> {
            let name = name.to_string().unwrap_or_default();
            Err(mlua::Error::runtime(format!("`{name}` is not declared; write `local {name} = …`")))
        })?;
        strict.set("__index", at_caller(lua, unknown)?)?;
        strict.set("__newindex", at_caller(lua, made)?)?;
        strict.set("__metatable", "locked")?;
        strict.set_readonly(true);
        globals.set_metatable(Some(strict))
    }

    /// `require("lib/x")`: the module `lib/x.lua` below the scripts' directory, run once.
    fn provide_require(&self) -> mlua::Result<()> {
        let (scripts, globals) = (self.scripts.clone(), self.globals.clone());
        let loaded: Rc<RefCell<HashMap<PathBuf, Option<Value>>>> = Rc::default();
        let require = self.lua.create_function(move |lua, name: LuaString| {
            let name = name.to_string_lossy();
            let path = module_path(&scripts, &name).map_err(|error| mlua::Error::runtime(format!("{error:#}")))?;
            match loaded.borrow().get(&path) {
                Some(Some(module)) => return Ok(module.clone()),
                Some(None) => return Err(mlua::Error::runtime(format!("`{name}` is required by itself"))),
                None => {}
            }
            loaded.borrow_mut().insert(path.clone(), None);
            let module = chunk(lua, &path, &globals).and_then(|chunk| chunk.call::<Value>(()));
            let module = match module {
                Ok(module @ (Value::Table(_) | Value::Function(_))) => module,
                other => {
                    loaded.borrow_mut().remove(&path);
                    other?;
                    return Err(mlua::Error::runtime(format!(
                        "`{name}` returns no table: a module ends with `return`"
                    )));
                }
            };
            loaded.borrow_mut().insert(path, Some(module.clone()));
            Ok(module)
        })?;
        self.globals.set("require", at_caller(&self.lua, require)?)
    }

    /// Closes the sandbox: from here on nothing that was provided can be changed, and time counts.
    ///
    /// # Errors
    /// When memory is out.
    pub fn close(&self) -> mlua::Result<()> {
        self.lua.sandbox(true)?;
        let clock = self.clock.clone();
        self.lua.set_interrupt(move |_| clock.check().map(|()| VmState::Continue));
        Ok(())
    }

    /// Compiles a script.
    ///
    /// # Errors
    /// When it cannot be read or is not Lua; the message names the line.
    pub fn compile(&self, script: &Path) -> Result<Function> {
        chunk(&self.lua, script, &self.globals).map_err(|error| self.tell(&error))
    }

    /// Runs a compiled script and returns what it returns.
    ///
    /// # Errors
    /// What the script raises, with its line; or that it was stopped.
    pub fn call(&self, script: &Function) -> Result<Value> {
        let _running = self.clock.resume();
        script.call::<Value>(()).map_err(|error| self.tell(&error))
    }

    /// A Lua error as users read it: what was raised, and the lines that led there.
    fn tell(&self, error: &mlua::Error) -> anyhow::Error {
        if let Err(ended) = self.clock.check() {
            return anyhow!(message(&ended));
        }
        let (text, trace) = parts(error);
        let frames: Vec<&str> = trace.lines().map(str::trim).filter(|line| is_frame(line)).collect();
        // The first frame is where the message says that it is.
        let callers: String =
            frames.iter().skip(1).take(8).map(|frame| format!("\n  called from {}", place(frame))).collect();
        anyhow!("{text}{callers}")
    }
}

/// Has the errors of a host function begin with the place of the Lua line that called it.
pub fn at_caller(lua: &Lua, function: Function) -> mlua::Result<Function> {
    lua.create_function(move |lua, arguments: Variadic<Value>| {
        function.call::<Variadic<Value>>(arguments).map_err(|error| {
            let message = message(&error);
            let here = here(lua);
            if message.starts_with(&here) { error } else { mlua::Error::runtime(format!("{here}{message}")) }
        })
    })
}

/// `scripts/x.lua:12: `, the line of Lua that is being run; nothing if there is none.
pub fn here(lua: &Lua) -> String {
    let line = |level| {
        lua.inspect_stack(level, |frame| {
            let line = frame.current_line()?;
            Some(format!("{}:{line}: ", frame.source().short_src?))
        })
    };
    (0..16).map_while(line).flatten().next().unwrap_or_default()
}

/// What an error says, without how it came to be.
pub fn message(error: &mlua::Error) -> String {
    parts(error).0
}

/// What an error says, and its stack.
fn parts(error: &mlua::Error) -> (String, String) {
    let text = match error {
        mlua::Error::CallbackError { traceback, cause } => {
            let (text, deeper) = parts(cause);
            let trace = if deeper.is_empty() { traceback.clone() } else { deeper };
            return (text, trace);
        }
        mlua::Error::RuntimeError(text) => text.clone(),
        mlua::Error::SyntaxError { message, .. } => message.clone(),
        mlua::Error::MemoryError(_) => {
            format!("the script's values take more than {} MiB of memory", MEMORY_BYTES_MAX >> 20)
        }
        other => other.to_string(),
    };
    match text.split_once("\nstack traceback:\n") {
        Some((text, trace)) => (text.to_owned(), trace.to_owned()),
        None => (text, String::new()),
    }
}

fn is_frame(line: &str) -> bool {
    !line.is_empty() && !line.starts_with('[') && !line.starts_with("stack traceback")
}

/// `x.lua:12` of a line such as `x.lua:12 function f` or `x.lua:12: in function 'f'`.
fn place(frame: &str) -> &str {
    let line = frame.find(".lua:").map_or(0, |at| at + ".lua:".len());
    let digits = frame[line..].find(|c: char| !c.is_ascii_digit()).map_or(frame.len(), |at| line + at);
    &frame[..digits]
}

/// A compiled chunk, from text and never from bytecode, which is trusted by the machine.
fn chunk(lua: &Lua, path: &Path, globals: &Table) -> mlua::Result<Function> {
    let name = shown(path);
    let text =
        std::fs::read_to_string(path).map_err(|error| mlua::Error::runtime(format!("{name}: cannot read: {error}")))?;
    let chunk = lua.load(text).set_name(format!("@{name}")).set_mode(ChunkMode::Text);
    chunk.set_environment(globals.clone()).into_function()
}

/// A path as messages show it: as users would type it from where they are.
pub fn shown(path: &Path) -> String {
    static HERE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let here = HERE.get_or_init(|| std::env::current_dir().and_then(|dir| dir.canonicalize()).ok());
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let short = here.as_ref().and_then(|here| path.strip_prefix(here).ok());
    short.unwrap_or(&path).display().to_string()
}

/// Where a required module is.
///
/// # Errors
/// When the name is not one, there is no such module, or it lies outside of the scripts' directory.
pub fn module_path(scripts: &Path, name: &str) -> Result<PathBuf> {
    let part =
        |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !name.split('/').all(part) {
        bail!("`{name}` is not a module's name: small letters, digits, underscores, and / between directories");
    }
    let path = scripts.join(format!("{name}.lua"));
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
        let result = run(dir, BUDGET, cancelled, |sandbox| {
            let lua = sandbox.lua();
            let api = lua.create_table().unwrap();
            let work = lua.create_function(|_, ()| Ok(7)).unwrap();
            api.set("work", work).unwrap();
            sandbox.provide("api", api).unwrap();
            sandbox.close().unwrap();
            let script = sandbox.compile(&dir.join("s.lua"))?;
            let start = thread_time();
            let value = sandbox.call(&script);
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
        let result = run(dir.path(), Duration::from_millis(100), &|| false, |sandbox| {
            let clock = sandbox.clock.clone();
            let wait = sandbox.lua().create_function(move |_, ()| {
                let _paused = clock.pause();
                std::thread::sleep(Duration::from_millis(300));
                Ok(())
            });
            sandbox.provide("wait", wait.unwrap()).unwrap();
            sandbox.close().unwrap();
            sandbox.call(&sandbox.compile(&dir.path().join("s.lua"))?).map(|_| ())
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
