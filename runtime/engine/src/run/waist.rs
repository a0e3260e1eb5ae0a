//! The waist: what a backend does. Nothing above it names a device or a kernel; nothing below it knows of files, rows or schedules.
//!
//! A backend of another device implements both traits with its own memory behind them, and gets a line in [`super::backends`].

use std::any::Any;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::batch::Batch;
use super::gradients::Gradients;
use super::plain::recipe::Pass;
use crate::adapt::adaptation::Adaptation;

/// A backend that trains a model with what is adapted of it.
pub trait Train: Send {
    /// Log-probabilities of a batch's targets, without gradients.
    ///
    /// # Errors
    /// When a tensor operation fails or a token has no embedding.
    fn log_probs(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<LogProbs>;

    /// The residual stream above the last layer, of the rows with a target alone: (targets, C). [`Pass::head`] makes logits of it, of as
    /// many rows at once as there is memory for.
    ///
    /// # Errors
    /// As [`Train::log_probs`].
    fn residual(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<Tensor>;

    /// Log-probabilities of a batch's targets, and the gradients of `Σ wᵢ (−log pᵢ)` over the targets are added to `gradients`. `recompute`: keep the input of
    /// each block alone and run it again in backward; that changes no bit of the result.
    ///
    /// # Errors
    /// As [`Train::log_probs`], and when `weigh` fails.
    fn forward_backward(
        &mut self,
        pass: &Pass<'_>,
        batch: &Batch,
        weigh: Weigh<'_>,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<LogProbs>;

    /// Whether a frozen weight is multiplied in integers.
    fn in_integers(&self) -> bool {
        false
    }

    /// How blocks are run, in words for the line that restates a run.
    fn words(&self) -> String;
}

/// What the loss of each target is multiplied by.
pub enum Weigh<'a> {
    /// All by one number, which is known before their log-probabilities are: chunks of logits exist once.
    Alike(f64),
    /// By what this makes of the log-probabilities of all targets of the pass. It is called once, between the head's two halves, so
    /// that logits are computed again for the second.
    By(&'a mut (dyn FnMut(&[f64]) -> Result<Vec<f64>> + Send)),
}

/// The log-probabilities of a batch's targets.
#[derive(Clone, Debug, Default)]
pub struct LogProbs {
    /// One for each target, in nats.
    pub values: Vec<f64>,
    /// Their negative sum: the cross-entropy.
    pub loss_sum: f64,
    /// Targets that were the most likely prediction.
    pub correct: usize,
}

/// A backend that answers by a base, with an adapter or without.
pub trait Answer: Send + Sync {
    /// An adapter's present values in the form in which this backend takes them; `None` when its recipes are none that it runs.
    fn adapter(&self, adaptation: &Adaptation) -> Option<Box<dyn AdapterValues>>;

    /// The cache of a sequence; nothing is in it yet.
    fn begin(&self) -> Box<dyn KvCache>;

    /// Bytes of the keys and values of one position.
    fn bytes_per_position(&self) -> usize;

    /// Reads rows that continue a sequence; the logits after the last, (V), if they are wanted.
    ///
    /// # Errors
    /// When a tensor operation fails, or adapter or cache are another backend's.
    fn read(
        &self,
        adapter: Option<&dyn AdapterValues>,
        batch: &Batch,
        cache: &mut dyn KvCache,
        logits: bool,
    ) -> Result<Option<Vec<f32>>>;

    /// A further token of each of some sequences with the same adapter: the logits after it, (V) each.
    ///
    /// # Errors
    /// As [`Answer::read`].
    fn step(
        &self,
        adapter: Option<&dyn AdapterValues>,
        sequences: &mut [(u32, &mut dyn KvCache)],
    ) -> Result<Vec<Vec<f32>>>;
}

/// An adapter's values in the form of one backend.
pub trait AdapterValues: Any + Send + Sync {}

/// Keys and values that are kept of a sequence, so that a further token is one row.
pub trait KvCache: Any + Send {
    /// Positions.
    fn positions(&self) -> usize;

    /// Tokens of the sequence that were known when it was read last: some ropes go by it.
    fn prompt_length(&self) -> usize;

    /// Positions from the first on that another sequence with the same tokens would come to, bit by bit.
    fn prefilled(&self) -> usize;

    /// A copy of the first positions, which were read as a prompt; `None` where there are no copies.
    fn prefix(&self, len: usize) -> Option<Box<dyn KvCache>>;

    /// Bytes of all positions; 0 where there are no copies to be kept.
    fn bytes(&self) -> usize;
}

/// A cache as that of a backend.
pub(super) fn own_cache<T: KvCache>(cache: &mut dyn KvCache) -> Result<&mut T> {
    (cache as &mut dyn Any).downcast_mut().context("these keys and values are of another model")
}

/// An adapter as that of a backend.
pub(super) fn own_adapter<T: AdapterValues>(adapter: &dyn AdapterValues) -> Result<&T> {
    (adapter as &dyn Any).downcast_ref().context("the adapter was made ready for another backend")
}
