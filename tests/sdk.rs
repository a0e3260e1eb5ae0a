//! Writing a strategy and trusting one: a new crate builds without a network and passes the checks, what is wrong with a
//! strategy is found without harm to the host, and a strategy that nobody trusts is not loaded.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use homeroom::plugin::check::{Report, Verdict, check};
use homeroom::plugin::{Plugin, Probe};
use serde_json::Value;

use crate::support::{Place, fixture, homeroom, plugin_path, printed_json, refused, root, run, succeeds};

/// Cargo in a crate, with an empty home and no network. What it builds outlives the test, so that the next run is short.
fn cargo(place: &Place, crate_dir: &Path, arguments: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(crate_dir).env("CARGO_HOME", place.path("cargo-home")).env("CARGO_TARGET_DIR", new_target());
    cargo.args(arguments).args(["--offline", "--locked"]);
    cargo
}

fn new_target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("new-strategy")
}

/// The block of a README that holds all of a strategy's source.
fn block_of_readme(word: &str) -> Result<String> {
    let readme = fs::read_to_string(root().join("plugins/README.md"))?;
    let blocks = readme.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next());
    let block = blocks.filter(|block| block.contains(word) && block.contains("export_strategy!")).last();
    block.map(str::to_owned).with_context(|| format!("plugins/README.md has no source with `{word}`"))
}

/// The walk of `plugins/README.md`, in one crate since compiling is what takes time.
#[test]
fn a_new_strategy_builds_without_a_network_and_becomes_dora_as_the_readme_says() -> Result<()> {
    let place = Place::new()?;
    let dir = place.path("dora");
    succeeds(homeroom().args(["plugins", "new", "dora", "--dir"]).arg(&dir))?;
    let tests = succeeds(&mut cargo(&place, &dir, &["test", "--release"]))?;
    ensure!(tests.stdout.contains("3 passed"), "{}", tests.stdout);
    let library = new_target().join("release/libdora.so");
    let check = || -> Result<Value> {
        succeeds(&mut cargo(&place, &dir, &["build", "--release"]))?;
        let report = printed_json(&succeeds(homeroom().args(["plugins", "check", "--json"]).arg(&library))?)?;
        let checks = report["checks"].as_array().context("a report has checks")?;
        let notes: Vec<_> = checks.iter().filter(|line| line["verdict"] != "ok").collect();
        ensure!(report["ok"] == true && checks.len() == 14 && notes.is_empty(), "{report:#}");
        Ok(report)
    };
    let lora = check()?;
    fs::write(dir.join("src/lib.rs"), block_of_readme("lora_magnitude_vector")?)?;
    let dora = check()?;
    assert!(lora["checks"][2]["why"].as_str().is_some_and(|why| why.contains("28 parameters")), "{lora}");
    assert!(dora["checks"][2]["why"].as_str().is_some_and(|why| why.contains("42 parameters")), "{dora}");
    Ok(())
}

#[test]
fn a_new_strategy_has_a_good_name_and_a_place_of_its_own() -> Result<()> {
    let place = Place::new()?;
    let new = |name: &str, dir: &str| {
        let mut command = homeroom();
        command.args(["plugins", "new", name, "--dir"]).arg(place.path(dir));
        command
    };
    refused(&mut new("My-Lora", "outputs/a"), &["`My-Lora` is not a strategy's name"])?;
    refused(&mut new("fn", "outputs/a"), &["`fn` is a name that Rust has taken"])?;
    place.write("full/notes.txt", "mine")?;
    refused(&mut new("mine", "full"), &["the directory is not empty"])?;
    refused(&mut new("mine", "full/notes.txt"), &["cannot write a directory here"])?;
    assert!(place.outputs()?.is_empty());
    fs::create_dir(place.path("empty"))?;
    succeeds(&mut new("mine", "empty"))?;
    assert!(place.path("empty/.cargo/config.toml").is_file() && place.path("empty/src/lib.rs").is_file());
    Ok(())
}

/// Checks the hostile strategy, which does as it is told in the environment of the program that is the child.
fn hostile(how: &str, deadline: Duration) -> Result<Report> {
    let place = Place::new()?;
    let program = place
        .write("program", format!("#!/bin/sh\nHOSTILE={how} exec '{}' \"$@\"\n", env!("CARGO_BIN_EXE_homeroom")))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    check(&plugin_path("hostile"), &Probe { program, deadline })
}

