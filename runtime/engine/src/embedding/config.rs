//! The numbers of an encoder of BERT's family, read from `config.json`, and refused by name where unknown.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::files::{SMALL_FILE_BYTES_MAX, is_named, parse_object, read_text};

/// An encoder whose tensors and numbers have the names of one of these models of transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `bert`: all-MiniLM, bge, gte, e5.
    Bert,
    /// `distilbert`: BERT without token types.
    DistilBert,
    /// `roberta` and `xlm-roberta`: positions begin behind the id of the padding token.
    Roberta,
}

/// Names in `config.json` of the families that are computed here.
pub const MODEL_TYPES: [&str; 4] = ["bert", "distilbert", "roberta", "xlm-roberta"];

/// Other encoders, which are no chat models either.
const OTHER_ENCODERS: [&str; 12] = [
    "albert",
    "camembert",
    "deberta",
    "deberta-v2",
    "electra",
    "jina_bert",
    "modernbert",
    "mpnet",
    "new",
    "nomic_bert",
    "t5",
    "xlm-roberta-xl",
];

/// Activation of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// By the error function.
    Gelu,
    /// By the hyperbolic tangent.
    GeluTanh,
    /// Rectified.
    Relu,
}

/// The shape and constants of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// Its family.
    pub family: Family,
    /// `model_type`, as the file has it.
    pub model_type: String,
    /// Tokens that have an embedding.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Activation of the feed-forward block.
    pub activation: Activation,
    /// Added to the variance in LayerNorm.
    pub layer_norm_eps: f64,
    /// Rows of the position embedding.
    pub max_position_embeddings: usize,
    /// Rows of the token type embedding; 0: there is none.
    pub type_vocab_size: usize,
    /// Id of the padding token.
    pub pad_token_id: u32,
}

/// Fields that change what an encoder computes, with the only values that are computed here.
const FIXED_FIELDS: [(&str, &[&str]); 5] = [
    ("position_embedding_type", &["\"absolute\""]),
    ("is_decoder", &["false"]),
    ("add_cross_attention", &["false"]),
    ("quantization_config", &[]),
    // ELECTRA and ALBERT project from a narrower one.
    ("embedding_size", &[]),
];

/// Heads of a model that make of it something other than an encoder of texts.
const OTHER_HEADS: [&str; 4] =
    ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"];

/// Returns `model_type` of a Hugging Face directory if it is an encoder and no chat model.
///
/// Whether it is one that can be run is what [`EncoderConfig::from_dir`] says.
pub fn encoder_type(dir: &Path) -> Option<String> {
    let text = read_text(&dir.join("config.json"), SMALL_FILE_BYTES_MAX).ok()?;
    let config: Map<String, Value> = serde_json::from_str(&text).ok()?;
    let model_type = config.get("model_type")?.as_str()?;
    is_encoder(model_type).then(|| model_type.to_owned())
}

/// Returns true if models of this `model_type` embed texts and do not write any.
pub fn is_encoder(model_type: &str) -> bool {
    MODEL_TYPES.contains(&model_type) || OTHER_ENCODERS.contains(&model_type)
}

