//! A base known by its shapes: what its modules are and how their weights are stored, without a weight.

use std::collections::{BTreeSet, HashMap};

use homeroom_abi::plan::{ModelInfo, ModuleInfo, ModuleKind, Plan};
use homeroom_kernels::{Codec, Storage};
use serde_json::Value;

use crate::adapt::requantize::{is_float, kernel_codec};
use crate::models::architecture::{Architecture, EMBEDDING, HEAD, layer_path};
use crate::models::{BaseModel, LayerModules};
use crate::run::batch::pass_rows_of;

/// A base without its weights.
pub struct Sketch {
    /// What it computes.
    pub architecture: Architecture,
    pub(super) modules: Vec<Outline>,
    pub(super) layers: Vec<LayerModules>,
}

/// A module without its weight.
#[derive(Clone)]
pub(super) struct Outline {
    pub info: ModuleInfo,
    pub stored: Stored,
}

/// How a weight is stored.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    /// As values or blocks of this storage.
    As(Storage),
    Codec(Codec),
    /// By a codec of a plugin, in so many bytes, its blocks of so many values.
    Native(usize, usize),
}

impl Outline {
    pub(super) fn shape(&self) -> (usize, usize) {
        match *self.info.weight_shape().as_slice() {
            [rows, cols] => (rows, cols),
            _ => (1, self.info.d_out),
        }
    }

    /// Bytes of its weight.
    pub(super) fn bytes(&self) -> usize {
        let (rows, cols) = self.shape();
        match &self.stored {
            Stored::As(storage) => rows * cols.div_ceil(storage.block_len()) * storage.block_bytes(),
            Stored::Codec(codec) => codec.encoded_bytes(rows, cols),
            Stored::Native(bytes, _) => *bytes,
        }
    }

    /// Whether it is multiplied in integers where that is asked for.
    pub(super) fn multiplies_in_integers(&self) -> bool {
        let (rows, cols) = self.shape();
        match &self.stored {
            Stored::Codec(codec) => codec.multiplies_in_integers(rows, cols),
            // As a codec whose values are not on a line: by the length of its blocks.
            Stored::As(storage) => storage.block_len() <= 64 && Codec::nf4().multiplies_in_integers(rows, cols),
            Stored::Native(_, len) => *len <= 64 && Codec::nf4().multiplies_in_integers(rows, cols),
        }
    }

    fn is_coded(&self) -> bool {
        matches!(self.stored, Stored::Codec(_) | Stored::Native(..))
    }

    fn name(&self) -> String {
        match &self.stored {
            Stored::As(storage) => format!("{storage:?}").to_lowercase(),
            Stored::Codec(codec) => codec.name.clone(),
            Stored::Native(..) => "native".to_owned(),
        }
    }
}

/// Values of a block of a plugin's own codec, and its bytes, by the codec's name.
pub type NativeBlock<'a> = &'a dyn Fn(&str) -> Option<(usize, usize)>;

impl Sketch {
    /// What an architecture's weights are, stored as its configuration says: in its `dtype`, or as bitsandbytes stores them.
    pub fn of_architecture(architecture: Architecture) -> Self {
        let config = &architecture.config;
        let dtype = ["dtype", "torch_dtype"].into_iter().find_map(|key| config.get(key)?.as_str());
        let storage = match dtype {
            Some("bfloat16") => Storage::BF16,
            Some("float16") => Storage::F16,
            _ => Storage::F32,
        };
        let quantized = config.get("quantization_config").and_then(Value::as_object);
        let is_set = |name: &str| quantized.is_some_and(|config| config.get(name) == Some(&Value::Bool(true)));
        let codec = match (is_set("load_in_4bit"), is_set("load_in_8bit")) {
            (true, _) => Some(Codec::nf4()),
            (_, true) => Some(Codec::int8()),
            _ => None,
        };
        let outline = |info: ModuleInfo| {
            let linear = info.kind == ModuleKind::Linear && !info.output_embedding;
            let stored = match &codec {
                Some(codec) if linear => Stored::Codec(codec.clone()),
                _ if info.kind == ModuleKind::Norm && architecture.norm_offset != 0.0 => Stored::As(Storage::F32),
                _ => Stored::As(storage),
            };
            Outline { info, stored }
        };
        let mut modules: Vec<Outline> = Vec::new();
        for spec in architecture.modules() {
            modules.push(outline(ModuleInfo {
                storage: spec.path.clone(),
                output_embedding: spec.path == HEAD,
                path: spec.path,
                kind: spec.kind,
                d_in: spec.d_in,
                d_out: spec.d_out,
                bias: spec.bias,
            }));
        }
        if architecture.tie_word_embeddings {
            modules.push(outline(ModuleInfo {
                path: HEAD.to_owned(),
                kind: ModuleKind::Linear,
                d_in: architecture.hidden_size,
                d_out: architecture.vocab_size,
                bias: false,
                storage: EMBEDDING.to_owned(),
                output_embedding: true,
            }));
        }
        Self::new(architecture, modules)
    }

