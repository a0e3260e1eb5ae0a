//! What a decoder's numbers are: read from `config.json` or from GGUF metadata, and refused by name where unknown.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use homeroom_kernels::Attention;
use serde_json::{Map, Value, json};

use crate::embedding::is_encoder;
use crate::files::gguf::Gguf;
use crate::files::{SMALL_FILE_BYTES_MAX, read_text};

/// The shape and constants of a Llama-family decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of `config.json`: `llama`, `mistral` or `qwen2`.
    pub model_type: String,
    /// Tokens that have an embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; query heads share them in equal groups.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the head's weight is the embedding's.
    pub tie_word_embeddings: bool,
    /// A query sees so many positions, its own included; `None`: all before it.
    pub sliding_window: Option<usize>,
    /// Whether a `llama` has biases on the query, key, value and output projections.
    pub attention_bias: bool,
    /// Whether a `llama` has biases in the feed-forward block.
    pub mlp_bias: bool,
}

/// How rotary frequencies are stretched for contexts longer than the first training's.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Llama 3.1's: low frequencies are divided by `factor`, high ones stay, those between are blended.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length of the first training.
        original: f64,
    },
    /// A divisor for each frequency, as GGUF files store Llama 3's.
    Divisors(Vec<f32>),
}

/// Fields that change what a decoder computes, with the only value that this decoder computes.
const FIXED_FIELDS: [(&str, &[&str]); 7] = [
    ("hidden_act", &["\"silu\""]),
    ("hidden_activation", &["\"silu\""]),
    ("partial_rotary_factor", &["1.0", "1"]),
    ("use_sliding_window", &["false"]),
    ("is_decoder", &["true", "false"]),
    ("use_mrope", &["false"]),
    ("attention_multiplier", &[]),
];

/// Widest head: some hundred times those that there are.
const HEAD_DIM_MAX: usize = 1 << 16;

