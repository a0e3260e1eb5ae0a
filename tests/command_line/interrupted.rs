//! Ctrl-C and kills: what is saved, and what is left behind.

use std::fs;
use std::path::Path;

use anyhow::Result;
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::models::BaseModel;
use serde_json::{Value, json};

use super::{Running, WIDE_R, endless, endless_on, leaves_nothing, wide_model};
use crate::support::{Place, fixture, homeroom, loss, printed_json, succeeds};

#[test]
fn an_interrupted_run_saves_what_it_has_and_can_be_gone_on_from() -> Result<()> {
    let place = Place::new()?;
    let held_out = place.rows("held.jsonl", 5)?;
    let mut running = Running::start(endless(&place)?.arg("--eval-file").arg(&held_out))?;
    running.wait_for("step ")?;
    running.signal(libc::SIGINT)?;
    let (code, stdout, stderr) = running.end()?;
    assert_eq!(code, Some(130), "{stderr}");
    let out = place.path("outputs/out").display().to_string();
    for words in [
        "interrupted: the run ends after this step",
        "stopped after step ",
        "of 1000000",
        "next      homeroom resume out-",
    ] {
        assert!(stderr.contains(words), "no `{words}` in\n{stderr}");
    }
    let summary: Value = serde_json::from_str(&stdout)?;
    assert_eq!(summary["interrupted"], json!(true));
    assert_eq!(place.outputs()?, ["out"]);
    let learned = loss(Path::new(&out), &held_out)?;
    assert!(learned < loss(&fixture("models/llama"), &held_out)?);

    let mut on = homeroom();
    on.args(["fine-tune", "--max-steps", "2", "--json", "--init-from", &out, "--output-dir"])
        .arg(place.path("outputs/on"));
    on.arg("--model-name").arg(fixture("models/llama")).arg("--training-file").arg(place.path("rows.jsonl"));
    let on = printed_json(&succeeds(on.arg("--eval-file").arg(&held_out))?)?;
    assert_eq!(on["eval_loss_before"].as_f64(), Some(learned));
    Ok(())
}

#[test]
fn a_second_interruption_ends_at_once_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    // The first step is a second of work, so that the second signal comes before it has ended.
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 800)?);
    let mut running = Running::start(command.args(["--max-steps", "9", "--gradient-accumulation-steps", "100"]))?;
    running.wait_for("training ")?;
    running.signal(libc::SIGINT)?;
    running.wait_for("interrupted")?;
    running.signal(libc::SIGINT)?;
    let (code, _, stderr) = running.end()?;
    assert_eq!(code, Some(130), "{stderr}");
    leaves_nothing(&place)
}

/// Whenever the second signal comes, before, while or after the files are written: all of them are there, or none.
#[test]
fn a_second_interruption_while_saving_leaves_all_or_nothing() -> Result<()> {
    let place = Place::new()?;
    let wide = wide_model(&place)?;
    for milliseconds in [0, 2, 10, 20, 40, 80] {
        let mut running = Running::start(endless_on(&place, &wide)?.args(["--overwrite", "--lora-r", WIDE_R]))?;
        running.wait_for("step ")?;
        running.signal(libc::SIGINT)?;
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        running.signal(libc::SIGINT)?;
        let (code, _, stderr) = running.end()?;
        assert_eq!(code, Some(130), "after {milliseconds} ms: {stderr}");
        match place.outputs()?.as_slice() {
            [] => {}
            [out] if out == "out" => {
                AdapterFiles::read(&place.path("outputs/out"))?.adapt(&BaseModel::load(&wide)?, false)?;
                assert!(place.path("outputs/out/trainer_state.json").exists());
                fs::remove_dir_all(place.path("outputs/out"))?;
            }
            left => anyhow::bail!("after {milliseconds} ms it left {left:?}"),
        }
    }
    Ok(())
}

/// The export is made in a directory beside its place; whether it was finished or not, that one is gone.
#[test]
fn an_interrupted_export_is_whole_or_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 4)?);
    succeeds(command.args(["--max-steps", "1"]))?;
    let finished = |place: &Place| anyhow::Ok(place.outputs()?.iter().all(|name| name == "out" || name == "merged"));
    let mut interrupted = 0;
    for _ in 0..5 {
        let mut command = homeroom();
        command
            .args(["export-model", "--overwrite", "--format", "merged", "--model-dir"])
            .arg(place.path("outputs/out"));
        let mut running = Running::start(command.arg("--output-dir").arg(place.path("outputs/merged")))?;
        while running.child.try_wait()?.is_none() && finished(&place)? {
            std::thread::yield_now();
        }
        if running.child.try_wait()?.is_none() {
            running.signal(libc::SIGINT)?;
        }
        let (code, _, stderr) = running.end()?;
        assert!(matches!(code, Some(0 | 130)), "{code:?} {stderr}");
        interrupted += usize::from(code == Some(130));
        assert!(finished(&place)?, "{:?}", place.outputs()?);
    }
    assert!(interrupted > 0, "every export ended before its signal came");
    Ok(())
}

#[test]
fn a_killed_run_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let mut running = Running::start(&mut endless(&place)?)?;
    running.wait_for("step ")?;
    running.signal(libc::SIGKILL)?;
    assert_eq!(running.end()?.0, None);
    leaves_nothing(&place)
}