#[test]
fn what_is_wrong_with_a_strategy_fails_its_check_and_harms_nobody() -> Result<()> {
    for (how, at, word) in [
        ("panic", "plan: ", "panicked: as asked (tests/plugins/hostile/src/lib.rs:"),
        ("abort", "plan: ", "it aborted"),
        ("crash", "plan: ", "memory that is not its own"),
        ("exit", "plan: ", "ended the process with exit code 0"),
        ("shape", "plan: ", "matmul: (16) is not a matrix"),
        ("schema", "describe", "`Rank` has no line of doc"),
        ("fickle", "plan twice", "not the same plan"),
        ("cut", "gradients", "shift` gets no gradient"),
        ("merge", "merge", "`merged` is not what `forward` computes"),
    ] {
        let report = hostile(how, Duration::from_secs(10))?;
        let failed: Vec<_> = report.checks.iter().filter(|line| line.verdict == Verdict::Failed).collect();
        let first = failed.first().with_context(|| format!("{how}: nothing failed"))?;
        ensure!(first.check.starts_with(at) && first.why.contains(word), "{how}: {failed:?}");
    }
    assert_eq!(hostile("well", Duration::from_secs(10))?.failed(), 0);
    Ok(())
}

#[test]
fn a_strategy_that_does_not_return_is_given_up_on() -> Result<()> {
    let started = Instant::now();
    let report = hostile("loop", Duration::from_millis(400))?;
    let last = report.checks.last().context("a report has lines")?;
    ensure!(last.verdict == Verdict::Failed && last.why.contains("did not return within 0.4 s"), "{last:?}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    Ok(())
}

#[test]
fn a_file_that_cannot_be_loaded_or_has_another_name_fails_its_check() -> Result<()> {
    let place = Place::new()?;
    let text = place.write("libtext.so", "import torch\n".repeat(20))?;
    let ran = run(homeroom().args(["plugins", "check"]).arg(&text))?;
    ensure!(ran.code == Some(1) && ran.stdout.contains("FAILED   load") && ran.stdout.contains("ELF"), "{ran:?}");
    let mut bytes = fs::read(plugin_path("hostile"))?;
    let other = place.write("libother.so", &bytes)?;
    let ran = run(homeroom().args(["plugins", "check"]).arg(&other))?;
    ensure!(ran.code == Some(1) && ran.stdout.contains("its file says `other`"), "{ran:?}");
    ensure!(ran.stderr.contains("1 of 13 checks failed"), "{ran:?}");
    let magic = bytes.windows(10).position(|bytes| bytes == b"HOMEROOM\x58\0").context("a plugin has a descriptor")?;
    bytes[magic + 12] = 9;
    let ran = run(homeroom().args(["plugins", "check"]).arg(place.write("libhostile.so", bytes)?))?;
    ensure!(ran.code == Some(1) && ran.stdout.contains("built for ABI 9."), "{ran:?}");
    Ok(())
}

/// Options are the strategy's own to know, so that a wrong one costs no model.
#[test]
fn a_wrong_option_is_told_before_a_model_is_loaded() -> Result<()> {
    let place = Place::new()?;
    let nowhere = place.path("no-model");
    let mut command = place.fine_tune(&nowhere, &place.rows("rows.jsonl", 2)?);
    refused(command.args(["--set-option", "lora_alhpa=3"]), &["did you mean `lora_alpha`?"])?;
    let mut command = homeroom();
    command.args(["bench", "train", "--set-option", "use_rslora=3", "--model-name"]).arg(&nowhere);
    refused(&mut command, &["`use_rslora` is 3, it takes true or false"])
}

/// A strategy in a directory of its own, a data directory, and the program under the default policy.
struct Locked {
    place: Place,
    library: PathBuf,
}

impl Locked {
    fn new() -> Result<Self> {
        let place = Place::new()?;
        let library = place.write("mine/libvera.so", fs::read(plugin_path("vera"))?)?;
        Ok(Self { place, library })
    }

    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = homeroom();
        command.env("HOMEROOM_HOME", self.place.path("home")).env_remove("HOMEROOM_PLUGIN_POLICY").args(arguments);
        command.arg("--plugin-dir").arg(self.place.path("mine"));
        command
    }

    /// A training that ends before anything is loaded, unless the strategy is.
    fn train(&self, more: &[&str]) -> Command {
        let arguments = ["fine-tune", "--strategy", "vera", "--output-dir", "outputs/out", "--max-steps", "1"];
        let mut command = self.program(&arguments);
        command.current_dir(self.place.path("")).args(more).arg("--overwrite");
        command.arg("--model-name").arg(fixture("models/llama")).args(["--training-file", "rows.jsonl"]);
        command
    }

    fn standing(&self) -> Result<String> {
        let listed = printed_json(&succeeds(&mut self.program(&["plugins", "list", "--json"]))?)?;
        let vera = listed.as_array().context("a list")?.iter().find(|item| item["name"] == "vera");
        let vera = vera.context("the file is listed")?;
        Ok(vera["trust"].as_str().unwrap_or("refused").to_owned())
    }
}

