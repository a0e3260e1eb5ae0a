//! The step store: what a pipeline made before is looked up, and what has changed is made again with all that comes behind it.

use std::process::Output;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::pipelines::{Place, TRAIN};

/// A run that succeeded: what it returned, and what it said.
fn ran(output: &Output) -> Result<(Value, String)> {
    let story = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{story}");
    Ok((serde_json::from_slice(&output.stdout)?, story))
}

/// Three stages, each from the adapter of the one before.
fn stages(rates: [&str; 3]) -> String {
    let stage = |number: usize, model: &str, rate: &str| {
        format!(
            "local stage{number} = homeroom.fine_tune {{ model = {model}, dataset = data.train, eval = data.eval, steps = 2, batch_size = 4, \
             learning_rate = {rate}, eval_steps = 1,\n  on_eval = function(report) if report.eval_loss > 2 * report.best then return {{ stop = \"worse\" }} end end }}\n"
        )
    };
    let [first, second, third] = rates;
    format!(
        "{TRAIN}{}{}{}local score = homeroom.evaluate {{ model = stage3, dataset = data.eval }}\n\
         local answers = homeroom.generate {{ model = stage3, prompts = {{ \"3 + 3?\" }}, max_tokens = 4 }}\n\
         local saved = homeroom.save_model {{ model = stage3, name = \"three\" }}\n\
         return {{ adapters = {{ stage1.adapter, stage2.adapter, stage3.adapter }}, losses = {{ stage1.metrics.eval_loss, stage3.metrics.eval_loss }}, \
         stopped = stage1.stopped, score = score, answers = answers, saved = saved.name, path = saved.path }}",
        stage(1, "model", first),
        stage(2, "stage1", second),
        stage(3, "stage2", third)
    )
}

#[test]
fn stages_before_a_change_are_looked_up_and_those_behind_it_run_again() -> Result<()> {
    let place = Place::new()?;
    let run = |rates, arguments: &[&str]| ran(&place.run(&stages(rates), &[arguments, &["--json"]].concat())?);
    let (first, story) = run(["1e-2", "1e-2", "1e-2"], &[])?;
    assert!(!story.contains("from run"), "{story}");
    assert_eq!(first["adapters"], json!(["s-1/1", "s-1/2", "s-1/3"]));

    // Nothing has changed: nothing is made.
    let (again, story) = run(["1e-2", "1e-2", "1e-2"], &[])?;
    assert_eq!(again, first);
    for looked_up in
        ["stage 1   from run s-1, ", "stage 2 ", "stage 3 ", "evaluate  from run s-1, ", "generate ", "save_model"]
    {
        assert!(story.contains(looked_up), "{looked_up}: {story}");
    }
    assert!(!story.contains("training  "), "{story}");

    // The second stage's rate: the first is looked up, the second and what is behind it are not.
    let (changed, story) = run(["1e-2", "5e-3", "1e-2"], &[])?;
    assert!(
        story.contains("stage 1   from run s-1, ") && !story.contains("stage 2 ") && !story.contains("stage 3 "),
        "{story}"
    );
    assert_eq!(story.matches("training  2 steps").count(), 2, "{story}");
    assert_eq!(changed["adapters"][0], "s-1/1");
    let second = changed["adapters"][1].as_str().context("an id")?;
    assert!(second.ends_with("/1") && !second.starts_with("s-1/"), "{second}");
    assert_ne!(changed["losses"][1], first["losses"][1]);

    // Back again: all of it is there, but for the name, which the changed run took.
    let (back, story) = run(["1e-2", "1e-2", "1e-2"], &[])?;
    assert_eq!(back, first);
    assert!(story.contains("stage 3   from run s-1, ") && story.contains("saved     three"), "{story}");

    let (fresh, story) = run(["1e-2", "1e-2", "1e-2"], &["--fresh"])?;
    assert!(!story.contains("from run"), "{story}");
    assert_eq!((&fresh["losses"], &fresh["answers"]), (&first["losses"], &first["answers"]));
    // What it made is what is found from now on.
    let (_, story) = run(["1e-2", "1e-2", "1e-2"], &[])?;
    assert!(story.contains("from run") && !story.contains("from run s-1,"), "{story}");
    Ok(())
}

