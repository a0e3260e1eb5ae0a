//! Models by name or path: bases, and adapters with their bases.

mod engines;
mod locate;
mod missing;
mod sketch;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{AdapterFiles, CONFIG_FILE, is_adapter, with_text_of};
use homeroom_engine::data::{Dataset, Encoder, Group, OnLongRow, Reading, Source, load_groups};
use homeroom_engine::embedding::encoder_type;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text};
use homeroom_engine::inference::{Adapter, Ask, Engine, Tokens};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::Kind;

use serde_json::Value;
use sha2::{Digest, Sha256};

pub use self::engines::Files;
pub use self::locate::{Located, Network, base_of, here, hub_name_of, is_here, last_part, locate, of_hub, shown};
pub use self::missing::not_there;
pub use self::sketch::Sketched;
use crate::hub::HubName;
use crate::job::encode;
use crate::pipeline::bytecode::hex;
use crate::plugin::native;
use crate::progress::line;
use crate::registry;
use crate::terminal::cell;

/// A model that can be run: a base, perhaps with an adapter.
#[derive(Clone)]
pub struct Loaded {
    /// The base.
    pub model: Arc<BaseModel>,
    /// The adapter.
    pub adaptation: Option<Arc<Adaptation>>,
}

/// What a user says of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelRef {
    /// A path, a name from `homeroom list-models`, or a name on the Hugging Face hub.
    pub name: PathBuf,
    /// The base of an adapter, if it is not where the adapter says.
    pub base_model: Option<PathBuf>,
    /// Take a base with other weights than the adapter was trained on.
    pub any_base: bool,
}

impl ModelRef {
    /// The digest of the files that it means here: those of the base, and those of the adapter, if it is one.
    ///
    /// # Errors
    /// When it is not here, or a file cannot be read.
    pub fn digest(&self) -> Result<String> {
        let found = Found::find(self, Network::Never("a digest"))?;
        let base = Files::of(&found.base.path).digest()?;
        let Some(adapter) = found.adapter else { return Ok(base) };
        Ok(hex(&Sha256::digest(format!("{base} {}", adapter.before.digest()?))))
    }
}

/// Loads a base model from where [`locate`] found it.
///
/// # Errors
/// When it cannot be run.
pub fn load_base(base: &Located) -> Result<BaseModel> {
    let mut model = BaseModel::load(&base.path)?;
    // What is loaded may be the only GGUF file of a directory.
    model.source = base.source.clone();
    for note in &model.tokenizer.notes {
        line(format_args!("note: {}: {note}", shown(&model, &base.path)));
    }
    Ok(model)
}

/// What a base model is needed for.
#[derive(Clone, Copy)]
pub enum Use {
    /// To be trained.
    Training,
    /// To measure how fast it is trained.
    Measuring,
    /// To estimate what its training needs.
    Planning,
}

/// Refuses what is typed as `name` where a base model is needed, if it is none.
///
/// # Errors
/// When the name is that of an adapter or an embedding model.
pub fn refuse_other(name: &Path, path: &Path, use_of: Use) -> Result<()> {
    refuse_embedding(name, path)?;
    if is_adapter(path) {
        let base = base_said(path).unwrap_or_else(|| "MODEL".to_owned());
        let name = name.display();
        let hint = match use_of {
            Use::Training => format!("`--model-name {base} --init-from {name}` trains it further"),
            Use::Measuring => format!("`--model-name {base}` measures the training of one like it"),
            Use::Planning => format!("`--model-name {base}` plans the training of one like it"),
        };
        bail!("{name}: an adapter on {base}, not a base model\nhint: {hint}");
    }
    Ok(())
}

/// What to type for the base of an adapter, by the adapter's word.
fn base_said(adapter: &Path) -> Option<String> {
    let Ok(files) = AdapterFiles::read(adapter) else {
        // Of weights that cannot be read the base is known.
        let text = read_text(&adapter.join(CONFIG_FILE), SMALL_FILE_BYTES_MAX).ok()?;
        let config: Value = serde_json::from_str(&text).ok()?;
        return Some(cell(config["base_model_name_or_path"].as_str()?));
    };
    let base = files.base();
    let hub_name = hub_name_of(&base).map(|name| HubName { revision: None, ..name }.to_string());
    hub_name.or_else(|| Some(cell(&base.path?.display().to_string())))
}

/// Refuses an embedding model, typed as `name`, where one that writes is needed.
///
/// # Errors
/// When the name is that of an embedding model.
fn refuse_embedding(name: &Path, path: &Path) -> Result<()> {
    if let Some(kind) = encoder_type(path) {
        let name = name.display();
        bail!(
            "{name}: it is an embedding model (`{kind}`), which writes no text: it is not trained, asked or exported\nhint: `homeroom serve --model-dir {name}` serves it at /v1/embeddings"
        );
    }
    Ok(())
}

