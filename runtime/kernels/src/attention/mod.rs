//! Causal grouped-query attention over sequences laid end to end, forward and backward, without the (T, T) scores of a whole
//! sequence ever being there at once.
//!
//! After Dao et al. 2022, <https://arxiv.org/abs/2205.14135>: forward keeps the logarithm of each row's sum, backward computes
//! the probabilities again block by block. A query sees the positions of its own sequence up to its own, and no more than
//! `window` of them. What a row comes to depends on its sequence alone, wherever that lies and whatever shares the call.

mod backward;
mod forward;
mod scratch;
mod shape;

pub(crate) use self::backward::gradients;
pub use self::backward::{KeyValueGradients, attention_backward, key_value_gradient_bytes};
pub use self::forward::{attention, attention_kept};
pub(crate) use self::forward::{of_kept, of_sequences};
pub use self::scratch::attention_scratch_bytes;
pub use self::shape::Attention;
