//! Many processes and users on one machine: what they write at once, what those leave that are killed, and who may read it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::models::BaseModel;

use crate::command_line::{Running, WIDE_R, in_shell, wide_model};
use crate::support::{Place, eval, fixture, homeroom, model, refused, run, succeeds};

/// A pipeline with its parameters `name` and `model`, the rows `rows.jsonl`, and its home `home`.
fn pipeline(place: &Place, script: &str) -> Result<PathBuf> {
    place.write("s.lua", script)?;
    place.rows("rows.jsonl", 6)?;
    let model = fixture("models/llama").display().to_string();
    place.write(
        "c.toml",
        format!(
            "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\nname = {{ type = \"string\", default = \"one\" }}\n\
             model = {{ type = \"path\", default = {model:?} }}\nrows = {{ type = \"path\", default = \"rows.jsonl\" }}\n"
        ),
    )
}

fn run_pipeline(place: &Place, config: &Path, name: &str) -> Command {
    let mut command = homeroom();
    command.arg("run").arg(config).args(["--set", &format!("name={name}")]).env("HOMEROOM_HOME", place.path("home"));
    command
}

const HANDLER: &str = "return homeroom.create_handler { name = params.name, model = params.model }";

/// Trains a step, and saves.
const SAVE: &str = "local data = homeroom.prepare_dataset { path = params.rows }\n\
    local model = homeroom.load_model { name = params.model, r = 4 }\n\
    local tuned = homeroom.fine_tune { model = model, dataset = data.train, steps = 1 }\n\
    local saved = homeroom.save_model { model = tuned, name = string.sub(params.name, 1, 1) }\n\
    return homeroom.create_handler { name = params.name, model = saved }";

/// `fine-tune` of the tiny model, its result in a path of the place.
fn train(place: &Place, output: &str) -> Result<Command> {
    train_on(&fixture("models/llama"), place, output)
}

fn train_on(model: &Path, place: &Place, output: &str) -> Result<Command> {
    let mut command = homeroom();
    command.args(["fine-tune", "--output-dir"]).arg(place.path(output)).arg("--training-file");
    command.arg(place.rows("rows.jsonl", 6)?).arg("--model-name").arg(model);
    Ok(command)
}

/// The same, its result under a name in the place's home.
fn train_named(place: &Place, name: &str) -> Result<Command> {
    let mut command = homeroom();
    command.args(["fine-tune", "--name", name, "--training-file"]).arg(place.rows("rows.jsonl", 6)?);
    command.arg("--model-name").arg(fixture("models/llama")).env("HOMEROOM_HOME", place.path("home"));
    Ok(command)
}

/// Runs commands at once, all of which must succeed; returns what they say.
fn at_once(commands: impl IntoIterator<Item = Command>) -> Result<Vec<String>> {
    let start = |mut command: Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn()
    };
    let children = commands.into_iter().map(start).collect::<std::io::Result<Vec<_>>>()?;
    let told = |child: Child| {
        let output = child.wait_with_output()?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{told}");
        Ok(told)
    };
    children.into_iter().map(told).collect()
}

/// The names of the handlers in the home's file.
fn handlers(place: &Place) -> Result<Vec<String>> {
    let file: toml::Table = fs::read_to_string(place.path("home/handlers.toml"))?.parse()?;
    let handlers = file["handlers"].as_table().context("a table of handlers")?;
    let mut names: Vec<String> = handlers.keys().cloned().collect();
    names.sort();
    Ok(names)
}

/// All files and directories below a path.
fn below(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?);
        }
        found.push(path);
    }
    Ok(found)
}

/// Names that only the unfinished have.
fn litter(place: &Path) -> Result<Vec<PathBuf>> {
    let is_temporary =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".homeroom-"));
    Ok(below(place)?.into_iter().filter(is_temporary).collect())
}

fn is_whole(adapter: &Path) -> Result<()> {
    is_whole_on(&model("llama")?, adapter)
}

fn is_whole_on(base: &BaseModel, adapter: &Path) -> Result<()> {
    AdapterFiles::read(adapter)?.adapt(base, false)?;
    Ok(())
}

// --- at once ---------------------------------------------------------------------------------------------------------

#[test]
fn fifty_pipelines_at_once_leave_fifty_handlers() -> Result<()> {
    let place = Place::new()?;
    let config = pipeline(&place, HANDLER)?;
    let names: Vec<String> = (10..60).map(|number| format!("handler-{number}")).collect();
    at_once(names.iter().map(|name| run_pipeline(&place, &config, name)))?;
    assert_eq!(handlers(&place)?, names);
    assert!(litter(&place.path("home"))?.is_empty());
    Ok(())
}

