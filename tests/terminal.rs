//! What rows, models, scripts and names of files say to a terminal: nothing that it would obey. What is piped is passed byte for byte.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::support::{Place, eval, fixture, homeroom, printed_json, run, succeeds};

/// What a command sends to a terminal, as stdout and stderr.
fn on_terminal(command: &mut Command) -> Result<String> {
    watched(command, |_, _| {})
}

/// The same, on a terminal of so many columns.
pub fn on_terminal_of(columns: u16, command: &mut Command) -> Result<String> {
    seen_by(Some(columns), command, |_, _| {})
}

/// The same; `see` is shown the child and what it has sent so far, each time it has sent more.
fn watched(command: &mut Command, see: impl FnMut(&Child, &str)) -> Result<String> {
    seen_by(None, command, see)
}

fn seen_by(columns: Option<u16>, command: &mut Command, mut see: impl FnMut(&Child, &str)) -> Result<String> {
    let (mut ours, mut theirs) = (0, 0);
    let null = std::ptr::null_mut();
    let mut size = columns.map(|ws_col| libc::winsize { ws_row: 24, ws_col, ws_xpixel: 0, ws_ypixel: 0 });
    let size = size.as_mut().map_or(std::ptr::null_mut(), std::ptr::from_mut);
    // SAFETY: numbers and size outlive the call; null asks for no name and default settings.
    let failed = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, null, null.cast(), size) };
    ensure!(failed == 0, "no terminal: {}", std::io::Error::last_os_error());
    // SAFETY: openpty succeeded, so both are open, and nothing else owns them.
    let (mut ours, theirs) = unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    command.stdin(Stdio::null()).stdout(theirs.try_clone()?).stderr(theirs);
    let mut child = command.spawn()?;
    // The command keeps the terminal open for as long as it has these.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    // When its last user goes, Linux ends a terminal with an error.
    while let Ok(count @ 1..) = ours.read(&mut buffer) {
        seen.extend(&buffer[..count]);
        see(&child, &String::from_utf8_lossy(&seen));
    }
    child.wait()?;
    Ok(String::from_utf8(seen)?.replace("\r\n", "\n"))
}

/// Whether a text holds nothing that a terminal obeys, nor what turns the direction of writing.
fn is_plain(text: &str) -> bool {
    let turns = |c: char| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !text.chars().any(|c| c.is_control() && !"\n\t".contains(c) || turns(c))
}

/// Clears the screen, sets the title, sets it again in one character, deletes, and turns the direction of writing.
const EVIL: &str = "\x1b[2J\x1b]0;owned\x07\u{9b}31m\x7f\u{202e}";
const SHOWN: &str = "\\u{1b}[2J\\u{1b}]0;owned\\u{7}\\u{9b}31m\\u{7f}\\u{202e}";

/// Whatever stderr is: it may be looked at later.
#[test]
fn errors_and_the_story_show_what_they_are_given() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    let base = place.copy(&fixture("models/llama"), &format!("model{EVIL}"))?;
    let bad = place.write("bad.jsonl", json!({ EVIL: [] }).to_string())?;
    let nowhere = place.path(&format!("nowhere{EVIL}"));
    let mut wrong = homeroom();
    wrong.arg("eval").arg(format!("--{EVIL}")).env("NO_COLOR", "1"); // the colours are our own
    let mut train = place.fine_tune(&base, &rows);
    train.args(["--max-steps", "1"]);
    for (mut command, code) in [
        (eval(&base, &bad), 1),     // a row
        (eval(&nowhere, &rows), 1), // a name
        (wrong, 2),                 // a word of the command line
        (train, 0),                 // what is restated of a run
    ] {
        let ran = run(&mut command)?;
        assert_eq!(ran.code, Some(code), "{}", ran.stderr);
        assert!(is_plain(&ran.stderr) && ran.stderr.contains(SHOWN), "{}", ran.stderr.escape_debug());
        if code != 0 {
            let seen = on_terminal(&mut command)?;
            assert!(is_plain(&seen) && seen.contains(SHOWN), "{}", seen.escape_debug());
        }
    }
    Ok(())
}

#[test]
fn an_adapters_words_keep_to_their_line_piped_or_on_a_terminal() -> Result<()> {
    let place = Place::new()?;
    let mut train = homeroom();
    train
        .args(["fine-tune", "--max-steps", "1", "--name", "tutor", "--training-file"])
        .arg(place.rows("rows.jsonl", 2)?);
    train.arg("--model-name").arg(fixture("models/llama")).env("HOMEROOM_HOME", place.path("home"));
    succeeds(&mut train)?;
    let path = place.path("home/models/tutor/homeroom.json");
    let mut manifest: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    manifest["strategy"]["name"] = format!("lora{EVIL}").into();
    manifest["base"]["path"] = format!("/base{EVIL}\nforged   adapter").into();
    manifest["training"]["parent"] = format!("parent{EVIL}").into();
    std::fs::write(&path, manifest.to_string())?;
    let list = |json: bool| {
        let mut command = homeroom();
        command.arg("list-models").args(json.then_some("--json")).env("HOMEROOM_HOME", place.path("home"));
        command
    };
    let piped = succeeds(&mut list(false))?.stdout;
    let seen = on_terminal(&mut list(false))?;
    for words in [format!("lora{SHOWN}"), format!("/base{SHOWN}\\u{{a}}forged"), format!("parent{SHOWN}")] {
        assert!(piped.contains(&words) && seen.contains(&words), "no {words} in {piped:?} or {seen:?}");
    }
    assert_eq!(piped.lines().count(), 1, "{piped:?}");
    assert!(is_plain(&seen) && seen.lines().count() == 1, "{seen:?}");
    // JSON is JSON on either, of one value.
    let piped = printed_json(&succeeds(&mut list(true))?)?;
    let seen = on_terminal(&mut list(true))?;
    assert!(is_plain(&seen), "{seen:?}");
    assert_eq!(serde_json::from_str::<Value>(&seen)?, piped);
    assert_eq!(piped[0]["strategy"], json!(format!("lora{EVIL}")));
    Ok(())
}

