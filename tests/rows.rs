//! Rows as people have them, through the program: a table, several files, a folder and the standard input teach what the same rows teach
//! as JSONL, bit for bit. What each file is found to be stands in `tests/fixtures/rows/table.json`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::command_line::Running;
use crate::support::{Place, fixture, homeroom, loss, printed_json, refused, succeeds};

const WEIGHTS: &str = "adapter_model.safetensors";

/// Questions and answers, with what parts cells and rows in them.
fn pairs(count: usize) -> Vec<(String, String)> {
    let pair = |n: usize| (format!("times seven; {n}, please?"), format!("\"{}\"\nis what you get", n * 7 % 10));
    (0..count).map(pair).collect()
}

fn jsonl(pairs: &[(String, String)]) -> String {
    pairs.iter().map(|(asked, answered)| format!("{}\n", json!({"prompt": asked, "completion": answered}))).collect()
}

fn csv(header: &str, pairs: &[(String, String)], separator: char) -> String {
    let cell = |text: &String| format!("\"{}\"", text.replace('"', "\"\""));
    let rows = pairs.iter().map(|(asked, answered)| format!("{}{separator}{}\r\n", cell(asked), cell(answered)));
    format!("\u{feff}{header}\r\n{}", rows.collect::<String>())
}

/// A place with its own home.
struct Rows(Place);

impl Rows {
    fn new() -> Result<Self> {
        Ok(Self(Place::new()?))
    }

    fn command(&self, word: &str) -> Command {
        let mut command = homeroom();
        command.env("HOMEROOM_HOME", self.0.path("home")).current_dir(self.0.path("")).arg(word);
        command
    }

    /// A training of a fraction of a second into `outputs/NAME`, on files of this place.
    fn fine_tune(&self, name: &str, files: &[&str]) -> Command {
        let mut command = self.command("fine-tune");
        command.arg("--model-name").arg(fixture("models/llama")).args(["--batch-size", "4", "--epochs", "2"]);
        command.arg("--output-dir").arg(self.out(name)).arg("--training-file").args(files);
        command
    }

    fn out(&self, name: &str) -> PathBuf {
        self.0.path("outputs").join(name)
    }

    fn weights(&self, name: &str) -> Result<Vec<u8>> {
        Ok(fs::read(self.out(name).join(WEIGHTS))?)
    }
}

/// The command with a file as its standard input.
fn piped(command: &Command, file: &Path) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec \"$0\" \"$@\" < \"$ROWS\""]).arg(command.get_program()).args(command.get_args());
    shell.env("ROWS", file).envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    if let Some(directory) = command.get_current_dir() {
        shell.current_dir(directory);
    }
    shell
}

