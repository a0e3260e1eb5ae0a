//! Strategies that abort, hang, take all memory or hand over what is no memory: each is stopped within its bounds and in words by the
//! program, and a good strategy loads right after.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use homeroom::plugin::{PluginFile, Probe};
use homeroom_abi::plan::PlanRequest;
use serde_json::{Map, Value};

use crate::support::{Place, Ran, fixture, homeroom, model, plugin_path, printed_json, refused, run, succeeds};

/// `fine-tune` with the hostile strategy, which does as it is told from the moment that it is loaded.
fn train(place: &Place, how: &str) -> Result<Command> {
    let mut command = place.fine_tune(&fixture("models/llama"), &place.path("rows.jsonl"));
    command.args(["--strategy", "hostile", "--max-steps", "3"]).env("HOSTILE", how);
    // Private copies go to a place that can be looked at.
    fs::create_dir_all(place.path("tmp"))?;
    command.env("TMPDIR", place.path("tmp"));
    Ok(command)
}

fn check(how: &str) -> Command {
    let mut command = homeroom();
    command.args(["plugins", "check", "--json"]).arg(plugin_path("hostile")).env("HOSTILE", how);
    command
}

/// Does each, two at a time; all errors together.
fn each<T: Sync>(cases: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let (next, problems) = (Mutex::new(cases.iter()), Mutex::new(Vec::new()));
    let worker = || {
        loop {
            let Some(case) = next.lock().expect("no worker panics with it").next() else { return };
            if let Err(error) = work(case) {
                problems.lock().expect("no worker panics with it").push(format!("{error:#}"));
            }
        }
    };
    thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(worker))));
    let problems = problems.into_inner().expect("no worker panics with it");
    ensure!(problems.is_empty(), "{} of {}:\n{}", problems.len(), cases.len(), problems.join("\n\n"));
    Ok(())
}

