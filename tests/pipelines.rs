//! Pipelines as users run them: the program, a TOML file, a script, tiny models and strategies from their `.so` files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use homeroom::pipeline::reference;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{fixture, homeroom, plugin_path, root};

/// A directory with rows, and a data directory of its own.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Result<Self> {
        let place = Self { dir: tempfile::tempdir()? };
        let rows: Vec<String> = (0..24).map(|n| row(n).to_string()).collect();
        place.write("rows.jsonl", &rows.join("\n"))?;
        place.write("text.md", "# Water\n\nWater is wet, and ice is cold.\n\n## Steam\n\nSteam is hot. It rises.\n")?;
        Ok(place)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn home(&self) -> PathBuf {
        self.path("home")
    }

    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        std::fs::write(self.path(name), text)?;
        Ok(self.path(name))
    }

    /// A configuration for a script of this place, with the tiny model and the rows as parameters.
    pub fn config(&self, script: &str) -> Result<PathBuf> {
        self.write("s.lua", script)?;
        let model = fixture("models/llama");
        let text = format!(
            "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\nmodel = {{ type = \"path\", default = {:?} }}\n\
             dataset = {{ type = \"path\", default = \"rows.jsonl\" }}\n\
             text = {{ type = \"path\", default = \"text.md\" }}\nanswers = {{ type = \"handler\" }}\nn = {{ type = \"int\", default = 1 }}\n",
            model.display().to_string()
        );
        self.write("c.toml", &text)
    }

    pub fn command(&self, config: &Path) -> Command {
        let plugins = plugin_path("lora").parent().map(Path::to_owned).unwrap_or_default();
        let mut command = homeroom();
        command.arg("run").arg(config).env("HOMEROOM_HOME", self.home()).env("HOMEROOM_PLUGINS", plugins);
        command
    }

    pub fn run(&self, script: &str, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(&self.config(script)?).args(arguments).output()?)
    }

    /// What a script returns.
    pub fn result(&self, script: &str) -> Result<Value> {
        let output = self.run(script, &["--json"])?;
        ensure!(output.status.success(), "{}", stderr(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// What a script's failure says, without the `error: ` before it.
    pub fn error(&self, script: &str) -> Result<String> {
        let output = self.run(script, &[])?;
        ensure!(output.status.code() == Some(1), "it should fail: {script}\n{}", stderr(&output));
        let text = stderr(&output);
        let (_, message) = text.split_once("error: ").context("a failure says `error: `")?;
        Ok(message.trim_end().to_owned())
    }
}

fn row(n: usize) -> Value {
    let sum = format!("{n} + {n} is {}", 2 * n);
    let mut messages =
        vec![json!({"role": "user", "content": format!("{n} + {n}?")}), json!({"role": "assistant", "content": sum})];
    if n.is_multiple_of(3) {
        messages.extend([json!({"role": "user", "content": "Sure?"}), json!({"role": "assistant", "content": "Yes."})]);
    }
    json!({"messages": messages, "level": n % 5, "id": n, "note": null, "meta": {"z": 1, "a": {}}})
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub const TRAIN: &str = "local model = homeroom.load_model { name = params.model, r = 4 }\n\
    local data = homeroom.prepare_dataset { path = params.dataset, eval = 0.25 }\n";

/// A module that two others need is read once, and those behind it are read too.
#[test]
fn a_problem_in_any_of_several_modules_is_told_before_the_run() -> Result<()> {
    let place = Place::new()?;
    place.write("last.lua", "return { value = nobody }")?;
    for name in ["one", "two"] {
        place.write(&format!("{name}.lua"), "local shared = require(\"shared\")\nreturn shared")?;
    }
    place.write("shared.lua", "return { value = 3 }")?;
    let config = place.config(
        "local last, one, two = require(\"last\"), require(\"one\"), require(\"two\")\nreturn { last, one, two }",
    )?;
    let output = place.command(&config).arg("--check").output()?;
    let said = stderr(&output);
    assert!(output.status.code() == Some(1) && said.contains("last.lua:1: ") && said.contains("`nobody`"), "{said}");
    Ok(())
}

/// The shipped configurations run as their first lines say, and print what their scripts promise.
#[test]
fn shipped_configurations_run() -> Result<()> {
    let place = Place::new()?;
    let rows = place.path("rows.jsonl");
    for (name, settings) in
        [("fine_tune", vec!["epochs=1", "max_steps=2"]), ("curriculum", vec!["max_steps=3", "eval_steps=2", "r=4"])]
    {
        let config = root().join("configs").join(format!("{name}.toml"));
        let set = |command: &mut Command| {
            command.arg("--set").arg(format!("model={}", fixture("models/llama").display()));
            command.arg("--set").arg(format!("dataset={}", rows.display()));
            for setting in &settings {
                command.args(["--set", setting]);
            }
        };
        let mut check = place.command(&config);
        set(&mut check);
        let output = check.arg("--check").output()?;
        assert!(output.status.success(), "{}", stderr(&output));

        let mut run = place.command(&config);
        set(&mut run);
        let output = run.args(["--json", "--set", &format!("name=the-{}", name.replace('_', "-"))]).output()?;
        assert!(output.status.success(), "{}", stderr(&output));
        let result: Value = serde_json::from_slice(&output.stdout)?;
        assert!(result["eval_loss"].as_f64().is_some_and(f64::is_finite), "{result}");
        let model = result["model"].as_str().context("it names its model")?;
        assert!(place.home().join("models").join(model).join("adapter_model.safetensors").exists());
    }
    let handlers = std::fs::read_to_string(place.home().join("handlers.toml"))?;
    assert!(handlers.contains("[handlers.the-fine-tune]\nkind = \"local\"\nmodel = \"the-fine-tune\""), "{handlers}");
    assert!(handlers.contains("[handlers.the-curriculum]"), "{handlers}");
    Ok(())
}

/// Every key that a shipped file has is told of, and every file is in the table.
#[test]
fn readmes_name_every_file_and_key() -> Result<()> {
    use homeroom::pipeline::config::{PARAM_KEYS, PIPELINE_KEYS, PLUGINS_KEYS};
    for directory in ["configs", "scripts"] {
        let readme = std::fs::read_to_string(root().join(directory).join("README.md"))?;
        for entry in std::fs::read_dir(root().join(directory))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            assert!(name == "README.md" || readme.contains(&name), "{directory}/README.md does not name {name}");
        }
        if directory == "configs" {
            for (key, doc) in PIPELINE_KEYS.into_iter().chain(PARAM_KEYS).chain(PLUGINS_KEYS) {
                assert!(readme.contains(&format!("| `{key}` | {doc} |")), "configs/README.md: `{key}`");
            }
        }
    }
    Ok(())
}

/// All examples of the reference, one after another, on the tiny model.
#[test]
fn every_example_of_the_reference_runs() -> Result<()> {
    let place = Place::new()?;
    let script = format!(
        "{}\nreturn {{ tuned = tuned, saved = saved, handler = handler, answers = answers }}",
        reference::examples()
    );
    let result = place.result(&script)?;
    assert_eq!(result["saved"]["name"], "algebra-tutor");
    assert_eq!(result["saved"]["adapter"], "algebra-tutor");
    assert_eq!(result["handler"], json!({"kind": "local", "model": "algebra-tutor", "name": "tutor"}));
    assert_eq!(result["answers"].as_array().map(Vec::len), Some(1));
    assert_eq!(result["tuned"]["metrics"]["steps"], 3);
    assert_eq!(result["tuned"]["adapter"], "s-1/1");
    let checked = place.run(&script, &["--check"])?;
    assert!(checked.status.success(), "{}", stderr(&checked));
    let dry = place.run(&script, &["--dry-run"])?;
    assert!(dry.status.success(), "{}", stderr(&dry));
    Ok(())
}

/// The command line and a script are two ways to one job: same rows, same options, same bytes.
#[test]
fn a_script_trains_what_the_command_line_trains() -> Result<()> {
    let place = Place::new()?;
    let result = place.result(&format!(
        "{TRAIN}return homeroom.save_model {{ name = \"x\", model = homeroom.fine_tune {{\n\
         model = model, dataset = data.train, eval = data.eval, batch_size = 4, steps = 3, learning_rate = 1e-2, lora_alpha = 5 }} }}"
    ))?;
    let mut command = homeroom();
    command.args(["fine-tune", "--lora-r", "4", "--lora-alpha", "5", "--batch-size", "4", "--max-steps", "3"]);
    command.args(["--learning-rate", "1e-2", "--eval-fraction", "0.25", "--output-dir"]).arg(place.path("out"));
    command.arg("--model-name").arg(fixture("models/llama")).arg("--training-file").arg(place.path("rows.jsonl"));
    let plugins = plugin_path("lora");
    command.arg("--plugin-dir").arg(plugins.parent().context("a file has a directory")?);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", stderr(&output));
    let saved = result["path"].as_str().context("save_model gives the path")?;
    let read = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors"));
    assert_eq!(read(Path::new(saved))?, read(&place.path("out"))?);
    Ok(())
}

/// A model that was trained carries its adapter, strategy and options over; what is loaded by name is the same.
#[test]
fn training_goes_on_from_where_it_was() -> Result<()> {
    let place = Place::new()?;
    let result = place.result(&format!(
        "{TRAIN}local function tune(model, from)\n  return homeroom.fine_tune {{ model = model, init_from = from, dataset = data.train, \
         eval = data.eval, steps = 4, learning_rate = 2e-2, warmup = 0 }}\nend\n\
         local first = tune(model)\nlocal second = tune(first)\nlocal named = homeroom.save_model {{ model = first, name = \"first\" }}\n\
         local third = tune(homeroom.load_fine_tuned_model {{ name = \"first\" }})\nlocal fourth = tune(model, \"first\")\n\
         homeroom.save_model {{ model = third, name = \"third\" }}\n\
         local score = homeroom.evaluate {{ model = first, dataset = data.eval }}\n\
         local loss = function(t) return t.metrics.eval_loss end\n\
         return {{ first = first, second = second, losses = {{ loss(second), loss(third), loss(fourth) }}, score = score.loss }}"
    ))?;
    let number = |value: &Value| value.as_f64().context("a loss is a number");
    let (first, second) = (&result["first"], &result["second"]);
    let before = number(&second["metrics"]["eval_loss_before"])?;
    assert!((before - number(&first["metrics"]["eval_loss"])?).abs() < 1e-9);
    assert!((before - number(&result["score"])?).abs() < 1e-6);
    assert!(number(&second["metrics"]["eval_loss"])? < before);
    assert_eq!(second["options"], json!({"r": 4}));
    let losses = result["losses"].as_array().context("three losses")?;
    assert!(losses.iter().all(|loss| loss == &losses[0]), "{losses:?}");
    let manifest = std::fs::read_to_string(place.home().join("models/third/homeroom.json"))?;
    assert_eq!(serde_json::from_str::<Value>(&manifest)?["training"]["parent"], "first");
    Ok(())
}

/// `full` trains the base's own weights, so what it gives is a model and not an adapter; scripts need not know.
#[test]
fn a_strategy_that_trains_the_whole_model_is_carried_over_too() -> Result<()> {
    let place = Place::new()?;
    let result = place.result(
        "local model = homeroom.load_model { name = params.model, strategy = \"full\" }\n\
         local data = homeroom.prepare_dataset { path = params.dataset, eval = 0.25 }\n\
         local function tune(model) return homeroom.fine_tune { model = model, dataset = data.train, eval = data.eval, steps = 2, learning_rate = 1e-3 } end\n\
         local first = tune(model)\nlocal second = tune(first)\n\
         local saved = homeroom.save_model { model = second, name = \"whole\" }\n\
         local score = homeroom.evaluate { model = homeroom.load_fine_tuned_model { name = \"whole\" }, dataset = data.eval }\n\
         return { first = first.metrics.eval_loss, before = second.metrics.eval_loss_before, after = second.metrics.eval_loss, score = score.loss }",
    )?;
    let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
    assert!((number("first") - number("before")).abs() < 1e-6, "{result}");
    assert!((number("after") - number("score")).abs() < 1e-6, "{result}");
    assert!(number("after") < number("first"), "{result}");
    Ok(())
}

/// Datasets on rows whose answers are known.
#[test]
fn datasets_do_what_their_methods_say() -> Result<()> {
    let place = Place::new()?;
    let ids = "local function ids(data) local t = {} for i, row in ipairs(data:rows()) do t[i] = row.id end return t end\n\
        local all = homeroom.prepare_dataset { path = params.dataset }.train\n";
    let cases = [
        ("#all .. all:len()", json!("2424")),
        ("tostring(all)", json!("dataset of 24 rows")),
        ("ids(all:filter(function(row) return row.id < 3 end))", json!([0, 1, 2])),
        ("ids(all:map(function(row) if row.id < 2 then row.id += 100 return row end end))", json!([100, 101])),
        (
            "ids(all:filter(function(row) return row.id > 21 end):concat(all:filter(function(row) return row.id < 1 end)))",
            json!([22, 23, 0]),
        ),
        ("ids(all:dedupe { by = \"level\" })", json!([0, 1, 2, 3, 4])),
        ("ids(all:dedupe { by = function(row) return #row.messages end })", json!([0, 1])),
        ("all:concat(all):dedupe():len()", json!(24)),
        ("#all:bucket { by = \"id\", quantiles = { 0.25, 0.5 } }", json!(3)),
        ("ids(all:bucket { by = function(row) return -row.id end, quantiles = { 0.125 } }[1])", json!([23, 22, 21])),
        ("all:sample { n = 5 }:len() + all:sample { n = 500 }:len()", json!(29)),
        (
            "table.concat(ids(all:sample { n = 5, seed = 1 })) == table.concat(ids(all:sample { n = 5, seed = 2 }))",
            json!(false),
        ),
        ("table.concat(ids(all:shuffle { seed = 1 })) == table.concat(ids(all:shuffle { seed = 1 }))", json!(true)),
        ("table.concat(ids(all:shuffle { seed = 1 })) == table.concat(ids(all))", json!(false)),
        ("select(2, all:split { eval = 0.25 }):len()", json!(6)),
        ("homeroom.prepare_dataset { path = params.dataset }.eval == nil", json!(true)),
        ("all:map(function(row) return row end):rows()[1].meta", json!({"a": {}, "z": 1})),
        // Lists of rows, none, one and several; the row itself may be among them.
        (
            "ids(all:map(function(row) if row.id == 0 then return { row } elseif row.id == 2 then \
             return { row, { prompt = \"p\", completion = \"c\", id = 90 }, { text = \"t\", id = 91 } } end end))",
            json!([0, 2, 90, 91]),
        ),
        ("all:map(function(row) return { row, row } end):len()", json!(48)),
        ("all:rename { level = \"grade\", id = \"number\" }:rows()[7].grade", json!(1)),
        ("all:rename { level = \"grade\" }:rows()[7].level == nil", json!(true)),
        ("all:rename { level = \"id\", id = \"level\" }:rows()[8].id", json!(2)),
        (
            "ids(all:sample { n = 4, weights = function(row) return row.id > 18 and row.id or 0 end, seed = 3 })[1] > 18",
            json!(true),
        ),
        (
            "all:sample { n = 50, weights = \"level\", replace = true }:filter(function(row) return row.level == 0 end):len()",
            json!(0),
        ),
        (
            "all:sample { n = 50, replace = true }:len() + all:sample { n = 50, weights = \"level\" }:len()",
            json!(50 + 19),
        ),
        (
            "ids(homeroom.interleave { datasets = { all:filter(function(row) return row.id < 6 end), \
             all:filter(function(row) return row.id >= 20 end) }, shares = { 2, 1 } })",
            json!([0, 20, 1, 2, 21, 3, 4, 22, 5]),
        ),
        (
            "homeroom.interleave { datasets = { all:sample { n = 3 }, all:sample { n = 8 } }, stopping_strategy = \"all_exhausted\" }:len()",
            json!(16),
        ),
        (
            "ids(all:filter(function(row) return row.id < 6 end):replay { rows = all:filter(function(row) return row.id == 23 end), share = 0.25 })",
            json!([0, 1, 2, 23, 3, 4, 5, 23]),
        ),
        ("all:replay { rows = all, share = 0.5 }:dedupe():len()", json!(24)),
        ("all:replay { rows = all, share = 0 }:len()", json!(24)),
        // Two turns are longer than one, and shorter numbers are shorter.
        ("ids(all:by_length())[1]", json!(1)),
        ("ids(all:by_length { quantiles = { 0.5 } }[2])[12]", json!(21)),
        ("#all:by_length { model = params.model }", json!(24)),
    ];
    for (expression, expected) in cases {
        assert_eq!(place.result(&format!("{ids}return {expression}"))?, expected, "{expression}");
    }
    Ok(())
}

/// Text becomes passages, tables become rows, and what is saved is a file that a training takes.
#[test]
fn passages_of_a_text_and_rows_of_a_script_are_datasets_and_files() -> Result<()> {
    let place = Place::new()?;
    let result = place.result(
        "local found = homeroom.read_passages { path = params.text, min_words = 2 }\n\
         local rows = found:map(function(row) return { { prompt = row.heading, completion = row.text, line = row.line } } end)\n\
         local own = homeroom.dataset { rows = { { prompt = \"½?\", completion = \"0.5\", weight = 3 } } }\n\
         local saved = homeroom.save_dataset { dataset = rows:concat(own), name = \"water-1\" }\n\
         return { rows = found:rows(), saved = saved, again = homeroom.save_dataset { dataset = own, name = \"water-1\" } }",
    )?;
    let expected = json!([
        {"text": "Water is wet, and ice is cold.", "heading": "Water", "source": "text.md", "line": 3},
        {"text": "Steam is hot. It rises.", "heading": "Water > Steam", "source": "text.md", "line": 7},
    ]);
    assert_eq!(result["rows"], expected);
    let path = place.home().join("datasets/water-1.jsonl");
    assert_eq!((&result["saved"]["rows"], &result["saved"]["path"]), (&json!(3), &json!(path)));
    assert_eq!(std::fs::read_to_string(&path)?, "{\"completion\":\"0.5\",\"prompt\":\"½?\",\"weight\":3}\n");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o077, 0, "rows are private");
    }
    for (script, expected) in [
        ("homeroom.dataset { rows = { { text = \"a\" }, { prompt = \"\" } } }", "s.lua:1: dataset: row 2 is refused: "),
        ("homeroom.dataset { rows = {} }", "`rows` is empty"),
        (
            "homeroom.save_dataset { dataset = homeroom.dataset { rows = { { text = \"a\" } } }, name = \"../x\" }",
            "../x",
        ),
        ("homeroom.read_passages { path = \"../secret.md\" }", "read_passages: "),
    ] {
        let message = place.error(script)?;
        assert!(message.contains(expected), "{script}\n{message}");
    }
    Ok(())
}

