//! An adapter as the fused blocks and decoding take it: the low-rank updates of all sites as one value, apart from the frozen
//! modules that they are added to. One base goes with any number of them.
//!
//! [`Updates`] is for training and for reading prompts, in the blocks' type; [`DecodeUpdates`] is for decoding, where updates are
//! read once for each token, so that their bytes count.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail};
use candle_core::{CpuStorage, Storage, Tensor};
use homeroom_kernels::{FewRows, Panels, ProductElement, f16, gemv, matmul, matmul_t};
use rayon::prelude::*;

use super::low_rank::{LowRank, low_rank, low_rank_at_rest};
use crate::adapt::adaptation::{Adaptation, fnv1a};
use crate::models::weight::{Codes, Weight};
use crate::models::{BaseModel, EMBEDDING, in_large_pages};
use crate::run::plain::recipe::Pass;
use crate::run::profile::timed;

/// Ranks are padded with zeros to a multiple of this, a tile's vector, so that products over them are whole.
pub(super) const RANK_STEP: usize = 16;

/// The low-rank updates of a model's fused layers, and which of its blocks can be run fused beside them.
pub struct Updates<E> {
    /// Of each site, by its first module.
    sites: HashMap<usize, SiteUpdates<E>>,
    /// Of each layer, whether it is fused: its norms are frozen, and so is each other module or it has a low-rank update.
    layers: Vec<bool>,
    head: bool,
    embedding: bool,
}

/// The updates of a site's modules.
pub(super) struct SiteUpdates<E> {
    d_in: usize,
    /// Rows of the stacked A, padded ranks together.
    pub rank: usize,
    /// A of all modules (rank, d_in).
    pub a: Vec<E>,
    /// Of each module, its update.
    pub modules: Vec<Option<Update<E>>>,
    /// What the outputs are multiplied by, if a module learns its rows' lengths.
    pub gains: Option<Gains>,
}

/// Gains on the outputs of a site, `m / ‖W + s B A‖`, and 1 for modules without.
pub(super) struct Gains {
    /// Of all outputs beside each other.
    pub factors: Vec<f32>,
    /// `‖W + s B A‖`, and 1 for modules without.
    pub lengths: Vec<f32>,
    /// Of each module, its index, and whether it has a gain.
    frozen: Vec<(usize, bool)>,
}

/// A low-rank update and its place in the stack.
pub(super) struct Update<E> {
    pub low_rank: LowRank,
    pub r: usize,
    pub padded: usize,
    /// Its first row of the stacked A.
    pub at: usize,
    /// `s B` (d_out, padded).
    pub b: Vec<E>,
    /// Whether A and B are trained.
    pub trains: [bool; 2],
    /// Whether the magnitudes are trained.
    pub trains_gain: bool,
    /// FNV-1a of the dropout node's name.
    pub dropout_key: u64,
    d_out: usize,
}

/// Computes what of the base the lengths of an adaptation's rows are made of, if it learns any: once for each weight, however many ask.
pub(super) fn prepare(model: &BaseModel, adaptation: &Adaptation) {
    for module in 0..model.modules.len() {
        if let Some(Some((_, LowRank { magnitude: Some(_), .. }))) = update_of(model, Some(adaptation), module, true) {
            model.modules[module].weight.row_squares();
        }
    }
}

/// Whether a module stays as it is.
fn is_frozen(adaptation: Option<&Adaptation>, module: usize) -> bool {
    adaptation.is_none_or(|adaptation| adaptation.of(module).is_none())
}

/// The update of a module, if it has one; `None` when its recipe is something else. `at_rest`: where nothing is dropped out.
fn update_of<'a>(
    model: &BaseModel,
    adaptation: Option<&'a Adaptation>,
    module: usize,
    at_rest: bool,
) -> Option<Option<(&'a Adaptation, LowRank)>> {
    let Some((adaptation, adapted)) = adaptation.and_then(|adaptation| Some((adaptation, adaptation.of(module)?)))
    else {
        return Some(None);
    };
    let has_bias = model.modules[module].bias.is_some();
    let recognise = if at_rest { low_rank_at_rest } else { low_rank };
    let low_rank = recognise(&adaptation.plan.recipes[adapted.recipe].forward, adapted, has_bias)?;
    let info = &model.modules[module].info;
    low_rank
        .fits(|param| &adaptation.params[param].spec.shape, (info.d_in, info.d_out))
        .then_some(Some((adaptation, low_rank)))
}

