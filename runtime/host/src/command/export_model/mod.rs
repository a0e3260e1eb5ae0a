//! `homeroom export-model`: a trained model as files of another program. Here is what all formats have in common; a format is a file.

mod bundle;
mod compare;
mod gguf;
mod gguf_lora;
mod held_out;
mod merged;
mod mlx;
mod ollama;
mod peft;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::merge::Merged;
use homeroom_engine::export::Floats;
use homeroom_engine::files::{NewDirectory, ensure_room, replaceable_but_for, utf8, vacant};
use homeroom_engine::models::BaseModel;
use serde_json::{Map, Value, json};

use self::compare::Compared;
use super::arguments::{ModelArgs, RowArgs, Word, word};
use super::{Done, print, spares};
use crate::interrupt;
use crate::models::{Loaded, Network, here, last_part};
use crate::progress::line;

/// Arguments of `export-model`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Format of the export
    #[arg(long, value_enum, default_value = "merged", value_name = "FORMAT")]
    format: Format,
    /// Directory for the export [default: the model's name with the format's behind it, as in NAME-merged, in the working directory]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Number format of the written weights [default: the base's, f32 where it is quantised; of a GGUF file q8_0]
    ///
    /// Weights are rounded to it, and in bf16 some of what a training changed is lost. The KL divergence that is printed is measured on
    /// the rows of `--file`, else on some that the training held out, else on a few questions of general knowledge, where it is smaller than on rows like those of
    /// the training.
    #[arg(long, value_name = "TYPE", value_parser = word(&DTYPES))]
    dtype: Option<String>,
    /// Files of rows to compare the export with the trained model on, best some that were held out [default: some that its training held out, else a few questions of general knowledge]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    file: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowArgs,
    /// Replace an earlier export in that directory
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Format of an export.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A Hugging Face directory with the adapter merged into the base
    Merged,
    /// One GGUF file with the adapter merged into the base, for llama.cpp, Ollama, LM Studio and others
    Gguf,
    /// The adapter alone as a GGUF file, which llama.cpp lays over the base
    GgufLora,
    /// A folder for `ollama create`: a GGUF file, or an adapter over the one that was trained on, and a Modelfile with the model's chat format
    Ollama,
    /// The adapter alone, as PEFT has it
    Peft,
    /// A directory for mlx-lm, with the adapter merged into the base
    Mlx,
    /// A folder with the model, this program and a script that serves it, for a machine without a network
    Bundle,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Merged => "merged",
            Self::Gguf => "gguf",
            Self::GgufLora => "gguf-lora",
            Self::Ollama => "ollama",
            Self::Peft => "peft",
            Self::Mlx => "mlx",
            Self::Bundle => "bundle",
        }
    }
}

const DTYPES: [Word; 11] = [
    ("f32", "32 bits; nothing is lost"),
    ("f16", "16 bits, 11 of them of precision"),
    ("bf16", "16 bits, 8 of them of precision"),
    ("q8_0", "GGUF files only: 8 bits and a scale for 32 values; answers hardly change"),
    ("q6_k", "GGUF files only: 6 bits, with scales"),
    ("q5_k_m", "GGUF files only: 5 bits, and 6 in the matrices that matter most"),
    ("q4_k_m", "GGUF files only: 4 bits, and 6 in the matrices that matter most"),
    ("q4_0", "GGUF files only: 4 bits, the coarsest"),
    ("float32", ""),
    ("float16", ""),
    ("bfloat16", ""),
];

impl Arguments {
    /// The floats that `--dtype` names, for formats that are written in such.
    fn floats(&self) -> Result<Option<Floats>> {
        let read = |word: &String| {
            let floats = word.parse::<Floats>();
            floats.with_context(|| format!("--dtype {word}: `--format {}` is written in floats", self.format.name()))
        };
        self.dtype.as_ref().map(read).transpose()
    }
}

/// What is exported, and how.
struct Export<'a> {
    model: &'a BaseModel,
    adaptation: Option<&'a Adaptation>,
    arguments: &'a Arguments,
    compared: &'a Compared,
    /// What is written.
    directory: &'a NewDirectory,
    /// What it is to be called.
    output_dir: &'a Path,
}

impl Export<'_> {
    /// Model and adaptation as one.
    fn merged(&self) -> Result<Merged<'_>> {
        Merged::new(self.model, self.adaptation)
    }

    /// Refuses to begin what the disk has no room for.
    fn ensure_room(&self, bytes: u64) -> Result<()> {
        ensure_room(self.output_dir, bytes)
    }
}

/// What is said of a finished export.
#[derive(Default)]
struct Written {
    /// Lines behind the one that says where it is.
    lines: Vec<String>,
    /// Fields of `--json`.
    fields: Map<String, Value>,
}

impl Written {
    fn line(&mut self, line: String) {
        self.lines.push(line);
    }

    fn field(&mut self, name: &str, value: impl Into<Value>) {
        self.fields.insert(name.to_owned(), value.into());
    }
}

