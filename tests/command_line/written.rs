//! Where results are written: whole or not at all, replaced only when asked.

use std::fs;
use std::path::Path;

use anyhow::Result;
use homeroom_engine::adapt::adapter::AdapterFiles;

use super::{Running, WIDE_R, endless, in_shell, leaves_nothing, wide_model};
use crate::support::{Place, fixture, homeroom, model, plugin_path, refused, run, succeeds};

#[test]
fn an_output_directory_is_replaced_when_asked_and_then_whole() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let mine = place.write("outputs/out/trainer_state.json", "mine")?;
    let mut command = place.fine_tune(&base, &rows);
    command.args(["--max-steps", "1"]);
    refused(&mut command, &["outputs/out: the directory is not empty", "--overwrite"])?;
    assert_eq!(fs::read_to_string(&mine)?, "mine");
    // A run that fails takes nothing away.
    let mut failing = place.fine_tune(&base, &place.write("bad.jsonl", "{")?);
    refused(failing.arg("--overwrite"), &["not JSON"])?;
    assert_eq!(fs::read_to_string(&mine)?, "mine");
    // Nor does one that was asked to replace what is no result.
    command.arg("--overwrite");
    let thesis = place.write("outputs/out/thesis.txt", "mine")?;
    refused(&mut command, &["outputs/out: holds `thesis.txt`, which is no part of a model", "another directory"])?;
    place.write("outputs/out/.hidden/key", "mine")?;
    refused(&mut command, &["holds `.hidden` and 1 more"])?;
    assert_eq!(fs::read_to_string(&thesis)?, "mine");
    fs::remove_file(thesis)?;
    fs::remove_dir_all(place.path("outputs/out/.hidden"))?;
    succeeds(&mut command)?;
    let mut names: Vec<_> =
        fs::read_dir(place.path("outputs/out"))?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    names.sort();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "homeroom.json", "trainer_state.json"]);
    assert_eq!(place.outputs()?, ["out"]);
    // An empty directory is taken as it is; a file is not a directory.
    fs::create_dir(place.path("outputs/empty"))?;
    let to = |name: &str| {
        let mut command = homeroom();
        command.args(["fine-tune", "--max-steps", "1", "--model-name"]).arg(&base).arg("--training-file").arg(&rows);
        command.arg("--output-dir").arg(place.path(name));
        command
    };
    succeeds(&mut to("outputs/empty"))?;
    refused(&mut to("rows.jsonl"), &["rows.jsonl: cannot write a directory here"])?;
    refused(&mut to("rows.jsonl/out"), &["rows.jsonl"])?;
    succeeds(&mut to("outputs/a/b/new"))?;
    assert_eq!(place.outputs()?, ["a", "empty", "out"]);
    Ok(())
}

/// `--overwrite` takes a whole directory away, and must not take what the run reads with it.
#[test]
fn an_output_directory_that_holds_the_runs_inputs_is_not_overwritten() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "outputs/out/base")?;
    let rows = place.rows("outputs/out/rows.jsonl", 3)?;
    let (far_base, far_rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let start = |base: &Path, rows: &Path| {
        let mut command = place.fine_tune(base, rows);
        command.args(["--overwrite", "--max-steps", "1"]);
        command
    };
    refused(&mut start(&base, &far_rows), &["outputs/out: the base model is in it, and would be lost"])?;
    refused(&mut start(&far_base, &rows), &["outputs/out: the training file is in it"])?;
    refused(start(&far_base, &far_rows).arg("--eval-file").arg(&rows), &["the file of held-out rows is in it"])?;
    let mut inside = start(&far_base, &far_rows);
    refused(inside.current_dir(&base), &["the working directory is in it"])?;
    assert!(rows.exists() && base.join("config.json").exists());
    let export = |adapter: &Path, to: &Path| {
        let mut command = homeroom();
        command.args(["export-model", "--format", "merged", "--overwrite", "--model-dir"]).arg(adapter);
        command.arg("--base-model").arg(&base).arg("--output-dir").arg(to);
        command
    };
    let adapter = place.copy(&fixture("curves/lora/trained"), "adapter")?;
    refused(&mut export(&adapter, &base), &["the base model is in it"])?;
    refused(&mut export(&adapter, &adapter), &["the adapter is in it"])?;
    assert!(adapter.join("adapter_config.json").exists() && base.join("config.json").exists());
    // The same of the data directory, and of all that lies in it.
    fs::create_dir_all(place.path("outputs/out/home/models/m"))?;
    refused(
        start(&far_base, &far_rows).env("HOMEROOM_HOME", place.path("outputs/out/home")),
        &["outputs/out: holds `base`"],
    )?;
    fs::remove_dir_all(place.path("outputs/out"))?;
    // An adapter may be replaced by what was made of it.
    succeeds(&mut start(&far_base, &far_rows))?;
    succeeds(start(&far_base, &far_rows).arg("--init-from").arg(place.path("outputs/out")))?;
    Ok(())
}