/// `‖W + U A‖` of each row, for A (r, d_in) and U (d_out, r), without ever making the sum:
/// `‖wᵢ + uᵢ A‖² = ‖wᵢ‖² + 2 uᵢ · A wᵢ + uᵢ A Aᵀ uᵢᵀ`.
///
/// # Errors
/// When A and U are not of the weight's shape.
fn row_lengths(weight: &Weight, a: &[f32], u: &[f32]) -> Result<Vec<f32>> {
    let (rows, cols, squares) = (weight.rows(), weight.cols(), weight.row_squares());
    let r = a.len() / cols.max(1);
    let own = Weight::from_values(a, (r, cols))?;
    let (mut wa, mut gram, mut ug) = (vec![0f32; r * rows], vec![0f32; r * r], vec![0f32; rows * r]);
    matmul_t(a, r, &weight.matrix(), &mut wa);
    matmul_t(a, r, &own.matrix(), &mut gram);
    matmul(u, rows, &Weight::from_values(&gram, (r, r))?.matrix(), &mut ug);
    let length = |i: usize| {
        let (u, ug) = (&u[i * r..(i + 1) * r], &ug[i * r..(i + 1) * r]);
        let cross: f64 = u.iter().zip(wa[i..].iter().step_by(rows)).map(|(u, wa)| f64::from(*u) * f64::from(*wa)).sum();
        let own: f64 = u.iter().zip(ug).map(|(u, ug)| f64::from(*u) * f64::from(*ug)).sum();
        let square = squares[i] + 2.0 * cross + own;
        // Of a row of nearly nothing rounding can leave a little less than that. NaN stays what it is.
        if square < 0.0 { 0.0 } else { square.sqrt() as f32 }
    };
    Ok((0..rows).map(length).collect())
}

impl<E: ProductElement> Updates<E> {
    /// The updates of an adaptation, without values. `layers` are the norms and sites of each layer, and `head` the modules of the
    /// head, that can be fused; `at_rest`: for passes in which nothing is dropped out.
    pub(super) fn new<'a>(
        model: &BaseModel,
        (adaptation, at_rest): (Option<&Adaptation>, bool),
        layers: impl Iterator<Item = Option<(&'a [usize], [Vec<usize>; 4])>>,
        head: Option<[usize; 2]>,
    ) -> Self {
        let frozen = |module: usize| is_frozen(adaptation, module);
        let mut sites = HashMap::new();
        let mut fuses = |layer: Option<(&[usize], [Vec<usize>; 4])>| {
            let (norms, own) = layer?;
            let own = own.map(|site| SiteUpdates::new(model, (adaptation, at_rest), &site));
            let own = own.into_iter().collect::<Option<Vec<_>>>().filter(|_| norms.iter().all(|norm| frozen(*norm)))?;
            sites.extend(own);
            Some(())
        };
        let layers = layers.map(|layer| fuses(layer).is_some()).collect();
        let head = head.is_some_and(|modules| modules.into_iter().all(frozen));
        let embedding = model.module_index(EMBEDDING).is_none_or(frozen);
        Self { sites, layers, head, embedding }
    }

    /// Takes the present values of a pass's parameters over, in E.
    ///
    /// # Errors
    /// When a parameter is not f32.
    pub fn load(&mut self, pass: &Pass<'_>) -> Result<()> {
        timed("adapters to E", || self.sites.par_iter_mut().try_for_each(|(_, site)| site.load(pass)))?;
        // One after another: each is products on all threads.
        timed("row lengths", || self.sites.values_mut().try_for_each(|site| site.load_gains(pass)))
    }