/// A handler of the user's file answers in place of a model; one elsewhere only where the file and a parameter both say so.
#[test]
fn a_handler_answers_and_a_script_alone_sends_nothing_away() -> Result<()> {
    let place = Place::new()?;
    let ask = |name: &str| {
        format!(
            "return homeroom.generate {{ handler = \"{name}\", prompts = {{ \"2 + 2?\", \"ice?\" }}, max_tokens = 5 }}"
        )
    };
    let message = place.error(&ask("here"))?;
    assert!(message.contains("handlers.toml"), "there is no file yet: {message}");
    std::fs::create_dir_all(place.home())?;
    let model = fixture("models/llama");
    std::fs::write(
        place.home().join("handlers.toml"),
        format!(
            "[handlers.here]\nkind = \"local\"\nmodel = {:?}\ncompute = \"f32\"\n\
             [handlers.there]\nkind = \"openai\"\nbase_url = \"http://192.0.2.1/v1\"\nmodel = \"m\"\nconnect_timeout_s = 1\n\
             [routes.both]\nhandlers = [\"there\", \"here\"]\negress = \"allow\"\n",
            model.display().to_string()
        ),
    )?;
    let by_handler = place.result(&ask("here"))?;
    let by_model =
        "return homeroom.generate { model = params.model, prompts = { \"2 + 2?\", \"ice?\" }, max_tokens = 5 }";
    assert_eq!(by_handler, place.result(by_model)?);
    // What was answered is looked up, and the file says otherwise when another model answers.
    let again = place.run(&ask("here"), &[])?;
    assert!(stderr(&again).contains("generate  from run "), "{}", stderr(&again));
    for (name, expected) in [
        ("there", "s.lua:1: generate: handler `there` sends prompts to 192.0.2.1, and no route allows that"),
        (
            "both",
            "generate: route `both` sends prompts to 192.0.2.1, which neither a script nor its TOML file can choose",
        ),
        ("hear", "there is no handler or route `hear`, did you mean `here`?"),
    ] {
        let message = place.error(&ask(name))?;
        assert!(message.contains(expected), "{message}");
    }
    let message = place.error("homeroom.generate { prompts = { \"a\" } }")?;
    assert!(message.contains("give `model` or `handler`"), "{message}");
    // Named by a parameter it may: nobody is there, and the next of the route answers.
    let allowed = place.run(&ask("both"), &["--set", "answers=both", "--json"])?;
    ensure!(allowed.status.success(), "{}", stderr(&allowed));
    assert_eq!(serde_json::from_slice::<Value>(&allowed.stdout)?, by_handler);
    assert!(stderr(&allowed).contains("2 prompts go to 192.0.2.1"), "{}", stderr(&allowed));
    let dry = place.run(&ask("both"), &["--set", "answers=both", "--dry-run"])?;
    let told = String::from_utf8_lossy(&dry.stdout).into_owned() + &stderr(&dry);
    assert!(told.contains("answer  2 prompts with handler both, at 192.0.2.1"), "{told}");
    Ok(())
}