/// Files may not grow beyond a limit, so that a write fails in the middle as it does on a full disk: EFBIG for ENOSPC.
#[test]
fn a_full_disk_while_saving_is_told_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    // The limit must let the plugin's private copy through, so the adapter has to be larger than that.
    let limit_kib = fs::metadata(plugin_path("lora"))?.len() / 1024 + 64;
    let mut train = place.fine_tune(&wide_model(&place)?, &rows);
    train.args(["--max-steps", "1", "--lora-r", WIDE_R]);
    let mut shell = in_shell(&format!("ulimit -f {limit_kib}"), &train);
    refused(&mut shell, &["outputs/out: cannot write adapter_model.safetensors", "too large"])?;
    leaves_nothing(&place)?;
    // What was there before is still there.
    let mine = place.write("outputs/out/trainer_state.json", "mine")?;
    refused(shell.arg("--overwrite"), &["cannot write adapter_model.safetensors"])?;
    assert_eq!((fs::read_to_string(mine)?, place.outputs()?), ("mine".to_owned(), vec!["out".to_owned()]));
    // Without the limit the same command saves.
    succeeds(train.arg("--overwrite"))?;
    Ok(())
}

/// The smallest limits: whatever is written first is told, and what was begun is removed.
#[test]
fn no_limit_of_a_files_size_ends_a_command_without_a_word() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    let mut train = place.fine_tune(&fixture("models/llama"), &rows);
    refused(&mut in_shell("ulimit -f 40", train.args(["--max-steps", "1"])), &["too large"])?;
    leaves_nothing(&place)?;
    succeeds(&mut train)?;
    let (adapter, merged) = (place.path("outputs/out"), place.path("outputs/größe"));
    let mut export = homeroom();
    export.args(["export-model", "--model-dir"]).arg(&adapter).arg("--output-dir").arg(&merged);
    refused(&mut in_shell("ulimit -f 40", &export), &["outputs/größe: cannot write ", "too large"])?;
    assert_eq!(place.outputs()?, ["out"]);
    Ok(())
}

/// A place that takes no directory is named, and not by a name that nobody gave.
#[test]
fn a_place_that_cannot_be_written_is_named_alone() -> Result<()> {
    // A directory of the system that takes none from root either.
    let closed = Path::new("/proc/sys/größe");
    let place = Place::new()?;
    let mut train = homeroom();
    train.args(["fine-tune", "--max-steps", "1", "--model-name"]).arg(fixture("models/llama"));
    train.arg("--training-file").arg(place.rows("rows.jsonl", 2)?).arg("--output-dir").arg(closed);
    let ran = run(&mut train)?;
    let told = ran.stderr.contains("/proc/sys: cannot write here: ") && !ran.stderr.contains("homeroom-tmp");
    assert!(ran.code == Some(1) && told, "{}", ran.stderr);
    Ok(())
}

