//! `homeroom fine-tune`: rows, options, and what it prints and writes.

use std::fs;

use anyhow::{Context, Result};
use serde_json::json;

use super::{WIDE_R, leaves_nothing, read_json, wide_model};
use crate::support::{Place, eval, fixture, homeroom, loss, printed_json, refused, run, succeeds};

/// `fine-tune` on a file of these lines that must be refused.
fn check_rows(lines: &str, words: &[&str]) -> Result<()> {
    let place = Place::new()?;
    let rows = place.write("rows.jsonl", lines)?;
    refused(&mut place.fine_tune(&fixture("models/llama"), &rows), words)?;
    leaves_nothing(&place)
}

const ROW: &str = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}"#;

#[test]
fn a_file_of_rows_that_cannot_be_used_is_refused_by_line() -> Result<()> {
    check_rows(
        &format!("{ROW}\n{{\"messages\": [\n{ROW}\n"),
        &["rows.jsonl: 1 problem", "line 2: not JSON", "hint: "],
    )?;
    check_rows("", &["rows.jsonl: no rows"])?;
    check_rows("\n  \n", &["rows.jsonl: no rows"])?;
    let silent = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}"#;
    let asked = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;
    let nothing = ["2 problems", "line 1: nothing to train on", "line 3: nothing to train on"];
    check_rows(&format!("{silent}\n{ROW}\n{asked}\n"), &nothing)?;
    check_rows(r#"{"prompt": "hi", "completion": ""}"#, &["line 1: nothing to train on: `completion` is empty"])?;
    check_rows(
        &format!("{ROW}\n{{\"text\": \"a\"}}\n"),
        &["line 2: has `text`, while the rows before have `messages`"],
    )?;
    check_rows(r#"{"mesages": []}"#, &["line 1: ", "`mesages`: did you mean `messages`?"])
}

#[test]
fn files_that_are_not_there_are_refused() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let nowhere = place.path("nowhere.jsonl");
    refused(&mut place.fine_tune(&base, &nowhere), &["nowhere.jsonl", "no such file"])?;
    refused(place.fine_tune(&base, &rows).arg("--eval-file").arg(&nowhere), &["nowhere.jsonl", "no such file"])?;
    refused(place.fine_tune(&base, &rows).arg("--init-from").arg(&nowhere), &["nowhere.jsonl: no such model"])?;
    refused(&mut eval(&base, &nowhere), &["nowhere.jsonl", "no such file"])?;
    leaves_nothing(&place)
}

#[test]
fn long_rows_are_refused_with_all_their_lines_or_cut_or_left_out() -> Result<()> {
    let place = Place::new()?;
    let base = fixture("models/llama");
    let long = json!({"messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "and so on ".repeat(60)},
    ]});
    let lines: Vec<String> = (1..=32).map(|line| if line % 2 == 0 { long.to_string() } else { ROW.into() }).collect();
    let rows = place.write("rows.jsonl", lines.join("\n"))?;
    let command = || {
        let mut command = place.fine_tune(&base, &rows);
        command.args(["--max-seq-len", "40", "--max-steps", "1", "--overwrite"]);
        command
    };
    let each: Vec<String> = (2..=32).step_by(2).map(|line| format!("\n  line {line}: ")).collect();
    let mut words: Vec<&str> = each.iter().map(String::as_str).collect();
    words.extend(["16 problems", "the limit is 40", "--on-long-row truncate", "--on-long-row skip", "--max-seq-len"]);
    refused(&mut command(), &words)?;
    leaves_nothing(&place)?;
    let cut = succeeds(command().args(["--on-long-row", "truncate"]))?;
    assert!(cut.stderr.contains("32 examples, 16 cut to length"), "{}", cut.stderr);
    let skipped = succeeds(command().args(["--on-long-row", "skip"]))?;
    assert!(skipped.stderr.contains("16 examples, 16 left out as too long"), "{}", skipped.stderr);
    let all_long = place.write("long.jsonl", long.to_string())?;
    let mut none = place.fine_tune(&base, &all_long);
    refused(none.args(["--max-seq-len", "40", "--on-long-row", "skip", "--overwrite"]), &["no rows left"])
}

#[test]
fn a_limit_beyond_the_models_context_is_refused() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 3)?;
    let words = ["--max-seq-len 257", "the model's context is 256 tokens"];
    refused(place.fine_tune(&fixture("models/llama"), &rows).args(["--max-seq-len", "257"]), &words)?;
    refused(eval(&fixture("models/llama"), &rows).args(["--max-seq-len", "257"]), &words)?;
    let chat = |words: usize| {
        let mut chat = homeroom();
        chat.args(["chat", "--prompt", &"long ".repeat(words), "--temperature", "0", "--model-dir"]);
        chat.arg(fixture("models/llama"));
        chat
    };
    refused(&mut chat(300), &["the conversation is ", "the model's context is 256"])?;
    let full = succeeds(&mut chat(200))?;
    assert!(full.stderr.contains("the end of the context"), "{}", full.stderr);
    leaves_nothing(&place)
}

#[test]
fn rows_that_cannot_be_split_are_refused() -> Result<()> {
    let place = Place::new()?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 1)?);
    refused(command.args(["--eval-fraction", "0.5"]), &["1 row(s) cannot be split", "at least 2"])?;
    leaves_nothing(&place)
}