/// Rows are sorted by the loss that `evaluate` gives each of them alone, and what was measured is looked up.
#[test]
fn rows_are_sorted_by_the_loss_that_a_model_has_on_each() -> Result<()> {
    let place = Place::new()?;
    let script = "local all = homeroom.prepare_dataset { path = params.dataset }.train\n\
        local function loss(row) return homeroom.evaluate { model = params.model, dataset = all:filter(function(other) return other.id == row.id end) }.loss end\n\
        local losses = {} for i, row in ipairs(all:by_loss { model = params.model }:rows()) do losses[i] = loss(row) end\n\
        local easy, hard = table.unpack(all:by_loss { model = params.model, quantiles = { 0.25 } })\n\
        return { losses = losses, easy = #easy, hard = #hard }";
    let output = place.run(script, &["--json"])?;
    ensure!(output.status.success(), "{}", stderr(&output));
    let result: Value = serde_json::from_slice(&output.stdout)?;
    let losses: Vec<f64> = result["losses"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    assert_eq!(losses.len(), 24);
    assert!(losses.is_sorted() && losses[0] < losses[23], "{losses:?}");
    assert_eq!((&result["easy"], &result["hard"]), (&json!(6), &json!(18)));
    // The other quantiles are of the same measurement.
    let said = stderr(&output);
    assert!(said.contains("by_loss   from run s-1"), "{said}");
    Ok(())
}

/// A mistake is told where it was made, with the nearest name.
#[test]
fn mistakes_are_told_at_the_scripts_line() -> Result<()> {
    let place = Place::new()?;
    let cases = [
        (
            "\nhomeroom.load_model { nmae = params.model }",
            "s.lua:2: load_model: unknown option `nmae`, did you mean `name`?",
        ),
        ("homeroom.load_model { nmae = params.model }", "load_model: `name` is missing; it should be a string"),
        ("homeroom.load_model(params.model)", "s.lua:1: load_model: it takes one table of options, not"),
        ("homeroom.load_model { name = 3 }", "load_model: `name` should be a string, not 3"),
        ("homeroom.load_modle { }", "s.lua:1: `homeroom` has no `load_modle`, did you mean `load_model`?"),
        (
            "homeroom.evaluate { model = \"Org/Model\", dataset = homeroom.prepare_dataset { path = params.dataset }.train }",
            "what a script says is not downloaded",
        ),
        ("print(params.modle)", "s.lua:1: `params` has no `modle`, did you mean `model`?"),
        ("params.n = 2", "readonly table"),
        ("homeroom.log.inof(\"x\")", "did you mean `info`?"),
        ("homeroom.prepare_dataset { path = \"gone.jsonl\" }", "s.lua:1: "),
        (
            "homeroom.prepare_dataset { path = params.dataset, on_long_row = \"cut\" }",
            "should be \"refuse\" or \"truncate\" or \"skip\", not \"cut\"",
        ),
        ("return homeroom.prepare_dataset { path = params.dataset }", "a dataset is no plain value"),
        ("local t = {} t.t = t return t", "nested deeper than 64, or holds itself"),
    ];
    for (script, expected) in cases {
        let message = place.error(script)?;
        assert!(message.contains(expected), "{script}\n{message}");
    }
    let cases = [
        (
            "homeroom.fine_tune { model = model, dataset = data }",
            "fine_tune: `dataset` should be a dataset, not a table",
        ),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, epochs = 0 }",
            "`epochs` should be a whole number from 1, not 0",
        ),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, r = 4, lora_r = 4 }",
            "`r` and `lora_r` are one option; give one of them",
        ),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, r = 4, options = { r = 4 } }",
            "`r` is given twice, once in `options`",
        ),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, options = { lora_alhpa = 4 } }",
            "s.lua:3: fine_tune: strategy `lora` has no option `lora_alhpa`, did you mean `lora_alpha`?",
        ),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, options = { use_rslora = 1 } }",
            "`use_rslora` should be true or false, not 1",
        ),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, init_from = params.model }",
            "`init_from` is a base model",
        ),
        (
            "homeroom.fine_tune { model = { model = params.model, strategy = \"lroa\" }, dataset = data.train }",
            "unknown strategy `lroa`, did you mean `lora`?",
        ),
        ("homeroom.save_model { model = model, name = \"x\" }", "s.lua:3: save_model: this model was not trained"),
        ("homeroom.save_model { model = model, name = \"../x\" }", "is not a model's name"),
        ("homeroom.load_fine_tuned_model { name = \"nobody\" }", "there is no model `nobody`"),
        ("homeroom.load_fine_tuned_model { name = params.model }", "it was not fine-tuned"),
        ("data.train:fliter(print)", "a dataset has no `fliter`, did you mean `filter`?"),
        ("data.train:split { evla = 0.1 }", "s.lua:3: split: unknown option `evla`, did you mean `eval`?"),
        (
            "data.train:filter(function(row)\n  return row.nothing.there\nend)",
            "s.lua:4: attempt to index nil with 'there' (row: ",
        ),
        ("data.train:filter(function(row)\n  return row.nothing.there\nend)", "rows.jsonl line "),
        ("data.train:map(function(row) row.messages = nil return row end)", "s.lua:3: map: the new row is refused: "),
        (
            "data.train:map(function(row) return 3 end)",
            "map: the function returned 3, not a row, a list of rows or nil",
        ),
        ("data.train:map(function(row) return { row, 3 } end)", "map: item 2 of the list is 3, not a row (row: "),
        (
            "data.train:map(function(row)\n  return { row, { prompt = \"\" } }\nend)",
            "map: row 2 of the list is refused: ",
        ),
        ("data.train:rename { levle = \"grade\" }", "rename: no row has a field `levle`, did you mean `level`?"),
        ("data.train:rename { level = \"id\" }", "rename: the row would have two fields `id` (row: "),
        ("data.train:rename { messages = \"turns\" }", "rename: the new row is refused: "),
        ("data.train:rename { \"level\" }", "rename: it takes a table from a field's name to its new name"),
        (
            "data.train:sample { n = 2, weights = function(row) return -1 end }",
            "sample: `weights` gives -1, which is below 0",
        ),
        ("data.train:sample { n = 2, weights = function(row) return 0 end }", "sample: no row has a weight above 0"),
        ("data.train:sample { n = 2, weights = \"note\" }", "sample: `weights` gives null, not a number (row: "),
        ("homeroom.interleave { datasets = { data.train, 3 } }", "interleave: `datasets` should be a list of datasets"),
        (
            "homeroom.interleave { datasets = { data.train }, shares = { 1, 2 } }",
            "interleave: 2 `shares` for 1 datasets",
        ),
        (
            "homeroom.interleave { datasets = { data.train, data.train:filter(function() return false end) } }",
            "interleave: dataset 2 has no rows",
        ),
        (
            "homeroom.interleave { datasets = { data.train, data.eval }, shares = { 1, 1e-12 }, stopping_strategy = \"all_exhausted\" }",
            "rows are too many for one dataset",
        ),
        ("data.train:replay { rows = data.eval, share = 0.99999999999 }", "more rows are too many for one dataset"),
        ("data.train:by_loss {}", "by_loss: `model` is missing"),
        ("data.train:bucket { by = \"note\", quantiles = { 0.5 } }", "bucket: `by` gives null, not a number (row: "),
        ("data.train:concat({})", "concat: it takes a dataset, not a table"),
        ("local d = data.train for i = 1, 60 do d = d:concat(d) end", "rows are too many for one dataset"),
        (
            "homeroom.evaluate { model = model, dataset = data.train:filter(function() return false end) }",
            "the dataset has no rows",
        ),
    ];
    for (script, expected) in cases {
        let message = place.error(&format!("{TRAIN}{script}"))?;
        assert!(message.contains(expected), "{script}\n{message}");
    }
    assert!(!place.home().join("models").exists());
    Ok(())
}

