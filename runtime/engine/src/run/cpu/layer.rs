//! A decoder layer as one operation: a hand-written forward and backward over reused buffers.
//!
//! ```text
//! x̂₁ = norm(x)              qkv = W_qkv (w₁ ∘ x̂₁)        a = attention(rotate(qkv))      x ← x + W_o a
//! x̂₂ = norm(x)              g, u = W_gu (w₂ ∘ x̂₂)        h = silu(g) ∘ u                 x ← x + W_d h
//! ```
//! W stands for a frozen weight with its low-rank update (see [`super::site`]). Kept for backward: x̂₁, qkv, a, x̂₂, g and u, the
//! narrow products with A, and one number a row here and there; `w ∘ x̂` and h are computed again, and x itself is not needed.
//! Backward has frozen products with dX only. The residual stream and its gradient are f32, all else is E.

use anyhow::Result;
use homeroom_kernels::{
    Gate, KeyValueGradients, Output, ProductElement, RotaryTable, attention, attention_backward, attention_kept, gated,
    gated_backward, rms_norm, rms_norm_backward, rotate, scale_columns,
};

use super::Rows;
use super::kv_cache::KvCache;
use super::site::{Site, SiteSaved};
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::models::architecture::{Gate, LayerSpec, Norms};
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::plain::recipe::Pass;
use crate::run::profile::timed;

/// A layer whose modules are frozen or have low-rank updates.
pub struct FusedLayer<E> {
    spec: LayerSpec,
    input_norm: Vec<f32>,
    post_norm: Vec<f32>,
    qkv: Site<E>,
    o: Site<E>,
    gate_up: Site<E>,
    down: Site<E>,
}

/// What a layer keeps for backward.
pub struct LayerSaved<E> {
    normal_1: Vec<E>,
    inverse_1: Vec<f32>,
    qkv: Vec<E>,
    qkv_saved: SiteSaved<E>,
    attended: Vec<E>,
    log_sums: Vec<f32>,
    /// The rows of `attended` that the layer went on with, if not with all.
    picked: Option<Vec<E>>,
    upper: UpperSaved<E>,
}

/// What it keeps of the part above the attention.
struct UpperSaved<E> {
    normal_2: Vec<E>,
    inverse_2: Vec<f32>,
    gate_up: Vec<E>,
    /// Of o, gate and up, down.
    sites: [SiteSaved<E>; 3],
}

impl<E: ProductElement> FusedLayer<E> {
    /// The layer; `None` when a recipe in it is something else than a low-rank update of a linear module.
    pub fn new(model: &BaseModel, adaptation: Option<&Adaptation>, layer: usize, integers: bool) -> Option<Self> {
        let (at, spec) = (&model.layers[layer], model.architecture.layers[layer].clone());
        if !is_llama(&spec) {
            return None;
        }
        let norm = |module: usize| {
            let frozen = adaptation.is_none_or(|adaptation| adaptation.of(module).is_none());
            let module = &model.modules[module];
            (frozen && module.bias.is_none()).then(|| module.weight.decode(0..1))
        };
        let site = |names, modules: &[usize]| Site::new(names, model, adaptation, modules, integers);
        Some(Self {
            spec,
            input_norm: norm(at.mixer_norm?)?,
            post_norm: norm(at.feed_forward_norm?)?,
            qkv: site(["forward qkv", "backward qkv"], &at.qkv)?,
            o: site(["forward o", "backward o"], &[at.o])?,
            gate_up: site(["forward gate up", "backward gate up"], &at.gate_up)?,
            down: site(["forward down", "backward down"], &[at.down])?,
        })
    }

    /// Whether a weight of it is multiplied in integers.
    pub fn in_integers(&self) -> bool {
        [&self.qkv, &self.o, &self.gate_up, &self.down].into_iter().any(Site::in_integers)
    }

    /// Takes the present values of the parameters over.
    ///
    /// # Errors
    /// When a parameter is not f32.
    pub fn load(&mut self, pass: &Pass<'_>) -> Result<()> {
        [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down].into_iter().try_for_each(|site| site.load(pass))
    }

