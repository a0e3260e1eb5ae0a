//! The final norm, the frozen head and the cross-entropy as one operation over the rows that have a target: logits exist for
//! some rows at a time, and their gradient takes their place.

use std::sync::OnceLock;

use anyhow::Result;
use homeroom_kernels::{
    Codec, Columns, Finish, Left, LogitCap, Output, ProductElement, Right, Term, cross_entropy, product, rms_norm,
    rms_norm_backward, target_logits,
};

use super::workspace::Pool;
use crate::models::weight::Weight;
use crate::models::{BaseModel, FINAL_NORM, HEAD};
use crate::run::batch::Batch;
use crate::run::plain::block::weights_of;
use crate::run::plain::recipe::Pass;
use crate::run::profile::timed;
use crate::run::waist::{LogProbs, Weigh};

/// Bytes of logits that exist at once: enough rows that packing the head's weight is little beside its product.
const LOGITS_BYTES: usize = 36 << 20;
/// Rows of logits that exist at once where a row is long. Each chunk packs the whole head anew, twice: with 72 rows of 262,144 tokens
/// that takes a third of the head's time, with 256 an eighth.
const CHUNK_ROWS: usize = 256;
/// Bytes that so many rows may take.
const LOGITS_BYTES_MAX: usize = 128 << 20;

/// A frozen head with the frozen norm before it.
pub struct FusedHead {
    /// Of the norm and the head, into [`BaseModel::modules`].
    modules: [usize; 2],
    norm: Vec<f32>,
    /// Whether it is run in f32 beside layers in another type, of which its widths are no whole words: some vocabularies are odd.
    pub wide: bool,
    /// If products with its weight are in integers, its weight in eight bits, once it has been needed: it is read for each chunk of rows
    /// anew, and rounding it as often would cost more than integers gain. `None` where it cannot be rounded.
    rounded: Option<OnceLock<Option<Weight>>>,
}

impl FusedHead {
    /// The head, in integers where that is asked for and possible; `None` when the norm before it has a bias.
    pub fn new<E: ProductElement>(model: &BaseModel, integers: bool) -> Option<Self> {
        let modules @ [norm, head] = [model.module_index(FINAL_NORM)?, model.module_index(HEAD)?];
        let info = &model.modules[head].info;
        let fits = info.d_in.is_multiple_of(E::PER_WORD) && info.d_out.is_multiple_of(E::PER_WORD);
        let plain = model.modules[norm].bias.is_none();
        plain.then(|| {
            let whole_words = info.d_in.is_multiple_of(4) && info.d_out.is_multiple_of(4);
            let rounded = (integers && whole_words).then(OnceLock::new);
            // What logits are multiplied by, the norm's weight may be as well.
            let mut norm = model.modules[norm].weight.decode(0..1);
            let scale = model.architecture.logit_scale as f32;
            if scale != 1.0 {
                norm.iter_mut().for_each(|w| *w *= scale);
            }
            Self { modules, norm, rounded, wide: !fits }
        })
    }

    /// Indices of the norm and the head into [`BaseModel::modules`]. It is run where both are frozen.
    pub fn modules(&self) -> [usize; 2] {
        self.modules
    }

    /// Whether its weight is multiplied in integers.
    pub fn in_integers(&self) -> bool {
        self.rounded.is_some()
    }

