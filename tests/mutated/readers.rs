//! The readers: what each is given, and what is done with what it read.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use homeroom::handler::config::Config;
use homeroom::pipeline::config::PipelineConfig;
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::data::{Encoder, OnLongRow, Reading, RowKind, Source, load_groups};
use homeroom_engine::embedding::EmbeddingModel;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::text::template::ChatTemplate;
use homeroom_engine::text::tokenizer::Tokenizer;
use homeroom_engine::train::checkpoint;
use serde_json::json;

use super::mutation::Form;
use crate::hub::server::{Act, Server};
use crate::hub::{llama, pull};
use crate::strategies::saved_by_bitsandbytes;
use crate::support::{Place, fixture, model};
use crate::training;

/// A reader, and files for it.
pub struct Reader<'a> {
    pub seeds: Vec<Seed<'a>>,
    /// How many times the size of its files it may take.
    pub factor: usize,
    /// Cases that are tried with every other test.
    pub cases: u64,
}

/// Reads a file.
type Read<'a> = Box<dyn Fn(&[u8]) -> Result<()> + 'a>;

/// A file, and what reads it.
pub struct Seed<'a> {
    pub name: String,
    pub bytes: Vec<u8>,
    pub form: Form,
    /// Bytes that are read beside it.
    pub beside: usize,
    /// Reads it in the place of its own bytes, and uses what it read.
    pub read: Read<'a>,
}

/// The reader of a name.
pub fn reader<'a>(name: &str, place: &'a Place) -> Result<Reader<'a>> {
    let all = |directories: &[&str], files: &[(&str, Form)], read: fn(&Path) -> Result<()>| -> Result<Vec<Seed<'a>>> {
        let mut seeds = Vec::new();
        for directory in directories {
            for (file, form) in files {
                let copy = place.path(&format!("{directory}-{}", file.replace('/', "-")));
                copy_all(&fixture(directory), &copy)?;
                let path = copy.join(file);
                if path.exists() {
                    seeds.push(Seed::in_directory(format!("{directory}/{file}"), path, *form, copy, read)?);
                }
            }
        }
        Ok(seeds)
    };
    let families = [
        "models/gemma2",
        "models/gemma3",
        "models/gemma3-multimodal",
        "models/granite4",
        "models/llama-dynamic",
        "models/llama-tied",
        "models/mistral-window",
        "models/olmo2",
        "models/phi3",
        "models/phi4-mini",
        "models/qwen2",
        "models/qwen3-yarn",
        "models/smollm3",
    ];
    let (seeds, factor, cases) = match name {
        "safetensors" => {
            let files = [("model.safetensors", Form::Safetensors), ("model.safetensors.index.json", Form::Json)];
            let mut seeds = all(&["models/mistral-window", "models/llama-tied"], &files, answers)?;
            for stored in ["nf4", "int8"] {
                let copy = saved_by_bitsandbytes(place, stored)?;
                let path = copy.join("model.safetensors");
                seeds.push(Seed::in_directory(
                    format!("bitsandbytes, {stored}"),
                    path,
                    Form::Safetensors,
                    copy,
                    answers,
                )?);
            }
            (seeds, 16, 2000)
        }
        "gguf" => {
            let mut seeds = Vec::new();
            for file in fs::read_dir(fixture("models/llama-gguf"))?.chain(fs::read_dir(fixture("models/llama3-gguf"))?)
            {
                let path = file?.path();
                if path.extension().is_some_and(|extension| extension == "gguf") {
                    let copy = place.write(&format!("gguf-{}/model.gguf", seeds.len()), fs::read(&path)?)?;
                    let directory = copy.parent().context("a directory")?.to_owned();
                    seeds.push(Seed::in_directory(told(&path), copy, Form::Binary, directory, answers)?);
                }
            }
            (seeds, 16, 2000)
        }
        "tokenizer" => {
            let files = [("tokenizer.json", Form::Json), ("tokenizer_config.json", Form::Json)];
            (all(&["models/llama", "models/gemma3", "models/phi3", "tokenizers/byte_level"], &files, tokens)?, 60, 2000)
        }
        "config" => {
            let files = [("config.json", Form::Json), ("generation_config.json", Form::Json)];
            (all(&families, &files, answers)?, 16, 2000)
        }
        "template" => (templates()?, 400, 3000),
        "adapter" | "checkpoint" => {
            let saved = training::saved(&place.path("saved"))?;
            let files: &[(&str, Form)] = match name {
                "adapter" => &[
                    ("homeroom.json", Form::Json),
                    ("adapter_config.json", Form::Json),
                    ("adapter_model.safetensors", Form::Safetensors),
                ],
                _ => &[(checkpoint::STATE_FILE, Form::Json), (checkpoint::TENSORS_FILE, Form::Safetensors)],
            };
            let base = Arc::new(model("llama")?);
            let mut seeds = Vec::new();
            for (file, form) in files {
                for peft in [false, true] {
                    let copy = place.copy(&saved, &format!("{file}-{peft}"))?;
                    if peft && (*file == "homeroom.json" || name == "checkpoint") {
                        continue;
                    } else if peft {
                        fs::remove_file(copy.join("homeroom.json"))?;
                    }
                    let (base, is_adapter) = (base.clone(), name == "adapter");
                    let read = move |directory: &Path| match is_adapter {
                        true => adapted(directory, &base),
                        false => goes_on(directory, &base),
                    };
                    seeds.push(Seed::in_directory(
                        format!("{file}, PEFT's alone: {peft}"),
                        copy.join(file),
                        *form,
                        copy,
                        read,
                    )?);
                }
            }
            (seeds, 16, 2000)
        }
        "hub" => (hub(place)?, 64, 300),
        "rows" => (rows(place)?, 40, 2000),
        "embedding" => {
            let files = [
                ("config.json", Form::Json),
                ("modules.json", Form::Json),
                ("1_Pooling/config.json", Form::Json),
                ("2_Dense/config.json", Form::Json),
                ("2_Dense/model.safetensors", Form::Safetensors),
                ("sentence_bert_config.json", Form::Json),
                ("config_sentence_transformers.json", Form::Json),
                ("model.safetensors", Form::Safetensors),
                ("tokenizer.json", Form::Json),
            ];
            (all(&["embeddings/bert-dense", "embeddings/distilbert"], &files, embeds)?, 60, 1000)
        }
        "settings" => (settings(place)?, 400, 2000),
        _ => bail!("{name}: no reader"),
    };
    Ok(Reader { seeds, factor, cases })
}

