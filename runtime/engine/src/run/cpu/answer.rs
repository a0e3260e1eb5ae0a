//! Answers by fused blocks: prompts are read by those that training runs, further tokens decoded for several sequences at once.
//!
//! Reading multiplies in the type of the blocks, bf16 or f32, or, where that is asked for, in integers, for which weights of few
//! bits are rounded anew. Decoding multiplies weights as they are stored: by f32, or, where
//! f32 is not asked for and weights are whole numbers by blocks, by activations in eight bits. Keys and values are kept in the type of
//! the blocks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use homeroom_kernels::{ProductElement, on_pool};

use super::{DecodeUpdates, Decoder, Fused, InIntegers, KvCache as CpuKvCache, Updates, prepare};
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::run::batch::Batch;
use crate::run::plain::recipe::Pass;
use crate::run::waist::{AdapterValues, Answer, KvCache, own_adapter, own_cache};

/// Fused blocks and decoding of a base.
pub struct CpuAnswer<E> {
    model: Arc<BaseModel>,
    reading: Mutex<Fused<E>>,
    decoder: Decoder,
    /// The base alone.
    alone: Values<E>,
}

/// Low-rank updates, or none, with their values: for reading and for decoding.
struct Values<E> {
    read: Updates<E>,
    decode: DecodeUpdates,
}

impl<E: ProductElement> AdapterValues for Values<E> {}

impl<E: ProductElement> Values<E> {
    /// `None` when a block cannot be fused with the adaptation.
    fn new(blocks: &Fused<E>, decoder: &Decoder, model: &BaseModel, adaptation: Option<&Adaptation>) -> Option<Self> {
        let mut read = blocks.updates(model, adaptation, true);
        let (fused, layers, _) = blocks.counts(&read);
        let decode = decoder.updates(model, adaptation).filter(|_| fused == layers)?;
        on_pool(|| read.load(&Pass::evaluation(model, adaptation))).ok()?;
        Some(Self { read, decode })
    }
}

impl<E: ProductElement> CpuAnswer<E> {
    /// A base, ready; `None` when a block of it cannot be fused. `integers`: what reading multiplies so; `round`: see [`Decoder::new`].
    pub fn new(model: &Arc<BaseModel>, integers: InIntegers, round: bool) -> Option<Self> {
        let blocks = Fused::new(model, integers);
        let decoder = Decoder::new(model, round)?;
        let alone = Values::new(&blocks, &decoder, model, None)?;
        Some(Self { model: model.clone(), reading: Mutex::new(blocks), decoder, alone })
    }

    fn blocks(&self) -> MutexGuard<'_, Fused<E>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn values<'a>(&'a self, adapter: Option<&'a dyn AdapterValues>) -> Result<&'a Values<E>> {
        adapter.map_or(Ok(&self.alone), own_adapter)
    }
}

impl<E: ProductElement> Answer for CpuAnswer<E> {
    fn adapter(&self, adaptation: &Adaptation) -> Option<Box<dyn AdapterValues>> {
        // Before the lock: answers go on meanwhile.
        prepare(&self.model, adaptation);
        Some(Box::new(Values::new(&self.blocks(), &self.decoder, &self.model, Some(adaptation))?))
    }

    fn begin(&self) -> Box<dyn KvCache> {
        Box::new(CpuKvCache::<E>::new(&self.model.architecture))
    }

    fn bytes_per_position(&self) -> usize {
        self.model.architecture.kv_bytes(size_of::<E>())
    }

    fn read(
        &self,
        adapter: Option<&dyn AdapterValues>,
        batch: &Batch,
        cache: &mut dyn KvCache,
        logits: bool,
    ) -> Result<Option<Vec<f32>>> {
        let (values, cache) = (self.values(adapter)?, own_cache::<CpuKvCache<E>>(cache)?);
        let pass = Pass::evaluation(&self.model, None);
        // The lock before the pool: a thread of the pool that waits for its own tasks may take another's, and that one might want
        // this lock.
        let mut guard = self.blocks();
        let blocks = &mut *guard;
        let last = on_pool(|| blocks.continue_sequence(&pass, &values.read, batch, cache))?;
        drop(guard);
        let head = || self.decoder.head(&self.model, &values.decode, &last);
        Ok(logits.then(head).and_then(|mut logits| logits.pop()))
    }

    fn step(
        &self,
        adapter: Option<&dyn AdapterValues>,
        sequences: &mut [(u32, &mut dyn KvCache)],
    ) -> Result<Vec<Vec<f32>>> {
        let values = self.values(adapter)?;
        let own = sequences.iter_mut().map(|(id, cache)| Ok((*id, own_cache::<CpuKvCache<E>>(*cache)?)));
        let mut sequences = own.collect::<Result<Vec<_>>>()?;
        let mut blocks = self.blocks();
        let further =
            sequences.iter().map(|(_, cache)| (cache.length.max(cache.positions() + 1), cache.positions() + 1));
        let rotary = blocks.rotary(&self.model.architecture, further);
        Ok(self.decoder.step(&self.model, &values.decode, rotary, &mut sequences))
    }
}

impl<E: ProductElement> KvCache for CpuKvCache<E> {
    fn positions(&self) -> usize {
        CpuKvCache::positions(self)
    }

    fn prompt_length(&self) -> usize {
        self.length
    }

    fn prefilled(&self) -> usize {
        CpuKvCache::prefilled(self)
    }

    fn prefix(&self, len: usize) -> Option<Box<dyn KvCache>> {
        Some(Box::new(CpuKvCache::prefix(self, len)))
    }

    fn bytes(&self) -> usize {
        CpuKvCache::bytes(self)
    }
}
