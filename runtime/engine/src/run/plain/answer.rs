//! Answers by plain blocks: candle operations, one sequence after another, with any adapter.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::decoder::KvCache as PlainKvCache;
use super::recipe::Pass;
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::run::batch::Batch;
use crate::run::waist::{AdapterValues, Answer, KvCache, own_adapter, own_cache};

/// A base that answers by plain blocks.
pub struct PlainAnswer {
    model: Arc<BaseModel>,
}

/// The parameters themselves.
struct Values(Adaptation);

impl AdapterValues for Values {}

impl PlainAnswer {
    /// A base, ready.
    pub fn new(model: Arc<BaseModel>) -> Self {
        Self { model }
    }
}

impl Answer for PlainAnswer {
    fn adapter(&self, adaptation: &Adaptation) -> Option<Box<dyn AdapterValues>> {
        Some(Box::new(Values(adaptation.clone())))
    }

    fn begin(&self) -> Box<dyn KvCache> {
        Box::new(PlainKvCache::default())
    }

    fn bytes_per_position(&self) -> usize {
        self.model.architecture.kv_bytes(size_of::<f32>())
    }

    fn read(
        &self,
        adapter: Option<&dyn AdapterValues>,
        batch: &Batch,
        cache: &mut dyn KvCache,
        logits: bool,
    ) -> Result<Option<Vec<f32>>> {
        let values = adapter.map(own_adapter::<Values>).transpose()?;
        let pass = Pass::evaluation(&self.model, values.map(|values| &values.0));
        let length = batch.lengths.first().copied().context("there is no sequence")?;
        let last = pass.continue_sequence(&batch.ids, own_cache::<PlainKvCache>(cache)?, length)?;
        logits.then(|| Ok(last.to_vec1()?)).transpose()
    }

    fn step(
        &self,
        adapter: Option<&dyn AdapterValues>,
        sequences: &mut [(u32, &mut dyn KvCache)],
    ) -> Result<Vec<Vec<f32>>> {
        let one = |(id, cache): &mut (u32, &mut dyn KvCache)| {
            let length = cache.prompt_length().max(cache.positions() + 1);
            let batch = Batch::of_piece(&[*id], cache.positions() as u32, length);
            self.read(adapter, &batch, *cache, true)?.context("no logits were read")
        };
        sequences.iter_mut().map(one).collect()
    }
}

impl KvCache for PlainKvCache {
    fn positions(&self) -> usize {
        self.len
    }

    fn prompt_length(&self) -> usize {
        self.length
    }

    fn prefilled(&self) -> usize {
        0
    }

    fn prefix(&self, _: usize) -> Option<Box<dyn KvCache>> {
        None
    }

    fn bytes(&self) -> usize {
        0
    }
}
