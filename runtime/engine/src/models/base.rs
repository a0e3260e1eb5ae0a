//! A base model: its configuration, its frozen modules by Hugging Face path, its tokenizer and chat template.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::plan::{ModelInfo, ModuleInfo, ModuleKind};
use homeroom_kernels::{RowOrder, Storage};
use sha2::{Digest, Sha256};

use crate::files::bitsandbytes;
use crate::files::gguf::Gguf;
use crate::files::mapped::map_file;
use crate::files::tensors::{MappedTensor, Tensors, has_safetensors, map_directory, weight_files};
use crate::files::{broken_link, is_named};
use crate::models::config::{ModelConfig, RopeScaling};
use crate::models::weight::Weight;
use crate::run::batch::{PASS_ROWS, PASS_ROWS_CODED};
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;

/// Paths of modules outside the layers.
pub const EMBEDDING: &str = "model.embed_tokens";
/// The norm before the head.
pub const FINAL_NORM: &str = "model.norm";
/// The module that yields the logits.
pub const HEAD: &str = "lm_head";

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
    /// Its numbers.
    pub config: ModelConfig,
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

/// Indices into [`BaseModel::modules`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct LayerModules {
    pub input_norm: usize,
    pub q: usize,
    pub k: usize,
    pub v: usize,
    pub o: usize,
    pub post_norm: usize,
    pub gate: usize,
    pub up: usize,
    pub down: usize,
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
            // Its header says of how many files it is one.
            (Some(last), [first, ..]) if shard_of(&last).is_some() && shard_of(&last) == shard_of(first) => {
                Ok(Self::Gguf(absolute.join(first)))
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
            Form::Gguf(file) => Self::from_gguf(&file),
        }
    }

    /// Whether a model can be loaded, as far as that is seen without reading its weights: its files are there, and their headers
    /// whole.
    ///
    /// # Errors
    /// As [`BaseModel::load`].
    pub fn inspect(path: &Path) -> Result<()> {
        match Form::of(path, path.canonicalize().with_context(|| path.display().to_string())?)? {
            Form::Directory(directory) => {
                ModelConfig::from_json(&directory.join("config.json"))?;
                map_directory(&directory)?;
                let tokenizer = directory.join("tokenizer.json");
                ensure!(tokenizer.exists(), "{}: not there", tokenizer.display());
            }
            Form::Gguf(file) => drop(Gguf::open(&file)?),
        }
        Ok(())
    }

    fn from_directory(dir: &Path) -> Result<Self> {
        let config = ModelConfig::from_json(&dir.join("config.json"))?;
        let tensors = map_directory(dir)?;
        let tokenizer = Arc::new(Tokenizer::from_dir(dir)?);
        let natural = |_: &str| RowOrder::Natural;
        let biased = |path: &str| config.has_bias(path);
        let modules = build_modules(&config, &tensors, &natural, &biased).with_context(|| dir.display().to_string())?;
        let model = Self::assemble(dir.to_owned(), config, modules, tokenizer, None)?;
        Ok(Self { files: weight_files(dir)?, ..model })
    }

    fn from_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let place = || path.display().to_string();
        let mut config = ModelConfig::from_gguf(&gguf).with_context(place)?;
        let mut tensors = Tensors::new();
        for tensor in gguf.tensors() {
            let mapped = MappedTensor {
                map: gguf.map().clone(),
                range: tensor.range.clone(),
                shape: tensor.shape.clone(),
                storage: tensor.storage,
            };
            if tensor.name == "rope_freqs.weight" {
                config.rope_scaling = RopeScaling::Divisors(mapped.values()?);
                continue;
            }
            let name = hugging_face_name(&tensor.name)
                .with_context(|| format!("{}: unknown tensor `{}`", path.display(), tensor.name))?;
            tensors.insert(name, mapped);
        }
        if let RopeScaling::Divisors(divisors) = &config.rope_scaling {
            let (got, want) = (divisors.len(), config.head_dim / 2);
            ensure!(got == want, "{}: {got} rope divisors for {want} frequencies", path.display());
            ensure!(divisors.iter().all(|d| d.is_finite() && *d > 0.0), "{}: a rope divisor is not positive", place());
        }
        // llama.cpp's converter interleaves the halves of each head in q and k of this architecture.
        let interleaved = RowOrder::Interleaved { head_dim: config.head_dim };
        let permuted = config.model_type == "llama";
        let order = |name: &str| match permuted && (name.ends_with("q_proj") || name.ends_with("k_proj")) {
            true => interleaved,
            false => RowOrder::Natural,
        };
        let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf)?);
        let biased = |path: &str| tensors.contains_key(&format!("{path}.bias"));
        let modules = build_modules(&config, &tensors, &order, &biased).with_context(place)?;
        let model = Self::assemble(path.to_owned(), config, modules, tokenizer, None)?;
        Ok(Self { files: vec![path.to_owned()], ..model })
    }

    fn assemble(
        path: PathBuf,
        config: ModelConfig,
        modules: Vec<Module>,
        tokenizer: Arc<Tokenizer>,
        text_from: Option<PathBuf>,
    ) -> Result<Self> {
        let template = ChatTemplate::of_tokenizer(&tokenizer, text_from.as_deref().unwrap_or(&path))?;
        let by_path: HashMap<String, usize> =
            modules.iter().enumerate().map(|(index, module)| (module.info.path.clone(), index)).collect();
        let layers = (0..config.num_hidden_layers).map(|layer| {
            let at = |role: &str| by_path[&format!("model.layers.{layer}.{role}")];
            LayerModules {
                input_norm: at("input_layernorm"),
                q: at("self_attn.q_proj"),
                k: at("self_attn.k_proj"),
                v: at("self_attn.v_proj"),
                o: at("self_attn.o_proj"),
                post_norm: at("post_attention_layernorm"),
                gate: at("mlp.gate_proj"),
                up: at("mlp.up_proj"),
                down: at("mlp.down_proj"),
            }
        });
        let layers = layers.collect();
        let (source, files, digest) = (None, Vec::new(), OnceLock::new());
        Ok(Self { path, source, files, config, modules, layers, tokenizer, template, text_from, by_path, digest })
    }

    /// The same model with other modules, as after a merge.
    pub(crate) fn with_modules(&self, config: ModelConfig, modules: Vec<Module>) -> Result<Self> {
        let (tokenizer, text_from) = (self.tokenizer.clone(), self.text_from.clone());
        let model = Self::assemble(self.path.clone(), config, modules, tokenizer, text_from)?;
        Ok(Self { files: self.files.clone(), source: self.source.clone(), ..model })
    }

    /// The same model with the tokenizer and template that an adapter was trained with.
    pub(crate) fn with_tokenizer(&self, tokenizer: Tokenizer, adapter: &Path) -> Result<Self> {
        let (config, modules, text_from) = (self.config.clone(), self.modules.clone(), Some(adapter.to_owned()));
        let model = Self::assemble(self.path.clone(), config, modules, Arc::new(tokenizer), text_from)?;
        let (files, source, digest) = (self.files.clone(), self.source.clone(), self.digest.clone());
        Ok(Self { files, source, digest, ..model })
    }

    /// The same model with its values stored otherwise. It keeps the digest of what was loaded: that is what tells bases apart.
    pub(crate) fn with_storage(&self, modules: Vec<Module>, digest: String) -> Result<Self> {
        let model = self.with_modules(self.config.clone(), modules)?;
        Ok(Self { digest: OnceLock::from(digest), ..model })
    }

    /// Index of a module by its path.
    pub fn module_index(&self, path: &str) -> Option<usize> {
        self.by_path.get(path).copied()
    }

    /// What a strategy may know of this model.
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            model_type: self.config.model_type.clone(),
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

    /// Rows of a pass that training packs examples into. A base behind a codec is chosen for its memory, of which what a pass
    /// keeps is the most; decoding for more passes costs less than a tenth of the speed.
    pub fn pass_rows(&self) -> usize {
        let coded = |module: &Module| matches!(module.weight.storage(), Storage::Coded | Storage::Native);
        let coded = self.layers.first().is_some_and(|layer| coded(&self.modules[layer.down]));
        if coded { PASS_ROWS_CODED } else { PASS_ROWS }
    }

    /// A digest of the values that were loaded, however they are stored since: SHA-256 over each module's path, shape, bias and up to
    /// 16 evenly spaced rows as f32. It tells models apart that differ in any sampled row, which any training changes; an
    /// edit of single rows elsewhere goes unseen.
    pub fn digest(&self) -> String {
        self.digest.get_or_init(|| self.digest_of_values()).clone()
    }

    fn digest_of_values(&self) -> String {
        let mut hash = Sha256::new();
        for module in &self.modules {
            let (rows, cols) = (module.weight.rows(), module.weight.cols());
            hash.update(format!("{} {rows} {cols}\n", module.info.path));
            let samples = rows.min(16);
            for sample in 0..samples {
                let row = sample * rows / samples;
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

/// Builds all modules from tensors by their Hugging Face names, with a bias where `biased` says so; what is missing, left over or of
/// another shape is an error, all problems together.
fn build_modules(
    config: &ModelConfig,
    tensors: &Tensors,
    order: &dyn Fn(&str) -> RowOrder,
    biased: &dyn Fn(&str) -> bool,
) -> Result<Vec<Module>> {
    use ModuleKind::{Embedding, Linear, Norm};
    let hidden = config.hidden_size;
    let q_width = config.num_attention_heads * config.head_dim;
    let kv_width = config.num_key_value_heads * config.head_dim;
    let mut builder =
        Builder { tensors, order, biased, used: BTreeSet::new(), problems: Vec::new(), modules: Vec::new() };
    builder.add(EMBEDDING, Embedding, config.vocab_size, hidden);
    for layer in 0..config.num_hidden_layers {
        let mut add =
            |role: &str, kind, d_in, d_out| builder.add(&format!("model.layers.{layer}.{role}"), kind, d_in, d_out);
        add("input_layernorm", Norm, hidden, hidden);
        add("self_attn.q_proj", Linear, hidden, q_width);
        add("self_attn.k_proj", Linear, hidden, kv_width);
        add("self_attn.v_proj", Linear, hidden, kv_width);
        add("self_attn.o_proj", Linear, q_width, hidden);
        add("post_attention_layernorm", Norm, hidden, hidden);
        add("mlp.gate_proj", Linear, hidden, config.intermediate_size);
        add("mlp.up_proj", Linear, hidden, config.intermediate_size);
        add("mlp.down_proj", Linear, config.intermediate_size, hidden);
    }
    builder.add(FINAL_NORM, Norm, hidden, hidden);
    if config.tie_word_embeddings {
        builder.used.insert(format!("{HEAD}.weight"));
        if let Some(embedding) = builder.modules.first().filter(|module| module.info.path == EMBEDDING).cloned() {
            let info = ModuleInfo {
                path: HEAD.to_owned(),
                kind: Linear,
                d_in: hidden,
                d_out: config.vocab_size,
                output_embedding: true,
                ..embedding.info.clone()
            };
            builder.modules.push(Module { info, ..embedding });
        }
    } else {
        builder.add(HEAD, Linear, hidden, config.vocab_size);
    }
    let Builder { used, mut problems, modules, .. } = builder;
    let left = tensors.keys().filter(|name| !used.contains(*name) && !name.ends_with("rotary_emb.inv_freq"));
    problems.extend(left.map(|name| {
        let flags = config.model_type == "llama" && name.ends_with("_proj.bias");
        let unless = if flags { " whose config.json has neither `attention_bias` nor `mlp_bias` for it" } else { "" };
        format!("tensor `{name}` has no place in a {} model{unless}", config.model_type)
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
    tensors: &'a Tensors,
    order: &'a dyn Fn(&str) -> RowOrder,
    biased: &'a dyn Fn(&str) -> bool,
    used: BTreeSet<String>,
    problems: Vec<String>,
    modules: Vec<Module>,
}

impl Builder<'_> {
    fn add(&mut self, path: &str, kind: ModuleKind, d_in: usize, d_out: usize) {
        let mut info = ModuleInfo {
            path: path.to_owned(),
            kind,
            d_in,
            d_out,
            bias: false,
            storage: path.to_owned(),
            output_embedding: path == HEAD,
        };
        let Some(weight) = self.weight(&format!("{path}.weight"), &info.weight_shape(), (self.order)(path)) else {
            return;
        };
        let mut bias = None;
        if kind == ModuleKind::Linear && (self.biased)(path) {
            let Some(values) = self.weight(&format!("{path}.bias"), &[d_out], RowOrder::Natural) else { return };
            // A bias is stored in the order of its weight's rows.
            let values = values.decode(0..1);
            let order = (self.order)(path);
            bias = Some(Arc::new((0..d_out).map(|row| values[order.stored(row)]).collect()));
            info.bias = true;
        }
        self.modules.push(Module { info, weight: Arc::new(weight), bias });
    }

    fn weight(&mut self, name: &str, shape: &[usize], order: RowOrder) -> Option<Weight> {
        self.used.insert(name.to_owned());
        let Some(tensor) = self.tensors.get(name) else {
            self.problems.push(format!("tensor `{name}` is missing"));
            return None;
        };
        let coded = match tensor.storage {
            Storage::Coded => bitsandbytes::weight(self.tensors, name, shape),
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

/// Names of the .gguf files in a directory, sorted.
fn gguf_files(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("{}: cannot list", dir.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_gguf = |name: &String| Path::new(name).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    let mut names: Vec<String> = names.filter(is_gguf).collect();
    names.sort();
    Ok(names)
}

/// What the files of one split model have in common: the name before `-00001-of-00003.gguf`.
fn shard_of(name: &str) -> Option<&str> {
    let (front, of) = name.get(..name.len().checked_sub(".gguf".len())?)?.rsplit_once("-of-")?;
    let (front, number) = front.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(of) && digits(number)).then_some(front)
}

/// The Hugging Face name of a llama.cpp tensor.
fn hugging_face_name(name: &str) -> Option<String> {
    let (stem, ending) = name.rsplit_once('.')?;
    let path = match stem {
        "token_embd" => EMBEDDING.to_owned(),
        "output_norm" => FINAL_NORM.to_owned(),
        "output" => HEAD.to_owned(),
        _ => {
            let (layer, role) = stem.strip_prefix("blk.")?.split_once('.')?;
            let role = match role {
                "attn_norm" => "input_layernorm",
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "ffn_norm" => "post_attention_layernorm",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                _ => return None,
            };
            format!("model.layers.{}.{role}", layer.parse::<u32>().ok()?)
        }
    };
    Some(format!("{path}.{ending}"))
}
