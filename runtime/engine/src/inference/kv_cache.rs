//! Keys and values of a sequence, in the form of the blocks that read it.

use homeroom_kernels::bf16;

use crate::run::cpu::KvCache as CpuKvCache;
use crate::run::plain::decoder::KvCache as PlainKvCache;

/// Keys and values of a sequence.
pub enum KvCache {
    /// In f32.
    F32(CpuKvCache<f32>),
    /// In bf16.
    Bf16(CpuKvCache<bf16>),
    /// Of plain blocks.
    Plain(PlainKvCache),
}

impl KvCache {
    /// Positions.
    pub fn positions(&self) -> usize {
        match self {
            Self::F32(cache) => cache.positions(),
            Self::Bf16(cache) => cache.positions(),
            Self::Plain(cache) => cache.len,
        }
    }

    /// Tokens of the sequence that are known, another one included: some ropes go by it.
    pub(super) fn length(&self) -> usize {
        self.prompt_length().max(self.positions() + 1)
    }

    /// Tokens of the sequence that were known when its prompt was read.
    pub(super) fn prompt_length(&self) -> usize {
        match self {
            Self::F32(cache) => cache.length,
            Self::Bf16(cache) => cache.length,
            Self::Plain(cache) => cache.length,
        }
    }

    /// Positions from the first on that another sequence with the same tokens would come to, bit by bit.
    pub(super) fn prefilled(&self) -> usize {
        match self {
            Self::F32(cache) => cache.prefilled(),
            Self::Bf16(cache) => cache.prefilled(),
            Self::Plain(_) => 0,
        }
    }

    /// A copy of the first positions; `None` where plain blocks keep them.
    pub(super) fn prefix(&self, len: usize) -> Option<Self> {
        match self {
            Self::F32(cache) => Some(Self::F32(cache.prefix(len))),
            Self::Bf16(cache) => Some(Self::Bf16(cache.prefix(len))),
            Self::Plain(_) => None,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::F32(cache) => cache.bytes(),
            Self::Bf16(cache) => cache.bytes(),
            Self::Plain(_) => 0,
        }
    }
}