    /// From x (m, C), the layer's output: of all rows, or of those with a target if no other block needs more, with `few` as
    /// their batch. Attention's keys and values are of all rows in any case. With a cache, the rows continue its sequence; its
    /// layer `kept.1` takes them in.
    pub fn forward(
        &self,
        rows: &mut Rows<'_, E>,
        few: Option<&Batch>,
        table: &RotaryTable,
        mut x: Vec<f32>,
        kept: Option<(&mut KvCache<E>, usize)>,
    ) -> (Vec<f32>, LayerSaved<E>) {
        let config = &rows.pass.model.architecture;
        let (c, epsilon) = (config.hidden_size, config.rms_norm_eps as f32);
        let shape = self.spec.attention().over(&rows.batch.sequences);
        let (q_width, width) = (shape.heads * shape.head_dim, shape.row());

        let [mut normal_1, mut scaled] = [0; 2].map(|_| rows.workspace.narrow.take(c));
        let mut inverse_1 = rows.workspace.wide.take(1);
        timed("forward norm", || {
            rms_norm(&x, &self.input_norm, epsilon, &mut normal_1, &mut inverse_1, &mut scaled);
        });
        let mut unrotated = rows.workspace.wide.take(width);
        let qkv_saved = self.qkv.forward(rows, &scaled, Output::Wide(&mut unrotated));
        rows.workspace.narrow.give(c, scaled);
        let mut qkv = rows.workspace.narrow.take(width);
        timed("forward rope", || {
            let (heads, rotated) = (shape.heads + 2 * shape.kv_heads, shape.heads + shape.kv_heads);
            rotate(&unrotated, &rows.batch.positions, heads, rotated, Some(table), &mut qkv);
        });
        rows.workspace.wide.give(width, unrotated);
        let (mut attended, mut log_sums) = (rows.workspace.narrow.take(q_width), rows.workspace.wide.take(shape.heads));
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
                let targets = &rows.batch.target_rows;
                let picked = pick(targets, q_width, &attended, rows.workspace.narrow.take(q_width));
                let picked_x = pick(targets, c, &x, rows.workspace.wide.take(c));
                rows.workspace.wide.give(c, std::mem::replace(&mut x, picked_x));
                let upper = rows.with(few, |rows| self.forward_upper(rows, &mut x, &picked));
                (Some(picked), upper)
            }
        };
        (x, LayerSaved { normal_1, inverse_1, qkv, qkv_saved, attended, log_sums, picked, upper })
    }

    /// The layer from the attention's output on, row by row: x (m, C) becomes the layer's output.
    fn forward_upper(&self, rows: &mut Rows<'_, E>, x: &mut [f32], attended: &[E]) -> UpperSaved<E> {
        let config = &rows.pass.model.architecture;
        let (c, inner, epsilon) = (config.hidden_size, self.spec.feed_forward.inner, config.rms_norm_eps as f32);
        let o_saved = self.o.forward(rows, attended, Output::Add(x));
        let [mut normal_2, mut scaled] = [0; 2].map(|_| rows.workspace.narrow.take(c));
        let mut inverse_2 = rows.workspace.wide.take(1);
        timed("forward norm", || {
            rms_norm(x, &self.post_norm, epsilon, &mut normal_2, &mut inverse_2, &mut scaled);
        });
        let mut gate_up = rows.workspace.narrow.take(2 * inner);
        let gate_up_saved = self.gate_up.forward(rows, &scaled, Output::Narrow(&mut gate_up));
        rows.workspace.narrow.give(c, scaled);
        let mut h = rows.workspace.narrow.take(inner);
        timed("forward swiglu", || gated(Gate::Silu, inner, &gate_up, &mut h));
        let down_saved = self.down.forward(rows, &h, Output::Add(x));
        rows.workspace.narrow.give(inner, h);
        UpperSaved { normal_2, inverse_2, gate_up, sites: [o_saved, gate_up_saved, down_saved] }
    }

    /// From dx, the gradient of the output, and `narrow`, the same as E, both for the input. Without `input_gradient` they are
    /// something else.
    ///
    /// # Errors
    /// When a gradient cannot be added.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        rows: &mut Rows<'_, E>,
        few: Option<&Batch>,
        table: &RotaryTable,
        partial: &mut KeyValueGradients,
        saved: LayerSaved<E>,
        (mut dx, mut narrow): (Vec<f32>, Vec<E>),
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f32>, Vec<E>)> {
        let config = &rows.pass.model.architecture;
        let c = config.hidden_size;
        let shape = self.spec.attention().over(&rows.batch.sequences);
        let (q_width, width) = (shape.heads * shape.head_dim, shape.row());
        let LayerSaved { normal_1, inverse_1, qkv, qkv_saved, attended, log_sums, picked, upper } = saved;

        let d_attended = match (few, picked) {
            (Some(few), Some(picked)) => {
                let (from, from_narrow) = (&mut dx, &mut narrow);
                let part =
                    rows.with(few, |rows| self.backward_upper(rows, upper, &picked, (from, from_narrow), gradients))?;
                let targets = &rows.batch.target_rows;
                let d_attended = place(targets, q_width, &part, rows.workspace.narrow.take(q_width));
                let placed = place(targets, c, &dx, rows.workspace.wide.take(c));
                rows.workspace.wide.give(c, std::mem::replace(&mut dx, placed));
                let buffer = rows.workspace.narrow.take(c);
                rows.workspace.narrow.give(c, std::mem::replace(&mut narrow, buffer));
                for buffer in [part, picked] {
                    rows.workspace.narrow.give(q_width, buffer);
                }
                d_attended
            }
            _ => self.backward_upper(rows, upper, &attended, (&mut dx, &mut narrow), gradients)?,
        };
        let mut d_qkv = rows.workspace.narrow.take(width);
        timed("backward attention", || {
            let turn = (&rows.batch.positions[..], Some(table));
            attention_backward(&shape, &qkv, &attended, &log_sums, &d_attended, turn, partial, &mut d_qkv);
        });
        rows.workspace.narrow.give(q_width, d_attended);
        let (mut scaled, mut dy) = (rows.workspace.narrow.take(c), rows.workspace.wide.take(c));
        timed("backward norm", || scale_columns(&normal_1, &self.input_norm, &mut scaled));
        let out = input_gradient.then_some(Output::Wide(&mut dy));
        self.qkv.backward(rows, qkv_saved, &d_qkv, &scaled, out, gradients)?;
        rows.workspace.narrow.give(width, d_qkv);
        if input_gradient {
            timed("backward norm", || {
                rms_norm_backward(&normal_1, &self.input_norm, &inverse_1, &dy, &mut dx, &mut narrow);
            });
        }
        for buffer in [scaled, normal_1] {
            rows.workspace.narrow.give(c, buffer);
        }
        rows.workspace.wide.give(c, dy);
        rows.workspace.narrow.give(width, qkv);
        rows.workspace.narrow.give(q_width, attended);
        rows.workspace.wide.give(1, inverse_1);
        rows.workspace.wide.give(shape.heads, log_sums);
        Ok((dx, narrow))
    }

    /// The gradient of the attention's output, from dx (m, C), which from that of the layer's output becomes that of the residual
    /// stream before it; `narrow` is dx as E, before and after.
    fn backward_upper(
        &self,
        rows: &mut Rows<'_, E>,
        saved: UpperSaved<E>,
        attended: &[E],
        (dx, narrow): (&mut [f32], &mut [E]),
        gradients: &mut Gradients,
    ) -> Result<Vec<E>> {
        let config = &rows.pass.model.architecture;
        let (c, inner) = (config.hidden_size, self.spec.feed_forward.inner);
        let UpperSaved { normal_2, inverse_2, gate_up, sites: [o_saved, gate_up_saved, down_saved] } = saved;
        let (mut dh, mut d_gate_up) = (rows.workspace.narrow.take(inner), rows.workspace.narrow.take(2 * inner));
        let to_h = |dh: &mut [E]| {
            timed("backward swiglu", || gated_backward(Gate::Silu, inner, &gate_up, dh, &mut d_gate_up));
        };
        self.down.backward_then(rows, down_saved, narrow, &mut dh, to_h, gradients)?;
        rows.workspace.narrow.give(inner, dh);
        rows.workspace.narrow.give(2 * inner, gate_up);
        let (mut scaled, mut dy) = (rows.workspace.narrow.take(c), rows.workspace.wide.take(c));
        timed("backward norm", || scale_columns(&normal_2, &self.post_norm, &mut scaled));
        let out = Some(Output::Wide(&mut dy));
        self.gate_up.backward(rows, gate_up_saved, &d_gate_up, &scaled, out, gradients)?;
        rows.workspace.narrow.give(2 * inner, d_gate_up);
        timed("backward norm", || rms_norm_backward(&normal_2, &self.post_norm, &inverse_2, &dy, dx, narrow));
        for buffer in [scaled, normal_2] {
            rows.workspace.narrow.give(c, buffer);
        }
        rows.workspace.wide.give(c, dy);
        rows.workspace.wide.give(1, inverse_2);
        let mut d_attended = rows.workspace.narrow.take(self.spec.attention().q_width());
        let out = Some(Output::Narrow(&mut d_attended));
        self.o.backward(rows, o_saved, narrow, attended, out, gradients)?;
        Ok(d_attended)
    }

    /// Takes back what forward kept, when there will be no backward.
    pub fn discard(&self, rows: &mut Rows<'_, E>, saved: LayerSaved<E>) {
        let config = &rows.pass.model.architecture;
        let attention = self.spec.attention();
        let (c, inner, heads) = (config.hidden_size, self.spec.feed_forward.inner, attention.heads);
        let width = attention.q_width() + 2 * attention.kv_width();
        let LayerSaved { normal_1, inverse_1, qkv, qkv_saved, attended, log_sums, picked, upper } = saved;
        for buffer in [normal_1, upper.normal_2] {
            rows.workspace.narrow.give(c, buffer);
        }
        for buffer in [inverse_1, upper.inverse_2] {
            rows.workspace.wide.give(1, buffer);
        }
        rows.workspace.narrow.give(width, qkv);
        for buffer in [attended].into_iter().chain(picked) {
            rows.workspace.narrow.give(attention.q_width(), buffer);
        }
        rows.workspace.wide.give(heads, log_sums);
        rows.workspace.narrow.give(2 * inner, upper.gate_up);
        self.qkv.discard(rows, qkv_saved);
        for (site, saved) in [&self.o, &self.gate_up, &self.down].into_iter().zip(upper.sites) {
            site.discard(rows, saved);
        }
    }
}

