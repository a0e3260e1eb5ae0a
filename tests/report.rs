//! Reports and previews of rows: what a generator planted is found where it is and nothing else is, and rows are shown as models see them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use homeroom_engine::data::report::{Files, PLACES_NAMED, Part, Report, Survey};
use homeroom_engine::data::{Reading, Source, Sources};
use serde_json::{Value, json};

use self::planted::{Maker, Planted};
use crate::pipelines;
use crate::support::{Place, fixture, homeroom, printed_json, refused, run, succeeds};

mod planted;

/// Writes rows, a line each.
fn write(place: &Place, name: &str, rows: &[planted::Row]) -> Result<std::path::PathBuf> {
    let lines: Vec<String> = rows.iter().map(|row| format!("{}\n", row.json())).collect();
    place.write(name, lines.concat())
}

fn report(training: &Path, held_out: Option<&Path>) -> Result<Report> {
    let survey =
        Survey { encoder: None, context: usize::MAX, hold_out: None, shown: 0, named: PLACES_NAMED, check: &|| Ok(()) };
    let sources = |path: Option<&Path>| -> Result<Vec<Source>> {
        let paths: Vec<_> = path.into_iter().map(Path::to_owned).collect();
        Ok(Sources::of(&paths, Source::standard_input)?.files)
    };
    let (training, held_out) = (sources(Some(training))?, sources(held_out)?);
    Ok(survey.run(&Files::new(&training, &held_out, &Reading::default()))?.0)
}

/// Lines by check, held-out ones marked. Findings name eight rows each.
fn found(report: &Report) -> BTreeMap<&'static str, BTreeSet<(bool, usize)>> {
    let lines = |finding: &homeroom_engine::data::report::Finding| {
        assert_eq!(finding.rows.len(), finding.count, "{finding:?}");
        finding.rows.iter().map(|row| (row.place.part == Part::HeldOut, row.place.line)).collect()
    };
    report.findings.iter().map(|finding| (finding.check, lines(finding))).collect()
}

/// Each seed has up to five of each of thirteen kinds among 200 rows, so that every line can be compared.
#[test]
fn what_was_planted_is_found_and_nothing_else_is() -> Result<()> {
    let place = Place::new()?;
    let mut wrong = Vec::new();
    let (mut planted, mut missed) = (BTreeMap::<&str, usize>::new(), 0);
    for seed in 0..40 {
        let mut maker = Maker::new(seed);
        let made: Planted = maker.planted(160, 5);
        let train = write(&place, "train.jsonl", &made.train)?;
        let held_out = write(&place, "eval.jsonl", &made.held_out)?;
        let report = report(&train, Some(&held_out))?;
        ensure!((report.rows, report.held_out) == (made.train.len(), made.held_out.len()), "{report:?}");
        let found = found(&report);
        for check in made.expected.keys().copied().chain(found.keys().copied()).collect::<BTreeSet<_>>() {
            let (expected, found) =
                (made.expected.get(check).cloned().unwrap_or_default(), found.get(check).cloned().unwrap_or_default());
            *planted.entry(check).or_default() += expected.len();
            let text = |(held, line): &(bool, usize)| {
                let row = if *held { &made.held_out[line - 1] } else { &made.train[line - 1] };
                format!("{} | {}", row.prompt, row.answer)
            };
            missed += expected.difference(&found).count();
            wrong.extend(expected.difference(&found).map(|at| format!("{seed} {check} missed: {}", text(at))));
            wrong.extend(found.difference(&expected).map(|at| format!("{seed} {check} made up: {}", text(at))));
        }
    }
    println!("planted: {planted:?}, missed: {missed}");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    assert!(planted.len() == 13 && planted.values().all(|count| *count > 100), "{planted:?}");
    Ok(())
}

