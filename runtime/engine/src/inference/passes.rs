//! Passes of a base that answers: a piece of a prompt, or a further token of several sequences.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};

use super::adapters::Adapter;
use crate::models::BaseModel;
use crate::run::backends::answerers;
use crate::run::batch::Batch;
use crate::run::compute::Compute;
use crate::run::waist::{Answer, KvCache};

/// A base, made ready to answer.
pub struct Inference {
    /// The base.
    pub model: Arc<BaseModel>,
    /// The fastest first; the last runs any adapter.
    pub(super) backends: Vec<Box<dyn Answer>>,
    /// Tokens of the prompts that were asked, and those of them that were taken over from earlier ones.
    prompts: [AtomicU64; 2],
}

impl Inference {
    /// Makes a base ready, see [`answerers`].
    pub fn new(model: Arc<BaseModel>, compute: Compute) -> Self {
        let backends = answerers(&model, compute);
        Self { model, backends, prompts: Default::default() }
    }

    /// Returns how many tokens the prompts had that were asked so far, and how many of them were taken over from earlier ones.
    pub fn prompt_tokens(&self) -> (u64, u64) {
        let [all, taken_over] = self.prompts.each_ref().map(|count| count.load(Ordering::Relaxed));
        (all, taken_over)
    }

    pub(super) fn count_prompt(&self, tokens: usize, taken_over: usize) {
        for (count, more) in self.prompts.iter().zip([tokens, taken_over]) {
            count.fetch_add(more as u64, Ordering::Relaxed);
        }
    }

    /// Refuses an adapter that was made ready on another base.
    pub(super) fn check_adapter(&self, adapter: Option<&Adapter>) -> Result<()> {
        let own = adapter.is_none_or(|adapter| adapter.is_on(&self.model));
        ensure!(own, "the adapter was made ready on another base");
        Ok(())
    }

    fn backend(&self, adapter: Option<&Adapter>) -> &dyn Answer {
        &*self.backends[adapter.map_or(0, |adapter| adapter.backend)]
    }

    /// The cache of a sequence that is answered with an adapter, or by the base alone; nothing is in it yet.
    pub fn begin(&self, adapter: Option<&Adapter>) -> Box<dyn KvCache> {
        self.backend(adapter).begin()
    }

    /// Bytes of the keys and values of one position.
    pub fn bytes_per_position(&self, adapter: Option<&Adapter>) -> usize {
        self.backend(adapter).bytes_per_position()
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
        cache: &mut dyn KvCache,
        length: usize,
        logits: bool,
    ) -> Result<Option<Vec<f32>>> {
        ensure!(!ids.is_empty(), "there is no token to read");
        self.check_adapter(adapter)?;
        self.check(ids, cache.positions() + ids.len())?;
        let batch = Batch::of_piece(ids, cache.positions() as u32, length.max(cache.positions() + ids.len()));
        self.backend(adapter).read(adapter.map(|adapter| &*adapter.values), &batch, cache, logits)
    }

    /// A further token of each of some sequences with the same adapter: the logits after it, (V) each.
    ///
    /// # Errors
    /// As [`Inference::read`].
    pub fn step(&self, adapter: Option<&Adapter>, sequences: &mut [(u32, &mut dyn KvCache)]) -> Result<Vec<Vec<f32>>> {
        self.check_adapter(adapter)?;
        for (id, cache) in sequences.iter() {
            self.check(&[*id], cache.positions() + 1)?;
        }
        self.backend(adapter).step(adapter.map(|adapter| &*adapter.values), sequences)
    }

    /// Whether a sequence of `positions` tokens turns what follows otherwise than what its cache holds, so that all of it is to be read
    /// again. A rope of two sets of frequencies takes the second where a sequence outgrows the first.
    pub(super) fn is_outgrown(&self, cache: &dyn KvCache, positions: usize) -> bool {
        let before = cache.prompt_length().max(cache.positions());
        self.model.architecture.ropes.iter().any(|rope| rope.is_outgrown(before, positions))
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