#[test]
fn an_adapter_that_was_altered_or_removed_is_made_anew() -> Result<()> {
    let place = Place::new()?;
    let script = format!(
        "{TRAIN}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 1 }}\n\
         return {{ adapter = tuned.adapter, loss = homeroom.evaluate {{ model = tuned, dataset = data.eval }}.loss }}"
    );
    let run = || ran(&place.run(&script, &["--json"])?);
    let (first, _) = run()?;
    assert_eq!(first["adapter"], "s-1/1");
    assert_eq!(run()?.0, first);
    let weights = place.home().join("runs/s-1/adapters/1/adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights)?;
    *bytes.last_mut().context("it is not empty")? ^= 1;
    std::fs::write(&weights, &bytes)?;
    let (altered, story) = run()?;
    assert!(story.contains("training  1 steps"), "{story}");
    assert_ne!(altered["adapter"], "s-1/1");
    // It is the same model, so that what was measured of it holds.
    assert!(story.contains("evaluate  from run s-1, ") && altered["loss"] == first["loss"], "{story}");
    std::fs::remove_dir_all(
        place.home().join("runs").join(altered["adapter"].as_str().unwrap_or_default()).with_file_name(""),
    )?;
    let (removed, story) = run()?;
    assert!(story.contains("training  1 steps") && removed["loss"] == first["loss"], "{story}");
    Ok(())
}

/// A callback is what it does and the values that it takes from around it; what it changes there is lost to who looks it up.
#[test]
fn a_callback_is_known_by_what_it_does_and_takes() -> Result<()> {
    let place = Place::new()?;
    let run = |before: &str, options: &str| -> Result<(Value, bool, String)> {
        let script = format!(
            "{TRAIN}{before}\nlocal tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 2, batch_size = 4, {options} }}\n\
             return {{ tuned.stopped, tuned.metrics.steps, seen }}"
        )
        .replace(", seen }", if before.contains("seen") { ", #seen }" } else { " }" });
        let (result, story) = ran(&place.run(&script, &["--json"])?)?;
        Ok((result, story.contains("from run"), story))
    };
    let stop = |at: &str| {
        format!("on_step = function(report) if report.step >= {at} then return {{ stop = \"enough\" }} end end")
    };
    assert!(!run("", &stop("1"))?.1);
    // The same in other lines, with other names; the limit from around it, which never changes.
    let moved = "on_step = function(r)\n  -- Enough is enough.\n  if r.step >= 1 then\n    return { stop = \"enough\" }\n  end\nend";
    assert_eq!(run("-- A line more.\n\n", moved)?.0, json!(["enough", 1]));
    assert!(run("", moved)?.1);
    assert!(!run("", &stop("2"))?.1, "its code has changed");
    let limits = |most: &str| format!("local limits = {{ most = {most} * #data.eval // 6 }}");
    assert!(!run(&limits("1"), &stop("limits.most"))?.1);
    assert!(run(&limits("1"), &stop("limits.most"))?.1);
    let (other, looked_up, _) = run(&limits("2"), &stop("limits.most"))?;
    assert!(!looked_up && other == json!(["enough", 2]), "what it takes has changed");
    let (other, looked_up, _) = run("", &stop("params.n"))?;
    assert!(!looked_up && other == json!(["enough", 1]));
    assert!(run("local helper = 1", &stop("params.n"))?.1);

    // One that fills a table of the script's would leave it empty if it were looked up.
    let fills = "on_step = function(report) table.insert(seen, report.loss) end";
    for _ in 0..2 {
        let (result, looked_up, story) = run("local seen = {}", fills)?;
        assert!(!looked_up && result == json!(["finished", 2, 2]), "{result} {story}");
        let note = "s.lua:4: fine_tune: a later run makes it again, from its beginning: `on_step` may change a table outside of it";
        let [note, training] = [note, "training  2 steps"].map(|told| story.find(told));
        assert!(note.is_some() && note < training, "{story}");
    }
    let declared = format!("{fills}, key = \"losses\"");
    assert_eq!(run("local seen = {}", &declared)?.0, json!(["finished", 2, 2]));
    let (result, looked_up, _) = run("local seen = {}", &declared)?;
    assert!(looked_up && result == json!(["finished", 2, 0]), "{result}");
    Ok(())
}

/// What a callback does that its code and what it takes do not tell is done in each run, and is told before it.
#[test]
fn a_callback_that_may_do_otherwise_is_never_looked_up() -> Result<()> {
    let place = Place::new()?;
    let run = |before: &str, callback: &str, n: usize, more: &str| -> Result<(Value, String)> {
        let script = format!(
            "{TRAIN}{before}\nlocal tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 1, batch_size = 4, save_steps = 1, on_step = {callback}{more} }}\n\
             return tuned.stopped"
        );
        ran(&place.run(&script, &["--json", "--set", &format!("n={n}")])?)
    };
    let file = "homeroom.prepare_dataset { path = \"side.jsonl\" }.train";
    let on_file = |count: &str| format!("function() return {{ stop = tostring(#{count}) }} end");
    for (before, callback, why) in [
        (
            "local f = ({ function() return { stop = \"1\" } end, function() return { stop = \"2\" } end })[params.n]",
            "f",
            "begins at a line with another function",
        ),
        (
            "local m = setmetatable({}, { __index = { limit = params.n } })",
            "function() return { stop = tostring(m.limit) } end",
            "takes a table with a metatable",
        ),
        ("local hr = homeroom", &*on_file(&file.replace("homeroom", "hr")), "takes a table with a metatable"),
        ("local pd = homeroom.prepare_dataset", &*on_file("pd { path = \"side.jsonl\" }.train"), "takes a function"),
        ("", &*on_file(file), "uses `homeroom.prepare_dataset`"),
        (
            "math.randomseed(params.n)",
            "function() return { stop = tostring(math.random(1e6)) } end",
            "uses `math.random`",
        ),
        (
            "local random = math.random random(params.n)",
            "function() return { stop = tostring(random(1e6)) } end",
            "takes a function",
        ),
        ("", "function() return { stop = tostring(os.clock()) } end", "uses `os.clock`"),
        (
            "local b = buffer.create(8) buffer.writeu8(b, 0, params.n)",
            "function() return { stop = tostring(buffer.readu8(b, 0)) } end",
            "takes a buffer",
        ),
        (
            "local go = coroutine.wrap(function() coroutine.yield(params.n) end)",
            "function() return { stop = tostring(go()) } end",
            "takes a function",
        ),
        (
            "local n = params.n",
            "function() n += 1 return { stop = tostring(n) } end",
            "assigns to a variable outside of it",
        ),
        (
            "local t = { n = params.n }",
            "function() t.n += 1 return { stop = tostring(t.n) } end",
            "may change a table outside of it",
        ),
        (
            "local t = { n = params.n } local function add(list)\n list.n += 1\nend",
            "function() add(t) return { stop = tostring(t.n) } end",
            "may change a table outside of it",
        ),
    ] {
        let mut stops = Vec::new();
        for n in [1, 2, 2] {
            place.write("side.jsonl", &vec!["{\"text\": \"a\"}"; n].join("\n"))?;
            let (stopped, story) = run(before, callback, n, "")?;
            let note =
                story.find(&format!("fine_tune: a later run makes it again, from its beginning: `on_step` {why}"));
            assert!(note.is_some() && note < story.find("training  1 steps"), "{before} {callback}: {story}");
            assert!(!story.contains("from run") && !story.contains("goes on   "), "{before} {callback}: {story}");
            stops.push(stopped);
        }
        assert_ne!(stops[0], stops[1], "{before} {callback}");
        // The way out.
        let key = format!(", key = {:?}", format!("{before} {callback}"));
        assert!(!run(before, callback, 1, &key)?.1.contains("a later run"), "{before} {callback}");
        assert!(run(before, callback, 2, &key)?.1.contains("from run"), "{before} {callback}");
    }
    // What they take is told apart, and is looked up.
    for (before, callback) in [
        ("local len = ({ string.len, utf8.len })[params.n]", "function() return { stop = tostring(len(\"äöü\")) } end"),
        ("local text = ({ \"\\255\", \"\\254\" })[params.n]", "function() return { stop = tostring(text:byte()) } end"),
        (
            "local zero = ({ 0, -0 * 1 })[params.n] * (if params.n == 2 then -1 else 1)",
            "function() return { stop = tostring(1 / zero > 0) .. zero } end",
        ),
        ("local p = params", "function(report) report.state.n = p.n return { stop = tostring(report.state.n) } end"),
    ] {
        let mut seen = Vec::new();
        for n in [1, 2, 1, 2] {
            let (stopped, story) = run(before, callback, n, "")?;
            assert!(!story.contains("a later run"), "{before}: {story}");
            seen.push((stopped, story.contains("from run")));
        }
        let [first, second, third, fourth] = &seen[..] else { unreachable!("there are four") };
        assert!(!first.1 && third.1 && fourth.1 && first.0 == third.0 && second.0 == fourth.0, "{before}: {seen:?}");
        assert!(second.1 == (first.0 == second.0), "{before}: {seen:?}");
    }
    Ok(())
}

/// Of a training whose callback counts in a variable, the first half would be missing from what it counts if it went on.
#[test]
fn a_callback_with_a_counter_begins_anew() -> Result<()> {
    let place = Place::new()?;
    let script = |fails: &str| {
        format!(
            "{TRAIN}local n = 0\nlocal tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 6, batch_size = 4, save_steps = 1,\n\
             on_step = function(report)\n  n += 1\n  if report.step == {fails} then error(\"broken\") end\n  if n == 5 then return {{ stop = `n {{n}}` }} end\nend }}\n\
             return {{ tuned.stopped, tuned.metrics.steps }}"
        )
    };
    let broken = place.run(&script("(if params.n == 1 then 3 else 0)"), &[])?;
    assert!(!broken.status.success());
    for _ in 0..2 {
        let (result, story) =
            ran(&place.run(&script("(if params.n == 1 then 3 else 0)"), &["--json", "--set", "n=2"])?)?;
        assert!(result == json!(["n 5", 5]) && !story.contains("goes on   after"), "{result} {story}");
    }
    Ok(())
}

#[test]
fn a_dry_run_of_a_loop_that_never_ends_ends_at_its_line() -> Result<()> {
    let place = Place::new()?;
    let script = format!(
        "{TRAIN}repeat\n  model = homeroom.fine_tune {{ model = model, dataset = data.train, eval = data.eval, steps = 1 }}\nuntil model.metrics.eval_loss < 0.5"
    );
    let output = place.run(&script, &["--dry-run"])?;
    let story = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        story.contains("s.lua:4: a dry run imagines at most 1,000 calls") && story.contains("bound its loop"),
        "{story}"
    );
    Ok(())
}

