//! A decoder layer as one operation: a hand-written forward and backward over reused buffers.
//!
//! ```text
//! qkv = W_qkv before(x)          a = attention(rotate(norm(q, k)), v)          x ← x + r after(W_o a)
//! g, u = W_gu before(x)          h = gate(g) ∘ u                               x ← x + r after(W_d h)
//! ```
//! What of this a layer has, its [`LayerSpec`] says; `before` and `after` are norms with weights of their own, or nothing. W stands
//! for a frozen weight with the low-rank update that the pass brings (see [`super::site`]). Kept for backward: what the norms made
//! x, q and k without their weights, qkv, a, g and u, the narrow products with A, and one number a row here and there; `w ∘ x̂` and h
//! are computed again, and x itself is not needed. Backward has frozen products with dX only. The residual stream and its gradient
//! are f32, all else is E.

use std::sync::PoisonError;

use anyhow::Result;
use homeroom_kernels::{
    ColumnNorm, Output, ProductElement, add_gradient, add_scaled, attention, attention_backward, attention_kept, gated,
    gated_backward, norm_columns, norm_columns_backward, rms_norm, rms_norm_add, rms_norm_add_backward,
    rms_norm_backward, rotate, scale_columns, to_elements, to_elements_scaled,
};

use super::kv_cache::KvCache;
use super::site::{Site, SiteActivations};
use super::workspace::Buffer;
use super::{InIntegers, Rows};
use crate::models::BaseModel;
use crate::models::architecture::LayerSpec;
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::profile::timed;

/// A layer of the base.
pub struct FusedLayer {
    spec: LayerSpec,
    /// Of the norms, into [`BaseModel::modules`].
    norms: Vec<usize>,
    mixer: Around,
    qk_norms: Option<[Vec<f32>; 2]>,
    feed_forward: Around,
    qkv: Site,
    o: Site,
    gate_up: Site,
    down: Site,
}

/// What is around one part of a layer.
struct Around {
    /// Weight of the norm of its input, (C).
    before: Option<Vec<f32>>,
    /// Weight of the norm of its output, (C).
    after: Option<Vec<f32>>,
    epsilon: f32,
    /// r.
    scale: f32,
}

/// What forward keeps of a layer for backward.
pub struct LayerActivations<E> {
    input: InputActivations<E>,
    /// Of q and k: x̂, and 1 / rms.
    qk: Option<(Buffer<E>, Buffer<f32>)>,
    qkv: Buffer<E>,
    qkv_activations: SiteActivations<E>,
    attended: Buffer<E>,
    log_sums: Buffer<f32>,
    /// The rows of `attended` that the layer went on with, if not with all.
    picked: Option<Buffer<E>>,
    upper: UpperActivations<E>,
}

/// What it keeps of the part above the attention.
struct UpperActivations<E> {
    mixed: OutputActivations<E>,
    input: InputActivations<E>,
    gate_up: Buffer<E>,
    fed: OutputActivations<E>,
    /// Of o, gate and up, down.
    sites: [SiteActivations<E>; 3],
}

/// What is kept of a part's input.
enum InputActivations<E> {
    /// x̂, and 1 / rms.
    Normal(Buffer<E>, Buffer<f32>),
    /// The input itself, which is x as E.
    Same(Buffer<E>),
}

/// What is kept of a norm of a part's output: ŷ, and 1 / rms.
type OutputActivations<E> = Option<(Buffer<E>, Buffer<f32>)>;

