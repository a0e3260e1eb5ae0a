//! Passes of a base that answers: a piece of a prompt, or a further token of several sequences.
//!
//! Reading multiplies in the type of the blocks, bf16 or f32. Decoding multiplies weights as they are stored: by f32, or, where
//! f32 is not asked for and weights are whole numbers by blocks, by activations in eight bits. Keys and values are kept in the type of
//! the blocks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use homeroom_kernels::{ProductElement, bf16, on_pool};

use super::KvCache;
use super::adapters::{Adapter, AdapterUpdates};
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::run::batch::Batch;
use crate::run::compute::Compute;
use crate::run::cpu::{DecodeUpdates, Decoder, Fused, How, KvCache as CpuKvCache, Updates};
use crate::run::plain::decoder::KvCache as PlainKvCache;
use crate::run::plain::recipe::Pass;

/// A base, made ready to answer.
pub struct Inference {
    /// The base.
    pub model: Arc<BaseModel>,
    pub(super) blocks: Blocks,
}

pub(super) enum Blocks {
    F32(Box<Fast<f32>>),
    Bf16(Box<Fast<bf16>>),
    /// Candle operations, one sequence after another.
    Plain,
}

/// Fused blocks and decoding of a base.
pub(super) struct Fast<E> {
    reading: Mutex<Fused<E>>,
    decoder: Decoder,
    /// The base alone.
    alone: Ready<E>,
}

/// Low-rank updates, or none, with their values: for reading and for decoding.
pub(super) struct Ready<E> {
    read: Updates<E>,
    decode: DecodeUpdates,
}

impl<E: ProductElement> Ready<E> {
    /// `None` when a block cannot be fused with the adaptation.
    fn new(blocks: &Fused<E>, decoder: &Decoder, model: &BaseModel, adaptation: Option<&Adaptation>) -> Option<Self> {
        let mut read = blocks.updates(model, adaptation);
        let (fused, layers, _) = blocks.counts(&read);
        let decode = decoder.updates(model, adaptation).filter(|_| fused == layers)?;
        on_pool(|| read.load(&Pass::evaluation(model, adaptation))).ok()?;
        Some(Self { read, decode })
    }
}

impl<E: ProductElement> Fast<E> {
    /// `round`: see [`Decoder::new`].
    fn new(model: &BaseModel, round: bool) -> Option<Box<Self>> {
        let blocks = Fused::new(model, How { fuse: true, integers: false });
        let decoder = Decoder::new(model, round)?;
        let alone = Ready::new(&blocks, &decoder, model, None)?;
        Some(Box::new(Self { reading: Mutex::new(blocks), decoder, alone }))
    }

    /// The updates of an adaptation with their present values; `None` when it is something else.
    pub(super) fn ready(&self, model: &BaseModel, adaptation: Option<&Adaptation>) -> Option<Ready<E>> {
        Ready::new(&self.blocks(), &self.decoder, model, adaptation)
    }

    fn blocks(&self) -> MutexGuard<'_, Fused<E>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads tokens; with `logits`, those after the last.
    fn read(
        &self,
        updates: &Ready<E>,
        model: &BaseModel,
        batch: &Batch,
        cache: &mut CpuKvCache<E>,
        logits: bool,
    ) -> Result<Option<Vec<f32>>> {
        let pass = Pass::evaluation(model, None);
        // The lock before the pool: a thread of the pool that waits for its own tasks may take another's, and that one might want
        // this lock.
        let mut guard = self.blocks();
        let blocks = &mut *guard;
        let last = on_pool(|| blocks.continue_sequence(&pass, &updates.read, batch, cache))?;
        drop(guard);
        Ok(logits.then(|| self.decoder.head(model, &updates.decode, &last)).and_then(|mut logits| logits.pop()))
    }

    fn step(
        &self,
        updates: &Ready<E>,
        model: &BaseModel,
        sequences: &mut [(u32, &mut CpuKvCache<E>)],
    ) -> Vec<Vec<f32>> {
        let mut blocks = self.blocks();
        let further =
            sequences.iter().map(|(_, cache)| (cache.length.max(cache.positions() + 1), cache.positions() + 1));
        let rotary = blocks.rotary(&model.architecture, further);
        self.decoder.step(model, &updates.decode, rotary, sequences)
    }
}

/// How a sequence is run.
enum Way<'a> {
    F32(&'a Fast<f32>, &'a Ready<f32>),
    Bf16(&'a Fast<bf16>, &'a Ready<bf16>),
    Plain,
}

/// What a cache of another way is refused with.
const OTHER: &str = "these keys and values are of another model";

impl Inference {
    /// Makes a base ready. Prompts are read in f32 or bf16, as `compute` says; if it says anything but f32, tokens are decoded with
    /// activations in eight bits where weights take them so.
    pub fn new(model: Arc<BaseModel>, compute: Compute) -> Self {
        // What a strategy proposes is for its training.
        let (blocks, round) = match compute {
            Compute::Auto => (Compute::auto(), true),
            Compute::F32 => (compute, false),
            _ => (compute, true),
        };
        let in_f32 = || Fast::new(&model, round).map(Blocks::F32);
        let fast = match blocks {
            Compute::Plain => None,
            Compute::Auto | Compute::F32 => in_f32(),
            Compute::Bf16 | Compute::Int8 => Fast::new(&model, round).map(Blocks::Bf16).or_else(in_f32),
        };
        Self { model, blocks: fast.unwrap_or(Blocks::Plain) }
    }

