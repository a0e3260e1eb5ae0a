//! The fields of a `config.json`, read by name: what a family does not read, and would change what is computed, is refused.

use std::cell::RefCell;
use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::architecture::{Architecture, Gate, LayerShape, LayerSpec};
use super::rope::{Rope, RopeScaling};

/// Fields that change what a decoder computes, with the values that change nothing. Lists of layers' kinds change nothing where all
/// are of the usual kind. Fields that act in training only, as `attention_dropout`, are not among them.
const COMPUTING: [(&str, &[&str]); 34] = [
    ("hidden_act", &["\"silu\""]),
    ("hidden_activation", &["\"silu\""]),
    ("partial_rotary_factor", &["1.0", "1"]),
    ("use_sliding_window", &["false"]),
    ("use_mrope", &["false"]),
    ("attention_multiplier", &[]),
    ("embedding_multiplier", &["1.0", "1"]),
    ("residual_multiplier", &["1.0", "1"]),
    ("logits_scaling", &["1.0", "1"]),
    ("logit_scale", &["1.0", "1"]),
    ("attn_logit_softcapping", &[]),
    ("final_logit_softcapping", &[]),
    ("query_pre_attn_scalar", &[]),
    ("use_bidirectional_attention", &["false"]),
    ("layer_types", &[]),
    ("no_rope_layers", &[]),
    ("rope_local_base_freq", &[]),
    ("rope_layer_index", &[]),
    ("position_embedding_type", &["\"rope\""]),
    ("num_experts", &["0"]),
    ("num_local_experts", &["0"]),
    ("n_routed_experts", &["0"]),
    ("clip_qkv", &[]),
    ("use_qk_norm", &["false"]),
    ("use_cache_kv_sharing", &["false"]),
    ("num_kv_shared_layers", &["0"]),
    ("attn_output_gate", &["false"]),
    ("kv_lora_rank", &["0"]),
    ("attention_chunk_size", &[]),
    ("attn_temperature_tuning", &["false"]),
    ("parallel_attn", &["false"]),
    ("original_max_position_embeddings", &[]),
    ("alibi", &["false"]),
    ("interleave_moe_layer_step", &["0"]),
];

