//! Arguments that decide on a training's shapes: `fine-tune` trains by them, `plan` estimates by them.

use anyhow::{Result, bail};
use clap::Args;
use homeroom_engine::run::compute::Compute;
use serde::Serialize;
use serde_json::{Map, Value};

use super::arguments::{COMPUTE, COUNT_MAX, above_zero, key_value, one_of, share, whole};

/// The strategy's options.
#[derive(Args, Serialize)]
pub struct StrategyArgs {
    /// Rank of the adapter [default: 16]
    #[arg(long, alias = "r", value_name = "R", value_parser = whole::<u64>(0..=u64::MAX))]
    lora_r: Option<u64>,
    /// Alpha of the adapter, whose update is scaled by alpha / r [default: 2 r]
    #[arg(long, value_name = "ALPHA", value_parser = above_zero)]
    lora_alpha: Option<f64>,
    /// Dropout on the adapter's input [default: 0]
    #[arg(long, value_name = "P", value_parser = share)]
    lora_dropout: Option<f64>,
    /// Modules to adapt: all-linear, names separated by commas, or one regular expression [default: all-linear]
    #[arg(long, value_name = "NAMES")]
    target_modules: Option<String>,
    /// Any other option of the strategy, its value as JSON or text; `homeroom plugins list` shows them; may be repeated
    #[arg(long = "set-option", value_name = "KEY=VALUE", value_parser = key_value)]
    options: Vec<(String, Value)>,
}

/// How a step is computed.
#[derive(Args, Serialize)]
pub struct PassArgs {
    /// Save memory: keep only the input of each layer, and compute the layer again in the backward pass
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Compute each batch in a pass of its own; else a pass is filled with as many rows of the step as fit
    #[arg(long)]
    pub no_packing: bool,
    /// Tokens of one pass at most, which changes memory and not the step; a longer row is a pass of its own [default: 1024, or 512 over a base in 4 or 8 bits]
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1..=COUNT_MAX))]
    pub pass_tokens: Option<usize>,
    /// Encode a base that is already quantised (GGUF) again, as the strategy asks; else it keeps its storage
    #[arg(long)]
    pub requantize: bool,
    /// Number format of the products
    #[arg(long, default_value = "auto", value_name = "FORMAT", value_parser = one_of::<Compute>(&COMPUTE))]
    pub compute: Compute,
}

impl StrategyArgs {
    /// The strategy's options, by PEFT's names.
    ///
    /// # Errors
    /// When one is given twice, with two values.
    pub fn options(&self) -> Result<Map<String, Value>> {
        let flags = [
            ("--lora-r", "r", self.lora_r.map(Value::from)),
            ("--lora-alpha", "lora_alpha", self.lora_alpha.map(Value::from)),
            ("--lora-dropout", "lora_dropout", self.lora_dropout.map(Value::from)),
            ("--target-modules", "target_modules", self.target_modules.as_deref().map(targets)),
        ];
        let mut options = Map::new();
        for (name, value) in &self.options {
            if let Some(before) = options.insert(name.clone(), value.clone()).filter(|before| before != value) {
                bail!("--set-option {name} is given twice, as {before} and as {value}");
            }
        }
        for (flag, name, value) in flags {
            let Some(value) = value else { continue };
            if let Some(other) = options.insert(name.to_owned(), value.clone()).filter(|other| *other != value) {
                bail!("{flag} is {value}, and --set-option {name} is {other}; give one of them");
            }
        }
        Ok(options)
    }
}

/// `all-linear`, a list of names, or a regular expression.
fn targets(text: &str) -> Value {
    let plain = |c: char| c.is_alphanumeric() || "_.,".contains(c);
    if text == "all-linear" || !text.chars().all(plain) {
        return text.into();
    }
    text.split(',').filter(|name| !name.is_empty()).collect()
}
