//! The decoder of the Llama family as compositions of candle operations, block by block.
//!
//! Source of the architecture: Touvron et al. 2023, <https://arxiv.org/abs/2302.13971>, section 2.2.

use anyhow::{Context, Result, ensure};
use candle_core::{D, Tensor};

use crate::models::{EMBEDDING, FINAL_NORM, HEAD};
use crate::run::batch::Batch;
use crate::run::plain::attention::{LayerCache, attend, rotate};
use crate::run::plain::recipe::{Input, Pass};

/// Keys and values of all layers for one sequence.
#[derive(Clone, Default)]
pub struct Cache {
    layers: Vec<LayerCache>,
    /// Positions in the cache.
    pub len: usize,
}

impl Pass<'_> {
    fn module(&self, path: &str) -> Result<usize> {
        self.model.module_index(path).with_context(|| format!("the model has no module `{path}`"))
    }

    /// Token ids (N) to the residual stream (N, C).
    ///
    /// # Errors
    /// When an id has no embedding.
    pub fn embed(&self, batch: &Batch) -> Result<Tensor> {
        self.apply(self.embedding(batch)?, &Input::Tokens(batch.ids.clone()), batch)
    }

    /// The embedding, once every token of a batch is known to have a row in it.
    ///
    /// # Errors
    /// When an id has no embedding.
    pub(crate) fn embedding(&self, batch: &Batch) -> Result<usize> {
        let vocab = self.model.config.vocab_size;
        if let Some(id) = batch.ids.iter().find(|id| **id as usize >= vocab) {
            anyhow::bail!("token {id} has no embedding: the model knows {vocab} tokens, its tokenizer more");
        }
        self.module(EMBEDDING)
    }

    /// One decoder layer: (N, C) to (N, C).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn layer(&self, layer: usize, h: &Tensor, batch: &Batch, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let config = &self.model.config;
        let (n, at) = (batch.ids.len(), self.model.layers[layer]);
        let linear = |module: usize, x: &Tensor| self.apply(module, &Input::Rows(x.clone()), batch);
        let heads = |x: Tensor, heads: usize| x.reshape((n, heads, config.head_dim));

        let x = self.norm(at.input_norm, h, batch)?; // (N, C)
        let q = heads(linear(at.q, &x)?, config.num_attention_heads)?; // (N, H, D)
        let k = heads(linear(at.k, &x)?, config.num_key_value_heads)?; // (N, H_kv, D)
        let v = heads(linear(at.v, &x)?, config.num_key_value_heads)?; // (N, H_kv, D)
        let (q, k) = (rotate(&q, batch, config)?, rotate(&k, batch, config)?); // (H, N, D)
        let attended = attend([&q, &k, &v.transpose(0, 1)?], batch, config, cache)?; // (N, H D)
        let h = (h + linear(at.o, &attended)?)?;

        let x = self.norm(at.post_norm, &h, batch)?;
        let gate = candle_nn::ops::silu(&linear(at.gate, &x)?)?; // (N, I)
        let inner = (gate * linear(at.up, &x)?)?;
        Ok((&h + linear(at.down, &inner)?)?)
    }

    /// The final norm and the head: rows (N, C) to logits (N, V).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn head(&self, h: &Tensor, batch: &Batch) -> Result<Tensor> {
        let x = self.norm(self.module(FINAL_NORM)?, h, batch)?;
        self.apply(self.module(HEAD)?, &Input::Rows(x), batch)
    }

    /// RMSNorm: `w ∘ x / √(mean(x²) + ε)`. A recipe gets the normalised x. Source: Zhang & Sennrich 2019,
    /// <https://arxiv.org/abs/1910.07467>, equation 4.
    fn norm(&self, module: usize, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let mean_square = (x.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)? as f64)?;
        let rms = (mean_square + self.model.config.rms_norm_eps)?.sqrt()?;
        self.apply(module, &Input::Rows(x.broadcast_div(&rms)?), batch)
    }

    /// Logits (N, V) after every row of a batch, without gradients.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut h = self.embed(batch)?;
        for layer in 0..self.model.config.num_hidden_layers {
            h = self.layer(layer, &h, batch, None)?;
        }
        self.head(&h, batch)
    }

    /// Logits (V) after the last of some tokens that continue a sequence; the cache takes them in.
    ///
    /// # Errors
    /// When there is no token, or the sequence grows beyond the model's context.
    pub fn continue_sequence(&self, ids: &[u32], cache: &mut Cache) -> Result<Tensor> {
        let limit = self.model.config.max_position_embeddings;
        ensure!(!ids.is_empty(), "there is no token to go on from");
        ensure!(
            cache.len + ids.len() <= limit,
            "the conversation is longer than the model's context of {limit} tokens"
        );
        let batch = Batch::of_tokens(ids, cache.len as u32);
        cache.layers.resize(self.model.config.num_hidden_layers, LayerCache::default());
        let mut h = self.embed(&batch)?;
        for (layer, cache) in cache.layers.iter_mut().enumerate() {
            h = self.layer(layer, &h, &batch, Some(cache))?;
        }
        cache.len += ids.len();
        let last = ids.len() - 1;
        Ok(self.head(&h.narrow(0, last, 1)?, &batch.rows(&[last as u32]))?.squeeze(0)?)
    }
}