/// What is written of a path is JSON; one that cannot stand there is refused before anything is trained.
#[test]
fn a_path_that_is_not_utf8_is_refused_at_the_start_by_name() -> Result<()> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    let odd = place.path("").join(OsStr::from_bytes(b"n\xff"));
    let from = fixture("models/llama");
    fs::create_dir(&odd)?;
    for entry in fs::read_dir(&from)? {
        let path = entry?.path();
        fs::copy(&path, odd.join(path.file_name().unwrap_or_default()))?;
    }
    let words = ["n\u{fffd}", "this path is not UTF-8"];
    let check = |command: &mut std::process::Command| -> Result<()> {
        let ran = run(command)?;
        let told = words.iter().all(|word| ran.stderr.contains(word));
        assert!(ran.code == Some(1) && ran.stdout.is_empty() && told, "{}", ran.stderr);
        assert!(ran.stderr.starts_with("error: "), "something was done before:\n{}", ran.stderr);
        Ok(())
    };
    check(&mut place.fine_tune(&odd, &rows))?;
    // Links do not hide it.
    std::os::unix::fs::symlink(&odd, place.path("link"))?;
    check(&mut place.fine_tune(&place.path("link"), &rows))?;
    check(place.fine_tune(&from, &rows).arg("--init-from").arg(odd.join("adapter")))?;
    let unnamed = |home: &Path| {
        let mut train = homeroom();
        train.args(["fine-tune", "--max-steps", "1", "--model-name"]).arg(&from).arg("--training-file").arg(&rows);
        train.env("HOMEROOM_HOME", home);
        train
    };
    check(&mut unnamed(&odd.join("home")))?;
    check(unnamed(&place.path("home")).arg("--output-dir").arg(odd.join("out")))?;
    leaves_nothing(&place)?;
    succeeds(&mut place.fine_tune(&from, &rows))?;
    let mut export = homeroom();
    export.args(["export-model", "--json", "--model-dir"]).arg(place.path("outputs/out"));
    check(export.arg("--output-dir").arg(odd.join("merged")))?;
    fs::create_dir_all(odd.join("home/models"))?;
    fs::rename(place.path("outputs/out"), odd.join("home/models/rows"))?;
    check(homeroom().args(["list-models", "--json"]).env("HOMEROOM_HOME", odd.join("home")))
}

/// What is written is as open as the user's umask says, since it may repeat what it was trained on; and nobody else may change it.
#[test]
fn what_is_written_is_as_open_as_the_users_other_files() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    for (strategy, umask, directory, file) in [
        ("lora", "027", 0o750, 0o640),
        ("full", "077", 0o700, 0o600),
        ("lora", "002", 0o755, 0o644),
        ("lora", "000", 0o755, 0o644),
    ] {
        let mut train = place.fine_tune(&fixture("models/llama"), &rows);
        train.args(["--max-steps", "1", "--overwrite", "--strategy", strategy]);
        succeeds(&mut in_shell(&format!("umask {umask}"), &train))?;
        let mode = |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
        let out = place.path("outputs/out");
        assert_eq!(mode(&out)?, directory);
        for entry in fs::read_dir(&out)? {
            let path = entry?.path();
            assert_eq!(mode(&path)?, file, "{}", path.display());
        }
    }
    Ok(())
}

/// A directory that came to be there during the run is nobody's to replace; the run is not lost for it.
#[test]
fn a_result_whose_place_was_taken_meanwhile_is_kept_beside_it() -> Result<()> {
    let place = Place::new()?;
    let mut running = Running::start(&mut endless(&place)?)?;
    running.wait_for("step ")?;
    let theirs = place.write("outputs/out/tokenizer.json", "theirs")?;
    running.signal(libc::SIGINT)?;
    let (code, stdout, stderr) = running.end()?;
    assert!(code == Some(1) && stdout.is_empty(), "{stderr}");
    assert_eq!(fs::read_to_string(theirs)?, "theirs");
    let outputs = place.outputs()?;
    let [out, kept] = outputs.as_slice() else { anyhow::bail!("{outputs:?}") };
    assert!(out == "out" && stderr.contains(&format!("it is whole in {}", place.path("outputs").join(kept).display())));
    assert!(stderr.contains("the directory is not empty"), "{stderr}");
    assert!(!stderr.contains("homeroom-kept-"), "it is kept once, and one place is named:\n{stderr}");
    // It is nobody's litter.
    succeeds(place.fine_tune(&fixture("models/llama"), &place.rows("few.jsonl", 2)?).args([
        "--max-steps",
        "1",
        "--overwrite",
    ]))?;
    AdapterFiles::read(&place.path("outputs").join(kept))?.adapt(&model("llama")?, false)?;
    Ok(())
}