impl Around {
    /// The input of the part: x (m, C), normalised if there is a norm; and what is kept of it.
    fn input<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        x: &[f32],
        c: usize,
    ) -> (Option<Buffer<E>>, InputActivations<E>) {
        let Some(w) = &self.before else {
            let mut same = rows.narrow(c);
            timed("forward norm", || to_elements(x, &mut same));
            return (None, InputActivations::Same(same));
        };
        let [mut normal, mut scaled] = [0; 2].map(|_| rows.narrow(c));
        let mut inverse = rows.wide(1);
        timed("forward norm", || rms_norm(x, w, self.epsilon, &mut normal, &mut inverse, &mut scaled));
        (Some(scaled), InputActivations::Normal(normal, inverse))
    }

    /// That input again, of what was kept.
    fn input_again<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        activations: &InputActivations<E>,
        c: usize,
    ) -> Option<Buffer<E>> {
        let (Some(w), InputActivations::Normal(normal, _)) = (&self.before, activations) else { return None };
        let mut scaled = rows.narrow(c);
        timed("backward norm", || scale_columns(normal, w, &mut scaled));
        Some(scaled)
    }

    /// Adds the gradient in x of the gradient dy (m, C) of that input to dx; `narrow` becomes dx as E.
    fn input_backward<E: ProductElement>(
        &self,
        activations: &InputActivations<E>,
        dy: &[f32],
        dx: &mut [f32],
        narrow: &mut [E],
    ) {
        timed("backward norm", || match (&self.before, activations) {
            (Some(w), InputActivations::Normal(normal, inverse)) => {
                rms_norm_backward(normal, w, inverse, dy, dx, narrow)
            }
            _ => add_gradient(dy, dx, narrow),
        });
    }

    /// x += r after(y), y being what the site makes of its input.
    fn output<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        site: &Site,
        input: &[E],
        x: &mut [f32],
        c: usize,
    ) -> (SiteActivations<E>, OutputActivations<E>) {
        if self.adds() {
            return (site.forward(rows, input, Output::Add(x)), None);
        }
        let mut y = rows.wide(c);
        let activations = site.forward(rows, input, Output::Wide(&mut y));
        let Some(w) = &self.after else {
            timed("forward norm", || add_scaled(x, &y, self.scale));
            return (activations, None);
        };
        let (mut normal, mut inverse) = (rows.narrow(c), rows.wide(1));
        timed("forward norm", || rms_norm_add(&y, w, self.epsilon, self.scale, &mut normal, &mut inverse, x));
        (activations, Some((normal, inverse)))
    }

    /// Whether outputs are added as they are.
    fn adds(&self) -> bool {
        self.after.is_none() && self.scale == 1.0
    }

    /// The gradient of y as E, of dx (m, C); `None`: dx as E itself.
    fn output_backward<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        activations: &OutputActivations<E>,
        dx: &[f32],
        c: usize,
    ) -> Option<Buffer<E>> {
        if self.adds() {
            return None;
        }
        let mut dy = rows.narrow(c);
        timed("backward norm", || match (&self.after, activations) {
            (Some(w), Some((normal, inverse))) => {
                rms_norm_add_backward(normal, w, inverse, self.scale, dx, &mut dy);
            }
            _ => to_elements_scaled(dx, self.scale, &mut dy),
        });
        Some(dy)
    }
}

impl FusedLayer {
    /// The layer; `None` when a norm has a bias or a width is no whole number of words.
    pub fn new<E: ProductElement>(model: &BaseModel, layer: usize, integers: InIntegers) -> Option<Self> {
        let (architecture, at) = (&model.architecture, &model.layers[layer]);
        let spec = architecture.layers[layer].clone();
        let mut norms = Vec::new();
        let mut norm = |module: Option<usize>| {
            let Some(module) = module else { return Some(None) };
            norms.push(module);
            let module = &model.modules[module];
            module.bias.is_none().then(|| Some(module.weight.decode(0..1)))
        };
        let (epsilon, scale) = (architecture.rms_norm_eps as f32, spec.residual_scale as f32);
        let mixer = Around { before: norm(at.mixer_norm)?, after: norm(at.mixer_post_norm)?, epsilon, scale };
        let qk_norms = match at.qk_norms {
            Some([q, k]) => Some([norm(Some(q))??, norm(Some(k))??]),
            None => None,
        };
        let feed_forward =
            Around { before: norm(at.feed_forward_norm)?, after: norm(at.feed_forward_post_norm)?, epsilon, scale };
        let site = |names, modules: &[usize]| Site::new::<E>(names, model, modules, integers);
        // Halves of a row of g and u, and heads, begin at whole words.
        let whole = |width: usize| width.is_multiple_of(E::PER_WORD);
        (whole(spec.feed_forward.inner) && whole(spec.attention().head_dim)).then_some(())?;
        Some(Self {
            norms,
            mixer,
            qk_norms,
            feed_forward,
            qkv: site(["forward qkv", "backward qkv"], &at.qkv)?,
            o: site(["forward o", "backward o"], &[at.o])?,
            gate_up: site(["forward gate up", "backward gate up"], &at.gate_up)?,
            down: site(["forward down", "backward down"], &[at.down])?,
            spec,
        })
    }

    /// Indices of its norms. It is run where they are frozen.
    pub fn norms(&self) -> &[usize] {
        &self.norms
    }

    /// Its sites. It is run where each module of them is frozen or has a low-rank update.
    pub fn sites(&self) -> [&Site; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// Whether a weight of it is multiplied in integers.
    pub fn in_integers(&self) -> bool {
        self.sites().into_iter().any(Site::in_integers)
    }

    /// The norms of q and k by the columns that they are over; none where there are none.
    fn column_norms(&self) -> Vec<ColumnNorm<'_>> {
        let attention = self.spec.attention();
        let places = [(0, attention.q_width()), (attention.q_width(), attention.kv_width())];
        let norms = self.qk_norms.iter().flatten().zip(places);
        norms.map(|(weight, (at, width))| ColumnNorm { at, groups: width / weight.len(), weight }).collect()
    }

