//! What a script says and gets: rows that it does not touch stay as they were, slips are told at its line, options have the names that
//! people know, and a result fits a screen.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::pipelines::{Place, TRAIN};
use crate::support::fixture;

/// Rows with what JSON can say and Lua cannot.
const ROWS: [&str; 4] = [
    r#"{"messages": [{"role": "user", "name": "b", "content": "2 + 2?", "a": [1.0, null, 9007199254740993]}, {"role": "assistant", "content": "4"}], "id": 18446744073709551617, "note": null}"#,
    r#"{"z": 1e3, "messages":[{"content":"größe?","role":"user"},{"content":"gr\u00f6\u00dfe","role":"assistant","tool_calls":null}]}"#,
    r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 18446744073709551616, "deep": [[{}, []], [null]]}"#,
    r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 18446744073709551618, "-0": -0.0}"#,
];

fn place() -> Result<Place> {
    let place = Place::new()?;
    place.write("rows.jsonl", &format!("\u{feff}{}\n\n", ROWS.join("  \r\n")))?;
    Ok(place)
}

fn digest(rows: &[&str]) -> String {
    let hash = Sha256::digest(rows.iter().map(|row| format!("{row}\n")).collect::<String>());
    format!("sha256:{}", hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

#[test]
fn what_a_script_does_not_touch_is_trained_on_as_it_was() -> Result<()> {
    let place = place()?;
    let changed = r#"{"messages":[{"role": "user", "name": "b", "content": "2 + 2?", "a": [1.0, null, 9007199254740993]},{"role":"assistant","content":"5"}],"id":18446744073709551617,"note":null}"#;
    let cases: [(&str, Vec<&str>); 9] = [
        ("d", ROWS.to_vec()),
        ("d:map(function(row) return row end)", ROWS.to_vec()),
        ("d:filter(function(row) return #row.messages == 2 end)", ROWS.to_vec()),
        ("d:sample { n = 9 }:concat(d:sample { n = 4 })", [ROWS, ROWS].concat()),
        (
            "d:dedupe():filter(function(row) return row.id ~= nil end):dedupe { by = \"id\" }",
            vec![ROWS[0], ROWS[2], ROWS[3]],
        ),
        (
            "d:bucket { by = function(row) return row.messages[1].content == \"a\" and 0 or 1 end, quantiles = { 0.5 } }[2]",
            ROWS[..2].to_vec(),
        ),
        ("select(2, d:split { eval = 0.01, seed = 3 }):concat(d):dedupe():shuffle { seed = 1 }", vec![]),
        (
            "d:map(function(row) if row.note == nil and row.id and row.messages[1].name then row.messages[2].content = \"5\" end return row end)",
            [&[changed][..], &ROWS[1..]].concat(),
        ),
        (
            "d:map(function(row) row.messages[2].weight = homeroom.null row.messages[2].tool_calls = nil return row end):map(function(row) return row end):sample { n = 1, seed = 1 }",
            vec![],
        ),
    ];
    for (rows, expected) in cases {
        let result = place.result(&format!(
            "local d = homeroom.prepare_dataset {{ path = params.dataset }}.train\nlocal rows = {rows}\n\
             local tuned = homeroom.fine_tune {{ model = params.model, dataset = rows, max_steps = 1, r = 2 }}\n\
             return {{ adapter = tuned.adapter, count = #rows }}"
        ))?;
        let run = result["adapter"].as_str().and_then(|id| id.split_once('/')).context("RUN/NUMBER")?;
        let manifest = place.home().join("runs").join(run.0).join("adapters").join(run.1).join("homeroom.json");
        let manifest: Value = serde_json::from_str(&std::fs::read_to_string(manifest)?)?;
        if expected.is_empty() {
            // The order is drawn, so the rows are only counted: all that differ, or the one that was drawn.
            let count = if rows.contains("sample { n = 1") { 1 } else { 4 };
            assert_eq!(result["count"], count, "{rows}");
        } else {
            assert_eq!(manifest["data_digest"], digest(&expected), "{rows}");
        }
    }
    Ok(())
}

/// An item that is null keeps its place, and a script can write it.
#[test]
fn null_is_an_item_of_a_list_and_no_field() -> Result<()> {
    let place = place()?;
    let result = place.result(
        "local rows = homeroom.prepare_dataset { path = params.dataset }.train:rows()\n\
         local a = rows[1].messages[1].a\n\
         return { #a, a[2] == homeroom.null and tostring(a[2]) == 'null', a[3] == 2 ^ 53, rows[1].note == nil, rows[3].deep, { x = homeroom.null } }",
    )?;
    assert_eq!(result, json!([3, true, true, true, [[{}, []], [null]], {"x": null}]));
    Ok(())
}

#[test]
fn a_function_that_returns_nothing_is_an_error_at_its_line() -> Result<()> {
    let place = Place::new()?;
    for (script, expected) in [
        (
            "data.train:filter(\nfunction(row)\n  local long = #row.messages > 2\nend)",
            "s.lua:4: filter: the function returned nothing; return true or false (row: ",
        ),
        (
            "data.train:filter(function(row) if row.id < 2 then return true end end)",
            "s.lua:3: filter: the function returned nothing; return true or false",
        ),
        (
            "local function shout(row)\n  row.messages[1].content ..= \"!\"\nend\ndata.train:map(shout)",
            "s.lua:3: map: the function returned nothing; return the row, or nil to leave it out (row: ",
        ),
        (
            "data.train:bucket {\n  quantiles = { 0.5 },\n  by = function(row) local n = row.id end }",
            "s.lua:5: bucket: `by`: the function returned nothing; return the key",
        ),
        ("data.train:dedupe { by = function(row) end }", "s.lua:3: dedupe: `by`: the function returned nothing"),
        (
            "data.train:filter(function(row) return 1 end)",
            "s.lua:3: filter: the function returned 1, not true or false",
        ),
        (
            "data.train:map(\nfunction(row) return true end)",
            "s.lua:4: map: the function returned true, not a row, a list of rows or nil",
        ),
        // A name that no row has is alike in all of them.
        (
            "data.train:dedupe { by = \"levle\" }",
            "s.lua:3: dedupe: `by`: no row has a field `levle`, did you mean `level`?",
        ),
        ("data.train:bucket { by = \"length\", quantiles = { 0.5 } }", "bucket: `by`: no row has a field `length`"),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, max_steps = 1,\n  on_step = function(report) return true end }",
            "s.lua:4: fine_tune: on_step: it returned true, not nil or a table",
        ),
        (
            "homeroom.fine_tune { model = model, dataset = data.train, eval = data.eval, max_steps = 2, eval_steps = 1, on_eval =\n\
             function(report) return { report.best } end }",
            "s.lua:4: fine_tune: on_eval: a directive is a table of names",
        ),
    ] {
        let message = place.error(&format!("{TRAIN}{script}"))?;
        assert!(message.contains(expected), "{script}\n{message}");
    }
    // One that sometimes returns nothing leaves rows out, and an explicit nil is an answer.
    let kept = place.result(&format!(
        "{TRAIN}local all = data.train:concat(data.eval)\nlocal few = all:map(function(row) if row.id < 2 then return row end end)\n\
         return {{ #few, #all:map(function(row) return nil end), #all:filter(function(row) return row.nothing end) }}"
    ))?;
    assert_eq!(kept, json!([2, 0, 0]));
    Ok(())
}

