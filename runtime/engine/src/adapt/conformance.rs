//! What a strategy's plan is held to, on tiny random models: that it runs, that its gradients are those of its loss, that
//! merging changes nothing, and that its files come back as they were saved.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use homeroom_abi::codec::Codec;
use homeroom_abi::plan::{ModuleKind, Plan};
use homeroom_abi::recipe::Op;
use homeroom_kernels::Stream;
use serde_json::{Value, json};

use crate::adapt::adaptation::Adaptation;
use crate::adapt::adapter::{self, AdapterFiles, CONFIG_FILE, Record, StrategyRecord, serialize_f32};
use crate::adapt::merge::merge;
use crate::adapt::requantize::kernel_codec;
use crate::data::Example;
use crate::files::digest::FileDigests;
use crate::files::{NewDirectory, Scratch};
use crate::models::BaseModel;
use crate::models::weight::Weight;
use crate::run::batch::Batch;
use crate::run::plain::recipe::{Input, Pass};
use crate::train::{Run, TrainConfig};

/// A tiny model of two layers with random weights, and what is special about it.
pub struct TinyModel {
    /// Such as `grouped-query attention`.
    pub words: &'static str,
    /// The model.
    pub model: BaseModel,
}

/// Sizes of the tiny models. Distinct, so that a wrong transpose fails.
const HIDDEN: usize = 16;
const INTERMEDIATE: usize = 20;
const VOCABULARY: usize = 23;
const HEADS: usize = 4;

/// Values of all parameters of a plan together, above which it is not run here.
const MOST_VALUES: usize = 20_000_000;

/// Models whose shapes differ in what strategies trip over.
///
/// # Errors
/// When the temporary directory cannot be written.
pub fn tiny_models() -> Result<Vec<TinyModel>> {
    let model = |words, model_type, kv_heads, tied| {
        tiny_model(model_type, kv_heads, tied).map(|model| TinyModel { words, model }).context(words)
    };
    Ok(vec![
        model("as many key heads as query heads", "llama", HEADS, false)?,
        model("grouped-query attention", "llama", 2, false)?,
        model("biases, one key head, tied embeddings", "qwen2", 1, true)?,
    ])
}

fn tiny_model(model_type: &str, kv_heads: usize, tied: bool) -> Result<BaseModel> {
    let dir = Scratch::new("check")?;
    let config = json!({
        "architectures": [if model_type == "llama" { "LlamaForCausalLM" } else { "Qwen2ForCausalLM" }],
        "model_type": model_type, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1,
    });
    let mut vocabulary: Vec<String> = ["<s>", "</s>"].map(str::to_owned).to_vec();
    vocabulary.extend((0..VOCABULARY - 2).map(|id| char::from(b'a' + id as u8).to_string()));
    let ids: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": ids, "merges": []},
    });
    let mut stream = Stream::new(17, kv_heads as u64);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], middle: f64, spread: f64| {
        let count = shape.iter().product();
        let values = (0..count).flat_map(|_| ((middle + spread * stream.normal()) as f32).to_le_bytes());
        tensors.push((name, shape.to_vec(), values.collect::<Vec<u8>>()));
    };
    let kv_width = HIDDEN / HEADS * kv_heads;
    add("model.embed_tokens.weight".into(), &[VOCABULARY, HIDDEN], 0.0, 0.7);
    for layer in 0..2 {
        let at = |role: &str| format!("model.layers.{layer}.{role}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(at(&format!("{norm}.weight")), &[HIDDEN], 1.0, 0.1);
        }
        for (role, d_out) in [("q_proj", HIDDEN), ("k_proj", kv_width), ("v_proj", kv_width)] {
            add(at(&format!("self_attn.{role}.weight")), &[d_out, HIDDEN], 0.0, 0.25);
            if model_type == "qwen2" {
                add(at(&format!("self_attn.{role}.bias")), &[d_out], 0.0, 0.3);
            }
        }
        add(at("self_attn.o_proj.weight"), &[HIDDEN, HIDDEN], 0.0, 0.25);
        add(at("mlp.gate_proj.weight"), &[INTERMEDIATE, HIDDEN], 0.0, 0.25);
        add(at("mlp.up_proj.weight"), &[INTERMEDIATE, HIDDEN], 0.0, 0.25);
        add(at("mlp.down_proj.weight"), &[HIDDEN, INTERMEDIATE], 0.0, 0.25);
    }
    add("model.norm.weight".into(), &[HIDDEN], 1.0, 0.1);
    if !tied {
        add("lm_head.weight".into(), &[VOCABULARY, HIDDEN], 0.0, 0.25);
    }
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string())?;
    std::fs::write(dir.path().join("model.safetensors"), serialize_f32(&tensors)?)?;
    // The weights stay mapped when the directory is gone.
    BaseModel::load(dir.path())
}

