//! One further token of one or several sequences: every weight is read once, decoded and multiplied in one pass, with low-rank
//! updates in the same sums. Activations are f32; unless all is to be exact, those that meet quantised weights are rounded to eight
//! bits by groups of 32 on the way.
//!
//! Results lie by output channel first, (n, m), for m sequences, so that a task has its part of them in one piece.

use homeroom_kernels::{
    ColumnNorm, Element, FewRows, Gate, RoundedRows, Team, attend, attend_join, attend_tasks, attend_values, gemv,
    lead, normalise_columns, soft_cap, threads,
};

use super::kv_cache::KvCache;
use super::rotary::Rotary;
use super::updates::{DecodeUpdates, Up};
use crate::adapt::adaptation::Adaptation;
use crate::models::{BaseModel, EMBEDDING, FINAL_NORM, HEAD};

/// A base, laid out for decoding. It holds nothing of an adapter: each step is given the updates that it goes with.
pub struct Decoder {
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    head: Site,
    embedding: usize,
    /// Norms and the embedding, which an adapter must leave as they are.
    frozen: Vec<usize>,
    /// Whether x is rounded to eight bits where weights take it so.
    round: bool,
}

/// What a token's work is done with.
#[derive(Clone, Copy)]
struct Work<'a> {
    team: &'a Team,
    model: &'a BaseModel,
    updates: &'a DecodeUpdates,
}

struct Layer {
    mixer_norms: Around,
    /// Weights of the norms of q and of k.
    qk_norms: Option<[Vec<f32>; 2]>,
    feed_forward_norms: Around,
    qkv: Site,
    o: Site,
    gate_up: Site,
    down: Site,
}

/// Weights of the norms around a part of a layer.
struct Around {
    before: Option<Vec<f32>>,
    after: Option<Vec<f32>>,
}

/// Modules that share an input, as in [`crate::run::cpu`].
struct Site {
    modules: Vec<Linear>,
    /// Whether x is rounded to eight bits for modules that take it so.
    rounds: bool,
}

struct Linear {
    /// Index into [`BaseModel::modules`].
    index: usize,
    d_out: usize,
}

impl Site {
    fn new(model: &BaseModel, indices: &[usize], round: bool) -> Self {
        let rounds = round && indices.iter().any(|index| model.modules[*index].weight.matrix().takes_rounded());
        let linear = |index: &usize| Linear { index: *index, d_out: model.modules[*index].info.d_out };
        Self { modules: indices.iter().map(linear).collect(), rounds }
    }

    /// Its first module, which names it among the updates.
    fn first(&self) -> usize {
        self.modules[0].index
    }

    fn d_out(&self) -> usize {
        self.modules.iter().map(|module| module.d_out).sum()
    }

    /// Calls `rows` for parts of `out`, `size` rows of m values each, with x, in eight bits besides where a module takes it so,
    /// and what waits for
    /// `u = x Aᵀ` of all modules (rank, m).
    fn parts(
        &self,
        work: Work<'_>,
        x: FewRows<'_>,
        out: (&mut [f32], usize),
        rows: impl for<'u> Fn(usize, &mut [f32], FewRows<'_>, &dyn Fn() -> &'u [f32]) + Sync,
    ) {
        let m = x.values.len() / x.step;
        let (out, size) = out;
        let rounded = self.rounds.then(|| RoundedRows::new(x));
        let x = FewRows { rounded: rounded.as_ref(), ..x };
        let Some(a) = &work.updates.site(self.first()).a else {
            return work.team.parts(out, size * m, |task, out| rows(task * size, out, x, &|| &[]));
        };
        let mut u = vec![0f32; a.rows() * m];
        let down = part(a.rows());
        let first = |task: usize, u: &mut [f32]| a.product(work.updates, x, task * down, u);
        work.team.parts_then((&mut u, down * m), first, (out, size * m), |task, out, u| rows(task * size, out, x, u));
    }

