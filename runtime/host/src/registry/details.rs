//! All that is known of one model: what its files say of its training, its base and itself.

use std::fs;
use std::path::Path;

use anyhow::Result;
use homeroom_engine::adapt::adapter::{CONFIG_FILE, read_manifest};
use homeroom_engine::embedding::EmbeddingModel;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text};
use homeroom_engine::models::BaseModel;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Entry, Lineage, list};

/// A model with all that is known of it.
#[derive(Debug, Serialize)]
pub struct Details {
    /// What `list-models` says of it.
    #[serde(flatten)]
    pub entry: Entry,
    /// Where it stands among the other models.
    pub lineage: Lineage,
    /// Version of the strategy's plugin.
    pub strategy_version: Option<String>,
    /// Digest of the base's values.
    pub base_digest: Option<String>,
    /// How the base's weights were stored in the training.
    pub base_storage: Option<String>,
    /// The strategy's options as they were given; of another program's adapter, those of its configuration.
    pub options: Map<String, Value>,
    /// Modules that are adapted, by the end of their names, or a pattern of them.
    pub target_modules: Value,
    /// Rank of the adapter.
    pub r: Option<u64>,
    /// How it was trained: the configuration of the loop.
    pub config: Map<String, Value>,
    /// Steps that were done.
    pub steps: Option<u64>,
    /// Whether the training was stopped before its end.
    pub interrupted: bool,
    /// Digest of the rows.
    pub data_digest: Option<String>,
    /// Digest of the chat template that was trained with.
    pub template_digest: Option<String>,
    /// Digest of the tokenizer that was trained with.
    pub tokenizer_digest: Option<String>,
    /// What a whole model is; `None` for an adapter, and for what cannot be loaded.
    pub model: Option<About>,
    /// What an embedding model makes.
    pub vectors: Option<Vectors>,
    /// Its files by name, and their bytes.
    pub files: Vec<(String, u64)>,
}

/// What a whole model is.
#[derive(Debug, Serialize)]
pub struct About {
    /// `model_type` of its configuration.
    pub model_type: String,
    /// Parameters.
    pub parameters: usize,
    /// How its weights are stored.
    pub storage: String,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Tokens that have an embedding.
    pub vocab_size: usize,
    /// Longest sequence that it was made for, in tokens.
    pub context: usize,
    /// Digest of its chat template, if it has one.
    pub template_digest: Option<String>,
}

/// What an embedding model makes of a text.
#[derive(Debug, Serialize)]
pub struct Vectors {
    /// `model_type` of its configuration.
    pub model_type: String,
    /// Width of a vector.
    pub dimensions: usize,
    /// Most tokens that are read of a text.
    pub max_tokens: usize,
}

impl Details {
    /// Reads them. A whole model is loaded, an embedding model with all its weights; what then fails is its `problem`.
    pub fn of(entry: Entry) -> Self {
        let lineage = list().map(|all| Lineage::of(&entry, &all)).unwrap_or_default();
        let mut details = Self {
            lineage,
            strategy_version: None,
            base_digest: None,
            base_storage: None,
            options: Map::new(),
            target_modules: Value::Null,
            r: None,
            config: Map::new(),
            steps: None,
            interrupted: false,
            data_digest: None,
            template_digest: None,
            tokenizer_digest: None,
            model: None,
            vectors: None,
            files: files(&entry.path),
            entry,
        };
        details.read_manifest();
        details.read_peft();
        if details.entry.problem.is_none()
            && let Err(error) = details.load()
        {
            details.entry.problem = Some(format!("{error:#}"));
        }
        details
    }

    /// Loads a whole model: what it is, and whether it can be run.
    fn load(&mut self) -> Result<()> {
        match self.entry.kind {
            "model" => self.model = Some(About::of(&BaseModel::load(&self.entry.path)?)),
            "embedding" => {
                let model = EmbeddingModel::load(&self.entry.path)?;
                let model_type = model.model_type().to_owned();
                self.vectors =
                    Some(Vectors { model_type, dimensions: model.dimensions(), max_tokens: model.max_tokens() });
            }
            _ => {}
        }
        Ok(())
    }

    fn read_manifest(&mut self) {
        let Ok(Some(manifest)) = read_manifest(&self.entry.path) else { return };
        let object = |value: &Value| value.as_object().cloned().unwrap_or_default();
        let filled = |text: String| Some(text).filter(|text| !text.is_empty());
        self.options = object(&manifest.training["options"]);
        self.config = object(&manifest.training["config"]);
        self.steps = manifest.training["result"]["steps"].as_u64();
        self.interrupted = manifest.training["result"]["interrupted"] == true;
        self.strategy_version = filled(manifest.strategy.version);
        self.base_digest = filled(manifest.base.digest);
        self.base_storage = filled(manifest.base.storage);
        self.data_digest = manifest.data_digest;
        self.template_digest = manifest.template_digest;
        self.tokenizer_digest = filled(manifest.tokenizer_digest);
    }

    /// What PEFT's configuration says: of a strategy's adapter the options as they were understood.
    fn read_peft(&mut self) {
        let text = read_text(&self.entry.path.join(CONFIG_FILE), SMALL_FILE_BYTES_MAX).ok();
        let config = text.and_then(|text| serde_json::from_str::<Map<String, Value>>(&text).ok());
        let Some(mut config) = config else { return };
        self.r = config.get("r").and_then(Value::as_u64);
        self.target_modules = config.remove("target_modules").unwrap_or_default();
        if let Value::Array(names) = &mut self.target_modules {
            // PEFT writes them in no order.
            names.sort_by_key(Value::to_string);
        }
        if self.options.is_empty() {
            let said = |value: &Value| match value {
                Value::Null | Value::Bool(false) => false,
                Value::Array(values) => !values.is_empty(),
                Value::Object(map) => !map.is_empty(),
                _ => true,
            };
            let elsewhere = ["base_model_name_or_path", "peft_type", "task_type", "inference_mode", "peft_version"];
            self.options = config.into_iter().filter(|(_, value)| said(value)).collect();
            self.options.retain(|key, _| !elsewhere.contains(&key.as_str()));
        }
    }
}

impl About {
    fn of(model: &BaseModel) -> Self {
        let config = &model.config;
        Self {
            model_type: config.model_type.clone(),
            parameters: model.parameter_count(),
            storage: model.storage_words(),
            layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            context: config.max_position_embeddings,
            template_digest: model.tokenizer.template_digest(),
        }
    }
}

/// The files of a model with their bytes, those that links lead to among them.
fn files(model: &Path) -> Vec<(String, u64)> {
    if model.is_file() {
        let name = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return vec![(name, fs::metadata(model).map_or(0, |about| about.len()))];
    }
    let entries = fs::read_dir(model).into_iter().flatten().flatten();
    let file = |entry: fs::DirEntry| {
        let about = fs::metadata(entry.path()).ok().filter(fs::Metadata::is_file)?;
        Some((entry.file_name().to_string_lossy().into_owned(), about.len()))
    };
    let mut files: Vec<_> = entries.filter_map(file).collect();
    files.sort();
    files
}