/// A plan made real; as its strategy has it, but for codecs, which [`codec`] is for.
///
/// # Errors
/// When it does not fit the model, or is far too large for it.
pub fn adapt(model: &BaseModel, plan: &Plan) -> Result<Adaptation> {
    let specs = plan.params.iter().chain(plan.modules.iter().flat_map(|module| &module.params));
    let values = specs.map(|spec| spec.shape.iter().fold(1_usize, |n, size| n.saturating_mul(*size)));
    let values = values.fold(0_usize, usize::saturating_add);
    ensure!(values <= MOST_VALUES, "its parameters have {values} values on a model of {}", model.parameter_count());
    let mut plan = plan.clone();
    plan.stored.clear();
    plan.stored_natively.clear();
    Adaptation::new(model, plan, 1)
}

/// All parameters in f64, at random values: at their usual start half of all gradients are zero.
fn shaken(adaptation: Adaptation) -> Result<Adaptation> {
    let adaptation = adaptation.to_dtype(DType::F64)?;
    let mut stream = Stream::new(11, 1);
    for param in &adaptation.params {
        let noise: Vec<f64> = (0..param.spec.shape.iter().product()).map(|_| 0.1 * stream.normal()).collect();
        let noise = Tensor::from_vec(noise, param.spec.shape.clone(), &Device::Cpu)?;
        param.var.set(&(param.var.as_detached_tensor() + noise)?)?;
    }
    Ok(adaptation)
}

/// Two sequences of unequal lengths and masks.
fn rows() -> Vec<Batch> {
    let mut stream = Stream::new(3, 0);
    let mut example = |length: usize| {
        Example::new(
            (0..length).map(|_| stream.below(VOCABULARY) as u32).collect(),
            (0..length).map(|t| t > 0 && t % 3 != 1).collect(),
            0,
        )
    };
    let [a, b] = [example(7), example(4)];
    vec![Batch::of_examples([(0, &a), (1, &b)])]
}

/// Central difference: f(x + h) - f(x - h) over 2h, whose error is h² f'''/6; with rounding of 1e-16 / h, h = 1e-5 leaves
/// about 1e-10 of values near one.
const H: f64 = 1e-5;

/// Compares gradients of every trainable parameter with central differences in f64, three entries of each. `detach` counts as
/// the identity in this, on both sides: a gradient that is cut on purpose is not that of the loss. Says how many it compared.
///
/// # Errors
/// When one differs, or a parameter gets no gradient with `detach` as it stands.
pub fn gradients(model: &BaseModel, plan: &Plan) -> Result<String> {
    let batches = rows();
    let config = TrainConfig { seed: 5, ..TrainConfig::default() };
    let as_planned = shaken(adapt(model, plan)?)?;
    let (_, gradients) = Run::new(model, &as_planned, &config, 1).gradients(&batches)?;
    for (index, param) in as_planned.params.iter().enumerate().filter(|(_, param)| param.spec.trainable) {
        ensure!(
            gradients.get(index).is_some(),
            "`{}` gets no gradient: it is detached, or no result uses it",
            param.spec.tensor
        );
    }
    let mut plan = plan.clone();
    for node in plan.recipes.iter_mut().flat_map(|recipes| &mut recipes.forward.nodes) {
        if let Op::Detach(of) = node.op {
            node.op = Op::Scale(of, 1.0);
        }
    }
    let adaptation = shaken(adapt(model, &plan)?)?;
    let loss_and_gradients = || -> Result<_> {
        let (outcome, gradients) = Run::new(model, &adaptation, &config, 1).gradients(&batches)?;
        Ok((outcome.loss_sum / outcome.trained as f64, gradients))
    };
    let (_, gradients) = loss_and_gradients()?;
    let (mut compared, mut params) = (0, 0);
    for (index, param) in adaptation.params.iter().enumerate().filter(|(_, param)| param.spec.trainable) {
        let name = &param.spec.tensor;
        let gradient = gradients.get(index).with_context(|| format!("`{name}` gets no gradient"))?;
        let gradient = gradient.flatten_all()?.to_vec1::<f64>()?;
        let values = param.var.flatten_all()?.to_vec1::<f64>()?;
        let scale = gradient.iter().fold(1e-3_f64, |scale, value| scale.max(value.abs()));
        let set = |values: Vec<f64>| param.var.set(&Tensor::from_vec(values, param.spec.shape.clone(), &Device::Cpu)?);
        for entry in (0..values.len()).step_by((values.len() / 3).max(1)).take(3) {
            let loss_at = |shift: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[entry] += shift;
                set(moved)?;
                Ok(loss_and_gradients()?.0)
            };
            let difference = (loss_at(H)? - loss_at(-H)?) / (2.0 * H);
            set(values.clone())?;
            let apart = (difference - gradient[entry]).abs() / scale;
            let found = gradient[entry];
            ensure!(apart < 1e-6, "`{name}` entry {entry}: {found} by backward, {difference} by differences");
            compared += 1;
        }
        params += 1;
    }
    Ok(format!("{compared} entries of {params} parameters"))
}