    /// Rows `from..` of a module's output into `out` (rows, m).
    ///
    /// `u` waits for that of all modules.
    fn rows<'u>(
        &self,
        work: Work<'_>,
        module: usize,
        x: FewRows<'_>,
        u: &dyn Fn() -> &'u [f32],
        from: usize,
        out: &mut [f32],
    ) {
        let update = &work.updates.site(self.first()).modules[module];
        let m = x.values.len() / x.step;
        let rows = from..from + out.len() / m;
        let module = &work.model.modules[self.modules[module].index];
        gemv(x, &module.weight.matrix(), rows.clone(), out);
        if let Some(Up { at, b, gain }) = update {
            let u = &u()[at * m..(at + b.panels.cols()) * m];
            b.panels.add(work.updates.bytes(b), u, m, rows.clone(), out);
            if let Some(gain) = gain {
                for (out, gain) in out.chunks_exact_mut(m).zip(&gain[rows.clone()]) {
                    out.iter_mut().for_each(|out| *out *= gain);
                }
            }
        }
        if let Some(bias) = &module.bias {
            for (out, bias) in out.chunks_exact_mut(m).zip(&bias[rows]) {
                out.iter_mut().for_each(|out| *out += bias);
            }
        }
    }

    /// All outputs beside each other: `out` (d_out, m), from x (m, d_in).
    fn run(&self, work: Work<'_>, x: FewRows<'_>, out: &mut [f32]) {
        let m = x.values.len() / x.step;
        self.parts(work, x, (out, part(self.d_out())), |mut from, mut out, x, u| {
            let mut first = 0;
            for (module, linear) in self.modules.iter().enumerate() {
                let here = (first..first + linear.d_out).contains(&from);
                if here && !out.is_empty() {
                    let count = (first + linear.d_out - from).min(out.len() / m);
                    let (now, rest) = std::mem::take(&mut out).split_at_mut(count * m);
                    self.rows(work, module, x, u, from - first, now);
                    (out, from) = (rest, from + count);
                }
                first += linear.d_out;
            }
        });
    }

    /// `f(g) ∘ u` of the modules of a gated layer, one or two: `out` (inner, m).
    fn run_gated(&self, work: Work<'_>, gate: Gate, x: FewRows<'_>, out: &mut [f32]) {
        let m = x.values.len() / x.step;
        // u is the other module, or the other half of the only one.
        let (other, at) = if self.modules.len() > 1 { (1, 0) } else { (0, out.len() / m) };
        let size = part(out.len() / m).min(MOST / m.min(MOST) / 16 * 16).max(16);
        self.parts(work, x, (out, size), |from, out, x, u| {
            let mut up = [0f32; MOST];
            let mut more = Vec::new();
            let up = if out.len() <= MOST {
                &mut up[..out.len()]
            } else {
                more.resize(out.len(), 0.0);
                &mut more[..]
            };
            self.rows(work, 0, x, u, from, out);
            self.rows(work, other, x, u, at + from, up);
            homeroom_kernels::gate(gate, out, up);
        });
    }
}

/// Values of a task of a gated layer that need no allocation.
const MOST: usize = 512;

/// Rows of a task, whole panels: few enough that threads end together, enough that taking one costs nothing beside it.
fn part(rows: usize) -> usize {
    (rows / (4 * threads())).clamp(16, 256).next_multiple_of(16)
}

impl Decoder {
    /// The layout; `None` when a norm has a bias or the model has no head.
    ///
    /// `round`: x is rounded to eight bits where weights take it so, and updates are kept in half precision or in eight bits.
    pub fn new(model: &BaseModel, round: bool) -> Option<Self> {
        let mut frozen = Vec::new();
        let mut norm = |index: Option<usize>| {
            let Some(index) = index else { return Some(None) };
            frozen.push(index);
            let module = &model.modules[index];
            module.bias.is_none().then(|| Some(module.weight.decode(0..1)))
        };
        let site = |modules: &[usize]| Site::new(model, modules, round);
        let layers = model.layers.iter().map(|at| {
            Some(Layer {
                mixer_norms: Around { before: norm(at.mixer_norm)?, after: norm(at.mixer_post_norm)? },
                qk_norms: match at.qk_norms {
                    Some([q, k]) => Some([norm(Some(q))??, norm(Some(k))??]),
                    None => None,
                },
                feed_forward_norms: Around {
                    before: norm(at.feed_forward_norm)?,
                    after: norm(at.feed_forward_post_norm)?,
                },
                qkv: site(&at.qkv),
                o: site(&[at.o]),
                gate_up: site(&at.gate_up),
                down: site(&[at.down]),
            })
        });
        let layers = layers.collect::<Option<Vec<Layer>>>()?;
        let (final_norm, head) = (norm(model.module_index(FINAL_NORM))??, site(&[model.module_index(HEAD)?]));
        let embedding = model.module_index(EMBEDDING)?;
        frozen.push(embedding);
        Some(Self { layers, final_norm, head, embedding, frozen, round })
    }

