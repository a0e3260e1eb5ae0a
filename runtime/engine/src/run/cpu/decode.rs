//! One further token of one or several sequences: every weight is read once, decoded and multiplied in one pass, with low-rank
//! updates in the same sums. Activations are f32; unless all is to be exact, those that meet quantised weights are rounded to eight
//! bits by groups of 32 on the way.
//!
//! Results lie by output channel first, (n, m), for m sequences, so that a task has its part of them in one piece.

use std::ops::Range;

use homeroom_kernels::{
    Element, FewRows, Panels, RotaryTable, RoundedRows, Team, attend, attend_join, attend_tasks, attend_values, f16,
    gemv, lead, threads,
};

use super::kv_cache::KvCache;
use crate::adapt::adaptation::Adaptation;
use crate::models::in_large_pages;
use crate::models::weight::{Codes, Weight};
use crate::models::{BaseModel, EMBEDDING, FINAL_NORM, HEAD};
use crate::run::cpu::low_rank::low_rank;

/// A model whose modules are frozen or have low-rank updates, laid out for decoding.
pub struct Decoder {
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    head: Site,
    embedding: usize,
    updates: Codes,
}

/// What a token's work is done with.
#[derive(Clone, Copy)]
struct Work<'a> {
    team: &'a Team,
    model: &'a BaseModel,
    /// Updates of all sites, in the order in which they are read.
    updates: &'a [u8],
}

/// A matrix among the updates.
#[derive(Clone)]
struct Placed {
    panels: Panels,
    at: Range<usize>,
}

impl Placed {
    fn put(values: &[f32], panels: Panels, updates: &mut Vec<u8>) -> Self {
        let from = updates.len();
        updates.resize(from + panels.bytes(), 0);
        panels.write(values, &mut updates[from..]);
        Self { panels, at: from..updates.len() }
    }
}

struct Layer {
    input_norm: Vec<f32>,
    post_norm: Vec<f32>,
    qkv: Site,
    o: Site,
    gate_up: Site,
    down: Site,
}

/// Modules that share an input, as in [`crate::run::cpu`].
struct Site {
    modules: Vec<Linear>,
    /// A of all modules (rank, d_in), if there is one.
    a: Option<Down>,
    /// Whether x is rounded to eight bits for modules that take it so.
    rounds: bool,
}

struct Linear {
    /// Index into [`BaseModel::modules`].
    index: usize,
    d_out: usize,
    update: Option<Update>,
}

struct Update {
    /// First of its rows of A.
    at: usize,
    /// `s B` (d_out, r).
    b: Placed,
}

/// A of a site's modules.
enum Down {
    /// As it is, or in half precision, which is read in half the time: a weight, and a power of two that products with it are still to be
    /// multiplied by.
    Weight(Weight, f32),
    /// In eight bits, beside weights that are multiplied with x in eight bits: in half of that again, and rounded about as finely as x is.
    Rounded(Placed),
}

impl Down {
    fn rows(&self) -> usize {
        match self {
            Self::Weight(weight, _) => weight.rows(),
            Self::Rounded(placed) => placed.panels.rows(),
        }
    }

    /// `u = x Aᵀ` for the rows of A from `from` on: `u` (rows, m).
    fn product(&self, work: Work<'_>, x: FewRows<'_>, from: usize, u: &mut [f32]) {
        let rows = from..from + u.len() / (x.values.len() / x.step);
        match (self, x.rounded) {
            (Self::Weight(weight, power), _) => {
                gemv(x, &weight.matrix(), rows, u);
                u.iter_mut().for_each(|u| *u *= power);
            }
            (Self::Rounded(a), Some(x)) => a.panels.product(&work.updates[a.at.clone()], x, rows, u),
            (Self::Rounded(_), None) => unreachable!("A is in eight bits where x is, too"),
        }
    }
}

/// Values in half precision. They are divided by the power of two that makes the largest at least 1, so that none but the very
/// smallest loses a bit to the narrow exponent.
fn halves(mut values: Vec<f32>, shape: (usize, usize)) -> Option<Down> {
    let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
    let power = if largest.is_normal() { 2f32.powi(largest.log2().floor() as i32) } else { 1.0 };
    values.iter_mut().for_each(|value| *value /= power);
    let halves: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
    Some(Down::Weight(Weight::from_f16(&halves, shape).ok()?, power))
}

