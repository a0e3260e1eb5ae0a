//! A base model: its configuration, its frozen modules by Hugging Face path, its tokenizer and chat template.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::plan::{ModelInfo, ModuleInfo, ModuleKind};
use homeroom_kernels::{RowOrder, Storage, bf16, f16};
use sha2::{Digest, Sha256};

use crate::files::bitsandbytes;
use crate::files::digest::settled_identity;
use crate::files::gguf::{Gguf, ShardName, TensorInfo, shard_paths};
use crate::files::mapped::map_file;
use crate::files::tensors::{MappedTensor, Tensors, has_safetensors, map_directory, weight_files};
use crate::files::{SMALL_FILE_BYTES_MAX, broken_link, is_named, parse_object, read_text};
use crate::models::architecture::{
    Architecture, EMBEDDING, HEAD, K_NORM, LayerSpec, ModuleSpec, Projection, Q_NORM, layer_path,
};
use crate::models::weight::Weight;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;

/// What others know a model by: its name on a hub, and which state of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// `owner/name`, with `:quantization` behind it where it is one of several GGUF files.
    pub name: String,
    /// The commit.
    pub revision: String,
}

impl Source {
    /// `owner/name`, the repository.
    pub fn repo(&self) -> &str {
        self.name.split_once(':').map_or(&self.name, |(repo, _)| repo)
    }
}

/// A loaded base model. Nothing in it changes.
pub struct BaseModel {
    /// The directory or GGUF file it was loaded from, absolute.
    pub path: PathBuf,
    /// What others know it by, if whoever loaded it said so.
    pub source: Option<Source>,
    /// The files of its weights.
    pub files: Vec<PathBuf>,
    /// What it computes.
    pub architecture: Architecture,
    /// Its modules in the order of the forward pass.
    pub modules: Vec<Module>,
    /// Module indices of each decoder layer.
    pub layers: Vec<LayerModules>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// The adapter whose tokenizer and template these are, if they are not the base's own.
    pub text_from: Option<PathBuf>,
    by_path: HashMap<String, usize>,
    digest: OnceLock<String>,
    /// What told its files from others before they were read.
    written: Arc<HashMap<PathBuf, String>>,
}

/// A frozen module.
#[derive(Clone)]
pub struct Module {
    /// Name, kind and shape.
    pub info: ModuleInfo,
    /// Its weight: linear (d_out, d_in), embedding (vocabulary, d), norm one row of d.
    pub weight: Arc<Weight>,
    /// Its bias (d_out).
    pub bias: Option<Arc<Vec<f32>>>,
}

/// A layer's modules, as indices into [`BaseModel::modules`]; what they are is said by its [`super::LayerSpec`].
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct LayerModules {
    pub mixer_norm: Option<usize>,
    pub qkv: Vec<usize>,
    /// The norms of q and of k.
    pub qk_norms: Option<[usize; 2]>,
    pub o: usize,
    pub mixer_post_norm: Option<usize>,
    pub feed_forward_norm: Option<usize>,
    pub gate_up: Vec<usize>,
    pub down: usize,
    pub feed_forward_post_norm: Option<usize>,
}