/// What it does, and words of the error.
const HOSTILE: &[(&str, &str)] = &[
    // Constructors.
    ("load_abort", "it aborted (SIGABRT) while it was loaded"),
    ("load_crash", "memory that is not its own (SIGSEGV) while it was loaded"),
    ("load_exit", "it ended the process with exit code 0 while it was loaded"),
    ("load_devour", "it aborted (SIGABRT) while it was loaded"),
    // The entry and its descriptor.
    ("entry_abort", "it aborted (SIGABRT) while it was loaded"),
    ("entry_null", "its entry returned no descriptor"),
    ("entry_unmapped", "its descriptor: 16 bytes at 0x10000 cannot be read"),
    ("entry_odd", "a descriptor that is not aligned"),
    ("entry_last", "its descriptor: 16 bytes are not in memory"),
    ("entry_small", "its descriptor has 12 bytes, this host reads 88"),
    ("entry_no_call", "its descriptor has no function `call`"),
    ("entry_no_extension", "its descriptor has no function `get_extension`"),
    ("entry_wrong_call", "(SIGSEGV) while it described itself"),
    // The native codec.
    ("extension_crash", "(SIGSEGV) while it was loaded"),
    ("extension_unmapped", "its native codec's table: 4 bytes at 0x10000 cannot be read"),
    ("extension_odd", "its native codec's table is not aligned"),
    ("extension_small", "its native codec's table has 4 bytes"),
    ("extension_no_encode", "its table has no function `encode`"),
    ("extension_no_decode", "its table has no function `decode`"),
    ("extension_name_null", "its native codec's name: it is at null"),
    ("extension_name_long", "its native codec's name: 18446744073709551615 bytes, 64 are the most"),
    ("extension_name_escape", r#""\u{1b}[2J" is not a codec's name"#),
    ("extension_name_bytes", "its native codec's name: invalid utf-8"),
    ("extension_block_odd", "a block of 33 values"),
    ("extension_block_large", "a block of 4294967295 bytes"),
    ("extension_short", "it encodes beyond its blocks"),
    ("extension_beyond", "it encodes beyond its blocks"),
    ("extension_before", "it encodes beyond its blocks"),
    ("extension_fails", "failed to encode"),
    ("extension_nothing", "it leaves bytes of its blocks as they were"),
    ("extension_decode_beyond", "it decodes beyond its blocks"),
    ("extension_decode_other", "comes back"),
    ("extension_decode_nan", "a block decodes otherwise"),
    // What it says of itself.
    ("describe_abort", "it aborted (SIGABRT) while it described itself"),
    ("describe_crash", "(SIGSEGV) while it described itself"),
    ("describe_exit", "it ended the process with exit code 0 while it described itself"),
    ("describe_devour", "memory allocation of"),
    ("describe_recurse", "stack overflow"),
    ("describe_null", "it emitted a result that cannot be taken: it is at null"),
    ("describe_length", "a result that cannot be taken: 18446744073709551615 bytes, 1048576 are the most"),
    ("describe_half", "a result that cannot be taken: 9223372036854775808 bytes"),
    ("describe_unmapped", "100 bytes at 0x10000 cannot be read"),
    ("describe_large", "a result that cannot be taken: 104857600 bytes"),
    ("describe_error_null", "it emitted an error that cannot be taken: 1048576 bytes, 65536 are the most"),
    ("describe_bytes", "its result cannot be read by this host"),
    ("describe_nothing", "it succeeded without a result"),
    ("describe_code", "it returned 77, which this ABI does not have"),
    ("describe_unknown", "it does not know what every strategy has to"),
    ("describe_kind", "a record of kind 99, which this ABI does not have"),
    ("describe_twice", "it emitted a result more than once"),
    ("describe_many", "it emitted a result more than once"),
    ("describe_thread", "from another thread than it was called in"),
    ("describe_deep", "recursion limit exceeded"),
    ("describe_options", "it has 2,000 options, 1,000 are the most"),
    ("describe_name", r#"its name has a control character: "hos\u{1b}[2Jtile""#),
    ("options", "bytes, 1048576 are the most"),
    // Its plan, with the real model.
    ("abort", "it aborted (SIGABRT) while it planned"),
    ("crash", "(SIGSEGV) while it planned"),
    ("exit", "it ended the process with exit code 0 while it planned"),
    ("devour", "memory allocation of"),
    ("recurse", "stack overflow"),
    ("panic_long", "panicked: as asked as asked"),
    ("panic_payload", "panicked: no message (tests/plugins/hostile/src/lib.rs:"),
    ("shared", "it plans 10,000,014 parameters, 262,144 are the most (tests/plugins/hostile/src/lib.rs:"),
    ("params", "parameters, 262,144 are the most (tests/plugins/hostile/src/lib.rs:"),
    ("memory", "its parameters have 107374182"),
    ("endless", "values are the most"),
    ("long_name", "the name of a parameter has 1,048,576 bytes"),
    ("rate", "the learning rate that it proposes is 1797"),
    ("infinite", "its result cannot be read by this host"),
    ("nodes", "operations are recorded (tests/plugins/hostile/src/lib.rs:"),
    ("outer", "values are the most (tests/plugins/hostile/src/lib.rs:"),
    ("emit_null", "it is at null"),
    ("emit_length", "18446744073709551615 bytes, 67108864 are the most"),
    ("emit_large", "104857600 bytes, 67108864 are the most"),
    ("emit_deep", "recursion limit exceeded"),
    ("emit_code", "it returned 77"),
    ("emit_many", "more than once"),
    ("escapes", "an error, as asked (tests/plugins/hostile/src/lib.rs:"),
    // Destructors, which run when the process ends.
    ("end_abort", "it aborted (SIGABRT) when the process was to end"),
    ("end_crash", "(SIGSEGV) when the process was to end"),
    ("end_exit", "it ended the process with exit code 0 when the process was to end"),
];

#[test]
fn each_hostile_strategy_is_refused_in_words_and_a_good_one_loads_right_after() -> Result<()> {
    plugin_path("hostile");
    each(HOSTILE, |(how, words)| {
        let stopped = || -> Result<()> {
            let place = Place::new()?;
            place.rows("rows.jsonl", 2)?;
            let mut command = train(&place, how)?;
            refused(&mut command, &["hostile", words])?;
            let Ran { stderr, .. } = run(&mut command)?;
            ensure!(!stderr.contains('\x1b') && stderr.len() < 20_000, "{} bytes: {stderr}", stderr.len());
            ensure!(place.outputs()?.is_empty(), "it left an output");
            ensure!(fs::read_dir(place.path("tmp"))?.next().is_none(), "it left a private copy");
            let Ran { code, stdout, .. } = run(&mut check(how))?;
            ensure!(code == Some(1), "`plugins check` ended with {code:?}: {stdout}");
            let report: Value = serde_json::from_str(&stdout)?;
            let checks = report["checks"].as_array().context("a report has checks")?;
            let found = checks
                .iter()
                .any(|line| line["verdict"] == "failed" && line["why"].as_str().is_some_and(|why| why.contains(words)));
            // What is too much for the other model is not for its own, which are tiny.
            ensure!(found || *how == "outer", "`plugins check`: no `{words}` in {report:#}");
            let listed = printed_json(&succeeds(homeroom().args(["plugins", "list", "--json"]))?)?;
            let hostile = listed.as_array().context("a list")?.iter().find(|item| item["name"] == "hostile");
            ensure!(hostile.is_some_and(|item| item["sha256"].is_string()), "{listed:#}");
            Ok(())
        };
        stopped().with_context(|| format!("HOSTILE={how}"))
    })
}

/// A list goes on after a strategy that ends its process.
#[test]
fn a_list_says_what_is_wrong_with_one_strategy_and_shows_the_others() -> Result<()> {
    for how in ["load_abort", "describe_exit", "end_crash"] {
        let listed = printed_json(&succeeds(homeroom().args(["plugins", "list", "--json"]).env("HOSTILE", how))?)?;
        let item = |name| listed.as_array().into_iter().flatten().find(|item| item["name"] == name).cloned();
        ensure!(item("lora").is_some_and(|lora| lora["sha256"].is_string()), "{listed:#}");
        ensure!(item("hostile").is_some_and(|hostile| hostile["error"].is_string()), "{listed:#}");
    }
    Ok(())
}

#[test]
fn a_strategy_that_hangs_at_any_stage_is_given_up_on() -> Result<()> {
    let place = Place::new()?;
    place.rows("rows.jsonl", 2)?;
    let cases = [
        ("load_loop", "it did not return within 10 s while it was loaded"),
        ("entry_loop", "it did not return within 10 s while it was loaded"),
        ("describe_loop", "it did not return within 10 s while it described itself"),
        ("loop", "it did not return within 10 s while it planned"),
        ("end_loop", "it did not return within 10 s when the process was to end"),
    ];
    // They sleep, so that all can at once.
    thread::scope(|scope| {
        let place = &place;
        let runs = cases.map(|(how, words)| scope.spawn(move || refused(&mut train(place, how)?, &[words])));
        runs.into_iter().try_for_each(|run| run.join().expect("no run panics"))
    })
}

/// Between two steps it is this program that calls the strategy.
#[test]
fn whatever_a_hook_hands_over_the_training_goes_on_without_it() -> Result<()> {
    plugin_path("hostile");
    let cases = [
        ("step_null", "it emitted a result that cannot be taken: it is at null"),
        ("step_length", "18446744073709551615 bytes, 1048576 are the most"),
        ("step_unmapped", "100 bytes at 0x10000 cannot be read"),
        ("step_error_null", "an error that cannot be taken"),
        ("step_large", "104857600 bytes"),
        ("step_bytes", "its directives are not known to this host"),
        ("step_nothing", "it succeeded without a result"),
        ("step_code", "it returned 77"),
        ("step_kind", "a record of kind 99"),
        ("step_twice", "a result more than once"),
        ("step_many", "a result more than once"),
        ("step_thread", "from another thread"),
        ("step_deep", "recursion limit exceeded"),
        ("step_directives", "it gives 5,000 directives, 4,096 are the most"),
        ("step_scale", "number out of range"),
        ("step_pattern", "a pattern has 100,000 bytes, 512 are the most"),
        ("step_escape", r#"a pattern has a control character: "\u{1b}[2J""#),
        ("step_loop", "no answer within 2 s"),
    ];
    each(&cases, |(how, words)| {
        let place = Place::new()?;
        place.rows("rows.jsonl", 2)?;
        let Ran { stderr, .. } = succeeds(&mut train(&place, how)?)?;
        let warning = stderr.lines().find(|line| line.starts_with("warning: strategy `hostile`: on_step: "));
        let warning = warning.with_context(|| format!("{how}: no warning in\n{stderr}"))?;
        ensure!(warning.contains(words), "{how}: no `{words}` in {warning}");
        ensure!(!stderr.contains('\x1b') && place.outputs()? == ["out"], "{how}: {stderr}");
        Ok(())
    })
}

/// What is odd and harms nobody: a descriptor that says it is larger than it is, texts in it that nobody reads, a record that comes when its
/// call is over.
#[test]
fn what_is_only_odd_is_no_reason_to_refuse() -> Result<()> {
    for how in ["entry_large", "entry_texts", "describe_late", "step_late", "emit_late", "step_unknown"] {
        let place = Place::new()?;
        place.rows("rows.jsonl", 2)?;
        succeeds(&mut train(&place, how)?).with_context(|| format!("HOSTILE={how}"))?;
    }
    Ok(())
}

#[test]
fn what_a_strategy_says_writes_over_no_terminal() -> Result<()> {
    let place = Place::new()?;
    place.rows("rows.jsonl", 2)?;
    let listed = succeeds(homeroom().args(["plugins", "list"]).env("HOSTILE", "describe_escapes"))?.stdout;
    ensure!(listed.contains("d]0;owned2J") && listed.contains("e[31m (default \"well[31m\")"), "{listed:?}");
    ensure!(listed.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{listed:?}");
    let mut printing = train(&place, "print_escapes")?;
    let ran = succeeds(&mut printing)?;
    ensure!(ran.stderr.contains("[31mred[2J") && !ran.stderr.contains('\x1b'), "{ran:?}");
    Ok(())
}

/// A child's children hold its pipes, and are none of the user's processes.
#[test]
fn what_a_strategy_starts_ends_with_its_probe() -> Result<()> {
    let time = format!("86399.{}", std::process::id());
    let ran = succeeds(check("load_spawn").env("HOSTILE_TIME", &time))?;
    ensure!(printed_json(&ran)?["ok"] == true, "{ran:?}");
    let mut left = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        // One that was killed and is not waited for has no command line.
        left.extend(String::from_utf8_lossy(&line).contains(&time).then_some(path));
    }
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// What is loaded goes on when its file becomes another, as when its author builds while a pipeline runs.
#[test]
fn a_strategy_whose_file_has_changed_since_it_was_loaded_still_plans() -> Result<()> {
    let place = Place::new()?;
    let path = place.write("libvera.so", fs::read(plugin_path("vera"))?)?;
    let probe = Probe { program: env!("CARGO_BIN_EXE_homeroom").into(), deadline: Duration::from_secs(10) };
    let staged = PluginFile::read(&path)?.stage()?;
    let about = probe.ask(&staged, &[])?.description;
    let plugin = staged.load_probed(about, probe)?;
    let request = PlanRequest { options: Map::new(), model: model("llama")?.info() };
    let before = plugin.plan(&request)?;
    fs::write(&path, "import torch\n")?;
    assert_eq!(plugin.plan(&request)?, before);
    fs::remove_file(&path)?;
    assert_eq!(plugin.plan(&request)?, before);
    Ok(())
}

#[test]
fn links_that_lead_in_a_circle_are_no_strategy() -> Result<()> {
    let place = Place::new()?;
    place.rows("rows.jsonl", 2)?;
    let [one, two] = ["mine/libhostile.so", "mine/other.so"].map(|name| place.path(name));
    fs::create_dir(place.path("mine"))?;
    std::os::unix::fs::symlink(&one, &two)?;
    std::os::unix::fs::symlink(&two, &one)?;
    let ran = run(homeroom().args(["plugins", "check"]).arg(&one))?;
    ensure!(ran.code == Some(1) && ran.stderr.contains("a link that leads back to itself"), "{ran:?}");
    // It is passed by, and the next directory's is taken.
    succeeds(train(&place, "well")?.arg("--plugin-dir").arg(place.path("mine")))?;
    Ok(())
}

/// A program under a umask, in a group that is not the user's own where this test may choose one.
fn under(umask: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")]).arg(env!("CARGO_BIN_EXE_homeroom"));
    let plugins = plugin_path("lora");
    command.args(arguments).env("HOMEROOM_PLUGINS", plugins.parent().unwrap_or(Path::new(".")));
    // SAFETY: it has no preconditions.
    if unsafe { geteuid() } == 0 {
        command.gid(1234);
    }
    command
}

unsafe extern "C" {
    fn geteuid() -> u32;
}

fn modes(path: &Path, all: &mut Vec<(PathBuf, u32)>) -> Result<()> {
    let meta = fs::symlink_metadata(path)?;
    all.push((path.to_owned(), meta.permissions().mode() & 0o7777));
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            modes(&entry?.path(), all)?;
        }
    }
    Ok(())
}

#[test]
fn strategies_load_and_are_locked_and_written_under_any_umask() -> Result<()> {
    let place = Place::new()?;
    place.write("mine/libvera.so", fs::read(plugin_path("vera"))?)?;
    fs::set_permissions(place.path("mine"), fs::Permissions::from_mode(0o755))?;
    place.rows("rows.jsonl", 2)?;
    for umask in ["002", "007", "077", "000", "022"] {
        let with = |arguments: &[&str]| {
            let mut command = under(umask, arguments);
            // Directories that are not there yet.
            command.env("HOMEROOM_HOME", place.path(&format!("home{umask}/deep"))).current_dir(place.path(""));
            command
        };
        let work = || -> Result<()> {
            succeeds(with(&["plugins", "lock", "vera", "--plugin-dir"]).arg(place.path("mine")))?;
            // Twice: what the first has written is read.
            succeeds(with(&["plugins", "lock", "vera", "--plugin-dir"]).arg(place.path("mine")))?;
            let out = place.path(&format!("out{umask}"));
            let mut train = with(&["fine-tune", "--strategy", "vera", "--max-steps", "1", "--plugin-dir", "mine"]);
            train.args(["--training-file", "rows.jsonl", "--model-name"]).arg(fixture("models/llama"));
            succeeds(train.arg("--output-dir").arg(out))?;
            let new = place.path(&format!("new{umask}"));
            succeeds(with(&["plugins", "new", "mine", "--dir"]).arg(&new))?;
            let (mut home, mut written) = (Vec::new(), Vec::new());
            modes(&place.path(&format!("home{umask}")), &mut home)?;
            modes(&new, &mut written)?;
            for (path, mode) in &home {
                ensure!(mode & 0o077 == 0, "{}: {mode:o}", path.display());
            }
            // Two directories, `plugins.lock`, the lock that it is written under, digests of the base, and the run.
            ensure!(home.len() > 8 && written.len() > 20, "{home:?}");
            for (path, mode) in written {
                ensure!(mode & 0o022 == 0 && mode & 0o400 != 0, "{}: {mode:o}", path.display());
            }
            Ok(())
        };
        work().with_context(|| format!("umask {umask}"))?;
    }
    Ok(())
}

#[test]
fn twenty_that_are_locked_at_once_are_all_locked() -> Result<()> {
    let place = Place::new()?;
    let name = |number: usize| format!("s{number:02}");
    fs::create_dir(place.path("mine"))?;
    for number in 0..20 {
        let to = place.path(&format!("mine/lib{}.so", name(number)));
        fs::copy(plugin_path("hostile"), to)?;
    }
    thread::scope(|scope| {
        let runs: Vec<_> = (0..20)
            .map(|number| {
                let place = &place;
                scope.spawn(move || {
                    let mut lock = homeroom();
                    lock.args(["plugins", "lock", &name(number), "--plugin-dir"]).arg(place.path("mine"));
                    // It calls itself so.
                    lock.env("HOMEROOM_HOME", place.path("home")).env("HOSTILE", format!("named_{}", name(number)));
                    succeeds(&mut lock)
                })
            })
            .collect();
        runs.into_iter().try_for_each(|run| run.join().expect("no run panics").map(drop))
    })?;
    let locked = fs::read_to_string(place.path("home/plugins.lock"))?;
    let missing: Vec<String> =
        (0..20).map(name).filter(|name| !locked.contains(&format!("name = \"{name}\""))).collect();
    ensure!(missing.is_empty(), "{missing:?} are not in\n{locked}");
    assert_eq!(fs::metadata(place.path("home/plugins.lock"))?.mode() & 0o777, 0o600);
    Ok(())
}

/// The file that a lock is taken on is no promise of a process that is still there.
#[test]
fn a_lock_that_a_killed_process_had_is_free() -> Result<()> {
    let place = Place::new()?;
    place.write("mine/libvera.so", fs::read(plugin_path("vera"))?)?;
    place.write("home/.lock", "1\n")?;
    let mut lock = homeroom();
    lock.args(["plugins", "lock", "vera", "--plugin-dir"]).arg(place.path("mine"));
    succeeds(lock.env("HOMEROOM_HOME", place.path("home")))?;
    Ok(())
}