    /// Log-probabilities by the residual stream x, of all rows or of those with a target alone. With weights, `dx`, of the same rows,
    /// becomes the gradient of `Σ wᵢ (−log pᵢ)`.
    ///
    /// # Errors
    /// When weights cannot be had.
    pub fn log_probs<E: ProductElement>(
        &self,
        (pass, batch): (&Pass<'_>, &Batch),
        buffers: &Pool<E>,
        x: &[f32],
        train: Option<(Weigh<'_>, &mut [f32])>,
    ) -> Result<LogProbs> {
        let model = pass.model;
        let (targets, target_rows) = (&batch.targets, &batch.target_rows);
        let (c, n, v) = (model.architecture.hidden_size, targets.len(), model.modules[self.modules[1]].info.d_out);
        let (weigh, mut dx) = train.map_or((None, None), |(weigh, dx)| (Some(weigh), Some(dx)));
        if let Some(dx) = &mut dx {
            dx.fill(0.0);
        }
        if n == 0 {
            return Ok(LogProbs::default());
        }
        let weight = model.modules[self.modules[1]].weight.matrix();
        let rounded = self.rounded.as_ref().and_then(|rounded| {
            let weight = &model.modules[self.modules[1]].weight;
            rounded.get_or_init(|| weight.encoded(&Codec::int8()).ok()).as_ref()
        });
        let right = rounded.map_or(Right::Frozen(weight), |rounded| Right::Integers(rounded.matrix()));
        let bias = model.modules[self.modules[1]].bias.as_ref().map(|bias| &bias[..]);
        let mut residual = vec![0f32; n * c];
        let place = |i: usize| if x.len() == n * c { i } else { target_rows[i] as usize };
        residual.chunks_exact_mut(c).enumerate().for_each(|(i, row)| row.copy_from_slice(&x[place(i) * c..][..c]));
        let (mut normal, mut scaled) = (vec![E::default(); n * c], vec![E::default(); n * c]);
        let mut inverse = vec![0f32; n];
        let epsilon = model.architecture.rms_norm_eps as f32;
        timed("forward norm", || rms_norm(&residual, &self.norm, epsilon, &mut normal, &mut inverse, &mut scaled));

        let mut distance = vec![0f32; n];
        timed("forward head", || target_logits(&scaled, &weight, targets, &mut distance));
        for (distance, target) in distance.iter_mut().zip(targets) {
            *distance = -(*distance + bias.map_or(0.0, |bias| bias[*target as usize]));
        }
        let cap = model.architecture.logit_cap.map(|cap| cap as f32);
        let of_targets: Vec<f32> = distance.iter().filter(|_| cap.is_some()).map(|distance| -distance).collect();
        // Chunks of one size: a small one at the end would cost a packing of the whole head.
        let chunk = chunk_rows(n, v * size_of::<E>());
        let mut logits = buffers.take(chunk, v);
        let (mut losses, mut correct) = (vec![0f32; n], vec![false; n]);
        let mut dy = vec![0f32; if dx.is_some() { n * c } else { 0 }];
        let mut chunks = |scales: Option<&[f32]>, losses: &mut [f32], correct: &mut [bool]| {
            for from in (0..n).step_by(chunk) {
                let part = from..n.min(from + chunk);
                let count = part.len();
                let logits = &mut logits[..count * v];
                timed("forward head", || {
                    let left = Left::rows(&scaled[part.start * c..part.end * c], c);
                    let terms = [Term::forward(left, right)];
                    let columns = [Columns { terms: &terms, at: 0, bias }];
                    let finish = Finish { row_add: Some(&distance[part.clone()]), ..Finish::default() };
                    product(count, &columns, Output::Narrow(logits), v, finish);
                });
                timed("cross-entropy", || {
                    let (losses, correct) = (&mut losses[part.clone()], &mut correct[part.clone()]);
                    let cap = cap.map(|cap| LogitCap { cap, targets: &of_targets[part.clone()] });
                    let scales = scales.map(|scales| &scales[part.clone()]);
                    cross_entropy(v, logits, &targets[part.clone()], cap, scales, losses, correct);
                });
                if scales.is_some() {
                    timed("backward head", || {
                        let terms = [Term::backward(Left::rows(logits, v), right)];
                        let columns = [Columns { terms: &terms, at: 0, bias: None }];
                        let dy = Output::Wide(&mut dy[part.start * c..part.end * c]);
                        product(count, &columns, dy, c, Finish::default());
                    });
                }
            }
        };
        match weigh {
            None => chunks(None, &mut losses, &mut correct),
            Some(Weigh::Alike(weight)) => chunks(Some(&vec![weight as f32; n]), &mut losses, &mut correct),
            Some(Weigh::By(weigh)) => {
                chunks(None, &mut losses, &mut correct);
                let weights = weights_of(weigh, &log_probs(&losses, &correct))?;
                let weights: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
                chunks(Some(&weights), &mut losses, &mut correct);
            }
        }
        drop(logits);
        if let Some(dx) = dx {
            // The residual's rows become their gradient.
            residual.fill(0.0);
            timed("backward norm", || {
                rms_norm_backward(&normal, &self.norm, &inverse, &dy, &mut residual, &mut scaled);
            });
            for (i, d_row) in residual.chunks_exact(c).enumerate() {
                dx[place(i) * c..][..c].copy_from_slice(d_row);
            }
        }
        Ok(log_probs(&losses, &correct))
    }
}

/// Rows of logits, a row of so many bytes, that exist at once where n rows have a target.
pub(super) fn chunk_rows(n: usize, row: usize) -> usize {
    let most = (LOGITS_BYTES / row).max(CHUNK_ROWS.min(LOGITS_BYTES_MAX / row)).clamp(48, 1024);
    n.div_ceil(n.div_ceil(most))
}

/// Log-probabilities of losses.
fn log_probs(losses: &[f32], correct: &[bool]) -> LogProbs {
    LogProbs {
        values: losses.iter().map(|loss| -f64::from(*loss)).collect(),
        loss_sum: losses.iter().map(|loss| f64::from(*loss)).sum(),
        correct: correct.iter().filter(|correct| **correct).count(),
    }
}