#[test]
fn other_rows_options_and_files_of_the_base_are_other_steps() -> Result<()> {
    let place = Place::new()?;
    let model = place.path("model");
    std::fs::create_dir(&model)?;
    for entry in std::fs::read_dir(crate::support::fixture("models/llama"))? {
        let entry = entry?;
        std::fs::copy(entry.path(), model.join(entry.file_name()))?;
    }
    let script = |rows: &str, options: &str| {
        format!(
            "local data = homeroom.prepare_dataset {{ path = params.dataset }}.train{rows}\n\
             return homeroom.evaluate {{ model = params.model, dataset = data{options} }}"
        )
    };
    let set = format!("model={}", model.display());
    let looked_up = |rows: &str, options: &str| -> Result<bool> {
        let (result, story) = ran(&place.run(&script(rows, options), &["--json", "--set", &set])?)?;
        ensure!(result["loss"].as_f64().is_some_and(f64::is_finite), "{result}");
        Ok(story.contains("from run"))
    };
    assert!(!looked_up("", "")?);
    assert!(looked_up("", "")?);
    // Rows by what they are, not by how they came to be.
    assert!(looked_up(":filter(function(row) return true end)", "")?);
    assert!(!looked_up(":filter(function(row) return row.id > 1 end)", "")?);
    assert!(!looked_up("", ", compute = \"bf16\"")?);
    let config = model.join("config.json");
    let text = std::fs::read_to_string(&config)?;
    std::fs::write(&config, format!("{text}\n"))?;
    assert!(!looked_up("", "")?, "a byte of the base has changed");
    std::fs::write(&config, text)?;
    assert!(looked_up("", "")?);
    Ok(())
}