/// The base with the tokenizer and chat template that an adapter's directory brings, which is said; else the base as it is.
///
/// # Errors
/// When they are malformed or do not fit the base.
pub fn with_text(adapter: &Path, model: Arc<BaseModel>) -> Result<Arc<BaseModel>> {
    let Some((with_text, what)) = with_text_of(adapter, &model)? else { return Ok(model) };
    line(format_args!("note: the adapter's own {what} is used, not the base's: it was trained with it"));
    Ok(Arc::new(with_text))
}

/// Makes an adapter run on a base, and says when a file of the base was changed since where that does not show in what is sampled.
///
/// # Errors
/// When it belongs to another base (unless `any_base`), or holds what the engine does not run.
pub fn adapt(files: AdapterFiles, model: &BaseModel, any_base: bool) -> Result<Adaptation> {
    let base = files.manifest.as_ref().map(|manifest| manifest.base.clone());
    let adaptation = files.adapt(model, any_base)?;
    let kept = registry::kept_digests();
    let changed = base.filter(|_| !any_base).map(|base| base.changed_file(model, kept.as_deref())).transpose()?;
    if let Some(what) = changed.flatten() {
        line(format_args!(
            "warning: {}: {what}, though the values that are sampled are the same; unless you edited it, fetch it again",
            shown(model, &model.path)
        ));
    }
    Ok(adaptation)
}

impl Loaded {
    /// Loads an adapter with its base, or a base alone; what is not here is downloaded, if `network` allows it.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the adapter and its base do not belong together.
    pub fn load(reference: &ModelRef, network: Network) -> Result<Self> {
        let Found { base, adapter } = Found::find(reference, network)?;
        let model = Arc::new(load_base(&base)?);
        let Some(FoundAdapter { path, files, .. }) = adapter else { return Ok(Self { model, adaptation: None }) };
        let model = with_text(&path, model)?;
        say_other_text(&files, &model);
        let model = encode(|kept, progress| files.store(model, &native::find, kept, progress))?;
        let adaptation = adapt(files, &model, reference.any_base)?;
        Ok(Self { model, adaptation: Some(Arc::new(adaptation)) })
    }
}

/// A model that answers: an engine, which others on the same base share, and the adapter that its requests bring along.
#[derive(Clone)]
pub struct Answerer {
    /// The base.
    pub engine: Arc<Engine>,
    /// The adapter.
    pub adapter: Option<Arc<Adapter>>,
}

impl Answerer {
    /// Loads an adapter or a base alone to answer. A base that is loaded to answer already, from the same files and to compute in the
    /// same way, is not loaded again; nor is an adapter.
    ///
    /// # Errors
    /// As [`Loaded::load`].
    pub fn load(reference: &ModelRef, network: Network, compute: Compute) -> Result<Self> {
        // Files that are replaced while they are read are read again. Of those that never rest the last reading answers.
        let (mut answerer, mut settled) = Self::of_found(Found::find(reference, network)?, reference, compute)?;
        for _ in 1..READINGS_MAX {
            if settled {
                break;
            }
            // The base of the reading before is kept meanwhile.
            (answerer, settled) = Self::of_found(Found::find(reference, network)?, reference, compute)?;
        }
        Ok(answerer)
    }

    /// What was found, ready to answer, and whether its files are still those that were read.
    fn of_found(found: Found, reference: &ModelRef, compute: Compute) -> Result<(Self, bool)> {
        let Some(FoundAdapter { path, before, files }) = found.adapter else {
            return Ok((Self { engine: engines::engine_of(&found.base, None, compute)?, adapter: None }, true));
        };
        let engine = engines::engine_of(&found.base, Some(&files), compute)?;
        let (adapter, settled) = engines::adapter_of(&engine, (&path, before), reference.any_base, || {
            let model = with_text(&path, engine.model().clone())?;
            say_other_text(&files, &model);
            let adaptation = adapt(files, &model, reference.any_base)?;
            Adapter::new(engine.inference(), model, Arc::new(adaptation))
        })?;
        Ok((Self { engine, adapter: Some(adapter) }, settled))
    }

    /// Makes what is loaded ready to answer, in an engine of its own.
    ///
    /// # Errors
    /// When the adapter does not fit.
    pub fn of(loaded: Loaded, compute: Compute) -> Result<Self> {
        let engine = Arc::new(Engine::new(loaded.model.clone(), compute));
        let adapter = loaded.adaptation.map(|adaptation| Adapter::new(engine.inference(), loaded.model, adaptation));
        Ok(Self { engine, adapter: adapter.transpose()? })
    }