impl<'a> Seed<'a> {
    /// A file of a directory that is read whole.
    fn in_directory(
        name: String,
        path: PathBuf,
        form: Form,
        directory: PathBuf,
        read: impl Fn(&Path) -> Result<()> + 'a,
    ) -> Result<Self> {
        let bytes = fs::read(&path)?;
        let beside = size_below(&directory)? - bytes.len();
        let read = move |damaged: &[u8]| {
            fs::write(&path, damaged)?;
            read(&directory)
        };
        Ok(Self { name, bytes, form, beside, read: Box::new(read) })
    }
}

fn told(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn size_below(directory: &Path) -> Result<usize> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += if about.is_dir() { size_below(&entry.path())? } else { about.len() as usize };
    }
    Ok(bytes)
}

/// A model answers a few tokens, as it does in tests against transformers.
fn answers(directory: &Path) -> Result<()> {
    let path = directory.join("model.gguf");
    let model = BaseModel::load(if path.exists() { &path } else { directory })?;
    let ids = [1, 5, 3, 2];
    let text = model.tokenizer.encode("Wie geht’s? 12 €", true)?;
    let ids = if text.ids.is_empty() { ids.to_vec() } else { text.ids.into_iter().take(20).collect() };
    model.tokenizer.check_embedded(&ids, model.architecture.vocab_size)?;
    Pass::evaluation(&model, None).logits(&Batch::of_tokens(&ids, 0)).map(drop)
}

fn tokens(directory: &Path) -> Result<()> {
    let tokenizer = Tokenizer::from_dir(directory)?;
    for text in ["", "Wie geht’s? 12 €\n\tja", "<s>a</s><|im_end|>", "🙂🙂 ﬁ \u{0} ́"] {
        let ids = tokenizer.encode(text, true)?.ids;
        tokenizer.decode(&ids, true)?;
        tokenizer.decode(&tokenizer.encode_as_text(text)?, false)?;
    }
    let template = ChatTemplate::of_tokenizer(&tokenizer, directory)?;
    template.map(|template| renders(&template)).transpose()?;
    tokenizer.to_json().map(drop)
}

fn renders(template: &ChatTemplate) -> Result<()> {
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "What is 1 + 1? <|im_end|>"}),
        json!({"role": "assistant", "content": "<think>one</think>2"}),
        json!({"role": "user", "content": "And in Grün?"}),
    ];
    let tools = json!([{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}]);
    template.render(&messages, None, true)?;
    template.render_prompt(&messages[1..2], Some(&tools), &[])?;
    Ok(())
}

fn templates() -> Result<Vec<Seed<'static>>> {
    let mut seeds = Vec::new();
    for file in fs::read_dir(fixture("templates/published"))? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "jinja") {
            let read = |damaged: &[u8]| {
                let source = std::str::from_utf8(damaged)?;
                renders(&ChatTemplate::new(source, Some("<s>"), Some("</s>"))?)
            };
            let bytes = fs::read(&path)?;
            // Some templates refuse the conversation, and that is how they are read.
            let is_read = read(&bytes).is_ok();
            if is_read {
                seeds.push(Seed { name: told(&path), bytes, form: Form::Text, beside: 0, read: Box::new(read) });
            }
        }
    }
    Ok(seeds)
}

