//! A decoder, described once: what it computes, as data. A family's file makes it of a configuration; plain blocks, fused blocks
//! and decoding read it, and none of them knows a family by name.

use std::ops::Range;

use anyhow::{Result, ensure};
use homeroom_abi::plan::ModuleKind;
use homeroom_kernels::Attention;
pub use homeroom_kernels::Gate;
use serde_json::{Map, Value};

use super::rope::Rope;

/// Paths of modules outside the layers.
pub const EMBEDDING: &str = "model.embed_tokens";
/// The norm before the head.
pub const FINAL_NORM: &str = "model.norm";
/// The module that yields the logits.
pub const HEAD: &str = "lm_head";

/// Widest head: some hundred times those that there are.
const HEAD_DIM_MAX: usize = 1 << 16;

/// A decoder: embedding, layers, final norm and head.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// `model_type` of `config.json`, e.g. `llama`.
    pub model_type: String,
    /// Tokens that have an embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest sequence that the model is run on.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// What files hold of a norm's weight is so much less than what it multiplies by: 1 in Gemma, else 0. [`super::Module`]s hold
    /// what is multiplied by.
    pub norm_offset: f32,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f64,
    /// Logits are multiplied by this.
    pub logit_scale: f64,
    /// Logits l become `cap · tanh(l / cap)`, after the scale.
    pub logit_cap: Option<f64>,
    /// Whether the head's weight is the embedding's.
    pub tie_word_embeddings: bool,
    /// How positions turn heads; layers name one by its index.
    pub ropes: Vec<Rope>,
    /// The layers, from the embedding up.
    pub layers: Vec<LayerSpec>,
    /// The `config.json` of transformers that says all this.
    pub config: Map<String, Value>,
}

/// A layer: `x += r · after(mixer(before(x)))`, then the same with the feed-forward part.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// What mixes positions.
    pub mixer: Mixer,
    /// The norms around it.
    pub mixer_norms: Norms,
    /// What works position by position.
    pub feed_forward: FeedForward,
    /// The norms around it.
    pub feed_forward_norms: Norms,
    /// r: both parts are multiplied by this.
    pub residual_scale: f64,
}

/// What mixes positions.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Causal grouped-query attention.
    Attention(AttentionSpec),
}

/// Paths within a layer of the RMSNorms around one of its parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Norms {
    /// Of the part's input.
    pub before: Option<&'static str>,
    /// Of its output.
    pub after: Option<&'static str>,
}

/// Causal grouped-query attention: `o(softmax(mask(cap(scale · q kᵀ))) v)`.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query heads share them in equal groups.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f64,
    /// Scores s become `cap · tanh(s / cap)`.
    pub soft_cap: Option<f64>,
    /// A query sees so many positions, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// Index into [`Architecture::ropes`]; `None`: positions turn nothing.
    pub rope: Option<usize>,
    /// RMSNorm of q and k before they are turned.
    pub qk_norm: Option<QkNorm>,
    /// The modules whose outputs beside each other are q, k and v: one or three.
    pub qkv: Vec<Projection>,
    /// The projection of the heads' outputs.
    pub o: Projection,
}

/// What one norm of q or k is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head, with one weight (D) for all.
    Head,
    /// All heads together, (H D).
    Width,
}

/// Path within a layer of the norm of q.
pub const Q_NORM: &str = "self_attn.q_norm";
/// Path within a layer of the norm of k.
pub const K_NORM: &str = "self_attn.k_norm";

/// `down(gate(g) ∘ u)`.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedForward {
    /// Width of g and of u.
    pub inner: usize,
    /// What is taken of g.
    pub gate: Gate,
    /// The modules whose outputs beside each other are g and u: one or two.
    pub gate_up: Vec<Projection>,
    /// The projection of the gated values.
    pub down: Projection,
}

/// A linear module of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Path within the layer, as transformers has it: `self_attn.q_proj`.
    pub path: &'static str,
    /// Width of its input.
    pub d_in: usize,
    /// Width of its output.
    pub d_out: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// The sizes that most layers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct LayerShape {
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub inner: usize,
}