/// Writes a trained model for other programs, and says how far its answers are from the trained model's.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let format = arguments.format;
    let output_dir = match &arguments.output_dir {
        Some(directory) => directory.clone(),
        None => beside(&arguments.model.model_dir, format),
    };
    utf8(&std::path::absolute(&output_dir)?)?;
    ensure!(
        compares(arguments) || arguments.file.is_empty(),
        "--file: what `--format {}` writes here is copied as it is, and not compared by rows",
        format.name()
    );
    if !arguments.overwrite {
        vacant(&output_dir)?;
    }
    match format {
        Format::Merged => merged::check(arguments)?,
        Format::Gguf => gguf::check(arguments)?,
        Format::GgufLora => gguf_lora::check(arguments)?,
        Format::Ollama => gguf::check(arguments)?,
        Format::Peft => peft::check(arguments)?,
        Format::Mlx => mlx::check(arguments)?,
        Format::Bundle => bundle::check(arguments)?,
    }
    let Loaded { model, adaptation } = Loaded::load(&arguments.model.reference(), Network::Allowed)?;
    let named = here(&arguments.model.model_dir)?.map(|located| located.path);
    spares(
        &output_dir,
        [
            ("the base model", Some(model.path.clone())),
            (if adaptation.is_some() { "the adapter" } else { "the model" }, named.clone()),
        ],
    )?;
    if arguments.overwrite {
        is_earlier(&output_dir, format, &name_in_file(&arguments.model.model_dir))?;
        replaceable_but_for(&output_dir, |file| match format {
            Format::Bundle => bundle::is_part(file),
            Format::Ollama => file == Path::new(ollama::MODELFILE),
            _ => false,
        })?;
    }
    if arguments.output_dir.is_none() {
        line(format_args!(
            "export    {}, to {}   --output-dir chooses another directory",
            format.name(),
            output_dir.display()
        ));
    }
    let compared = match compares(arguments) {
        true => Compared::of(arguments, &model, named.as_deref())?,
        false => Compared::nothing(),
    };
    interrupt::end_at_once()?;
    let mut directory = NewDirectory::start(&output_dir)?;
    directory.replaces = arguments.overwrite;
    let export = Export {
        model: &model,
        adaptation: adaptation.as_deref(),
        arguments,
        compared: &compared,
        directory: &directory,
        output_dir: &output_dir,
    };
    let written = match format {
        Format::Merged => merged::write(&export)?,
        Format::Gguf => gguf::write(&export)?,
        Format::GgufLora => gguf_lora::write(&export)?,
        Format::Ollama => ollama::write(&export)?,
        Format::Peft => peft::write(&export)?,
        Format::Mlx => mlx::write(&export)?,
        Format::Bundle => bundle::write(&export)?,
    };
    let output_dir = directory.publish()?;
    line(format_args!("saved     {}", output_dir.display()));
    written.lines.iter().for_each(line);
    if arguments.json {
        let mut said = Map::new();
        said.insert("output_dir".to_owned(), json!(output_dir));
        said.insert("format".to_owned(), json!(format.name()));
        said.extend(written.fields);
        print(&Value::Object(said).to_string())?;
    }
    Ok(Done::Whole)
}

/// Whether an export changes values, and is compared with what was trained.
fn compares(arguments: &Arguments) -> bool {
    match arguments.format {
        Format::GgufLora => false,
        Format::Bundle => arguments.dtype.is_some(),
        Format::Merged | Format::Gguf | Format::Ollama | Format::Peft | Format::Mlx => true,
    }
}

/// Refuses to replace a directory that an export of this format, or a training, did not write.
fn is_earlier(directory: &Path, format: Format, name: &str) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Ok(()) };
    let files: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let has = |file: &str| directory.join(file).exists();
    let other = |file: &&String| match format {
        Format::Gguf | Format::GgufLora => !file.starts_with(&format!("{name}-")) || !file.ends_with(".gguf"),
        Format::Ollama => !has(ollama::MODELFILE) || file.ends_with(".gguf") && !ollama::is_part(file),
        Format::Peft => has("config.json") || file.ends_with(".gguf"),
        Format::Merged | Format::Mlx => has("adapter_config.json") || file.ends_with(".gguf"),
        Format::Bundle => !bundle::is_one(directory),
    };
    match files.iter().find(other) {
        Some(file) => bail!(
            "{}: holds `{file}`, and is no earlier export of {name} as `{}`: it would be lost; name another directory",
            directory.display(),
            format.name()
        ),
        None => Ok(()),
    }
}

/// What a model is called in a file and by its file: its name, or the last part of its path.
fn name_in_file(model: &Path) -> String {
    let name = last_part(model).unwrap_or_else(|| "model".to_owned());
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

/// The model's name, or the last part of its path, with the format's name behind it, in the working directory.
fn beside(model: &Path, format: Format) -> PathBuf {
    format!("{}-{}", last_part(model).unwrap_or_else(|| "model".to_owned()), format.name()).into()
}
