//! A site: linear modules that share an input (q, k and v; o; gate and up; down).
//!
//! `y_j = g_j ∘ (W_j x + s_j B_j A_j x) + b_j`, where the pass brings the low-rank updates, see [`super::updates`]. The A of all modules are
//! stacked, so that one narrow product yields `u = x Aᵀ` for all of them; `s_j B_j u_j` is a further term of the sum that `W_j x` is
//! taken in, and `du A` one of the sum of `dy_j W_j`. The gain g is 1 but for updates that learn the length of each row, as DoRA does; then
//! `v_j`, which it multiplies, is kept for its gradient, and backward goes on with `dv = g ∘ dy`. Of the length in it the gradient is not
//! taken, as in Liu et al. 2024, <https://arxiv.org/abs/2402.09353>, section 4.3.

use anyhow::Result;
use homeroom_kernels::{
    Columns, Finish, Gain, Left, Matrix, Output, ProductElement, Right, Term, dropout_mask, gain_backward, outer,
    product, product_with_gain,
};
use rayon::prelude::*;

use super::Rows;
use super::updates::Update;
use super::workspace::Buffer;
use crate::models::BaseModel;
use crate::run::gradients::Gradients;
use crate::run::profile::timed;

/// Frozen modules that share an input.
pub struct Site {
    /// Its products' names in a profile, forward and backward.
    names: [&'static str; 2],
    d_in: usize,
    modules: Vec<SiteModule>,
}

struct SiteModule {
    /// Index into [`BaseModel::modules`].
    index: usize,
    d_out: usize,
    /// How its weight is multiplied in integers, if it is.
    integers: Option<Integers>,
}

/// How a weight is multiplied in integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Integers {
    /// In the whole numbers that it is stored in.
    AsStored,
    /// In those of its own kind, or that it is rounded to while it is packed.
    Rounded,
}

/// Which frozen weights are multiplied in integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InIntegers {
    /// None.
    None,
    /// Of the layers those that decoding multiplies by activations in eight bits, too, in the whole numbers that they are stored in; forward
    /// alone.
    Stored,
    /// The same, but rounded anew where the processor multiplies bytes by fours.
    Fastest,
    /// All that can be.
    All,
}

impl InIntegers {
    fn of(self, weight: &Matrix<'_>) -> Option<Integers> {
        match self {
            Self::Fastest if weight.takes_rounded() && weight.multiplies_forward_in_integers() => {
                Some(Integers::Rounded)
            }
            Self::Stored | Self::Fastest => weight.multiplies_as_stored().then_some(Integers::AsStored),
            Self::All => weight.multiplies_in_integers().then_some(Integers::Rounded),
            Self::None => None,
        }
    }
}

impl SiteModule {
    /// Its weight, as products take it.
    fn weight<'m, E>(&self, model: &'m BaseModel) -> Right<'m, E> {
        let matrix = model.modules[self.index].weight.matrix();
        match self.integers {
            Some(Integers::AsStored) => Right::Stored(matrix),
            Some(Integers::Rounded) => Right::Integers(matrix),
            None => Right::Frozen(matrix),
        }
    }
}

/// What forward keeps of a site for backward.
pub struct SiteActivations<E> {
    /// `u = x Aᵀ` (m, rank).
    u: Buffer<E>,
    /// Outputs before gains (m, d_out), where there are any.
    v: Option<Buffer<E>>,
}

