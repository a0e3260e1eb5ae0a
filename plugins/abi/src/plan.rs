//! What a strategy adapts in a model: modules, their parameters, their recipes, and how the result is named in PEFT's files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::codec::Codec;
use crate::recipe::Recipe;

/// Input of [`crate::table::METHOD_PLAN`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanRequest {
    /// Options as the user gave them.
    pub options: Map<String, Value>,
    /// The model to adapt.
    pub model: ModelInfo,
}

/// What a strategy may know of a model: names and shapes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// `model_type` of `config.json`, e.g. `llama`.
    pub model_type: String,
    /// Modules in the order of the forward pass, by their Hugging Face paths.
    pub modules: Vec<ModuleInfo>,
}

/// One module of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModuleInfo {
    /// Hugging Face path, e.g. `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
    /// Input width; of an embedding the vocabulary's size.
    pub d_in: usize,
    /// Output width.
    pub d_out: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Modules with equal ids share one weight.
    pub storage: String,
    /// Whether it yields the logits.
    pub output_embedding: bool,
}

/// What a module computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModuleKind {
    /// `y = x Wᵀ + b`, W (d_out, d_in).
    Linear,
    /// `y = W[id]`, W (d_in, d_out).
    Embedding,
    /// `y = w ∘ x / rms(x)`, w (d_out).
    Norm,
}

impl ModuleInfo {
    /// Shape of the frozen weight.
    pub fn weight_shape(&self) -> Vec<usize> {
        match self.kind {
            ModuleKind::Linear => vec![self.d_out, self.d_in],
            ModuleKind::Embedding => vec![self.d_in, self.d_out],
            ModuleKind::Norm => vec![self.d_out],
        }
    }
}

/// A strategy's answer: one for each model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Adapted modules; all others stay as they are, and frozen.
    pub modules: Vec<AdaptedModule>,
    /// Recipes, each used by one module or many.
    pub recipes: Vec<Recipes>,
    /// Parameters of the model as a whole, which several modules use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub params: Vec<ParamSpec>,
    /// Numbers that recipes refer to by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scalars: BTreeMap<String, f64>,
    /// Optimizer groups that parameters refer to by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, Group>,
    /// Codecs that [`Plan::stored`] refers to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub codecs: Vec<Codec>,
    /// How frozen weights are to be stored: path of a module, adapted or not, to an index into [`Plan::codecs`]. It holds for
    /// weights that are floats; one that is quantised already keeps its storage, unless the user wants it otherwise.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub stored: BTreeMap<String, usize>,
    /// As [`Plan::stored`], by the plugin's native codec of that name, see [`crate::native`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub stored_natively: BTreeMap<String, String>,
    /// How the result is written as a PEFT adapter. Without it no `adapter_config.json` is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peft: Option<Peft>,
    /// What the strategy proposes where the user says nothing.
    #[serde(default)]
    pub defaults: Defaults,
}

/// One adapted module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdaptedModule {
    /// Hugging Face path.
    pub path: String,
    /// Index into [`Plan::recipes`].
    pub recipe: usize,
    /// The module's own parameters.
    pub params: Vec<ParamSpec>,
}

/// How a module computes, and what its weights amount to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipes {
    /// The module's output from `x`.
    pub forward: Recipe,
    /// The effective weight, for merge and export. `None`: the strategy cannot be merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged_weight: Option<Recipe>,
    /// The effective bias, where it is not the frozen one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged_bias: Option<Recipe>,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParamSpec {
    /// Name by which recipes refer to it.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Where its first values come from.
    pub init: Init,
    /// Whether it is trained; a frozen one is saved all the same.
    pub trainable: bool,
    /// Its name in the adapter's file.
    pub tensor: String,
    /// Shape in the adapter's file where that differs, with as many values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor_shape: Option<Vec<usize>>,
    /// Optimizer group, a key of [`Plan::groups`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What becomes of its values when a running training goes on with a plan that gives it another shape; `None`: such a
    /// plan is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrate: Option<Migrate>,
}

/// How the values of a parameter are taken over into another shape with as many dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Migrate {
    /// Into a larger one: what is new is zero.
    PadZero,
    /// Into a larger one: what is new has its first values.
    PadInit,
    /// Into a smaller one: the rest is dropped.
    Truncate,
}

/// First values of a parameter. Random ones depend on the seed and the parameter's name only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// 0.
    Zeros,
    /// 1.
    Ones,
    /// The same number everywhere.
    Constant(f64),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in ±sqrt(6 / ((1 + a²) fan_in)), fan_in being the last dimension; `a` = √5 gives ±1/√fan_in.
    KaimingUniform {
        /// Negative slope.
        a: f64,
    },
    /// A copy of the module's frozen weight, or of its bias when the shape is the bias's and the name is `bias`. Tied
    /// modules whose parameters start so share one parameter.
    Base,
    /// The Euclidean norm of each row of the frozen weight.
    BaseRowNorm,
}

/// An optimizer group: how its parameters differ from the rest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Factor on the learning rate.
    pub learning_rate_scale: f64,
    /// Weight decay, where it is not the run's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

/// Fields of PEFT's `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peft {
    /// `peft_type`, e.g. `LORA`.
    pub peft_type: String,
    /// The other fields that this type has, beside those that all types share.
    pub fields: Map<String, Value>,
}

/// What a strategy proposes where the user says nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Defaults {
    /// Peak learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Optimizer, e.g. `adamw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<String>,
    /// Type that products are computed in where the user says nothing: `f32`, `bf16` or `int8`, which is bf16 with products in
    /// integers where a frozen weight takes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_dtype: Option<String>,
}
