//! Adapters on disk: PEFT's two files, and `homeroom.json` with what is needed to run one without its plugin.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapt::adaptation::{Adaptation, parse_plan};
use crate::adapt::encoded::EncodedBases;
use crate::adapt::peft;
use crate::adapt::requantize::store_as_planned;
use crate::files::digest::{self, FileDigests};
use crate::files::tensors::{TensorValues, Tensors, map_safetensors};
use crate::files::{NewDirectory, SMALL_FILE_BYTES_MAX, is_named, parse_object, read_text};
use crate::models::weight::NativeCodec;
use crate::models::{BaseModel, Source};
use crate::text::tokenizer::{TEMPLATES_DIR, Tokenizer};

pub use crate::files::{CONFIG_FILE, HOMEROOM_FILE, WEIGHTS_FILE};

/// What `homeroom.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this file's form.
    pub format: u32,
    /// Version of the program that wrote it.
    pub homeroom_version: String,
    /// The base that the adapter belongs to.
    pub base: Base,
    /// Digest of the tokenizer that was trained with.
    pub tokenizer_digest: String,
    /// Digest of the chat template that was trained with.
    pub template_digest: Option<String>,
    /// The strategy that planned it.
    pub strategy: StrategyRecord,
    /// Digest of the training file.
    pub data_digest: Option<String>,
    /// How it was trained, and what came of it.
    pub training: Value,
    /// The plan with its recipes.
    pub plan: Value,
}

/// The base that an adapter belongs to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Base {
    /// Where it was.
    pub path: PathBuf,
    /// Its name on a hub, if it came from one; `path` means nothing on another machine. See [`Source`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The commit that it was of there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Digest of its values, see [`BaseModel::digest`].
    pub digest: String,
    /// Digests of the files of its weights by name: those tell of every byte, and of two ways to store one base as two.
    #[serde(default, skip_serializing_if = "FileDigests::is_empty")]
    pub files: FileDigests,
    /// How its linear layers were stored.
    #[serde(default)]
    pub storage: String,
    /// Whether weights that were quantised already were encoded anew.
    #[serde(default)]
    pub requantize: bool,
}

/// What an adapter says of its base. PEFT has one field for a path and a name, which is in both here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamedBase {
    /// Where it was.
    pub path: Option<PathBuf>,
    /// Its name on a hub.
    pub name: Option<String>,
    /// The branch, tag or commit that it was of there.
    pub revision: Option<String>,
}

/// The strategy that planned an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrategyRecord {
    /// Its name.
    pub name: String,
    /// Version of its plugin.
    pub version: String,
    /// SHA-256 of the plugin's file.
    pub sha256: String,
}

/// What is saved beside the weights.
pub struct Record<'a> {
    /// The strategy that planned the adapter.
    pub strategy: &'a StrategyRecord,
    /// Digest of the training file.
    pub data_digest: Option<&'a str>,
    /// Digests of the files of the base's weights, as [`digest::of_files`] gives them.
    pub base_files: FileDigests,
    /// Whether weights of the base that were quantised already were encoded anew.
    pub requantize: bool,
    /// How it was trained, and what came of it.
    pub training: Value,
}

/// Writes an adapter's files into a directory in the making.
///
/// # Errors
/// When a file cannot be written, or a value is not finite.
pub fn save(directory: &NewDirectory, model: &BaseModel, adaptation: &Adaptation, record: Record<'_>) -> Result<()> {
    let manifest = manifest(model, adaptation, record)?;
    save_peft(directory, model, adaptation)?;
    directory.write(HOMEROOM_FILE, pretty(&serde_json::to_value(manifest)?)?.as_bytes())
}

/// Writes an adapter as PEFT has it, without what this program knows beyond it: its configuration where the strategy has one, the tensors,
/// and the tokenizer and chat template if they are not the base's.
///
/// # Errors
/// When a file cannot be written, or a value is not finite.
pub fn save_peft(directory: &NewDirectory, model: &BaseModel, adaptation: &Adaptation) -> Result<()> {
    // PEFT has an adapter on the model that transformers loads, and that is the whole.
    let part = adaptation.plan.peft.is_some() && model.is_part()?;
    if let Some(peft) = &adaptation.plan.peft {
        let config = peft::config(peft, &model.path, model.source.as_ref(), part);
        directory.write(CONFIG_FILE, pretty(&config)?.as_bytes())?;
    }
    let mut tensors = Vec::new();
    for param in &adaptation.params {
        let values: Vec<f32> = param.var.as_detached_tensor().flatten_all()?.to_vec1()?;
        // What reads it would refuse it.
        let finite = values.iter().all(|value| value.is_finite());
        ensure!(finite, "tensor `{}` holds a value that is not finite, so nothing is saved", param.spec.tensor);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = param.spec.tensor_shape.as_ref().unwrap_or(&param.spec.shape).clone();
        let name = if part { peft::whole_name(&param.spec.tensor) } else { param.spec.tensor.clone() };
        tensors.push((name, shape, bytes));
    }
    directory.write(WEIGHTS_FILE, &serialize_f32(&tensors)?)?;
    if model.text_from.is_some() {
        write_text(directory, &model.tokenizer)?;
    }
    Ok(())
}