impl Site {
    /// The site of some modules, at least one; `None` when a width is no whole number of words.
    pub fn new<E: ProductElement>(
        names: [&'static str; 2],
        model: &BaseModel,
        indices: &[usize],
        integers: InIntegers,
    ) -> Option<Self> {
        let mut site = Self { names, d_in: 0, modules: Vec::new() };
        for &index in indices {
            let info = &model.modules[index].info;
            if !info.d_in.is_multiple_of(E::PER_WORD) || !info.d_out.is_multiple_of(E::PER_WORD) {
                return None;
            }
            site.d_in = info.d_in;
            let integers = integers.of(&model.modules[index].weight.matrix());
            site.modules.push(SiteModule { index, d_out: info.d_out, integers });
        }
        Some(site)
    }

    /// Indices of its modules into [`BaseModel::modules`].
    pub fn modules(&self) -> impl Iterator<Item = usize> {
        self.modules.iter().map(|module| module.index)
    }

    /// Its first module, which names it among the updates of a pass.
    fn first(&self) -> usize {
        self.modules[0].index
    }

    /// Width of all outputs together.
    fn d_out(&self) -> usize {
        self.modules.iter().map(|module| module.d_out).sum()
    }

    /// Whether a weight of it is multiplied in integers.
    pub fn in_integers(&self) -> bool {
        self.modules.iter().any(|module| module.integers.is_some())
    }

    /// All outputs beside each other, (m, d_out), from x (m, d_in).
    pub fn forward<E: ProductElement>(&self, rows: &Rows<'_, E>, x: &[E], out: Output<'_, E>) -> SiteActivations<E> {
        let (m, updates) = (rows.count(), rows.updates.site(self.first()));
        let mut u = rows.narrow(updates.rank);
        if updates.rank > 0 {
            timed("forward u", || self.down(rows, x, &mut u));
        }
        let u_rows = Left::rows(&u, updates.rank);
        let mut terms = Vec::with_capacity(self.modules.len());
        for (module, update) in self.modules.iter().zip(&updates.modules) {
            let frozen = Term::forward(Left::rows(x, self.d_in), module.weight(rows.pass.model));
            let update = update.as_ref().map(|update| {
                Term::forward(u_rows.from(update.at), Right::Dense { values: &update.b, cols: update.padded })
            });
            terms.push(std::iter::once(frozen).chain(update).collect::<Vec<_>>());
        }
        let mut at = 0;
        let columns = self.modules.iter().zip(&terms).map(|(module, terms)| {
            let bias = rows.pass.model.modules[module.index].bias.as_ref().map(|bias| &bias[..]);
            let columns = Columns { terms, at, bias };
            at += module.d_out;
            columns
        });
        let columns: Vec<_> = columns.collect();
        let mut v = updates.gains.as_ref().map(|_| rows.narrow(self.d_out()));
        timed(self.names[0], || match (&updates.gains, &mut v) {
            (Some(gains), Some(v)) => {
                let gain = Gain { factors: &gains.factors, sums: v };
                product_with_gain(m, &columns, out, self.d_out(), gain);
            }
            _ => product(m, &columns, out, self.d_out(), Finish::default()),
        });
        SiteActivations { u, v }
    }

    /// `u = d(x) Aᵀ`, each module with its own dropout d.
    fn down<E: ProductElement>(&self, rows: &Rows<'_, E>, x: &[E], u: &mut [E]) {
        let (m, d_in, updates) = (rows.count(), self.d_in, rows.updates.site(self.first()));
        if !updates.drops(rows.pass) {
            let term = [Term::forward(Left::rows(x, d_in), Right::Dense { values: &updates.a, cols: d_in })];
            let columns = [Columns { terms: &term, at: 0, bias: None }];
            return product(m, &columns, Output::Narrow(u), updates.rank, Finish::default());
        }
        for update in updates.each() {
            let dropped = rows.dropped(update, x, d_in);
            let a = &updates.a[update.at * d_in..(update.at + update.padded) * d_in];
            let term = [Term::forward(Left::rows(&dropped, d_in), Right::Dense { values: a, cols: d_in })];
            let columns = [Columns { terms: &term, at: update.at, bias: None }];
            product(m, &columns, Output::Narrow(u), updates.rank, Finish::default());
        }
    }

    /// Where there are gains, their gradients, and `dv = g ∘ dy` (m, d_out).
    fn through_gains<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        activations: &SiteActivations<E>,
        dy: &[E],
        gradients: &mut Gradients,
    ) -> Result<Option<Buffer<E>>> {
        let updates = rows.updates.site(self.first());
        let (Some(gains), Some(v)) = (&updates.gains, &activations.v) else { return Ok(None) };
        let mut dv = rows.narrow(self.d_out());
        let mut d_gain = timed("backward gain", || gain_backward(&gains.factors, v, dy, &mut dv));
        // g = m / ‖W + s B A‖.
        d_gain.iter_mut().zip(&gains.lengths).for_each(|(d_gain, length)| *d_gain /= length);
        let mut at = 0;
        for (module, update) in self.modules.iter().zip(&updates.modules) {
            let own = at..at + module.d_out;
            at = own.end;
            let Some(update) = update.as_ref().filter(|update| update.trains_gain) else { continue };
            let Some(magnitude) = update.low_rank.magnitude else { continue };
            gradients.add_values(magnitude, d_gain[own].to_vec(), &[module.d_out])?;
        }
        Ok(Some(dv))
    }