#[test]
fn a_filter_that_keeps_nothing_says_so() -> Result<()> {
    let place = Place::new()?;
    let story = |script: &str| -> Result<String> {
        let output = place.run(&format!("{TRAIN}{script}"), &[])?;
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let none = story("local long = data.eval:filter(function(row) return #row.messages > 9 end)")?;
    assert!(none.contains("warning: "), "{none}");
    assert!(none.contains("s.lua:3: filter keeps none of 6 rows"), "{none}");
    let one = story(
        "data.eval:sample { n = 1 }:filter(function(row) return true end):filter(function(row) return true end)",
    )?;
    assert!(!one.contains("warning: "), "{one}");
    Ok(())
}

/// What the program is made of is nobody's word: no name of the binding, of Rust or of its types.
#[test]
fn messages_name_nothing_that_is_internal() -> Result<()> {
    let place = Place::new()?;
    for (script, expected) in [
        ("data.train:fliter(print)", "s.lua:3: a dataset has no `fliter`, did you mean `filter`?"),
        ("local f = function() return data.train.nothing end\nf()", "s.lua:3: a dataset has no `nothing`"),
        ("print(data.train[1])", "s.lua:3: a dataset has no `1`"),
        ("data.train.name = \"x\"", "s.lua:3: a dataset has no field `name` to set; its methods give new datasets"),
        ("data.train[{}] = 1", "s.lua:3: a dataset has no field `a table` to set"),
        ("return data.train", "what it returns: a dataset is no plain value"),
        ("print(data.train + 1)", "s.lua:3: attempt to perform arithmetic (add) on dataset and number"),
        ("print(data.train .. \"x\")", "s.lua:3: attempt to concatenate dataset with string"),
        ("data.train()", "s.lua:3: attempt to call a dataset value"),
        ("print(data.train < data.eval)", "s.lua:3: attempt to compare dataset < dataset"),
        (
            "data.train:map(function(row) return data.train end)",
            "map: the function returned a dataset, not a row, a list of rows or nil",
        ),
        ("data.train:map(function(row) row.x = data return row end)", "a dataset is no plain value"),
        (
            "data.train:map(function(row) row.x = homeroom.null.y return row end)",
            "s.lua:3: attempt to index null with 'y'",
        ),
        ("string.rep()", "s.lua:3: missing argument #1 to 'rep' (string expected)"),
        ("print(typeof(data.train)) error(data.train)", "dataset of 18 rows"),
        ("error({ code = 1 })", "s.lua:3: the script raised a table, not a message"),
        ("error()", "s.lua:3: the script raised nil, not a message"),
        ("homeroom.log.info(\"x\", { data.train })", "a dataset is no plain value"),
        ("homeroom.fine_tune(data.train)", "s.lua:3: fine_tune: it takes one table of options, not a dataset"),
        ("return string.frmat(1)", "s.lua:3: `string` has no `frmat`, did you mean `format`?"),
        ("return (\"é\"):uper()", "s.lua:3: `string` has no `uper`, did you mean `upper`?"),
        ("os.execute(\"x\")", "s.lua:3: `os` has no `execute`; it has clock, date"),
        ("return math.flor(1.5)", "s.lua:3: `math` has no `flor`, did you mean `floor`?"),
        (
            "homeroom.generate { model = model, prompts = {} }",
            "s.lua:3: generate: `prompts` is empty; it should be a list of strings",
        ),
        ("return { 1, nil, 3 }", "a list has a nil before its end; write homeroom.null for an item that is null"),
        ("return { x = { nil, nil, \"é\" } }", "write homeroom.null for an item that is null"),
        (
            "data.train:map(function(row) row.m = { 1, nil, nil, 4 } return row end)",
            "a list has a nil before its end; write homeroom.null",
        ),
        (
            "data.train:dedupe { by = function(row) return nil end }",
            "s.lua:3: dedupe: `by` gives no key; filter such rows out first",
        ),
        (
            "local n = 0 data.train:map(function(row) n += 1 if n == 2 then row.opt = \"é\" end return row end):dedupe { by = \"opt\" }",
            "s.lua:3: dedupe: `by` gives no key; filter such rows out first, or give a function that returns a key for each (row: ",
        ),
        ("params()", "s.lua:3: attempt to call a table value"),
        ("require(data.train)", "s.lua:3: require: it takes the name of a module, not a dataset"),
    ] {
        let message = place.error(&format!("{TRAIN}{script}"))?;
        assert!(message.contains(expected), "{script}\n{message}");
        for internal in ["mlua", "userdata", "Dataset", "[homeroom]", "[C]", "[string", "__", "::", "LightUserData"] {
            assert!(!message.contains(internal), "{script}: {internal}\n{message}");
        }
    }
    Ok(())
}

/// As transformers spells it: 4 bits are `qlora`, 8 bits are `int8`.
#[test]
fn load_in_4bit_and_8bit_are_strategies() -> Result<()> {
    let place = Place::new()?;
    let result = place.result(
        "local function strategy(options) options.name = params.model return homeroom.load_model(options).strategy end\n\
         local data = homeroom.prepare_dataset { path = params.dataset }\n\
         local tuned = homeroom.fine_tune { model = homeroom.load_model { name = params.model, load_in_4bit = true, r = 2 }, dataset = data.train, max_steps = 1 }\n\
         return { strategy { load_in_4bit = true }, strategy { load_in_8bit = true }, strategy { load_in_4bit = false }, strategy {},\n\
         strategy { load_in_8bit = true, load_in_4bit = false, strategy = \"int8\" }, strategy { load_in_8bit = false, strategy = \"full\" }, tuned.strategy }",
    )?;
    assert_eq!(result, json!(["qlora", "int8", "lora", "lora", "int8", "full", "qlora"]));
    for (options, expected) in [
        (
            "load_in_4bit = true, strategy = \"lora\"",
            "`load_in_4bit = true` contradicts `strategy = \"lora\"`; leave one of them out",
        ),
        ("load_in_8bit = true, strategy = \"qlora\"", "`load_in_8bit = true` contradicts `strategy = \"qlora\"`"),
        ("load_in_4bit = false, strategy = \"qlora\"", "`load_in_4bit = false` contradicts `strategy = \"qlora\"`"),
        ("load_in_4bit = true, load_in_8bit = true", "`load_in_4bit` and `load_in_8bit` are both true"),
        ("load_in_4bit = 1", "`load_in_4bit` should be true or false, not 1"),
        ("load_in_4bits = true", "unknown option `load_in_4bits`, did you mean `load_in_4bit`?"),
    ] {
        let message = place.error(&format!("\nhomeroom.load_model {{ name = params.model, {options} }}"))?;
        assert!(message.contains(&format!("s.lua:2: load_model: {expected}")), "{options}\n{message}");
    }
    Ok(())
}

/// An option has transformers' name and names that people write; both train the same, and both at once are refused.
#[test]
fn each_option_has_one_name_and_others_mean_the_same() -> Result<()> {
    let place = Place::new()?;
    let train = |options: &str| {
        place.result(&format!(
            "{TRAIN}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, eval = data.eval, {options} }}\n\
             return {{ tuned.metrics.eval_loss, tuned.metrics.planned_steps }}"
        ))
    };
    let canonical = "num_train_epochs = 2, max_steps = 5, per_device_train_batch_size = 5, learning_rate = 1e-2, \
        lr_scheduler_type = \"linear\", warmup_ratio = 0.4, eval_steps = 2, r = 3";
    let others = "epochs = 2, steps = 5, batch_size = 5, lr = 1e-2, schedule = \"linear\", warmup = 0.4, eval_every = 2, lora_r = 3";
    let trained = train(canonical)?;
    assert_eq!(trained, train(others)?);
    for other in
        ["lr_scheduler_type = \"constant\"", "warmup_ratio = 0", "max_steps = 4", "per_device_train_batch_size = 6"]
    {
        let name = |option: &str| option.split(' ').next().map(str::to_owned);
        let options = canonical.split(", ").map(|option| if name(option) == name(other) { other } else { option });
        assert_ne!(trained, train(&options.collect::<Vec<_>>().join(", "))?, "{other}");
    }
    for (options, expected) in [
        (
            "epochs = 2, num_train_epochs = 2",
            "fine_tune: `num_train_epochs` and `epochs` are one option; give one of them",
        ),
        ("lr_scheduler_type = \"linear\", schedule = \"linear\"", "`lr_scheduler_type` and `schedule` are one option"),
        ("r = 2, lora_r = 3", "`r` and `lora_r` are one option"),
        ("batch_size = 0", "`batch_size` should be a whole number from 1, not 0"),
        ("per_device_train_batch = 2", "did you mean `per_device_train_batch_size`?"),
        (
            "lr_scheduler_type = \"polynomial\"",
            "should be \"cosine\" or \"linear\" or \"constant\", not \"polynomial\"",
        ),
    ] {
        let message =
            place.error(&format!("{TRAIN}homeroom.fine_tune {{ model = model, dataset = data.train, {options} }}"))?;
        assert!(message.contains(expected) && message.contains("s.lua:3: "), "{options}\n{message}");
    }
    Ok(())
}

#[test]
fn check_looks_for_what_parameters_name() -> Result<()> {
    let place = Place::new()?;
    let config = place.config("return 1")?;
    let check = |settings: &[&str]| -> Result<String> {
        let mut command = place.command(&config);
        settings.iter().for_each(|setting| _ = command.arg("--set").arg(setting));
        let output = command.arg("--check").output()?;
        Ok(format!("{:?} {}", output.status.code(), String::from_utf8_lossy(&output.stderr)))
    };
    let fine = check(&[&format!("model={}", fixture("models/llama").display())])?;
    assert!(fine.starts_with("Some(0)"), "{fine}");
    let missing = check(&["dataset=nobody/größe.jsonl", "model=nobody"])?;
    assert!(missing.starts_with("Some(1)") && missing.contains("2 problems"), "{missing}");
    for (name, path) in [("dataset", "nobody/größe.jsonl"), ("model", "nobody")] {
        let expected = format!("--set {name}: there is no file or directory ");
        assert!(missing.lines().any(|line| line.contains(&expected) && line.ends_with(path)), "{path}\n{missing}");
    }
    let text = std::fs::read_to_string(&config)?.replace("model = { type = \"path\"", "model = { type = \"model\"");
    place.write("c.toml", &text)?;
    let missing = check(&["model=nobodys-tutor"])?;
    assert!(missing.contains("--set model: nobodys-tutor: no such model\n"), "{missing}");
    Ok(())
}

#[test]
fn a_file_without_a_pipeline_says_what_it_is_for() -> Result<()> {
    let place = Place::new()?;
    let handlers = crate::support::root().join("configs/handlers.toml");
    let crate_file = place.write("Cargo.toml", "[package]\nname = \"x\"\n")?;
    let other = place.write("other.toml", "[pipelin]\nscript = \"s.lua\"\n")?;
    for (path, expected) in [
        (
            &handlers,
            vec!["it declares no pipeline: it says who answers", "homeroom serve --config FILE", "--handler NAME"],
        ),
        (&crate_file, vec!["it declares no pipeline: it is a crate's", "homeroom plugins watch CRATE"]),
        (&other, vec!["`pipelin`: unknown key, did you mean `pipeline`?", "there is no [pipeline]"]),
    ] {
        let output = place.command(path).output()?;
        let story = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{story}");
        assert!(expected.iter().all(|words| story.contains(words)), "{story}");
        assert!(path == &other || !story.contains("unknown key"), "{story}");
    }
    Ok(())
}

/// What a script returns is kept with its run; a screen gets what fits on it.
#[test]
fn a_long_result_is_kept_in_the_runs_directory() -> Result<()> {
    let place = Place::new()?;
    let script = format!(
        "{TRAIN}local list = {{}}\nfor i = 1, 30 do list[i] = {{ question = \"größe \" .. i }} end\n\
         homeroom.fine_tune {{ model = model, dataset = data.train, max_steps = 1 }}\nreturn {{ loss = 1 / 3, questions = list }}"
    );
    let output = place.run(&script, &[])?;
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        shown.starts_with("loss       0.333333\nquestions  30 items, in ") && shown.lines().count() == 2,
        "{shown}"
    );
    let (_, path) = shown.trim().rsplit_once(" in ").context("it says where")?;
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    assert_eq!(kept["questions"][29]["question"], "größe 30");
    assert_eq!(kept, place.result(&script)?);
    // Without a training there is no run, and all of it is shown.
    let output = place.run("local list = {} for i = 1, 30 do list[i] = i end return list", &[])?;
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 30);
    Ok(())
}