/// Callbacks hear of each step and steer, between steps; an error in one ends the training after the step and is raised.
#[test]
fn callbacks_steer_between_steps() -> Result<()> {
    let place = Place::new()?;
    let train = |more: &str| {
        format!(
            "{TRAIN}local seen = {{}}\nlocal function tune(more)\n  local options = {{ model = model, dataset = data.train, eval = data.eval, \
             steps = 6, batch_size = 4, schedule = \"constant\", warmup = 0, learning_rate = 1e-2 }}\n  \
             for k, v in pairs(more) do options[k] = v end\n  return homeroom.fine_tune(options)\nend\n{more}"
        )
    };
    let result = place.result(&train(
        "local tuned = tune { eval_every = 2, on_step = function(r) table.insert(seen, r.learning_rate) \
         if r.step == 2 then return { learning_rate_scale = 0.5 } end end,\n\
         on_eval = function(r) if r.step == 4 then return { stop = \"enough\" } end assert(r.best <= r.eval_loss) end }\n\
         return { rates = seen, stopped = tuned.stopped, steps = tuned.metrics.steps, planned = tuned.metrics.planned_steps }",
    ))?;
    assert_eq!(result, json!({"planned": 6, "rates": [0.01, 0.01, 0.005, 0.005], "steps": 4, "stopped": "enough"}));
    let result = place.result(&train("return tune({}).stopped"))?;
    assert_eq!(result, "finished");

    let raised =
        place.run(&train("tune { on_step = function(r)\n  if r.step == 3 then error(\"no more\") end\nend }"), &[])?;
    let story = stderr(&raised);
    assert!(story.contains("stopped after step 3 of 6") && story.contains(": no more"), "{story}");
    let kept = story.split_once("by then is in ").and_then(|(_, rest)| rest.lines().next()).context("it says where")?;
    assert!(Path::new(kept).join("adapter_model.safetensors").exists());
    // What a callback raises can be caught, as any error.
    let caught =
        place.result(&train("return (select(2, pcall(tune, { on_step = function() error(\"x\", 0) end }))) ~= nil"))?;
    assert_eq!(caught, true);
    for (callback, expected) in [
        ("on_step = function() return 3 end", "fine_tune: on_step: it returned 3, not nil or a table"),
        ("on_step = function() return { stpo = \"x\" } end", "unknown directive `stpo`, did you mean `stop`?"),
        ("on_step = function() return { stop = true } end", "`stop` should be the reason, as a string, not true"),
        (
            "on_step = function() return { learning_rate_scale = -1 } end",
            "`learning_rate_scale` should be a number from 0, not -1",
        ),
    ] {
        let message = place.error(&train(&format!("tune {{ {callback} }}")))?;
        assert!(message.contains(expected), "{callback}\n{message}");
    }
    Ok(())
}