#[test]
fn wrong_flags_end_with_2_and_name_the_flag() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    for flags in [
        &["--epochs", "0"][..],
        &["--max-steps", "0"],
        &["--batch-size", "0"],
        &["--gradient-accumulation-steps", "0"],
        &["--learning-rate", "0"],
        &["--learning-rate", "nan"],
        &["--learning-rate", "inf"],
        &["--learning-rate", "1e38"],
        &["--lora-alpha", "nan"],
        &["--lora-alpha", "inf"],
        &["--lora-alpha", "1e39"],
        &["--lora-alpha", "0"],
        &["--lora-dropout", "nan"],
        &["--lora-dropout", "1"],
        &["--lora-dropout=-0.1"],
        &["--warmup-ratio", "nan"],
        &["--weight-decay", "nan"],
        &["--weight-decay", "1"],
        &["--max-grad-norm", "inf"],
        &["--batch-size", "4294967296"],
        &["--seed=-1"],
        &["--warmup-ratio", "1"],
        &["--max-grad-norm=-1"],
        &["--max-seq-len", "1"],
        &["--eval-fraction", "1.0"],
        &["--eval-fraction", "0.1", "--eval-file", "x"],
        &["--on-long-row", "drop"],
        &["--lr-scheduler-type", "polynomial"],
        &["--lora-r", "many"],
        &["--set-option", "r"],
        &["--learning-rat", "1e-4"],
    ] {
        let ran = run(place.fine_tune(&fixture("models/llama"), &rows).args(flags))?;
        assert_eq!(ran.code, Some(2), "{flags:?}: {}", ran.stderr);
        let flag = flags[0].split_once('=').map_or(flags[0], |(flag, _)| flag);
        assert!(ran.stdout.is_empty() && ran.stderr.contains(flag), "{flags:?}: {}", ran.stderr);
    }
    let ran = run(homeroom().arg("fine-tune"))?;
    assert!(ran.code == Some(2) && ran.stderr.contains("--training-file"), "{}", ran.stderr);
    leaves_nothing(&place)
}

/// Neither threads nor the moment decide a value. The rank is large enough for products that are split among threads.
#[test]
fn the_same_seed_writes_the_same_bytes_for_any_number_of_threads() -> Result<()> {
    let place = Place::new()?;
    let (rows, wide) = (place.rows("rows.jsonl", 12)?, wide_model(&place)?);
    let adapter = |threads: &str, seed: &str| -> Result<Vec<u8>> {
        let mut command = place.fine_tune(&wide, &rows);
        command.env("RAYON_NUM_THREADS", threads);
        command.args(["--max-steps", "3", "--lora-r", WIDE_R, "--lora-dropout", "0.3", "--overwrite", "--seed", seed]);
        succeeds(&mut command)?;
        Ok(fs::read(place.path("outputs/out/adapter_model.safetensors"))?)
    };
    let one = adapter("1", "7")?;
    assert!(one == adapter("2", "7")?, "two threads write other bytes than one");
    assert!(one == adapter("5", "7")?, "five threads write other bytes than one");
    assert!(one != adapter("1", "8")?, "the seed changes nothing");
    Ok(())
}

#[test]
fn fine_tune_prints_one_object_and_writes_its_history() -> Result<()> {
    let place = Place::new()?;
    let (base, rows, held_out) = (fixture("models/llama"), place.rows("rows.jsonl", 6)?, place.rows("held.jsonl", 9)?);
    let mut command = place.fine_tune(&base, &rows);
    command.args(["--epochs", "2", "--batch-size", "2", "--gradient-accumulation-steps", "2", "--json", "--eval-file"]);
    let ran = succeeds(command.arg(&held_out))?;
    let summary = printed_json(&ran)?;
    let out = place.path("outputs/out");
    assert_eq!(summary["output_dir"], json!(out));
    assert_eq!((&summary["steps"], &summary["interrupted"]), (&json!(4), &json!(false)));
    for key in ["train_loss", "eval_loss_before", "eval_loss", "tokens_per_second", "peak_memory_bytes"] {
        assert!(summary[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {summary}");
    }
    assert_eq!(summary["eval_loss_before"].as_f64(), Some(loss(&base, &held_out)?));
    assert_eq!(summary["eval_loss"].as_f64(), Some(loss(&out, &held_out)?));

    let state = read_json(&out.join("trainer_state.json"))?;
    let history = state["log_history"].as_array().context("a history")?;
    assert_eq!((history.len(), &state["global_step"], &state["max_steps"]), (5, &json!(4), &json!(4)));
    for (number, step) in (1..).zip(&history[..4]) {
        assert_eq!(step["step"], json!(number));
        assert_eq!(step["epoch"], json!(f64::from(number) / 2.0));
        for key in ["loss", "grad_norm", "learning_rate"] {
            assert!(step[key].is_f64(), "{key}: {step}");
        }
    }
    assert_eq!(history[4]["eval_loss"], summary["eval_loss"]);
    let mean = history[..4].iter().filter_map(|step| step["loss"].as_f64()).sum::<f64>() / 4.0;
    assert!((mean - summary["train_loss"].as_f64().context("a loss")?).abs() < 1e-12);
    // Without --json the result is the directory, and stdout stays empty.
    let quiet = succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "1", "--overwrite"]))?;
    assert_eq!(quiet.stdout, "");
    Ok(())
}

/// A strategy that trains the base's own weights writes a model, which is one again.
#[test]
fn full_fine_tuning_writes_a_model() -> Result<()> {
    let place = Place::new()?;
    let (base, rows, out) = (fixture("models/llama"), place.rows("rows.jsonl", 4)?, place.path("outputs/out"));
    succeeds(place.fine_tune(&base, &rows).args([
        "--strategy",
        "full",
        "--max-steps",
        "3",
        "--learning-rate",
        "1e-3",
    ]))?;
    assert!(out.join("config.json").exists() && !out.join("adapter_config.json").exists());
    assert!(loss(&out, &rows)? < loss(&base, &rows)? - 1e-3);
    assert_eq!(place.outputs()?, ["out"]);
    Ok(())
}
