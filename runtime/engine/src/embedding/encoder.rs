//! The encoder of a BERT-family model, by candle-transformers: tokens of texts of one length in, a vector for each token out.
//!
//! candle's BERT and XLM-RoBERTa compute what transformers' do. Its DistilBERT takes the approximation by the hyperbolic tangent where
//! the configuration says `gelu`, so that DistilBERT runs as what it is: a BERT whose token types are zeros, under other names.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{self, BertModel};
use candle_transformers::models::xlm_roberta::{self, XLMRobertaModel};

use super::config::{Activation, EncoderConfig, Family};
use crate::files::tensors::{Tensors, map_directory};
use crate::memory;

/// An encoder, its weights in f32.
pub enum Encoder {
    /// BERT or DistilBERT.
    Bert(Box<BertModel>),
    /// RoBERTa.
    Roberta(Box<XLMRobertaModel>),
}

/// A tensor that the encoder needs: its name in candle's model, its name in the file, its shape.
struct Needed {
    name: String,
    stored: String,
    shape: Vec<usize>,
}

impl Encoder {
    /// Loads the weights of a directory.
    ///
    /// # Errors
    /// When a tensor is missing, of another shape or not known, or the memory does not suffice.
    pub fn load(dir: &Path, config: &EncoderConfig) -> Result<Self> {
        let tensors = map_directory(dir)?;
        Self::from_tensors(&tensors, config).with_context(|| dir.display().to_string())
    }

    fn from_tensors(tensors: &Tensors, config: &EncoderConfig) -> Result<Self> {
        let needed = needed(config);
        let prefix = prefix(tensors)?;
        check(tensors, &needed, &prefix)?;
        let values: usize = needed.iter().map(|needed| needed.shape.iter().product::<usize>()).sum();
        let bytes = 4 * values as u64;
        if let Some(free) = memory::obtainable().filter(|free| *free < bytes) {
            bail!("it takes {} MiB of memory, and {} are free", bytes >> 20, free >> 20);
        }
        let mut weights = HashMap::new();
        for Needed { name, stored, shape } in needed {
            let values = tensors[&format!("{prefix}{stored}")].values()?;
            weights.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
        if config.type_vocab_size == 0 {
            let zeros = Tensor::zeros((1, config.hidden_size), DType::F32, &Device::Cpu)?;
            weights.insert("embeddings.token_type_embeddings.weight".to_owned(), zeros);
        }
        let weights = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        Ok(match config.family {
            Family::Bert | Family::DistilBert => Self::Bert(Box::new(BertModel::load(weights, &bert_config(config))?)),
            Family::Roberta => Self::Roberta(Box::new(XLMRobertaModel::new(&roberta_config(config), weights)?)),
        })
    }

    /// Reads texts of one length: `ids` (texts, tokens) to vectors (texts, tokens, channels). No token is padding, so that nothing is
    /// masked and a text's vectors do not depend on what is read beside it.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let types = ids.zeros_like()?;
        Ok(match self {
            Self::Bert(model) => model.forward(ids, &types, None)?,
            Self::Roberta(model) => model.forward(ids, &ids.ones_like()?, &types, None, None, None)?,
        })
    }
}

fn bert_config(config: &EncoderConfig) -> bert::Config {
    bert::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        intermediate_size: config.intermediate_size,
        hidden_act: match config.activation {
            Activation::Gelu => bert::HiddenAct::Gelu,
            Activation::GeluTanh => bert::HiddenAct::GeluApproximate,
            Activation::Relu => bert::HiddenAct::Relu,
        },
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size.max(1),
        layer_norm_eps: config.layer_norm_eps,
        pad_token_id: config.pad_token_id as usize,
        model_type: None,
        ..bert::Config::default()
    }
}

fn roberta_config(config: &EncoderConfig) -> xlm_roberta::Config {
    xlm_roberta::Config {
        hidden_size: config.hidden_size,
        layer_norm_eps: config.layer_norm_eps,
        attention_probs_dropout_prob: 0.0,
        hidden_dropout_prob: 0.0,
        num_attention_heads: config.num_attention_heads,
        position_embedding_type: "absolute".to_owned(),
        intermediate_size: config.intermediate_size,
        hidden_act: match config.activation {
            Activation::Gelu => candle_nn::Activation::Gelu,
            Activation::GeluTanh => candle_nn::Activation::GeluPytorchTanh,
            Activation::Relu => candle_nn::Activation::Relu,
        },
        num_hidden_layers: config.num_hidden_layers,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size,
        pad_token_id: config.pad_token_id,
    }
}