/// A dry run says what would be done, does none of it, and gets through scripts that compare losses.
#[test]
fn a_dry_run_writes_nothing() -> Result<()> {
    let place = Place::new()?;
    let script = format!(
        "{TRAIN}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, eval = data.eval, epochs = 2 }}\n\
         local again = homeroom.fine_tune {{ model = tuned, dataset = data.train, steps = 1 }}\n\
         assert(tuned.metrics.eval_loss < tuned.metrics.eval_loss_before and again.metrics.eval_loss == nil)\n\
         assert(again.metrics.train_loss < tuned.metrics.train_loss)\n\
         local saved = homeroom.save_model {{ model = again, name = \"x\" }}\n\
         homeroom.load_fine_tuned_model {{ name = \"x\" }}\n\
         homeroom.create_handler {{ name = \"x\", model = saved }}\nreturn saved"
    );
    let output = place.run(&script, &["--dry-run", "--json"])?;
    assert!(output.status.success(), "{}", stderr(&output));
    let would: Value = serde_json::from_slice(&output.stdout)?;
    let actions = would["would"].as_array().context("a list of actions")?;
    let verbs: Vec<&str> = actions.iter().filter_map(|action| action["verb"].as_str()).collect();
    assert_eq!(verbs, ["prepare_dataset", "fine_tune", "fine_tune", "save_model", "create_handler"]);
    let total = &actions.last().context("the last is the total")?["total"];
    let sum: u64 = actions[1..3].iter().filter_map(|action| action["needs"]["tokens"].as_u64()).sum();
    assert!(sum > 0 && total["tokens"] == sum && total["disk_bytes"].as_u64() > Some(1000), "{total}");
    let train = &actions[1];
    let memory: Vec<u64> =
        actions[1..3].iter().filter_map(|action| action["needs"]["peak_memory_bytes"].as_u64()).collect();
    // One training follows the other, so that the larger is what both need.
    assert!(memory.len() == 2 && memory[0].max(memory[1]) == total["peak_memory_bytes"], "{total}");
    assert!(memory.iter().all(|bytes| *bytes > 1_000_000), "{memory:?}");
    // 18 rows in batches of 8 are 3 steps an epoch.
    assert_eq!((&train["examples"], &train["held_out"], &train["steps"]), (&json!(18), &json!(6), &json!(6)));
    assert!(train["trainable_parameters"].as_u64() < train["parameters"].as_u64());
    assert!(train["tokens"].as_u64() > Some(100), "{train}");
    assert!(!place.home().exists(), "it wrote something");
    let output = place.run(&script, &["--dry-run"])?;
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.starts_with("would\n  read ") && told.contains("\n  in all  2 trainings, "), "{told}");
    Ok(())
}

