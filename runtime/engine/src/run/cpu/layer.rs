//! A decoder layer as one operation: a hand-written forward and backward over reused buffers.
//!
//! ```text
//! x̂₁ = norm(x)              qkv = W_qkv (w₁ ∘ x̂₁)        a = attention(rotate(qkv))      x ← x + W_o a
//! x̂₂ = norm(x)              g, u = W_gu (w₂ ∘ x̂₂)        h = silu(g) ∘ u                 x ← x + W_d h
//! ```
//! W stands for a frozen weight with the low-rank update that the pass brings (see [`super::site`]). Kept for backward: x̂₁, qkv, a, x̂₂, g and u, the
//! narrow products with A, and one number a row here and there; `w ∘ x̂` and h are computed again, and x itself is not needed.
//! Backward has frozen products with dX only. The residual stream and its gradient are f32, all else is E.

use std::sync::PoisonError;

use anyhow::Result;
use homeroom_kernels::{
    Output, ProductElement, attention, attention_backward, attention_kept, rms_norm, rms_norm_backward, rotate,
    scale_columns, swiglu, swiglu_backward,
};

use super::Rows;
use super::kv_cache::KvCache;
use super::site::{Site, SiteSaved};
use super::workspace::Buffer;
use crate::models::BaseModel;
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::profile::timed;

/// A layer of the base.
pub struct FusedLayer {
    /// Of the norms, into [`BaseModel::modules`].
    norms: [usize; 2],
    input_norm: Vec<f32>,
    post_norm: Vec<f32>,
    qkv: Site,
    o: Site,
    gate_up: Site,
    down: Site,
}

/// What a layer keeps for backward.
pub struct LayerSaved<E> {
    normal_1: Buffer<E>,
    inverse_1: Buffer<f32>,
    qkv: Buffer<E>,
    qkv_saved: SiteSaved<E>,
    attended: Buffer<E>,
    log_sums: Buffer<f32>,
    /// The rows of `attended` that the layer went on with, if not with all.
    picked: Option<Buffer<E>>,
    upper: UpperSaved<E>,
}

/// What it keeps of the part above the attention.
struct UpperSaved<E> {
    normal_2: Buffer<E>,
    inverse_2: Buffer<f32>,
    gate_up: Buffer<E>,
    /// Of o, gate and up, down.
    sites: [SiteSaved<E>; 3],
}

impl FusedLayer {
    /// The layer; `None` when a norm has a bias or a width is no whole number of words.
    pub fn new<E: ProductElement>(model: &BaseModel, layer: usize, integers: bool) -> Option<Self> {
        let at = model.layers[layer];
        let norm = |module: usize| {
            let module = &model.modules[module];
            module.bias.is_none().then(|| module.weight.decode(0..1))
        };
        let site = |names, modules: &[usize]| Site::new::<E>(names, model, modules, integers);
        Some(Self {
            norms: [at.input_norm, at.post_norm],
            input_norm: norm(at.input_norm)?,
            post_norm: norm(at.post_norm)?,
            qkv: site(["forward qkv", "backward qkv"], &[at.q, at.k, at.v])?,
            o: site(["forward o", "backward o"], &[at.o])?,
            gate_up: site(["forward gate up", "backward gate up"], &[at.gate, at.up])?,
            down: site(["forward down", "backward down"], &[at.down])?,
        })
    }

    /// Indices of its norms. It is run where they are frozen.
    pub fn norms(&self) -> [usize; 2] {
        self.norms
    }