impl EncoderConfig {
    /// Reads `config.json` of a directory.
    ///
    /// # Errors
    /// When the file cannot be read, or says something that is not computed here.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let config = parse_object(&path, &read_text(&path, SMALL_FILE_BYTES_MAX)?)?;
        let listed = is_named(&dir.join(super::modules::MODULES_FILE))?;
        Self::read(&config, listed).with_context(|| format!("{}: this model cannot be run", path.display()))
    }

    /// `listed`: sentence-transformers' list of modules says what is computed, so that a head is not asked for.
    fn read(config: &Value, listed: bool) -> Result<Self> {
        let model_type = config["model_type"].as_str().context("`model_type` is missing")?;
        let family = match model_type {
            "bert" => Family::Bert,
            "distilbert" => Family::DistilBert,
            "roberta" | "xlm-roberta" => Family::Roberta,
            other => bail!("unknown encoder `{other}`; known are {}", MODEL_TYPES.join(", ")),
        };
        let given = |key: &str| config.get(key).filter(|value| !value.is_null());
        for (key, allowed) in FIXED_FIELDS {
            if let Some(value) = given(key) {
                ensure!(allowed.contains(&value.to_string().as_str()), "`{key}` = {value} is not supported");
            }
        }
        let architecture = config["architectures"][0].as_str().unwrap_or_default();
        let other_head = OTHER_HEADS.iter().any(|head| architecture.ends_with(head));
        ensure!(
            listed || !other_head,
            "it is a {architecture}, which judges texts and does not embed them; an embedding model has modules.json"
        );
        let distilled = family == Family::DistilBert;
        let name = |bert: &'static str| match bert {
            "hidden_size" if distilled => "dim",
            "intermediate_size" if distilled => "hidden_dim",
            "num_hidden_layers" if distilled => "n_layers",
            "num_attention_heads" if distilled => "n_heads",
            "hidden_act" if distilled => "activation",
            other => other,
        };
        // Defaults are those of the families' classes in transformers.
        let number = |key: &'static str, default: u64| -> Result<usize> {
            let value = given(name(key)).map_or(Some(default), Value::as_u64);
            let size = value.and_then(|value| usize::try_from(value).ok()).filter(|size| (1..=SIZE_MAX).contains(size));
            size.with_context(|| {
                format!("`{}` = {} is not a size", name(key), given(name(key)).unwrap_or(&Value::Null))
            })
        };
        let activation = match given(name("hidden_act")).map_or(Some("gelu"), Value::as_str) {
            Some("gelu") => Activation::Gelu,
            Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
            Some("relu") => Activation::Relu,
            other => bail!(
                "`{}` = {:?} is not supported; gelu, gelu_new, gelu_pytorch_tanh and relu are",
                name("hidden_act"),
                other.unwrap_or_default()
            ),
        };
        let pad = match (given("pad_token_id"), family) {
            (None, Family::Roberta) => Some(1),
            (None, _) => Some(0),
            (Some(pad), _) => pad.as_u64().and_then(|pad| u32::try_from(pad).ok()),
        };
        let config = Self {
            family,
            model_type: model_type.to_owned(),
            vocab_size: number("vocab_size", 30_522)?,
            hidden_size: number("hidden_size", 768)?,
            intermediate_size: number("intermediate_size", 3072)?,
            num_hidden_layers: number("num_hidden_layers", if distilled { 6 } else { 12 })?,
            num_attention_heads: number("num_attention_heads", 12)?,
            activation,
            // DistilBERT's is a constant of its code.
            layer_norm_eps: match given("layer_norm_eps").filter(|_| !distilled) {
                Some(eps) => eps.as_f64().context("`layer_norm_eps` is no number")?,
                None => 1e-12,
            },
            max_position_embeddings: number("max_position_embeddings", 512)?,
            type_vocab_size: if distilled { 0 } else { number("type_vocab_size", 2)? },
            pad_token_id: pad.context("`pad_token_id` is not a token")?,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        ensure!(hidden.is_multiple_of(heads), "{hidden} channels cannot be shared by {heads} heads");
        ensure!(self.num_hidden_layers <= 1024, "{} layers", self.num_hidden_layers);
        ensure!(
            self.layer_norm_eps >= 0.0 && self.layer_norm_eps < 1.0,
            "`layer_norm_eps` = {}; it is a number from 0 to below 1",
            self.layer_norm_eps
        );
        ensure!(
            (self.pad_token_id as usize) < self.vocab_size,
            "`pad_token_id` = {}, and there are {} tokens",
            self.pad_token_id,
            self.vocab_size
        );
        ensure!(
            self.positions() >= 2,
            "`max_position_embeddings` = {} leaves no position for a text",
            self.max_position_embeddings
        );
        Ok(())
    }

    /// Most tokens of a text for which there are positions.
    pub fn positions(&self) -> usize {
        match self.family {
            Family::Roberta => self.max_position_embeddings.saturating_sub(self.pad_token_id as usize + 1),
            _ => self.max_position_embeddings,
        }
    }
}

/// Largest number in a configuration: some ten times the largest vocabulary.
const SIZE_MAX: usize = 1 << 23;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(more: Value) -> Result<EncoderConfig> {
        let mut config = json!({"model_type": "bert", "hidden_size": 36, "num_attention_heads": 3});
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        EncoderConfig::read(&config, false)
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (more, words) in [
            (json!({"model_type": "mpnet"}), "unknown encoder `mpnet`; known are bert, distilbert"),
            (json!({"model_type": 7}), "`model_type` is missing"),
            (json!({"num_attention_heads": 0}), "`num_attention_heads` = 0 is not a size"),
            (json!({"num_attention_heads": 5}), "36 channels cannot be shared by 5 heads"),
            (json!({"hidden_size": -36}), "`hidden_size` = -36 is not a size"),
            (json!({"hidden_size": 1e9}), "`hidden_size`"),
            (json!({"vocab_size": 1_u64 << 40}), "`vocab_size`"),
            (json!({"num_hidden_layers": 100_000}), "100000 layers"),
            (json!({"hidden_act": "swish"}), "`hidden_act` = \"swish\" is not supported"),
            (json!({"layer_norm_eps": "tiny"}), "`layer_norm_eps` is no number"),
            (json!({"layer_norm_eps": -1}), "`layer_norm_eps` = -1"),
            (json!({"position_embedding_type": "relative_key"}), "`position_embedding_type`"),
            (json!({"is_decoder": true}), "`is_decoder` = true"),
            (json!({"quantization_config": {}}), "`quantization_config`"),
            (json!({"pad_token_id": 40_000}), "`pad_token_id` = 40000"),
            (json!({"architectures": ["BertForSequenceClassification"]}), "judges texts"),
            (json!({"model_type": "roberta", "max_position_embeddings": 3}), "leaves no position"),
            (json!({"model_type": "distilbert", "dim": 36, "n_heads": 7}), "36 channels cannot be shared by 7"),
            (json!({"model_type": "distilbert", "activation": "swish"}), "`activation`"),
        ] {
            let refused = format!("{:#}", read(more.clone()).expect_err("it is refused"));
            assert!(refused.contains(words), "{more}: {refused}");
        }
    }

    #[test]
    fn numbers_that_are_left_out_are_those_of_transformers() -> Result<()> {
        let bert = read(json!({"hidden_size": 768, "num_attention_heads": 12, "layer_norm_eps": null}))?;
        assert_eq!((bert.vocab_size, bert.layer_norm_eps, bert.pad_token_id), (30_522, 1e-12, 0));
        let roberta = read(json!({"model_type": "xlm-roberta", "max_position_embeddings": 514}))?;
        assert_eq!((roberta.pad_token_id, roberta.positions()), (1, 512));
        let distilled = read(json!({"model_type": "distilbert", "layer_norm_eps": 0.5}))?;
        assert_eq!((distilled.hidden_size, distilled.type_vocab_size, distilled.layer_norm_eps), (768, 0, 1e-12));
        Ok(())
    }
}