/// Whether a layer is one that is fused.
pub fn is_llama(spec: &LayerSpec) -> bool {
    let (attention, usual) = (spec.attention(), |norms: &Norms| norms.before.is_some() && norms.after.is_none());
    attention.qk_norm.is_none()
        && attention.soft_cap.is_none()
        && attention.rope == Some(0)
        && attention.scale == (attention.head_dim as f64).powf(-0.5)
        && usual(&spec.mixer_norms)
        && usual(&spec.feed_forward_norms)
        && attention.qkv.len() == 3
        && spec.feed_forward.gate_up.len() == 2
        && spec.feed_forward.gate == Gate::Silu
        && spec.residual_scale == 1.0
}

/// Some rows of `from`, (m, width), into a buffer.
fn pick<T: Copy>(rows: &[u32], width: usize, from: &[T], mut buffer: Vec<T>) -> Vec<T> {
    buffer.truncate(rows.len() * width);
    for (to, row) in buffer.chunks_exact_mut(width).zip(rows) {
        to.copy_from_slice(&from[*row as usize * width..][..width]);
    }
    buffer
}

/// The reverse: a buffer (m, width) of zeros but for some rows.
fn place<T: Copy + Default>(rows: &[u32], width: usize, from: &[T], mut buffer: Vec<T>) -> Vec<T> {
    buffer.fill(T::default());
    for (from, row) in from.chunks_exact(width).zip(rows) {
        buffer[*row as usize * width..][..width].copy_from_slice(from);
    }
    buffer
}