    /// The base, with the adapter's tokenizer and template.
    pub fn model(&self) -> &Arc<BaseModel> {
        self.adapter.as_ref().map_or(self.engine.model(), |adapter| &adapter.model)
    }

    /// Begins to answer a prompt.
    ///
    /// # Errors
    /// As [`Engine::ask`].
    pub fn ask(&self, prompt: &[u32], ask: impl Into<Ask>) -> Result<Tokens> {
        self.engine.ask(self.adapter.as_ref(), prompt, ask)
    }
}

/// How often the files of an adapter are read that are replaced meanwhile.
const READINGS_MAX: usize = 3;

/// Where a base is, and the adapter on it, if it is an adapter that was named.
struct Found {
    base: Located,
    adapter: Option<FoundAdapter>,
}

struct FoundAdapter {
    path: PathBuf,
    /// Its files before any was read.
    before: Files,
    files: AdapterFiles,
}

impl Found {
    fn find(reference: &ModelRef, network: Network) -> Result<Self> {
        let located = locate(&reference.name, network)?;
        let path = located.path.clone();
        refuse_embedding(&reference.name, &path)?;
        if !is_adapter(&path) {
            ensure!(reference.base_model.is_none(), "{}: not an adapter, so it has no base model", path.display());
            return Ok(Self { base: located, adapter: None });
        }
        let before = Files::of(&path);
        let files = AdapterFiles::read(&path)?;
        let base = match &reference.base_model {
            Some(base) => locate(base, network)?,
            None => base_of(&files, network)?,
        };
        Ok(Self { base, adapter: Some(FoundAdapter { path, before, files }) })
    }
}

/// Says where an adapter was trained with another tokenizer or template than `model` has.
fn say_other_text(files: &AdapterFiles, model: &BaseModel) {
    let Some(manifest) = &files.manifest else { return };
    if manifest.template_digest != model.tokenizer.template_digest() {
        line("warning: the base model's chat template is not the one that the adapter was trained with");
    }
    if manifest.tokenizer_digest != model.tokenizer.digest() {
        line("note: the base model's tokenizer file is not the one that the adapter was trained with");
    }
}

/// Longest row when the user does not say: the model's context, and no more than fits an ordinary machine.
const DEFAULT_MAX_SEQ_LEN: usize = 2048;

/// The longest row that is taken of a model with this context.
///
/// # Errors
/// When the rows may be longer than the context.
pub fn longest_row(context: usize, max_seq_len: Option<usize>) -> Result<usize> {
    let max_seq_len = max_seq_len.unwrap_or(context.min(DEFAULT_MAX_SEQ_LEN));
    ensure!(max_seq_len <= context, "--max-seq-len {max_seq_len}: the model's context is {context} tokens");
    Ok(max_seq_len)
}

/// How rows are encoded for a model.
///
/// # Errors
/// When the rows may be longer than the model's context.
pub fn encoder(model: &BaseModel, max_seq_len: Option<usize>, on_long_row: OnLongRow) -> Result<Encoder<'_>> {
    let max_seq_len = longest_row(model.architecture.max_position_embeddings, max_seq_len)?;
    let template = model.template.as_ref();
    Ok(Encoder {
        tokenizer: &model.tokenizer,
        template,
        embeddings: model.architecture.vocab_size,
        max_seq_len,
        on_long_row,
    })
}

/// Reads and encodes files of rows for a model, from which it is to learn by an objective.
///
/// # Errors
/// When a row is refused; all of them in one message.
pub fn load_rows(
    sources: &[Source],
    reading: &Reading,
    model: &BaseModel,
    max_seq_len: Option<usize>,
    on_long_row: OnLongRow,
    objective: Kind,
) -> Result<Dataset<Group>> {
    let encoder = encoder(model, max_seq_len, on_long_row)?;
    load_groups(sources, reading, encoder, objective.rows(), objective.name(), |groups| objective.mark(groups))
}