#[test]
fn rows_teach_the_same_whatever_holds_them() -> Result<()> {
    let rows = Rows::new()?;
    let pairs = pairs(11);
    rows.0.write("whole.jsonl", jsonl(&pairs))?;
    rows.0.write("geo.csv", csv("Frage;Antwort", &pairs, ';'))?;
    rows.0.write("first.jsonl", jsonl(&pairs[..4]))?;
    rows.0.write("second.tsv", csv("Question\tAnswer", &pairs[4..], '\t'))?;
    rows.0.write("words.csv", csv("Wort,Bedeutung", &pairs, ','))?;
    rows.0.write("folder/train.csv", csv("question,answer", &pairs, ','))?;
    rows.0.write("folder/valid.jsonl", jsonl(&pairs[..3]))?;
    rows.0.write("folder/test.jsonl", jsonl(&pairs[..2]))?;
    let list: Vec<Value> =
        pairs.iter().map(|(asked, answered)| json!({"instruction": asked, "output": answered})).collect();
    rows.0.write("list.json", serde_json::to_string_pretty(&list)?)?;
    let plain = succeeds(&mut rows.fine_tune("plain", &["whole.jsonl"]))?;
    assert_eq!(plain.stderr.lines().filter(|line| line.starts_with("data ")).count(), 1, "{}", plain.stderr);
    let cases: [(&str, &[&str], &[&str], &str); 5] = [
        ("geo", &["geo.csv"], &[], "data      geo.csv   CSV with `;`; Frage → user, Antwort → assistant\n"),
        (
            "two",
            &["first.jsonl", "second.tsv"],
            &[],
            "data      second.tsv   TSV; Question → user, Answer → assistant\n",
        ),
        (
            "words",
            &["words.csv"],
            &["--columns", "prompt=Wort,completion=Bedeutung"],
            "data      words.csv   CSV; Wort → user, Bedeutung → assistant\n",
        ),
        ("list", &["list.json"], &[], "data      list.json   JSON list; instruction → user, output → assistant\n"),
        (
            "folder",
            &["folder"],
            &[],
            "data      folder/train.csv   CSV; question → user, answer → assistant\ndata      folder   11 examples, 3 held out",
        ),
    ];
    for (name, files, more, said) in cases {
        let ran = succeeds(rows.fine_tune(name, files).args(more))?;
        assert!(ran.stderr.contains(said), "{name}: {}", ran.stderr);
        assert!(rows.weights(name)? == rows.weights("plain")?, "{name}");
    }
    let of = |name: &str| -> Result<Value> {
        let manifest: Value = serde_json::from_slice(&fs::read(rows.out(name).join("homeroom.json"))?)?;
        Ok(manifest["data_digest"].clone())
    };
    assert!(of("plain")?.is_string());
    for name in ["geo", "two", "words", "folder"] {
        assert_eq!(of(name)?, of("plain")?, "{name}");
    }
    // What was chosen for a run is shown of it.
    let listed = succeeds(rows.command("runs").arg("list"))?;
    assert!(listed.stdout.contains("with first.jsonl and 1 more"), "{}", listed.stdout);
    let held_out = rows.fine_tune("none", &["whole.jsonl"]).args(["--eval-every", "1"]).output()?;
    assert!(String::from_utf8_lossy(&held_out.stderr).contains("there are none"));
    Ok(())
}

#[test]
fn rows_measure_the_same_whatever_holds_them() -> Result<()> {
    let rows = Rows::new()?;
    let pairs = pairs(5);
    let whole = rows.0.write("whole.jsonl", jsonl(&pairs))?;
    let table = rows.0.write("geo.csv", csv("Frage;Antwort", &pairs, ';'))?;
    rows.0.write("folder/train.csv", csv("question,answer", &pairs[..2], ','))?;
    rows.0.write("folder/validation.jsonl", jsonl(&pairs))?;
    let base = fixture("models/llama");
    let expected = loss(&base, &whole)?;
    assert_eq!(loss(&base, &table)?, expected);
    assert_eq!(loss(&base, &rows.0.path("folder"))?, expected, "of a folder the held-out rows");
    let mut eval = rows.command("eval");
    eval.arg("--model-dir").arg(&base).args(["--json", "--file", "-"]);
    assert_eq!(printed_json(&succeeds(&mut piped(&eval, &table))?)?["loss"], expected);
    // A system message changes what is asked.
    let mut told = rows.command("eval");
    told.arg("--model-dir").arg(&base).args(["--json", "--system", "Be brief.", "--file", "geo.csv"]);
    assert_ne!(printed_json(&succeeds(&mut told)?)?["loss"], expected);
    let mut compare = rows.command("compare");
    compare.arg(&base).arg(&base).args(["--samples", "1", "--file", "whole.jsonl", "--file", "geo.csv"]);
    let ran = succeeds(&mut compare)?;
    assert!(ran.stdout.contains("whole.jsonl line ") || ran.stdout.contains("geo.csv row "), "{}", ran.stdout);
    Ok(())
}

