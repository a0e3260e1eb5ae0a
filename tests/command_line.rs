//! The program as users run it: what it refuses and how, what it leaves behind, and what a script can read.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use anyhow::{Context, Result, ensure};
use homeroom_engine::inference::Engine;
use homeroom_engine::inference::generate::{Sampling, generate, prompt_ids};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use serde_json::{Map, Value, json};

use crate::support::{Place, Sizes, eval, fixture, homeroom, loss, plugin_path, printed_json, refused, succeeds};

mod adapters;
mod fine_tune;
mod installed;
mod interrupted;
mod model_files;
mod typed;
mod written;

/// Runs that must be refused leave nothing where their output would be.
pub fn leaves_nothing(place: &Place) -> Result<()> {
    let left = place.outputs()?;
    ensure!(left.is_empty(), "it left {left:?}");
    Ok(())
}

/// `fine-tune` of a model that must be refused.
pub fn check_model(place: &Place, model: &Path, words: &[&str]) -> Result<()> {
    let rows = place.rows("rows.jsonl", 3)?;
    refused(&mut place.fine_tune(model, &rows), words)?;
    leaves_nothing(place)
}

pub fn read_json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// Sets fields of a JSON object in a file.
pub fn set_fields(path: &Path, fields: Value) -> Result<()> {
    let mut object: Map<String, Value> = serde_json::from_str(&fs::read_to_string(path)?)?;
    object.extend(fields.as_object().cloned().context("fields are an object")?);
    Ok(fs::write(path, Value::Object(object).to_string())?)
}

/// A copy of a GGUF file with the bytes `offset` after the first place of `text` replaced.
pub fn patched_gguf(place: &Place, text: &str, offset: usize, with: &[u8]) -> Result<PathBuf> {
    patched(place, "llama-gguf/model-f32.gguf", text, offset, with)
}

/// The same of another model.
pub fn patched(place: &Place, model: &str, text: &str, offset: usize, with: &[u8]) -> Result<PathBuf> {
    let mut file = fs::read(fixture("models").join(model))?;
    let at = file.windows(text.len()).position(|window| window == text.as_bytes());
    let at = at.with_context(|| format!("the file has no `{text}`"))? + text.len() + offset;
    file[at..at + with.len()].copy_from_slice(with);
    place.write("model.gguf", file)
}

/// A command in a shell that does something first.
pub fn in_shell(first: &str, command: &Command) -> Command {
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(format!("{first}; exec \"$0\" \"$@\"")).arg(command.get_program()).args(command.get_args());
    shell.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    shell
}

/// A model that adapters of some megabytes fit on.
pub fn wide_model(place: &Place) -> Result<PathBuf> {
    let sizes = Sizes { hidden: 320, inner: 640, heads: 5, kv_heads: 5, head_dim: 64, vocab: 320, tied: false };
    place.random_model("wide", &sizes)
}

/// The highest rank that all of its modules take: 13.9 MB.
pub const WIDE_R: &str = "320";

/// A run under way, with its stderr.
pub struct Running {
    pub child: Child,
    stderr: BufReader<ChildStderr>,
    seen: String,
}

impl Running {
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("stderr is piped")?);
        Ok(Self { child, stderr, seen: String::new() })
    }

    /// Reads on until a line begins so.
    pub fn wait_for(&mut self, beginning: &str) -> Result<()> {
        loop {
            let start = self.seen.len();
            let read = self.stderr.read_line(&mut self.seen)?;
            ensure!(read > 0, "it ended before a line began with `{beginning}`:\n{}", self.seen);
            if self.seen[start..].starts_with(beginning) {
                return Ok(());
            }
        }
    }

    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: kill has no memory preconditions; the child was not waited for, so the number is still its own.
        let sent = unsafe { libc::kill(self.child.id() as i32, signal) };
        ensure!(sent == 0, "cannot signal: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// The exit code, stdout and all of stderr.
    pub fn end(mut self) -> Result<(Option<i32>, String, String)> {
        self.stderr.read_to_string(&mut self.seen)?;
        let mut stdout = String::new();
        self.child.stdout.take().context("stdout is piped")?.read_to_string(&mut stdout)?;
        Ok((self.child.wait()?.code(), stdout, self.seen.clone()))
    }
}