    /// From x (m, C), the layer's output: of all rows, or of those with a target if no other block needs more, with `targets` as
    /// their batch. Attention's keys and values are of all rows in any case. With a cache, the rows continue its sequence; its
    /// layer `cache.1` takes them in.
    pub fn forward<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        targets: Option<&Batch>,
        mut x: Buffer<f32>,
        cache: Option<(&mut KvCache<E>, usize)>,
    ) -> (Buffer<f32>, LayerActivations<E>) {
        let c = rows.pass.model.architecture.hidden_size;
        let shape = self.spec.attention().over(&rows.batch.sequences);
        let (q_width, width) = (shape.heads * shape.head_dim, shape.row());

        let (scaled, input) = self.mixer.input(rows, &x, c);
        let mut unrotated = rows.wide(width);
        let of = of_input(&scaled, &input);
        let qkv_activations = self.qkv.forward(rows, of, Output::Wide(&mut unrotated));
        drop(scaled);
        let norms = self.column_norms();
        let qk = (!norms.is_empty()).then(|| {
            let columns = norms.iter().map(|norm| norm.groups * norm.weight.len()).sum();
            let (mut normal, mut inverse) = (rows.narrow(columns), rows.wide(norms.iter().map(|n| n.groups).sum()));
            let epsilon = self.mixer.epsilon;
            timed("forward norm", || {
                norm_columns(&mut unrotated, width, &norms, epsilon, &mut normal, &mut inverse);
            });
            (normal, inverse)
        });
        let mut qkv = rows.narrow(width);
        timed("forward rope", || {
            let (heads, rotated) = (shape.heads + 2 * shape.kv_heads, shape.heads + shape.kv_heads);
            let (positions, table) = rows.turning(self.spec.attention().rope);
            rotate(&unrotated, positions, heads, rotated, table, &mut qkv);
        });
        drop(unrotated);
        let (mut attended, mut log_sums) = (rows.narrow(q_width), rows.wide(shape.heads));
        timed("forward attention", || match cache {
            None => attention(&shape, &qkv, &mut attended, &mut log_sums),
            Some((cache, number)) => {
                let keys_values = cache.extend(number, qkv.chunks_exact(width).map(|row| &row[q_width..]));
                attention_kept(&shape, &qkv, keys_values, &mut attended);
            }
        });

        let (picked, upper) = match targets {
            None => (None, self.forward_upper(rows, &mut x, &attended)),
            Some(targets) => {
                let (indices, part) = (&rows.batch.target_rows, &rows.of(targets));
                let mut picked = part.narrow(q_width);
                pick(indices, q_width, &attended, &mut picked);
                let mut picked_x = part.wide(c);
                pick(indices, c, &x, &mut picked_x);
                x = picked_x;
                let upper = self.forward_upper(part, &mut x, &picked);
                (Some(picked), upper)
            }
        };
        (x, LayerActivations { input, qk, qkv, qkv_activations, attended, log_sums, picked, upper })
    }

    /// The layer from the attention's output on, row by row: x (m, C) becomes the layer's output.
    fn forward_upper<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        x: &mut [f32],
        attended: &[E],
    ) -> UpperActivations<E> {
        let (c, inner) = (rows.pass.model.architecture.hidden_size, self.spec.feed_forward.inner);
        let (o_activations, mixed) = self.mixer.output(rows, &self.o, attended, x, c);
        let (scaled, input) = self.feed_forward.input(rows, x, c);
        let mut gate_up = rows.narrow(2 * inner);
        let gate_up_activations = self.gate_up.forward(rows, of_input(&scaled, &input), Output::Narrow(&mut gate_up));
        drop(scaled);
        let mut h = rows.narrow(inner);
        timed("forward gate", || gated(self.spec.feed_forward.gate, inner, &gate_up, &mut h));
        let (down_activations, fed) = self.feed_forward.output(rows, &self.down, &h, x, c);
        UpperActivations { mixed, input, gate_up, fed, sites: [o_activations, gate_up_activations, down_activations] }
    }

    /// From dx, the gradient of the output, and `narrow`, the same as E, both for the input. If `input_gradient` is
    /// false, both buffers hold unspecified values.
    ///
    /// # Errors
    /// When a gradient cannot be added.
    pub fn backward<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        targets: Option<&Batch>,
        activations: LayerActivations<E>,
        (mut dx, mut narrow): (Buffer<f32>, Buffer<E>),
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<(Buffer<f32>, Buffer<E>)> {
        let c = rows.pass.model.architecture.hidden_size;
        let shape = self.spec.attention().over(&rows.batch.sequences);
        let (q_width, width) = (shape.heads * shape.head_dim, shape.row());
        let LayerActivations { input, qk, qkv, qkv_activations, attended, log_sums, picked, upper } = activations;

        let d_attended = match (targets, picked) {
            (Some(targets), Some(picked)) => {
                let from = (&mut dx[..], &mut narrow[..]);
                let part = self.backward_upper(&rows.of(targets), upper, &picked, from, gradients)?;
                let indices = &rows.batch.target_rows;
                let mut d_attended = rows.narrow(q_width);
                place(indices, q_width, &part, &mut d_attended);
                let mut placed = rows.wide(c);
                place(indices, c, &dx, &mut placed);
                (dx, narrow) = (placed, rows.narrow(c));
                d_attended
            }
            _ => self.backward_upper(rows, upper, &attended, (&mut dx, &mut narrow), gradients)?,
        };
        let mut d_qkv = rows.narrow(width);
        timed("backward attention", || {
            let turn = rows.turning(self.spec.attention().rope);
            let partial = &mut rows.workspace.partial.lock().unwrap_or_else(PoisonError::into_inner);
            attention_backward(&shape, &qkv, &attended, &log_sums, &d_attended, turn, partial, &mut d_qkv);
        });
        drop(d_attended);
        if let Some((normal, inverse)) = &qk {
            timed("backward norm", || norm_columns_backward(normal, width, &self.column_norms(), inverse, &mut d_qkv));
        }
        let scaled = self.mixer.input_again(rows, &input, c);
        let mut dy = rows.wide(c);
        let out = input_gradient.then_some(Output::Wide(&mut dy));
        self.qkv.backward(rows, qkv_activations, &d_qkv, of_input(&scaled, &input), out, gradients)?;
        drop((d_qkv, scaled));
        if input_gradient {
            self.mixer.input_backward(&input, &dy, &mut dx, &mut narrow);
        }
        Ok((dx, narrow))
    }

    /// The gradient of the attention's output, from dx (m, C), which from that of the layer's output becomes that of the residual
    /// stream before it; `narrow` is dx as E, before and after.
    fn backward_upper<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        activations: UpperActivations<E>,
        attended: &[E],
        (dx, narrow): (&mut [f32], &mut [E]),
        gradients: &mut Gradients,
    ) -> Result<Buffer<E>> {
        let (c, inner) = (rows.pass.model.architecture.hidden_size, self.spec.feed_forward.inner);
        let UpperActivations {
            mixed,
            input,
            gate_up,
            fed,
            sites: [o_activations, gate_up_activations, down_activations],
        } = activations;
        let (mut dh, mut d_gate_up) = (rows.narrow(inner), rows.narrow(2 * inner));
        let gate = self.spec.feed_forward.gate;
        let to_h = |dh: &mut [E]| {
            timed("backward gate", || gated_backward(gate, inner, &gate_up, dh, &mut d_gate_up));
        };
        let own = self.feed_forward.output_backward(rows, &fed, dx, c);
        self.down.backward_then(rows, down_activations, own.as_deref().unwrap_or(narrow), &mut dh, to_h, gradients)?;
        drop((dh, gate_up, own, fed));
        let scaled = self.feed_forward.input_again(rows, &input, c);
        let mut dy = rows.wide(c);
        let out = Some(Output::Wide(&mut dy));
        self.gate_up.backward(rows, gate_up_activations, &d_gate_up, of_input(&scaled, &input), out, gradients)?;
        drop(d_gate_up);
        self.feed_forward.input_backward(&input, &dy, dx, narrow);
        drop((scaled, dy, input));
        let mut d_attended = rows.narrow(self.spec.attention().q_width());
        let own = self.mixer.output_backward(rows, &mixed, dx, c);
        let out = Some(Output::Narrow(&mut d_attended));
        self.o.backward(rows, o_activations, own.as_deref().unwrap_or(narrow), attended, out, gradients)?;
        Ok(d_attended)
    }
}

/// The input of a part: normalised, or kept as it is.
fn of_input<'a, E>(scaled: &'a Option<Buffer<E>>, activations: &'a InputActivations<E>) -> &'a [E] {
    match (scaled, activations) {
        (Some(scaled), _) => scaled,
        (None, InputActivations::Same(same) | InputActivations::Normal(same, _)) => same,
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