/// Modules of a layer: the name in BERT, the name in DistilBERT, and its width in and out, in units that [`needed`] resolves.
const LAYER: [(&str, &str, Shape); 8] = [
    ("attention.self.query", "attention.q_lin", Shape::Square),
    ("attention.self.key", "attention.k_lin", Shape::Square),
    ("attention.self.value", "attention.v_lin", Shape::Square),
    ("attention.output.dense", "attention.out_lin", Shape::Square),
    ("attention.output.LayerNorm", "sa_layer_norm", Shape::Norm),
    ("intermediate.dense", "ffn.lin1", Shape::Up),
    ("output.dense", "ffn.lin2", Shape::Down),
    ("output.LayerNorm", "output_layer_norm", Shape::Norm),
];

#[derive(Clone, Copy)]
enum Shape {
    Square,
    Norm,
    Up,
    Down,
}

fn needed(config: &EncoderConfig) -> Vec<Needed> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let mut needed = Vec::new();
    let mut add = |name: &str, stored: &str, shape: &[usize]| {
        needed.push(Needed { name: name.to_owned(), stored: stored.to_owned(), shape: shape.to_vec() });
    };
    let embeddings = [
        ("word_embeddings", config.vocab_size),
        ("position_embeddings", config.max_position_embeddings),
        ("token_type_embeddings", config.type_vocab_size),
    ];
    for (name, rows) in embeddings.into_iter().filter(|(_, rows)| *rows > 0) {
        let name = format!("embeddings.{name}.weight");
        add(&name, &name, &[rows, hidden]);
    }
    for part in ["weight", "bias"] {
        let name = format!("embeddings.LayerNorm.{part}");
        add(&name, &name, &[hidden]);
    }
    let distilled = config.family == Family::DistilBert;
    for layer in 0..config.num_hidden_layers {
        for (bert, distil, shape) in LAYER {
            let (rows, cols) = match shape {
                Shape::Square | Shape::Norm => (hidden, hidden),
                Shape::Up => (inner, hidden),
                Shape::Down => (hidden, inner),
            };
            for part in ["weight", "bias"] {
                let name = format!("encoder.layer.{layer}.{bert}.{part}");
                let stored =
                    if distilled { format!("transformer.layer.{layer}.{distil}.{part}") } else { name.clone() };
                match (shape, part) {
                    (Shape::Square | Shape::Up | Shape::Down, "weight") => add(&name, &stored, &[rows, cols]),
                    _ => add(&name, &stored, &[rows]),
                }
            }
        }
    }
    needed
}

/// What stands before the encoder's names, as in the file of a model with a head.
fn prefix(tensors: &Tensors) -> Result<String> {
    let words = "embeddings.word_embeddings.weight";
    let prefix = ["", "bert.", "roberta.", "distilbert."]
        .into_iter()
        .find(|prefix| tensors.contains_key(&format!("{prefix}{words}")));
    Ok(prefix.with_context(|| format!("tensor `{words}` is missing"))?.to_owned())
}

/// Modules that are no part of what embeds a text.
const UNREAD: [&str; 8] = [
    "pooler.",
    "cls.",
    "lm_head.",
    "classifier.",
    "pre_classifier.",
    "qa_outputs.",
    "vocab_",
    "embeddings.position_ids",
];

/// Checks that all tensors are there, and that none changes what is computed without being read.
fn check(tensors: &Tensors, needed: &[Needed], prefix: &str) -> Result<()> {
    let mut known = BTreeSet::new();
    for Needed { stored, shape, .. } in needed {
        let name = format!("{prefix}{stored}");
        let tensor = tensors.get(&name).with_context(|| format!("tensor `{name}` is missing"))?;
        ensure!(tensor.shape == *shape, "tensor `{name}` is {:?}, config.json makes it {shape:?}", tensor.shape);
        known.insert(name);
    }
    let unread = |name: &str| {
        let bare = name.strip_prefix(prefix).unwrap_or(name);
        UNREAD.iter().any(|unread| bare.starts_with(unread) || name.starts_with(unread))
    };
    let unknown: Vec<&str> =
        tensors.keys().map(String::as_str).filter(|name| !known.contains(*name) && !unread(name)).collect();
    match unknown.as_slice() {
        [] => Ok(()),
        [first, ..] => {
            bail!("{} tensors are not read, so that the vectors would be wrong; the first is `{first}`", unknown.len())
        }
    }
}