/// Of a run that is killed in its second training, the first is looked up and the second goes on from its checkpoint, in the same run; the
/// adapter has the bytes of one that was never ended.
#[cfg(unix)]
#[test]
fn a_run_that_was_killed_goes_on_where_it_was() -> Result<()> {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let [whole, killed] = [Place::new()?, Place::new()?];
    let script = format!(
        "{TRAIN}local function tune(model, steps)\n  return homeroom.fine_tune {{ model = model, dataset = data.train, steps = steps, batch_size = 4, learning_rate = 1e-3, \
         save_steps = 1,\n  on_step = function(report)\n    report.state.sum = (report.state.sum or 0) + report.step\n\
             if report.step == steps then return {{ stop = tostring(report.state.sum) }} end\n  end }}\nend\n\
         local first = tune(model, 2)\nlocal second = tune(first, 300)\nreturn {{ second.adapter, second.stopped }}"
    );
    let (expected, _) = ran(&whole.run(&script, &["--json"])?)?;
    assert_eq!(expected, json!(["s-1/2", "45150"]));
    let config = killed.config(&script)?;
    let mut child = killed.command(&config).stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let lines = BufReader::new(child.stderr.take().context("it is piped")?).lines();
    let mut trainings = 0;
    for line in lines {
        let line = line?;
        trainings += usize::from(line.starts_with("training  "));
        // About ten lines are said of a training: this one is not its first.
        let step = line.strip_prefix("step").and_then(|rest| rest.split('/').next()?.trim().parse::<u64>().ok());
        if trainings == 2 && step.is_some_and(|step| step > 20) {
            break;
        }
    }
    child.kill()?;
    child.wait()?;
    // Templates say on, whenever it goes on, what they said when it was begun.
    let said = killed.home().join("runs/s-1/trainings/2/training.json");
    let mut begun: Value = serde_json::from_slice(&std::fs::read(&said)?)?;
    assert!(begun["clock"].is_i64(), "{begun}");
    begun["clock"] = json!(1_000_000_007);
    std::fs::write(&said, begun.to_string())?;
    let (result, story) = ran(&killed.run(&script, &["--json"])?)?;
    assert_eq!(result, expected);
    let ended: Value = serde_json::from_slice(&std::fs::read(&said)?)?;
    assert_eq!(ended["clock"], begun["clock"]);
    for told in ["goes on   in run s-1", "stage 1   from run s-1, ", "goes on   after step "] {
        assert!(story.contains(told), "{told}: {story}");
    }
    assert!(!killed.home().join("runs/s-2").exists());
    let bytes = |place: &Place| std::fs::read(place.home().join("runs/s-1/adapters/2/adapter_model.safetensors"));
    assert!(bytes(&killed)? == bytes(&whole)?, "the bytes differ");
    Ok(())
}