    /// A model that is there, as it is stored.
    pub fn of_model(model: &BaseModel) -> Self {
        let outline = |module: &crate::models::Module| {
            let weight = &module.weight;
            let stored = match (weight.codec(), weight.storage()) {
                (Some(codec), _) => Stored::Codec(codec.clone()),
                (None, Storage::Native) => Stored::Native(weight.stored_bytes(), weight.matrix().block_len()),
                (None, storage) => Stored::As(storage),
            };
            Outline { info: module.info.clone(), stored }
        };
        Self::new(model.architecture.clone(), model.modules.iter().map(outline).collect())
    }

    fn new(architecture: Architecture, modules: Vec<Outline>) -> Self {
        let by_path: HashMap<String, usize> =
            modules.iter().enumerate().map(|(index, module)| (module.info.path.clone(), index)).collect();
        let layers = architecture.layers.iter().enumerate();
        let layers = layers.map(|(number, layer)| LayerModules::new(number, layer, &by_path)).collect();
        Self { architecture, modules, layers }
    }

    /// What a strategy may know of it: as [`BaseModel::info`].
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            model_type: self.architecture.model_type.clone(),
            modules: self.modules.iter().map(|module| module.info.clone()).collect(),
        }
    }

    /// The same base stored as a plan asks for: what is quantised already keeps its storage, unless `requantize`.
    pub fn stored_as_planned(&self, plan: &Plan, requantize: bool, native: NativeBlock<'_>) -> Self {
        let modules = self.modules.iter().map(|module| {
            let mut module = module.clone();
            let encodes = match &module.stored {
                Stored::As(storage) => requantize || is_float(*storage),
                _ => false,
            };
            let path = &module.info.path;
            let codec = plan.stored.get(path).and_then(|codec| plan.codecs.get(*codec)).map(kernel_codec);
            let block = plan.stored_natively.get(path).and_then(|name| native(name));
            let (rows, cols) = module.shape();
            match (codec, block) {
                _ if !encodes => {}
                (Some(codec), _) => module.stored = Stored::Codec(codec),
                (None, Some((len, bytes))) => module.stored = Stored::Native(rows * cols / len.max(1) * bytes, len),
                (None, None) => {}
            }
            module
        });
        Self { architecture: self.architecture.clone(), modules: modules.collect(), layers: self.layers.clone() }
    }

    /// The same base with its first `count` layers alone.
    pub fn of_layers(&self, count: usize) -> Self {
        let mut architecture = self.architecture.clone();
        architecture.layers.truncate(count);
        let gone: Vec<String> = (count..self.architecture.layers.len()).map(|number| layer_path(number, "")).collect();
        let stays = |module: &&Outline| !gone.iter().any(|layer| module.info.path.starts_with(layer.as_str()));
        Self::new(architecture, self.modules.iter().filter(stays).cloned().collect())
    }

    /// Rows of a pass, where nothing else is said.
    pub fn pass_rows(&self) -> usize {
        pass_rows_of(self.is_coded())
    }

    /// Number of values in all weights and biases; tied ones count once.
    pub fn parameter_count(&self) -> usize {
        self.unique()
            .map(|module| {
                let (rows, cols) = module.shape();
                rows * cols + if module.info.bias { module.info.d_out } else { 0 }
            })
            .sum()
    }

    /// Bytes of all weights as they are stored; tied ones count once. Biases are held in f32.
    pub fn stored_bytes(&self) -> usize {
        let bias = |module: &Outline| if module.info.bias { size_of::<f32>() * module.info.d_out } else { 0 };
        self.unique().map(|module| module.bytes() + bias(module)).sum()
    }

    /// Bytes of the weights that are behind a codec, which lie in memory of the program's own.
    pub(super) fn encoded_bytes(&self) -> usize {
        self.unique().filter(|module| module.is_coded()).map(Outline::bytes).sum()
    }

    fn unique(&self) -> impl Iterator<Item = &Outline> {
        let mut seen = BTreeSet::new();
        self.modules.iter().filter(move |module| seen.insert(&module.info.storage))
    }

    /// Storage of its linear layers, e.g. `bf16`.
    pub fn storage_words(&self) -> String {
        self.layers.first().map(|layer| self.modules[layer.down].name()).unwrap_or_default()
    }

    /// Whether its linear layers are behind a codec.
    pub(super) fn is_coded(&self) -> bool {
        self.layers.first().is_some_and(|layer| self.modules[layer.down].is_coded())
    }

    pub(super) fn index(&self, path: &str) -> Option<usize> {
        self.modules.iter().position(|module| module.info.path == path)
    }
}
