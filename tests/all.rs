//! Tests that cross crates: strategies from their `.so` files, the program as users run it, and numbers against torch.

mod admission;
#[cfg(unix)]
mod class;
#[cfg(unix)]
mod command_line;
mod curves;
#[cfg(target_os = "linux")]
mod doctor;
mod embeddings;
mod export;
#[cfg(unix)]
mod export_formats;
mod families;
#[cfg(unix)]
mod foreign;
mod forgetting;
mod fused;
mod gguf_export;
mod gradients;
mod handlers;
#[cfg(target_os = "linux")]
mod hostile;
#[cfg(unix)]
mod hostile_scripts;
#[cfg(unix)]
mod hub;
mod inference;
mod invariants;
#[cfg(target_os = "linux")]
mod killed;
mod licenses;
#[cfg(unix)]
mod machine;
mod mixed;
mod models;
#[cfg(unix)]
mod mutated;
#[cfg(unix)]
mod names;
mod objectives;
mod pipeline_results;
mod pipelines;
#[cfg(unix)]
mod plan;
#[cfg(target_os = "linux")]
mod plugins;
mod real_model;
#[cfg(unix)]
mod registry;
#[cfg(target_os = "linux")]
mod reload;
mod report;
#[cfg(target_os = "linux")]
mod results;
#[cfg(unix)]
mod rows;
#[cfg(unix)]
mod runs;
mod scripts;
#[cfg(target_os = "linux")]
mod sdk;
mod server;
mod steps;
mod strategies;
mod support;
#[cfg(unix)]
mod terminal;
mod toml_errors;
mod training;
#[cfg(unix)]
mod watching;
