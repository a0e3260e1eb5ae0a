//! Tests that cross crates: strategies from their `.so` files, the program as users run it, and numbers against torch.

mod curves;
mod gradients;
mod invariants;
mod models;
mod pipelines;
mod support;