/// Reads and encodes files of answers to imitate, on which a model is measured by what messages call `measurer`.
///
/// # Errors
/// As [`load_rows`].
pub fn load_measured(
    sources: &[Source],
    reading: &Reading,
    model: &BaseModel,
    max_seq_len: Option<usize>,
    on_long_row: OnLongRow,
    measurer: &str,
) -> Result<Dataset<Group>> {
    let encoder = encoder(model, max_seq_len, on_long_row)?;
    load_groups(sources, reading, encoder, Kind::Sft.rows(), measurer, |groups| Kind::Sft.mark(groups))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const OFFLINE: Network = Network::Never("a test");

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
    }

    fn copied(from: &str, directory: &tempfile::TempDir, to: &str) -> Result<PathBuf> {
        let to = directory.path().join(to);
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(fixture(from))? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(to)
    }

    /// Another file of the same name and content.
    fn replace(file: &Path) -> Result<()> {
        let other = file.with_extension("other");
        fs::copy(file, &other)?;
        Ok(fs::rename(other, file)?)
    }

    fn engine(name: &Path, compute: Compute) -> Result<Arc<Engine>> {
        Ok(Answerer::load(&ModelRef { name: name.to_owned(), ..ModelRef::default() }, OFFLINE, compute)?.engine)
    }

    #[test]
    fn an_adapter_that_is_replaced_while_its_base_is_loaded_answers_with_its_new_values() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let name = copied("adapters/tied-head", &directory, "adapter")?;
        let base = copied("models/llama-tied", &directory, "base")?;
        let reference = ModelRef { name, base_model: Some(base), any_base: true };
        let found = Found::find(&reference, OFFLINE)?;
        replace(&reference.name.join("adapter_model.safetensors"))?;
        let (old, settled) = Answerer::of_found(found, &reference, Compute::F32)?;
        assert!(!settled);
        let new = Answerer::load(&reference, OFFLINE, Compute::F32)?;
        assert!(Arc::ptr_eq(&old.engine, &new.engine));
        let generation = |answerer: &Answerer| answerer.adapter.as_ref().map(|adapter| adapter.generation());
        assert_ne!(generation(&old), generation(&new));
        assert_eq!(generation(&new), generation(&Answerer::load(&reference, OFFLINE, Compute::F32)?));
        Ok(())
    }

    #[test]
    fn a_base_is_another_once_a_file_of_it_that_is_read_is() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let base = copied("models/llama", &directory, "base")?;
        let weights = base.join("model.safetensors");
        let first = engine(&base, Compute::F32)?;
        fs::write(base.join("NOTES.md"), "mine")?;
        fs::create_dir(base.join("tutor"))?;
        fs::write(base.join("tutor/adapter_config.json"), "{}")?;
        fs::hard_link(&weights, directory.path().join("link"))?;
        let mut mode = fs::metadata(&weights)?.permissions();
        mode.set_readonly(true);
        fs::set_permissions(&weights, mode)?;
        assert!(Arc::ptr_eq(&first, &engine(&base, Compute::F32)?));
        for file in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"] {
            let before = engine(&base, Compute::F32)?;
            replace(&base.join(file))?;
            assert!(!Arc::ptr_eq(&before, &engine(&base, Compute::F32)?), "{file}");
        }
        Ok(())
    }

    #[test]
    fn every_file_of_a_split_base_is_one_that_is_read() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let split = copied("models/llama-gguf-split", &directory, "split")?;
        let name = |number: usize| split.join(format!("model-mixed-0000{number}-of-00003.gguf"));
        assert!(Files::of(&name(1)) == Files::of(&name(2)), "any one names the model");
        let sharded = copied("models/llama", &directory, "sharded")?;
        fs::rename(sharded.join("model.safetensors"), sharded.join("a.safetensors"))?;
        fs::copy(sharded.join("a.safetensors"), sharded.join("b.safetensors"))?;
        fs::write(
            sharded.join("model.safetensors.index.json"),
            r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#,
        )?;
        fs::write(sharded.join("generation_config.json"), "{}")?;
        let of_shards = ["a.safetensors", "b.safetensors", "model.safetensors.index.json", "generation_config.json"];
        let of_split = (1..=3).map(|number| (name(1), name(number)));
        for (model, file) in of_split.chain(of_shards.map(|file| (sharded.clone(), sharded.join(file)))) {
            let reference = ModelRef { name: model, ..ModelRef::default() };
            let before = Files::named(&reference);
            assert!(before == Files::named(&reference));
            replace(&file)?;
            assert!(before != Files::named(&reference), "{}", file.display());
        }
        Ok(())
    }

    #[test]
    fn words_that_are_computed_alike_are_one_engine() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let base = copied("models/llama", &directory, "base")?;
        let auto = engine(&base, Compute::Auto)?;
        let in_bf16 = engine(&base, Compute::Bf16)?;
        assert_eq!(Arc::ptr_eq(&auto, &in_bf16), Compute::auto() == Compute::Bf16);
        assert!(!Arc::ptr_eq(&auto, &engine(&base, Compute::F32)?), "f32 by name does not round");
        Ok(())
    }
}