    /// The low-rank updates of an adaptation, or none, with their present values; `None` when it is something else.
    pub fn updates(&self, model: &BaseModel, adaptation: Option<&Adaptation>) -> Option<DecodeUpdates> {
        let of_layers = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.o, &layer.gate_up, &layer.down]);
        let sites = of_layers.chain([&self.head]);
        let sites = sites.map(|site| (site.modules.iter().map(|linear| linear.index).collect(), site.rounds));
        DecodeUpdates::new(model, adaptation, self.frozen.iter().copied(), sites, self.round)
    }

    /// Logits (m, V) after a further token of each sequence, which its cache takes in.
    pub fn step<E: Element>(
        &self,
        model: &BaseModel,
        updates: &DecodeUpdates,
        rotary: &Rotary,
        sequences: &mut [(u32, &mut KvCache<E>)],
    ) -> Vec<Vec<f32>> {
        let mut x = Vec::with_capacity(sequences.len() * model.architecture.hidden_size);
        for (id, _) in sequences.iter() {
            x.extend(model.modules[self.embedding].weight.decode(*id as usize..*id as usize + 1));
        }
        let scale = model.architecture.embedding_scale as f32;
        if scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= scale);
        }
        lead(|team| {
            let work = Work { team, model, updates };
            for (number, layer) in self.layers.iter().enumerate() {
                layer.run(work, rotary, number, sequences, &mut x);
            }
            for (_, cache) in sequences.iter_mut() {
                cache.advance(1, false);
            }
            self.logits(work, &x)
        })
    }

    /// Logits after rows of the residual stream x (m, C).
    pub fn head(&self, model: &BaseModel, updates: &DecodeUpdates, x: &[f32]) -> Vec<Vec<f32>> {
        lead(|team| self.logits(Work { team, model, updates }, x))
    }

    fn logits(&self, work: Work<'_>, x: &[f32]) -> Vec<Vec<f32>> {
        let (c, v) = (self.final_norm.len(), self.head.d_out());
        let m = x.len() / c;
        let normal = normalised(x, &self.final_norm, work.model.architecture.rms_norm_eps as f32);
        let mut all = vec![0f32; v * m];
        self.head.run(work, few_rows(&normal, c), &mut all);
        let architecture = &work.model.architecture;
        let scale = architecture.logit_scale as f32;
        if scale != 1.0 {
            all.iter_mut().for_each(|logit| *logit *= scale);
        }
        if let Some(cap) = architecture.logit_cap {
            soft_cap(&mut all, cap as f32);
        }
        if m == 1 {
            return vec![all];
        }
        let mut rows = vec![vec![0f32; v]; m];
        work.team.parts(&mut rows, 1, |j, row| {
            row[0].iter_mut().zip(all.iter().skip(j).step_by(m)).for_each(|(to, from)| *to = *from);
        });
        rows
    }
}

/// Rows of width c, padded.
fn few_rows(values: &[f32], c: usize) -> FewRows<'_> {
    FewRows { values, step: FewRows::padded(c), rounded: None }
}

/// RMSNorm of rows of x, padded.
fn normalised(x: &[f32], w: &[f32], epsilon: f32) -> Vec<f32> {
    let (c, step) = (w.len(), FewRows::padded(w.len()));
    let mut out = vec![0f32; x.len() / c * step];
    for (x, out) in x.chunks_exact(c).zip(out.chunks_exact_mut(step)) {
        homeroom_kernels::normalise(x, w, epsilon, &mut out[..c]);
    }
    out
}

impl Around {
    /// Rows of x (m, C), normalised if there is a norm, padded.
    fn input(&self, x: &[f32], c: usize, epsilon: f32) -> Vec<f32> {
        let Some(w) = &self.before else {
            let step = FewRows::padded(c);
            let mut out = vec![0f32; x.len() / c * step];
            x.chunks_exact(c).zip(out.chunks_exact_mut(step)).for_each(|(x, out)| out[..c].copy_from_slice(x));
            return out;
        };
        normalised(x, w, epsilon)
    }

    /// x (m, C) += scale · y (C, m), normalised row by row if there is a norm.
    fn add(&self, x: &mut [f32], y: &[f32], m: usize, epsilon: f32, scale: f32) {
        let c = y.len() / m;
        let mut rows = by_rows(y, m, c);
        if let Some(w) = &self.after {
            rows.chunks_exact_mut(c)
                .for_each(|row| normalise_columns(row, &[ColumnNorm { at: 0, groups: 1, weight: w }], epsilon));
        }
        if scale != 1.0 {
            rows.iter_mut().for_each(|y| *y *= scale);
        }
        x.iter_mut().zip(rows).for_each(|(x, y)| *x += y);
    }
}