/// Whole pipelines, of which some save under one name: each has its run, or what the run of another made before it came to that; and every
/// name leads to a whole model.
#[test]
fn twelve_whole_pipelines_at_once_undo_nothing_of_each_other() -> Result<()> {
    let place = Place::new()?;
    let config = pipeline(&place, SAVE)?;
    let names: Vec<String> =
        ["a", "b", "c"].iter().flat_map(|name| (1..=4).map(move |n| format!("{name}{n}"))).collect();
    let told = at_once(names.iter().map(|name| run_pipeline(&place, &config, name)))?;
    assert_eq!(handlers(&place)?, names);
    let found_all = told.iter().filter(|told| !told.contains("run       ") && told.contains("from run ")).count();
    assert_eq!(fs::read_dir(place.path("home/runs"))?.count(), 12 - found_all, "{told:?}");
    assert_eq!(fs::read_dir(place.path("home/models"))?.count(), 3);
    for name in ["a", "b", "c"] {
        is_whole(&place.path("home/models").join(name))?;
    }
    assert!(litter(&place.path("home"))?.is_empty(), "{:?}", litter(&place.path("home"))?);
    Ok(())
}

// --- killed ----------------------------------------------------------------------------------------------------------

/// Whenever it is killed, the name leads to the older result or to the new one, without anybody having to repair it.
#[test]
fn a_run_that_is_killed_while_it_overwrites_leaves_the_older_result_or_its_own() -> Result<()> {
    let place = Place::new()?;
    let out = place.path("outputs/out");
    let mut command = train(&place, "outputs/out")?;
    command.args(["--max-steps", "1", "--overwrite", "--lora-r", "8"]);
    succeeds(&mut command)?;
    let inode = || anyhow::Ok(fs::metadata(&out)?.ino());
    let (mut older, mut newer) = (0, 0);
    for kill in 0..40 {
        let before = inode()?;
        let mut running = Running::start(&mut command)?;
        running.wait_for("step ")?;
        sleep(Duration::from_micros(250 * kill));
        running.signal(libc::SIGKILL)?;
        running.end()?;
        is_whole(&out).with_context(|| format!("kill {kill}"))?;
        *(if inode()? == before { &mut older } else { &mut newer }) += 1;
    }
    ensure!(older > 0, "each of {newer} runs had ended before it was killed");
    succeeds(&mut command)?;
    assert_eq!(place.outputs()?, ["out"]);
    Ok(())
}

/// A run that is just saving a large adapter, killed with `signal`; the directory that it was filling.
fn caught_while_saving(place: &Place, output: &str, signal: i32) -> Result<(Running, PathBuf)> {
    let wide = wide_model(place)?;
    for _ in 0..20 {
        let mut command = train_on(&wide, place, output)?;
        command.args(["--max-steps", "1000000", "--overwrite", "--lora-r", WIDE_R]);
        let before = litter(&place.path("outputs"))?;
        let mut running = Running::start(&mut command)?;
        running.wait_for("step ")?;
        running.signal(libc::SIGINT)?;
        while running.child.try_wait()?.is_none() {
            let now = litter(&place.path("outputs"))?;
            if let Some(filled) = now.into_iter().find(|path| !before.contains(path)) {
                running.signal(signal)?;
                sleep(Duration::from_millis(50));
                if filled.exists() {
                    return Ok((running, filled));
                }
                break;
            }
        }
    }
    anyhow::bail!("no run was caught while it saved")
}

#[test]
fn what_a_killed_run_was_filling_goes_with_the_next_run_and_a_living_run_keeps_its_own() -> Result<()> {
    let place = Place::new()?;
    // It holds still while it saves.
    let (living, filled) = caught_while_saving(&place, "outputs/living", libc::SIGSTOP)?;
    let (dead, left) = caught_while_saving(&place, "outputs/dead", libc::SIGKILL)?;
    assert_eq!(dead.end()?.0, None);
    assert!(left.exists() && filled.exists() && left != filled);
    succeeds(train(&place, "outputs/out")?.args(["--max-steps", "1"]))?;
    assert!(!left.exists() && filled.exists(), "{:?}", place.outputs()?);
    living.signal(libc::SIGCONT)?;
    let (code, _, stderr) = living.end()?;
    assert_eq!(code, Some(130), "{stderr}");
    is_whole_on(&BaseModel::load(&wide_model(&place)?)?, &place.path("outputs/living"))?;
    assert_eq!(place.outputs()?, ["living", "out"]);
    Ok(())
}

