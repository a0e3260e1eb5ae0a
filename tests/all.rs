//! Tests that cross crates: strategies from their `.so` files, the program as users run it, and numbers against torch.

#[cfg(unix)]
mod command_line;
mod curves;
mod export;
mod fused;
mod gradients;
mod handlers;
#[cfg(unix)]
mod hostile_scripts;
mod inference;
mod invariants;
mod models;
mod pipelines;
#[cfg(target_os = "linux")]
mod plugins;
mod real_model;
#[cfg(target_os = "linux")]
mod reload;
#[cfg(target_os = "linux")]
mod sdk;
mod strategies;
mod support;
mod toml_errors;
#[cfg(unix)]
mod watching;