    /// Whether a layer, if it can be fused, still can with these.
    pub(super) fn fuses_layer(&self, number: usize) -> bool {
        self.layers[number]
    }

    /// Whether the head, if it can be fused, still can with these.
    pub(super) fn fuses_head(&self) -> bool {
        self.head
    }

    /// Whether the embedding stays as it is.
    pub(super) fn freezes_embedding(&self) -> bool {
        self.embedding
    }

    /// Those of a site of a fused layer, by its first module.
    pub(super) fn site(&self, first: usize) -> &SiteUpdates<E> {
        &self.sites[&first]
    }
}

impl<E: ProductElement> SiteUpdates<E> {
    /// The updates of some modules under the number of the first; `None` when a recipe of one is no low-rank update.
    fn new(
        model: &BaseModel,
        (adaptation, at_rest): (Option<&Adaptation>, bool),
        modules: &[usize],
    ) -> Option<(usize, Self)> {
        let mut site = Self { d_in: 0, rank: 0, a: Vec::new(), modules: Vec::new(), gains: None };
        let mut frozen = Vec::new();
        for &module in modules {
            let info = &model.modules[module].info;
            site.d_in = info.d_in;
            let update = match update_of(model, adaptation, module, at_rest)? {
                None => None,
                Some((adaptation, low_rank)) => {
                    let spec = |param: usize| &adaptation.params[param].spec;
                    let r = *spec(low_rank.a).shape.first()?;
                    let padded = r.next_multiple_of(RANK_STEP);
                    let at = site.rank;
                    site.rank += padded;
                    let trains = [spec(low_rank.a).trainable, spec(low_rank.b).trainable];
                    let trains_gain = low_rank.magnitude.is_some_and(|magnitude| spec(magnitude).trainable);
                    let node = low_rank.dropout.map_or(0, |(node, _)| node);
                    let dropout_key = fnv1a(&format!("{}#{node}", info.path));
                    let (b, d_out) = (Vec::new(), info.d_out);
                    Some(Update { low_rank, r, padded, at, b, trains, trains_gain, dropout_key, d_out })
                }
            };
            let gained = update.as_ref().is_some_and(|update| update.low_rank.magnitude.is_some());
            frozen.push((module, gained));
            site.modules.push(update);
        }
        if frozen.iter().any(|(_, gained)| *gained) {
            let outputs = modules.iter().map(|module| model.modules[*module].info.d_out).sum();
            site.gains = Some(Gains { factors: vec![1.0; outputs], lengths: vec![1.0; outputs], frozen });
        }
        Some((*modules.first()?, site))
    }

    fn load(&mut self, pass: &Pass<'_>) -> Result<()> {
        let d_in = self.d_in;
        self.a.resize(self.rank * d_in, E::default());
        for Update { low_rank, r, padded, at, b, d_out, .. } in self.modules.iter_mut().flatten() {
            with_values(&pass.params[low_rank.a], |values| {
                let rows = self.a[*at * d_in..(*at + *r) * d_in].iter_mut();
                rows.zip(values).for_each(|(to, value)| *to = E::of(*value));
            })?;
            b.resize(*d_out * *padded, E::default());
            let scaling = low_rank.scaling as f32;
            with_values(&pass.params[low_rank.b], |values| {
                for (to, from) in b.chunks_exact_mut(*padded).zip(values.chunks_exact(*r)) {
                    to.iter_mut().zip(from).for_each(|(to, value)| *to = E::of(scaling * value));
                }
            })?;
        }
        Ok(())
    }