/// A killed pipeline's adapters lie in a directory that no later run uses; its litter is swept all the same.
#[test]
fn litter_in_the_home_goes_with_the_next_command_that_writes_there() -> Result<()> {
    let place = Place::new()?;
    let config = pipeline(&place, HANDLER)?;
    let dead = ["runs/s-1/adapters/.homeroom-tmp-0123456789ab", "models/.homeroom-tmp-0123456789ab"];
    for directory in dead {
        place.write(&format!("home/{directory}/adapter_model.safetensors"), "")?;
    }
    place.write("home/.homeroom-file-0123456789ab", "")?;
    let kept = place.write("home/models/mine/file", "")?;
    fs::set_permissions(place.path("home"), fs::Permissions::from_mode(0o700))?;
    succeeds(&mut run_pipeline(&place, &config, "one"))?;
    assert!(litter(&place.path("home"))?.is_empty(), "{:?}", litter(&place.path("home"))?);
    assert!(kept.exists());
    Ok(())
}

/// Where two names cannot be exchanged, a killed run may leave a name without its directory: whoever asks for it finds it.
#[test]
fn a_model_that_a_killed_run_left_without_its_name_is_found() -> Result<()> {
    let place = Place::new()?;
    let adapter = fixture("curves/lora/trained");
    let broken_off = |place: &Place| -> Result<()> {
        let aside = "home/models/.homeroom-tmp-0123456789ab";
        place.write(&format!("{aside}/old/tutor/file"), "")?;
        place.copy(&adapter, &format!("{aside}/new/tutor"))?;
        Ok(())
    };
    let rows = place.rows("rows.jsonl", 2)?;
    let asked: [&[&str]; 2] = [&["list-models"], &["eval", "--model-dir", "tutor"]];
    for arguments in asked {
        broken_off(&place)?;
        let mut command = homeroom();
        command.args(arguments).env("HOMEROOM_HOME", place.path("home"));
        if arguments[0] == "eval" {
            command.arg("--file").arg(&rows).arg("--base-model").arg(fixture("models/llama"));
        }
        let ran = succeeds(&mut command)?;
        assert!(arguments[0] == "eval" || ran.stdout.contains("tutor"), "{ran:?}");
        assert_eq!(fs::read_dir(place.path("home/models"))?.count(), 1);
        fs::remove_dir_all(place.path("home"))?;
    }
    // Nor is it taken for a free place.
    broken_off(&place)?;
    refused(&mut train_named(&place, "tutor")?, &["tutor: there is a model of this name already", "--overwrite"])
}

// --- who may read ----------------------------------------------------------------------------------------------------

fn mode(path: &Path) -> Result<u32> {
    Ok(fs::symlink_metadata(path)?.permissions().mode() & 0o777)
}

/// Also a strategy can be loaded whatever the umask is: its private copy is private.
#[test]
fn what_is_in_the_home_is_private_whatever_the_umask() -> Result<()> {
    for umask in ["000", "002", "007", "022", "077"] {
        let place = Place::new()?;
        let config = pipeline(&place, SAVE)?;
        let shell = |command: &Command| in_shell(&format!("umask {umask}"), command);
        succeeds(&mut shell(&run_pipeline(&place, &config, "one")))?;
        succeeds(&mut shell(train_named(&place, "named")?.args(["--max-steps", "1"])))?;
        let all = below(&place.path("home"))?;
        assert!(all.len() > 15, "{all:?}");
        for path in all {
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode(&path)?, expected, "umask {umask}: {}", path.display());
        }
        // Elsewhere it is the user's to say who may read.
        succeeds(&mut shell(train(&place, "outputs/new/out")?.args(["--max-steps", "1"])))?;
        let open = 0o755 & !u32::from_str_radix(umask, 8)?;
        for path in ["outputs/new", "outputs/new/out"] {
            assert_eq!(mode(&place.path(path))?, open, "umask {umask}: {path}");
        }
        assert_eq!(mode(&place.path("outputs/new/out/homeroom.json"))?, open & 0o666);
    }
    Ok(())
}

#[test]
fn a_home_that_others_can_read_is_told_and_one_that_they_can_write_is_refused() -> Result<()> {
    let place = Place::new()?;
    let config = pipeline(&place, HANDLER)?;
    let home = place.path("home");
    fs::create_dir(&home)?;
    let set = |mode: u32| fs::set_permissions(&home, fs::Permissions::from_mode(mode));
    let command = || run_pipeline(&place, &config, "one");
    for open in [0o755, 0o750, 0o770] {
        set(open)?;
        let ran = succeeds(&mut command())?;
        let note = format!("is open to other users (mode {open:o})");
        assert!(ran.stderr.matches(&note).count() == 1 && ran.stderr.contains("chmod -R go-rwx"), "{}", ran.stderr);
        assert_eq!(mode(&home.join("handlers.toml"))?, 0o600);
    }
    set(0o700)?;
    assert!(!succeeds(&mut command())?.stderr.contains("note: "));
    for open in [0o777, 0o1777, 0o703] {
        set(open)?;
        refused(&mut command(), &["everybody may write it", "chmod go-rwx"])?;
    }
    set(0o700)?;
    // What is only read may be another's; what is written may not.
    if std::os::unix::fs::chown(&home, Some(12345), Some(12345)).is_ok() {
        set(0o755)?;
        fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755))?;
        let as_user = |command: &mut Command| {
            std::os::unix::process::CommandExt::uid(command, 54321);
            run(command)
        };
        let listed = as_user(homeroom().arg("list-models").env("HOMEROOM_HOME", &home));
        // The program may lie where another user cannot run it.
        if listed.is_ok_and(|ran| ran.code == Some(0)) {
            let ran = as_user(&mut command())?;
            let words = "it belongs to another user (uid 12345); set HOMEROOM_HOME";
            assert!(ran.code == Some(1) && ran.stderr.contains(words), "{ran:?}");
        }
    }
    Ok(())
}

