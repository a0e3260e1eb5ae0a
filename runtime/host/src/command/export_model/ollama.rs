//! `--format ollama`: a folder that `ollama create` takes.
//!
//! Of an adapter on a GGUF file it is the adapter over that very file, which loses nothing; `--dtype` makes a file of both, as of any
//! other model.

use anyhow::{Context, Result, ensure};
use homeroom_engine::export::gguf::FileType;
use homeroom_engine::export::ollama::{Ends, Origin, choose, modelfile};
use homeroom_engine::export::{Floats, exportable_lora, save_gguf_lora};
use homeroom_engine::files::gguf::shard_paths;
use serde_json::Value;

use super::super::runs::quoted;
use super::gguf::write_file;
use super::{Export, Written, name_in_file};

/// The file that tells Ollama what the model is.
pub const MODELFILE: &str = "Modelfile";
const MODEL: &str = "model.gguf";
const ADAPTER: &str = "adapter.gguf";

/// Whether Ollama leaves a character out of a Modelfile: one that Go's `strconv.IsPrint` does not know, but for line breaks and tabs.
fn ollama_drops(c: char) -> bool {
    let is_space = c.is_whitespace() && !matches!(c, ' ' | '\n' | '\t');
    is_space
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2064}' | '\u{feff}')
}

/// Whether a file of the folder is one that is written there.
pub fn is_part(file: &str) -> bool {
    [MODEL, ADAPTER].contains(&file)
}

/// Writes the folder.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let (model, tokenizer) = (export.model, &export.model.tokenizer);
    let template = model.template.as_ref();
    let template = template
        .context("the model has no chat template, and Ollama's models chat; `--format gguf` writes the file alone")?;
    let (bos, eos) = (tokenizer.bos_token.as_deref(), tokenizer.eos_token.as_deref());
    // Before a weight is read.
    let format = choose(template, Ends { bos, eos, adds_bos: tokenizer.add_bos })?;
    let stops: Vec<String> = tokenizer.eos_ids.iter().filter_map(|id| tokenizer.token(*id)).collect();
    let generation = model.path.join("generation_config.json");
    let generation: Option<Value> = std::fs::read(generation).ok().and_then(|text| serde_json::from_slice(&text).ok());

    let name = name_in_file(&export.arguments.model.model_dir);
    let apart = export.adaptation.filter(|_| model.path.is_file() && export.arguments.dtype.is_none());
    let (from, mut said) = match apart {
        Some(adaptation) => {
            exportable_lora(model, adaptation)?;
            ensure!(
                export.arguments.file.is_empty(),
                "--file: base and adapter are written apart, which is not compared by rows; `--dtype` writes one file of both"
            );
            ensure!(
                shard_paths(&model.path).len() < 2,
                "{}: Ollama reads no base in several files; `--dtype q8_0` writes one file of base and adapter",
                model.path.display()
            );
            save_gguf_lora(export.directory, ADAPTER, (model, adaptation), Floats::F32, &name)?;
            let mut said = Written::default();
            said.line(format!("file      {ADAPTER}, over {}, where it lies", model.path.display()));
            said.field("file", ADAPTER);
            said.field("dtype", FileType::F32.name());
            (Origin::Adapted(&model.path, ADAPTER), said)
        }
        None => (Origin::File(MODEL), write_file(export, &name, MODEL)?),
    };
    let text = modelfile(&from, &format, &stops, generation.as_ref())?;
    export.directory.write(MODELFILE, text.as_bytes())?;
    let system = if format.system.is_some() { ", with the template's own system message" } else { "" };
    said.line(format!("chat      the format `{}`, which writes what the model's template writes{system}", format.name));
    let lost = format.system.iter().flat_map(|system| system.chars()).filter(|c| ollama_drops(*c)).count();
    if lost > 0 {
        said.line(format!("note      Ollama leaves {lost} characters out of the template's own system message: spaces and joiners that do not print"));
    }
    format.notes.iter().for_each(|note| said.line(format!("note      {note}")));
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c.to_ascii_lowercase() } else { '-' };
    let name: String = name.chars().map(plain).collect();
    let file = quoted(&export.output_dir.join(MODELFILE).to_string_lossy());
    said.line(format!("next      ollama create {name} -f {file} && ollama run {name}"));
    said.field("chat_format", format.name);
    Ok(said)
}
