//! The program and its strategies, copied to where an installation has them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::{Place, fixture, homeroom, plugin_path, printed_json, refused, run, succeeds};

/// The program in another directory. A link, since it is large; it cannot tell.
fn copy_of_program(place: &Place, directory: &str) -> Result<PathBuf> {
    let to = place.path(directory).join("homeroom");
    fs::create_dir_all(to.parent().context("a file lies in a directory")?)?;
    fs::hard_link(env!("CARGO_BIN_EXE_homeroom"), &to)?;
    Ok(to)
}

/// A program with a home of the test's own, and without what tests set for others.
fn with_home(program: &Path, place: &Place) -> Command {
    let mut command = Command::new(program);
    command
        .env("HOMEROOM_HOME", place.path("home"))
        .env_remove("HOMEROOM_PLUGINS")
        .env_remove("HOMEROOM_PLUGIN_POLICY");
    command
}

fn listed(command: &mut Command) -> Result<Vec<Value>> {
    let listed = printed_json(&succeeds(command.args(["plugins", "list", "--json"]))?)?;
    listed.as_array().cloned().context("a list")
}

fn item<'l>(list: &'l [Value], name: &str) -> Result<&'l Value> {
    list.iter().find(|item| item["name"] == name).with_context(|| format!("no {name} in {list:?}"))
}

#[test]
fn strategies_in_lib_beside_the_programs_directory_are_found_and_trusted() -> Result<()> {
    let place = Place::new()?;
    let program = copy_of_program(&place, "usr/bin")?;
    let mut train = with_home(&program, &place);
    train.args(["fine-tune", "--max-steps", "1", "--model-name"]).arg(fixture("models/llama"));
    train.arg("--training-file").arg(place.rows("rows.jsonl", 2)?).arg("--output-dir").arg(place.path("outputs/out"));
    let hint = ["unknown strategy `lora`", "usr/lib/homeroom/plugins", "target/release/homeroom plugins install"];
    refused(&mut train, &hint)?;
    let lib = place.path("usr/lib/homeroom/plugins/liblora.so");
    fs::create_dir_all(lib.parent().context("a file lies in a directory")?)?;
    fs::copy(plugin_path("lora"), &lib)?;
    let list = listed(&mut with_home(&program, &place))?;
    let lora = item(&list, "lora")?;
    assert!(lora["trust"] == "beside the program" && list.len() == 1, "{list:?}");
    succeeds(&mut train)?;
    // By a link, too: the program lies where the link leads.
    std::os::unix::fs::symlink(&program, place.path("homeroom"))?;
    assert_eq!(listed(&mut with_home(&place.path("homeroom"), &place))?, list);
    // Others may write it: refused as beside the program.
    fs::set_permissions(&lib, fs::Permissions::from_mode(0o777))?;
    refused(train.arg("--overwrite"), &["liblora.so", "everybody may write it"])
}

#[test]
fn installed_strategies_are_found_by_every_copy_of_the_program() -> Result<()> {
    let place = Place::new()?;
    plugin_path("lora");
    let built = Path::new(env!("CARGO_BIN_EXE_homeroom"));
    let copy = copy_of_program(&place, "bin")?;
    let nothing =
        ["no strategies beside this program, in:", "lib/homeroom/plugins", "target/release/homeroom plugins install"];
    refused(with_home(&copy, &place).args(["plugins", "install"]), &nothing)?;
    let ran = succeeds(with_home(built, &place).args(["plugins", "install"]))?;
    assert_eq!(ran.stdout.lines().count(), 4, "{}", ran.stdout);
    assert!(ran.stdout.contains("qlora   0.1.0   installed   "), "{}", ran.stdout);
    let list = listed(&mut with_home(&copy, &place))?;
    assert_eq!(list.len(), 4);
    for name in ["full", "int8", "lora", "qlora"] {
        let found = item(&list, name)?;
        assert!(
            found["trust"] == "locked" && found["path"].as_str().is_some_and(|path| path.contains("/home/plugins/"))
        );
    }
    let mut train = with_home(&copy, &place);
    train.args(["fine-tune", "--name", "tutor", "--max-steps", "1", "--strategy", "qlora", "--model-name"]);
    succeeds(train.arg(fixture("models/llama")).arg("--training-file").arg(place.rows("rows.jsonl", 2)?))?;
    // Again: nothing changes. Another build of one takes its place, and it is said.
    let again = succeeds(with_home(built, &place).args(["plugins", "install"]))?;
    assert_eq!(again.stdout.matches("   unchanged   ").count(), 4, "{}", again.stdout);
    let other = place.write("new/liblora.so", [fs::read(plugin_path("lora"))?, b"new build".to_vec()].concat())?;
    let ran = succeeds(with_home(&copy, &place).args(["plugins", "install"]).arg(&other))?;
    assert!(ran.stdout.contains("lora   0.1.0   installed, in place of 0.1.0   "), "{}", ran.stdout);
    assert_eq!(fs::read(place.path("home/plugins/liblora.so"))?, fs::read(&other)?);
    assert_eq!(item(&listed(&mut with_home(&copy, &place))?, "lora")?["trust"], "locked");
    Ok(())
}

