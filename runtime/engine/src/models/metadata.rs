//! What a GGUF file says of its model, as the `config.json` that transformers would have: one table of names, and then every family
//! is read in one way. By the same table a decoder becomes a file's metadata.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::architecture::{Architecture, LayerSpec};
use super::families::Family;
use super::rope::{Rope, RopeScaling};
use crate::files::gguf::{Gguf, Value as Entry, decimal, number};

/// How a value is written.
enum Form {
    /// A size; one for each layer is taken where all are equal.
    Size,
    /// A number in f32.
    Number,
}

/// A field of `config.json`, and llama.cpp's key for it.
struct Field {
    /// Its name there.
    name: &'static str,
    /// The key, behind `general.architecture` and a dot.
    key: &'static str,
    form: Form,
    /// What of a decoder it says; `None`: the key is left out.
    of: fn(&Architecture) -> Option<f64>,
}

/// The one table of them, for reading and for writing.
const FIELDS: [Field; 17] = [
    Field { name: "hidden_size", key: "embedding_length", form: Form::Size, of: |model| size_of(model.hidden_size) },
    Field {
        name: "intermediate_size",
        key: "feed_forward_length",
        form: Form::Size,
        of: |model| size_of(first(model)?.feed_forward.inner),
    },
    Field { name: "num_hidden_layers", key: "block_count", form: Form::Size, of: |model| size_of(model.layers.len()) },
    Field {
        name: "num_attention_heads",
        key: "attention.head_count",
        form: Form::Size,
        of: |model| size_of(first(model)?.attention().heads),
    },
    Field {
        name: "num_key_value_heads",
        key: "attention.head_count_kv",
        form: Form::Size,
        of: |model| size_of(first(model)?.attention().kv_heads),
    },
    Field {
        name: "head_dim",
        key: "attention.key_length",
        form: Form::Size,
        of: |model| size_of(first(model)?.attention().head_dim),
    },
    Field {
        name: "max_position_embeddings",
        key: "context_length",
        form: Form::Size,
        of: |model| size_of(model.max_position_embeddings),
    },
    Field { name: "sliding_window", key: "attention.sliding_window", form: Form::Size, of: window },
    Field {
        name: "rms_norm_eps",
        key: "attention.layer_norm_rms_epsilon",
        form: Form::Number,
        of: |model| Some(model.rms_norm_eps),
    },
    Field {
        name: "rope_theta",
        key: "rope.freq_base",
        form: Form::Number,
        of: |model| model.ropes.first().map(|rope| rope.theta),
    },
    Field {
        name: "rope_local_base_freq",
        key: "rope.freq_base_swa",
        form: Form::Number,
        of: |model| model.ropes.get(1).map(|rope| rope.theta),
    },
    Field {
        name: "attn_logit_softcapping",
        key: "attn_logit_softcapping",
        form: Form::Number,
        of: |model| first(model)?.attention().soft_cap,
    },
    Field {
        name: "final_logit_softcapping",
        key: "final_logit_softcapping",
        form: Form::Number,
        of: |model| model.logit_cap,
    },
    Field {
        name: "embedding_multiplier",
        key: "embedding_scale",
        form: Form::Number,
        of: |model| multiplied(model).then_some(model.embedding_scale),
    },
    Field {
        name: "residual_multiplier",
        key: "residual_scale",
        form: Form::Number,
        of: |model| first(model).filter(|_| multiplied(model)).map(|layer| layer.residual_scale),
    },
    Field {
        name: "logits_scaling",
        key: "logit_scale",
        form: Form::Number,
        of: |model| multiplied(model).then_some(1.0 / model.logit_scale),
    },
    Field {
        name: "attention_multiplier",
        key: "attention.scale",
        form: Form::Number,
        of: |model| first(model).filter(|_| multiplied(model)).map(|layer| layer.attention().scale),
    },
];

/// A size as a number, which it is exactly.
fn size_of(size: usize) -> Option<f64> {
    Some(size as f64)
}

fn first(model: &Architecture) -> Option<&LayerSpec> {
    model.layers.first()
}

/// The window of the layers that have one. A phi3 model without one says so: by that llama.cpp knows Phi-4.
fn window(model: &Architecture) -> Option<f64> {
    let window = model.layers.iter().find_map(|layer| layer.attention().window);
    window.map(|window| window as f64).or((model.model_type == "phi3").then_some(0.0))
}