/// Files may not grow at all, as on a full disk. The file of handlers stays as it was.
#[test]
fn a_full_disk_leaves_the_older_handlers() -> Result<()> {
    let place = Place::new()?;
    let config = pipeline(&place, HANDLER)?;
    succeeds(&mut run_pipeline(&place, &config, "one"))?;
    let before = fs::read(place.path("home/handlers.toml"))?;
    let mut full = in_shell("trap '' XFSZ; ulimit -f 0", &run_pipeline(&place, &config, "two"));
    refused(&mut full, &["handlers.toml: cannot write; what is in it stays", "too large"])?;
    assert_eq!(fs::read(place.path("home/handlers.toml"))?, before);
    assert!(litter(&place.path("home"))?.is_empty());
    succeeds(&mut run_pipeline(&place, &config, "two"))?;
    assert_eq!(handlers(&place)?, ["one", "two"]);
    Ok(())
}

// --- files of others -------------------------------------------------------------------------------------------------

/// Opening a pipe waits for who writes to it: one in the place of a file must not hold a command for ever.
#[test]
fn a_pipe_in_the_place_of_a_file_is_refused_in_words() -> Result<()> {
    let place = Place::new()?;
    let pipe = |path: &Path| -> Result<()> {
        let _ = fs::remove_file(path);
        ensure!(Command::new("mkfifo").arg(path).status()?.success(), "mkfifo");
        Ok(())
    };
    let chat = |model: &Path| {
        let mut command = homeroom();
        command.args(["chat", "--prompt", "hi", "--max-tokens", "1", "--model-dir"]).arg(model);
        command
    };
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        let model = place.copy(&fixture("models/llama"), &format!("model-{file}"))?;
        pipe(&model.join(file))?;
        refused(&mut chat(&model), &["regular file"])?;
    }
    for file in ["adapter_config.json", "adapter_model.safetensors", "homeroom.json"] {
        let adapter = place.copy(&fixture("curves/lora/trained"), &format!("adapter-{file}"))?;
        pipe(&adapter.join(file))?;
        refused(chat(&adapter).arg("--base-model").arg(fixture("models/llama")), &["regular file"])?;
    }
    let fifo = place.path("fifo");
    pipe(&fifo)?;
    refused(&mut eval(&fixture("models/llama"), &fifo), &["not a regular file"])?;
    refused(&mut place.fine_tune(&fixture("models/llama"), &fifo), &["not a regular file"])?;
    // One bad entry of the registry does not hide the others, and a pipe as the file of handlers stops no pipeline.
    succeeds(train_named(&place, "good")?.args(["--max-steps", "1"]))?;
    let bad = place.copy(&place.path("home/models/good"), "home/models/bad")?;
    pipe(&bad.join("homeroom.json"))?;
    let mut list = homeroom();
    let listed = succeeds(list.args(["list-models", "--json"]).env("HOMEROOM_HOME", place.path("home")))?.stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    assert!(listed[0]["problem"].as_str().is_some_and(|problem| problem.contains("not a regular file")), "{listed}");
    assert!(listed[1]["name"] == "good" && listed[1]["problem"].is_null(), "{listed}");
    pipe(&place.path("home/handlers.toml"))?;
    refused(&mut run_pipeline(&place, &pipeline(&place, HANDLER)?, "x"), &["not a regular file"])?;
    Ok(())
}

/// A text that no context could hold is refused before tokens are made of it, which would take two hundred times its bytes.
#[test]
fn a_row_of_megabytes_is_refused_before_it_takes_gigabytes() -> Result<()> {
    let place = Place::new()?;
    let row = serde_json::json!({"text": "ab c".repeat(5 << 18)}).to_string();
    let rows = place.write("rows.jsonl", row + "\n")?;
    refused(
        eval(&fixture("models/llama"), &rows).args(["--on-long-row", "truncate"]),
        &["line 1", "too long to be made tokens of"],
    )?;
    Ok(())
}