/// Largest difference of a fresh adapter's logits from the base's, relative to the largest logit.
///
/// # Errors
/// When a tensor operation fails.
pub fn fresh_difference(model: &BaseModel, plan: &Plan) -> Result<f64> {
    let adaptation = adapt(model, plan)?.to_dtype(DType::F64)?;
    let batch = Batch::of_tokens(&[3, 1, 4, 1, 5, 9, 2, 6], 0);
    let base = Pass { dtype: DType::F64, ..Pass::evaluation(model, None) };
    relative(&base.logits(&batch)?, &Pass::evaluation(model, Some(&adaptation)).logits(&batch)?)
}

/// Compares each adapted module with what its merged weight computes, in f64 but for the merged weight itself, which is f32.
/// Says how far apart they are at most; `None`: the plan says nothing of merging.
///
/// # Errors
/// When a module differs.
pub fn merging(model: &BaseModel, plan: &Plan) -> Result<Option<f64>> {
    if plan.recipes.iter().any(|recipes| recipes.merged_weight.is_none()) {
        return Ok(None);
    }
    let adaptation = shaken(adapt(model, plan)?)?;
    let merged = merge(model, &adaptation)?;
    let (adapted, merged) = (Pass::evaluation(model, Some(&adaptation)), Pass::evaluation(&merged, None));
    let merged = Pass { dtype: DType::F64, ..merged };
    let mut stream = Stream::new(23, 0);
    let ids: Vec<u32> = (0..5).map(|_| stream.below(VOCABULARY) as u32).collect();
    let batch = Batch::of_tokens(&ids, 0);
    let mut largest = 0_f64;
    for (index, module) in model.modules.iter().enumerate().filter(|(index, _)| adaptation.of(*index).is_some()) {
        let info = &module.info;
        let input = match info.kind {
            ModuleKind::Embedding => Input::Tokens(ids.clone().into()),
            _ => {
                let values: Vec<f64> = (0..5 * info.d_in).map(|_| stream.normal()).collect();
                Input::Rows(Tensor::from_vec(values, (5, info.d_in), &Device::Cpu)?)
            }
        };
        let apart = relative(&adapted.apply(index, &input, &batch)?, &merged.apply(index, &input, &batch)?)?;
        ensure!(
            apart < 1e-5,
            "{}: `merged` is not what `forward` computes: outputs differ by {apart:.1e} of the largest",
            info.path
        );
        largest = largest.max(apart);
    }
    Ok(Some(largest))
}

/// Largest difference, relative to the largest magnitude of `a`; not a number where either has one that is none.
fn relative(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.flatten_all()?.to_vec1::<f64>()?, b.flatten_all()?.to_vec1::<f64>()?);
    ensure!(a.iter().chain(&b).all(|value| value.is_finite()), "a value is not finite");
    let scale = a.iter().fold(1e-12_f64, |scale, value| scale.max(value.abs()));
    Ok(a.iter().zip(&b).fold(0_f64, |most, (a, b)| most.max((a - b).abs())) / scale)
}

/// PEFT's names of its methods, for which its loader has a class.
const PEFT_TYPES: [&str; 24] = [
    "ADALORA",
    "ADAPTION_PROMPT",
    "BOFT",
    "BONE",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "TRAINABLE_TOKENS",
    "VBLORA",
    "VERA",
    "XLORA",
];