#[test]
fn a_strategy_is_loaded_when_its_digest_is_locked_and_not_after_it_changed() -> Result<()> {
    let here = Locked::new()?;
    here.place.rows("rows.jsonl", 2)?;
    let unknown = ["libvera.so", "it is not in plugins.lock", "homeroom plugins lock vera", "--plugin-policy dev"];
    refused(&mut here.train(&[]), &unknown)?;
    assert_eq!(here.standing()?, "refused");
    succeeds(&mut here.train(&["--plugin-policy", "dev"]))?;
    let locked = succeeds(&mut here.program(&["plugins", "lock", "vera"]))?;
    ensure!(locked.stdout.starts_with("vera   0.1.0   "), "{locked:?}");
    assert_eq!(here.standing()?, "locked");
    succeeds(&mut here.train(&[]))?;
    // A byte more at the end changes nothing but the digest.
    let mut bytes = fs::read(&here.library)?;
    bytes.push(0);
    fs::write(&here.library, bytes)?;
    refused(&mut here.train(&[]), &["it has changed since it was locked", "homeroom plugins lock vera"])?;
    succeeds(&mut here.program(&["plugins", "lock"]))?;
    assert_eq!(here.standing()?, "locked");
    refused(&mut here.program(&["plugins", "lock", "nothing"]), &["no strategy `nothing` in:"])?;
    refused(here.train(&[]).env("HOMEROOM_PLUGIN_POLICY", "open"), &["is `open`, it takes `locked` or `dev`"])
}

#[test]
fn a_file_or_directory_that_others_may_write_is_refused_whatever_is_locked() -> Result<()> {
    let here = Locked::new()?;
    here.place.rows("rows.jsonl", 2)?;
    succeeds(&mut here.program(&["plugins", "lock", "vera"]))?;
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    mode(&here.library, 0o666)?;
    refused(&mut here.train(&["--plugin-policy", "dev"]), &["everybody may write it", "chmod o-w"])?;
    mode(&here.library, 0o644)?;
    mode(&here.place.path("mine"), 0o777)?;
    let words = ["its directory ", "mine: everybody may write it", "chmod o-w"];
    refused(&mut here.train(&["--plugin-policy", "dev"]), &words)?;
    mode(&here.place.path("mine"), 0o755)?;
    mode(&here.place.path("home/plugins.lock"), 0o666)?;
    refused(&mut here.train(&[]), &["plugins.lock", "everybody may write it"])
}

#[test]
fn a_pipelines_file_can_tighten_the_policy_and_never_loosen_it() -> Result<()> {
    let here = Locked::new()?;
    here.place.rows("rows.jsonl", 2)?;
    let model = fixture("models/llama").display().to_string();
    here.place.write(
        "s.lua",
        "local model = homeroom.load_model { name = params.model, strategy = \"vera\" }\n\
         local data = homeroom.prepare_dataset { path = \"rows.jsonl\" }\n\
         homeroom.fine_tune { model = model, dataset = data.train, steps = 1 }\n",
    )?;
    let pipeline = |plugins: &str, policy: &[&str]| -> Result<Command> {
        let params = format!("[pipeline.params]\nmodel = {{ type = \"model\", default = {model:?} }}\n");
        let config = here.place.write("c.toml", format!("[pipeline]\nscript = \"s.lua\"\n{plugins}{params}"))?;
        let mut command = here.program(&["run", &config.display().to_string(), "--dry-run"]);
        command.args(policy);
        Ok(command)
    };
    let dev = ["--plugin-policy", "dev"];
    succeeds(&mut pipeline("", &dev)?)?;
    refused(&mut pipeline("", &[])?, &["it is not in plugins.lock"])?;
    refused(&mut pipeline("[plugins]\npolicy = \"locked\"\n", &dev)?, &["it is not in plugins.lock"])?;
    refused(&mut pipeline("[plugins]\npolicy = \"dev\"\n", &dev)?, &["c.toml", "line 4: `policy`", "not loosen it"])
}

/// A damaged list is told and not taken for an empty one.
#[test]
fn a_lock_file_that_cannot_be_right_is_refused_in_words() -> Result<()> {
    let here = Locked::new()?;
    let entry = |name: &str, digest: &str| {
        format!("[[plugin]]\nname = {name:?}\nversion = \"1\"\nsha256 = {digest:?}\npath = \"/x\"\n")
    };
    let good = "0a".repeat(32);
    for (text, words) in [
        ("[[plugin]\n".to_owned(), &["line 1"][..]),
        (entry("vera", &good).replace("\"1\"", "1"), &["line 3", "invalid type", "expected a string"]),
        (entry("vera", &good).replace("path = \"/x\"\n", ""), &["missing field `path`"]),
        (entry("vera", &good) + "trusted = true\n", &["line 6", "unknown field `trusted`"]),
        (entry("vera", "0A"), &["`vera`: its sha256 is not 64 hexadecimal digits"]),
        (entry("vera", &good.to_uppercase()), &["hexadecimal digits in small letters"]),
        (entry("vera", &good) + &entry("vera", &good), &["`vera` is there twice"]),
        (entry("vera", &good) + "\0", &["line 6"]),
        ("#".repeat(1 << 21), &["more than 1048576 bytes"]),
    ] {
        here.place.write("home/plugins.lock", text)?;
        refused(&mut here.program(&["plugins", "list"]), &[&["plugins.lock"], words].concat())?;
    }
    Ok(())
}