/// A spreadsheet of 150 questions: what was planted is told by the row that a spreadsheet shows.
#[test]
fn what_was_planted_in_a_spreadsheet_is_found_on_its_rows() -> Result<()> {
    let place = Place::new()?;
    let mut maker = Maker::new(23);
    let made = maker.planted(110, 3);
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let csv = |rows: &[planted::Row]| {
        let lines = rows.iter().map(|row| format!("{};{}\r\n", quoted(&row.prompt), quoted(&row.answer)));
        format!("\u{feff}Frage;Antwort\r\n{}", lines.collect::<String>())
    };
    let train = place.write("lessons.csv", csv(&made.train))?;
    let held_out = place.write("exam.csv", csv(&made.held_out))?;
    let found = found(&report(&train, Some(&held_out))?);
    // The first row is that of the names.
    let expected: BTreeMap<_, BTreeSet<_>> = made
        .expected
        .iter()
        .map(|(check, rows)| (*check, rows.iter().map(|(held_out, line)| (*held_out, line + 1)).collect()))
        .collect();
    assert_eq!(found, expected);
    let copy = place.path("copy.jsonl");
    let preview = || {
        let mut preview = homeroom();
        preview.arg("preview").arg(&train);
        preview
    };
    let ran = succeeds(preview().arg("--eval-file").arg(&held_out))?;
    assert!(ran.stdout.contains("lessons.csv   CSV with `;`; Frage → user, Antwort → assistant"), "{}", ran.stdout);
    assert!(ran.stdout.contains("          rows ") && ran.stdout.contains("held-out row"), "{}", ran.stdout);
    // A copy has the rows of one file, so that nothing that is held out gets among the others.
    refused(preview().arg("--eval-file").arg(&held_out).arg("--redact").arg(&copy), &["the rows of one set"])?;
    succeeds(preview().arg("--redact").arg(&copy))?;
    let rows = std::fs::read_to_string(&copy)?;
    assert_eq!(rows.lines().count(), made.train.len());
    assert!(rows.contains("[EMAIL_1]") && rows.contains("[PHONE_1]") && rows.starts_with("{\"prompt\":"), "{rows}");
    Ok(())
}

/// The same question beside other documents is another; the same documents make it the same, and what is personal in them counts.
#[test]
fn what_stands_beside_a_question_is_a_part_of_it() -> Result<()> {
    let place = Place::new()?;
    let row = |document: &str, answer: &str| {
        json!({
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What does the page say?"}]},
                {"role": "assistant", "content": answer},
            ],
            "documents": [{"title": "page", "text": document}],
        })
    };
    let rows = [
        row("Water boils.", "That water boils."),
        row("Ice melts.", "That ice melts."),
        row("Water boils.", "That it is hot."),
        row("Ask anna@schule.example.", "Whom to ask."),
    ];
    let path = place.write("rows.jsonl", rows.map(|row| format!("{row}\n")).concat())?;
    let expected = [("conflicts", [(false, 3)].into()), ("email", [(false, 4)].into())];
    assert_eq!(found(&report(&path, None)?), BTreeMap::from(expected));
    Ok(())
}

#[test]
fn clean_rows_have_nothing_to_report() -> Result<()> {
    let place = Place::new()?;
    let mut maker = Maker::new(7);
    let mut rows = |count: usize| (0..count).map(|at| maker.clean(8 + at % 60)).collect::<Vec<_>>();
    let (train, held_out) = (rows(6000), rows(900));
    let train = write(&place, "train.jsonl", &train)?;
    let held_out = write(&place, "eval.jsonl", &held_out)?;
    let report = report(&train, Some(&held_out))?;
    assert_eq!(report.findings, []);
    assert_eq!((report.rows, report.held_out, report.refused), (6000, 900, 0));
    assert_eq!(report.forms.get("messages"), Some(&6900));
    Ok(())
}

