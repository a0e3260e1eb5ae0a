//! Answering: a prompt is read in pieces by the blocks that training runs, further tokens come one at a time, for all sequences that
//! are being answered together.
//!
//! Reading multiplies in the type of the blocks, bf16 or f32. Decoding multiplies weights as they are stored: by f32, or, where
//! f32 is not asked for and weights are whole numbers by blocks, by activations in eight bits. Keys and values are kept in the type of
//! the blocks. What a sequence comes to depends on its tokens alone, not on what is answered
//! beside it, in which pieces its prompt was read, or whether the beginning of its prompt was taken over from another.

mod finite;
pub mod generate;
mod sampler;
mod scheduler;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use homeroom_kernels::{ProductElement, bf16, on_pool};

pub use self::sampler::Sampler;
pub use self::scheduler::{Answers, TOGETHER, Tokens};
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::run::batch::Batch;
use crate::run::compute::Compute;
use crate::run::cpu::{DecodeUpdates, Decoder, Fused, How, KvCache, Updates};
use crate::run::plain::decoder::Cache;
use crate::run::plain::recipe::Pass;

/// A model, perhaps with an adapter, made ready to answer. It keeps the adapter's values as they are now.
pub struct Inference {
    /// The base.
    pub model: Arc<BaseModel>,
    adaptation: Option<Arc<Adaptation>>,
    blocks: Blocks,
}

enum Blocks {
    F32(Box<Fast<f32>>),
    Bf16(Box<Fast<bf16>>),
    /// Recipes that are no low-rank updates: candle operations, one sequence after another.
    Plain,
}

struct Fast<E> {
    reading: Mutex<Fused<E>>,
    decoder: Decoder,
    updates: Updates<E>,
    decode_updates: DecodeUpdates,
}

impl<E: ProductElement> Fast<E> {
    /// `round`: see [`Decoder::new`].
    fn new(model: &BaseModel, adaptation: Option<&Adaptation>, round: bool) -> Option<Box<Self>> {
        let blocks = Fused::new(model, How { fuse: true, integers: false });
        let mut updates = blocks.updates(model, adaptation);
        let (fused, layers, _) = blocks.counts(&updates);
        let decoder = Decoder::new(model, round).filter(|_| fused == layers)?;
        let decode_updates = decoder.updates(model, adaptation)?;
        on_pool(|| updates.load(&Pass::evaluation(model, adaptation))).ok()?;
        Some(Box::new(Self { reading: Mutex::new(blocks), decoder, updates, decode_updates }))
    }

    fn blocks(&self) -> MutexGuard<'_, Fused<E>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads tokens; with `logits`, those after the last.
    fn read(&self, pass: &Pass<'_>, batch: &Batch, cache: &mut KvCache<E>, logits: bool) -> Result<Option<Vec<f32>>> {
        // The lock before the pool: a thread of the pool that waits for its own tasks may take another's, and that one might want
        // this lock.
        let mut guard = self.blocks();
        let blocks = &mut *guard;
        let last = on_pool(|| blocks.continue_sequence(pass, &self.updates, batch, cache))?;
        drop(guard);
        Ok(logits
            .then(|| self.decoder.head(pass.model, &self.decode_updates, &last))
            .and_then(|mut logits| logits.pop()))
    }

    fn step(&self, model: &BaseModel, sequences: &mut [(u32, &mut KvCache<E>)]) -> Vec<Vec<f32>> {
        let mut blocks = self.blocks();
        let further =
            sequences.iter().map(|(_, cache)| (cache.length.max(cache.positions() + 1), cache.positions() + 1));
        let rotary = blocks.rotary(&model.architecture, further);
        self.decoder.step(model, &self.decode_updates, rotary, sequences)
    }
}

/// What is kept of a sequence between its tokens.
pub enum Kept {
    /// Keys and values in f32.
    F32(KvCache<f32>),
    /// In bf16.
    Bf16(KvCache<bf16>),
    /// Of plain blocks.
    Plain(Cache),
}

impl Kept {
    /// Positions.
    pub fn positions(&self) -> usize {
        match self {
            Self::F32(cache) => cache.positions(),
            Self::Bf16(cache) => cache.positions(),
            Self::Plain(cache) => cache.len,
        }
    }

    /// Tokens of the sequence that are known, another one included: some ropes go by it.
    fn length(&self) -> usize {
        let read = match self {
            Self::F32(cache) => cache.length,
            Self::Bf16(cache) => cache.length,
            Self::Plain(cache) => cache.length,
        };
        read.max(self.positions() + 1)
    }

    /// Positions from the first on that another sequence with the same tokens would come to.
    fn prefilled(&self) -> usize {
        match self {
            Self::F32(cache) => cache.prefilled(),
            Self::Bf16(cache) => cache.prefilled(),
            Self::Plain(_) => 0,
        }
    }