impl Layer {
    /// x (m, C) becomes the layer's output.
    fn run<E: Element>(
        &self,
        work: Work<'_>,
        rotary: &Rotary,
        number: usize,
        sequences: &mut [(u32, &mut KvCache<E>)],
        x: &mut [f32],
    ) {
        let (architecture, spec) = (&work.model.architecture, &work.model.architecture.layers[number]);
        let (m, c, inner) = (sequences.len(), architecture.hidden_size, spec.feed_forward.inner);
        let (attention, epsilon) = (spec.attention(), architecture.rms_norm_eps as f32);
        let (shape, scale) = (attention.over(&[]), spec.residual_scale as f32);
        let (d, q_width) = (shape.head_dim, shape.heads * shape.head_dim);

        let normal = self.mixer_norms.input(x, c, epsilon);
        let mut qkv = vec![0f32; shape.row() * m];
        self.qkv.run(work, few_rows(&normal, c), &mut qkv);

        // Rows of q, turned; k, turned, and v go to the caches.
        let mut qkv = by_rows(&qkv, m, shape.row());
        let mut keys_values = vec![E::default(); shape.row() - q_width];
        for ((_, cache), row) in sequences.iter_mut().zip(qkv.chunks_exact_mut(shape.row())) {
            if let Some([q, k]) = &self.qk_norms {
                let parts = [(0, q_width, q), (q_width, attention.kv_width(), k)];
                let parts = parts.map(|(at, width, weight)| ColumnNorm { at, groups: width / weight.len(), weight });
                normalise_columns(row, &parts, epsilon);
            }
            if let Some(rope) = attention.rope {
                let (position, length) = (cache.positions(), cache.length.max(cache.positions() + 1));
                let turn = rotary.row(architecture, rope, length, position);
                rotary.table(rope).turn(turn, &mut row[..q_width + shape.kv_heads * d]);
            }
            keys_values.iter_mut().zip(&row[q_width..]).for_each(|(to, from)| *to = E::of(*from));
            cache.extend(number, std::iter::once(&keys_values[..]));
        }

        let size = attend_values(&shape);
        let tasks: Vec<(usize, usize)> = (sequences.iter().enumerate())
            .flat_map(|(j, (_, cache))| (0..attend_tasks(&shape, cache.positions() + 1)).map(move |task| (j, task)))
            .collect();
        let mut parts = vec![0f32; tasks.len() * size];
        let caches: Vec<&[E]> = sequences.iter().map(|(_, cache)| cache.layer(number)).collect();
        work.team.parts(&mut parts, size, |number, out| {
            let (j, task) = tasks[number];
            attend(&shape, &qkv[j * shape.row()..][..q_width], caches[j], task, out);
        });
        let step = FewRows::padded(q_width);
        let mut attended = vec![0f32; m * step];
        let mut rest = &parts[..];
        for (out, kept) in attended.chunks_exact_mut(step).zip(&caches) {
            let positions = kept.len() / (2 * shape.kv_heads * d);
            let (own, after) = rest.split_at(attend_tasks(&shape, positions) * size);
            rest = after;
            attend_join(&shape, own, &mut out[..q_width]);
        }
        let mut y = vec![0f32; c * m];
        self.o.run(work, few_rows(&attended, q_width), &mut y);
        self.mixer_norms.add(x, &y, m, epsilon, scale);

        let normal = self.feed_forward_norms.input(x, c, epsilon);
        let mut h = vec![0f32; inner * m];
        self.gate_up.run_gated(work, spec.feed_forward.gate, few_rows(&normal, c), &mut h);
        let rows = by_rows(&h, m, FewRows::padded(inner));
        self.down.run(work, few_rows(&rows, inner), &mut y);
        self.feed_forward_norms.add(x, &y, m, epsilon, scale);
    }
}

/// Rows (m, step) of values that lie by channel first, (n, m); zeros beyond n.
fn by_rows(values: &[f32], m: usize, step: usize) -> Vec<f32> {
    let mut rows = vec![0f32; m * step];
    match m {
        1 => rows[..values.len()].copy_from_slice(values),
        2 => apart::<2>(values, step, &mut rows),
        3 => apart::<3>(values, step, &mut rows),
        4 => apart::<4>(values, step, &mut rows),
        _ => {
            for (j, row) in rows.chunks_exact_mut(step).enumerate() {
                row.iter_mut().zip(values[j..].iter().step_by(m)).for_each(|(to, from)| *to = *from);
            }
        }
    }
    rows
}

/// The same of M rows in one pass.
fn apart<const M: usize>(values: &[f32], step: usize, rows: &mut [f32]) {
    let values = values.as_chunks::<M>().0;
    let mut to = rows.chunks_exact_mut(step).map(|row| &mut row[..values.len()]);
    let to: [&mut [f32]; M] = std::array::from_fn(|_| to.next().expect("there are M rows"));
    for (i, values) in values.iter().enumerate() {
        for j in 0..M {
            to[j][i] = values[j];
        }
    }
}