#[test]
fn what_a_script_says_and_returns_is_shown() -> Result<()> {
    let place = Place::new()?;
    place.write(
        "s.lua",
        "print(params.text)\nhomeroom.log.warn(params.text, { a = params.text })\nreturn { text = params.text }",
    )?;
    let config = "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\ntext = { type = \"string\", default = \"\" }\n";
    let config = place.write("c.toml", config)?;
    let command = || {
        let mut command = homeroom();
        command.arg("run").arg(&config).arg("--set").arg(format!("text={EVIL}"));
        command
    };
    let ran = succeeds(&mut command())?;
    assert_eq!(ran.stdout, format!("text  {EVIL}\n"));
    assert!(is_plain(&ran.stderr) && ran.stderr.matches(SHOWN).count() >= 3, "{}", ran.stderr.escape_debug());
    let seen = on_terminal(&mut command())?;
    assert!(is_plain(&seen) && seen.contains(&format!("text  {SHOWN}\n")), "{}", seen.escape_debug());
    Ok(())
}

/// A model whose answer begins with the byte 27: the first token of its answer, the byte 23, and that one have changed places.
#[test]
fn what_a_model_answers_is_piped_as_it_is_and_shown_on_a_terminal() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("models/llama"), "model")?;
    let chat = |tokens: &str| {
        let mut chat = homeroom();
        chat.args(["chat", "--prompt", "hi", "--temperature", "0", "--max-tokens", tokens, "--model-dir"]).arg(&copy);
        chat
    };
    assert_eq!(succeeds(&mut chat("1"))?.stdout, "\x17\n");
    let path = copy.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().context("a vocabulary")?;
    // Byte-level BPE writes the bytes 23 and 27 so.
    let (first, escape) = ("\u{117}", "\u{11b}");
    let (first_id, escape_id) = (vocabulary[first].clone(), vocabulary[escape].clone());
    vocabulary.insert(first.to_owned(), escape_id);
    vocabulary.insert(escape.to_owned(), first_id);
    std::fs::write(&path, tokenizer.to_string())?;
    let piped = succeeds(&mut chat("4"))?.stdout;
    assert!(piped.starts_with('\x1b'), "{piped:?}");
    let seen = on_terminal(&mut chat("4"))?;
    assert!(is_plain(&seen) && seen.contains("\\u{1b}"), "{seen:?}");
    Ok(())
}

/// A bar is drawn where it can be drawn over; elsewhere there are lines, as off a terminal.
#[test]
fn where_no_bar_can_be_drawn_progress_is_told_in_lines() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 12)?;
    let train = |variables: &[(&str, &str)]| {
        let mut command = place.fine_tune(&fixture("models/llama"), &rows);
        command.args(["--max-steps", "3", "--overwrite"]).env("TERM", "xterm").env_remove("CI").env_remove("NO_COLOR");
        command.envs(variables.iter().copied());
        on_terminal(&mut command)
    };
    for variables in [&[("TERM", "dumb")][..], &[("CI", "true")], &[("CI", "1"), ("NO_COLOR", "1")]] {
        let seen = train(variables)?;
        for step in ["step     1/3   loss ", "step     3/3   loss "] {
            ensure!(seen.contains(step) && is_plain(&seen), "{variables:?}: no {step} in {seen:?}");
        }
        // How many they are is the machine's to say.
        ensure!(seen.contains("s left\n") || seen.contains("second left\n"), "{variables:?}: {seen:?}");
    }
    for variables in [&[][..], &[("CI", "false")]] {
        let seen = train(variables)?;
        ensure!(!seen.contains("step     1/3") && seen.contains("step 3/3 ") && seen.contains('\x1b'), "{seen:?}");
        let last = seen.rfind("step 3/3   loss ").and_then(|at| seen[at..].lines().next());
        // This terminal has no width, and what follows begins in a line of its own all the same.
        ensure!(last.is_some_and(|last| last.ends_with(" tok/s")), "{seen:?}");
    }
    Ok(())
}

#[test]
fn a_run_that_is_stopped_tells_its_last_step_and_no_time_left() -> Result<()> {
    let place = Place::new()?;
    let mut train = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 12)?);
    train.args(["--max-steps", "77777", "--warmup-ratio", "0"]).env("TERM", "xterm").env_remove("CI");
    let mut stopped = false;
    let seen = watched(&mut train, |child, seen| {
        if !stopped && seen.contains("tok/s") {
            stopped = true;
            // SAFETY: kill has no memory preconditions; the child was not waited for, so the number is still its own.
            unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
        }
    })?;
    ensure!(stopped && seen.contains("stopped after step ") && seen.contains(" of 77777"), "{seen:?}");
    ensure!(!seen.contains("77777/77777"), "{seen:?}");
    let last = seen.rfind("/77777   loss ").and_then(|at| seen[at..].lines().next());
    ensure!(last.is_some_and(|last| last.ends_with(" tok/s")), "{seen:?}");
    Ok(())
}