impl LayerModules {
    pub(crate) fn new(number: usize, layer: &LayerSpec, by_path: &HashMap<String, usize>) -> Self {
        let at = |path: &str| by_path[&layer_path(number, path)];
        let attention = layer.attention();
        let each = |projections: &[Projection]| projections.iter().map(|projection| at(projection.path)).collect();
        Self {
            mixer_norm: layer.mixer_norms.before.map(at),
            qkv: each(&attention.qkv),
            qk_norms: attention.qk_norm.map(|_| [at(Q_NORM), at(K_NORM)]),
            o: at(attention.o.path),
            mixer_post_norm: layer.mixer_norms.after.map(at),
            feed_forward_norm: layer.feed_forward_norms.before.map(at),
            gate_up: each(&layer.feed_forward.gate_up),
            down: at(layer.feed_forward.down.path),
            feed_forward_post_norm: layer.feed_forward_norms.after.map(at),
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = usize> {
        let norms = [self.mixer_norm, self.mixer_post_norm, self.feed_forward_norm, self.feed_forward_post_norm];
        let linear = self.qkv.iter().chain(&self.gate_up).copied().chain([self.o, self.down]);
        norms.into_iter().flatten().chain(self.qk_norms.into_iter().flatten()).chain(linear)
    }
}

/// The files that a model is loaded from.
enum Form {
    /// A Hugging Face directory.
    Directory(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

impl Form {
    /// What is to be loaded of a path, which leads to `absolute`.
    fn of(path: &Path, absolute: PathBuf) -> Result<Self> {
        if absolute.is_file() {
            // Names tell less: a download may be called by its digest.
            ensure!(
                map_file(&absolute)?.starts_with(b"GGUF"),
                "{}: a model is a Hugging Face directory or a .gguf file, and this is neither; of a directory name the directory",
                path.display()
            );
            // And yet the name is what says which model it is.
            let name = std::path::absolute(path)?;
            let parent = name.parent().and_then(|parent| parent.canonicalize().ok());
            return Ok(Self::Gguf(parent.zip(name.file_name()).map_or(absolute, |(parent, name)| parent.join(name))));
        }
        let config = is_named(&absolute.join("config.json"))?;
        if absolute.join("adapter_config.json").exists() && !config {
            bail!("{}: this is an adapter; name the base model that it was trained on", path.display());
        }
        let mut gguf = gguf_files(&absolute)?;
        if config && (gguf.is_empty() || has_safetensors(&absolute)) {
            return Ok(Self::Directory(absolute));
        }
        match (gguf.pop(), gguf.as_slice()) {
            (Some(file), []) => Ok(Self::Gguf(absolute.join(file))),
            // Of a model in several files any one opens all.
            (Some(last), others) if others.iter().all(|other| are_shards(&last, other)) => {
                Ok(Self::Gguf(absolute.join(last)))
            }
            (Some(last), others) => {
                bail!("{}: several .gguf files are there; name one of {}, {last}", path.display(), others.join(", "))
            }
            (None, _) => {
                let cache = absolute.join("snapshots").is_dir();
                let hint = if cache {
                    "; it is a model in a cache: name one of the directories in its snapshots/"
                } else {
                    ""
                };
                bail!("{}: neither config.json nor a .gguf file is there{hint}", path.display())
            }
        }
    }
}

impl BaseModel {
    /// Loads a Hugging Face directory or a GGUF file, by whatever name. Weights are mapped, not read. A directory without
    /// safetensors that holds one .gguf file is that file, whether or not a `config.json` lies beside it.
    ///
    /// # Errors
    /// When a file is missing, damaged, or holds what this decoder does not compute; nothing is guessed.
    pub fn load(path: &Path) -> Result<Self> {
        let absolute = path.canonicalize().with_context(|| {
            format!("{}: {}", path.display(), broken_link(path).as_deref().unwrap_or("no such model"))
        })?;
        match Form::of(path, absolute)? {
            Form::Directory(directory) => Self::from_directory(&directory),
            Form::Gguf(file) => Self::from_gguf(&file, None),
        }
    }

    /// As [`BaseModel::load`] of a GGUF file, with the tokenizer of the model that it was made of: some have rules that are not read from
    /// such files.
    ///
    /// # Errors
    /// As [`BaseModel::load`].
    pub fn load_gguf_of(path: &Path, of: &Self) -> Result<Self> {
        Self::from_gguf(path, Some(of.tokenizer.clone()))
    }

    /// Whether a model can be loaded, as far as that is seen without reading its weights: its files are there, and their headers
    /// whole.
    ///
    /// # Errors
    /// As [`BaseModel::load`].
    pub fn inspect(path: &Path) -> Result<()> {
        match Form::of(path, path.canonicalize().with_context(|| path.display().to_string())?)? {
            Form::Directory(directory) => {
                Architecture::from_json(&directory.join("config.json"))?;
                map_directory(&directory)?;
                let tokenizer = directory.join("tokenizer.json");
                ensure!(tokenizer.exists(), "{}: not there", tokenizer.display());
            }
            Form::Gguf(file) => drop(Gguf::open(&file)?),
        }
        Ok(())
    }

    fn from_directory(dir: &Path) -> Result<Self> {
        let written = identities(&weight_files(dir)?);
        let mut architecture = Architecture::from_json(&dir.join("config.json"))?;
        let mut tensors = map_directory(dir)?;
        if architecture.family()?.part_of.is_some() {
            tensors = text_part(tensors);
        }
        if architecture.tie_word_embeddings && has_other_head(&tensors) {
            architecture.tie_word_embeddings = false;
        }
        let tokenizer = Arc::new(Tokenizer::from_dir(dir)?);
        let source =
            Tensorfile { tensors: &tensors, gguf: false, interleaved: false, offset: architecture.norm_offset };
        let modules = build_modules(&architecture, &source).with_context(|| dir.display().to_string())?;
        // transformers has a scale by the width, as Gemma's, in the type of the weights. Such a model was trained with what that rounds
        // it to. Other scales are factors of f32.
        let by_width = architecture.embedding_scale == (architecture.hidden_size as f64).sqrt();
        let embedding = modules.first().filter(|_| by_width).map(|module| module.weight.storage());
        let scale = architecture.embedding_scale as f32;
        architecture.embedding_scale = match embedding {
            Some(Storage::BF16) => f64::from(bf16::from_f32(scale).to_f32()),
            Some(Storage::F16) => f64::from(f16::from_f32(scale).to_f32()),
            _ => architecture.embedding_scale,
        };
        let model = Self::assemble(dir.to_owned(), architecture, modules, tokenizer, None)?;
        Ok(Self { files: weight_files(dir)?, written: Arc::new(written), ..model })
    }

    fn from_gguf(path: &Path, tokenizer: Option<Arc<Tokenizer>>) -> Result<Self> {
        let written = identities(&shard_paths(path));
        let gguf = Gguf::open(path)?;
        let place = || path.display().to_string();
        let architecture = Architecture::from_gguf(&gguf).with_context(place)?;
        let mapped = |tensor: &TensorInfo| (tensor.name.clone(), gguf.mapped(tensor));
        let tensors: Tensors =
            gguf.tensors().filter(|tensor| !architecture.is_rope(&tensor.name)).map(mapped).collect();
        let tokenizer = match tokenizer {
            Some(tokenizer) => tokenizer,
            None => Arc::new(Tokenizer::from_gguf(&gguf)?),
        };
        let interleaved = architecture.family()?.interleaved;
        let source = Tensorfile { tensors: &tensors, gguf: true, interleaved, offset: 0.0 };
        let modules = build_modules(&architecture, &source).with_context(place)?;
        // Of several files the first one stands for the model.
        let model = Self::assemble(gguf.path().to_owned(), architecture, modules, tokenizer, None)?;
        Ok(Self { files: gguf.files().map(Path::to_owned).collect(), written: Arc::new(written), ..model })
    }

    fn assemble(
        path: PathBuf,
        architecture: Architecture,
        modules: Vec<Module>,
        tokenizer: Arc<Tokenizer>,
        text_from: Option<PathBuf>,
    ) -> Result<Self> {
        let template = ChatTemplate::of_tokenizer(&tokenizer, text_from.as_deref().unwrap_or(&path))?;
        let by_path: HashMap<String, usize> =
            modules.iter().enumerate().map(|(index, module)| (module.info.path.clone(), index)).collect();
        let layers = architecture.layers.iter().enumerate();
        let layers = layers.map(|(number, layer)| LayerModules::new(number, layer, &by_path)).collect();
        let (source, files, digest, written) = (None, Vec::new(), OnceLock::new(), Arc::default());
        Ok(Self {
            path,
            source,
            files,
            architecture,
            modules,
            layers,
            tokenizer,
            template,
            text_from,
            by_path,
            digest,
            written,
        })
    }

    /// The same model with other modules, as after a merge.
    pub(crate) fn with_modules(&self, architecture: Architecture, modules: Vec<Module>) -> Result<Self> {
        let (tokenizer, text_from) = (self.tokenizer.clone(), self.text_from.clone());
        let model = Self::assemble(self.path.clone(), architecture, modules, tokenizer, text_from)?;
        Ok(Self { files: self.files.clone(), source: self.source.clone(), written: self.written.clone(), ..model })
    }

    /// The same model with the tokenizer and template that an adapter was trained with.
    pub(crate) fn with_tokenizer(&self, tokenizer: Tokenizer, adapter: &Path) -> Result<Self> {
        let (architecture, modules) = (self.architecture.clone(), self.modules.clone());
        let text_from = Some(adapter.to_owned());
        let model = Self::assemble(self.path.clone(), architecture, modules, Arc::new(tokenizer), text_from)?;
        let (files, source, digest) = (self.files.clone(), self.source.clone(), self.digest.clone());
        Ok(Self { files, source, digest, written: self.written.clone(), ..model })
    }

    /// The same model with its values stored otherwise. It keeps the digest of what was loaded: that is what tells bases apart.
    pub(crate) fn with_storage(&self, modules: Vec<Module>, digest: String) -> Result<Self> {
        let model = self.with_modules(self.architecture.clone(), modules)?;
        Ok(Self { digest: OnceLock::from(digest), ..model })
    }

    /// Whether its directory holds other parts beside the one that writes text. transformers loads the whole.
    ///
    /// # Errors
    /// When its `config.json` cannot be read again.
    pub fn is_part(&self) -> Result<bool> {
        let Some(whole) = self.architecture.family()?.part_of.filter(|_| self.path.is_dir()) else { return Ok(false) };
        let file = self.path.join("config.json");
        let config = parse_object(&file, &read_text(&file, SMALL_FILE_BYTES_MAX)?)?;
        Ok(config["model_type"] == whole)
    }

    /// Tells the system that the mapped pages of its weights need not stay in memory; they are read again when they are asked for.
    pub fn release(&self) {
        self.modules.iter().for_each(|module| module.weight.release());
    }

    /// What tells each of its files from others and from itself before it was written; `None` where one was written since it was mapped, or
    /// just before, or the system does not tell.
    pub(crate) fn identities(&self) -> Option<Vec<String>> {
        let mut all = Vec::with_capacity(self.files.len());
        for file in &self.files {
            let now = settled_identity(file)?;
            if self.written.get(file) != Some(&now) {
                return None;
            }
            all.push(now);
        }
        (!all.is_empty()).then_some(all)
    }

    /// Index of a module by its path.
    pub fn module_index(&self, path: &str) -> Option<usize> {
        self.by_path.get(path).copied()
    }

    /// What a strategy may know of this model.
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            model_type: self.architecture.model_type.clone(),
            modules: self.modules.iter().map(|module| module.info.clone()).collect(),
        }
    }

    /// Number of values in all weights and biases; tied ones count once.
    pub fn parameter_count(&self) -> usize {
        let mut seen = BTreeSet::new();
        let unique = self.modules.iter().filter(|module| seen.insert(&module.info.storage));
        let count = |module: &Module| {
            module.weight.rows() * module.weight.cols() + module.bias.as_ref().map_or(0, |bias| bias.len())
        };
        unique.map(count).sum()
    }

    /// Bytes of all weights as they are stored; tied ones count once.
    pub fn stored_bytes(&self) -> usize {
        let mut seen = BTreeSet::new();
        let unique = self.modules.iter().filter(|module| seen.insert(&module.info.storage));
        unique.map(|module| module.weight.stored_bytes()).sum()
    }

    /// Storages in use, for the line that restates a run, e.g. `Q4_1`.
    pub fn storage_words(&self) -> String {
        let mut bytes: BTreeMap<String, usize> = BTreeMap::new();
        for module in &self.modules {
            *bytes.entry(module.weight.storage_name()).or_default() += module.weight.stored_bytes();
        }
        // That of the linear layers says more than that of an embedding, which codecs leave alone.
        let linear = self.layers.first().map(|layer| self.modules[layer.down].weight.storage_name());
        let largest = bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(storage, _)| storage);
        linear.or(largest).unwrap_or_default()
    }

    /// A digest of the values that were loaded, however they are stored since: SHA-256 over each module's path, shape, bias and up to
    /// 16 evenly spaced rows as f32. It tells models apart that differ in any sampled row, which any training changes; an
    /// edit of single rows elsewhere goes unseen.
    pub fn digest(&self) -> String {
        self.digest.get_or_init(|| self.digest_of_values()).clone()
    }

    fn digest_of_values(&self) -> String {
        let sampled = |rows: usize| {
            let samples = rows.min(16);
            (0..samples).map(move |sample| sample * rows / samples)
        };
        // All are read at once, and nothing around them.
        for module in &self.modules {
            sampled(module.weight.rows()).for_each(|row| module.weight.will_need_row(row));
        }
        let mut hash = Sha256::new();
        for module in &self.modules {
            let (rows, cols) = (module.weight.rows(), module.weight.cols());
            hash.update(format!("{} {rows} {cols}\n", module.info.path));
            for row in sampled(rows) {
                module.weight.decode(row..row + 1).iter().for_each(|value| hash.update(value.to_le_bytes()));
            }
            // Around each row the system may have mapped two megabytes.
            module.weight.release();
            for value in module.bias.iter().flat_map(|bias| bias.iter()) {
                hash.update(value.to_le_bytes());
            }
        }
        let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{hex}")
    }
}

/// Tensors, and what their names and values are.
struct Tensorfile<'a> {
    tensors: &'a Tensors,
    /// Whether names are llama.cpp's, and biases are where there is a tensor for them.
    gguf: bool,
    /// Whether the rows of q and k are interleaved head by head.
    interleaved: bool,
    /// What is added to norms.
    offset: f32,
}

