//! What sentence-transformers computes behind the encoder: pooling, dense layers, normalisation, and the prompt before a text.
//!
//! Sources: `modules.json`, `sentence_bert_config.json`, `config_sentence_transformers.json` and the modules' own `config.json`, as
//! sentence-transformers 2 to 6 write and read them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::files::tensors::map_safetensors;
use crate::files::{SMALL_FILE_BYTES_MAX, is_named, parse_object, read_text};

/// What sentence-transformers says of prompts, and of the kind of the model.
pub const PROMPTS_FILE: &str = "config_sentence_transformers.json";
/// The list of modules of a sentence-transformers directory.
pub const MODULES_FILE: &str = "modules.json";

/// What it says of its encoder, under the names that there were.
pub const SENTENCE_FILES: [&str; 4] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_xlm-roberta_config.json",
];

/// Most modules that are read.
const MODULES_MAX: usize = 16;
/// Widest vector that is made.
const DIMENSIONS_MAX: usize = 1 << 16;
/// Longest prompt, in bytes.
const PROMPT_BYTES_MAX: usize = 4096;

/// One vector of the vectors of a text's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// That of the first token.
    Cls,
    /// The largest value of each channel.
    Max,
    /// The mean.
    Mean,
    /// The sum, divided by the square root of the number of tokens.
    MeanSqrtLen,
}

/// `sentence_transformers` writes a flag for each, and vectors of several are joined in this order.
const POOLINGS: [(&str, &str, Option<Pooling>); 6] = [
    ("cls", "pooling_mode_cls_token", Some(Pooling::Cls)),
    ("max", "pooling_mode_max_tokens", Some(Pooling::Max)),
    ("mean", "pooling_mode_mean_tokens", Some(Pooling::Mean)),
    ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", Some(Pooling::MeanSqrtLen)),
    ("weightedmean", "pooling_mode_weightedmean_tokens", None),
    ("lasttoken", "pooling_mode_lasttoken", None),
];

/// A step behind pooling.
#[derive(Clone, Debug)]
pub enum Step {
    /// `y = f(W x + b)`.
    Dense(Dense),
    /// `y = x / |x|`.
    Normalize,
}

/// A dense layer: `W` (d_out, d_in), `b` (d_out).
#[derive(Clone, Debug)]
pub struct Dense {
    weight: Tensor,
    bias: Option<Tensor>,
    activation: DenseActivation,
}

#[derive(Clone, Copy, Debug)]
enum DenseActivation {
    Identity,
    Tanh,
    Relu,
    Gelu,
}

/// What stands around the encoder.
#[derive(Clone, Debug)]
pub struct Modules {
    /// How the vectors of tokens become that of a text; several are joined.
    pub poolings: Vec<Pooling>,
    /// What follows, in order.
    pub steps: Vec<Step>,
    /// Width of the vector that comes out.
    pub dimensions: usize,
    /// `max_seq_length`, where it is given.
    pub max_seq_length: Option<usize>,
    /// `do_lower_case`: texts are made small letters first.
    pub lower_case: bool,
    /// What is put before every text.
    pub prompt: String,
}

impl Modules {
    /// Reads the modules around the encoder of a directory, whose tokens are `hidden_size` wide. A directory without `modules.json` is
    /// an encoder alone: as in sentence-transformers, its vector is the mean, and is not normalised.
    ///
    /// # Errors
    /// When a file is damaged, or names what is not computed here.
    pub fn from_dir(dir: &Path, hidden_size: usize) -> Result<Self> {
        let mut modules = Self {
            poolings: vec![Pooling::Mean],
            steps: Vec::new(),
            dimensions: hidden_size,
            max_seq_length: None,
            lower_case: false,
            prompt: String::new(),
        };
        let path = dir.join(MODULES_FILE);
        if !is_named(&path)? {
            return Ok(modules);
        }
        let text = read_text(&path, SMALL_FILE_BYTES_MAX)?;
        let list: Value = serde_json::from_str(&text).with_context(|| format!("{}: not JSON", path.display()))?;
        modules.read_list(dir, &list, hidden_size).with_context(|| path.display().to_string())?;
        modules.read_text_side(dir)?;
        Ok(modules)
    }