    /// Gains from the present values of a pass's parameters.
    fn load_gains(&mut self, pass: &Pass<'_>) -> Result<()> {
        let Some(gains) = &mut self.gains else { return Ok(()) };
        let mut at = 0;
        for ((index, gained), update) in gains.frozen.iter().zip(&self.modules) {
            let module = &pass.model.modules[*index];
            let own = at..at + module.info.d_out;
            at = own.end;
            let (true, Some(update)) = (gained, update) else { continue };
            let LowRank { a, b, scaling, magnitude: Some(magnitude), .. } = update.low_rank else { continue };
            let u = with_values(&pass.params[b], |b| b.iter().map(|b| scaling as f32 * b).collect::<Vec<f32>>())?;
            let lengths = with_values(&pass.params[a], |a| row_lengths(&module.weight, a, &u))??;
            with_values(&pass.params[magnitude], |magnitudes| {
                let factors = gains.factors[own.clone()].iter_mut();
                factors.zip(magnitudes).zip(&lengths).for_each(|((factor, m), length)| *factor = m / length);
            })?;
            gains.lengths[own].copy_from_slice(&lengths);
        }
        Ok(())
    }

    pub fn each(&self) -> impl Iterator<Item = &Update<E>> {
        self.modules.iter().flatten()
    }

    /// Whether an update's input is dropped out in this pass.
    pub fn drops(&self, pass: &Pass<'_>) -> bool {
        self.each().any(|update| update.drops(pass))
    }

    /// Whether a parameter is trained.
    pub fn trains(&self) -> bool {
        self.each().any(|update| update.trains != [false; 2])
    }
}

impl<E> Update<E> {
    /// Whether its input is dropped out in this pass.
    pub fn drops(&self, pass: &Pass<'_>) -> bool {
        pass.dropout.is_some() && self.low_rank.dropout.is_some()
    }
}

/// The f32 values of a parameter.
fn with_values<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().context("a parameter is not contiguous")?;
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(f(&values[start..end])),
        _ => bail!("fused blocks take parameters in f32"),
    }
}

/// The low-rank updates of all sites for decoding, with the values that they had when it was made.
pub struct DecodeUpdates {
    /// Of each site, by its first module.
    sites: HashMap<usize, DecodeSite>,
    /// Matrices of all sites, in the order in which they are read.
    bytes: Codes,
}

/// The updates of a site's modules.
pub(super) struct DecodeSite {
    /// A of all modules (rank, d_in), if there is one.
    pub a: Option<Down>,
    /// Of each module, its update.
    pub modules: Vec<Option<Up>>,
}

/// The part of an update that is a module's own.
pub(super) struct Up {
    /// First of its rows of A.
    pub at: usize,
    /// `s B` (d_out, r).
    pub b: Placed,
    /// What each output is multiplied by before its bias is added.
    pub gain: Option<Vec<f32>>,
}

/// A matrix in eight bits or half precision among the bytes of all.
#[derive(Clone)]
pub(super) struct Placed {
    pub panels: Panels,
    at: Range<usize>,
}

impl Placed {
    fn put(values: &[f32], panels: Panels, bytes: &mut Vec<u8>) -> Self {
        let from = bytes.len();
        bytes.resize(from + panels.bytes(), 0);
        panels.write(values, &mut bytes[from..]);
        Self { panels, at: from..bytes.len() }
    }
}

/// A of a site's modules.
pub(super) enum Down {
    /// As it is, or in half precision, which is read in half the time: a weight, and a power of two that products with it are still to be
    /// multiplied by.
    Weight(Weight, f32),
    /// In eight bits, beside weights that are multiplied with x in eight bits: in half of that again, and rounded about as finely as x is.
    Rounded(Placed),
}

impl Down {
    pub fn rows(&self) -> usize {
        match self {
            Self::Weight(weight, _) => weight.rows(),
            Self::Rounded(placed) => placed.panels.rows(),
        }
    }

