//! Scripts that mean harm: each is stopped in its bounds, in words, at its line, and the program goes on. What a script may name is
//! tried with the program as users run it.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use homeroom::pipeline::config::PipelineConfig;
use homeroom::pipeline::limits::Limits;
use homeroom::pipeline::{self, How, run_within};
use homeroom::plugin::{Search, Trust};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{fixture, homeroom, plugin_path};

/// Nothing takes as long unless it hangs, however busy the machine is.
const HANGS: Duration = Duration::from_secs(60);
const TIME: &str = "s of Lua time";
const MEMORY: &str = "64 MiB of memory";
/// On a busy machine a script's time may be over before its memory is.
const MEMORY_OR_TIME: &str = "64 MiB of memory|s of Lua time";
const PRINTED: &str = "has printed all that a run may print, 4 KiB";
const PLAIN: &str = "a value takes more than 64 MiB";
const HELD: &str = "the datasets of this script would take more than 8 MiB";

/// What scripts below have.
const PREPARED: &str = "local function spin() while true do end end local shared = {1} for i = 1, 40 do shared = {shared, shared} end \
    local data = homeroom.prepare_dataset { path = 'rows.jsonl' }.train ";

/// A name, a script, and what its error says (one of the words between bars), or, after `=`, what it returns.
const SCRIPTS: &[(&str, &str, &str)] = &[
    ("plain find", "return string.find(('a'):rep(1e7), ('a'):rep(5e6) .. 'b', 1, true)", "=null"),
    ("plain find without the flag", "return (('a'):rep(1e7):find(('a'):rep(5e6) .. 'b'))", "=null"),
    (
        "plain find in a loop",
        "while true do pcall(string.find, ('a'):rep(1e6), ('a'):rep(5e5) .. 'b', 1, true) end",
        TIME,
    ),
    ("split", "return #(('a'):rep(4e6)):split(('a'):rep(2e6) .. 'b')", "=1"),
    ("split in a loop", "while true do pcall(string.split, ('a,'):rep(1e5)) end", TIME),
    ("a long set", "string.match(('a'):rep(4e6), '[' .. ('b'):rep(4e6) .. ']*c')", "a set of the pattern is too long"),
    (
        "a long set, replaced",
        "return ('x'):rep(1e6):gsub('[^' .. ('ab'):rep(1e4) .. ']', '')",
        "a set of the pattern is too long",
    ),
    (
        "a long set, iterated",
        "for _ in (('x'):rep(1e6)):gmatch('x[%]' .. ('a'):rep(1e4) .. ']') do end",
        "a set of the pattern",
    ),
    ("a pattern that tries everything", "string.find(('a'):rep(1e5), '.-.-.-.-b$')", TIME),
    ("balance", "while true do pcall(string.gsub, ('('):rep(1e4), '%b()', '') end", TIME),
    ("a replacement without end", "return (('x'):rep(1e7)):gsub('.', ('y'):rep(1e6))", MEMORY_OR_TIME),
    ("a repetition that wraps round", "return ('x'):rep(2 ^ 33)", "too many for one string"),
    ("a repetition of nothing", "return ('').rep('', 2 ^ 53)", "=\"\""),
    ("a negative repetition", "return ('x'):rep(-2 ^ 40)", "=\"\""),
    ("doubled text", "local s = 'x' while true do s = s .. s end", MEMORY_OR_TIME),
    ("a long date", "os.date(('%c'):rep(1e6))", "os.date: the format is too long"),
    (
        "sorting long strings",
        "local a, b = ('a'):rep(1e7) .. 'x', ('a'):rep(1e7) .. 'y' local t = table.create(1e5, a) \
         for i = 1, 1e5, 2 do t[i] = b end table.sort(t)",
        TIME,
    ),
    (
        "sorting many numbers",
        "local t = table.create(3e6, 0) for i = 1, 3e6 do t[i] = (i * 7919) % 1000003 end while true do table.sort(t) end",
        TIME,
    ),
    (
        "a comparator that lies",
        "table.sort(table.create(1000, 1), function() return true end)",
        "invalid order function",
    ),
    ("a comparator that spins", "while true do pcall(table.sort, {3, 1, 2}, spin) end", TIME),
    (
        "equality that searches",
        "local meta = { __eq = table.find } local big = setmetatable(table.create(1e6, 0), meta) \
         return table.find(table.create(1e6, big), setmetatable({}, meta))",
        "=null",
    ),
    (
        "an order that searches",
        "local big = table.create(1e6, 0) setmetatable(big, { __lt = table.find }) table.sort(table.create(1e5, big))",
        TIME,
    ),
    ("a library function for each", "table.foreachi(table.create(1e6, ('a'):rep(1e6)), string.find)", TIME),
    (
        "texts that are made",
        "local t = setmetatable(table.create(1e5, ''), { __tostring = table.concat }) \
         string.format(('%*'):rep(5000), table.unpack(table.create(5000, t)))",
        TIME,
    ),
    ("moving what is not there", "table.move({}, 1, 2 ^ 31 - 3, 1)", "too many elements"),
    ("too many results", "return table.unpack({}, 1, 1e8)", "too many results"),
    ("many results", "return table.unpack(table.create(5e5, 'x'))", "=\"x\""),
    ("all bytes", "return string.byte(('x'):rep(1e7), 1, -1)", "too long"),
    ("a long number", "return tonumber(('1'):rep(2e7)) == math.huge", "=true"),
    ("a packed bomb", "string.pack(('c1000000'):rep(1000), table.unpack(table.create(1000, '')))", MEMORY_OR_TIME),
    ("a joined bomb", "table.concat(table.create(1e5, ('x'):rep(1e5)))", MEMORY_OR_TIME),
    ("a buffer", "buffer.create(2 ^ 29)", MEMORY),
    ("buffers in a loop", "local b = buffer.create(1e7) while true do pcall(buffer.tostring, b) end", TIME),
    ("characters in a loop", "local s = ('ä'):rep(1e6) while true do pcall(utf8.len, s) end", TIME),
    ("tables without end", "local t = {} while true do t = { t, t, t, t } end", "s of Lua time|of memory"),
    ("a stack without end", "local function f() return f() + 1 end f()", "stack overflow"),
    ("a handler that spins", "while true do xpcall(spin, spin) end", TIME),
    ("coroutines that spin", "while true do pcall(coroutine.wrap(spin)) end", TIME),
    ("a long error", "error(('x'):rep(2e6))", "… (1 MiB in all)"),
    ("an error as long as memory", "error(('x'):rep(2e7))", "no memory or no stack was left to tell it"),
    ("an error that is a table", "error(setmetatable({}, { __tostring = spin }))", ""),
    (
        "errors that are kept",
        "local t = {} for i = 1, 1e9 do t[i] = select(2, pcall(homeroom.load_model, { name = i })) end",
        MEMORY_OR_TIME,
    ),
    ("a long name", "return _G[('x'):rep(2e7)]", "unknown name `xxxx"),
    ("a long global", "_G[('x'):rep(2e7)] = 1", "is not declared"),
    ("a long verb", "return homeroom[('x'):rep(2e7)]", "`homeroom` has no `xxxx"),
    ("a long parameter", "return params[('x'):rep(2e7)]", "`params` has no `xxxx"),
    ("a long method", "return data[('x'):rep(2e7)]", "a dataset has no `xxxx"),
    ("a name with a function", "return data[setmetatable({}, { __tostring = spin })]", "a dataset has no `a table`"),
    ("a global with a function", "return _G[setmetatable({}, { __tostring = spin })]", "unknown name `a table`"),
    ("a long module", "require(('a/'):rep(1e6))", "at most 128 characters"),
    ("printing for ever", "while true do print('x') end", PRINTED),
    ("printing for ever, caught", "while true do pcall(print, ('x'):rep(1000)) end", TIME),
    ("printing many values", "print(table.unpack(table.create(2e5, 'x')))", PRINTED),
    ("printing what spins", "print(setmetatable({}, { __tostring = spin }))", TIME),
    ("a long line", "homeroom.log.info(('x'):rep(1e6))", PRINTED),
    ("many arguments", "homeroom.log.warn(table.unpack(table.create(5e5, 'x')))", "fields are a table of names"),
    ("a line that spins", "homeroom.log.info(setmetatable({}, { __tostring = spin })) return 1", "=1"),
    ("shared fields", "homeroom.log.info('x', { shared = shared })", PLAIN),
    ("a shared result", "return shared", PLAIN),
    ("a long result", "local s = ('x'):rep(4e6) return table.create(100, s)", PLAIN),
    ("many results in a table", "return table.create(2e6, 'x')", PLAIN),
    ("a result that holds itself", "local t = {} t.t = t return t", "or holds itself"),
    (
        "a result with a key that spins",
        "return { [setmetatable({}, { __tostring = spin })] = 1 }",
        "with key a table is neither",
    ),
    ("rows that share", "data:map(function() return { text = 'x', shared = shared } end)", PLAIN),
    ("long rows", "local s = ('x'):rep(1e6) data:map(function() return { text = s } end)", HELD),
    ("doubled rows", "local d = data while true do d = d:concat(d) end", HELD),
    ("datasets that are kept", "local t = {} for i = 1, 1e9 do t[i] = data:shuffle() end", HELD),
    (
        "a file read for ever",
        "local t = {} while true do table.insert(t, homeroom.prepare_dataset { path = 'rows.jsonl' }) end",
        HELD,
    ),
    ("a filter that spins", "while true do pcall(data.filter, data, spin) end", TIME),
    ("rows for ever", "while true do pcall(data.rows, data) end", TIME),
    ("shuffling for ever", "while true do data:shuffle() end", TIME),
    ("a yield within a method", "coroutine.wrap(function() data:map(coroutine.yield) end)()", "attempt to yield"),
    (
        "a method within itself",
        "local function f() return data:map(f) end f()",
        "no memory or no stack was left to tell it",
    ),
    (
        "many quantiles",
        "local q = {} for i = 1, 1e4 do q[i] = i / 1e5 end data:bucket { by = 'id', quantiles = q }",
        "more than 1000",
    ),
    ("keys that share", "data:dedupe { by = function() return shared end }", PLAIN),
    ("a long key", "data:bucket { by = function() return ('x'):rep(1e6) end, quantiles = { 0.5 } }", "not a number"),
    ("long keys", "local s = ('x'):rep(2e4) return #data:dedupe { by = function() return s end }", "=1"),
    ("a method of nothing", "data.map(1, print)", "is called as `dataset:map(…)`"),
    (
        "long prompts",
        "homeroom.generate { model = 'x', prompts = table.create(1e5, ('x'):rep(1e4)) }",
        "`prompts` is longer than 64 MiB",
    ),
    (
        "many options",
        "local t = {} for i = 1, 1e5 do t['x' .. i] = i end homeroom.load_model(t)",
        "more than 100 options",
    ),
    ("a long option", "homeroom.load_model { [('x'):rep(2e7)] = 1 }", "unknown option `xxxx"),
    ("a long path", "homeroom.load_model { name = ('x'):rep(2e7) }", "a path of 20000000 bytes is too long"),
    ("shared options", "homeroom.load_model { name = 'x', options = { shared = shared } }", PLAIN),
    ("a list of options", "homeroom.load_model { name = 'x', options = { 1, 2 } }", "a table of names, not a list"),
];

