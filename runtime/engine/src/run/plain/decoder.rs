//! Decoders as compositions of candle operations, block by block.
//!
//! Source of the architecture: Touvron et al. 2023, <https://arxiv.org/abs/2302.13971>, section 2.2.

use anyhow::{Context, Result, ensure};
use candle_core::{D, Tensor};

use crate::models::architecture::{AttentionSpec, Gate, QkNorm};
use crate::models::{EMBEDDING, FINAL_NORM, HEAD};
use crate::run::batch::Batch;
use crate::run::plain::attention::{LayerKvCache, attend, rotate};
use crate::run::plain::recipe::{Input, Pass};

/// Keys and values of all layers for one sequence.
#[derive(Clone, Default)]
pub struct KvCache {
    layers: Vec<LayerKvCache>,
    /// Positions in the cache.
    pub len: usize,
    /// Tokens of the sequence that were known when its prompt was read.
    pub length: usize,
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
        let x = self.apply(self.embedding(batch)?, &Input::Tokens(batch.ids.clone()), batch)?;
        let scale = self.model.architecture.embedding_scale;
        let x = if scale == 1.0 { x } else { (x * scale)? };
        if !self.is_noisy() {
            return Ok(x);
        }
        let mut noise = vec![0.0; x.elem_count()];
        self.add_noise(batch, &mut noise);
        Ok((&x + Tensor::from_vec(noise, x.shape(), x.device())?.to_dtype(x.dtype())?)?)
    }

    /// The embedding, once every token of a batch is known to have a row in it.
    ///
    /// # Errors
    /// When an id has no embedding.
    pub(crate) fn embedding(&self, batch: &Batch) -> Result<usize> {
        let vocab = self.model.architecture.vocab_size;
        if let Some(id) = batch.ids.iter().find(|id| **id as usize >= vocab) {
            anyhow::bail!("token {id} has no embedding: the model knows {vocab} tokens, its tokenizer more");
        }
        self.module(EMBEDDING)
    }

    /// One decoder layer: (N, C) to (N, C).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn layer(&self, layer: usize, h: &Tensor, batch: &Batch, cache: Option<&mut LayerKvCache>) -> Result<Tensor> {
        let (architecture, at) = (&self.model.architecture, &self.model.layers[layer]);
        let spec = &architecture.layers[layer];
        let (attention, feed_forward) = (spec.attention(), &spec.feed_forward);
        let norm = |module: Option<usize>, x: &Tensor| match module {
            Some(module) => self.norm(module, x, batch),
            // Not x itself, which may be a variable: candle counts the gradient of what a variable is multiplied with twice.
            None => Ok((x * 1.0)?),
        };
        let add = |h: &Tensor, y: Tensor| -> Result<Tensor> {
            let scale = spec.residual_scale;
            Ok((h + if scale == 1.0 { y } else { (y * scale)? })?)
        };

        let x = norm(at.mixer_norm, h)?; // (N, C)
        let widths = [attention.q_width(), attention.kv_width(), attention.kv_width()];
        let [q, k, v] = self.beside(&at.qkv, &x, widths, batch)?;
        let [q, k] = [self.heads(q, attention, at.qk_norms.map(|norms| norms[0]), batch)?, {
            self.heads(k, attention, at.qk_norms.map(|norms| norms[1]), batch)?
        }]; // (N, H, D), (N, H_kv, D)
        let v = self.heads(v, attention, None, batch)?;
        let rope = attention.rope.map(|rope| &architecture.ropes[rope]);
        let (q, k) = (rotate(&q, batch, rope)?, rotate(&k, batch, rope)?); // (H, N, D)
        let attended = attend([&q, &k, &v.transpose(0, 1)?], batch, attention, cache)?; // (N, H D)
        let mixed = self.apply(at.o, &Input::Rows(attended), batch)?;
        let h = add(h, norm(at.mixer_post_norm, &mixed)?)?;

        let x = norm(at.feed_forward_norm, &h)?;
        let [gate, up] = self.beside(&at.gate_up, &x, [feed_forward.inner; 2], batch)?; // (N, I)
        let gate = match feed_forward.gate {
            Gate::Silu => candle_nn::ops::silu(&gate)?,
            Gate::GeluTanh => gate.gelu()?,
        };
        let down = self.apply(at.down, &Input::Rows((gate * up)?), batch)?;
        add(&h, norm(at.feed_forward_post_norm, &down)?)
    }

    /// What modules that share an input yield, beside each other, cut to these widths.
    fn beside<const N: usize>(
        &self,
        modules: &[usize],
        x: &Tensor,
        widths: [usize; N],
        batch: &Batch,
    ) -> Result<[Tensor; N]> {
        let outputs = modules.iter().map(|module| self.apply(*module, &Input::Rows(x.clone()), batch));
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        match <[Tensor; N]>::try_from(outputs) {
            Ok(outputs) => Ok(outputs),
            Err(outputs) => {
                let all = Tensor::cat(&outputs, D::Minus1)?;
                let mut at = 0;
                let parts = widths.map(|width| {
                    at += width;
                    Ok(all.narrow(D::Minus1, at - width, width)?)
                });
                let parts = parts.into_iter().collect::<Result<Vec<Tensor>>>()?;
                Ok(<[Tensor; N]>::try_from(parts).expect("there are as many parts as widths"))
            }
        }
    }

    /// (N, H D) as heads (N, H, D), normalised one by one or all together where there is a norm.
    fn heads(&self, x: Tensor, attention: &AttentionSpec, norm: Option<usize>, batch: &Batch) -> Result<Tensor> {
        let (n, width) = x.dims2()?;
        let heads = (n, width / attention.head_dim, attention.head_dim);
        let Some(norm) = norm else { return Ok(x.reshape(heads)?) };
        match attention.qk_norm {
            Some(QkNorm::Width) => Ok(self.norm(norm, &x, batch)?.reshape(heads)?),
            _ => Ok(self.norm(norm, &x.reshape(heads)?.contiguous()?, batch)?),
        }
    }

    /// The final norm and the head: rows (N, C) to logits (N, V).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn head(&self, h: &Tensor, batch: &Batch) -> Result<Tensor> {
        let architecture = &self.model.architecture;
        let x = self.norm(self.module(FINAL_NORM)?, h, batch)?;
        let mut logits = self.apply(self.module(HEAD)?, &Input::Rows(x), batch)?;
        if architecture.logit_scale != 1.0 {
            logits = (logits * architecture.logit_scale)?;
        }
        if let Some(cap) = architecture.logit_cap {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        Ok(logits)
    }

    /// RMSNorm: `w ∘ x / √(mean(x²) + ε)`. A recipe gets the normalised x. Source: Zhang & Sennrich 2019,
    /// <https://arxiv.org/abs/1910.07467>, equation 4.
    fn norm(&self, module: usize, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let mean_square = (x.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)? as f64)?;
        let rms = (mean_square + self.model.architecture.rms_norm_eps)?.sqrt()?;
        self.apply(module, &Input::Rows(x.broadcast_div(&rms)?), batch)
    }

    /// Logits (N, V) after every row of a batch, without gradients.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut h = self.embed(batch)?;
        for layer in 0..self.model.layers.len() {
            h = self.layer(layer, &h, batch, None)?;
        }
        self.head(&h, batch)
    }

    /// Logits (V) after the last of some tokens that continue a sequence, of which `length` tokens are known; the cache takes them in.
    ///
    /// # Errors
    /// When there is no token, or the sequence grows beyond the model's context.
    pub fn continue_sequence(&self, ids: &[u32], cache: &mut KvCache, length: usize) -> Result<Tensor> {
        let limit = self.model.architecture.max_position_embeddings;
        ensure!(!ids.is_empty(), "there is no token to go on from");
        ensure!(
            cache.len + ids.len() <= limit,
            "the conversation is longer than the model's context of {limit} tokens"
        );
        let batch = Batch::of_piece(ids, cache.len as u32, length);
        cache.layers.resize(self.model.layers.len(), LayerKvCache::default());
        let mut h = self.embed(&batch)?;
        for (layer, cache) in cache.layers.iter_mut().enumerate() {
            h = self.layer(layer, &h, &batch, Some(cache))?;
        }
        cache.len += ids.len();
        cache.length = length;
        let last = ids.len() - 1;
        Ok(self.head(&h.narrow(0, last, 1)?, &batch.rows(&[last as u32]))?.squeeze(0)?)
    }
}
