//! What a decoder layer and its loss do besides products and attention, forward and backward.

pub mod cross_entropy;
pub mod gain;
pub mod gated;
pub mod norm;
pub mod residual;
pub mod rope;
pub mod soft_cap;
pub mod softmax;