/// Builds all modules from tensors; what is missing, left over or of another shape is an error, all problems together.
fn build_modules(architecture: &Architecture, source: &Tensorfile<'_>) -> Result<Vec<Module>> {
    let mut builder = Builder { source, used: BTreeSet::new(), problems: Vec::new(), modules: Vec::new() };
    let head_dim = architecture.layers.first().map_or(2, |layer| layer.attention().head_dim);
    for spec in architecture.modules() {
        let turned = source.interleaved && spec.turns;
        builder.add(&spec, if turned { RowOrder::Interleaved { head_dim } } else { RowOrder::Natural });
    }
    if architecture.tie_word_embeddings {
        builder.used.insert(format!("{}.weight", if source.gguf { "output" } else { HEAD }));
        if let Some(embedding) = builder.modules.first().filter(|module| module.info.path == EMBEDDING).cloned() {
            let info = ModuleInfo {
                path: HEAD.to_owned(),
                kind: ModuleKind::Linear,
                d_in: architecture.hidden_size,
                d_out: architecture.vocab_size,
                output_embedding: true,
                ..embedding.info.clone()
            };
            builder.modules.push(Module { info, ..embedding });
        }
    }
    let Builder { used, mut problems, modules, .. } = builder;
    let left = source.tensors.keys().filter(|name| !used.contains(*name) && !name.ends_with("rotary_emb.inv_freq"));
    problems.extend(left.map(|name| {
        if source.gguf {
            return format!("unknown tensor `{name}`");
        }
        let flags = architecture.model_type == "llama" && name.ends_with("_proj.bias");
        let unless = if flags { " whose config.json has neither `attention_bias` nor `mlp_bias` for it" } else { "" };
        format!("tensor `{name}` has no place in a {} model{unless}", architecture.model_type)
    }));
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(8);
        problems.truncate(8);
        let rest = if more > 0 { format!("\n  and {more} more") } else { String::new() };
        bail!("its tensors do not fit its configuration:\n  {}{rest}", problems.join("\n  "));
    }
    Ok(modules)
}

