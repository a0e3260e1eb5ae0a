//! Pipelines: names in a TOML file, in `--set`, and in a script.

use std::process::{Child, Stdio};

use serde_json::Value;

use super::*;
use crate::support::{Ran, homeroom, printed_json, run, succeeds};

const TRAIN: &str = "local model = homeroom.load_model { name = params.model, r = 4 }\n\
    local data = homeroom.prepare_dataset { path = params.rows }\n\
    local tuned = homeroom.fine_tune { model = model, dataset = data.train, max_steps = 1 }\n\
    local saved = homeroom.save_model { model = tuned, name = \"tutor\" }\n\
    local base = homeroom.create_handler { name = \"base\", model = params.model }\n\
    local handler = homeroom.create_handler { name = \"tutor\", model = saved }\n\
    local loss = homeroom.evaluate { model = saved, dataset = data.train }.loss\n\
    return { tuned = tuned.model, saved = saved.model, base = base.model, handler = handler.model, loss = loss }\n";

struct Pipeline {
    place: Place,
    hub: Hub,
    config: PathBuf,
}

impl Pipeline {
    /// A script beside its TOML file, with a parameter `model` that is [`NAME`]. `more` stands in `[pipeline]`.
    fn new(script: &str, more: &str) -> Result<Self> {
        let place = Place::new()?;
        let hub = Hub::with_model(&place, "llama")?;
        place.rows("project/rows.jsonl", 4)?;
        place.write("project/s.lua", script)?;
        let config = place.write(
            "project/c.toml",
            format!(
                "[pipeline]\nscript = \"s.lua\"\n{more}\n[pipeline.params]\nmodel = {{ type = \"model\", default = \"{NAME}\" }}\n\
                 rows = {{ type = \"path\", default = \"rows.jsonl\" }}\nword = {{ type = \"string\", default = \"\" }}\n"
            ),
        )?;
        Ok(Self { place, hub, config })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = homeroom();
        command.arg("run").arg(&self.config).args(arguments).env("HOMEROOM_HOME", self.place.path("home"));
        self.hub.seen_by(&mut command);
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<Ran> {
        run(&mut self.command(arguments))
    }
}

#[test]
fn a_pipeline_trains_and_serves_a_model_by_its_name() -> Result<()> {
    let pipeline = Pipeline::new(TRAIN, "")?;
    let ran = pipeline.run(&["--check"])?;
    let told = format!("note: `model`: {NAME} is in the cache, at {FIRST}");
    assert!(ran.code == Some(0) && ran.stderr.contains(&told), "{}", ran.stderr);
    let dry = succeeds(&mut pipeline.command(&["--dry-run"]))?;
    assert!(dry.stdout.contains(&format!("train   {NAME} with lora")), "{}", dry.stdout);
    let ran = succeeds(&mut pipeline.command(&["--json"]))?;
    assert!(ran.stderr.ends_with("next      homeroom chat --handler tutor\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("model     Org-7/tiny_Llama.v2@1a2b3c4   "), "{}", ran.stderr);
    let result = printed_json(&ran)?;
    // Names go into the file of handlers, not paths of the cache.
    let pinned = format!("{NAME}@{FIRST}");
    for (key, value) in [("tuned", NAME), ("base", NAME), ("handler", "tutor")] {
        assert_eq!(result[key], value, "{key}");
    }
    assert!([NAME, pinned.as_str()].contains(&result["saved"].as_str().unwrap_or_default()), "{result}");
    let config = pipeline.place.path("home/handlers.toml");
    assert!(fs::read_to_string(&config)?.contains(&format!("model = \"{NAME}\"")));
    let mut chat = homeroom();
    chat.args(["chat", "--prompt", "hi", "--max-tokens", "2", "--handler", "tutor"]);
    succeeds(pipeline.hub.seen_by(chat.env("HOMEROOM_HOME", pipeline.place.path("home"))))?;

    // The saved adapter is loaded by another run, once its base is in another store.
    let bases = pipeline.place.path("bases");
    fs::rename(&pipeline.hub.0, &bases)?;
    pipeline.place.write(
        "project/s.lua",
        "local model = homeroom.load_fine_tuned_model { name = \"tutor\" }\n\
         local data = homeroom.prepare_dataset { path = params.rows }\n\
         return { model = model.model, loss = homeroom.evaluate { model = model, dataset = data.train }.loss }\n",
    )?;
    let again = printed_json(&succeeds(pipeline.command(&["--json"]).env("HOMEROOM_BASES", &bases))?)?;
    assert_eq!((&again["model"], &again["loss"]), (&pinned.into(), &result["loss"]));
    Ok(())
}

#[test]
fn what_a_script_computes_is_never_asked_for() -> Result<()> {
    let evaluate = |name: &str| {
        format!(
            "local data = homeroom.prepare_dataset {{ path = params.rows }}\n\
             local said = data.train:rows()[1].messages[1].content:gsub(\"%W\", \"\")\n\
             local ok, message = pcall(function()\n\
               return homeroom.evaluate {{ model = {name}, dataset = data.train }}\n\
             end)\n\
             return {{ ok = ok, message = if ok then \"\" else message }}\n"
        )
    };
    let nobody = Nobody::new()?;
    let result = |script: &str, arguments: &[&str]| -> Result<(bool, String)> {
        let pipeline = Pipeline::new(script, "")?;
        let mut command = pipeline.command(arguments);
        let result: Value = printed_json(&succeeds(nobody.seen_by(command.arg("--json"))?)?)?;
        Ok((result["ok"] == true, result["message"].as_str().unwrap_or_default().to_owned()))
    };
    // A model in the cache is as good by another name.
    assert_eq!(result(&evaluate(&format!("\"{NAME}@main\"")), &[])?, (true, String::new()));
    // Names that only a script says, or that `--set` gives for a text, are not downloaded: they could hold rows.
    for (name, shown) in [("\"thief/\" .. said", "thief/timesseven0"), ("params.word", "thief/word")] {
        let (ok, message) = result(&evaluate(name), &["--set", "word=thief/word"])?;
        let told = message.contains(shown) && message.contains("a name could carry rows");
        assert!(!ok && told && message.contains("`homeroom pull thief/"), "{message}");
    }
    // Nor is a path into the cache a name.
    let pipeline = Pipeline::new("", "")?;
    let snapshot = pipeline.hub.snapshot(NAME, FIRST);
    pipeline.place.write("project/s.lua", evaluate(&format!("{:?}", snapshot.display().to_string())))?;
    let told = printed_json(&succeeds(&mut pipeline.command(&["--json"]))?)?;
    let message = told["message"].as_str().unwrap_or_default();
    assert!(told["ok"] == false && message.contains("a script reads what a parameter"), "{told}");
    nobody.was_left_alone()
}

/// Who put an adapter on the hub is a stranger, whoever named it.
#[test]
fn an_adapter_of_the_hub_opens_no_path_of_this_machine() -> Result<()> {
    let pipeline = Pipeline::new(
        "local model = homeroom.load_fine_tuned_model { name = params.word }\nreturn { base = model.model }\n",
        "",
    )?;
    let adapter = pipeline.place.copy(&fixture("curves/lora/trained"), "adapter")?;
    let private = pipeline.place.copy(&fixture("models/llama"), "private")?;
    let add = |name: &str, base: &str| -> Result<()> {
        crate::command_line::set_fields(
            &adapter.join("adapter_config.json"),
            serde_json::json!({"base_model_name_or_path": base}),
        )?;
        pipeline.hub.add(name, SECOND, &files_of(&adapter)?)?;
        pipeline.hub.set(name, "main", SECOND)
    };
    add("a/honest", NAME)?;
    add("a/thief", &private.display().to_string())?;
    let ran = succeeds(&mut pipeline.command(&["--json", "--set", "word=a/honest"]))?;
    assert_eq!(printed_json(&ran)?["base"], NAME);
    let ran = pipeline.run(&["--set", "word=a/thief"])?;
    assert!(ran.code == Some(1) && ran.stderr.contains("its base: ") && ran.stderr.contains("a script reads what"));
    Ok(())
}

#[test]
fn a_pipeline_that_is_offline_or_only_looked_at_downloads_nothing() -> Result<()> {
    let nobody = Nobody::new()?;
    let missing = "model=Org-8/not-here";
    let [plain, offline] = [Pipeline::new(TRAIN, "")?, Pipeline::new(TRAIN, "offline = true")?];
    let in_toml = "its TOML file says `offline = true`";
    let by_flag = "nothing is downloaded (--offline)";
    for (pipeline, arguments, words) in [
        (&plain, ["--check", "--offline"].as_slice(), by_flag),
        (&offline, &["--check"], in_toml),
        (&plain, &["--dry-run"], "a dry run downloads nothing"),
        (&plain, &["--offline"], by_flag),
        (&offline, &[], in_toml),
    ] {
        let mut command = pipeline.command(arguments);
        let ran = run(nobody.seen_by(command.args(["--set", missing]))?)?;
        let told = ran.stderr.contains(words) && ran.stderr.contains("homeroom pull Org-8/not-here`");
        assert!(ran.code == Some(1) && told && ran.stdout.is_empty(), "{arguments:?}: {}", ran.stderr);
        let told = ran.stderr.contains("--set model: Org-8/not-here: not on this machine; ");
        assert!(told, "{}", ran.stderr);
    }
    let ran = run(nobody.seen_by(plain.command(&["--check"]).args(["--set", missing]))?)?;
    let told = ran.stderr.contains("`model`: Org-8/not-here is not in the cache; a run downloads it");
    assert!(ran.code == Some(0) && told, "{}", ran.stderr);
    // What is there is used, offline or not.
    succeeds(nobody.seen_by(&mut offline.command(&[]))?)?;
    assert!(!plain.place.path("home/runs").exists());
    nobody.was_left_alone()
}

#[test]
fn a_check_says_which_file_is_wrong_and_puts_what_to_do_last() -> Result<()> {
    let pipeline = Pipeline::new("homeroom.fine_tun {}\n", "")?;
    let ran = pipeline.run(&["--check", "--offline", "--set", "model=Org-8/x", "--set", "rows=gone.jsonl"])?;
    let (problems, hint) = ran.stderr.split_once("\nhint: ").context("a hint")?;
    assert!(problems.contains("c.toml: 3 problems\n") && problems.lines().count() == 4, "{}", ran.stderr);
    assert!(problems.contains("s.lua:1: ") && hint.contains("homeroom pull Org-8/x`"), "{}", ran.stderr);
    // No text is no model, and not the directory that names are relative to.
    let ran = pipeline.run(&["--check", "--set", "model="])?;
    assert!(ran.code == Some(1) && ran.stderr.contains("--set model=: it is empty; name a model"), "{}", ran.stderr);
    Ok(())
}

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file is saved in the middle of typing: a name that comes so is looked for here, and nowhere else.
#[test]
fn a_name_that_an_edit_brings_is_not_downloaded_while_a_pipeline_is_watched() -> Result<()> {
    let pipeline = Pipeline::new("return { model = params.model }\n", "")?;
    let nobody = Nobody::new()?;
    let mut command = pipeline.command(&["--watch"]);
    let mut running = Running(nobody.seen_by(&mut command)?.stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?);
    let story = Story::of(running.0.stderr.take().context("a pipe")?);
    let edit = |to: &str| -> Result<()> {
        let text = fs::read_to_string(&pipeline.config)?.replace(NAME, to);
        Ok(fs::write(&pipeline.config, text)?)
    };
    story.until("watching  ")?;
    edit("Org-8/not-he")?;
    let story = story.until("watching  ")?;
    let told = story.contains("a name that comes by an edit is not downloaded") && story.contains("pull Org-8/not-he`");
    assert!(told, "{story}");
    nobody.was_left_alone()
}
