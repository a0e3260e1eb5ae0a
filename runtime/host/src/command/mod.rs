//! One file a command.

pub mod chat;
pub mod eval;
pub mod fine_tune;
pub mod plugins;

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use homeroom_engine::adaptation::Adaptation;
use homeroom_engine::adapter::{AdapterFiles, is_adapter};
use homeroom_engine::data::{Dataset, Encoder, load_jsonl};
use homeroom_engine::model::BaseModel;

use crate::cli::{ModelArgs, RowArgs};
use crate::progress::line;

/// Loads a base model by the name that the user gave.
fn load_base(name: &Path) -> Result<BaseModel> {
    if !name.exists() {
        let text = name.to_string_lossy();
        let hub_like = text.matches('/').count() == 1 && !text.starts_with(['.', '/', '~']) && !text.ends_with(".gguf");
        if hub_like {
            bail!(
                "{text}: no such directory; it looks like a name on the Hugging Face hub, and downloading from there is not built yet\nhint: bring the model's directory or a .gguf file to this machine and name its path"
            );
        }
        bail!("{text}: no such model\nhint: name a Hugging Face directory or a .gguf file");
    }
    BaseModel::load(name)
}

/// Loads an adapter with its base, or a base alone.
fn load_model(arguments: &ModelArgs) -> Result<(BaseModel, Option<Adaptation>)> {
    let path = &arguments.model_dir;
    if !is_adapter(path) {
        if arguments.base_model.is_some() {
            bail!("{}: not an adapter, so it has no base model", path.display());
        }
        return Ok((load_base(path)?, None));
    }
    let files = AdapterFiles::read(path)?;
    let named = arguments.base_model.clone();
    let base = match named.or_else(|| files.base_path()) {
        Some(base) => base,
        None => bail!("{}: it does not say which base model it belongs to; name it with --base-model", path.display()),
    };
    if arguments.base_model.is_none() && !base.exists() {
        bail!(
            "{}: its base model {} is not there\nhint: name where it is with --base-model",
            path.display(),
            base.display()
        );
    }
    let model = load_base(&base)?;
    if let Some(manifest) = &files.manifest {
        if manifest.template_digest != model.tokenizer.template_digest() {
            line("warning: the base model's chat template is not the one that the adapter was trained with");
        }
        if manifest.tokenizer_digest != model.tokenizer.digest() {
            line("note: the base model's tokenizer file is not the one that the adapter was trained with");
        }
    }
    let adaptation = files.adapt(&model, arguments.any_base)?;
    Ok((model, Some(adaptation)))
}

/// Longest row when the user does not say: the model's context, and no more than fits an ordinary machine.
const DEFAULT_MAX_SEQ_LEN: usize = 2048;

/// Reads and encodes rows for a model.
fn load_rows(path: &Path, model: &BaseModel, arguments: &RowArgs) -> Result<Dataset> {
    let context = model.config.max_position_embeddings;
    let max_seq_len = arguments.max_seq_len.unwrap_or(context.min(DEFAULT_MAX_SEQ_LEN));
    if max_seq_len > context {
        bail!("--max-seq-len {max_seq_len}: the model's context is {context} tokens");
    }
    let encoder = Encoder {
        tokenizer: &model.tokenizer,
        template: model.template.as_ref(),
        max_seq_len,
        on_long_row: arguments.on_long_row.into(),
    };
    load_jsonl(path, encoder)
}

/// Prints a command's result. A reader that has gone away is no failure of ours.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write the result"),
        _ => Ok(()),
    }
}
