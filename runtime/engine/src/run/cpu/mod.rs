//! Blocks as single operations: a hand-written forward and backward over reused buffers, where every recipe in a block is none or
//! a low-rank update. Any other block runs plain, as a composition of candle operations, beside them.

mod answer;
mod decode;
mod head;
mod kv_cache;
mod layer;
pub(crate) mod low_rank;
mod rotary;
mod site;
pub(crate) mod size;
mod train;
mod updates;
mod workspace;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use homeroom_kernels::{ProductElement, RotaryTable, to_elements};
use rayon::prelude::*;

pub use self::answer::CpuAnswer;
pub use self::decode::Decoder;
use self::head::FusedHead;
pub use self::kv_cache::KvCache;
use self::layer::{FusedLayer, LayerActivations};
use self::rotary::Rotary;
pub use self::site::InIntegers;
pub use self::train::CpuTrain;
use self::updates::prepare;
pub use self::updates::{DecodeUpdates, Updates};
use self::workspace::{Buffer, Pool, Workspace};
use crate::adapt::adaptation::Adaptation;
use crate::models::{Architecture, BaseModel, EMBEDDING};
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::plain::block::{Keep, Plain, PlainActivations, lowest_trained, plain_head};
use crate::run::plain::recipe::Pass;
use crate::run::profile::timed;
use crate::run::waist::{LogProbs, Weigh};

/// The blocks of a base that can be run fused, and the buffers that they share. They hold nothing of an adapter: each pass is given
/// the updates that it goes with.
pub struct Fused<E> {
    layers: Vec<Option<FusedLayer>>,
    head: Option<FusedHead>,
    workspace: Workspace<E>,
    rotary: Rotary,
}

/// The rows of a pass, and what they go through.
pub(crate) struct Rows<'a, E> {
    pass: &'a Pass<'a>,
    batch: &'a Batch,
    updates: &'a Updates<E>,
    rotary: &'a Rotary,
    /// Rows of each rope's table (m).
    turns: &'a [Vec<u32>],
    workspace: &'a Workspace<E>,
}

impl<E: ProductElement> Rows<'_, E> {
    fn count(&self) -> usize {
        self.batch.ids.len()
    }

    /// Other rows of the same pass.
    fn of<'b>(&'b self, batch: &'b Batch) -> Rows<'b, E> {
        Rows { batch, ..*self }
    }

    /// Rows of a rope's table (m), and the table; no table where nothing turns.
    fn turning(&self, rope: Option<usize>) -> (&[u32], Option<&RotaryTable>) {
        rope.map_or((&self.batch.positions, None), |rope| (&self.turns[rope], Some(self.rotary.table(rope))))
    }

    /// A buffer of activations (m, width).
    fn narrow(&self, width: usize) -> Buffer<E> {
        self.workspace.narrow.take(self.count(), width)
    }

    /// A buffer in f32, (m, width).
    fn wide(&self, width: usize) -> Buffer<f32> {
        self.workspace.wide.take(self.count(), width)
    }
}

/// The residual stream, or its gradient, between two blocks.
enum Stream {
    /// For plain blocks.
    Tensor(Tensor),
    /// For fused ones: (N, C), f32.
    Buffer(Buffer<f32>),
}

impl Stream {
    fn into_tensor(self, rows: usize) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor),
            Self::Buffer(buffer) => {
                let width = buffer.len() / rows.max(1);
                Ok(Tensor::from_vec(buffer.into_vec(), (rows, width), &Device::Cpu)?)
            }
        }
    }

    fn into_buffer(self, buffers: &Pool<f32>) -> Result<Buffer<f32>> {
        match self {
            Self::Tensor(tensor) => {
                let (rows, width) = tensor.dims2()?;
                let mut buffer = buffers.take(rows, width);
                buffer.copy_from_slice(&tensor.flatten_all()?.to_vec1::<f32>()?);
                Ok(buffer)
            }
            Self::Buffer(buffer) => Ok(buffer),
        }
    }
}

/// What forward keeps of a block for backward.
enum BlockActivations<E> {
    Plain(PlainActivations),
    Fused(Box<LayerActivations<E>>),
    /// The input alone, to run forward from again.
    Input(Buffer<f32>),
}

impl<E: ProductElement> Fused<E> {
    /// The blocks of a base, as far as they can be fused.
    pub fn new(model: &BaseModel, integers: InIntegers) -> Self {
        let layers = 0..model.layers.len();
        let layers = layers.map(|layer| FusedLayer::new::<E>(model, layer, integers)).collect();
        let head = FusedHead::new::<E>(model, integers == InIntegers::All);
        Self { layers, head, workspace: Workspace::new(), rotary: Rotary::default() }
    }