impl LayerSpec {
    /// Llama's layer: norms before both parts, q, k and v apart, full attention turned by the first rope, SwiGLU. Families change
    /// what they have otherwise.
    pub fn llama(shape: LayerShape) -> Self {
        let LayerShape { hidden, heads, kv_heads, head_dim, inner } = shape;
        let module = |path, d_in, d_out| Projection { path, d_in, d_out, bias: false };
        // What overflows is refused by `Architecture::check`, which asks for the sizes themselves.
        let [q_width, kv_width] = [heads, kv_heads].map(|heads| heads.saturating_mul(head_dim));
        Self {
            mixer: Mixer::Attention(AttentionSpec {
                heads,
                kv_heads,
                head_dim,
                scale: (head_dim as f64).powf(-0.5),
                soft_cap: None,
                window: None,
                rope: Some(0),
                qk_norm: None,
                qkv: vec![
                    module("self_attn.q_proj", hidden, q_width),
                    module("self_attn.k_proj", hidden, kv_width),
                    module("self_attn.v_proj", hidden, kv_width),
                ],
                o: module("self_attn.o_proj", q_width, hidden),
            }),
            mixer_norms: Norms { before: Some("input_layernorm"), after: None },
            feed_forward: FeedForward {
                inner,
                gate: Gate::Silu,
                gate_up: vec![module("mlp.gate_proj", hidden, inner), module("mlp.up_proj", hidden, inner)],
                down: module("mlp.down_proj", inner, hidden),
            },
            feed_forward_norms: Norms { before: Some("post_attention_layernorm"), after: None },
            residual_scale: 1.0,
        }
    }

    /// The attention of a layer.
    pub fn attention(&self) -> &AttentionSpec {
        let Mixer::Attention(attention) = &self.mixer;
        attention
    }

    /// The same, to be changed.
    pub fn attention_mut(&mut self) -> &mut AttentionSpec {
        let Mixer::Attention(attention) = &mut self.mixer;
        attention
    }
}

impl AttentionSpec {
    /// The attention over rows of these sequences.
    pub fn over<'a>(&self, sequences: &'a [Range<usize>]) -> Attention<'a> {
        Attention {
            sequences,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            window: self.window,
            scale: match self.scale == (self.head_dim as f64).powf(-0.5) {
                // In f32 throughout: what the usual scale has always been rounded to here.
                true => (self.head_dim as f32).powf(-0.5),
                false => self.scale as f32,
            },
            soft_cap: self.soft_cap.map(|cap| cap as f32),
        }
    }

    /// Width of q.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of k, and of v.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// A module by both of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSpec {
    /// Hugging Face's: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// llama.cpp's: `blk.0.attn_q`.
    pub gguf: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// Width of its input; of an embedding the vocabulary's size.
    pub d_in: usize,
    /// Width of its output.
    pub d_out: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Whether its rows are those of heads that positions turn: of q or k.
    pub turns: bool,
}