    /// First part of backward: from dy (m, d_out), the gradients of B and `du = dy s B` (m, rank).
    fn parameters<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        activations: &SiteActivations<E>,
        dy: &[E],
        gradients: &mut Gradients,
    ) -> Result<Buffer<E>> {
        let (m, width, updates) = (rows.count(), self.d_out(), rows.updates.site(self.first()));
        let mut du = rows.narrow(updates.rank);
        let mut at = 0;
        for (module, update) in self.modules.iter().zip(&updates.modules) {
            let dy = Left::rows(dy, width).from(at);
            at += module.d_out;
            let Some(update) = update else { continue };
            timed("backward du", || {
                let term = [Term::backward(dy, Right::Dense { values: &update.b, cols: update.padded })];
                let columns = [Columns { terms: &term, at: update.at, bias: None }];
                product(m, &columns, Output::Narrow(&mut du), updates.rank, Finish::default());
            });
            if update.trains[1] {
                let b = timed("backward dB", || {
                    let mut transposed = vec![0f32; update.padded * module.d_out];
                    let u = Left::rows(&activations.u, updates.rank).from(update.at);
                    let scale = update.low_rank.scaling as f32;
                    outer(m, u, update.padded, dy, module.d_out, scale, &mut transposed);
                    // (padded, d_out) to (d_out, r).
                    let mut b = vec![0f32; module.d_out * update.r];
                    b.par_chunks_exact_mut(update.r).with_min_len(128).enumerate().for_each(|(i, b)| {
                        for (k, b) in b.iter_mut().enumerate() {
                            *b = transposed[k * module.d_out + i];
                        }
                    });
                    b
                });
                gradients.add_values(update.low_rank.b, b, &[module.d_out, update.r])?;
            }
        }
        Ok(du)
    }

    /// Last part: the gradients of A, `duᵀ x`, from the input x (m, d_in).
    fn down_parameters<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        x: &[E],
        du: &[E],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (m, d_in, updates) = (rows.count(), self.d_in, rows.updates.site(self.first()));
        let stacked = !updates.drops(rows.pass);
        let mut all = Vec::new();
        if stacked && updates.each().any(|update| update.trains[0]) {
            all.resize(updates.rank * d_in, 0f32);
            let du = Left::rows(du, updates.rank);
            timed("backward dA", || outer(m, du, updates.rank, Left::rows(x, d_in), d_in, 1.0, &mut all));
        }
        for update in updates.each().filter(|update| update.trains[0]) {
            let a = if stacked {
                all[update.at * d_in..(update.at + update.r) * d_in].to_vec()
            } else {
                let dropped = rows.dropped(update, x, d_in);
                let mut a = vec![0f32; update.padded * d_in];
                let du = Left::rows(du, updates.rank).from(update.at);
                timed("backward dA", || outer(m, du, update.padded, Left::rows(&dropped, d_in), d_in, 1.0, &mut a));
                a.truncate(update.r * d_in);
                a
            };
            gradients.add_values(update.low_rank.a, a, &[update.r, d_in])?;
        }
        Ok(())
    }

    /// Second part: `dx = Σ dy_j W_j + du A` (m, d_in).
    fn input<E: ProductElement>(&self, rows: &Rows<'_, E>, dy: &[E], du: &[E], mut out: Output<'_, E>) {
        let (m, d_in, width) = (rows.count(), self.d_in, self.d_out());
        let updates = rows.updates.site(self.first());
        let stacked = !updates.drops(rows.pass);
        let mut at = 0;
        let mut terms = Vec::with_capacity(self.modules.len() + 1);
        for module in &self.modules {
            terms.push(Term::backward(Left::rows(dy, width).from(at), module.weight(rows.pass.model)));
            at += module.d_out;
        }
        if stacked && updates.rank > 0 {
            terms.push(Term::backward(Left::rows(du, updates.rank), Right::Dense { values: &updates.a, cols: d_in }));
        }
        let columns = [Columns { terms: &terms, at: 0, bias: None }];
        let again = match &mut out {
            Output::Wide(out) => Output::Wide(out),
            Output::Add(out) => Output::Add(out),
            Output::Narrow(out) => Output::Narrow(out),
        };
        timed(self.names[1], || product(m, &columns, again, d_in, Finish::default()));
        if stacked {
            return;
        }
        // With dropout the update's part goes through its mask.
        for update in updates.each() {
            let mut part = rows.wide(d_in);
            let a = &updates.a[update.at * d_in..(update.at + update.padded) * d_in];
            let term =
                [Term::backward(Left::rows(du, updates.rank).from(update.at), Right::Dense { values: a, cols: d_in })];
            let columns = [Columns { terms: &term, at: 0, bias: None }];
            product(m, &columns, Output::Wide(&mut part), d_in, Finish::default());
            rows.mask(update, d_in, |row, mask| {
                part[row * d_in..][..d_in].iter().zip(mask).map(|(part, mask)| part * mask).collect::<Vec<f32>>()
            })
            .into_iter()
            .enumerate()
            .for_each(|(row, part)| match &mut out {
                Output::Wide(out) | Output::Add(out) => {
                    out[row * d_in..][..d_in].iter_mut().zip(part).for_each(|(out, part)| *out += part);
                }
                Output::Narrow(out) => {
                    let out = out[row * d_in..][..d_in].iter_mut();
                    out.zip(part).for_each(|(out, part)| *out = E::of(out.wide() + part));
                }
            });
        }
    }

    /// Backward: gradients of the parameters, and of the input unless `dx` is `None`; x (m, d_in) is what forward was given.
    ///
    /// # Errors
    /// When a gradient cannot be added.
    pub fn backward<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        activations: SiteActivations<E>,
        dy: &[E],
        x: &[E],
        dx: Option<Output<'_, E>>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let dv = self.through_gains(rows, &activations, dy, gradients)?;
        let dy = dv.as_deref().unwrap_or(dy);
        let du = self.parameters(rows, &activations, dy, gradients)?;
        if let Some(out) = dx {
            self.input(rows, dy, &du, out);
        }
        if rows.updates.site(self.first()).trains() {
            self.down_parameters(rows, x, &du, gradients)?;
        }
        Ok(())
    }

    /// As [`Site::backward`] for a site whose input is only known after dx: `x` gets dx and makes the input in its place.
    ///
    /// # Errors
    /// When a gradient cannot be added.
    pub fn backward_then<E: ProductElement>(
        &self,
        rows: &Rows<'_, E>,
        activations: SiteActivations<E>,
        dy: &[E],
        dx: &mut [E],
        x: impl FnOnce(&mut [E]),
        gradients: &mut Gradients,
    ) -> Result<()> {
        let dv = self.through_gains(rows, &activations, dy, gradients)?;
        let dy = dv.as_deref().unwrap_or(dy);
        let du = self.parameters(rows, &activations, dy, gradients)?;
        self.input(rows, dy, &du, Output::Narrow(dx));
        x(dx);
        if rows.updates.site(self.first()).trains() {
            self.down_parameters(rows, dx, &du, gradients)?;
        }
        Ok(())
    }
}