/// Writes a tokenizer and its chat template, as transformers reads them.
///
/// # Errors
/// When a file cannot be written.
pub(crate) fn write_text(directory: &NewDirectory, tokenizer: &Tokenizer) -> Result<()> {
    directory.write("tokenizer.json", tokenizer.to_json()?.as_bytes())?;
    directory.write("tokenizer_config.json", pretty(&tokenizer.config_json())?.as_bytes())?;
    write_templates(directory, tokenizer)
}

/// Writes the chat templates as files of their own, where transformers looks for them first.
pub(crate) fn write_templates(directory: &NewDirectory, tokenizer: &Tokenizer) -> Result<()> {
    if let Some(template) = &tokenizer.chat_template {
        directory.write("chat_template.jinja", template.as_bytes())?;
    }
    if !tokenizer.named_templates.is_empty() {
        directory.subdirectory(Path::new(TEMPLATES_DIR))?;
    }
    for (name, template) in &tokenizer.named_templates {
        directory.write(&format!("{TEMPLATES_DIR}/{name}.jinja"), template.as_bytes())?;
    }
    Ok(())
}

/// What `homeroom.json` says of a run's result.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn manifest(model: &BaseModel, adaptation: &Adaptation, record: Record<'_>) -> Result<Manifest> {
    Ok(Manifest {
        format: 1,
        homeroom_version: env!("CARGO_PKG_VERSION").to_owned(),
        base: Base {
            path: model.path.clone(),
            name: model.source.as_ref().map(|source| source.name.clone()),
            revision: model.source.as_ref().map(|source| source.revision.clone()),
            digest: model.digest(),
            files: record.base_files,
            storage: model.storage_words(),
            requantize: record.requantize,
        },
        tokenizer_digest: model.tokenizer.digest(),
        template_digest: model.tokenizer.template_digest(),
        strategy: record.strategy.clone(),
        data_digest: record.data_digest.map(str::to_owned),
        training: record.training,
        plan: serde_json::to_value(&adaptation.plan)?,
    })
}