/// The first command of the README: its end is a table that fits a screen, and little stands before it.
#[test]
fn the_quickstart_ends_with_a_table_that_fits_a_screen() -> Result<()> {
    let place = Place::new()?;
    let config = crate::support::root().join("configs/quickstart.toml");
    let output = place.command(&config).args(["--set", "epochs=1", "--set", "questions=7"]).output()?;
    let (story, result) =
        (String::from_utf8_lossy(&output.stderr).into_owned(), String::from_utf8_lossy(&output.stdout).into_owned());
    assert!(output.status.success(), "{story}");
    let lines: Vec<&str> = story.lines().filter(|line| !line.starts_with("step ")).collect();
    assert!(lines.len() + result.lines().count() <= 32, "{story}{result}");
    let head = lines.iter().position(|line| line.starts_with("question ")).context("there is a table")?;
    let columns: Vec<usize> =
        ["question", "before", "after", "right?"].iter().filter_map(|name| lines[head].find(name)).collect();
    assert_eq!(columns.len(), 4, "{story}");
    for row in &lines[head + 1..head + 6] {
        let row: Vec<char> = row.chars().collect();
        assert!(row.len() <= 80, "{story}");
        for column in &columns {
            assert!(row[*column] != ' ' && (*column == 0 || row[column - 1] == ' '), "{story}");
        }
    }
    assert!(
        lines[head + 6].is_empty() && lines[head + 7].starts_with("next  homeroom chat --model-dir pig-latin "),
        "{story}"
    );
    assert!(
        result.contains(&format!("{:18}7 items, in ", "questions")) && result.contains("eval_loss_before  "),
        "{result}"
    );
    Ok(())
}