impl<E: ProductElement> Rows<'_, E> {
    /// What `f` makes of each row's number and mask.
    fn mask<R: Send>(&self, update: &Update<E>, width: usize, f: impl Fn(usize, &[f32]) -> R + Sync) -> Vec<R> {
        let (seed, step) = self.pass.dropout.unwrap_or_default();
        let p = update.low_rank.dropout.map_or(0.0, |(_, p)| p);
        let key = seed ^ update.dropout_key;
        let key = [key as u32, (key >> 32) as u32];
        let batch = self.batch;
        let rows = (0..self.count()).into_par_iter().map_init(
            || vec![0f32; width],
            |mask, row| {
                dropout_mask(key, step, batch.examples[row], batch.positions[row], (1.0 - p) as f32, mask);
                f(row, mask)
            },
        );
        rows.collect()
    }

    /// x (m, width) with a module's dropout.
    fn dropped(&self, update: &Update<E>, x: &[E], width: usize) -> Buffer<E> {
        let mut out = self.narrow(width);
        if !update.drops(self.pass) {
            out.copy_from_slice(x);
            return out;
        }
        let rows = self.mask(update, width, |row, mask| {
            let x = &x[row * width..][..width];
            x.iter().zip(mask).map(|(x, mask)| E::of(x.wide() * mask)).collect::<Vec<E>>()
        });
        out.chunks_exact_mut(width).zip(rows).for_each(|(out, row)| out.copy_from_slice(&row));
        out
    }
}