impl ModelConfig {
    /// The shape of the attention over rows of these sequences.
    pub fn attention<'a>(&self, sequences: &'a [Range<usize>]) -> Attention<'a> {
        Attention {
            sequences,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            window: self.sliding_window,
            scale: (self.head_dim as f32).powf(-0.5),
            soft_cap: None,
        }
    }

    /// Reads `config.json` of a Hugging Face directory.
    ///
    /// # Errors
    /// When the file cannot be read, or says something that this decoder does not compute; all problems together.
    pub fn from_json(path: &Path) -> Result<Self> {
        let text = read_text(path, SMALL_FILE_BYTES_MAX)?;
        let config: Map<String, Value> =
            serde_json::from_str(&text).with_context(|| format!("{}: not a JSON object", path.display()))?;
        Self::from_map(&config).with_context(|| format!("{}: this model cannot be run", path.display()))
    }

    fn from_map(config: &Map<String, Value>) -> Result<Self> {
        let model_type = config.get("model_type").and_then(Value::as_str).context("`model_type` is missing")?;
        ensure!(
            !is_encoder(model_type),
            "`{model_type}` is an embedding model, which writes no text: it is not trained, asked or exported here; `homeroom serve` serves it at /v1/embeddings"
        );
        ensure!(
            matches!(model_type, "llama" | "mistral" | "qwen2"),
            "unknown architecture `{model_type}`; known are llama, mistral, qwen2"
        );
        let given = |key: &str| config.get(key).filter(|value| !value.is_null());
        if let Some(quantization) = given("quantization_config") {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            ensure!(
                method == "bitsandbytes",
                "its weights are quantised by `{method}`; use the unquantised model, or a GGUF file of it"
            );
        }
        for (key, allowed) in FIXED_FIELDS {
            if let Some(value) = given(key) {
                // Only Qwen2's configurations carry the switch together with a window that it turns off.
                ensure!(allowed.contains(&value.to_string().as_str()), "`{key}` = {value} is not supported");
            }
        }
        let number = |key: &str| -> Result<usize> {
            let value = given(key).with_context(|| format!("`{key}` is missing"))?;
            size(value.as_u64()).with_context(|| format!("`{key}` = {value} is not a size"))
        };
        let number_or = |key: &str, default: usize| if given(key).is_some() { number(key) } else { Ok(default) };
        let flag = |key: &str| {
            let flag = given(key).map_or(Some(false), Value::as_bool);
            flag.with_context(|| format!("`{key}` is neither true nor false"))
        };
        let hidden_size = number("hidden_size")?;
        let num_attention_heads = number("num_attention_heads")?;
        let rope = given("rope_parameters").or_else(|| given("rope_scaling"));
        let rope_theta = given("rope_theta").or_else(|| rope.and_then(|rope| rope.get("rope_theta")));
        let slides = model_type == "mistral" || given("use_sliding_window") == Some(&Value::Bool(true));
        let config = Self {
            model_type: model_type.to_owned(),
            vocab_size: number("vocab_size")?,
            hidden_size,
            intermediate_size: number("intermediate_size")?,
            num_hidden_layers: number("num_hidden_layers")?,
            num_attention_heads,
            // Null is as many as there are query heads; left out, the default of the family's class in transformers.
            num_key_value_heads: match (config.get("num_key_value_heads"), model_type) {
                (None, "mistral") => 8,
                (None, "qwen2") => 32,
                _ => number_or("num_key_value_heads", num_attention_heads)?,
            },
            head_dim: number_or("head_dim", hidden_size / num_attention_heads)?,
            rms_norm_eps: given("rms_norm_eps")
                .map_or(Some(1e-6), Value::as_f64)
                .context("`rms_norm_eps` is no number")?,
            rope_theta: rope_theta.map_or(Some(10_000.0), Value::as_f64).context("`rope_theta` is no number")?,
            rope_scaling: rope.map_or(Ok(RopeScaling::None), rope_scaling)?,
            max_position_embeddings: number_or("max_position_embeddings", 2048)?,
            tie_word_embeddings: flag("tie_word_embeddings")?,
            sliding_window: match config.get("sliding_window") {
                // `MistralConfig`'s own default, which a window that is null turns off.
                None if model_type == "mistral" => Some(4096),
                Some(window) if slides && !window.is_null() => Some(number("sliding_window")?),
                _ => None,
            },
            attention_bias: model_type == "llama" && flag("attention_bias")?,
            mlp_bias: model_type == "llama" && flag("mlp_bias")?,
        };
        config.check()?;
        Ok(config)
    }

    /// Reads the metadata of a GGUF file of a Llama-family model.
    ///
    /// # Errors
    /// When a key is missing or says something that this decoder does not compute.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let kind = gguf.str("general.type")?.unwrap_or("model");
        ensure!(
            kind == "model",
            "`general.type` is `{kind}`: the file belongs to a model and is none; name the model's"
        );
        let architecture = gguf.str("general.architecture")?.context("`general.architecture` is missing")?;
        ensure!(
            !is_encoder(architecture) && !architecture.ends_with("-bert"),
            "`{architecture}` is an embedding model, which is read as a directory of Hugging Face and not as a GGUF file"
        );
        ensure!(
            matches!(architecture, "llama" | "qwen2"),
            "unknown architecture `{architecture}`; known are llama, qwen2"
        );
        let key = |name: &str| format!("{architecture}.{name}");
        let number = |name: &str| -> Result<usize> {
            let value = gguf.u64(&key(name))?.with_context(|| format!("`{}` is missing", key(name)))?;
            size(Some(value)).with_context(|| format!("`{}` = {value} is not a size", key(name)))
        };
        let number_or = |name: &str, default: usize| match gguf.u64(&key(name))? {
            Some(_) => number(name),
            None => Ok(default),
        };
        ensure!(gguf.u64(&key("expert_count"))?.unwrap_or(0) == 0, "mixtures of experts are not supported");
        let scaling = gguf.str(&key("rope.scaling.type"))?;
        ensure!(
            scaling.is_none_or(|kind| kind == "none"),
            "rope type `{}` is not supported",
            scaling.unwrap_or_default()
        );
        // llama.cpp takes a factor without a type as that of linear scaling; 0 and 1 are none.
        for name in ["rope.scaling.factor", "rope.scale_linear"].map(key).iter().filter(|_| scaling.is_none()) {
            let factor = gguf.f32(name)?.unwrap_or(1.0);
            ensure!(factor == 0.0 || factor == 1.0, "`{name}` = {factor}: linear scaling of rope is not supported");
        }
        let hidden_size = number("embedding_length")?;
        let num_attention_heads = number("attention.head_count")?;
        let head_dim = number_or("attention.key_length", hidden_size / num_attention_heads)?;
        let rotated = number_or("rope.dimension_count", head_dim)?;
        ensure!(rotated == head_dim, "rotating {rotated} of {head_dim} channels of a head is not supported");
        let tokens = gguf.strings("tokenizer.ggml.tokens")?.map(<[String]>::len);
        let vocab_size = match gguf.tensor("token_embd.weight")?.shape[..] {
            [rows, _] => rows,
            _ => bail!("tensor `token_embd.weight` is not a matrix"),
        };
        if let Some(tokens) = tokens {
            ensure!(tokens <= vocab_size, "{tokens} tokens, and embeddings for {vocab_size}");
        }
        let config = Self {
            model_type: architecture.to_owned(),
            vocab_size,
            hidden_size,
            intermediate_size: number("feed_forward_length")?,
            num_hidden_layers: number("block_count")?,
            num_attention_heads,
            num_key_value_heads: number_or("attention.head_count_kv", num_attention_heads)?,
            head_dim,
            rms_norm_eps: decimal(gguf.f32(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6)),
            rope_theta: decimal(gguf.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0)),
            rope_scaling: RopeScaling::None, // `BaseModel::load` reads the divisors, which are a tensor.
            max_position_embeddings: number_or("context_length", 2048)?,
            tie_word_embeddings: gguf.tensor("output.weight").is_err(),
            sliding_window: match gguf.u64(&key("attention.sliding_window"))? {
                Some(_) => Some(number("attention.sliding_window")?),
                None => None,
            },
            // As there are such tensors.
            attention_bias: false,
            mlp_bias: false,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        ensure!(heads.is_multiple_of(kv_heads), "{heads} query heads cannot share {kv_heads} key heads");
        let product = |a: usize, b: usize| a.checked_mul(b).filter(|n| *n <= isize::MAX as usize / 8);
        let fits = product(self.vocab_size, self.hidden_size).is_some()
            && product(self.intermediate_size, self.hidden_size).is_some()
            && product(heads, self.head_dim).and_then(|wide| product(wide, self.hidden_size)).is_some();
        ensure!(fits, "its sizes overflow");
        let rotates = self.head_dim.is_multiple_of(2) && (2..=HEAD_DIM_MAX).contains(&self.head_dim);
        ensure!(rotates, "a head of {} channels cannot be rotated", self.head_dim);
        // In f32, as they are computed with.
        let (epsilon, theta) = (self.rms_norm_eps as f32, self.rope_theta as f32);
        ensure!(
            epsilon > 0.0 && epsilon < 1.0,
            "`rms_norm_eps` = {}; it is a number above 0 and below 1",
            self.rms_norm_eps
        );
        ensure!(theta >= 1.0 && theta.is_finite(), "`rope_theta` = {}; it is a number from 1", self.rope_theta);
        let frequencies = self.rope_frequencies();
        ensure!(
            frequencies.iter().all(|frequency| frequency.is_finite() && *frequency >= 0.0),
            "its rope scaling, {:?}, makes frequencies that are no numbers",
            self.rope_scaling
        );
        ensure!(self.num_hidden_layers <= 4096, "{} layers", self.num_hidden_layers);
        Ok(())
    }

    /// Frequencies of rotary embedding, one for each pair of channels, in radians a position.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let half = self.head_dim / 2;
        // f32 as transformers computes them, so that angles at far positions agree.
        let plain = (0..half).map(|i| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            1.0 / (self.rope_theta as f32).powf(exponent)
        });
        match &self.rope_scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Divisors(divisors) => plain.zip(divisors).map(|(f, divisor)| f / divisor).collect(),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => plain
                .map(|frequency| {
                    let wavelength = std::f64::consts::TAU / f64::from(frequency);
                    if wavelength > original / low_freq_factor {
                        (f64::from(frequency) / factor) as f32
                    } else if wavelength < original / high_freq_factor {
                        frequency
                    } else {
                        let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        let f = f64::from(frequency);
                        ((1.0 - kept) * f / factor + kept * f) as f32
                    }
                })
                .collect(),
        }
    }

    /// Whether transformers' model of this configuration has a bias at a module of this path.
    pub fn has_bias(&self, path: &str) -> bool {
        let role = path.rsplit('.').next().unwrap_or_default();
        let attention = matches!(role, "q_proj" | "k_proj" | "v_proj" | "o_proj");
        let mlp = matches!(role, "gate_proj" | "up_proj" | "down_proj");
        match self.model_type.as_str() {
            "llama" => (attention && self.attention_bias) || (mlp && self.mlp_bias),
            "qwen2" => attention && role != "o_proj",
            _ => false,
        }
    }

    /// The scaling that a GGUF file's divisors were computed from: the converter writes those of `llama3` only, and keeps none of its
    /// numbers. What is found makes the same frequencies to f32 rounding.
    fn scaling_of_divisors(&self, divisors: &[f32]) -> Option<RopeScaling> {
        let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
        // Llama 3.1 to 3.3 have 1, 4 and 8192.
        let originals = [8192.0].into_iter().chain((5..21).map(|power| f64::from(1 << power)));
        let llama3 = |original| RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original };
        let wanted = self.rope_frequencies();
        let equals = |scaling: &RopeScaling| {
            let found = Self { rope_scaling: scaling.clone(), ..self.clone() }.rope_frequencies();
            found.iter().zip(&wanted).all(|(found, wanted)| (found - wanted).abs() <= 1e-5 * wanted)
        };
        [RopeScaling::None].into_iter().chain(originals.map(llama3)).find(equals)
    }

    /// A `config.json` for transformers.
    ///
    /// # Errors
    /// When the rope scaling or a window has no form there.
    pub fn to_json(&self, dtype: &str, bos: Option<u32>, eos: &[u32]) -> Result<Value> {
        let architecture = match self.model_type.as_str() {
            "llama" => "LlamaForCausalLM",
            "mistral" => "MistralForCausalLM",
            _ => "Qwen2ForCausalLM",
        };
        ensure!(
            self.model_type != "qwen2" || self.sliding_window.is_none(),
            "a sliding window of a qwen2 GGUF file has no form in config.json that is run here; train from the Hugging Face directory"
        );
        let found = match &self.rope_scaling {
            RopeScaling::Divisors(divisors) => self.scaling_of_divisors(divisors),
            _ => None,
        };
        let scaling = match found.as_ref().unwrap_or(&self.rope_scaling) {
            RopeScaling::None => Value::Null,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": *original as u64,
            }),
            RopeScaling::Divisors(_) => {
                bail!(
                    "the rope divisors of the GGUF file are not those of `llama3`, and have no form in config.json; train from the Hugging Face directory"
                )
            }
        };
        let mut config = json!({
            "architectures": [architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "sliding_window": self.sliding_window,
            "bos_token_id": bos,
            "eos_token_id": eos.first(),
            "torch_dtype": dtype,
        });
        if self.model_type == "qwen2" {
            config["use_sliding_window"] = Value::Bool(false);
        }
        if self.model_type == "llama" {
            config["attention_bias"] = self.attention_bias.into();
            config["mlp_bias"] = self.mlp_bias.into();
        }
        Ok(config)
    }
}

