//! PEFT's `adapter_config.json`: written for any strategy that names its fields, read for LoRA.
//!
//! A configuration that this program did not write says what its tensors mean; every field that would change the
//! computation and is not run here is refused by name.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::plan::{AdaptedModule, Init, ModuleInfo, ModuleKind, ParamSpec, Peft, Plan, Recipes};
use homeroom_abi::recipe::{Node, Op, Recipe};
use homeroom_abi::shape::Dim;
use homeroom_kernels::{Storage, bf16, f16};
use serde_json::{Map, Value, json};

use crate::files::tensors::{MappedTensor, Tensors};
use crate::models::{BaseModel, EMBEDDING, HEAD, Source};

/// The configuration that PEFT reads: the common fields and the strategy's own, sorted as PEFT sorts them. A base that came from a hub
/// is named as it is there, so that PEFT finds it on another machine, too. `part`: what transformers loads has other parts, in which
/// nothing is adapted.
pub fn config(peft: &Peft, base: &Path, source: Option<&Source>, part: bool) -> Value {
    let mut fields: Vec<(String, Value)> = peft.fields.clone().into_iter().collect();
    if part {
        fields.retain(|(name, _)| name != "exclude_modules");
        fields.push(("exclude_modules".into(), OTHER_PARTS.into()));
    }
    fields.push(("peft_type".into(), peft.peft_type.clone().into()));
    fields.push(("task_type".into(), "CAUSAL_LM".into()));
    let name = source.map_or_else(|| base.display().to_string(), |source| source.repo().to_owned());
    fields.push(("base_model_name_or_path".into(), name.into()));
    fields.extend(source.map(|source| ("revision".into(), source.revision.clone().into())));
    fields.push(("inference_mode".into(), true.into()));
    if peft.peft_type == "LORA" {
        fields.push(("bias".into(), "none".into()));
        fields.push(("fan_in_fan_out".into(), false.into()));
        fields.push(("init_lora_weights".into(), true.into()));
    }
    fields.sort_by(|a, b| a.0.cmp(&b.0));
    Value::Object(fields.into_iter().collect())
}

/// Fields of a LoRA configuration that do not change what its tensors compute.
const HARMLESS: [&str; 16] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
];

/// The plan of an adapter that PEFT wrote: LoRA, rsLoRA and DoRA, with rank and alpha patterns.
///
/// # Errors
/// When the configuration says what is not run here, all fields together, or a tensor belongs to no module.
pub fn lora_plan(
    config: &Map<String, Value>,
    tensors: &[&str],
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
    model: &BaseModel,
) -> Result<Plan> {
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or("missing");
    ensure!(kind == "LORA", "peft_type `{kind}` without homeroom.json is not supported; supported is LORA");
    let mut refused = Vec::new();
    for (key, value) in config {
        let fine = match key.as_str() {
            key if HARMLESS.contains(&key) => true,
            "r" | "lora_alpha" => is_above_zero(value),
            "use_rslora" | "use_dora" => value.is_boolean(),
            "rank_pattern" | "alpha_pattern" => {
                value.is_null() || value.as_object().is_some_and(|map| map.values().all(is_above_zero))
            }
            "bias" => *value == json!("none"),
            // These start A and B otherwise; the tensors hold what came of it. Names that also change the base do not pass.
            "init_lora_weights" => value.is_boolean() || *value == json!("gaussian") || *value == json!("orthogonal"),
            _ => is_off(value),
        };
        if !fine {
            refused.push(format!("`{key}` = {value}"));
        }
    }
    ensure!(refused.is_empty(), "fields that are not supported: {}", refused.join(", "));
    let number = |key: &str| config.get(key).and_then(Value::as_f64).with_context(|| format!("`{key}` is missing"));
    let (r, alpha) = (number("r")?, number("lora_alpha")?);
    let on = |key: &str| config.get(key) == Some(&Value::Bool(true));
    let (rslora, dora) = (on("use_rslora"), on("use_dora"));
    let mut plan = Plan { peft: Some(Peft { peft_type: "LORA".into(), fields: config.clone() }), ..Plan::default() };
    let mut found = 0;
    for module in &model.modules {
        let info = &module.info;
        let name = |ending: &str| format!("{PREFIX}{}.{ending}", info.path);
        let embedding = info.kind == ModuleKind::Embedding;
        let [a, b] = match embedding {
            true => [("lora_embedding_A", name("lora_embedding_A")), ("lora_embedding_B", name("lora_embedding_B"))],
            false => [("lora_A", name("lora_A.weight")), ("lora_B", name("lora_B.weight"))],
        };
        let (Some(a_shape), Some(b_shape)) = (shape(&a.1), shape(&b.1)) else { continue };
        found += 2;
        let rank = pattern_value(config.get("rank_pattern"), &info.path)?.unwrap_or(r);
        let has = a_shape.first().copied().unwrap_or(0);
        ensure!(has as f64 == rank, "{}: its rank is {rank}, its tensor `{}` has {has}", info.path, a.1);
        let alpha = pattern_value(config.get("alpha_pattern"), &info.path)?.unwrap_or(alpha);
        ensure!(!(dora && embedding), "{}: DoRA of an embedding is not supported", info.path);
        let scaling = alpha / if rslora { rank.sqrt() } else { rank };
        let recipes = match dora {
            true => dora_recipes(scaling, info),
            false => lora_recipes(scaling, embedding, [a.0, b.0]),
        };
        let recipe = plan.recipes.iter().position(|known| *known == recipes).unwrap_or_else(|| {
            plan.recipes.push(recipes);
            plan.recipes.len() - 1
        });
        let param = |(name, tensor): (&str, String), shape| ParamSpec {
            name: name.to_owned(),
            shape,
            init: Init::Zeros,
            trainable: true,
            tensor,
            tensor_shape: None,
            group: None,
            migrate: None,
        };
        let mut params = vec![param(a, a_shape), param(b, b_shape)];
        if dora {
            let tensor = name(MAGNITUDE);
            let magnitude = shape(&tensor).with_context(|| format!("tensor `{tensor}` is missing"))?;
            ensure!(
                magnitude == [info.d_out],
                "tensor `{tensor}` has the shape {magnitude:?}, its module has {} outputs",
                info.d_out
            );
            params.push(param((MAGNITUDE, tensor), magnitude));
            found += 1;
        }
        plan.modules.push(AdaptedModule { path: info.path.clone(), recipe, params });
    }
    if found != tensors.len() {
        let known = |tensor: &&str| plan.modules.iter().any(|m| m.params.iter().any(|param| param.tensor == *tensor));
        let left: Vec<&str> = tensors.iter().copied().filter(|tensor| !known(tensor)).take(4).collect();
        bail!("tensors that are not supported here: {}", left.join(", "));
    }
    Ok(plan)
}