    fn read_list(&mut self, dir: &Path, list: &Value, hidden_size: usize) -> Result<()> {
        let list = list.as_array().context("it is not a list of modules")?;
        ensure!(list.len() <= MODULES_MAX, "{} modules, at most {MODULES_MAX} are read", list.len());
        let kind = |module: &Value| -> Result<String> {
            let kind = module["type"].as_str().context("a module has no `type`")?;
            let ours = kind.starts_with("sentence_transformers.");
            ensure!(ours, "the module `{kind}` is not one of sentence-transformers, and its code is not run");
            Ok(kind.rsplit('.').next().unwrap_or(kind).to_owned())
        };
        let kinds = list.iter().map(kind).collect::<Result<Vec<String>>>()?;
        ensure!(
            matches!(kinds.as_slice(), [first, second, ..] if first == "Transformer" && second == "Pooling"),
            "its modules are {}; a Transformer and a Pooling are read, with Dense and Normalize behind them",
            kinds.join(", ")
        );
        let place = |module: &Value| -> Result<PathBuf> { Ok(dir.join(path_of(module)?)) };
        let encoder = place(&list[0])?;
        ensure!(
            encoder == dir.join(""),
            "its Transformer lies in {}; one that lies beside modules.json is read",
            encoder.display()
        );
        self.read_pooling(&place(&list[1])?, hidden_size)?;
        for (module, kind) in list.iter().zip(&kinds).skip(2) {
            match kind.as_str() {
                "Normalize" => self.steps.push(Step::Normalize),
                "Dense" => self.read_dense(&place(module)?)?,
                other => bail!("the module {other} is not supported; Dense and Normalize are"),
            }
        }
        Ok(())
    }

    fn read_pooling(&mut self, dir: &Path, hidden_size: usize) -> Result<()> {
        let (path, config) = read_config(dir)?;
        let read = || -> Result<Vec<Pooling>> {
            for (key, value) in config.as_object().into_iter().flatten() {
                let known = ["word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"];
                let flag = POOLINGS.iter().any(|(_, flag, _)| flag == key);
                ensure!(flag || known.contains(&key.as_str()), "`{key}` = {value} is not supported");
            }
            let width = config.get("word_embedding_dimension").or_else(|| config.get("embedding_dimension"));
            let width = width.and_then(Value::as_u64);
            ensure!(
                width.is_none_or(|width| width == hidden_size as u64),
                "it pools {} channels, and the encoder has {hidden_size}",
                width.unwrap_or_default()
            );
            // It matters only where a prompt is put before texts.
            let include = config.get("include_prompt").map_or(Some(true), Value::as_bool);
            ensure!(include == Some(true), "`include_prompt` = false is not supported");
            let names: Vec<&str> = match &config["pooling_mode"] {
                Value::String(name) => vec![name],
                Value::Array(names) => names.iter().map(|name| name.as_str().unwrap_or_default()).collect(),
                Value::Null => {
                    let set = POOLINGS.iter().filter(|(_, flag, _)| config[*flag] == true);
                    set.map(|(name, ..)| *name).collect()
                }
                other => bail!("`pooling_mode` = {other} is not a name"),
            };
            ensure!(names.len() <= POOLINGS.len(), "{} poolings", names.len());
            let pooling = |name: &&str| {
                let known = POOLINGS.iter().find(|(known, ..)| known == name).and_then(|(.., pooling)| *pooling);
                known.with_context(|| {
                    format!("the pooling `{name}` is not supported; cls, max, mean and mean_sqrt_len_tokens are")
                })
            };
            let poolings = names.iter().map(pooling).collect::<Result<Vec<_>>>()?;
            Ok(if poolings.is_empty() { vec![Pooling::Mean] } else { poolings })
        };
        self.poolings = read().with_context(|| path.display().to_string())?;
        self.dimensions = self.poolings.len() * hidden_size;
        Ok(())
    }