    /// Its sites. It is run where each module of them is frozen or has a low-rank update.
    pub fn sites(&self) -> [&Site; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// Whether a weight of it is multiplied in integers.
    pub fn in_integers(&self) -> bool {
        self.sites().into_iter().any(Site::in_integers)
    }

    /// From x (m, C), the layer's output: of all rows, or of those with a target if no other block needs more, with `few` as
    /// their batch. Attention's keys and values are of all rows in any case. With a cache, the rows continue its sequence; its
    /// layer `kept.1` takes them in.
    pub fn forward<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        few: Option<&Batch>,
        mut x: Buffer<f32>,
        kept: Option<(&mut KvCache<E>, usize)>,
    ) -> (Buffer<f32>, LayerSaved<E>) {
        let config = &rows.pass.model.config;
        let (c, epsilon) = (config.hidden_size, config.rms_norm_eps as f32);
        let shape = config.attention(&rows.batch.sequences);
        let (q_width, width) = (shape.heads * shape.head_dim, shape.row());

        let [mut normal_1, mut scaled] = [0; 2].map(|_| rows.narrow(c));
        let mut inverse_1 = rows.wide(1);
        timed("forward norm", || {
            rms_norm(&x, &self.input_norm, epsilon, &mut normal_1, &mut inverse_1, &mut scaled);
        });
        let mut unrotated = rows.wide(width);
        let qkv_saved = self.qkv.forward(rows, &scaled, Output::Wide(&mut unrotated));
        drop(scaled);
        let mut qkv = rows.narrow(width);
        timed("forward rope", || {
            let (heads, rotated) = (shape.heads + 2 * shape.kv_heads, shape.heads + shape.kv_heads);
            rotate(&unrotated, &rows.batch.positions, heads, rotated, rows.table, &mut qkv);
        });
        drop(unrotated);
        let (mut attended, mut log_sums) = (rows.narrow(q_width), rows.wide(shape.heads));
        timed("forward attention", || match kept {
            None => attention(&shape, &qkv, &mut attended, &mut log_sums),
            Some((cache, number)) => {
                let kept = cache.extend(number, qkv.chunks_exact(width).map(|row| &row[q_width..]));
                attention_kept(&shape, &qkv, kept, &mut attended);
            }
        });

        let (picked, upper) = match few {
            None => (None, self.forward_upper(rows, &mut x, &attended)),
            Some(few) => {
                let (targets, part) = (&rows.batch.target_rows, &rows.of(few));
                let mut picked = part.narrow(q_width);
                pick(targets, q_width, &attended, &mut picked);
                let mut picked_x = part.wide(c);
                pick(targets, c, &x, &mut picked_x);
                x = picked_x;
                let upper = self.forward_upper(part, &mut x, &picked);
                (Some(picked), upper)
            }
        };
        (x, LayerSaved { normal_1, inverse_1, qkv, qkv_saved, attended, log_sums, picked, upper })
    }