    /// Refuses an adapter that was made ready on another base.
    pub(super) fn check_adapter(&self, adapter: Option<&Adapter>) -> Result<()> {
        let own = adapter.is_none_or(|adapter| adapter.is_on(&self.model));
        ensure!(own, "the adapter was made ready on another base");
        Ok(())
    }

    fn way<'a>(&'a self, adapter: Option<&'a Adapter>) -> Way<'a> {
        match (&self.blocks, adapter.map(|adapter| &adapter.updates)) {
            (Blocks::F32(fast), None) => Way::F32(fast, &fast.alone),
            (Blocks::F32(fast), Some(AdapterUpdates::F32(updates))) => Way::F32(fast, updates),
            (Blocks::Bf16(fast), None) => Way::Bf16(fast, &fast.alone),
            (Blocks::Bf16(fast), Some(AdapterUpdates::Bf16(updates))) => Way::Bf16(fast, updates),
            _ => Way::Plain,
        }
    }

    /// The cache of a sequence that is answered with an adapter, or by the base alone; nothing is in it yet.
    pub fn begin(&self, adapter: Option<&Adapter>) -> KvCache {
        match self.way(adapter) {
            Way::F32(..) => KvCache::F32(CpuKvCache::new(&self.model.architecture)),
            Way::Bf16(..) => KvCache::Bf16(CpuKvCache::new(&self.model.architecture)),
            Way::Plain => KvCache::Plain(PlainKvCache::default()),
        }
    }

    /// Bytes of the keys and values of one position.
    pub fn bytes_per_position(&self, adapter: Option<&Adapter>) -> usize {
        let in_bf16 = matches!(self.way(adapter), Way::Bf16(..));
        self.model.architecture.kv_bytes(if in_bf16 { size_of::<bf16>() } else { size_of::<f32>() })
    }

    /// Reads tokens of a prompt of `length` tokens; the logits after the last, (V), if they are wanted.
    ///
    /// # Errors
    /// When there is no token, one has no embedding, the sequence grows beyond the model's context, or the adapter was made ready on
    /// another base.
    pub fn read(
        &self,
        adapter: Option<&Adapter>,
        ids: &[u32],
        cache: &mut KvCache,
        length: usize,
        logits: bool,
    ) -> Result<Option<Vec<f32>>> {
        ensure!(!ids.is_empty(), "there is no token to read");
        self.check_adapter(adapter)?;
        self.check(ids, cache.positions() + ids.len())?;
        let batch = Batch::of_piece(ids, cache.positions() as u32, length.max(cache.positions() + ids.len()));
        match (self.way(adapter), cache) {
            (Way::F32(fast, updates), KvCache::F32(cache)) => fast.read(updates, &self.model, &batch, cache, logits),
            (Way::Bf16(fast, updates), KvCache::Bf16(cache)) => fast.read(updates, &self.model, &batch, cache, logits),
            (Way::Plain, KvCache::Plain(cache)) => {
                let pass = Pass::evaluation(&self.model, adapter.map(|adapter| adapter.adaptation.as_ref()));
                let last = pass.continue_sequence(ids, cache, length)?;
                logits.then(|| Ok(last.to_vec1()?)).transpose()
            }
            _ => anyhow::bail!(OTHER),
        }
    }

    /// A further token of each of some sequences with the same adapter: the logits after it, (V) each.
    ///
    /// # Errors
    /// As [`Inference::read`].
    pub fn step(&self, adapter: Option<&Adapter>, sequences: &mut [(u32, &mut KvCache)]) -> Result<Vec<Vec<f32>>> {
        self.check_adapter(adapter)?;
        for (id, cache) in sequences.iter() {
            self.check(&[*id], cache.positions() + 1)?;
        }
        match self.way(adapter) {
            Way::F32(fast, updates) => {
                let own = sequences.iter_mut().map(|(id, cache)| match cache {
                    KvCache::F32(cache) => Some((*id, cache)),
                    _ => None,
                });
                Ok(fast.step(updates, &self.model, &mut own.collect::<Option<Vec<_>>>().context(OTHER)?))
            }
            Way::Bf16(fast, updates) => {
                let own = sequences.iter_mut().map(|(id, cache)| match cache {
                    KvCache::Bf16(cache) => Some((*id, cache)),
                    _ => None,
                });
                Ok(fast.step(updates, &self.model, &mut own.collect::<Option<Vec<_>>>().context(OTHER)?))
            }
            Way::Plain => {
                let one =
                    |(id, cache): &mut (u32, &mut KvCache)| self.read(adapter, &[*id], cache, cache.length(), true);
                sequences.iter_mut().map(|sequence| one(sequence)?.context(OTHER)).collect()
            }
        }
    }

    fn check(&self, ids: &[u32], positions: usize) -> Result<()> {
        let (vocab, context) = (self.model.architecture.vocab_size, self.model.architecture.max_position_embeddings);
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            anyhow::bail!("token {id} has no embedding: the model knows {vocab} tokens, its tokenizer more");
        }
        ensure!(positions <= context, "the conversation is longer than the model's context of {context} tokens");
        Ok(())
    }
}