/// Whether it has multipliers as fields; other families have theirs in their code.
fn multiplied(model: &Architecture) -> bool {
    model.model_type.starts_with("granite")
}

/// Keys without which no decoder is described.
const NEEDED: [&str; 4] = ["embedding_length", "feed_forward_length", "block_count", "attention.head_count"];

/// The family of a GGUF file, and its configuration.
///
/// # Errors
/// When a key is missing or says something that no decoder here computes.
pub fn config_of(gguf: &Gguf) -> Result<(&'static Family, Map<String, Value>)> {
    let kind = gguf.str("general.type")?.unwrap_or("model");
    ensure!(kind == "model", "`general.type` is `{kind}`: the file belongs to a model and is none; name the model's");
    let architecture = gguf.str("general.architecture")?.context("`general.architecture` is missing")?;
    let family = Family::of_gguf(architecture)?;
    let key = |name: &str| format!("{architecture}.{name}");
    ensure!(gguf.u64(&key("expert_count"))?.unwrap_or(0) == 0, "mixtures of experts are not supported");
    let causal = gguf.bool(&key("attention.causal"))?.unwrap_or(true);
    ensure!(causal, "`{}` = false: attention to later tokens is not supported", key("attention.causal"));
    let mut config = Map::new();
    config.insert("architectures".to_owned(), json!([family.class]));
    config.insert("model_type".to_owned(), json!(family.model_type));
    for field in &FIELDS {
        let key = key(field.key);
        let value = match field.form {
            Form::Size => size(gguf, &key)?.map(Value::from),
            Form::Number => gguf.f32(&key)?.map(number),
        };
        ensure!(value.is_some() || !NEEDED.contains(&field.key), "`{key}` is missing");
        config.extend(value.map(|value| (field.name.to_owned(), value)));
    }
    // No window is written as one of nothing.
    if config.get("sliding_window") == Some(&json!(0)) {
        config.insert("sliding_window".to_owned(), Value::Null);
    }
    // llama.cpp's, where a class of transformers has others.
    let number = |field: &str| config.get(field).and_then(Value::as_u64).filter(|size| *size > 0);
    let (heads, hidden) = (number("num_attention_heads").unwrap_or(1), number("hidden_size").unwrap_or(0));
    config.entry("num_key_value_heads").or_insert(json!(heads));
    if hidden >= heads {
        config.entry("head_dim").or_insert(json!(hidden / heads));
    }
    config.entry("rms_norm_eps").or_insert(json!(1e-6));
    config.entry("rope_theta").or_insert(json!(10_000.0));
    config.entry("max_position_embeddings").or_insert(json!(2048));
    config.entry("hidden_act").or_insert(json!("silu"));
    let vocab_size = match gguf.tensor("token_embd.weight")?.shape[..] {
        [rows, _] => rows,
        _ => bail!("tensor `token_embd.weight` is not a matrix"),
    };
    if let Some(tokens) = gguf.strings("tokenizer.ggml.tokens")?.map(<[String]>::len) {
        ensure!(tokens <= vocab_size, "{tokens} tokens, and embeddings for {vocab_size}");
    }
    config.insert("vocab_size".to_owned(), json!(vocab_size));
    config.insert("tie_word_embeddings".to_owned(), json!(gguf.tensor("output.weight").is_err()));
    rope(gguf, architecture, &mut config)?;
    // As there are such tensors. (Qwen2 does not read these fields: it has some of the biases in any case.)
    let biased = |roles: &[&str]| gguf.tensors().any(|t| roles.iter().any(|role| t.name.ends_with(role)));
    let attention = biased(&["attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"]);
    let mlp = biased(&["ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"]);
    for (field, there) in [("attention_bias", attention), ("mlp_bias", mlp)] {
        if there || family.model_type == "llama" {
            config.insert(field.to_owned(), json!(there));
        }
    }
    (family.complete)(gguf, &mut config)?;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    Ok((Family::of(model_type)?, config))
}