#[test]
fn bad_rows_are_refused_together_or_left_out_and_named() -> Result<()> {
    let rows = Rows::new()?;
    let good = pairs(6);
    rows.0.write("good.jsonl", jsonl(&good))?;
    let table = csv("Frage,Antwort", &good, ',') + "Wie viel?,\r\n,4\r\nWas?,a,b\r\n";
    rows.0.write("some.csv", table)?;
    rows.0.write("other.jsonl", format!("{}{{\"prompt\": 3}}\n", jsonl(&good[..2])))?;
    let words = [
        "some.csv: 3 problems\n  row 8: nothing to train on: `Antwort` is empty\n  row 9: `Frage` is empty\n  row 10: 3 cells, where the header has 2",
        "hint: `--on-bad-row skip` leaves them out",
        "other.jsonl: 1 problem\n  line 3: unknown row with `prompt`",
    ];
    refused(&mut rows.fine_tune("refused", &["some.csv", "other.jsonl"]), &words)?;
    let ran = succeeds(rows.fine_tune("skipped", &["some.csv"]).args(["--on-bad-row", "skip"]))?;
    let note = "note: some.csv: 3 of 9 rows left out: rows 8-10; row 8: nothing to train on: `Antwort` is empty\n";
    assert!(ran.stderr.contains(note), "{}", ran.stderr);
    succeeds(&mut rows.fine_tune("good", &["good.jsonl"]))?;
    assert!(rows.weights("skipped")? == rows.weights("good")?);
    // A row that is too long is not a bad one.
    let mut long = rows.fine_tune("long", &["good.jsonl"]);
    refused(
        long.args(["--on-bad-row", "skip", "--max-seq-len", "20"]),
        &["tokens, the limit is 20", "--on-long-row skip"],
    )?;
    rows.0.write("all.csv", "Frage,Antwort\na?,\nb?,\n")?;
    let words = ["all.csv: all 2 rows: nothing to train on: `Antwort` is empty", "here all are"];
    refused(rows.fine_tune("all", &["all.csv"]).args(["--on-bad-row", "skip"]), &words)?;
    rows.0.write("unclear.csv", "Nr,Wort,Bedeutung\n1,domus,Haus\n")?;
    let words = ["hint: `--columns prompt=Wort,completion=Bedeutung` says which is which"];
    refused(&mut rows.fine_tune("unclear", &["unclear.csv"]), &words)?;
    refused(&mut rows.fine_tune("missed", &["god.jsonl"]), &["god.jsonl: no such file", "did you mean `good.jsonl`?"])
}

/// It can be read once, so a run keeps what came in.
#[test]
fn a_run_on_the_standard_input_goes_on_where_it_was_killed() -> Result<()> {
    let rows = Rows::new()?;
    let (all, file) = (jsonl(&pairs(24)), "whole.jsonl");
    let whole = rows.0.write(file, &all)?;
    let other = rows.0.write("other.jsonl", jsonl(&pairs(23)))?;
    let many = ["--max-steps", "60", "--save-every", "2"];
    succeeds(rows.fine_tune("plain", &[file]).args(["--max-steps", "60"]))?;
    let saved = |run: &str| {
        let checkpoints = rows.0.path("home/runs").join(run).join("trainings/1/checkpoints");
        fs::read_dir(checkpoints).into_iter().flatten().flatten().count() > 1
    };
    let kill = |command: &mut Command, run: &str| -> Result<()> {
        // `Running` has no input of its own, and the shell gives it one.
        let mut running = Running::start(command)?;
        let start = Instant::now();
        while !saved(run) {
            ensure!(start.elapsed() < Duration::from_secs(60), "no checkpoint in a minute");
            ensure!(running.child.try_wait()?.is_none(), "it ended before it was killed");
            sleep(Duration::from_millis(1));
        }
        running.child.kill()?;
        ensure!(running.child.wait()?.code().is_none(), "it ended before it was killed");
        Ok(())
    };
    let mut typed = rows.fine_tune("by-name", &["-"]);
    kill(&mut piped(typed.args(many), &whole), "by-name-1")?;
    let ran = succeeds(rows.command("resume").arg("by-name-1"))?;
    assert!(ran.stderr.contains("goes on after step"), "{}", ran.stderr);
    assert!(rows.weights("by-name")? == rows.weights("plain")?);

    let mut typed = rows.fine_tune("by-flag", &["-"]);
    typed.args(many);
    kill(&mut piped(&typed, &whole), "by-flag-1")?;
    typed.arg("--resume");
    refused(&mut piped(&typed, &other), &["cannot go on", "the rows of --training-file have changed since"])?;
    let ran = succeeds(&mut piped(&typed, &whole))?;
    assert!(ran.stderr.contains("goes on after step"), "{}", ran.stderr);
    assert!(rows.weights("by-flag")? == rows.weights("plain")?);
    // What a run keeps of its user is for its user alone.
    use std::os::unix::fs::PermissionsExt;
    let kept = fs::metadata(rows.0.path("home/runs/by-name-1/standard_input"))?;
    assert_eq!(kept.permissions().mode() & 0o777, 0o600);
    Ok(())
}