/// An adapter changes an answer.
fn adapted(directory: &Path, base: &BaseModel) -> Result<()> {
    let adaptation = AdapterFiles::read(directory)?.adapt(base, true)?;
    Pass::evaluation(base, Some(&adaptation)).logits(&Batch::of_tokens(&[1, 5, 3, 2], 0)).map(drop)
}

fn goes_on(directory: &Path, base: &BaseModel) -> Result<()> {
    checkpoint::check(directory)?;
    checkpoint::summary(directory)?;
    training::goes_on(directory, base)
}

/// The list of a model's files, and a file that is another one.
fn hub(place: &Place) -> Result<Vec<Seed<'_>>> {
    let repo = llama()?;
    let list = repo.info("a/b").to_string().into_bytes();
    let server = Arc::new(Server::of("a/b", repo.clone())?);
    let damaged = Arc::new(Mutex::new(Vec::new()));
    let mut seeds = Vec::new();
    let kinds = [
        ("the list", "/revision/main", list, Form::Json),
        ("a file", "tokenizer_config.json", repo.files["tokenizer_config.json"].clone(), Form::Text),
    ];
    for (name, ending, bytes, form) in kinds {
        let (server, damaged) = (server.clone(), damaged.clone());
        let read = move |bytes: &[u8]| {
            *damaged.lock().expect("no panic") = bytes.to_vec();
            let content = damaged.clone();
            server.on(move |asked| {
                let is_damaged = asked.path.ends_with(ending);
                is_damaged.then(|| Act::Content(content.lock().expect("no panic").clone()))
            });
            let store = place.path("store");
            let pulled = pull(&server, &store, "a/b");
            if store.exists() {
                fs::remove_dir_all(&store)?;
            }
            pulled.map(drop)
        };
        seeds.push(Seed { name: name.to_owned(), bytes, form, beside: 400_000, read: Box::new(read) });
    }
    Ok(seeds)
}

fn rows(place: &Place) -> Result<Vec<Seed<'_>>> {
    let model = Arc::new(model("llama")?);
    let mut seeds = Vec::new();
    for file in fs::read_dir(fixture("rows/people"))? {
        let path = file?.path();
        if !path.is_file() {
            continue;
        }
        let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        let form = match &*extension {
            "json" => Form::Json,
            "gz" => Form::Binary,
            _ => Form::Text,
        };
        let (model, copy) = (model.clone(), place.path(&format!("{}.{extension}", seeds.len())));
        let read = move |damaged: &[u8]| {
            fs::write(&copy, damaged)?;
            let template = model.template.as_ref();
            let encoder = || Encoder {
                tokenizer: &model.tokenizer,
                template,
                embeddings: 300,
                max_seq_len: 64,
                on_long_row: OnLongRow::Skip,
            };
            let files = [Source::file(&copy)];
            let read = |kind: RowKind, name: &str| {
                load_groups(&files, &Reading::default(), encoder(), kind, name, |_| ()).map(drop)
            };
            read(RowKind::Demonstration, "sft").or_else(|_| read(RowKind::Preference, "dpo"))
        };
        let bytes = fs::read(&path)?;
        if read(&bytes).is_ok() {
            seeds.push(Seed { name: told(&path), bytes, form, beside: 0, read: Box::new(read) });
        }
    }
    Ok(seeds)
}

fn embeds(directory: &Path) -> Result<()> {
    let model = EmbeddingModel::load(directory)?;
    let tokens = model.tokens("How do plants eat? ﬁ")?;
    model.embed(&[&tokens.ids]).map(drop)
}

/// Files that a user edits.
fn settings(place: &Place) -> Result<Vec<Seed<'_>>> {
    let mut seeds = Vec::new();
    for file in fs::read_dir(crate::support::root().join("configs"))? {
        let path = file?.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let is_handlers = told(&path) == "handlers.toml";
        let copy = place.path(&told(&path));
        let read = move |damaged: &[u8]| {
            fs::write(&copy, damaged)?;
            match is_handlers {
                true => Config::read(&copy).map(drop),
                false => PipelineConfig::look(&copy, &[]).map(drop),
            }
        };
        seeds.push(Seed {
            name: told(&path),
            bytes: fs::read(&path)?,
            form: Form::Text,
            beside: 0,
            read: Box::new(read),
        });
    }
    Ok(seeds)
}

/// A copy of a directory with what lies below, but for what transformers answered.
fn copy_all(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (path, to) = {
            let entry = entry?;
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() {
            copy_all(&path, &to)?;
        } else if !told(&path).starts_with("expected") {
            fs::copy(&path, &to)?;
        }
    }
    Ok(())
}