    /// `u = x Aᵀ` for the rows of A from `from` on: `u` (rows, m).
    pub fn product(&self, updates: &DecodeUpdates, x: FewRows<'_>, from: usize, u: &mut [f32]) {
        let rows = from..from + u.len() / (x.values.len() / x.step);
        match (self, x.rounded) {
            (Self::Weight(weight, power), _) => {
                gemv(x, &weight.matrix(), rows, u);
                u.iter_mut().for_each(|u| *u *= power);
            }
            (Self::Rounded(a), Some(x)) => a.panels.product(updates.bytes(a), x, rows, u),
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

impl DecodeSite {
    /// The updates of some modules; `None` when a recipe of one is no low-rank update. `round`: keep them in half precision, or in eight
    /// bits where x `is_rounded`, too.
    fn new(
        model: &BaseModel,
        adaptation: Option<&Adaptation>,
        modules: &[usize],
        (round, is_rounded): (bool, bool),
        bytes: &mut Vec<u8>,
    ) -> Option<Self> {
        let (mut ups, mut stacked, mut d_in) = (Vec::new(), Vec::new(), 0);
        for &module in modules {
            let info = &model.modules[module].info;
            d_in = info.d_in;
            let up = match update_of(model, adaptation, module, true)? {
                None => None,
                Some((adaptation, low_rank)) => {
                    let values = |param: usize| {
                        let tensor = adaptation.params[param].var.as_detached_tensor();
                        tensor.flatten_all().and_then(|values| values.to_vec1::<f32>()).ok()
                    };
                    let (a, b) = (values(low_rank.a)?, values(low_rank.b)?);
                    let r = a.len() / d_in;
                    let at = stacked.len() / d_in;
                    let scaled: Vec<f32> = b.iter().map(|b| low_rank.scaling as f32 * b).collect();
                    let gain = match low_rank.magnitude {
                        None => None,
                        Some(magnitude) => {
                            let weight = &model.modules[module].weight;
                            let lengths = row_lengths(weight, &a, &scaled).ok()?;
                            let mut gain = values(magnitude)?;
                            gain.iter_mut().zip(lengths).for_each(|(gain, length)| *gain /= length);
                            Some(gain)
                        }
                    };
                    stacked.extend(a);
                    Some((at, scaled, Panels::new(info.d_out, r, round), gain))
                }
            };
            ups.push(up);
        }
        let shape = (stacked.len() / d_in.max(1), d_in);
        let a = match (shape.0, round, is_rounded) {
            (0, ..) => None,
            (_, false, _) => Some(Down::Weight(Weight::from_values(&stacked, shape).ok()?, 1.0)),
            (_, true, false) => Some(halves(stacked, shape)?),
            (rank, true, true) => Some(Down::Rounded(Placed::put(&stacked, Panels::new(rank, d_in, true), bytes))),
        };
        let mut place = |(at, b, panels, gain): (usize, Vec<f32>, Panels, Option<Vec<f32>>)| Up {
            at,
            b: Placed::put(&b, panels, bytes),
            gain,
        };
        Some(Self { a, modules: ups.into_iter().map(|up| up.map(&mut place)).collect() })
    }
}

impl DecodeUpdates {
    /// The updates of an adaptation; `None` when one of `frozen` is adapted, or a recipe of a site is no low-rank update. `sites` are
    /// the modules of each, and whether x is rounded to eight bits for them.
    pub(super) fn new(
        model: &BaseModel,
        adaptation: Option<&Adaptation>,
        frozen: impl IntoIterator<Item = usize>,
        sites: impl Iterator<Item = (Vec<usize>, bool)>,
        round: bool,
    ) -> Option<Self> {
        if !frozen.into_iter().all(|module| is_frozen(adaptation, module)) {
            return None;
        }
        let mut bytes = Vec::new();
        let sites = sites.map(|(modules, is_rounded)| {
            let site = DecodeSite::new(model, adaptation, &modules, (round, is_rounded), &mut bytes)?;
            Some((*modules.first()?, site))
        });
        let sites = sites.collect::<Option<_>>()?;
        Some(Self { sites, bytes: in_large_pages(bytes) })
    }

    /// Those of a site, by its first module.
    pub(super) fn site(&self, first: usize) -> &DecodeSite {
        &self.sites[&first]
    }

    /// The bytes of a matrix.
    pub(super) fn bytes(&self, placed: &Placed) -> &[u8] {
        &self.bytes[placed.at.clone()]
    }
}