/// A directory `project` with a TOML file, a script and rows, and beside it what is none of the script's business.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new(rows: usize) -> Result<Self> {
        let place = Self { dir: tempfile::tempdir()? };
        std::fs::create_dir_all(place.path("project/sub"))?;
        let rows: Vec<String> =
            (0..rows).map(|id| json!({"text": format!("row {id}"), "id": id}).to_string()).collect();
        for name in ["project/rows.jsonl", "project/sub/rows.jsonl", "secret.jsonl"] {
            std::fs::write(place.path(name), rows.join("\n"))?;
        }
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self, script: &str) -> Result<PathBuf> {
        std::fs::write(self.path("project/s.lua"), script)?;
        let model = fixture("models/llama").display().to_string();
        let text = format!(
            "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\nmodel = {{ type = \"path\", default = {model:?} }}\n\
             dataset = {{ type = \"path\", default = \"rows.jsonl\" }}\ntext = {{ type = \"string\", default = \"../secret.jsonl\" }}\n"
        );
        std::fs::write(self.path("project/c.toml"), text)?;
        Ok(self.path("project/c.toml"))
    }

    /// Runs a script in this process.
    fn within(&self, script: &str, limits: Limits) -> Result<Value> {
        let config = PipelineConfig::read(&self.config(script)?, &[])?;
        Ok(run_within(&config, Search::new(&[], Trust::default()), How::default(), &|| false, limits)?.result)
    }

    fn command(&self, script: &str) -> Result<Command> {
        let plugins = plugin_path("lora").parent().map(Path::to_owned).unwrap_or_default();
        let mut command = homeroom();
        command.arg("run").arg(self.config(script)?);
        command.env("HOMEROOM_HOME", self.path("home")).env("HOMEROOM_PLUGINS", plugins);
        Ok(command)
    }

    fn result(&self, script: &str) -> Result<Value> {
        let output = self.command(script)?.arg("--json").output()?;
        ensure!(output.status.success(), "{script}\n{}", stderr(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn error(&self, script: &str, arguments: &[&str]) -> Result<String> {
        let output = self.command(script)?.args(arguments).output()?;
        ensure!(output.status.code() == Some(1), "it should fail: {script}\n{}", stderr(&output));
        Ok(stderr(&output))
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_hostile_script_is_stopped_in_words_at_its_line() -> Result<()> {
    let place = Place::new(200)?;
    let limits = Limits {
        lua_time: Duration::from_millis(400),
        memory_bytes: 64 << 20,
        output_bytes: 4 << 10,
        held_bytes: 8 << 20,
    };
    let mut wrong = Vec::new();
    for (name, script, expected) in SCRIPTS {
        let start = Instant::now();
        // The size of a value is found out in more time than is left for other things here.
        let lua_time = if *expected == PLAIN { HANGS } else { limits.lua_time };
        let result = place.within(&format!("{PREPARED}\n{script}"), Limits { lua_time, ..limits });
        let took = start.elapsed();
        let right = match (&result, expected.strip_prefix('=')) {
            (Ok(value), Some(json)) => serde_json::from_str::<Value>(json).is_ok_and(|json| json == *value),
            (Err(error), None) => {
                let message = format!("{error:#}");
                let said = expected.split('|').any(|words| message.contains(words));
                let has_line =
                    message.split("s.lua:").skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
                said && has_line && message.len() < 10_000
            }
            _ => false,
        };
        if !right || took > HANGS {
            let shown: String = format!("{result:?}").chars().take(600).collect();
            wrong.push(format!("{name}: {expected:?} is expected, {took:?}\n  {shown}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), SCRIPTS.len(), wrong.join("\n"));
    Ok(())
}

/// The compiler has bounds of its own, and the checks without running read what it compiles.
#[test]
fn scripts_that_are_hard_to_read_are_refused() -> Result<()> {
    let place = Place::new(2)?;
    let nested =
        |open: &str, close: &str, count: usize| format!("return {}1{}", open.repeat(count), close.repeat(count));
    for (script, expected) in [
        (nested("{", "}", 100_000), "s.lua:1: "),
        (nested("(", ")", 100_000), "s.lua:1: "),
        (nested("not ", "", 100_000), "s.lua:1: "),
        (nested("function() return ", " end", 10_000), "s.lua:1: "),
        (format!("return 1{}", "+1".repeat(100_000)), "s.lua:1: "),
        (format!("return homeroom.{}", "x".repeat(1 << 20)), "`homeroom` has no `xxxx"),
        (format!("homeroom.load_model {{ {} = 1 }}", "x".repeat(1 << 20)), "unknown option `xxxx"),
        ("-".repeat(5 << 20), "longer than 4194304 bytes"),
        (format!("--[{}[", "=".repeat(1 << 20)), "s.lua:1: "),
    ] {
        let start = Instant::now();
        let shown: String = script.chars().take(60).collect();
        let result = place.within(&script, Limits::default());
        let message = format!("{:#}", result.expect_err(&shown));
        assert!(message.contains(expected) && message.len() < 10_000, "{shown}\n{message}");
        let checked =
            pipeline::check(&PipelineConfig::read(&place.config(&script)?, &[])?, Search::new(&[], Trust::default()));
        assert!(checked.is_err_and(|error| format!("{error:#}").len() < 10_000), "{shown}");
        assert!(start.elapsed() < HANGS, "{shown}");
    }
    Ok(())
}

/// What scripts do every day is not in the bounds' way.
#[test]
fn heavy_scripts_that_mean_no_harm_go_through() -> Result<()> {
    let place = Place::new(100_000)?;
    let limits = Limits { lua_time: Duration::from_secs(600), ..Limits::default() };
    for (script, expected) in [
        ("local n = 0 for i = 1, 5e6 do n += i % 7 end return n", json!(15_000_000)),
        ("local t = {} for i = 1, 3e5 do t[i] = 'line ' .. i end return #table.concat(t, '\\n')", json!(3_488_894)),
        (
            "local s = '' for i = 1, 2000 do s ..= ('x'):rep(1000) end return #s:upper():gsub('X', 'yy')",
            json!(4_000_000),
        ),
        ("return #string.split(('a, b; '):rep(2e5), ', ')", json!(200_001)),
        ("local n = 0 for word in (('some words '):rep(1e5)):gmatch('%a+') do n += #word end return n", json!(900_000)),
        (
            "local t = {} for i = 1, 3e5 do t[i] = (i * 7919) % 1000003 end table.sort(t) return { t[1], t[2] <= t[3] }",
            json!([5, true]),
        ),
        (
            "local t = {} for i = 1, 1e5 do t[i] = tostring(i) end table.sort(t, function(a, b) return a > b end) return t[1]",
            json!("99999"),
        ),
        (
            "return { ('a.b'):find('.', 1, true), (('x'):rep(1e5) .. 'yz'):find('yz', -10, true) }",
            json!([2, 100_001, 100_002]),
        ),
        ("return { (('x'):rep(1e5) .. 'yz'):find('yz', 2e5, true) }", json!([])),
        (
            "local data = homeroom.prepare_dataset { path = params.dataset }.train\n\
             local big = data:map(function(row) row.text ..= '!' return row end):filter(function(row) return row.id % 2 == 0 end)\n\
             return { #big, #big:shuffle():dedupe { by = 'id' }, big:rows()[3].text }",
            json!([50_000, 50_000, "row 4!"]),
        ),
        // Datasets that nobody has any more make room, though the machine sees little of them.
        (
            "local data = homeroom.prepare_dataset { path = params.dataset }.train:sample { n = 1000 }\n\
             for i = 1, 100 do data = data:map(function(row) return row end) end return #data",
            json!(1000),
        ),
    ] {
        let limits = Limits { held_bytes: 64 << 20, ..limits };
        let result = place.within(script, limits).with_context(|| script.to_owned())?;
        assert_eq!(result, expected, "{script}");
    }
    Ok(())
}

/// What a script prints is bounded, and cannot rewrite the screen.
#[test]
fn what_is_printed_has_no_controls_and_goes_where_it_belongs() -> Result<()> {
    let place = Place::new(2)?;
    let script = "print('a\\27[2Jb', nil, 3) homeroom.log.info('\\8x', { y = '\\27]0;z\\7' }) return { '\\27[2Jc' }";
    let output = place.command(script)?.output()?;
    let story = stderr(&output);
    assert!(story.contains("a\\u{1b}[2Jb\tnil\t3\n") && story.contains("\\u{8}x   y \\u{1b}]0;z\\u{7}\n"), "{story}");
    assert!(!story.contains('\x1b') && !story.contains('\x07'), "{story:?}");
    // A result goes on as it is: where it is piped to, it is data.
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1  \u{1b}[2Jc\n");
    let message = place.error("error('\\27[2Jd')", &[])?;
    assert!(message.contains("s.lua:1: \\u{1b}[2Jd"), "{message:?}");
    Ok(())
}

/// A script reads what a parameter names, and what is below its TOML file; the same in a dry run.
#[test]
fn a_script_cannot_name_what_its_user_has_not() -> Result<()> {
    let place = Place::new(20)?;
    let keys = place.path("keys");
    std::fs::create_dir(&keys)?;
    std::fs::write(keys.join("id_rsa"), "key")?;
    std::fs::write(keys.join("adapter_config.json"), "{}")?;
    std::fs::write(keys.join("adapter_model.safetensors"), "x")?;
    symlink(place.path("secret.jsonl"), place.path("project/link.jsonl"))?;
    symlink(&keys, place.path("project/linked"))?;
    std::fs::create_dir(place.path("project/model"))?;
    symlink(keys.join("id_rsa"), place.path("project/model/config.json"))?;
    pipe(&place.path("project/pipe"))?;
    std::fs::create_dir(place.path("project/piped"))?;
    pipe(&place.path("project/piped/config.json"))?;
    // An adapter that comes with the script, and names a base elsewhere.
    std::fs::create_dir(place.path("project/guest"))?;
    std::fs::write(place.path("project/guest/adapter_model.safetensors"), b"\x02\0\0\0\0\0\0\0{}")?;
    let guest = json!({"peft_type": "LORA", "base_model_name_or_path": keys}).to_string();
    std::fs::write(place.path("project/guest/adapter_config.json"), guest)?;
    let keys = keys.display().to_string();

    let mut cases = Vec::new();
    let outside = "a script reads what a parameter of type `path` or `model` names, and what is below";
    let absolute = place.path("secret.jsonl").display().to_string();
    for path in
        ["../secret.jsonl", "sub/../../secret.jsonl", "link.jsonl", "/dev/zero", "/etc/passwd", "../gone", &absolute]
    {
        cases.push((format!("homeroom.prepare_dataset {{ path = {path:?} }}"), outside));
    }
    cases.push(("homeroom.prepare_dataset { path = params.text }".to_owned(), outside));
    cases.push(("homeroom.prepare_dataset { path = \"pipe\" }".to_owned(), "not a regular file"));
    std::fs::create_dir(place.path("project/leaking"))?;
    std::os::unix::fs::symlink(place.path("secret.jsonl"), place.path("project/leaking/train.jsonl"))?;
    cases.push(("homeroom.prepare_dataset { path = \"leaking\" }".to_owned(), outside));
    std::fs::create_dir(place.path("project/waiting"))?;
    pipe(&place.path("project/waiting/train.jsonl"))?;
    cases.push(("homeroom.prepare_dataset { path = \"waiting\" }".to_owned(), "not a regular file"));
    cases.push(("homeroom.prepare_dataset { path = \"-\" }".to_owned(), "there is no file"));
    cases.push(("homeroom.prepare_dataset { path = { \"sub\", \"../secret.jsonl\" } }".to_owned(), outside));
    cases.push(("homeroom.prepare_dataset { path = \"gone.jsonl\" }".to_owned(), "there is no file"));
    for model in [keys.as_str(), "../keys", "linked", "/"] {
        for verb in [
            "load_model { name = MODEL }",
            "load_fine_tuned_model { name = MODEL }",
            "save_model { name = \"x\", model = MODEL }",
            "save_model { name = \"x\", model = { model = params.model, adapter = MODEL } }",
            "save_model { name = \"x\", model = { model = MODEL, adapter = \"s-1/1\" } }",
            "create_handler { name = \"x\", model = MODEL }",
            "create_handler { name = \"x\", model = { model = MODEL } }",
            "create_handler { name = \"x\", model = { model = params.model, name = MODEL } }",
            "evaluate { model = { model = MODEL }, dataset = data }",
            "generate { model = MODEL, prompts = { \"x\" } }",
            "fine_tune { model = { model = params.model, adapter = MODEL }, dataset = data }",
            "fine_tune { model = params.model, init_from = MODEL, dataset = data }",
        ] {
            cases.push((format!("homeroom.{}", verb.replace("MODEL", &format!("{model:?}"))), outside));
        }
    }
    for model in ["\"guest\"", "{ model = params.model, adapter = \"guest\" }"] {
        cases.push((format!("homeroom.save_model {{ name = \"x\", model = {model} }}"), outside));
    }
    for (model, expected) in [("model", outside), ("piped", "not a regular file"), ("pipe", "not a regular file")] {
        cases.push((format!("homeroom.load_model {{ name = {model:?} }}"), expected));
    }
    for (adapter, expected) in [
        ("{ model = params.model, adapter = \"nobody\" }", "there is no trained model `nobody`"),
        ("{ model = params.model, adapter = \"s-9/1\" }", "there is no trained model `s-9/1`"),
        ("{ model = params.model, adapter = params.model }", "not a trained model"),
        ("{ model = params.model, adapter = { } }", "`model` should be a model"),
        ("{ model = params.model, adapter = (\"x\"):rep(5000) }", "`model` should be a model"),
        ("{ model = 3 }", "`model` should be a model"),
    ] {
        cases.push((format!("homeroom.save_model {{ name = \"x\", model = {adapter} }}"), expected));
    }
    for (script, expected) in &cases {
        let text = format!("local data = homeroom.prepare_dataset {{ path = params.dataset }}.train\n{script}");
        let message = place.error(&text, &[])?;
        assert!(message.contains(expected) && message.contains("s.lua:2: "), "{script}\n{message}");
        // A dry run saves nothing, and may not look.
        let message = place.error(&text, &["--dry-run"])?;
        assert!(message.contains(expected), "{script}\n{message}");
    }
    assert!(!place.path("home/models").exists() && !place.path("home/handlers.toml").exists());
    // What is allowed: below the TOML file, by a parameter, and both as absolute paths.
    let inside = place.path("project/sub/rows.jsonl").display().to_string();
    for path in ["\"sub/rows.jsonl\"", "\"./sub/../rows.jsonl\"", "params.dataset", "\"sub\"", &format!("{inside:?}")] {
        assert_eq!(place.result(&format!("return #homeroom.prepare_dataset {{ path = {path} }}.train"))?, 20, "{path}");
    }
    let output = place
        .command("return #homeroom.prepare_dataset { path = params.dataset }.train")?
        .args(["--json", "--set", &format!("dataset={absolute}")])
        .output()?;
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "20", "{}", stderr(&output));
    // The user's own word makes no file of a pipe.
    let output = place
        .command("return #homeroom.prepare_dataset { path = params.dataset }.train")?
        .args(["--set", &format!("dataset={}", place.path("project/pipe").display())])
        .output()?;
    assert!(stderr(&output).contains("a device, a pipe or a socket, not a regular file"), "{}", stderr(&output));
    Ok(())
}

/// The registry gets the files of a model, for its user alone, and nothing that lies beside them.
#[test]
fn a_saved_model_is_its_own_files_and_nobody_elses() -> Result<()> {
    let place = Place::new(20)?;
    let id = place.result(
        "local data = homeroom.prepare_dataset { path = params.dataset }.train\n\
         return homeroom.fine_tune { model = params.model, dataset = data, steps = 2 }.adapter",
    )?;
    assert_eq!(id, "s-1/1");
    let run = place.path("home/runs/s-1/adapters/1");
    assert_eq!(std::fs::metadata(place.path("home/runs/s-1"))?.permissions().mode() & 0o777, 0o700);
    std::fs::write(run.join("id_rsa"), "key")?;
    std::fs::create_dir(run.join("more"))?;
    let save =
        "return homeroom.save_model { name = \"x\", model = homeroom.load_fine_tuned_model { name = \"s-1/1\" } }.path";
    let path = PathBuf::from(place.result(save)?.as_str().context("it is a path")?);
    assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o700);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&path)? {
        let entry = entry?;
        assert_eq!(entry.metadata()?.permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "homeroom.json", "trainer_state.json"]);
    // It is a model like any other.
    assert_eq!(place.result("return #homeroom.generate { model = \"x\", prompts = { \"a\" }, max_tokens = 1 }")?, 1);

    std::fs::remove_file(run.join("trainer_state.json"))?;
    symlink(place.path("secret.jsonl"), run.join("trainer_state.json"))?;
    let message = place.error(&save.replace("\"x\"", "\"y\""), &[])?;
    assert!(message.contains("trainer_state.json: not a regular file, and only such are copied"), "{message}");
    assert_eq!(std::fs::read_dir(place.path("home/models"))?.count(), 1, "something of it is left");
    Ok(())
}

/// A training within a training, and so on, would take all memory, or the stack and with it the program.
#[test]
fn a_callback_begins_no_training_of_its_own() -> Result<()> {
    let place = Place::new(20)?;
    let message = place.error(
        "local data = homeroom.prepare_dataset { path = params.dataset }.train\nlocal function tune()\n\
         homeroom.fine_tune { model = params.model, dataset = data, steps = 2, on_step = tune } end\ntune()",
        &[],
    )?;
    assert!(message.contains("s.lua:3: fine_tune: a callback of a training cannot begin another"), "{message}");
    // What was refused within stands in the way of nothing after it.
    let steps = place.result(
        "local data = homeroom.prepare_dataset { path = params.dataset }.train\nlocal function tune(callback)\n\
         return homeroom.fine_tune { model = params.model, dataset = data, steps = 2, on_step = callback } end\n\
         pcall(tune, tune)\nreturn tune().metrics.steps",
    )?;
    assert_eq!(steps, 2);
    Ok(())
}

/// The first Ctrl-C ends a script that waits for a reader of what it prints, and one that computes.
#[test]
fn the_first_interruption_ends_a_script() -> Result<()> {
    let place = Place::new(2)?;
    for script in [
        "print('begun') while true do print(('x'):rep(1e5)) end",
        "print('begun') while true do pcall(string.find, ('a'):rep(1e6), ('a'):rep(5e5) .. 'b', 1, true) end",
    ] {
        // Nobody reads more than the first lines.
        let mut child = place.command(script)?.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut story = std::io::BufReader::with_capacity(1, child.stderr.take().context("it is piped")?);
        let mut line = String::new();
        while !line.starts_with("begun") {
            line.clear();
            ensure!(std::io::BufRead::read_line(&mut story, &mut line)? > 0, "it ended");
        }
        // Until the pipe is full.
        std::thread::sleep(Duration::from_millis(300));
        // SAFETY: the child is ours and has not been waited for, so its id is still its own.
        assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > HANGS {
                child.kill()?;
                anyhow::bail!("it goes on: {script}");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(status.code(), Some(130), "{script}");
    }
    Ok(())
}

fn pipe(path: &Path) -> Result<()> {
    let name = std::ffi::CString::new(path.display().to_string())?;
    // SAFETY: the name is a C string.
    ensure!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) } == 0, "{}: no pipe", path.display());
    Ok(())
}