    /// The layer from the attention's output on, row by row: x (m, C) becomes the layer's output.
    fn forward_upper<E: ProductElement>(&self, rows: &Rows<'_, E>, x: &mut [f32], attended: &[E]) -> UpperSaved<E> {
        let config = &rows.pass.model.config;
        let (c, inner, epsilon) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps as f32);
        let o_saved = self.o.forward(rows, attended, Output::Add(x));
        let [mut normal_2, mut scaled] = [0; 2].map(|_| rows.narrow(c));
        let mut inverse_2 = rows.wide(1);
        timed("forward norm", || {
            rms_norm(x, &self.post_norm, epsilon, &mut normal_2, &mut inverse_2, &mut scaled);
        });
        let mut gate_up = rows.narrow(2 * inner);
        let gate_up_saved = self.gate_up.forward(rows, &scaled, Output::Narrow(&mut gate_up));
        drop(scaled);
        let mut h = rows.narrow(inner);
        timed("forward swiglu", || swiglu(inner, &gate_up, &mut h));
        let down_saved = self.down.forward(rows, &h, Output::Add(x));
        UpperSaved { normal_2, inverse_2, gate_up, sites: [o_saved, gate_up_saved, down_saved] }
    }

    /// From dx, the gradient of the output, and `narrow`, the same as E, both for the input. Without `input_gradient` they are
    /// something else.
    ///
    /// # Errors
    /// When a gradient cannot be added.
    pub fn backward<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        few: Option<&Batch>,
        saved: LayerSaved<E>,
        (mut dx, mut narrow): (Buffer<f32>, Buffer<E>),
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<(Buffer<f32>, Buffer<E>)> {
        let config = &rows.pass.model.config;
        let c = config.hidden_size;
        let shape = config.attention(&rows.batch.sequences);
        let (q_width, width) = (shape.heads * shape.head_dim, shape.row());
        let LayerSaved { normal_1, inverse_1, qkv, qkv_saved, attended, log_sums, picked, upper } = saved;

        let d_attended = match (few, picked) {
            (Some(few), Some(picked)) => {
                let from = (&mut dx[..], &mut narrow[..]);
                let part = self.backward_upper(&rows.of(few), upper, &picked, from, gradients)?;
                let targets = &rows.batch.target_rows;
                let mut d_attended = rows.narrow(q_width);
                place(targets, q_width, &part, &mut d_attended);
                let mut placed = rows.wide(c);
                place(targets, c, &dx, &mut placed);
                (dx, narrow) = (placed, rows.narrow(c));
                d_attended
            }
            _ => self.backward_upper(rows, upper, &attended, (&mut dx, &mut narrow), gradients)?,
        };
        let mut d_qkv = rows.narrow(width);
        timed("backward attention", || {
            let turn = (&rows.batch.positions[..], rows.table);
            let partial = &mut rows.workspace.partial.lock().unwrap_or_else(PoisonError::into_inner);
            attention_backward(&shape, &qkv, &attended, &log_sums, &d_attended, turn, partial, &mut d_qkv);
        });
        drop(d_attended);
        let (mut scaled, mut dy) = (rows.narrow(c), rows.wide(c));
        timed("backward norm", || scale_columns(&normal_1, &self.input_norm, &mut scaled));
        let out = input_gradient.then_some(Output::Wide(&mut dy));
        self.qkv.backward(rows, qkv_saved, &d_qkv, &scaled, out, gradients)?;
        drop(d_qkv);
        if input_gradient {
            timed("backward norm", || {
                rms_norm_backward(&normal_1, &self.input_norm, &inverse_1, &dy, &mut dx, &mut narrow);
            });
        }
        Ok((dx, narrow))
    }

    /// The gradient of the attention's output, from dx (m, C), which from that of the layer's output becomes that of the residual
    /// stream before it; `narrow` is dx as E, before and after.
    fn backward_upper<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        saved: UpperSaved<E>,
        attended: &[E],
        (dx, narrow): (&mut [f32], &mut [E]),
        gradients: &mut Gradients,
    ) -> Result<Buffer<E>> {
        let config = &rows.pass.model.config;
        let (c, inner) = (config.hidden_size, config.intermediate_size);
        let UpperSaved { normal_2, inverse_2, gate_up, sites: [o_saved, gate_up_saved, down_saved] } = saved;
        let (mut dh, mut d_gate_up) = (rows.narrow(inner), rows.narrow(2 * inner));
        let to_h = |dh: &mut [E]| {
            timed("backward swiglu", || swiglu_backward(inner, &gate_up, dh, &mut d_gate_up));
        };
        self.down.backward_then(rows, down_saved, narrow, &mut dh, to_h, gradients)?;
        drop((dh, gate_up));
        let (mut scaled, mut dy) = (rows.narrow(c), rows.wide(c));
        timed("backward norm", || scale_columns(&normal_2, &self.post_norm, &mut scaled));
        let out = Some(Output::Wide(&mut dy));
        self.gate_up.backward(rows, gate_up_saved, &d_gate_up, &scaled, out, gradients)?;
        drop(d_gate_up);
        timed("backward norm", || rms_norm_backward(&normal_2, &self.post_norm, &inverse_2, &dy, dx, narrow));
        drop((scaled, dy, normal_2));
        let mut d_attended = rows.narrow(config.num_attention_heads * config.head_dim);
        let out = Some(Output::Narrow(&mut d_attended));
        self.o.backward(rows, o_saved, narrow, attended, out, gradients)?;
        Ok(d_attended)
    }
}

/// Some rows of `from`, (m, width).
fn pick<T: Copy>(rows: &[u32], width: usize, from: &[T], to: &mut [T]) {
    for (to, row) in to.chunks_exact_mut(width).zip(rows) {
        to.copy_from_slice(&from[*row as usize * width..][..width]);
    }
}

/// The reverse: `to`, (m, width), is zero but for some rows.
fn place<T: Copy + Default>(rows: &[u32], width: usize, from: &[T], to: &mut [T]) {
    to.fill(T::default());
    for (from, row) in from.chunks_exact(width).zip(rows) {
        to[*row as usize * width..][..width].copy_from_slice(from);
    }
}