#[test]
fn a_copy_without_personal_data_has_placeholders_and_every_other_line_byte_for_byte() -> Result<()> {
    let place = Place::new()?;
    let mut maker = Maker::new(11);
    let made = maker.planted(120, 5);
    let train = write(&place, "train.jsonl", &made.train)?;
    let copy = place.path("copy.jsonl");
    let ran = succeeds(homeroom().arg("preview").arg(&train).arg("--redact").arg(&copy))?;
    assert!(ran.stderr.contains("[EMAIL_1]"), "{}", ran.stderr);
    let personal = ["email", "phone", "iban", "credit_card", "es_dni", "url", "ip_address"];
    assert!(report(&copy, None)?.findings.iter().all(|finding| !personal.contains(&finding.check)));
    let lines = |path: &Path| {
        Ok::<_, anyhow::Error>(std::fs::read_to_string(path)?.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    let (before, after) = (lines(&train)?, lines(&copy)?);
    assert_eq!(before.len(), after.len());
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        let planted = personal.iter().any(|kind| made.expected[kind].contains(&(false, at + 1)));
        assert_eq!(before != after, planted, "line {}", at + 1);
    }
    // It is not written over by chance.
    refused(homeroom().arg("preview").arg(&train).arg("--redact").arg(&copy), &["is there already", "--overwrite"])?;
    refused(
        homeroom().arg("preview").arg(&train).arg("--overwrite").arg("--redact").arg(&train),
        &["the rows are read from it"],
    )?;
    Ok(())
}

#[test]
fn a_preview_shows_what_is_trained_and_says_what_a_training_would_refuse() -> Result<()> {
    let place = Place::new()?;
    let said = |asked: &str, answer: &str| json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]});
    let mut lines = vec![said("one?", "eins"), said("two?", "zwei €"), said("two?", "deux"), json!([1])];
    lines.push(json!({"messages": [{"role": "user", "content": "x"}]}));
    lines.push(json!({"messages": [{"role": "human", "content": "x"}]}));
    lines.push(said("long? ".repeat(400).as_str(), "yes"));
    lines.push(said(" ", "nothing was asked"));
    lines.push(json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "who?"}, {"type": "text", "text": "ask anna@schule.example"}]},
        {"role": "assistant", "content": "she"},
    ]}));
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let rows = place.write("rows.jsonl", text)?;
    let preview = || {
        let mut preview = homeroom();
        preview.arg("preview").arg(&rows).arg("--model-name").arg(fixture("models/llama"));
        preview
    };
    let json = printed_json(&succeeds(preview().args(["--json", "--rows", "2", "--max-seq-len", "200"]))?)?;
    let sequence = &json["rows"][1]["sequences"][0];
    let pieces = sequence["pieces"].as_array().context("pieces are a list")?;
    let text = |trained: bool| -> String {
        pieces.iter().filter(|piece| piece["trained"] == trained).filter_map(|piece| piece["text"].as_str()).collect()
    };
    assert!(text(true).starts_with("zwei €<|im_end|>") && text(false).contains("two?"), "{json}");
    assert_eq!((&sequence["begins"], &sequence["ends"]), (&"bos".into(), &"stops".into()));
    let found: BTreeMap<&str, u64> = json["report"]["findings"]
        .as_array()
        .context("findings are a list")?
        .iter()
        .filter_map(|finding| Some((finding["check"].as_str()?, finding["rows"][0]["line"].as_u64()?)))
        .collect();
    let expected = [
        ("conflicts", 3),
        ("data_type", 4),
        ("email", 9),
        ("empty_turns", 8),
        ("example_missing_assistant_message", 5),
        ("longer_than_context", 7),
        ("too_long", 7),
        ("unrecognized_role", 6),
    ];
    assert_eq!(found, BTreeMap::from(expected), "{json}");
    assert_eq!((&json["report"]["rows"], &json["report"]["refused"]), (&9.into(), &4.into()));
    // Off a terminal what is trained stands in brackets.
    let ran = succeeds(preview().args(["--rows", "1", "--max-seq-len", "200"]))?;
    assert!(ran.stdout.contains("[<|im_end|>]") && !ran.stdout.contains('\u{1b}'), "{}", ran.stdout);
    // A page that needs nothing else.
    let page = place.path("page.html");
    succeeds(preview().args(["--max-seq-len", "200", "--html"]).arg(&page))?;
    let page = std::fs::read_to_string(page)?;
    assert!(page.contains("default-src 'none'") && page.contains("<span class=\"t\">"), "{page}");
    assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="), "{page}");
    Ok(())
}

#[test]
fn a_dry_run_says_steps_time_and_memory_shows_rows_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 30)?;
    let mut train = place.fine_tune(&fixture("models/llama"), &rows);
    train.args(["--dry-run", "--eval-fraction", "0.2"]).env("HOMEROOM_HOME", place.path("home"));
    let ran = succeeds(&mut train)?;
    for words in [
        "training  ",
        "time      about ",
        "memory    about ",
        "24, 6 held out",
        "[<|im_end|>]",
        "nothing was trained or written",
    ] {
        assert!(ran.stdout.contains(words), "no {words:?} in\n{}", ran.stdout);
    }
    let json: Value = printed_json(&succeeds(train.arg("--json"))?)?;
    assert!(
        json["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0) && json["steps"].as_u64() > Some(0),
        "{json}"
    );
    assert_eq!(json["rows"].as_array().map(Vec::len), Some(2));
    assert!(place.outputs()?.is_empty() && !place.path("home/runs").exists());
    Ok(())
}

#[test]
fn a_training_tells_what_was_found_and_refuses_nothing_for_it() -> Result<()> {
    let place = Place::new()?;
    let said = |asked: String, answer: &str| json!({"prompt": asked, "completion": answer});
    let mut lines: Vec<Value> = (0..9).map(|number| said(format!("number {number}?"), "a number")).collect();
    lines.push(said("mine?".to_owned(), "lena@schule.de"));
    lines.push(lines[3].clone());
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let rows = place.write("rows.jsonl", text)?;
    let ran = run(place.fine_tune(&fixture("models/llama"), &rows).args(["--max-steps", "1"]))?;
    assert_eq!(ran.code, Some(0));
    for words in [
        "warning: 1 row says what an earlier one says: line 11 (like 4); ",
        "warning: 1 row has likely e-mail addresses: line 10; ",
    ] {
        assert!(ran.stderr.contains(words), "no {words:?} in\n{}", ran.stderr);
    }
    Ok(())
}

