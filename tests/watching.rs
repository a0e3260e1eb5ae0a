//! Commands that follow files while they run: a saved edit takes effect, a bad one is told in one line and changes nothing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::handlers::http;
use crate::support::{Place, fixture, homeroom, root};

/// A command that goes on, and the lines of its stderr.
struct Following {
    child: Child,
    lines: Receiver<String>,
}

impl Following {
    fn start(command: &mut Command) -> Result<Self> {
        Self::start_into(command, Stdio::null())
    }

    /// With its result somewhere.
    fn start_into(command: &mut Command, result: Stdio) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(result).stderr(Stdio::piped()).spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("it was piped")?);
        let (sender, lines) = channel();
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Ok(Self { child, lines })
    }

    /// Waits for a line with some text.
    fn says(&self, text: &str) -> Result<String> {
        let mut before = Vec::new();
        loop {
            match self.lines.recv_timeout(Duration::from_secs(60)) {
                Ok(line) if line.contains(text) => return Ok(line),
                Ok(line) => before.push(line),
                Err(_) => bail!("it did not say `{text}`, it said:\n{}", before.join("\n")),
            }
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_server_follows_its_file_of_handlers() -> Result<()> {
    let place = Place::new()?;
    let model = fixture("models/llama").display().to_string();
    let file = |routes: &[&str]| {
        let routes: String = routes.iter().map(|name| format!("[routes.{name}]\nhandlers = [\"near\"]\n")).collect();
        format!("[handlers.near]\nkind = \"local\"\nmodel = {model:?}\n{routes}")
    };
    let path = place.write("handlers.toml", file(&["tutor"]))?;
    let server = Following::start(homeroom().arg("serve").arg("--config").arg(&path).args(["--port", "0"]))?;
    let line = server.says("serving")?;
    let url = line.split_whitespace().nth(1).context("the line names the address")?;
    let address = url.trim_start_matches("http://").trim_end_matches("/v1").parse()?;
    let models = || -> Result<Vec<String>> {
        let list: serde_json::Value =
            serde_json::from_str(&http(address, "GET /v1/models HTTP/1.1\r\nhost: localhost", "")?.2)?;
        let ids = list["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
        Ok(ids.map(str::to_owned).collect())
    };
    assert_eq!(models()?, ["tutor"]);
    // As editors save: another file in its place.
    let other = place.write("new.toml", file(&["reader", "tutor"]))?;
    fs::rename(other, &path)?;
    server.says("reader, tutor")?;
    assert_eq!(models()?, ["reader", "tutor"]);
    fs::write(&path, "[handlers.near]\nkind = \"locale\"\n")?;
    server.says("refused:")?;
    assert_eq!(models()?, ["reader", "tutor"]);
    fs::write(&path, file(&["writer"]))?;
    server.says(": writer")?;
    assert_eq!(models()?, ["writer"]);
    Ok(())
}

#[test]
fn a_pipeline_runs_again_when_its_script_is_saved() -> Result<()> {
    let place = Place::new()?;
    place.write("scripts/one.lua", "print(\"first\")\nreturn nil\n")?;
    let config = place.write("one.toml", "[pipeline]\nscript = \"scripts/one.lua\"\n")?;
    let run = Following::start(homeroom().arg("run").arg(&config).arg("--watch"))?;
    run.says("first")?;
    run.says("watching")?;
    place.write("scripts/one.lua", "retrun nil\n")?;
    run.says("error:")?;
    run.says("watching")?;
    place.write("scripts/one.lua", "print(\"second\")\nreturn nil\n")?;
    run.says("second")?;
    run.says("watching")?;
    // It waits, and there is no step that it could end.
    // SAFETY: kill has no memory preconditions; the child was not waited for, so the number is still its own.
    unsafe { libc::kill(run.child.id() as i32, libc::SIGINT) };
    let said = run.says("interrupted: ")?;
    assert!(said.contains("interrupted: ending"), "{said}");
    Ok(())
}

/// A save of equal bytes is no change; one in mid-training stops it after its step, unless what was saved is wrong.
#[test]
fn a_training_starts_again_for_an_edit_that_is_right_and_goes_on_for_one_that_is_not() -> Result<()> {
    let place = Place::new()?;
    place.rows("rows.jsonl", 8)?;
    let model = fixture("models/llama").display().to_string();
    let script = |steps: &str, rate: &str| {
        format!(
            "local data = homeroom.prepare_dataset {{ path = \"rows.jsonl\" }}\n\
             local tuned = homeroom.fine_tune {{ model = params.model, dataset = data.train, steps = {steps}, learning_rate = {rate} }}\n\
             print(\"trained \" .. tuned.metrics.steps)\n"
        )
    };
    place.write("one.lua", script("1000000", "1e-3"))?;
    let config = place.write(
        "one.toml",
        format!(
            "[pipeline]\nscript = \"one.lua\"\n[pipeline.params]\nmodel = {{ type = \"model\", default = {model:?} }}\n"
        ),
    )?;
    let mut command = homeroom();
    let run =
        Following::start(command.arg("run").arg(&config).arg("--watch").env("HOMEROOM_HOME", place.path("home")))?;
    run.says("step ")?;
    // Saved as it was; then with a mistake: neither stops it.
    place.write("one.lua", script("1000000", "1e-3"))?;
    std::thread::sleep(Duration::from_millis(700));
    place.write("one.lua", script("3", "50"))?;
    let changed = run.says("changed ")?;
    assert!(changed.contains("one.lua"), "{changed}");
    let problem = run.says("error: ")?;
    assert!(problem.contains("one.lua:2: fine_tune: `learning_rate` should be"), "{problem}");
    run.says("goes on as it was")?;
    place.write("one.lua", script("3", "2e-3"))?;
    run.says("changed ")?;
    run.says("again ")?;
    run.says("stopped after step ")?;
    run.says("trained 3")?;
    run.says("watching")?;
    Ok(())
}

/// What a run writes where its scripts are is no reason to run again; a module that it required is, and one that it looked for.
#[test]
fn a_pipeline_never_follows_what_it_writes() -> Result<()> {
    let place = Place::new()?;
    place.write("scripts/lib/x.lua", "return { word = \"first\" }\n")?;
    place.write("scripts/other.lua", "return {}\n")?;
    let model = fixture("models/llama").display().to_string();
    place.write(
        "scripts/one.lua",
        "local x = require(\"lib/x\")\nprint(x.word)\nhomeroom.create_handler { name = x.word, model = params.model }\n\
         print(\"written\")\nreturn { word = x.word }\n",
    )?;
    let config = place.write(
        "scripts/one.toml",
        format!(
            "[pipeline]\nscript = \"one.lua\"\n[pipeline.params]\nmodel = {{ type = \"model\", default = {model:?} }}\n"
        ),
    )?;
    let mut command = homeroom();
    command.arg("run").arg(&config).arg("--watch").env("HOMEROOM_HOME", place.path("scripts/home"));
    let result = fs::File::create(place.path("scripts/result.txt"))?;
    let run = Following::start_into(&mut command, result.into())?;
    run.says("written")?;
    let watching = run.says("watching")?;
    for name in ["one.toml", "one.lua", "lib/x.lua"] {
        assert!(watching.contains(name), "{watching}");
    }
    assert!(!watching.contains("other.lua") && !watching.contains("home"), "{watching}");
    assert!(place.path("scripts/home/handlers.toml").exists());
    // None of these is a change: the next that is told is the module.
    place.write("scripts/other.lua", "return { 1 }\n")?;
    place.write("scripts/run.log", "a line\n")?;
    place.write("scripts/lib/x.lua", "return { word = require(\"lib/y\").word }\n")?;
    let changed = run.says("changed")?;
    assert!(changed.contains("lib/x.lua"), "{changed}");
    run.says("there is no module `lib/y`")?;
    run.says("watching")?;
    place.write("scripts/lib/y.lua", "return { word = \"second\" }\n")?;
    let changed = run.says("changed")?;
    assert!(changed.contains("lib/y.lua"), "{changed}");
    run.says("second")?;
    Ok(())
}

#[test]
fn a_crate_is_built_again_when_its_source_is_saved() -> Result<()> {
    let place = Place::new()?;
    let sdk = root().join("plugins/sdk");
    place.write(
        "crate/Cargo.toml",
        format!(
            "[package]\nname = \"watched\"\nedition = \"2024\"\n\n[lib]\ncrate-type = [\"cdylib\"]\n\n[dependencies]\nhomeroom-sdk = {{ path = {sdk:?} }}\n\n[workspace]\n"
        ),
    )?;
    fs::copy(root().join("Cargo.lock"), place.path("crate/Cargo.lock"))?;
    let source = fs::read_to_string(root().join("plugins/lora/src/lib.rs"))?;
    place.write("crate/src/lib.rs", &source)?;
    let mut command = homeroom();
    // Its dependencies are built here already.
    command.env("CARGO_TARGET_DIR", std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("watched"));
    let watch = Following::start(command.args(["plugins", "watch"]).arg(place.path("crate")))?;
    watch.says("built  ")?;
    place.write("crate/src/lib.rs", source.replace("export_strategy!(Plain)", "export_strategy!(Plane)"))?;
    watch.says("changed")?;
    watch.says("not built")?;
    place.write("crate/src/lib.rs", source + "\n// Saved again.\n")?;
    watch.says("built  ")?;
    Ok(())
}