    fn read_dense(&mut self, dir: &Path) -> Result<()> {
        let (path, config) = read_config(dir)?;
        let place = || path.display().to_string();
        let size = |key: &str| -> Result<usize> {
            let size = config[key].as_u64().and_then(|size| usize::try_from(size).ok());
            let size = size.filter(|size| (1..=DIMENSIONS_MAX).contains(size));
            size.with_context(|| format!("{}: `{key}` = {} is not a size", path.display(), config[key]))
        };
        let (d_in, d_out) = (size("in_features")?, size("out_features")?);
        ensure!(d_in == self.dimensions, "{}: it takes {d_in} channels, and gets {}", place(), self.dimensions);
        for key in ["module_input_name", "module_output_name"] {
            let name = config.get(key).filter(|name| !name.is_null());
            let usual = name.is_none_or(|name| name == "sentence_embedding");
            ensure!(usual, "{}: `{key}` = {} is not supported", place(), config[key]);
        }
        let residual = config.get("use_residual").is_some_and(|residual| residual != false);
        ensure!(!residual, "{}: `use_residual` is not supported", place());
        let activation = match config["activation_function"].as_str().and_then(|name| name.rsplit('.').next()) {
            Some("Identity") => DenseActivation::Identity,
            Some("Tanh") => DenseActivation::Tanh,
            Some("ReLU") => DenseActivation::Relu,
            Some("GELU") => DenseActivation::Gelu,
            _ => bail!(
                "{}: `activation_function` = {} is not supported; Identity, Tanh, ReLU and GELU are",
                place(),
                config["activation_function"]
            ),
        };
        let weights = dir.join("model.safetensors");
        ensure!(
            is_named(&weights)?,
            "{}: not there; its weights are read as safetensors only, which `SentenceTransformer(DIR).save(NEW_DIR)` writes",
            weights.display()
        );
        let tensors = map_safetensors(&weights)?;
        let tensor = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let tensor = tensors.get(name);
            let tensor = tensor.with_context(|| format!("{}: tensor `{name}` is missing", weights.display()))?;
            ensure!(
                tensor.shape == shape,
                "{}: tensor `{name}` is {:?}, it should be {shape:?}",
                weights.display(),
                tensor.shape
            );
            Ok(Tensor::from_vec(tensor.values()?, shape, &Device::Cpu)?)
        };
        let has_bias = config.get("bias").map_or(Some(true), Value::as_bool);
        let has_bias = has_bias.with_context(|| format!("{}: `bias` is neither true nor false", place()))?;
        let weight = tensor("linear.weight", &[d_out, d_in])?;
        let bias = has_bias.then(|| tensor("linear.bias", &[d_out])).transpose()?;
        self.steps.push(Step::Dense(Dense { weight, bias, activation }));
        self.dimensions = d_out;
        Ok(())
    }

    /// Reads what is done to a text before it becomes tokens.
    fn read_text_side(&mut self, dir: &Path) -> Result<()> {
        let encoder = SENTENCE_FILES.iter().find_map(|name| read_if_there(dir, name).transpose()).transpose()?;
        if let Some((path, config)) = encoder {
            let length = config.get("max_seq_length").filter(|length| !length.is_null());
            if let Some(length) = length {
                let read = length.as_u64().and_then(|length| usize::try_from(length).ok()).filter(|length| *length > 0);
                let read = read.with_context(|| format!("{}: `max_seq_length` = {length}", path.display()))?;
                self.max_seq_length = Some(read);
            }
            self.lower_case = config.get("do_lower_case") == Some(&Value::Bool(true));
            let task = config.get("transformer_task").filter(|task| !task.is_null());
            let usual = task.is_none_or(|task| task == "feature-extraction");
            ensure!(usual, "{}: `transformer_task` = {} is not supported", path.display(), config["transformer_task"]);
        }
        let Some((path, config)) = read_if_there(dir, PROMPTS_FILE)? else { return Ok(()) };
        let kind = config.get("model_type").filter(|kind| !kind.is_null());
        let usual = kind.is_none_or(|kind| kind == "SentenceTransformer");
        ensure!(
            usual,
            "{}: `model_type` = {}: it does not embed texts as one vector",
            path.display(),
            config["model_type"]
        );
        let truncated = config.get("truncate_dim").is_some_and(|dim| !dim.is_null());
        ensure!(!truncated, "{}: `truncate_dim` is not supported", path.display());
        if let Some(name) = config["default_prompt_name"].as_str() {
            let prompt = config["prompts"][name].as_str();
            let prompt = prompt.with_context(|| {
                format!("{}: `default_prompt_name` is {name:?}, which `prompts` has no text for", path.display())
            })?;
            ensure!(
                prompt.len() <= PROMPT_BYTES_MAX,
                "{}: its prompt has {} bytes, at most {PROMPT_BYTES_MAX} are read",
                path.display(),
                prompt.len()
            );
            prompt.clone_into(&mut self.prompt);
        }
        Ok(())
    }
}