/// What PEFT puts before a module's path.
const PREFIX: &str = "base_model.model.";

/// The modules of a model that are of another part than the one that writes text, as a regular expression of Python.
const OTHER_PARTS: &str = "(?!.*(language_model|lm_head)).*";

/// The name of a tensor on the part that writes text, of its name on the whole model.
pub fn text_name(name: &str) -> String {
    match name.strip_prefix(PREFIX) {
        Some(path) => format!("{PREFIX}{}", text_path(path)),
        None => name.to_owned(),
    }
}

/// Its name on the whole model, as transformers calls it since 4.52.
pub fn whole_name(name: &str) -> String {
    match name.strip_prefix(PREFIX).and_then(|path| path.strip_prefix("model.")) {
        Some(path) => format!("{PREFIX}model.language_model.{path}"),
        None => name.to_owned(),
    }
}

/// The path of a module on the part that writes text.
fn text_path(path: &str) -> String {
    // Before 4.52 that part was a model of its own within the whole.
    let inner = path.strip_prefix("model.language_model.").or_else(|| path.strip_prefix("language_model.model."));
    match inner {
        Some(inner) => format!("model.{inner}"),
        None => path.strip_prefix("language_model.").unwrap_or(path).to_owned(),
    }
}

/// Whether a tensor of PEFT's is a weight of the base beside the adapter's own: the embedding or the head where it was adapted
/// (`save_embedding_layers` is "auto") or resized.
pub fn is_base_copy(name: &str) -> bool {
    let Some((path, _)) = name.strip_prefix(PREFIX).and_then(|name| name.rsplit_once('.')) else { return false };
    path.ends_with(".base_layer") || ((path == EMBEDDING || path == HEAD) && name.ends_with(".weight"))
}

/// Refuses copies of base weights that are not those of the base, once that is rounded to the type of the copy.
///
/// # Errors
/// Names the tensor.
pub fn check_base_copies(copies: &Tensors, model: &BaseModel) -> Result<()> {
    for (name, copy) in copies {
        check_base_copy(name, copy, model).with_context(|| format!("tensor `{name}`"))?;
    }
    Ok(())
}