/// A size from a file: above zero, and far from overflowing.
fn size(value: Option<u64>) -> Option<usize> {
    value.filter(|value| (1..=u64::from(u32::MAX)).contains(value)).map(|value| value as usize)
}

/// The decimal that an f32 was written from: 1e-5_f32 is 1e-5, not 9.99999974e-6.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn rope_scaling(rope: &Value) -> Result<RopeScaling> {
    ensure!(rope.is_object(), "its rope scaling is {rope}, not an object");
    let kind = rope.get("rope_type").or_else(|| rope.get("type")).filter(|kind| !kind.is_null());
    let kind =
        kind.map(|kind| kind.as_str().with_context(|| format!("its rope type is {kind}, not a text"))).transpose()?;
    let number = |key: &str| {
        let value = rope.get(key).and_then(Value::as_f64).filter(|value| *value > 0.0 && (*value as f32).is_finite());
        value.with_context(|| format!("rope type `llama3` needs the number `{key}`, above zero"))
    };
    match kind {
        None if rope.get("factor").is_some_and(|factor| !factor.is_null()) => {
            bail!("its rope scaling has a `factor` and no type; known types are default, llama3")
        }
        None | Some("default") => Ok(RopeScaling::None),
        Some("llama3") => {
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            ensure!(high > low, "`high_freq_factor` = {high} is not above `low_freq_factor` = {low}");
            Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original: number("original_max_position_embeddings")?,
            })
        }
        Some(kind) => bail!("unknown rope type `{kind}`; known are default, llama3"),
    }
}
