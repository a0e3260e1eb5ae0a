//! Architectures out of files: `config.json` of a Hugging Face directory, or a GGUF file's metadata; and back.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::architecture::Architecture;
use super::families::Family;
use super::fields::Fields;
use super::metadata;
use super::rope::RopeScaling;
use crate::files::gguf::Gguf;
use crate::files::{SMALL_FILE_BYTES_MAX, read_text};
use crate::text::tokenizer::Tokenizer;

impl Architecture {
    /// Reads `config.json` of a Hugging Face directory; of a model of several parts, that of the one that writes text.
    ///
    /// # Errors
    /// When the file cannot be read, or says something that no decoder here computes.
    pub fn from_json(path: &Path) -> Result<Self> {
        let text = read_text(path, SMALL_FILE_BYTES_MAX)?;
        Self::from_text(&text).with_context(|| path.display().to_string())
    }

    /// As [`Architecture::from_json`], of the file's text.
    ///
    /// # Errors
    /// When it is no JSON object, or says something that no decoder here computes.
    pub fn from_text(text: &str) -> Result<Self> {
        let config: Map<String, Value> = serde_json::from_str(text).context("not a JSON object")?;
        Self::from_map(config).context("this model cannot be run")
    }

    fn from_map(config: Map<String, Value>) -> Result<Self> {
        let model_type = config.get("model_type").and_then(Value::as_str).context("`model_type` is missing")?;
        let family = Family::of(model_type)?;
        if let Some(quantization) = config.get("quantization_config").filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            ensure!(
                method == "bitsandbytes",
                "its weights are quantised by `{method}`; use the unquantised model, or a GGUF file of it"
            );
        }
        if family.part_of != Some(model_type) {
            return Self::of(family, config);
        }
        let part = config.get("text_config").and_then(Value::as_object).context("`text_config` is missing")?;
        let mut part = part.clone();
        part.insert("architectures".to_owned(), json!([family.class]));
        part.insert("model_type".to_owned(), json!(family.model_type));
        // What ends a text is often said of the whole.
        for key in ["bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "tie_word_embeddings"] {
            if let Some(value) = config.get(key).filter(|_| part.get(key).is_none_or(Value::is_null)) {
                part.insert(key.to_owned(), value.clone());
            }
        }
        Self::of(family, part)
    }

    fn of(family: &Family, config: Map<String, Value>) -> Result<Self> {
        let fields = Fields::new(&config, family.defaults);
        let architecture = (family.architecture)(&fields)?;
        fields.finish()?;
        architecture.check()?;
        Ok(architecture)
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// When a key is missing or says something that no decoder here computes.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let (family, config) = metadata::config_of(gguf)?;
        let mut architecture = Self::of(family, config)?;
        if let Ok(divisors) = gguf.tensor("rope_freqs.weight") {
            let divisors = gguf.mapped(divisors).values()?;
            let rope = architecture.ropes.first_mut().context("`rope_freqs.weight` belongs to no rope")?;
            // llama.cpp applies both.
            let divisors = match rope.scaling {
                RopeScaling::None => divisors,
                RopeScaling::Linear { factor } => divisors.iter().map(|divisor| divisor * factor as f32).collect(),
                _ => bail!("`rope_freqs.weight` beside another scaling of rope is not supported"),
            };
            rope.scaling = RopeScaling::Divisors(divisors);
            if let Some(found) = rope.scaling_of_divisors() {
                architecture.config.insert("rope_scaling".to_owned(), found.to_json().unwrap_or(Value::Null));
            }
            architecture.check()?;
        }
        Ok(architecture)
    }

    /// Whether a tensor of a GGUF file holds divisors of a rope, which are no module's, and which were read.
    pub(crate) fn is_rope(&self, name: &str) -> bool {
        let lists = || self.ropes.iter().any(|rope| matches!(rope.scaling, RopeScaling::LongRope { .. }));
        match name {
            "rope_freqs.weight" => true,
            "rope_factors_short.weight" | "rope_factors_long.weight" => lists(),
            _ => false,
        }
    }

    /// Its family.
    ///
    /// # Errors
    /// When it is unknown, which no architecture's is.
    pub fn family(&self) -> Result<&'static Family> {
        Family::of(&self.model_type)
    }

    /// The architecture of transformers' model that computes the same.
    ///
    /// # Errors
    /// When there is none.
    pub fn exported(&self) -> Result<Self> {
        for rope in &self.ropes {
            let lost = matches!(rope.scaling, RopeScaling::Divisors(_)) && rope.scaling_of_divisors().is_none();
            if lost {
                bail!(
                    "the rope divisors of the GGUF file are not those of `llama3`, and have no form in config.json; train from the Hugging Face directory"
                );
            }
        }
        Ok(self.clone())
    }

    /// A `config.json` for transformers.
    ///
    /// # Errors
    /// As [`Architecture::exported`].
    pub fn to_json(&self, dtype: &str, tokenizer: &Tokenizer) -> Result<Value> {
        let mut config = self.exported()?.config;
        config.insert("tie_word_embeddings".to_owned(), json!(self.tie_word_embeddings));
        // All three, for a class has defaults of its own, which may be beyond the vocabulary.
        config.insert("bos_token_id".to_owned(), json!(tokenizer.bos_id));
        config.insert("eos_token_id".to_owned(), json!(tokenizer.eos_ids.first()));
        config.insert("pad_token_id".to_owned(), json!(tokenizer.pad_id));
        config.insert("torch_dtype".to_owned(), json!(dtype));
        Ok(Value::Object(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: Value) -> Result<Architecture> {
        Architecture::from_map(config.as_object().context("an object")?.clone())
    }

    fn llama(fields: Value) -> Result<Architecture> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 7, "hidden_size": 48, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 3, "rope_theta": 500.0, "max_position_embeddings": 64,
        });
        let own = fields.as_object().context("an object")?.clone();
        config.as_object_mut().context("an object")?.extend(own);
        read(config)
    }

    /// As published: most fields are those of the class.
    #[test]
    fn the_part_of_a_whole_has_the_sizes_of_its_class() -> Result<()> {
        let model = read(json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        }))?;
        let attention = model.layers[0].attention();
        assert_eq!(
            (attention.heads, attention.kv_heads, attention.head_dim, attention.window),
            (8, 4, 256, Some(1024))
        );
        assert_eq!((model.vocab_size, model.max_position_embeddings, model.layers.len()), (262_208, 131_072, 34));
        assert_eq!(model.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
        assert!(model.tie_word_embeddings && model.config["eos_token_id"] == json!([1, 106]));
        Ok(())
    }

    #[test]
    fn the_older_field_of_rope_counts_where_both_say_something() -> Result<()> {
        let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
        let scaling = |fields: Value| Ok::<_, anyhow::Error>(llama(fields)?.ropes[0].scaling.clone());
        for (older, newer, factor) in
            [(linear(3.0), linear(5.0), 3.0), (json!({}), linear(5.0), 5.0), (linear(3.0), json!({}), 3.0)]
        {
            let found = scaling(json!({"rope_scaling": older, "rope_parameters": newer}))?;
            assert_eq!(found, RopeScaling::Linear { factor });
        }
        let yarn = |truncate: Value| {
            scaling(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": truncate}}))
        };
        for (truncate, truncates) in [(json!(true), true), (json!(null), false), (json!(0), false), (json!(1), true)] {
            let RopeScaling::Yarn(yarn) = yarn(truncate.clone())? else { bail!("a ramp") };
            assert_eq!(yarn.truncate, truncates, "{truncate}");
        }
        Ok(())
    }
}