impl Drop for Running {
    /// A test that fails in the middle leaves no run behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run that goes on for as long as a test could want.
pub fn endless(place: &Place) -> Result<Command> {
    endless_on(place, &fixture("models/llama"))
}

/// The same on a model.
pub fn endless_on(place: &Place, model: &Path) -> Result<Command> {
    let mut command = place.fine_tune(model, &place.rows("rows.jsonl", 8)?);
    command.args(["--max-steps", "1000000", "--warmup-ratio", "0", "--learning-rate", "1e-3", "--json"]);
    Ok(command)
}

#[test]
fn eval_chat_and_plugins_print_their_result_alone() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 5)?);
    let evaluation = printed_json(&succeeds(&mut eval(&base, &rows))?)?;
    let number = |key: &str| evaluation[key].as_f64().with_context(|| format!("{key}: {evaluation}"));
    assert!((number("perplexity")? - number("loss")?.exp()).abs() < 1e-6 * number("perplexity")?);
    assert!((0.0..=1.0).contains(&number("token_accuracy")?));
    assert!(number("rows")? == 5.0 && number("trained_tokens")? > 50.0, "{evaluation}");
    let mut words = homeroom();
    words.arg("eval").arg("--model-dir").arg(&base).arg("--file").arg(&rows);
    let words = succeeds(&mut words)?.stdout;
    assert!(words.contains(&format!("{:.4}", number("loss")?)) && words.contains("perplexity"), "{words}");

    let model = BaseModel::load(&base)?;
    let messages =
        [json!({"role": "system", "content": "short"}), json!({"role": "user", "content": "times seven: 3"})];
    let sampling = Sampling { max_tokens: 12, seed: 42, ..Sampling::default() };
    let prompt = prompt_ids(&model, &messages)?;
    let answer = generate(&Engine::new(model.into(), Compute::auto()), None, &prompt, sampling)?;
    let mut chat = homeroom();
    chat.args(["chat", "--prompt", "times seven: 3", "--system", "short", "--temperature", "0", "--max-tokens", "12"]);
    let said = succeeds(chat.arg("--model-dir").arg(&base))?;
    assert!(!answer.text.is_empty());
    assert_eq!(said.stdout, format!("{}\n", answer.text));

    let directory = plugin_path("lora").parent().context("a library lies in a directory")?.to_owned();
    let list = |json: bool| {
        let mut command = homeroom();
        command.args(["plugins", "list", "--plugin-dir"]).arg(&directory).args(json.then_some("--json"));
        succeeds(&mut command)
    };
    let listed = printed_json(&list(true)?)?;
    let lora = listed.as_array().context("a list")?.iter().find(|item| item["name"] == "lora").context("lora")?;
    assert_eq!(lora["path"], json!(directory.join("liblora.so")));
    assert_eq!((&lora["version"], lora["sha256"].as_str().map(str::len)), (&json!("0.1.0"), Some(64)));
    let options: Vec<&str> =
        lora["options"].as_array().into_iter().flatten().filter_map(|o| o["name"].as_str()).collect();
    assert_eq!(options[..3], ["r", "lora_alpha", "lora_dropout"]);
    let words = list(false)?.stdout;
    assert!(words.contains("lora   0.1.0") && words.contains("lora_alpha") && words.contains("full   "), "{words}");
    Ok(())
}

/// A reader that goes away early, as `| head -1` does, is no failure, whether of the result or of the story.
#[test]
fn a_reader_that_goes_away_ends_nothing() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let chat = || {
        let mut command = homeroom();
        command.args(["chat", "--prompt", "hi", "--max-tokens", "3", "--model-dir"]).arg(&base);
        command
    };
    let list = || {
        let mut command = homeroom();
        command.args(["plugins", "list"]);
        command
    };
    let mut train = place.fine_tune(&base, &rows);
    train.args(["--max-steps", "30", "--json", "--overwrite"]);
    for mut command in [eval(&base, &rows), chat(), list()] {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        drop(child.stdout.take());
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(output.status.success() && !stderr.contains("panicked"), "{command:?}: {stderr}");
    }
    let mut child = train.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait()?.success());
    assert!(loss(&place.path("outputs/out"), &rows)? > 0.0);
    // An error has nobody to hear it, and its exit code all the same.
    let mut child = eval(&base, Path::new("nowhere.jsonl")).stderr(Stdio::piped()).spawn()?;
    drop(child.stderr.take());
    assert_eq!(child.wait()?.code(), Some(1));
    Ok(())
}

#[test]
fn an_instruction_set_that_is_not_known_is_refused() -> Result<()> {
    let mut command = homeroom();
    command.arg("list-models").env("HOMEROOM_CPU", "avx9000");
    refused(
        &mut command,
        &["HOMEROOM_CPU is `avx9000`", "known are portable, neon, avx2, avxvnni, avx512, avx512bf16, amx"],
    )?;
    let mut command = homeroom();
    command.arg("list-models").env("HOMEROOM_CPU", "avx2,-avx9000");
    refused(&mut command, &["HOMEROOM_CPU is `avx2,-avx9000`", "`-avx9000` is not known there", "known are portable"])
}