/// Callbacks are called once with a sample, so that a mistake in them is found before a training has cost anything.
#[test]
fn a_dry_run_calls_callbacks_once_and_its_losses_are_numbers_that_fall() -> Result<()> {
    let place = Place::new()?;
    let script = |callback: &str| {
        format!(
            "{TRAIN}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, eval = data.eval, steps = 40, eval_steps = 5,\n\
             {callback}\n}}\nlocal again = homeroom.fine_tune {{ model = tuned, dataset = data.train, eval = data.eval, steps = 5 }}\n\
             local losses = {{ homeroom.evaluate {{ model = model, dataset = data.eval }}.loss, homeroom.evaluate {{ model = tuned, dataset = data.eval }}.loss,\n\
             again.metrics.eval_loss }}\nassert(losses[1] > losses[2] and losses[2] > losses[3] and losses[3] > 0)\n\
             assert(math.abs(losses[1] - tuned.metrics.eval_loss_before) < 1e-9 and losses[2] == tuned.metrics.eval_loss)\n\
             print(\"loss \" .. losses[2])"
        )
    };
    let dry = |callback: &str| place.run(&script(callback), &["--dry-run"]);
    let fine = dry(
        "on_step = function(r) r.state.n = (r.state.n or 0) + 1 print(\"step\", r.step, r.steps, r.state.n, r.loss == r.loss) end,\n\
         on_eval = function(r) print(\"eval\", r.step, r.best <= r.eval_loss) end",
    )?;
    let story = stderr(&fine);
    assert!(fine.status.success(), "{story}");
    for (line, times) in [("step\t40\t40\t1\ttrue", 1), ("eval\t40\ttrue", 1)] {
        assert_eq!(story.matches(line).count(), times, "{line}: {story}");
    }
    let said = |output: &Output| stderr(output).lines().find(|line| line.starts_with("loss ")).map(str::to_owned);
    assert_eq!(said(&fine), said(&dry("on_step = function(r) end")?));
    for (callback, expected) in [
        ("on_step = function(r) print(r.loss.x) end", "s.lua:4: attempt to index number with 'x'"),
        ("on_eval = function(r) return { stpo = \"x\" } end", "s.lua:4: fine_tune: on_eval: unknown directive `stpo`"),
    ] {
        let failed = dry(callback)?;
        assert!(failed.status.code() == Some(1) && stderr(&failed).contains(expected), "{}", stderr(&failed));
    }
    assert!(!place.home().exists(), "it wrote something");
    Ok(())
}