fn check_base_copy(name: &str, copy: &MappedTensor, model: &BaseModel) -> Result<()> {
    let (path, ending) = name.strip_prefix(PREFIX).and_then(|name| name.rsplit_once('.')).context("it has no path")?;
    let path = path.strip_suffix(".base_layer").unwrap_or(path);
    let module = &model.modules[model.module_index(path).context("it belongs to no module of the base")?];
    let (shape, bias) = match ending {
        "weight" => (module.info.weight_shape(), None),
        "bias" => (vec![module.info.d_out], Some(module.bias.as_deref().context("the base has no bias there")?)),
        _ => bail!("it is neither a weight nor a bias"),
    };
    let instead = "an adapter on base weights that were changed is merged into them with PEFT first (`merge_and_unload`), and the result is the model to name";
    ensure!(copy.shape == shape, "it is {:?}, that of the base is {shape:?}; {instead}", copy.shape);
    let round: fn(f32) -> f32 = match copy.storage {
        Storage::F16 => |value| f16::from_f32(value).to_f32(),
        Storage::BF16 => |value| bf16::from_f32(value).to_f32(),
        _ => |value| value,
    };
    let copy = copy.weight()?;
    let differs = (0..copy.rows()).any(|row| {
        let base = bias.map_or_else(|| module.weight.decode(row..row + 1), |bias| bias.to_vec());
        copy.decode(row..row + 1).iter().zip(&base).any(|(copy, base)| copy.to_bits() != round(*base).to_bits())
    });
    ensure!(
        !differs,
        "it differs from the base's, which is stored as {}; name the base that the adapter was trained on, by --base-model; {instead}",
        module.weight.storage_name()
    );
    Ok(())
}

/// `base(x) + scaling · (x Aᵀ) Bᵀ`, and the weight that it amounts to.
fn lora_recipes(scaling: f64, embedding: bool, [a, b]: [&str; 2]) -> Recipes {
    let recipe = |ops: Vec<Op>| Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() };
    let forward = vec![
        Op::X,
        Op::Param(a.to_owned()),
        Op::Param(b.to_owned()),
        Op::MatmulT(0, 1),
        Op::Base(0),
        Op::MatmulT(3, 2),
        Op::Scale(5, scaling),
        Op::Add(4, 6),
    ];
    let mut merged =
        vec![Op::Param(a.to_owned()), Op::Param(b.to_owned()), Op::Matmul(1, 0), Op::Scale(2, scaling), Op::Weight];
    match embedding {
        true => merged.extend([Op::Transpose(3), Op::Add(4, 5)]),
        false => merged.push(Op::Add(4, 3)),
    }
    Recipes { forward: recipe(forward), merged_weight: Some(recipe(merged)), merged_bias: None }
}

/// Name of DoRA's magnitudes, of the parameter and of its tensor.
const MAGNITUDE: &str = "lora_magnitude_vector";

/// `m / ‖W + s B A‖ ∘ (W x + s B A x) + b`, and the weight that it amounts to.
fn dora_recipes(scaling: f64, module: &ModuleInfo) -> Recipes {
    let recipe = |ops: Vec<Op>| Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() };
    let param = |name: &str| Op::Param(name.to_owned());
    // Nodes 0 to 4: W + s B A.
    let weight = vec![param("lora_A"), param("lora_B"), Op::Matmul(1, 0), Op::Scale(2, scaling), Op::Weight];
    let weight = [weight, vec![Op::Add(4, 3), Op::RowNorm(5)]].concat();
    let mut forward = weight.clone();
    forward.extend([
        Op::Detach(6),
        param(MAGNITUDE),
        Op::Div(8, 7), // m / ‖W + s B A‖
        Op::X,
        Op::MatmulT(10, 0),
        Op::MatmulT(11, 1),
        Op::Scale(12, scaling),
        Op::Linear(10),
        Op::Add(14, 13),
        Op::Mul(9, 15),
    ]);
    if module.bias {
        forward.extend([Op::Bias, Op::Add(16, 17)]);
    }
    let mut merged = weight;
    let column = vec![Dim::Fixed(module.d_out), Dim::Fixed(1)];
    merged.extend([param(MAGNITUDE), Op::Div(7, 6), Op::Reshape { of: 8, shape: column }, Op::Mul(5, 9)]);
    Recipes { forward: recipe(forward), merged_weight: Some(recipe(merged)), merged_bias: None }
}

/// Whether a rank or an alpha is one: a number above zero that f32 holds.
fn is_above_zero(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number > 0.0 && (number as f32).is_finite())
}

/// Whether a field's value says that its feature is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The value of the first key, in the file's order, that is the path's ending after a dot. PEFT takes keys as regular
/// expressions; one that is more than a name is refused rather than misread.
fn pattern_value(patterns: Option<&Value>, path: &str) -> Result<Option<f64>> {
    for (key, value) in patterns.and_then(Value::as_object).into_iter().flatten() {
        let plain = key.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '.');
        ensure!(
            plain,
            "the pattern `{key}` is a regular expression, which is not supported here; name modules instead"
        );
        let key = text_path(key);
        if path == key || path.strip_suffix(key.as_str()).is_some_and(|front| front.ends_with('.')) {
            return Ok(Some(value.as_f64().with_context(|| format!("`{key}` = {value} is no number"))?));
        }
    }
    Ok(None)
}