    /// A copy of the first positions.
    fn prefix(&self, len: usize) -> Option<Self> {
        match self {
            Self::F32(cache) => Some(Self::F32(cache.prefix(len))),
            Self::Bf16(cache) => Some(Self::Bf16(cache.prefix(len))),
            Self::Plain(_) => None,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(cache) => cache.bytes(),
            Self::Bf16(cache) => cache.bytes(),
            Self::Plain(_) => 0,
        }
    }
}

impl Inference {
    /// Makes a model ready. Prompts are read in f32 or bf16, as `compute` says; if it says anything but f32, tokens are decoded with
    /// activations in eight bits where weights take them so.
    pub fn new(model: Arc<BaseModel>, adaptation: Option<Arc<Adaptation>>, compute: Compute) -> Self {
        let adapted = adaptation.as_deref();
        // What a strategy proposes is for its training.
        let (blocks, round) = match compute {
            Compute::Auto => (Compute::auto(), true),
            Compute::F32 => (compute, false),
            _ => (compute, true),
        };
        let in_f32 = || Fast::new(&model, adapted, round).map(Blocks::F32);
        let fast = match blocks {
            Compute::Plain => None,
            Compute::Auto | Compute::F32 => in_f32(),
            Compute::Bf16 | Compute::Int8 => Fast::new(&model, adapted, round).map(Blocks::Bf16).or_else(in_f32),
        };
        Self { model, adaptation, blocks: fast.unwrap_or(Blocks::Plain) }
    }

    /// Nothing of a sequence yet.
    pub fn begin(&self) -> Kept {
        match self.blocks {
            Blocks::F32(_) => Kept::F32(KvCache::new(&self.model.architecture)),
            Blocks::Bf16(_) => Kept::Bf16(KvCache::new(&self.model.architecture)),
            Blocks::Plain => Kept::Plain(Cache::default()),
        }
    }

    /// Bytes of the keys and values of one position.
    pub fn bytes_per_position(&self) -> usize {
        let element = if matches!(self.blocks, Blocks::Bf16(_)) { size_of::<bf16>() } else { size_of::<f32>() };
        self.model.architecture.kv_bytes(element)
    }

    /// Reads tokens of a prompt of `length` tokens; the logits after the last, (V), if they are wanted.
    ///
    /// # Errors
    /// When there is no token, one has no embedding, or the sequence grows beyond the model's context.
    pub fn read(&self, ids: &[u32], kept: &mut Kept, length: usize, logits: bool) -> Result<Option<Vec<f32>>> {
        ensure!(!ids.is_empty(), "there is no token to read");
        self.check(ids, kept.positions() + ids.len())?;
        let pass = Pass::evaluation(&self.model, self.adaptation.as_deref());
        let batch = Batch::of_piece(ids, kept.positions() as u32, length.max(kept.positions() + ids.len()));
        match (&self.blocks, kept) {
            (Blocks::F32(fast), Kept::F32(cache)) => fast.read(&pass, &batch, cache, logits),
            (Blocks::Bf16(fast), Kept::Bf16(cache)) => fast.read(&pass, &batch, cache, logits),
            (Blocks::Plain, Kept::Plain(cache)) => {
                let last = pass.continue_sequence(ids, cache, length)?;
                logits.then(|| Ok(last.to_vec1()?)).transpose()
            }
            _ => anyhow::bail!("what is kept is of another model"),
        }
    }

    /// A further token of each sequence: the logits after it, (V) each.
    ///
    /// # Errors
    /// As [`Inference::read`].
    pub fn step(&self, sequences: &mut [(u32, &mut Kept)]) -> Result<Vec<Vec<f32>>> {
        for (id, kept) in sequences.iter() {
            self.check(&[*id], kept.positions() + 1)?;
        }
        const OTHER: &str = "what is kept is of another model";
        match &self.blocks {
            Blocks::F32(fast) => {
                let own = sequences.iter_mut().map(|(id, kept)| match kept {
                    Kept::F32(cache) => Some((*id, cache)),
                    _ => None,
                });
                Ok(fast.step(&self.model, &mut own.collect::<Option<Vec<_>>>().context(OTHER)?))
            }
            Blocks::Bf16(fast) => {
                let own = sequences.iter_mut().map(|(id, kept)| match kept {
                    Kept::Bf16(cache) => Some((*id, cache)),
                    _ => None,
                });
                Ok(fast.step(&self.model, &mut own.collect::<Option<Vec<_>>>().context(OTHER)?))
            }
            Blocks::Plain => {
                let one = |(id, kept): &mut (u32, &mut Kept)| self.read(&[*id], kept, kept.length(), true);
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