struct Builder<'a> {
    source: &'a Tensorfile<'a>,
    used: BTreeSet<String>,
    problems: Vec<String>,
    modules: Vec<Module>,
}

impl Builder<'_> {
    fn add(&mut self, spec: &ModuleSpec, order: RowOrder) {
        let mut info = ModuleInfo {
            path: spec.path.clone(),
            kind: spec.kind,
            d_in: spec.d_in,
            d_out: spec.d_out,
            bias: false,
            storage: spec.path.clone(),
            output_embedding: spec.path == HEAD,
        };
        let stem = if self.source.gguf { &spec.gguf } else { &spec.path };
        let Some(mut weight) = self.weight(&format!("{stem}.weight"), &info.weight_shape(), order) else { return };
        if spec.kind == ModuleKind::Norm && self.source.offset != 0.0 {
            let values: Vec<f32> = weight.decode(0..1).iter().map(|w| w + self.source.offset).collect();
            weight = Weight::from_values(&values, (1, values.len())).expect("there are as many values as before");
        }
        let mut bias = None;
        let name = format!("{stem}.bias");
        let biased = if self.source.gguf { self.source.tensors.contains_key(&name) } else { spec.bias };
        if spec.kind == ModuleKind::Linear && biased {
            let Some(values) = self.weight(&name, &[spec.d_out], RowOrder::Natural) else { return };
            // A bias is stored in the order of its weight's rows.
            let values = values.decode(0..1);
            bias = Some(Arc::new((0..spec.d_out).map(|row| values[order.stored(row)]).collect()));
            info.bias = true;
        }
        self.modules.push(Module { info, weight: Arc::new(weight), bias });
    }

    fn weight(&mut self, name: &str, shape: &[usize], order: RowOrder) -> Option<Weight> {
        let tensors = self.source.tensors;
        self.used.insert(name.to_owned());
        let Some(tensor) = tensors.get(name) else {
            self.problems.push(format!("tensor `{name}` is missing"));
            return None;
        };
        let coded = match tensor.storage {
            Storage::Coded => bitsandbytes::weight(tensors, name, shape),
            _ => Ok(None),
        };
        match coded {
            Ok(None) => {}
            Ok(Some((weight, parts))) => {
                self.used.extend(parts);
                return Some(weight);
            }
            Err(error) => {
                self.problems.push(format!("tensor `{name}`: {error:#}"));
                return None;
            }
        }
        if tensor.shape != shape {
            self.problems.push(format!("tensor `{name}` is {:?}, it should be {shape:?}", tensor.shape));
            return None;
        }
        let (rows, cols) = match *shape {
            [rows, cols] => (rows, cols),
            _ => (1, shape.iter().product()),
        };
        let weight = Weight::mapped(tensor.map.clone(), tensor.range.clone(), tensor.storage, (rows, cols), order);
        weight.map_err(|error| self.problems.push(format!("tensor `{name}`: {error}"))).ok()
    }
}