/// A size, above zero but for those that may be nothing.
fn size(gguf: &Gguf, key: &str) -> Result<Option<usize>> {
    let value = match gguf.u64(key) {
        Ok(value) => value,
        Err(error) => {
            // llama.cpp writes some sizes for each layer.
            let Ok(Some(each)) = gguf.i64s(key) else { return Err(error) };
            let all = each.first().filter(|first| each.iter().all(|size| size == *first));
            let same =
                all.with_context(|| format!("`{key}` is {each:?}: layers of different sizes are not supported"))?;
            Some(u64::try_from(*same).with_context(|| format!("`{key}` = {same} is not a size"))?)
        }
    };
    let least = u64::from(!key.ends_with("sliding_window"));
    let Some(value) = value else { return Ok(None) };
    ensure!((least..=u64::from(u32::MAX)).contains(&value), "`{key}` = {value} is not a size");
    Ok(Some(value as usize))
}

/// `rope_scaling` and the part of a head that turns.
fn rope(gguf: &Gguf, architecture: &str, config: &mut Map<String, Value>) -> Result<()> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let scaling = gguf.str(&key("scaling.type"))?;
    // llama.cpp takes a factor without a type as that of linear scaling; 0 and 1 are none.
    let factor = match gguf.f32(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => gguf.f32(&key("scale_linear"))?,
    };
    let factor = factor.filter(|factor| *factor != 0.0);
    let original = gguf.u64(&key("scaling.original_context_length"))?;
    let attention = gguf.f32(&key("scaling.attn_factor"))?;
    // Phi's belongs to its divisors.
    ensure!(
        attention.is_none_or(|factor| factor == 1.0) || scaling == Some("yarn") || architecture == "phi3",
        "`{}` = {} without a scaling that has it is not supported",
        key("scaling.attn_factor"),
        attention.unwrap_or(1.0)
    );
    let other = gguf.f32(&key("scaling.yarn_attn_factor"))?.unwrap_or(1.0);
    ensure!(other == 1.0, "`{}` = {other} is not supported", key("scaling.yarn_attn_factor"));
    let rope = match scaling {
        Some("none") => None,
        None | Some("linear") => factor
            .filter(|factor| *factor != 1.0)
            .map(|factor| json!({"rope_type": "linear", "factor": number(factor)})),
        Some("yarn") => {
            let factor = factor.with_context(|| format!("`{}` is missing", key("scaling.factor")))?;
            let mut rope = json!({"rope_type": "yarn", "factor": number(factor)});
            if let Some(original) = original {
                rope["original_max_position_embeddings"] = json!(original);
            }
            for (field, name) in [("beta_fast", "scaling.yarn_beta_fast"), ("beta_slow", "scaling.yarn_beta_slow")] {
                if let Some(beta) = gguf.f32(&key(name))? {
                    rope[field] = number(beta);
                }
            }
            // llama.cpp multiplies the usual factor of attention by this.
            if let Some(share) = attention {
                let usual = if factor > 1.0 { 0.1 * f64::from(factor).ln() + 1.0 } else { 1.0 };
                rope["attention_factor"] = number((usual * decimal(share)) as f32);
            }
            Some(rope)
        }
        // Its divisors are tensors, which this family reads.
        Some("longrope") if architecture == "phi3" => None,
        Some(kind) => bail!("rope type `{kind}` is not supported"),
    };
    config.insert("rope_scaling".to_owned(), rope.unwrap_or(Value::Null));
    if let Some(turned) = size(gguf, &key("dimension_count"))? {
        let size = |field: &str| config.get(field).and_then(Value::as_u64).filter(|size| *size > 0);
        let heads = size("num_attention_heads").unwrap_or(1);
        let head_dim = size("head_dim").unwrap_or(size("hidden_size").unwrap_or(0) / heads) as usize;
        ensure!(turned <= head_dim, "rotating {turned} of {head_dim} channels of a head is not supported");
        if turned < head_dim {
            config.insert("partial_rotary_factor".to_owned(), json!(turned as f64 / head_dim as f64));
        }
    }
    Ok(())
}

/// Tensors that hold divisors of a rope, by name.
pub type Divisors = Vec<(String, Vec<f32>)>;