/// What a killed or failed installation leaves: an entry before its file, or two entries and either file.
#[test]
fn an_installation_that_ends_anywhere_leaves_strategies_that_load() -> Result<()> {
    let place = Place::new()?;
    let program = copy_of_program(&place, "usr/bin")?;
    let lib = place.path("usr/lib/homeroom/plugins/liblora.so");
    fs::create_dir_all(lib.parent().context("a file lies in a directory")?)?;
    fs::copy(plugin_path("lora"), &lib)?;
    let lora = || -> Result<Value> { Ok(item(&listed(&mut with_home(&program, &place))?, "lora")?.clone()) };
    let locked = || fs::read_to_string(place.path("home/plugins.lock")).unwrap_or_default();
    let install = |path: &Path| {
        let mut command = with_home(&program, &place);
        command.args(["plugins", "install"]).arg(path);
        command
    };
    // The copy cannot be written: a file is where its directory would be.
    place.write("home/plugins", "in the way")?;
    refused(&mut install(&lib), &["home/plugins"])?;
    assert!(locked().contains("name = \"lora\""), "the entry comes before the file: {}", locked());
    assert_eq!(lora()?["trust"], "beside the program");
    fs::remove_file(place.path("home/plugins"))?;
    let old = install(&lib);
    succeeds(&mut { old })?;
    let (old_lock, old_file) = (locked(), fs::read(&lib)?);
    let new_file = [old_file.clone(), "neu gebaut".into()].concat();
    let new = place.write("new/liblora.so", &new_file)?;
    succeeds(&mut install(&new))?;
    let new_lock = locked();
    assert!(new_lock != old_lock && new_lock.matches("[[plugin]]").count() == 1, "{new_lock}");
    let entry = new_lock.find("\n[[plugin]]").context("an entry")?;
    let between = old_lock + &new_lock[entry..];
    for bytes in [&old_file, &new_file] {
        place.write("home/plugins.lock", &between)?;
        place.write("home/plugins/liblora.so", bytes)?;
        assert_eq!(lora()?["trust"], "locked");
        // The next installation ends what that one began.
        succeeds(&mut install(&new))?;
        assert_eq!(locked(), new_lock);
    }
    Ok(())
}

#[test]
fn a_strategy_that_is_found_is_checked_and_installed_by_its_name() -> Result<()> {
    let place = Place::new()?;
    plugin_path("int8");
    let program = Path::new(env!("CARGO_BIN_EXE_homeroom"));
    let plugins = |words: &[&str]| {
        let mut command = with_home(program, &place);
        command.current_dir(place.path("")).arg("plugins").args(words);
        command
    };
    let report = printed_json(&succeeds(&mut plugins(&["check", "int8", "--json"]))?)?;
    assert!(report["file"].as_str().is_some_and(|file| file.ends_with("libint8.so")), "{report}");
    let ran = succeeds(&mut plugins(&["install", "int8", "lora"]))?;
    assert!(ran.stdout.starts_with("int8   0.1.0   installed") && ran.stdout.lines().count() == 2, "{}", ran.stdout);
    refused(&mut plugins(&["install", "qlroa"]), &["no such file, directory or strategy, did you mean `qlora`?"])?;
    refused(&mut plugins(&["new", "qlora"]), &["`qlora` is a strategy that comes with this program"])
}

#[test]
fn what_is_no_strategy_of_this_program_is_not_installed() -> Result<()> {
    let place = Place::new()?;
    let program = Path::new(env!("CARGO_BIN_EXE_homeroom"));
    let install = |path: &Path| {
        let mut command = with_home(program, &place);
        command.args(["plugins", "install"]).arg(path);
        command
    };
    refused(&mut install(&place.write("libtext.so", "import torch\n".repeat(20))?), &["libtext.so", "ELF"])?;
    refused(&mut install(&place.path("liblora.so")), &["liblora.so: no such file"])?;
    refused(&mut install(&place.path("outputs")), &["outputs: neither a library nor a crate"])?;
    let renamed = place.path("libother.so");
    fs::copy(plugin_path("lora"), &renamed)?;
    refused(&mut install(&renamed), &["it calls itself `lora`", "its file should be liblora.so"])?;
    let mut bytes = fs::read(plugin_path("lora"))?;
    let magic = bytes.windows(10).position(|bytes| bytes == b"HOMEROOM\x58\0").context("a plugin has a descriptor")?;
    bytes[magic + 12] = 9;
    refused(&mut install(&place.write("old/liblora.so", bytes)?), &["built for ABI 9.", "rebuild it with this SDK"])?;
    assert!(!place.path("home/plugins").exists(), "something was installed");
    Ok(())
}

#[test]
fn a_crate_is_built_checked_and_installed_by_its_directory() -> Result<()> {
    let place = Place::new()?;
    let dir = place.path("Eigene Strategie");
    succeeds(homeroom().args(["plugins", "new", "mine", "--dir"]).arg(&dir))?;
    let ran = run(homeroom().args(["plugins", "check", "--json"]).arg(&dir))?;
    let report = printed_json(&ran)?;
    ensure!(ran.code == Some(0) && report["ok"] == true, "{report:#}\n{}", ran.stderr);
    let file = report["file"].as_str().context("a file")?;
    assert!(file.ends_with("target/release/libmine.so"), "{file}");
    let peft = report["checks"].as_array().into_iter().flatten().find(|line| line["check"] == "PEFT");
    assert!(peft.is_some_and(|line| line["verdict"] == "ok"), "{report:#}");
    let program = copy_of_program(&place, "bin")?;
    let ran = succeeds(with_home(&program, &place).args(["plugins", "install"]).arg(&dir))?;
    assert!(ran.stdout.starts_with("mine   0.1.0   installed   "), "{}", ran.stdout);
    assert_eq!(item(&listed(&mut with_home(&program, &place))?, "mine")?["trust"], "locked");
    refused(homeroom().args(["plugins", "check"]).arg(place.path("outputs")), &["neither a library nor a crate"])
}