/// What tells files from others, of those of which that is known.
fn identities(files: &[PathBuf]) -> HashMap<PathBuf, String> {
    files.iter().filter_map(|file| Some((file.clone(), settled_identity(file)?))).collect()
}

/// Names of the .gguf files in a directory, sorted.
fn gguf_files(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("{}: cannot list", dir.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_gguf = |name: &String| Path::new(name).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    let mut names: Vec<String> = names.filter(is_gguf).collect();
    names.sort();
    Ok(names)
}

/// Whether two files are of one model, by their names.
fn are_shards(a: &str, b: &str) -> bool {
    matches!((ShardName::of(a), ShardName::of(b)), (Some(a), Some(b)) if a.is_beside(&b))
}

/// Whether a head lies beside the embedding that it is said to be tied to, and holds other values: then transformers does not tie them.
fn has_other_head(tensors: &Tensors) -> bool {
    let weight = |path: &str| tensors.get(&format!("{path}.weight"));
    let both = weight(HEAD).zip(weight(EMBEDDING));
    both.is_some_and(|(head, embedding)| head.bytes() != embedding.bytes())
}

/// The tensors of the part that writes text, by the names that they have alone.
fn text_part(tensors: Tensors) -> Tensors {
    let whole = tensors.keys().any(|name| name.contains("language_model."));
    let own = |(name, tensor): (String, MappedTensor)| {
        let inner = name.strip_prefix("model.language_model.").or_else(|| name.strip_prefix("language_model.model."));
        let outer = name.strip_prefix("language_model.").unwrap_or(&name);
        match inner {
            Some(inner) => Some((format!("model.{inner}"), tensor)),
            None if outer.starts_with("lm_head.") => Some((outer.to_owned(), tensor)),
            None => None,
        }
    };
    if whole { tensors.into_iter().filter_map(own).collect() } else { tensors }
}