#[test]
fn a_script_gets_the_report_and_takes_personal_data_out() -> Result<()> {
    let place = pipelines::Place::new()?;
    let said = |asked: String, answer: &str| json!({"prompt": asked, "completion": answer});
    let mut lines: Vec<Value> = (0..12).map(|number| said(format!("number {number}?"), "a number")).collect();
    lines[4] = said("whom?".to_owned(), "lena@schule.de, or leo@schule.de");
    lines[9] = said("and then?".to_owned(), "LENA@schule.de");
    lines.push(lines[2].clone());
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    place.write("rows.jsonl", &text.join("\n"))?;
    let script = "local data = homeroom.prepare_dataset { path = params.dataset }
        local found = {}
        for _, finding in ipairs(data.report.findings) do
          found[finding.check] = { count = finding.count, line = finding.rows[1].line }
        end
        local clean = data.train:redact()
        return { found = found, rows = data.report.rows, median = data.report.words.median,
          texts = { clean:rows()[5].completion, clean:rows()[10].completion, clean:rows()[1].completion } }";
    let output = place.run(script, &["--json"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{stderr}");
    let expected = json!({
        "found": {"duplicates": {"count": 1, "line": 13}, "email": {"count": 2, "line": 5}},
        "rows": 13,
        "median": 4,
        "texts": ["[EMAIL_1], or [EMAIL_2]", "[EMAIL_1]", "a number"],
    });
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout)?, expected);
    for words in [
        "warning: 1 row says what an earlier one says: line 13 (like 3)",
        "redacted  3 e-mail addresses: [EMAIL_1] to [EMAIL_2]",
    ] {
        assert!(stderr.contains(words), "no {words:?} in\n{stderr}");
    }
    Ok(())
}

/// Full stops and who is held out: each is told once, wherever it stands.
#[test]
fn rows_that_differ_in_a_full_stop_are_told_once_and_conflicts_of_held_out_rows_are_told() -> Result<()> {
    let place = Place::new()?;
    let said = |asked: &str, answer: &str| format!("{}\n", json!({"prompt": asked, "completion": answer}));
    let long = "the water of the lake is cold in winter and warm in summer";
    let train = [said("Why is it cold?", long), said("Why is it cold?", &format!("{long}.")), said("Name one.", "a")];
    let train = place.write("train.jsonl", train.concat())?;
    let held_out = [said("Two or three?", "two"), said("Two or three?", "three"), said("Name another.", "b")];
    let held_out = place.write("eval.jsonl", held_out.concat())?;
    let found = found(&report(&train, Some(&held_out))?);
    let expected =
        BTreeMap::from([("duplicates", BTreeSet::from([(false, 2)])), ("conflicts", BTreeSet::from([(true, 2)]))]);
    assert_eq!(found, expected);
    Ok(())
}

/// Rows beyond the limit are rows that were read, and who reads JSON gets every line, with its file.
#[test]
fn json_of_a_preview_names_every_row_in_its_file_and_counts_those_left_out() -> Result<()> {
    let place = Place::new()?;
    let said = |number: usize| format!("{}\n", json!({"prompt": format!("n{number}?"), "completion": "x@school.org"}));
    let a = place.write("a.jsonl", (0..7).map(said).collect::<String>())?;
    let long = json!({"prompt": "words ".repeat(300), "completion": "many"});
    let b = place.write("b.jsonl", (7..13).map(said).collect::<String>() + &format!("{long}\n"))?;
    let mut preview = homeroom();
    preview.arg("preview").args([&a, &b]).arg("--model-name").arg(fixture("models/llama"));
    preview.args(["--max-seq-len", "200", "--on-long-row", "skip", "--json"]);
    let printed = printed_json(&run(&mut preview)?)?;
    let report = &printed["report"];
    assert_eq!((&report["rows"], &report["skipped"]), (&json!(14), &json!(1)));
    let finding = |check: &str| {
        let all = report["findings"].as_array().into_iter().flatten();
        all.into_iter().find(|finding| finding["check"] == check).cloned().unwrap_or_default()
    };
    let rows = finding("email")["rows"].as_array().cloned().unwrap_or_default();
    assert_eq!(rows.len(), 13);
    assert_eq!(rows[12]["in_file"], json!({"file": b, "line": 6}));
    assert_eq!(finding("skipped")["rows"][0]["in_file"], json!({"file": b, "line": 7}));
    Ok(())
}
