//! Answering: a prompt is read in pieces by the blocks that training runs, further tokens come one at a time, for all sequences that
//! are being answered together.
//!
//! An [`Engine`] holds a base; an [`Adapter`] is a small value that a request brings along. Keys and values are in a [`KvCache`](crate::run::waist::KvCache). What a
//! sequence comes to depends on its tokens and its adapter alone, not on what is answered beside it, in which pieces its prompt was
//! read, or whether the beginning of its prompt was taken over from another.

mod adapters;
mod constraint;
mod engine;
mod finite;
pub mod generate;
mod likely;
mod passes;
mod prefix_cache;
mod sampler;
mod scheduler;
mod sequence;
mod turns;

pub use self::adapters::Adapter;
pub use self::constraint::{Constraint, MASKED};
pub use self::engine::{Ask, Drawn, Engine, Tokens};
pub use self::likely::Likely;
pub use self::passes::Inference;
pub use self::sampler::Sampler;
pub use self::scheduler::TOGETHER;