#[test]
fn a_run_on_several_files_goes_on_with_the_same_ones_alone() -> Result<()> {
    let rows = Rows::new()?;
    let pairs = pairs(24);
    rows.0.write("whole.jsonl", jsonl(&pairs))?;
    rows.0.write("a.jsonl", jsonl(&pairs[..9]))?;
    rows.0.write("b.csv", csv("Question,Answer", &pairs[9..], ','))?;
    succeeds(rows.fine_tune("plain", &["whole.jsonl"]).args(["--max-steps", "60"]))?;
    let typed = |files: &[&str]| {
        let mut command = rows.fine_tune("out", files);
        command.args(["--max-steps", "60", "--save-every", "2", "--resume"]);
        command
    };
    let mut running = Running::start(&mut typed(&["a.jsonl", "b.csv"]))?;
    running.wait_for("step ")?;
    running.signal(libc::SIGINT)?;
    let (code, _, stderr) = running.end()?;
    ensure!(code == Some(130), "{code:?} {stderr}");
    refused(&mut typed(&["b.csv", "a.jsonl"]), &["cannot go on with other settings", "--training-file is ["])?;
    let b = fs::read(rows.0.path("b.csv"))?;
    rows.0.write("b.csv", csv("Question,Answer", &pairs[8..], ','))?;
    refused(&mut typed(&["a.jsonl", "b.csv"]), &["the rows of --training-file have changed since"])?;
    rows.0.write("b.csv", b)?;
    succeeds(&mut typed(&["a.jsonl", "b.csv"]))?;
    assert!(rows.weights("out")? == rows.weights("plain")?);
    Ok(())
}