/// The directories of a model's further modules, as `1_Pooling`, by what `modules.json` calls them. Empty without that file.
///
/// # Errors
/// When the file is damaged, or a path in it leads out of the directory.
pub fn module_directories(dir: &Path) -> Result<Vec<PathBuf>> {
    let path = dir.join(MODULES_FILE);
    if !is_named(&path)? {
        return Ok(Vec::new());
    }
    let text = read_text(&path, SMALL_FILE_BYTES_MAX)?;
    let list: Value = serde_json::from_str(&text).with_context(|| format!("{}: not JSON", path.display()))?;
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(list.len() <= MODULES_MAX, "{}: {} modules, at most {MODULES_MAX} are read", path.display(), list.len());
    let paths =
        list.iter().map(path_of).collect::<Result<Vec<PathBuf>>>().with_context(|| path.display().to_string())?;
    Ok(paths.into_iter().filter(|path| !path.as_os_str().is_empty()).collect())
}

/// The path that a module of the list has in the directory.
fn path_of(module: &Value) -> Result<PathBuf> {
    let path = module["path"].as_str().context("a module has no `path`")?;
    let plain = Path::new(path).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    ensure!(plain, "the module path `{path}` leads out of the directory");
    Ok(path.into())
}

fn read_config(dir: &Path) -> Result<(PathBuf, Value)> {
    let path = dir.join("config.json");
    let config = parse_object(&path, &read_text(&path, SMALL_FILE_BYTES_MAX)?)?;
    Ok((path, config))
}

fn read_if_there(dir: &Path, name: &str) -> Result<Option<(PathBuf, Value)>> {
    let path = dir.join(name);
    if !is_named(&path)? {
        return Ok(None);
    }
    let config = parse_object(&path, &read_text(&path, SMALL_FILE_BYTES_MAX)?)?;
    Ok(Some((path, config)))
}

impl Pooling {
    /// Appends the vector of a text to `pooled`, from those of its tokens, `hidden` (tokens, channels).
    pub fn pool(self, hidden: &[f32], channels: usize, pooled: &mut Vec<f32>) {
        let tokens = hidden.chunks_exact(channels);
        let n = tokens.len() as f32;
        let start = pooled.len();
        match self {
            Self::Cls => pooled.extend_from_slice(&hidden[..channels]),
            Self::Max => {
                pooled.resize(start + channels, f32::NEG_INFINITY);
                for token in tokens {
                    for (most, value) in pooled[start..].iter_mut().zip(token) {
                        *most = most.max(*value);
                    }
                }
            }
            Self::Mean | Self::MeanSqrtLen => {
                pooled.resize(start + channels, 0.0);
                for token in tokens {
                    for (sum, value) in pooled[start..].iter_mut().zip(token) {
                        *sum += value;
                    }
                }
                let divisor = if self == Self::Mean { n } else { n.sqrt() };
                pooled[start..].iter_mut().for_each(|sum| *sum /= divisor);
            }
        }
    }
}

impl Step {
    /// Takes vectors (texts, d_in) to (texts, d_out).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(Dense { weight, bias, activation }) => {
                let mut y = x.matmul(&weight.t()?)?; // (texts, d_out)
                if let Some(bias) = bias {
                    y = y.broadcast_add(bias)?;
                }
                Ok(match activation {
                    DenseActivation::Identity => y,
                    DenseActivation::Tanh => y.tanh()?,
                    DenseActivation::Relu => y.relu()?,
                    DenseActivation::Gelu => y.gelu_erf()?,
                })
            }
            Self::Normalize => {
                // As torch.nn.functional.normalize bounds it.
                let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?; // (texts, 1)
                Ok(x.broadcast_div(&norm)?)
            }
        }
    }
}