/// Saves an adapter, reads it back and compares. Says what PEFT would make of it.
///
/// # Errors
/// When a name is malformed or a value comes back otherwise.
pub fn files(model: &BaseModel, plan: &Plan, strategy: &StrategyRecord) -> Result<String> {
    let adaptation = shaken(adapt(model, plan)?)?.to_dtype(DType::F32)?;
    if adaptation.is_whole_model() {
        return Ok("a model directory: every parameter stands for a base weight".to_owned());
    }
    let dir = Scratch::new("check")?;
    let directory = NewDirectory::start(&dir.path().join("adapter"))?;
    let base_files = FileDigests::new();
    let record = Record { strategy, data_digest: None, base_files, requantize: false, training: json!({}) };
    adapter::save(&directory, model, &adaptation, record)?;
    let saved = directory.publish()?;
    for param in &adaptation.params {
        let name = &param.spec.tensor;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        ensure!(!name.is_empty() && name.chars().all(plain), "`{name}` is not a tensor's name");
        let peft_prefix = plan.peft.is_none() || name.starts_with("base_model.");
        ensure!(peft_prefix, "`{name}` does not begin with `base_model.`, as PEFT's names do");
    }
    let back = AdapterFiles::read(&saved)?.adapt(model, false).context("what was saved cannot be read back")?;
    ensure!(back.plan == adaptation.plan, "the plan comes back otherwise than it was saved");
    for (was, is) in adaptation.params.iter().zip(&back.params) {
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        ensure!(
            values(was.var.as_tensor())? == values(is.var.as_tensor())?,
            "`{}` comes back with other values than were saved",
            was.spec.tensor
        );
    }
    match &plan.peft {
        None => Ok("no PEFT mapping, so only homeroom reads its adapters".to_owned()),
        Some(peft) => {
            let config = std::fs::read_to_string(saved.join(Path::new(CONFIG_FILE)))?;
            let config: Value = serde_json::from_str(&config)?;
            let kind = &peft.peft_type;
            ensure!(
                PEFT_TYPES.contains(&kind.as_str()),
                "`{kind}` is none of PEFT's methods: {}",
                PEFT_TYPES.join(", ")
            );
            for common in ["peft_type", "task_type", "base_model_name_or_path", "inference_mode"] {
                ensure!(!peft.fields.contains_key(common), "the field `{common}` is written by the host, leave it out");
                ensure!(config.get(common).is_some(), "{CONFIG_FILE} has no `{common}`");
            }
            let null: Vec<&str> = peft.fields.iter().filter(|(_, v)| v.is_null()).map(|(k, _)| k.as_str()).collect();
            ensure!(
                null.is_empty(),
                "{CONFIG_FILE} would say null for {}; put the value in that is used",
                null.join(", ")
            );
            Ok(format!("{kind}, {} tensors, saved and read back equal", adaptation.params.len()))
        }
    }
}

/// Whether a codec is well formed, and how far the values of a random weight come back from it, relative to their norm.
///
/// # Errors
/// When a number in it is out of range, or values come back not finite or farther than half their norm.
pub fn codec(data: &Codec) -> Result<f64> {
    let codec = kernel_codec(data);
    codec.check().map_err(anyhow::Error::msg)?;
    let (rows, cols) = (48, 96);
    let mut stream = Stream::new(5, 5);
    let values: Vec<f32> = (0..rows * cols).map(|_| (0.05 * stream.normal()) as f32).collect();
    let back = Weight::from_values(&values, (rows, cols))?.encoded(&codec)?.decode(0..rows);
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let apart = norm(&mut values.iter().zip(&back).map(|(a, b)| a - b)) / norm(&mut values.iter().copied());
    ensure!(apart.is_finite() && apart < 0.5, "codec `{}`: values come back {:.0} % off", data.name, 100.0 * apart);
    Ok(apart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiny_models_are_those_that_their_words_say() -> Result<()> {
        let models = tiny_models()?;
        let tied = |tiny: &TinyModel| tiny.model.architecture.tie_word_embeddings;
        assert_eq!(models.iter().map(tied).collect::<Vec<_>>(), [false, false, true]);
        let has_bias = |tiny: &TinyModel| tiny.model.modules.iter().any(|module| module.bias.is_some());
        assert_eq!(models.iter().map(has_bias).collect::<Vec<_>>(), [false, false, true]);
        Ok(())
    }
}
