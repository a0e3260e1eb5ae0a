//! What PEFT wants of an adapter's configuration and tensor names, for `homeroom plugins check`: what it does not find in a
//! configuration it takes a default for, and tensors that it does not know are left out, both without an error.
//!
//! Source: the `*Config` classes and `get_peft_model_state_dict` of PEFT 0.17, <https://github.com/huggingface/peft>.

use anyhow::{Result, bail, ensure};
use homeroom_abi::describe::nearest;
use homeroom_abi::plan::Plan;

/// A type of adapter.
struct Kind {
    peft_type: &'static str,
    /// Fields of the configuration on which the tensors' shapes or what they compute depends.
    fields: &'static [&'static str],
    /// What tensors of a module are called behind its path.
    of_module: &'static [&'static str],
    /// What tensors of the whole model are called behind `base_model.`.
    of_model: &'static [&'static str],
}

const KINDS: [Kind; 5] = [
    Kind {
        peft_type: "LORA",
        fields: &["r", "lora_alpha", "target_modules"],
        of_module: &[
            "lora_A.weight",
            "lora_B.weight",
            "lora_B.bias",
            "lora_embedding_A",
            "lora_embedding_B",
            "lora_magnitude_vector",
        ],
        of_model: &[],
    },
    Kind { peft_type: "IA3", fields: &["target_modules", "feedforward_modules"], of_module: &["ia3_l"], of_model: &[] },
    Kind {
        peft_type: "VERA",
        fields: &["r", "target_modules", "projection_prng_key", "save_projection"],
        of_module: &["vera_lambda_b", "vera_lambda_d"],
        of_model: &["vera_A", "vera_B"],
    },
    Kind {
        peft_type: "LOHA",
        fields: &["r", "alpha", "target_modules"],
        of_module: &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
        of_model: &[],
    },
    Kind {
        peft_type: "LOKR",
        fields: &["r", "alpha", "target_modules"],
        of_module: &["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"],
        of_model: &[],
    },
];

/// Other types that PEFT has and that adapt modules.
const OTHERS: [&str; 16] = [
    "ADALORA",
    "BOFT",
    "BONE",
    "C3A",
    "FOURIERFT",
    "HRA",
    "LN_TUNING",
    "MISS",
    "OFT",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "TRAINABLE_TOKENS",
    "VBLORA",
    "WAVEFT",
    "XLORA",
];