/// A decoder as the metadata of a GGUF file, but for its tokenizer, and the divisors of its rope.
///
/// What a file cannot say is not looked for here: whoever writes one reads it back and compares.
///
/// # Errors
/// When its rope has no form in a file.
pub fn keys_of(model: &Architecture) -> Result<(Vec<(String, Entry)>, Divisors)> {
    let family = model.family()?;
    let key = |name: &str| format!("{}.{name}", family.in_gguf);
    let mut keys = vec![
        ("general.architecture".to_owned(), Entry::String(family.in_gguf.to_owned())),
        ("general.type".to_owned(), Entry::String("model".to_owned())),
    ];
    for field in &FIELDS {
        let Some(value) = (field.of)(model) else { continue };
        let value = match field.form {
            Form::Size => {
                Entry::U32(u32::try_from(value as u64).with_context(|| format!("`{}` = {value}", field.name))?)
            }
            Form::Number => Entry::F32(value as f32),
        };
        keys.push((key(field.key), value));
    }
    let size = |size: usize| u32::try_from(size).map(Entry::U32).with_context(|| format!("a size of {size}"));
    keys.push((key("vocab_size"), size(model.vocab_size)?));
    if let Some(layer) = first(model) {
        keys.push((key("attention.value_length"), size(layer.attention().head_dim)?));
    }
    let mut divisors = Vec::new();
    if let Some(rope) = model.ropes.first() {
        keys.push((key("rope.dimension_count"), size(rope.dims)?));
        let (scaling, tensors) = scaling(rope, family)?;
        keys.extend(scaling.into_iter().map(|(name, value)| (key(&format!("rope.{name}")), value)));
        divisors = tensors;
    }
    if multiplied(model) {
        // By this llama.cpp knows a model of this family whose heads are not turned.
        keys.push((key("rope.scaling.finetuned"), Entry::Bool(!model.ropes.is_empty())));
    }
    Ok((keys, divisors))
}