#[test]
fn check_tells_all_problems_of_a_script_without_running_it() -> Result<()> {
    let place = Place::new()?;
    std::fs::create_dir(place.path("lib"))?;
    place.write("lib/more.lua", "return { go = function() homeroom.fine_tnue {} end }")?;
    let script = "error(\"it ran\")\nhomeroom.fine_tune { epoch = 1 }\nprint(params.modl)\nrequire(\"lib/more\")\nrequire(\"lib/gone\")";
    let output = place.run(script, &["--check"])?;
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    for expected in [
        "6 problems",
        "s.lua:2: fine_tune: unknown option `epoch`, did you mean `epochs`?",
        "s.lua:3: `params` has no `modl`, did you mean `model`?",
        "more.lua:1: `homeroom` has no `fine_tnue`, did you mean `fine_tune`?",
        "s.lua:5: there is no module `lib/gone`",
    ] {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
    let output = place.run("local = 1", &["--check"])?;
    assert!(stderr(&output).contains("s.lua:1:"), "{}", stderr(&output));
    Ok(())
}

/// Values that are written down, files, models, strategies, and every global: all of it, each at its line, and nothing is run or loaded.
#[test]
fn check_looks_at_values_and_at_what_is_named() -> Result<()> {
    let place = Place::new()?;
    let script = "local data = homeroom.prepare_dataset { path = \"missing.jsonl\" }\n\
        local model = homeroom.load_model { name = params.base, strategy = \"lorra\", r = 0 }\n\
        local tuned = homeroom.fine_tune {\n  model = model, dataset = data.train,\n  learning_rate = 50,\n  lr_scheduler_type = \"cosin\",\n\
        epochs = params.epochs, warmup_ratio = if params.n then 2 else 3, batch_size = 2 * 0,\n  max_steps = -3, packing = \"yes\",\n}\n\
        local other = homeroom.load_fine_tuned_model { name = \"nobody\" }\n\
        local saved = homeroom.save_model { model = tuned, name = \"My Tutor\" }\n\
        homeroom.create_handler { name = \"../x\", model = saved }\n\
        homeroom.evaluate { model = \"gone/away\", dataset = data.train }\n\
        homeroom.generate { model = tuned, promts = { \"a\" } }\n\
        print(tunde.metrics, limit)\nreturn { a = saved, b = tuned.metrics }\n";
    place.config(script)?;
    let config = place.write(
        "c.toml",
        "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\nbase = { type = \"model\", required = true }\n\
         rows = { type = \"path\", default = \"gone.jsonl\" }\nepochs = { type = \"int\", default = 0 }\nn = { type = \"int\" }\n",
    )?;
    let output = place.command(&config).arg("--check").output()?;
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for expected in [
        "c.toml:5: parameter `rows`: there is no file or directory ",
        "s.lua:1: prepare_dataset: there is no file ",
        "s.lua:2: load_model: unknown strategy `lorra`, did you mean `lora`?",
        "s.lua:2: load_model: `r` should be a whole number from 1, not 0",
        "s.lua:5: fine_tune: `learning_rate` should be a number above 0 and at most 10, not 50",
        "s.lua:6: fine_tune: `lr_scheduler_type` should be \"cosine\" or \"linear\" or \"constant\", not \"cosin\"",
        "s.lua:7: fine_tune: `epochs` should be a whole number from 1, not 0",
        "s.lua:8: fine_tune: `max_steps` should be a whole number from 1, not -3",
        "s.lua:8: fine_tune: `packing` should be true or false, not \"yes\"",
        "s.lua:10: load_fine_tuned_model: there is no model `nobody`",
        "s.lua:11: save_model: `My Tutor` is not a model's name",
        "s.lua:12: create_handler: `../x` is not a handler's name",
        "s.lua:13: evaluate: gone/away: ",
        "s.lua:14: generate: unknown option `promts`, did you mean `prompts`?",
        "s.lua:14: generate: `prompts` is missing; it should be a list of strings",
        "s.lua:15: unknown name `tunde`, did you mean `tuned`?",
        "s.lua:15: unknown name `limit`",
        "17 problems",
    ] {
        assert!(message.contains(expected), "{expected}\n--- in ---\n{message}");
    }
    assert!(
        !message.contains("batch_size") && !message.contains("warmup") && !message.contains("required"),
        "{message}"
    );

    // A file whose own problems are told keeps nothing back of its script's.
    let text = std::fs::read_to_string(&config)?.replace("type = \"int\", default = 0", "type = \"itn\"");
    std::fs::write(&config, text)?;
    let message = stderr(&place.command(&config).arg("--check").output()?);
    for expected in
        ["line 6: `epochs`: its type is unknown, did you mean `int`?", "s.lua:5: fine_tune: `learning_rate` should"]
    {
        assert!(message.contains(expected), "{expected}\n--- in ---\n{message}");
    }
    assert!(!message.contains("has no `epochs`"), "{message}");
    Ok(())
}

#[test]
fn check_finds_nothing_wrong_with_what_a_run_would_make() -> Result<()> {
    let place = Place::new()?;
    let script = format!(
        "{TRAIN}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 1, lr = 2e-4 }}\n\
         homeroom.save_model {{ model = tuned, name = \"mine\" }}\nlocal mine = homeroom.load_fine_tuned_model {{ name = \"mine\" }}\n\
         homeroom.create_handler {{ name = \"mine\", model = \"mine\" }}\n\
         return homeroom.generate {{ model = mine, prompts = {{ \"a\", \"b\" }}, temperature = 0 }}"
    );
    let output = place.run(&script, &["--check"])?;
    assert!(output.status.success() && stderr(&output).contains("no problems found"), "{}", stderr(&output));
    // What is shipped needs no parameters to be looked at.
    for name in ["quickstart", "fine_tune", "curriculum"] {
        let output = place.command(&root().join("configs").join(format!("{name}.toml"))).arg("--check").output()?;
        assert!(output.status.success(), "{name}: {}", stderr(&output));
    }
    Ok(())
}

/// What `new` writes runs as it is, outside of the repository, and is never written over something.
#[test]
fn a_new_pipeline_is_checked_and_runs_at_once() -> Result<()> {
    let place = Place::new()?;
    let new = |name: &str| {
        let mut command = homeroom();
        command.current_dir(place.path("")).env("HOMEROOM_HOME", place.home()).args(["new", name]);
        command.output()
    };
    let made = new("symbols")?;
    assert!(made.status.success(), "{}", stderr(&made));
    assert!(stderr(&made).contains("next      homeroom run symbols/symbols.toml"), "{}", stderr(&made));
    let text = |name: &str| std::fs::read_to_string(place.path("symbols").join(name));
    assert_eq!(text("types/homeroom.meta.lua")?, reference::lua_ls());
    assert_eq!(text("types/homeroom.d.luau")?, reference::luau());
    for name in [".vscode/settings.json", ".luarc.json", ".luaurc"] {
        let settings: Value = serde_json::from_str(&text(name)?)?;
        assert!(settings.as_object().is_some_and(|settings| !settings.is_empty()), "{name}");
    }
    assert_eq!(text("rows.jsonl")?.lines().count(), 12);
    let config = place.path("symbols/symbols.toml");
    let checked = place.command(&config).arg("--check").output()?;
    assert!(checked.status.success(), "{}", stderr(&checked));
    let run = place.command(&config).current_dir(place.path("")).args(["--json", "--set", "epochs=2"]).output()?;
    assert!(run.status.success(), "{}", stderr(&run));
    let result: Value = serde_json::from_slice(&run.stdout)?;
    assert_eq!(result["model"], "symbols");
    assert!(place.home().join("models/symbols/adapter_model.safetensors").exists());

    let again = new("symbols")?;
    assert!(again.status.code() == Some(1) && stderr(&again).contains("symbols: something is there already"));
    std::fs::create_dir(place.path("empty"))?;
    for (name, words) in
        [("empty", "something is there already"), ("../x", "is not a name"), ("My Own", "is not a name")]
    {
        let refused = new(name)?;
        assert!(refused.status.code() == Some(1) && stderr(&refused).contains(words), "{name}: {}", stderr(&refused));
    }
    Ok(())
}

#[test]
fn help_of_a_file_lists_its_parameters() -> Result<()> {
    let place = Place::new()?;
    let output = place.command(&root().join("configs/fine_tune.toml")).arg("--help").output()?;
    assert!(output.status.success());
    let told = String::from_utf8_lossy(&output.stdout);
    for expected in ["--dry-run", "Parameters of ", "--set NAME=VALUE"] {
        assert!(told.contains(expected), "{expected}\n{told}");
    }
    let line =
        |name: &str| told.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default().to_owned();
    for (name, words) in [
        ("model ", ["model", "required", "base: "]),
        ("eval ", ["float", "0.01 to 0.5", "share of the rows"]),
        ("max_steps ", ["int", "not set", "from 1 "]),
    ] {
        let line = line(name);
        assert!(words.iter().all(|word| line.contains(word)), "{name}: {line}");
    }
    let output = place.command(&root().join("configs/fine_tune.toml")).args(["--set", "epoch=1"]).output()?;
    assert!(stderr(&output).contains("--set epoch=1: there is no such parameter, did you mean `epochs`?"));
    Ok(())
}

#[test]
fn handlers_that_are_there_stay_as_they_are() -> Result<()> {
    let place = Place::new()?;
    std::fs::create_dir_all(place.home())?;
    let before = "# mine\n[handlers.cloud]   # paid\nkind = \"openai\"\nbase_url = \"http://localhost:1/v1\"\nmodel = \"m\"\n\n[routes.tutor]\nhandlers = [\"cloud\"]\n";
    std::fs::write(place.home().join("handlers.toml"), before)?;
    place.result("return homeroom.create_handler { name = \"base\", model = params.model }")?;
    let after = std::fs::read_to_string(place.home().join("handlers.toml"))?;
    assert!(after.contains("# mine\n[handlers.cloud]   # paid\nkind = \"openai\"\n"), "{after}");
    assert!(
        after.contains("[routes.tutor]") && after.contains("[handlers.base]\nkind = \"local\"\nmodel = \""),
        "{after}"
    );
    let message = place.error("homeroom.create_handler { name = \"cloud\", model = params.model }")?;
    assert!(message.contains("handler `cloud` is there already, of kind `openai`"), "{message}");
    assert_eq!(std::fs::read_to_string(place.home().join("handlers.toml"))?, after);
    Ok(())
}

/// Ctrl-C ends the training after its step, keeps what it learned, and ends the script, whatever it would catch.
#[cfg(unix)]
#[test]
fn an_interrupted_pipeline_ends_after_its_step() -> Result<()> {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let place = Place::new()?;
    let config = place.config(&format!(
        "{TRAIN}while true do pcall(function() homeroom.fine_tune {{ model = model, dataset = data.train, epochs = 100000 }} end) end"
    ))?;
    let mut child = place.command(&config).stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let mut lines = BufReader::new(child.stderr.take().context("it is piped")?).lines();
    let mut line = || -> Result<String> { Ok(lines.next().context("the run goes on")??) };
    while !line()?.starts_with("step ") {}
    // SAFETY: the child is ours and has not been waited for, so its id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let kept = loop {
        let line = line()?;
        if let Some((_, path)) = line.split_once("by then is in ") {
            break path.to_owned();
        }
    };
    assert_eq!(child.wait()?.code(), Some(130));
    assert!(Path::new(&kept).join("adapter_model.safetensors").exists());
    Ok(())
}