/// A safetensors file of f32 tensors: (name, shape, little-endian bytes).
///
/// # Errors
/// When a shape does not fit its bytes.
pub fn serialize_f32(tensors: &[(String, Vec<usize>, Vec<u8>)]) -> Result<Vec<u8>> {
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        Ok((name.as_str(), view.with_context(|| format!("tensor `{name}`"))?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    Ok(safetensors::serialize(views, metadata)?)
}

/// JSON as Python's `json.dumps(indent=2)` lays it out, with a newline at the end.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn pretty(value: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Finds a native codec by the strategy that brought it and its name.
pub type FindCodec<'a> = &'a dyn Fn(&StrategyRecord, &str) -> Result<Arc<dyn NativeCodec>>;

/// An adapter's directory, read and checked, before its base is there.
pub struct AdapterFiles {
    /// The directory.
    pub path: PathBuf,
    /// `homeroom.json`, if this program wrote the adapter.
    pub manifest: Option<Manifest>,
    config: Option<Map<String, Value>>,
    tensors: TensorValues,
    /// Weights of the base that PEFT saved beside the adapter's own, as it does where the embedding or the head is adapted.
    copies: Tensors,
}

/// A JSON file, if it is there.
fn read_json(file: &Path) -> Result<Option<Value>> {
    if !is_named(file)? {
        return Ok(None);
    }
    let text = read_text(file, SMALL_FILE_BYTES_MAX)?;
    parse_object(file, &text).map(Some)
}

/// What the `homeroom.json` of a directory says, if there is one.
///
/// # Errors
/// When it is damaged, or a newer program wrote it.
pub fn read_manifest(directory: &Path) -> Result<Option<Manifest>> {
    let file = directory.join(HOMEROOM_FILE);
    let Some(value) = read_json(&file)? else { return Ok(None) };
    let place = file.display();
    match value.get("format") {
        Some(format) if format.as_u64() == Some(1) => {}
        Some(Value::Number(format)) => {
            bail!("{place}: format {format} is not known; this program reads 1, so a newer one wrote it")
        }
        Some(_) => bail!("{place}: damaged: `format` is not a number"),
        None => bail!("{place}: damaged: `format` is missing"),
    }
    serde_json::from_value(value).map(Some).with_context(|| format!("{place}: damaged"))
}

/// Whether a directory holds an adapter.
pub fn is_adapter(path: &Path) -> bool {
    path.join(WEIGHTS_FILE).exists() || path.join(CONFIG_FILE).exists()
}

/// The base with the tokenizer and chat template of an adapter's directory, if it has its own: with them it was trained. Also says
/// which of both differ from the base's; `None`: neither does.
///
/// # Errors
/// When a file is malformed, or a token was added that the base has no embedding for.
pub fn with_text_of(path: &Path, model: &BaseModel) -> Result<Option<(BaseModel, &'static str)>> {
    let base = &model.tokenizer;
    let Some(tokenizer) = Tokenizer::of_adapter(path, base)? else { return Ok(None) };
    let added = tokenizer.added_beyond(model.architecture.vocab_size, base);
    ensure!(
        added.is_empty(),
        "{}: its tokenizer has tokens that the base has no embedding for: {}; an adapter on an embedding that was resized is merged into its base with PEFT first (`merge_and_unload`), and the result is the model to name",
        path.display(),
        added.iter().take(8).map(|token| format!("{token:?}")).collect::<Vec<_>>().join(", ")
    );
    let other_template = tokenizer.template_digest() != base.template_digest();
    let differs = match (tokenizer.digest() != base.digest(), other_template) {
        (true, true) => "tokenizer and chat template",
        (false, true) => "chat template",
        (_, false) => "tokenizer",
    };
    Ok(Some((model.with_tokenizer(tokenizer, path)?, differs)))
}

impl AdapterFiles {
    /// Reads an adapter's files.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let manifest = read_manifest(path)?;
        let config = match read_json(&path.join(CONFIG_FILE))? {
            Some(Value::Object(config)) => Some(config),
            Some(_) => bail!("{}: not a JSON object", path.join(CONFIG_FILE).display()),
            None => None,
        };
        ensure!(
            manifest.is_some() || config.is_some(),
            "{}: neither {HOMEROOM_FILE} nor {CONFIG_FILE} is there",
            path.display()
        );
        let mapped = map_safetensors(&path.join(WEIGHTS_FILE))?;
        let mapped = mapped.into_iter().map(|(name, tensor)| (peft::text_name(&name), tensor));
        let (copies, mapped): (Tensors, Tensors) =
            mapped.partition(|(name, _)| manifest.is_none() && peft::is_base_copy(name));
        let tensors = mapped.into_iter().map(|(name, tensor)| Ok((name, (tensor.shape.clone(), tensor.values()?))));
        let tensors = tensors.collect::<Result<_>>().with_context(|| path.join(WEIGHTS_FILE).display().to_string())?;
        Ok(Self { path: path.to_owned(), manifest, config, tensors, copies })
    }

    /// What the adapter says of its base.
    pub fn base(&self) -> NamedBase {
        let given = |path: &Path| Some(path.to_owned()).filter(|path| !path.as_os_str().is_empty());
        if let Some(Manifest { base, .. }) = &self.manifest {
            return NamedBase { path: given(&base.path), name: base.name.clone(), revision: base.revision.clone() };
        }
        let text = |key: &str| Some(self.config.as_ref()?.get(key)?.as_str()?.to_owned());
        let name = text("base_model_name_or_path");
        NamedBase { path: name.as_deref().and_then(|name| given(Path::new(name))), name, revision: text("revision") }
    }

    /// Where the adapter says its base is.
    pub fn base_path(&self) -> Option<PathBuf> {
        self.base().path
    }

    /// PEFT's configuration, if the adapter has one.
    pub fn peft_config(&self) -> Option<&Map<String, Value>> {
        self.config.as_ref()
    }

    /// The base with its weights stored as they were in training, where the strategy had them stored otherwise than the files
    /// have them; that takes a while, and `progress` hears of weights done, of all. `native` finds a codec by the strategy and its
    /// name where one is needed that only the strategy's plugin has; `kept` is where encoded bases are kept, if they are.
    ///
    /// # Errors
    /// When the adapter's plan does not fit, its native codec is not there, or a weight cannot be encoded.
    pub fn store(
        &self,
        model: Arc<BaseModel>,
        native: FindCodec<'_>,
        kept: Option<&EncodedBases>,
        progress: impl FnMut(usize, usize),
    ) -> Result<Arc<BaseModel>> {
        let Some(manifest) = &self.manifest else { return Ok(model) };
        let place = || self.path.display().to_string();
        let plan = parse_plan(&manifest.plan.to_string()).with_context(place)?;
        let native = |name: &str| native(&manifest.strategy, name);
        store_as_planned(model, &plan, manifest.base.requantize, &native, kept, progress).with_context(place)
    }

    /// Makes the adapter run on a base, whose weights are stored as [`Self::store`] does.
    ///
    /// # Errors
    /// When it belongs to another base (unless `any_base`), or holds what this engine does not run.
    pub fn adapt(self, model: &BaseModel, any_base: bool) -> Result<Adaptation> {
        let Self { path, manifest, config, tensors, copies } = self;
        let place = || path.display().to_string();
        let plan = match (&manifest, &config) {
            (Some(manifest), _) => {
                let digest = model.digest();
                if manifest.base.digest != digest && !any_base {
                    bail!(
                        "{}: the adapter belongs to another base\n  it was trained on {} ({})\n  this is          {} ({})\nhint: name its base with --base-model; --any-base takes this one all the same, if its shapes fit",
                        path.display(),
                        manifest.base.shown(),
                        short(&manifest.base.digest),
                        shown(&model.path, model.source.as_ref()),
                        short(&digest),
                    );
                }
                parse_plan(&manifest.plan.to_string()).with_context(place)?
            }
            (None, Some(config)) => {
                let names: Vec<&str> = tensors.keys().map(String::as_str).collect();
                let shapes = |name: &str| tensors.get(name).map(|(shape, _)| shape.clone());
                let plan = peft::lora_plan(config, &names, &shapes, model)
                    .with_context(|| path.join(CONFIG_FILE).display().to_string())?;
                peft::check_base_copies(&copies, model)
                    .with_context(|| path.join(WEIGHTS_FILE).display().to_string())?;
                plan
            }
            (None, None) => bail!("{}: not an adapter", path.display()),
        };
        let mut adaptation = Adaptation::new(model, plan, 0).with_context(place)?;
        adaptation.load(tensors).with_context(|| path.join(WEIGHTS_FILE).display().to_string())?;
        Ok(adaptation)
    }

    /// Refuses values that are not finite.
    ///
    /// # Errors
    /// Names the first tensor that holds one.
    pub fn ensure_finite(&self) -> Result<()> {
        let spoilt = self.tensors.iter().find(|(_, (_, values))| values.iter().any(|value| !value.is_finite()));
        match spoilt {
            Some((name, _)) => bail!("tensor `{name}` holds a value that is not finite"),
            None => Ok(()),
        }
    }

    /// The tensors, to start a new run on a base from.
    ///
    /// # Errors
    /// When they lie beside a weight of another base.
    pub fn into_tensors(self, model: &BaseModel) -> Result<TensorValues> {
        let place = || self.path.join(WEIGHTS_FILE).display().to_string();
        peft::check_base_copies(&self.copies, model).with_context(place)?;
        Ok(self.tensors)
    }
}

impl Base {
    fn shown(&self) -> String {
        let (name, revision) = (self.name.clone(), self.revision.clone());
        shown(&self.path, name.zip(revision).map(|(name, revision)| Source { name, revision }).as_ref())
    }

    /// What differs of a base whose sampled values are those that were trained on: a file of the same name with other bytes. A base that
    /// lies in files of other names is stored otherwise. `kept` as in [`digest::of_files`].
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn changed_file(&self, model: &BaseModel, kept: Option<&Path>) -> Result<Option<String>> {
        let names = model.files.iter().filter_map(|path| path.file_name()?.to_str());
        if self.files.is_empty() || !names.eq(self.files.keys()) {
            return Ok(None);
        }
        let now = digest::of_files(&model.files, kept)?;
        let changed = self.files.iter().find(|(name, digest)| now[*name] != **digest);
        Ok(changed.map(|(name, digest)| {
            let (was, is) = (short(digest), short(&now[name]));
            format!("{name} is not the file that the adapter was trained on ({was} then, {is} now)")
        }))
    }
}

/// A base as messages name it.
fn shown(path: &Path, source: Option<&Source>) -> String {
    match source {
        Some(Source { name, revision }) => format!("{name} at {revision}, {}", path.display()),
        None => path.display().to_string(),
    }
}

fn short(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}