impl Architecture {
    /// All modules with weights of their own, in the order of the forward pass; a tied head has none. This is the one table of names.
    pub fn modules(&self) -> Vec<ModuleSpec> {
        let hidden = self.hidden_size;
        let module = |path: String, gguf: String, kind, d_in, d_out| ModuleSpec {
            path,
            gguf,
            kind,
            d_in,
            d_out,
            bias: false,
            turns: false,
        };
        let outside =
            |path: &str, gguf: &str, kind, d_in, d_out| module(path.to_owned(), gguf.to_owned(), kind, d_in, d_out);
        let mut all = vec![outside(EMBEDDING, "token_embd", ModuleKind::Embedding, self.vocab_size, hidden)];
        for (number, layer) in self.layers.iter().enumerate() {
            let place = |path: &str, gguf: &str| (layer_path(number, path), format!("blk.{number}.{gguf}"));
            let norm = |path: Option<&str>, gguf: &str, width: usize| {
                path.map(|path| {
                    let (path, gguf) = place(path, gguf);
                    module(path, gguf, ModuleKind::Norm, width, width)
                })
            };
            let linear = |projection: &Projection, gguf: &str| {
                let (path, gguf) = place(projection.path, gguf);
                let linear = module(path, gguf, ModuleKind::Linear, projection.d_in, projection.d_out);
                ModuleSpec { bias: projection.bias, ..linear }
            };
            let (attention, feed_forward) = (layer.attention(), &layer.feed_forward);
            all.extend(norm(layer.mixer_norms.before, "attn_norm", hidden));
            match &attention.qkv[..] {
                [q, k, v] => all.extend([
                    ModuleSpec { turns: true, ..linear(q, "attn_q") },
                    ModuleSpec { turns: true, ..linear(k, "attn_k") },
                    linear(v, "attn_v"),
                ]),
                fused => all.extend(fused.iter().map(|qkv| linear(qkv, "attn_qkv"))),
            }
            let widths = match attention.qk_norm {
                None => None,
                Some(QkNorm::Head) => Some([attention.head_dim; 2]),
                Some(QkNorm::Width) => Some([attention.q_width(), attention.kv_width()]),
            };
            if let Some([q, k]) = widths {
                all.extend(norm(Some(Q_NORM), "attn_q_norm", q));
                all.extend(norm(Some(K_NORM), "attn_k_norm", k));
            }
            all.push(linear(&attention.o, "attn_output"));
            all.extend(norm(layer.mixer_norms.after, "post_attention_norm", hidden));
            all.extend(norm(layer.feed_forward_norms.before, "ffn_norm", hidden));
            match &feed_forward.gate_up[..] {
                [gate, up] => all.extend([linear(gate, "ffn_gate"), linear(up, "ffn_up")]),
                fused => all.extend(fused.iter().map(|gate_up| linear(gate_up, "ffn_up"))),
            }
            all.push(linear(&feed_forward.down, "ffn_down"));
            all.extend(norm(layer.feed_forward_norms.after, "post_ffw_norm", hidden));
        }
        all.push(outside(FINAL_NORM, "output_norm", ModuleKind::Norm, hidden, hidden));
        if !self.tie_word_embeddings {
            all.push(outside(HEAD, "output", ModuleKind::Linear, hidden, self.vocab_size));
        }
        all
    }

    /// Bytes of the keys and values of one position, if each takes `element`.
    pub fn kv_bytes(&self, element: usize) -> usize {
        self.layers.iter().map(|layer| 2 * layer.attention().kv_width() * element).sum()
    }

    /// Refuses sizes and numbers that nothing can be computed with.
    ///
    /// # Errors
    /// The first of them.
    pub(super) fn check(&self) -> Result<()> {
        let product = |a: usize, b: usize| a.checked_mul(b).filter(|n| *n <= isize::MAX as usize / 8);
        let mut fits = product(self.vocab_size, self.hidden_size).is_some();
        for layer in &self.layers {
            let attention = layer.attention();
            let (heads, kv_heads) = (attention.heads, attention.kv_heads);
            ensure!(heads.is_multiple_of(kv_heads), "{heads} query heads cannot share {kv_heads} key heads");
            let inner = product(layer.feed_forward.inner, 2).and_then(|inner| product(inner, self.hidden_size));
            let heads = product(heads, 3 * attention.head_dim).and_then(|wide| product(wide, self.hidden_size));
            fits &= inner.is_some() && heads.is_some();
        }
        ensure!(fits, "its sizes overflow");
        for attention in self.layers.iter().map(LayerSpec::attention) {
            let (head_dim, scale) = (attention.head_dim, attention.scale as f32);
            ensure!(
                head_dim.is_multiple_of(2) && (2..=HEAD_DIM_MAX).contains(&head_dim),
                "a head of {head_dim} channels cannot be rotated"
            );
            ensure!(
                scale.is_finite() && scale > 0.0,
                "scores are multiplied by {scale}, which is no number above zero"
            );
        }
        // In f32, as it is computed with.
        let epsilon = self.rms_norm_eps as f32;
        ensure!(
            epsilon > 0.0 && epsilon < 1.0,
            "`rms_norm_eps` = {}; it is a number above 0 and below 1",
            self.rms_norm_eps
        );
        let scales = [self.embedding_scale, self.logit_scale].into_iter().chain(self.logit_cap);
        let residual = self.layers.iter().map(|layer| layer.residual_scale);
        let caps = self.layers.iter().filter_map(|layer| layer.attention().soft_cap);
        for scale in scales.chain(residual).chain(caps) {
            let sound = (scale as f32).is_finite() && scale as f32 > 0.0;
            ensure!(sound, "a multiplier or cap of {scale}, which is no number above zero");
        }
        self.ropes.iter().try_for_each(Rope::check)?;
        Ok(())
    }
}

/// Path of a module within a layer.
pub fn layer_path(layer: usize, path: &str) -> String {
    format!("model.layers.{layer}.{path}")
}