/// How a rope is stretched: keys, and tensors of divisors.
fn scaling(rope: &Rope, family: &Family) -> Result<(Vec<(&'static str, Entry)>, Divisors)> {
    let kind = |kind: &str| ("scaling.type", Entry::String(kind.to_owned()));
    let number = |name, value: f64| (name, Entry::F32(value as f32));
    let size = |name, value: f64| (name, Entry::U32(value as u32));
    let frequencies = |divisors: Vec<f32>| {
        ensure!(
            family.in_gguf == "llama",
            "a rope of type `llama3` has no form in a GGUF file of `{}`; export `merged`",
            family.in_gguf
        );
        Ok((Vec::new(), vec![("rope_freqs.weight".to_owned(), divisors)]))
    };
    Ok(match &rope.scaling {
        RopeScaling::None => Default::default(),
        RopeScaling::Linear { factor } => (vec![kind("linear"), number("scaling.factor", *factor)], Vec::new()),
        RopeScaling::Yarn(yarn) => {
            let mut keys = vec![
                kind("yarn"),
                number("scaling.factor", yarn.factor),
                size("scaling.original_context_length", yarn.original),
                number("scaling.yarn_beta_fast", yarn.beta_fast),
                number("scaling.yarn_beta_slow", yarn.beta_slow),
            ];
            // llama.cpp multiplies the usual factor of attention by this.
            let usual = if yarn.factor > 1.0 { 0.1 * yarn.factor.ln() + 1.0 } else { 1.0 };
            let share = yarn.attention_factor / usual;
            if (share - 1.0).abs() > 1e-6 {
                keys.push(number("scaling.attn_factor", share));
            }
            (keys, Vec::new())
        }
        RopeScaling::Llama3 { .. } => {
            let plain = Rope { scaling: RopeScaling::None, ..rope.clone() };
            let pairs = plain.frequencies(0).into_iter().zip(rope.frequencies(0));
            return frequencies(pairs.map(|(plain, scaled)| plain / scaled).collect());
        }
        RopeScaling::Divisors(divisors) => return frequencies(divisors.clone()),
        RopeScaling::LongRope { short, long, original, attention_factor } => {
            ensure!(
                family.in_gguf == "phi3",
                "a rope of type `longrope` has no form in a GGUF file of `{}`; export `merged`",
                family.in_gguf
            );
            let keys = vec![
                size("scaling.original_context_length", *original as f64),
                number("scaling.attn_factor", *attention_factor),
            ];
            let tensor = |name: &str, divisors: &[f32]| (format!("rope_factors_{name}.weight"), divisors.to_vec());
            (keys, vec![tensor("long", long), tensor("short", short)])
        }
        RopeScaling::Dynamic { .. } => {
            bail!("a rope of type `dynamic` has no form in a GGUF file, as llama.cpp computes none; export `merged`")
        }
    })
}

/// Refuses a file that says something else than the decoder that it was made of.
///
/// # Errors
/// What is otherwise, and that the file cannot say it.
pub fn ensure_same(written: &Architecture, wanted: &Architecture) -> Result<()> {
    let family = wanted.family()?.in_gguf;
    let differs = |what: &str, written: &dyn std::fmt::Debug, wanted: &dyn std::fmt::Debug| -> Result<()> {
        bail!(
            "{what} is {wanted:?}, and a GGUF file of `{family}` means {written:?} there, in llama.cpp, too; export `merged`"
        )
    };
    let near = |a: f64, b: f64, bound: f64| (a - b).abs() <= bound * b.abs();
    let sizes =
        |model: &Architecture| (model.vocab_size, model.hidden_size, model.max_position_embeddings, model.layers.len());
    if sizes(written) != sizes(wanted) {
        differs("vocabulary, width, context and layers", &sizes(written), &sizes(wanted))?;
    }
    // transformers rounds some scales of embeddings to bf16; llama.cpp does not.
    let scales = |model: &Architecture| {
        [model.rms_norm_eps, model.logit_scale, model.logit_cap.unwrap_or(0.0), model.embedding_scale]
    };
    for ((written, wanted), (what, bound)) in scales(written).into_iter().zip(scales(wanted)).zip([
        ("`rms_norm_eps`", 1e-6),
        ("the scale of logits", 1e-6),
        ("the cap of logits", 1e-6),
        ("the scale of embeddings", 5e-3),
    ]) {
        if !near(written, wanted, bound) {
            differs(what, &written, &wanted)?;
        }
    }
    for (number, (layer, other)) in written.layers.iter().zip(&wanted.layers).enumerate() {
        let what = |what: &str| format!("layer {number}: {what}");
        let (attention, wanted_attention) = (layer.attention(), other.attention());
        let heads = |layer: &LayerSpec| {
            let attention = layer.attention();
            (attention.heads, attention.kv_heads, attention.head_dim, layer.feed_forward.inner)
        };
        if heads(layer) != heads(other) {
            differs(&what("heads, key heads, their width, and the inner width"), &heads(layer), &heads(other))?;
        }
        if attention.window != wanted_attention.window {
            differs(&what("its window"), &attention.window, &wanted_attention.window)?;
        }
        if attention.qk_norm != wanted_attention.qk_norm {
            differs(&what("its norm of q and k"), &attention.qk_norm, &wanted_attention.qk_norm)?;
        }
        if layer.feed_forward.gate != other.feed_forward.gate {
            differs(&what("its gate"), &layer.feed_forward.gate, &other.feed_forward.gate)?;
        }
        let norms = |layer: &LayerSpec| (layer.mixer_norms, layer.feed_forward_norms);
        if norms(layer) != norms(other) {
            differs(&what("its norms"), &norms(layer), &norms(other))?;
        }
        let scales = |layer: &LayerSpec| {
            [layer.residual_scale, layer.attention().scale, layer.attention().soft_cap.unwrap_or(0.0)]
        };
        for ((written, wanted), name) in scales(layer).into_iter().zip(scales(other)).zip([
            "the scale of its parts",
            "the scale of scores",
            "the cap of scores",
        ]) {
            if !near(written, wanted, 1e-6) {
                differs(&what(name), &written, &wanted)?;
            }
        }
        let rope = |model: &'_ Architecture, index: Option<usize>| index.map(|index| model.ropes[index].clone());
        match (rope(written, attention.rope), rope(wanted, wanted_attention.rope)) {
            (None, None) => {}
            (Some(written), Some(wanted)) => {
                for set in [0, 1] {
                    let pairs = written.frequencies(set).into_iter().zip(wanted.frequencies(set));
                    let apart = pairs.map(|(a, b)| f64::from((a - b).abs() / b.abs())).fold(0.0, f64::max);
                    let factors = [&written, &wanted].map(|rope| f64::from(rope.attention_factor()));
                    if written.dims != wanted.dims || apart > 1e-5 || !near(factors[0], factors[1], 1e-5) {
                        differs(&what("its rope"), &written, &wanted)?;
                    }
                }
            }
            (written, wanted) => differs(&what("its rope"), &written, &wanted)?,
        }
    }
    Ok(())
}