    /// The low-rank updates of an adaptation, and which blocks can be run fused with it. [`Updates::load`] gives them their values.
    /// `at_rest`: for passes in which nothing is dropped out.
    pub fn updates(&self, model: &BaseModel, adaptation: Option<&Adaptation>, at_rest: bool) -> Updates<E> {
        let layers = self.layers.iter().map(Option::as_ref);
        let layers =
            layers.map(|layer| layer.map(|layer| (layer.norms(), layer.sites().map(|site| site.modules().collect()))));
        Updates::new(model, (adaptation, at_rest), layers, self.head.as_ref().map(FusedHead::modules))
    }

    /// A layer, if it is run fused.
    fn layer(&self, updates: &Updates<E>, number: usize) -> Option<&FusedLayer> {
        self.layers[number].as_ref().filter(|_| updates.fuses_layer(number))
    }

    /// The head, if it can be run fused.
    fn head(&self, updates: &Updates<E>) -> Option<&FusedHead> {
        self.head.as_ref().filter(|_| updates.fuses_head())
    }

    /// Whether a layer or the head multiplies in integers.
    pub fn in_integers(&self, updates: &Updates<E>) -> bool {
        let mut layers = (0..self.layers.len()).filter_map(|number| self.layer(updates, number));
        layers.any(FusedLayer::in_integers) || self.head(updates).is_some_and(FusedHead::in_integers)
    }

    /// Layers that run fused, and all layers; whether the head does.
    pub fn counts(&self, updates: &Updates<E>) -> (usize, usize, bool) {
        let fused = (0..self.layers.len()).filter(|number| self.layer(updates, *number).is_some()).count();
        (fused, self.layers.len(), self.head(updates).is_some())
    }

    /// Log-probabilities of a batch, without gradients. `updates` have the values of the pass's parameters.
    ///
    /// # Errors
    /// When a tensor operation fails or a token has no embedding.
    pub fn log_probs(&mut self, pass: &Pass<'_>, updates: &Updates<E>, batch: &Batch) -> Result<LogProbs> {
        let turns = self.rotary.rows(&pass.model.architecture, batch);
        let rows = &self.rows(pass, updates, batch, &turns);
        let (h, _) = self.up(rows, &|_| Keep::Nothing)?;
        let (log_probs, _) = self.top(rows, h, None)?;
        self.release_embedding(rows);
        Ok(log_probs)
    }

    /// The residual stream above the last layer, of the rows with a target: (targets, C).
    ///
    /// # Errors
    /// As [`Fused::log_probs`].
    pub fn residual(&mut self, pass: &Pass<'_>, updates: &Updates<E>, batch: &Batch) -> Result<Tensor> {
        let turns = self.rotary.rows(&pass.model.architecture, batch);
        let rows = &self.rows(pass, updates, batch, &turns);
        let (targets, c) = (batch.targets.len(), pass.model.architecture.hidden_size);
        let (h, _) = self.up(rows, &|_| Keep::Nothing)?;
        let h = match h {
            Stream::Tensor(tensor) => tensor,
            Stream::Buffer(buffer) => {
                let rows = buffer.len() / c;
                Tensor::from_vec(buffer.into_vec(), (rows, c), &Device::Cpu)?
            }
        };
        // The last layer left the others out where it could.
        if h.dim(0)? == targets {
            return Ok(h);
        }
        Ok(h.index_select(&Tensor::from_slice(&batch.target_rows, targets, &Device::Cpu)?, 0)?)
    }

    /// Log-probabilities of a batch; the gradients of `Σ wᵢ (−log pᵢ)` are added to `gradients`.
    ///
    /// # Errors
    /// As [`Fused::log_probs`].
    pub fn forward_backward(
        &mut self,
        pass: &Pass<'_>,
        updates: &Updates<E>,
        batch: &Batch,
        weigh: Weigh<'_>,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<LogProbs> {
        let lowest = lowest_trained(pass)?;
        let keep = |index: usize| Keep::from(index, lowest, recompute);
        let turns = self.rotary.rows(&pass.model.architecture, batch);
        let rows = &self.rows(pass, updates, batch, &turns);
        let (h, kept) = self.up(rows, &keep)?;
        let (log_probs, dh) = self.top(rows, h, Some((weigh, gradients)))?;
        if let Some(dh) = dh {
            self.back_down(rows, kept, dh, lowest, gradients)?;
        }
        self.release_embedding(rows);
        Ok(log_probs)
    }