/// A configuration, and what was read of it.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    defaults: &'static [(&'static str, usize)],
    read: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Fields<'a> {
    /// Nothing is read yet. Sizes that are left out are those of `defaults`.
    pub fn new(map: &'a Map<String, Value>, defaults: &'static [(&'static str, usize)]) -> Self {
        Self { map, defaults, read: RefCell::default() }
    }

    /// A value; null is none.
    pub fn given(&self, key: &'static str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether a field is there, null or not.
    pub fn says(&self, key: &'static str) -> bool {
        self.read.borrow_mut().insert(key);
        self.map.contains_key(key)
    }

    /// A size, above zero.
    ///
    /// # Errors
    /// When it is missing or no size.
    pub fn size(&self, key: &'static str) -> Result<usize> {
        self.size_of(key)?.with_context(|| format!("`{key}` is missing"))
    }

    /// The same, or its default.
    ///
    /// # Errors
    /// When it is no size.
    pub fn size_or(&self, key: &'static str, default: usize) -> Result<usize> {
        Ok(self.size_of(key)?.unwrap_or(default))
    }

    /// The same, if it is given, or the family's default if the field is absent; null is none.
    ///
    /// # Errors
    /// When it is no size.
    pub fn size_of(&self, key: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.given(key) else {
            let default = self.defaults.iter().find(|(name, _)| *name == key && !self.map.contains_key(key));
            return Ok(default.map(|(_, size)| *size));
        };
        let size = value.as_u64().filter(|size| (1..=u64::from(u32::MAX)).contains(size));
        Ok(Some(size.with_context(|| format!("`{key}` = {value} is not a size"))? as usize))
    }

    /// A number, or its default.
    ///
    /// # Errors
    /// When it is no number.
    pub fn number_or(&self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.number_of(key)?.unwrap_or(default))
    }

    /// A number, if it is given.
    ///
    /// # Errors
    /// When it is no number.
    pub fn number_of(&self, key: &'static str) -> Result<Option<f64>> {
        let Some(value) = self.given(key) else { return Ok(None) };
        // JSON has no name for these, GGUF files do.
        let unusual = ["NaN", "inf", "-inf"].into_iter().find(|name| value == name).and_then(|name| name.parse().ok());
        Ok(Some(value.as_f64().or(unusual).with_context(|| format!("`{key}` is no number"))?))
    }

    /// A number that something is multiplied or divided by, or the default.
    ///
    /// # Errors
    /// When it is no number above zero that f32 holds.
    pub fn factor_or(&self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.factor_of(key)?.unwrap_or(default))
    }

    /// The same, if it is given.
    ///
    /// # Errors
    /// When it is no number above zero that f32 holds.
    pub fn factor_of(&self, key: &'static str) -> Result<Option<f64>> {
        let factor = self.number_of(key)?;
        let sound = |factor: f64| factor as f32 > 0.0 && (factor as f32).is_finite();
        if let Some(factor) = factor.filter(|factor| !sound(*factor)) {
            bail!("`{key}` = {factor}; it is a number above zero");
        }
        Ok(factor)
    }

    /// True or false, or the default.
    ///
    /// # Errors
    /// When it is neither.
    pub fn flag_or(&self, key: &'static str, default: bool) -> Result<bool> {
        let flag = self.given(key).map_or(Some(default), Value::as_bool);
        flag.with_context(|| format!("`{key}` is neither true nor false"))
    }

    /// A list, if it is given.
    ///
    /// # Errors
    /// When it is no list, or one of another length than there are layers.
    pub fn list_of(&self, key: &'static str, layers: usize) -> Result<Option<&'a [Value]>> {
        let Some(value) = self.given(key) else { return Ok(None) };
        let list = value.as_array().with_context(|| format!("`{key}` is not a list"))?;
        ensure!(list.len() == layers, "`{key}` has {} entries for {layers} layers", list.len());
        Ok(Some(list))
    }

    /// The function of the gated unit.
    ///
    /// # Errors
    /// When it is none that is computed.
    pub fn gate(&self, key: &'static str, default: Gate) -> Result<Gate> {
        match self.given(key) {
            None => Ok(default),
            Some(name) if name == "silu" => Ok(Gate::Silu),
            Some(name) if name == "gelu_pytorch_tanh" => Ok(Gate::GeluTanh),
            Some(name) => bail!("`{key}` = {name} is not supported"),
        }
    }

    /// The sizes of a layer. Without a default of the family there are as many key heads as query heads, which share the width.
    ///
    /// # Errors
    /// When one is missing or no size.
    pub fn shape(&self) -> Result<LayerShape> {
        let (hidden, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        Ok(LayerShape {
            hidden,
            heads,
            kv_heads: self.size_or("num_key_value_heads", heads)?,
            head_dim: self.size_or("head_dim", hidden / heads)?,
            inner: self.size("intermediate_size")?,
        })
    }

    /// The model's rope: `rope_parameters`, or the older `rope_theta` and `rope_scaling`, over whole heads.
    ///
    /// # Errors
    /// When it is of an unknown type or lacks a number.
    pub fn rope(&self, head_dim: usize, theta: f64) -> Result<Rope> {
        let parameters = self.rope_parameters();
        let own = self.number_of("rope_theta")?.unwrap_or(theta);
        self.rope_of(parameters, head_dim, own)
    }

    /// `rope_scaling`, or else `rope_parameters`: transformers takes the older field where both say something.
    pub fn rope_parameters(&self) -> Option<&'a Value> {
        let says = |key| self.given(key).filter(|value| value.as_object().is_none_or(|object| !object.is_empty()));
        let (older, newer) = (says("rope_scaling"), says("rope_parameters"));
        older.or(newer)
    }

    /// The rope of these parameters.
    ///
    /// # Errors
    /// As [`Fields::rope`].
    pub fn rope_of(&self, parameters: Option<&Value>, head_dim: usize, theta: f64) -> Result<Rope> {
        let number = |key: &'static str, default: f64| match parameters.and_then(|rope| rope.get(key)) {
            Some(value) if !value.is_null() => value.as_f64().with_context(|| format!("`{key}` is no number")),
            _ => Ok(default),
        };
        let theta = number("rope_theta", theta)?;
        let part = number("partial_rotary_factor", 1.0)?;
        ensure!(part == 1.0, "`partial_rotary_factor` = {part} is not supported");
        let context = self.size("max_position_embeddings")?;
        let scaling = parameters.map_or(Ok(RopeScaling::None), |rope| RopeScaling::of(rope, context))?;
        Ok(Rope { theta, dims: head_dim, scaling })
    }

    /// An architecture of these layers, and of what most families have: the rest as in Llama.
    ///
    /// # Errors
    /// When a number is missing or none.
    pub fn architecture(&self, tied: bool, ropes: Vec<Rope>, layers: Vec<LayerSpec>) -> Result<Architecture> {
        let mut context = self.size("max_position_embeddings")?;
        for rope in &ropes {
            // The length that it was trained for is the field's, the one that it reaches is this.
            if let RopeScaling::Dynamic { factor, original } = rope.scaling {
                let reached = factor * original;
                ensure!(
                    reached <= f64::from(u32::MAX),
                    "rope type `dynamic`: a `factor` of {factor} makes a context of {reached:e} tokens"
                );
                context = reached as usize;
            }
        }
        Ok(Architecture {
            model_type: self.given("model_type").and_then(Value::as_str).unwrap_or_default().to_owned(),
            vocab_size: self.size("vocab_size")?,
            hidden_size: self.size("hidden_size")?,
            max_position_embeddings: context,
            rms_norm_eps: self.number_or("rms_norm_eps", 1e-6)?,
            norm_offset: 0.0,
            embedding_scale: 1.0,
            logit_scale: 1.0,
            logit_cap: None,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", tied)?,
            ropes,
            layers,
            config: self.map.clone(),
        })
    }

    /// Number of layers.
    ///
    /// # Errors
    /// When it is missing, no size, or more than any model has.
    pub fn layers(&self) -> Result<usize> {
        let layers = self.size("num_hidden_layers")?;
        ensure!(layers <= 4096, "`num_hidden_layers` = {layers}; it is at most 4096");
        Ok(layers)
    }

    /// Refuses fields that change what is computed, and that the family did not read.
    ///
    /// # Errors
    /// Names the first.
    pub fn finish(&self) -> Result<()> {
        let read = self.read.borrow();
        for (key, neutral) in COMPUTING.iter().filter(|(key, _)| !read.contains(key)) {
            let Some(value) = self.map.get(*key).filter(|value| !value.is_null()) else { continue };
            let usual = |kind: &Value| kind == "full_attention" || kind == "attention" || kind == 1;
            let all_usual = value.as_array().is_some_and(|kinds| kinds.iter().all(usual));
            ensure!(all_usual || neutral.contains(&value.to_string().as_str()), "`{key}` = {value} is not supported");
        }
        Ok(())
    }
}