/// Answers that came before one failed are paid for: the same script again asks for the others alone.
#[test]
fn answers_that_came_before_a_failure_are_not_asked_for_again() -> Result<()> {
    use std::io::{Read, Write};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let (asked, works) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (counted, switched) = (asked.clone(), works.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (counted, switched) = (counted.clone(), switched.clone());
            std::thread::spawn(move || -> Result<()> {
                let mut stream = stream?;
                let mut request = String::new();
                let mut buffer = [0; 4096];
                // The prompt is the last thing that is looked for.
                while !["one?", "two?", "bad?"].iter().any(|prompt| request.contains(prompt)) {
                    let read = stream.read(&mut buffer)?;
                    if read == 0 {
                        return Ok(());
                    }
                    request.push_str(&String::from_utf8_lossy(&buffer[..read]));
                }
                counted.fetch_add(1, Ordering::SeqCst);
                let is_bad = request.contains("bad?") && !switched.load(Ordering::SeqCst);
                if is_bad {
                    // The others have their answers by then.
                    std::thread::sleep(std::time::Duration::from_millis(1500));
                }
                let word = if request.contains("one?") { "1" } else { "2" };
                let body = json!({"choices": [{"index": 0, "message": {"content": word}, "finish_reason": "stop"}]});
                let (status, body) = match is_bad {
                    true => ("400 Bad Request", json!({"error": {"message": "no"}})),
                    false => ("200 OK", body),
                };
                let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n");
                stream.write_all(format!("{head}{body}").as_bytes())?;
                Ok(())
            });
        }
    });
    let place = Place::new()?;
    std::fs::create_dir_all(place.home())?;
    let handlers =
        format!("[handlers.mock]\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:{port}/v1\"\nmodel = \"m\"\n");
    std::fs::write(place.home().join("handlers.toml"), handlers)?;
    let script =
        "return homeroom.generate { handler = params.answers, prompts = { \"one?\", \"two?\", \"bad?\", \"one?\" } }";
    let failed = place.run(script, &["--set", "answers=mock", "--json"])?;
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
    assert!(stderr(&failed).contains("generate: prompt 3: "), "{}", stderr(&failed));
    assert_eq!(asked.load(Ordering::SeqCst), 4);
    works.store(true, Ordering::SeqCst);
    let again = place.run(script, &["--set", "answers=mock", "--json"])?;
    ensure!(again.status.success(), "{}", stderr(&again));
    assert_eq!(serde_json::from_slice::<Value>(&again.stdout)?, json!(["1", "2", "2", "1"]));
    assert!(stderr(&again).contains("3 of 4 answers were kept"), "{}", stderr(&again));
    assert_eq!(asked.load(Ordering::SeqCst), 5);
    Ok(())
}