/// A name with an escape, a pipe, a directory and a file of terabytes that is mostly a hole: none is read, and none hangs.
#[test]
fn what_only_looks_like_a_strategy_hangs_no_list() -> Result<()> {
    let here = Locked::new()?;
    fs::copy(&here.library, here.place.path("mine/lib\x1b[31m.so"))?;
    succeeds(Command::new("mkfifo").arg(here.place.path("mine/libpipe.so")))?;
    fs::create_dir(here.place.path("mine/libdir.so"))?;
    fs::File::create(here.place.path("mine/libhuge.so"))?.set_len(1 << 40)?;
    let listed = succeeds(&mut here.program(&["plugins", "list"]))?.stdout;
    ensure!(listed.contains("libvera.so") && !listed.contains('\x1b'), "{listed}");
    ensure!(["pipe", "dir", "huge"].iter().all(|name| !listed.contains(&format!("lib{name}.so"))), "{listed}");
    let rows = here.place.write("rows.jsonl", "{}\n")?;
    for (name, words) in [("pipe", "not a file"), ("dir", "not a file"), ("huge", "are the most")] {
        let program = &mut here.program(&["fine-tune", "--strategy", name, "--plugin-policy", "dev"]);
        program.args(["--output-dir", "out", "--training-file"]).arg(&rows).arg("--model-name");
        refused(program.arg(fixture("models/llama")), &[words])?;
    }
    Ok(())
}

/// The directory that a link lies in is as good as that of the file: who writes it says where the link leads.
#[test]
fn a_link_is_followed_through_directories_that_nobody_else_may_write() -> Result<()> {
    let here = Locked::new()?;
    let place = &here.place;
    let (mine, link) = (place.path("mine/libvera.so"), place.path("between/link"));
    fs::create_dir(place.path("between"))?;
    fs::rename(&mine, place.path("libvera.so"))?;
    std::os::unix::fs::symlink("../libvera.so", &link)?;
    std::os::unix::fs::symlink(&link, &mine)?;
    let load = || Plugin::load(&mine).map(|plugin| plugin.description.name);
    assert_eq!(load()?, "vera");
    fs::set_permissions(place.path("between"), fs::Permissions::from_mode(0o777))?;
    let error = load().err().context("it is loaded")?.to_string();
    ensure!(error.contains("between: everybody may write it"), "{error}");
    fs::remove_file(place.path("libvera.so"))?;
    std::os::unix::fs::symlink(&mine, place.path("libvera.so"))?;
    let error = format!("{:#}", load().err().context("it is loaded")?);
    ensure!(error.contains("cannot read"), "{error}");
    Ok(())
}

/// As `/usr/local/lib` on Debian. Only root can make such a directory.
#[test]
fn a_directory_of_roots_that_a_group_of_the_system_may_write_is_trusted() -> Result<()> {
    let here = Locked::new()?;
    let dir = here.place.path("mine");
    for (group, trusted) in [(50, true), (100, false), (1234, false)] {
        if std::os::unix::fs::chown(&dir, Some(0), Some(group)).is_err() {
            return Ok(());
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o2775))?;
        let loaded = Plugin::load(&here.library);
        ensure!(loaded.is_ok() == trusted, "group {group}: {:?}", loaded.err());
    }
    Ok(())
}

#[test]
fn a_private_copy_is_not_made_where_others_could_replace_it() -> Result<()> {
    let here = Locked::new()?;
    here.place.rows("rows.jsonl", 2)?;
    let open = here.place.path("open");
    fs::create_dir(&open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777))?;
    let words = ["cannot make a private copy", "open: everybody may write it"];
    refused(here.train(&["--plugin-policy", "dev"]).env("TMPDIR", &open), &words)
}

#[test]
fn what_a_strategy_prints_is_no_part_of_the_result() -> Result<()> {
    let place = Place::new()?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 2)?);
    command.args(["--strategy", "hostile", "--set-option", "how=print", "--max-steps", "1", "--json"]);
    let ran = succeeds(&mut command)?;
    printed_json(&ran)?;
    ensure!(ran.stderr.contains("not a result"), "{ran:?}");
    Ok(())
}