/// Whether PEFT would read what a plan saves, in words; `None`: the plan names no type.
///
/// # Errors
/// When PEFT has no such type, or would miss fields or tensors.
pub fn check(plan: &Plan) -> Result<Option<String>> {
    let Some(peft) = &plan.peft else { return Ok(None) };
    let name = peft.peft_type.as_str();
    let Some(kind) = KINDS.iter().find(|kind| kind.peft_type == name) else {
        if OTHERS.contains(&name) {
            return Ok(Some(format!("{name}: a type of PEFT's; its fields and tensor names are not checked")));
        }
        let known = || KINDS.iter().map(|kind| kind.peft_type).chain(OTHERS);
        match nearest(&name.to_uppercase(), known()) {
            Some(near) => bail!("PEFT has no type `{name}`, did you mean `{near}`?"),
            None => bail!("PEFT has no type `{name}`; without a type, only homeroom.json is written"),
        }
    };
    let missing: Vec<&str> = kind.fields.iter().copied().filter(|field| !peft.fields.contains_key(*field)).collect();
    ensure!(
        missing.is_empty(),
        "{name}: PEFT takes defaults of its own for fields that are missing: {}",
        missing.join(", ")
    );
    let modules = plan.modules.iter().flat_map(|module| module.params.iter().map(move |param| (module, param)));
    let wrong_of_module = modules.filter(|(module, param)| {
        let known = |ending: &&&str| param.tensor == format!("base_model.model.{}.{ending}", module.path);
        kind.of_module.iter().find(known).is_none()
    });
    let wrong_of_model = plan.params.iter().filter(|param| {
        let known = |ending: &&&str| param.tensor == format!("base_model.{ending}");
        kind.of_model.iter().find(known).is_none()
    });
    let mut wrong = wrong_of_module.map(|(_, param)| param).chain(wrong_of_model).map(|param| param.tensor.as_str());
    if let Some(first) = wrong.next() {
        let endings = kind.of_module.iter().chain(kind.of_model).copied().collect::<Vec<_>>().join(", ");
        bail!("{name}: PEFT leaves out tensor `{first}` and {} more; its names end in {endings}", wrong.count());
    }
    Ok(Some(format!("{name}: fields and tensor names as PEFT has them")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use homeroom_abi::plan::{AdaptedModule, Init, ParamSpec, Peft};
    use serde_json::{Value, json};

    fn param(tensor: &str) -> ParamSpec {
        ParamSpec {
            name: tensor.to_owned(),
            shape: vec![3, 5],
            init: Init::Zeros,
            trainable: true,
            tensor: tensor.to_owned(),
            tensor_shape: None,
            group: None,
            migrate: None,
        }
    }

    /// What is said of a plan of two modules, whose tensors have these endings.
    fn said(peft_type: &str, fields: Value, endings: &[&str], of_model: &[&str]) -> Result<Option<String>> {
        let fields = fields.as_object().cloned().unwrap_or_default();
        let modules = ["model.layers.0.mlp.up_proj", "lm_head"].map(|path| {
            let params = endings.iter().map(|ending| param(&format!("base_model.model.{path}.{ending}"))).collect();
            AdaptedModule { path: path.to_owned(), recipe: 0, params }
        });
        check(&Plan {
            peft: Some(Peft { peft_type: peft_type.to_owned(), fields }),
            modules: modules.into(),
            params: of_model.iter().map(|name| param(name)).collect(),
            ..Plan::default()
        })
    }

    #[test]
    fn a_plan_as_peft_wants_it_passes() {
        let lora = json!({"r": 3, "lora_alpha": 7, "target_modules": ["up_proj"], "more": 1});
        let dora = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];
        assert!(said("LORA", lora, &dora, &[]).unwrap().is_some());
        let vera = json!({"r": 3, "target_modules": "x", "projection_prng_key": 0, "save_projection": true});
        let of_model = ["base_model.vera_A", "base_model.vera_B"];
        assert!(said("VERA", vera, &["vera_lambda_b", "vera_lambda_d"], &of_model).unwrap().is_some());
        assert!(said("OFT", json!({}), &["oft_R.weight"], &[]).unwrap().unwrap().contains("not checked"));
        assert!(check(&Plan::default()).unwrap().is_none());
    }

    #[test]
    fn what_peft_would_miss_is_named() {
        let fields = json!({"r": 3, "lora_alpha": 7, "target_modules": []});
        for (peft_type, fields, endings, of_model, words) in [
            ("LORA", json!({"alpha": 7}), &["lora_A.weight"][..], &[][..], "missing: r, lora_alpha, target_modules"),
            ("LORA", fields.clone(), &["lora_A.weight", "lora_C.weight"], &[], "lora_C.weight` and 1 more"),
            ("LORA", fields.clone(), &["lora_A"], &[], "up_proj.lora_A` and 1 more; its names end in lora_A.weight"),
            ("LORA", fields.clone(), &["lora_A.weight"], &["base_model.vera_A"], "`base_model.vera_A` and 0 more"),
            ("LoRA", fields.clone(), &[], &[], "PEFT has no type `LoRA`, did you mean `LORA`?"),
            ("LORRA", fields.clone(), &[], &[], "did you mean `LORA`?"),
            ("QUANTUM", fields, &[], &[], "PEFT has no type `QUANTUM`; without a type"),
            ("IA3", json!({"target_modules": []}), &["ia3_l"], &[], "missing: feedforward_modules"),
        ] {
            let error = said(peft_type, fields, endings, of_model).unwrap_err().to_string();
            assert!(error.contains(words), "no `{words}` in {error}");
        }
    }
}