/// What has ended is not what is gone on with, where nothing is to be looked up.
#[test]
fn the_same_training_twice_in_a_fresh_run_is_made_twice() -> Result<()> {
    let place = Place::new()?;
    let script = format!(
        "{TRAIN}local function tune() return homeroom.fine_tune {{ model = model, dataset = data.train, steps = 3, batch_size = 4, save_steps = 1 }} end\n\
         local first, second = tune(), tune()\nreturn {{ first.adapter, second.adapter, first.metrics.train_loss, second.metrics.train_loss }}"
    );
    let (result, story) = ran(&place.run(&script, &["--fresh", "--json"])?)?;
    assert_eq!((&result[0], &result[1]), (&json!("s-1/1"), &json!("s-1/2")));
    assert_eq!(result[2], result[3]);
    assert!(story.matches("training  3 steps").count() == 2 && !story.contains("goes on   "), "{story}");
    Ok(())
}

/// The record of a run says what made it.
#[test]
fn a_run_that_goes_on_with_an_edited_script_says_so_and_records_the_new_one() -> Result<()> {
    let place = Place::new()?;
    let script = |second: &str| {
        format!(
            "{TRAIN}local first = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 2, batch_size = 4 }}\n{second}"
        )
    };
    let failed = place.error(&script("error(\"not yet\")"))?;
    assert!(failed.contains("s.lua:4: not yet"), "{failed}");
    place.write("s.lua", &script("return first.adapter"))?;
    let mut resume = crate::support::homeroom();
    let output = resume.args(["resume", "s-1"]).env("HOMEROOM_HOME", place.home()).output()?;
    let story = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{story}");
    for told in ["its script or its settings have changed since run s-1 was begun", "stage 1   from run s-1, "] {
        assert!(story.contains(told), "{told}: {story}");
    }
    let kept = std::fs::read_to_string(place.home().join("runs/s-1/script.lua"))?;
    assert!(kept.ends_with("return first.adapter"), "{kept}");
    assert!(!place.home().join("runs/s-2").exists());
    Ok(())
}

/// A home that cannot be written costs the look-up and not the result.
#[cfg(unix)]
#[test]
fn what_cannot_be_kept_is_made_all_the_same() -> Result<()> {
    let place = Place::new()?;
    place.write("home", "a file")?;
    let script = "local data = homeroom.prepare_dataset { path = params.dataset }.train\n\
        local function loss() return homeroom.evaluate { model = params.model, dataset = data }.loss end\nreturn { loss(), loss() }";
    let (losses, story) = ran(&place.run(script, &["--json"])?)?;
    assert!(losses[0].as_f64().is_some_and(f64::is_finite) && losses[0] == losses[1], "{losses}");
    assert_eq!(story.matches("note: evaluate is not kept for later runs: ").count(), 1, "{story}");
    Ok(())
}