    fn rows<'a>(
        &'a self,
        pass: &'a Pass<'a>,
        updates: &'a Updates<E>,
        batch: &'a Batch,
        turns: &'a [Vec<u32>],
    ) -> Rows<'a, E> {
        Rows { pass, batch, updates, rotary: &self.rotary, turns, workspace: &self.workspace }
    }

    /// Gives the pages of an embedding back of which rows are looked up alone. With those around them, they would gather until nearly all of
    /// it is in memory.
    fn release_embedding(&self, rows: &Rows<'_, E>) {
        let Rows { pass, updates, .. } = rows;
        let multiplied =
            pass.model.architecture.tie_word_embeddings && !self.head(updates).is_some_and(FusedHead::in_integers);
        if let Some(embedding) =
            pass.model.module_index(EMBEDDING).filter(|_| updates.freezes_embedding() && !multiplied)
        {
            pass.model.modules[embedding].weight.release();
        }
    }

    /// All blocks in order: the residual stream, and what each keeps for backward.
    fn up(&self, rows: &Rows<'_, E>, keep: &dyn Fn(usize) -> Keep) -> Result<(Stream, Vec<BlockActivations<E>>)> {
        let Rows { pass, batch, .. } = *rows;
        let targets = self.target_rows(rows);
        let mut kept = Vec::with_capacity(self.layers.len() + 1);
        let mut h = if rows.updates.freezes_embedding() && pass.dtype == DType::F32 {
            kept.push(BlockActivations::Plain(PlainActivations::Nothing));
            Stream::Buffer(timed("embedding", || self.look_up(rows))?)
        } else {
            let (h, activations) = Plain::embedding().forward(pass, batch, None, keep(0))?;
            kept.push(BlockActivations::Plain(activations));
            Stream::Tensor(h)
        };
        for number in 0..self.layers.len() {
            let keep = keep(number + 1);
            h = match self.layer(rows.updates, number) {
                Some(layer) => {
                    let x = h.into_buffer(&self.workspace.wide)?;
                    let targets = targets.as_ref().filter(|_| number + 1 == self.layers.len());
                    let input = matches!(keep, Keep::Input { .. }).then(|| {
                        let mut input = rows.wide(pass.model.architecture.hidden_size);
                        input.copy_from_slice(&x);
                        input
                    });
                    let (x, activations) = layer.forward(rows, targets, x, None);
                    kept.push(match (keep, input) {
                        (Keep::All { .. }, _) => BlockActivations::Fused(Box::new(activations)),
                        (_, input) => {
                            input.map_or(BlockActivations::Plain(PlainActivations::Nothing), BlockActivations::Input)
                        }
                    });
                    Stream::Buffer(x)
                }
                None => {
                    let x = h.into_tensor(rows.count())?;
                    let plain = Plain::layer(number);
                    let (h, activations) = timed("forward plain layer", || plain.forward(pass, batch, Some(&x), keep))?;
                    kept.push(BlockActivations::Plain(activations));
                    Stream::Tensor(h)
                }
            };
            pass.release_layer(number);
        }
        Ok((h, kept))
    }

    /// The rows with a target as a batch of their own, if there are others: all that the fused head needs of the layer below.
    fn target_rows(&self, rows: &Rows<'_, E>) -> Option<Batch> {
        let Rows { pass, batch, updates, .. } = rows;
        let some = (1..batch.ids.len()).contains(&batch.targets.len());
        (some && self.head(updates).is_some() && pass.dtype == DType::F32).then(|| batch.rows(&batch.target_rows))
    }

    /// The residual stream (C) after the last of some rows that continue a sequence, whose cache takes them in; all layers are
    /// fused.
    ///
    /// # Errors
    /// When there is no row or a token has no embedding.
    pub fn continue_sequence(
        &mut self,
        pass: &Pass<'_>,
        updates: &Updates<E>,
        batch: &Batch,
        cache: &mut KvCache<E>,
    ) -> Result<Vec<f32>> {
        let last = batch.ids.len().checked_sub(1).context("there is no row")? as u32;
        let turns = self.rotary.rows(&pass.model.architecture, batch);
        // Above the last layer's keys and values nothing is asked for but the last row.
        let batch = &Batch { target_rows: vec![last], ..batch.clone() };
        let of_last = (last > 0).then(|| batch.rows(&batch.target_rows));
        let rows = &self.rows(pass, updates, batch, &turns);
        let mut x = self.look_up(rows)?;
        for number in 0..self.layers.len() {
            let layer = self.layer(updates, number).context("a layer is not fused")?;
            let targets = of_last.as_ref().filter(|_| number + 1 == self.layers.len());
            (x, _) = layer.forward(rows, targets, x, Some((&mut *cache, number)));
        }
        cache.advance(batch.ids.len(), true);
        cache.length = batch.lengths.first().copied().unwrap_or(0);
        let c = pass.model.architecture.hidden_size;
        Ok(x[x.len() - c..].to_vec())
    }

    /// Cosines and sines for a further token of sequences of these lengths and positions.
    pub fn rotary(
        &mut self,
        architecture: &Architecture,
        sequences: impl Iterator<Item = (usize, usize)> + Clone,
    ) -> &Rotary {
        self.rotary.ready(architecture, sequences);
        &self.rotary
    }

    /// Rows of the frozen embedding: (N, C).
    fn look_up(&self, rows: &Rows<'_, E>) -> Result<Buffer<f32>> {
        let Rows { pass, batch, .. } = rows;
        let module = pass.embedding(batch)?;
        let c = pass.model.architecture.hidden_size;
        let scale = pass.model.architecture.embedding_scale as f32;
        let mut x = rows.wide(c);
        let weight = pass.model.modules[module].weight.matrix();
        x.par_chunks_mut(c).zip(&batch.ids[..]).for_each(|(x, id)| {
            weight.decode_rows(*id as usize..*id as usize + 1, x);
            if scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= scale);
            }
        });
        if pass.is_noisy() {
            pass.add_noise(batch, &mut x);
        }
        Ok(x)
    }

    /// Norm, head and log-probabilities; with weights, also the gradient (m, C) of `Σ wᵢ (−log pᵢ)` in the residual stream.
    fn top(
        &self,
        rows: &Rows<'_, E>,
        h: Stream,
        train: Option<(Weigh<'_>, &mut Gradients)>,
    ) -> Result<(LogProbs, Option<Stream>)> {
        let Rows { pass, batch, updates, .. } = rows;
        let Some(head) = self.head(updates).filter(|_| pass.dtype == DType::F32) else {
            let h = h.into_tensor(rows.count())?;
            let (log_probs, dh) = timed("plain head", || plain_head(pass, batch, &h, train))?;
            return Ok((log_probs, dh.map(Stream::Tensor)));
        };
        let x = h.into_buffer(&self.workspace.wide)?;
        let c = pass.model.architecture.hidden_size;
        let mut dx = train.is_some().then(|| self.workspace.wide.take(x.len() / c, c));
        let train = train.map(|(weigh, _)| weigh).zip(dx.as_deref_mut());
        let log_probs = match head.wide {
            true => head.log_probs((pass, batch), &self.workspace.wide_logits, &x, train)?,
            false => head.log_probs((pass, batch), &self.workspace.logits, &x, train)?,
        };
        Ok((log_probs, dx.map(Stream::Buffer)))
    }

    /// All blocks from the top down to the lowest that trains.
    fn back_down(
        &self,
        rows: &Rows<'_, E>,
        mut kept: Vec<BlockActivations<E>>,
        dh: Stream,
        lowest: usize,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Rows { pass, batch, updates, .. } = *rows;
        let (c, targets) = (pass.model.architecture.hidden_size, self.target_rows(rows));
        // The gradient, and for fused blocks the same as E.
        let (mut dh, mut narrow) = (Some(dh), None::<Buffer<E>>);
        for index in (lowest..kept.len()).rev() {
            let (Some(activations), Some(above)) = (kept.pop(), dh.take()) else { break };
            let layer = index.checked_sub(1).and_then(|number| self.layer(updates, number));
            let Some(layer) = layer else {
                let BlockActivations::Plain(activations) = activations else {
                    unreachable!("a plain block keeps what plain blocks keep")
                };
                let plain = Plain::at(index);
                let above = above.into_tensor(rows.count())?;
                dh = timed("backward plain", || plain.backward(pass, batch, activations, &above, gradients))?
                    .map(Stream::Tensor);
                narrow = None;
                continue;
            };
            let dx = above.into_buffer(&self.workspace.wide)?;
            let targets = targets.as_ref().filter(|_| index == self.layers.len());
            let dx_narrow = narrow.take().unwrap_or_else(|| {
                let mut narrow = self.workspace.narrow.take(dx.len() / c, c);
                to_elements(&dx, &mut narrow);
                narrow
            });
            let activations = match activations {
                BlockActivations::Fused(activations) => *activations,
                BlockActivations::Input(x) => layer.forward(rows, targets, x, None).1,
                BlockActivations::Plain(_) => break,
            };
            let input_gradient = index > lowest;
            let (dx, dx_narrow) =
                layer.backward(rows, targets, activations, (dx, dx_narrow), input_gradient, gradients)?;
            narrow = Some(dx_narrow);
            dh = input_gradient.then_some(Stream::Buffer(dx));
        }
        Ok(())
    }
}
