//! SmolLM3: Llama's decoder, of which every fourth layer has no rope, <https://huggingface.co/blog/smollm3>.

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::{Family, llama};
use crate::files::gguf::Gguf;
use crate::models::architecture::{Architecture, LayerSpec};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "smollm3",
    part_of: None,
    class: "SmolLM3ForCausalLM",
    known_as: "SmolLM3 3B",
    gguf: Some("smollm3"),
    in_gguf: "smollm3",
    interleaved: true,
    defaults: &[("max_position_embeddings", 32_768), ("num_key_value_heads", 4)],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let rope = fields.rope(shape.head_dim, 2_000_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    llama::biases(&mut layer, fields.flag_or("attention_bias", false)?, fields.flag_or("mlp_bias", false)?);
    ensure!(!fields.flag_or("use_sliding_window", false)?, "`use_sliding_window` = true is not supported");
    let (count, interval) = (fields.layers()?, fields.size_or("no_rope_layer_interval", 4)?);
    let turns = fields.list_of("no_rope_layers", count)?;
    let layers = (0..count).map(|number| {
        let turns = match turns {
            Some(turns) => {
                let known = turns[number] == 0 || turns[number] == 1;
                ensure!(known, "`no_rope_layers` holds {}, which is neither 0 nor 1", turns[number]);
                turns[number] == 1
            }
            None => !(number + 1).is_multiple_of(interval),
        };
        let mut layer = layer.clone();
        layer.attention_mut().rope = turns.then_some(0);
        Ok(layer)
    });
    let layers = layers.collect::<Result<Vec<_>>>()?;
    fields.architecture(true, vec![rope], layers)
}

/// llama.cpp leaves rope out of every fourth layer, whatever a file says.
fn complete(_: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    config.insert("no_rope_layer_interval".to_owned(), json!(4));
    Ok(())
}