#[test]
fn a_script_names_columns_and_folders_as_the_command_line_does() -> Result<()> {
    let rows = Rows::new()?;
    let pairs = pairs(4);
    rows.0.write("words.csv", csv("Wort;Bedeutung", &pairs, ';') + "ohne Antwort;\n")?;
    rows.0.write("folder/train.jsonl", jsonl(&pairs))?;
    rows.0.write("folder/valid.csv", csv("Frage,Antwort", &pairs[..1], ','))?;
    rows.0.write(
        "s.lua",
        "local options = { path = params.dataset, columns = params.columns, on_bad_row = params.bad, system = params.system }\n\
         local data = homeroom.prepare_dataset(options)\n\
         return { train = data.train:rows(), eval = data.eval and data.eval:rows() }",
    )?;
    rows.0.write(
        "c.toml",
        "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\ndataset = { type = \"path\", default = \"words.csv\" }\n\
         columns = { type = \"table\", default = { prompt = \"Wort\", completion = \"Bedeutung\" } }\n\
         bad = { type = \"string\", default = \"refuse\" }\nsystem = { type = \"string\" }\n",
    )?;
    let run = |set: &[&str]| {
        let mut command = rows.command("run");
        command.args(["c.toml", "--json"]);
        for set in set {
            command.args(["--set", set]);
        }
        command
    };
    let words = ["words.csv: 1 problem\n  row 6: nothing to train on: `Bedeutung` is empty", "`on_bad_row = \"skip\"`"];
    refused(&mut run(&[]), &words)?;
    let ran = succeeds(&mut run(&["bad=skip", "system=Be brief."]))?;
    let words = "words.csv   CSV with `;`; Wort → user, Bedeutung → assistant\n";
    assert!(ran.stderr.contains(words) && ran.stderr.contains("1 of 5 rows left out: row 6"), "{}", ran.stderr);
    let result = printed_json(&ran)?;
    let row = |(asked, answered): &(String, String)| json!({"prompt": asked, "completion": answered});
    let with_system = |pair| {
        let mut row = row(pair);
        row["system"] = "Be brief.".into();
        row
    };
    assert_eq!(result["train"], pairs.iter().map(with_system).collect::<Value>());
    assert_eq!(result["eval"], Value::Null);
    let missing = run(&["columns=prompt=Wrt,completion=Bedeutung"]).output()?;
    let stderr = String::from_utf8(missing.stderr)?;
    assert!(stderr.contains("no column `Wrt`, which is to be `prompt`, did you mean `Wort`?"), "{stderr}");
    // Of a folder the parts are those of the command line; files that need no columns are read as they are.
    rows.0.write(
        "d.toml",
        fs::read_to_string(rows.0.path("c.toml"))?
            .replace(", default = { prompt = \"Wort\", completion = \"Bedeutung\" }", "")
            .replace("words.csv", "folder"),
    )?;
    let mut folder = rows.command("run");
    let result = printed_json(&succeeds(folder.args(["d.toml", "--json"]))?)?;
    assert_eq!(result["train"], pairs.iter().map(row).collect::<Value>());
    assert_eq!(result["eval"], json!([row(&pairs[0])]));
    // In Lua's own words.
    rows.0.write("t.lua", "return #homeroom.prepare_dataset { path = \"words.csv\" }.train")?;
    rows.0.write("e.toml", "[pipeline]\nscript = \"t.lua\"\n")?;
    let words = ["`columns = { prompt = \"Wort\", completion = \"Bedeutung\" }` says which is which"];
    refused(rows.command("run").arg("e.toml"), &words)?;
    rows.0
        .write("t.lua", "return homeroom.prepare_dataset { path = \"words.csv\", columns = { promt = \"Wort\" } }")?;
    refused(rows.command("run").arg("e.toml"), &["`promt` is nothing that a column can be, did you mean `prompt`?"])?;
    let context = "a table of texts";
    let bad = run(&["columns=Wort"]).output()?;
    assert!(String::from_utf8(bad.stderr)?.contains(context));
    Ok(())
}

/// The recognition of files is held to a table where it is made; here is that the program says it.
#[test]
fn what_is_no_file_of_rows_is_refused_with_what_to_do() -> Result<()> {
    let rows = Rows::new()?;
    for (file, words) in [
        (
            "workbook.xlsx",
            "an Excel workbook\nhint: open it in a spreadsheet program and save the sheet as “CSV UTF-8”",
        ),
        ("train.parquet", "a Parquet file, which is not read\nhint: "),
        ("story.txt", "plain text, not rows\nhint: write a table"),
    ] {
        let path = fixture("rows/people").join(file);
        let path = path.to_str().context("the repository's path is UTF-8")?;
        refused(&mut rows.fine_tune("out", &[path]), &[file, words])?;
    }
    rows.0.write("books/geo.xlsx", "PK")?;
    refused(
        &mut rows.fine_tune("out", &["books"]),
        &["books: no rows in this folder", "open geo.xlsx in a spreadsheet"],
    )?;
    refused(&mut rows.fine_tune("out", &["-", "-"]), &["-: the standard input is named twice"])
}