impl Site {
    fn new(
        model: &BaseModel,
        adaptation: Option<&Adaptation>,
        indices: &[usize],
        round: bool,
        updates: &mut Vec<u8>,
    ) -> Option<Self> {
        let (mut modules, mut stacked, mut d_in) = (Vec::new(), Vec::new(), 0);
        let rounds = round && indices.iter().any(|index| model.modules[*index].weight.matrix().takes_rounded());
        let mut ups = Vec::new();
        for &index in indices {
            let info = &model.modules[index].info;
            d_in = info.d_in;
            let adapted = adaptation.and_then(|adaptation| Some((adaptation, adaptation.of(index)?)));
            let update = match adapted {
                None => None,
                Some((adaptation, adapted)) => {
                    let low_rank = low_rank(&adaptation.plan.recipes[adapted.recipe].forward, adapted)?;
                    let values = |param: usize| {
                        let tensor = adaptation.params[param].var.as_detached_tensor();
                        tensor.flatten_all().and_then(|values| values.to_vec1::<f32>()).ok()
                    };
                    let (a, b) = (values(low_rank.a)?, values(low_rank.b)?);
                    let r = a.len() / info.d_in;
                    let at = stacked.len() / info.d_in;
                    stacked.extend(a);
                    let scaled: Vec<f32> = b.iter().map(|b| low_rank.scaling as f32 * b).collect();
                    Some((at, scaled, Panels::new(info.d_out, r, round)))
                }
            };
            modules.push(Linear { index, d_out: info.d_out, update: None });
            ups.push(update);
        }
        let shape = (stacked.len() / d_in.max(1), d_in);
        let a = match (shape.0, round, rounds) {
            (0, ..) => None,
            (_, false, _) => Some(Down::Weight(Weight::from_values(&stacked, shape).ok()?, 1.0)),
            (_, true, false) => Some(halves(stacked, shape)?),
            (rank, true, true) => Some(Down::Rounded(Placed::put(&stacked, Panels::new(rank, d_in, true), updates))),
        };
        for (module, update) in modules.iter_mut().zip(ups) {
            let place = |(at, b, panels): (usize, Vec<f32>, Panels)| Update { at, b: Placed::put(&b, panels, updates) };
            module.update = update.map(place);
        }
        Some(Self { modules, a, rounds })
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
        let Some(a) = &self.a else {
            return work.team.parts(out, size * m, |task, out| rows(task * size, out, x, &|| &[]));
        };
        let mut u = vec![0f32; a.rows() * m];
        let down = part(a.rows());
        let first = |task: usize, u: &mut [f32]| a.product(work, x, task * down, u);
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
        let Linear { index, update, .. } = &self.modules[module];
        let m = x.values.len() / x.step;
        let rows = from..from + out.len() / m;
        let module = &work.model.modules[*index];
        gemv(x, &module.weight.matrix(), rows.clone(), out);
        if let Some(Update { at, b }) = update {
            let u = &u()[at * m..(at + b.panels.cols()) * m];
            b.panels.add(&work.updates[b.at.clone()], u, m, rows.clone(), out);
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

    /// `silu(g) ∘ u` of the two modules of a gated layer: `out` (inner, m).
    fn run_gated(&self, work: Work<'_>, x: FewRows<'_>, out: &mut [f32]) {
        let m = x.values.len() / x.step;
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
            self.rows(work, 1, x, u, from, up);
            homeroom_kernels::gate(homeroom_kernels::Gate::Silu, out, up);
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
    /// The layout; `None` when a recipe is something else than a low-rank update of a linear module.
    ///
    /// `round`: updates are kept in half precision or in eight bits, and x is rounded to eight bits where weights take it so.
    pub fn new(model: &BaseModel, adaptation: Option<&Adaptation>, round: bool) -> Option<Self> {
        let frozen = |module: usize| adaptation.is_none_or(|adaptation| adaptation.of(module).is_none());
        let norm = |index: usize| {
            let module = &model.modules[index];
            (frozen(index) && module.bias.is_none()).then(|| module.weight.decode(0..1))
        };
        let mut updates = Vec::new();
        let mut site = |modules: &[usize]| Site::new(model, adaptation, modules, round, &mut updates);
        let layers = model.layers.iter().map(|at| {
            Some(Layer {
                input_norm: norm(at.mixer_norm?)?,
                post_norm: norm(at.feed_forward_norm?)?,
                qkv: site(&at.qkv)?,
                o: site(&[at.o])?,
                gate_up: site(&at.gate_up)?,
                down: site(&[at.down])?,
            })
        });
        let layers = layers.collect::<Option<Vec<Layer>>>()?;
        let embedding = model.module_index(EMBEDDING).filter(|module| frozen(*module))?;
        let (final_norm, head) = (norm(model.module_index(FINAL_NORM)?)?, site(&[model.module_index(HEAD)?])?);
        Some(Self { layers, final_norm, head, embedding, updates: in_large_pages(updates) })
    }

    /// Logits (m, V) after a further token of each sequence, which its cache takes in.
    pub fn step<E: Element>(
        &self,
        model: &BaseModel,
        table: &RotaryTable,
        sequences: &mut [(u32, &mut KvCache<E>)],
    ) -> Vec<Vec<f32>> {
        let mut x = Vec::with_capacity(sequences.len() * model.architecture.hidden_size);
        for (id, _) in sequences.iter() {
            x.extend(model.modules[self.embedding].weight.decode(*id as usize..*id as usize + 1));
        }
        lead(|team| {
            let work = self.work(team, model);
            for (number, layer) in self.layers.iter().enumerate() {
                layer.run(work, table, number, sequences, &mut x);
            }
            for (_, cache) in sequences.iter_mut() {
                cache.advance(1, false);
            }
            self.logits(work, &x)
        })
    }

    /// Logits after rows of the residual stream x (m, C).
    pub fn head(&self, model: &BaseModel, x: &[f32]) -> Vec<Vec<f32>> {
        lead(|team| self.logits(self.work(team, model), x))
    }

    fn work<'a>(&'a self, team: &'a Team, model: &'a BaseModel) -> Work<'a> {
        Work { team, model, updates: &self.updates }
    }

    fn logits(&self, work: Work<'_>, x: &[f32]) -> Vec<Vec<f32>> {
        let (c, v) = (self.final_norm.len(), self.head.d_out());
        let m = x.len() / c;
        let normal = normalised(x, &self.final_norm, work.model.architecture.rms_norm_eps as f32);
        let mut all = vec![0f32; v * m];
        self.head.run(work, few(&normal, c), &mut all);
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
fn few(values: &[f32], c: usize) -> FewRows<'_> {
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

impl Layer {
    /// x (m, C) becomes the layer's output.
    fn run<E: Element>(
        &self,
        work: Work<'_>,
        table: &RotaryTable,
        number: usize,
        sequences: &mut [(u32, &mut KvCache<E>)],
        x: &mut [f32],
    ) {
        let (architecture, spec) = (&work.model.architecture, &work.model.architecture.layers[number]);
        let (m, c, inner) = (sequences.len(), architecture.hidden_size, spec.feed_forward.inner);
        let (shape, epsilon) = (spec.attention().over(&[]), architecture.rms_norm_eps as f32);
        let (d, q_width) = (shape.head_dim, shape.heads * shape.head_dim);

        let normal = normalised(x, &self.input_norm, epsilon);
        let mut qkv = vec![0f32; shape.row() * m];
        self.qkv.run(work, few(&normal, c), &mut qkv);

        // Rows of q, turned; k, turned, and v go to the caches.
        let mut qkv = by_rows(&qkv, m, shape.row());
        let mut kept = vec![E::default(); shape.row() - q_width];
        for ((_, cache), row) in sequences.iter_mut().zip(qkv.chunks_exact_mut(shape.row())) {
            table.turn(cache.positions() as u32, &mut row[..q_width + shape.kv_heads * d]);
            kept.iter_mut().zip(&row[q_width..]).for_each(|(to, from)| *to = E::of(*from));
            cache.extend(number, std::iter::once(&kept[..]));
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
        self.o.run(work, few(&attended, q_width), &mut y);
        add_turned(x, &y, m);

        let normal = normalised(x, &self.post_norm, epsilon);
        let mut h = vec![0f32; inner * m];
        self.gate_up.run_gated(work, few(&normal, c), &mut h);
        let rows = by_rows(&h, m, FewRows::padded(inner));
        self.down.run(work, few(&rows, inner), &mut y);
        add_turned(x, &y, m);
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

/// x (m, c) += y (c, m).
fn add_turned(x: &mut [f32], y: &[f32], m: usize) {
    let rows = by_rows(y, m, y.len() / m);
    x.iter_mut().zip(rows).for_each(|(x, y)| *x += y);
}
