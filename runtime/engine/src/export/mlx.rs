//! What mlx-lm reads of a configuration, and what it computes otherwise.
//!
//! Its models are written one by one, and each reads what its author met: some know no window of attention, some one kind of rope. What would
//! be computed otherwise is refused here, as such a model answers, and answers wrongly. <https://github.com/ml-explore/mlx-lm>

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::models::Architecture;
use crate::models::rope::RopeScaling;

/// A model of mlx-lm.
struct Known {
    model_type: &'static str,
    windows: Windows,
    /// Whether it stretches ropes: linearly, as Llama 3 or by YaRN.
    stretches: bool,
}

/// What a model of mlx-lm does about windows of attention.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Windows {
    /// It has the family's own.
    Own,
    /// It reads which layers have one.
    ByLayer,
    /// All of the text is seen by every layer.
    None,
}

/// Held to transformers by `tests/peers/mlx_out.py`.
const KNOWN: [Known; 10] = [
    Known { model_type: "llama", windows: Windows::ByLayer, stretches: true },
    Known { model_type: "mistral", windows: Windows::ByLayer, stretches: true },
    Known { model_type: "qwen2", windows: Windows::None, stretches: true },
    Known { model_type: "qwen3", windows: Windows::None, stretches: true },
    Known { model_type: "gemma2", windows: Windows::None, stretches: false },
    Known { model_type: "gemma3_text", windows: Windows::Own, stretches: true },
    Known { model_type: "phi3", windows: Windows::None, stretches: false },
    Known { model_type: "granite", windows: Windows::None, stretches: true },
    Known { model_type: "olmo2", windows: Windows::None, stretches: true },
    Known { model_type: "smollm3", windows: Windows::None, stretches: true },
];

/// A `config.json` by which mlx-lm computes what transformers does, and what a user should know of it, each a clause.
///
/// # Errors
/// When mlx-lm has no such model, or computes it otherwise.
pub fn mlx_config(architecture: &Architecture, mut config: Value) -> Result<(Value, Vec<String>)> {
    let family = architecture.model_type.as_str();
    let instead = "`--format merged` is for transformers, `--format gguf` for llama.cpp";
    let Some(known) = KNOWN.iter().find(|known| known.model_type == family) else {
        let names: Vec<&str> = KNOWN.iter().map(|known| known.model_type).collect();
        bail!("mlx-lm has no model `{family}` that computes the same; known are {}; {instead}", names.join(", "));
    };
    let fields = config.as_object_mut().context("a configuration is an object")?;
    let mut notes = Vec::new();

    // transformers' newer `rope_parameters` is not read there.
    if let Some(rope) = architecture.ropes.first() {
        let scaling = match &rope.scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } if known.stretches => {
                rope.scaling.to_json().unwrap_or(Value::Null)
            }
            RopeScaling::Yarn(yarn) if known.stretches => {
                let usual = 0.1 * yarn.factor.ln() + 1.0;
                let same = yarn.truncate && (yarn.attention_factor - usual).abs() < 1e-6;
                ensure!(same, "mlx-lm computes another YaRN than this model's; {instead}");
                rope.scaling.to_json().unwrap_or(Value::Null)
            }
            _ => bail!("mlx-lm turns the positions of this `{family}` model otherwise; {instead}"),
        };
        fields.insert("rope_theta".to_owned(), json!(rope.theta));
        fields.insert("rope_scaling".to_owned(), scaling);
        if let (Windows::Own, Some(local)) = (known.windows, architecture.ropes.get(1)) {
            fields.insert("rope_local_base_freq".to_owned(), json!(local.theta));
        }
    }

    let windows: Vec<Option<usize>> = architecture.layers.iter().map(|layer| layer.attention().window).collect();
    let some: Vec<usize> = windows.iter().copied().flatten().collect();
    if let Some(window) = some.first() {
        match known.windows {
            Windows::Own => {}
            // Its models have one layer at least that sees all.
            Windows::ByLayer if some.len() < windows.len() => {
                ensure!(some.iter().all(|other| other == window), "mlx-lm knows one window of attention; {instead}");
                let kind =
                    |window: &Option<usize>| if window.is_some() { "sliding_attention" } else { "full_attention" };
                fields.insert("layer_types".to_owned(), windows.iter().map(kind).collect());
                fields.insert("sliding_window".to_owned(), json!(window));
            }
            _ if *window < architecture.max_position_embeddings => notes.push(format!(
                "mlx-lm has no window of attention here: from {window} tokens on it answers otherwise than the model"
            )),
            _ => {}
        }
    }
    Ok((config, notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(model: &str) -> Result<(Value, Vec<String>)> {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(model);
        let architecture = Architecture::from_json(&file.join("config.json"))?;
        let config = Value::Object(architecture.config.clone());
        mlx_config(&architecture, config)
    }

    #[test]
    fn what_mlx_does_not_read_is_written_where_it_does() -> Result<()> {
        let (config, notes) = of("llama-linear")?;
        assert_eq!((&config["rope_theta"], &config["rope_scaling"]["factor"]), (&json!(10000.0), &json!(3.0)));
        assert!(notes.is_empty());
        let (config, _) = of("gemma3")?;
        assert_eq!((&config["rope_theta"], &config["rope_local_base_freq"]), (&json!(1e6), &json!(1e4)));
        assert_eq!(config["rope_scaling"]["factor"], json!(8.0));
        Ok(())
    }

    #[test]
    fn what_mlx_computes_otherwise_is_refused_or_said() -> Result<()> {
        for (model, words) in [
            ("phi4-mini", "turns the positions"),
            ("llama-dynamic", "turns the positions"),
            ("granite4", "no model `granitemoehybrid`"),
        ] {
            let error = of(model).map(drop).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("--format merged"), "{model}: {error}");
        }
        assert!(of("gemma2")?.1[0].contains("from 11 tokens on"));
        assert!(of("mistral-window")?.1[0].contains("from 11 tokens on"));
        assert!(of("phi3")?.1[0].contains("from 11 tokens on"));
        Ok(())
    }
}
