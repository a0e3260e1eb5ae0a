//! The memory that a plan's parameters take, compared with what there is before any is taken.

use std::collections::HashSet;

use anyhow::{Result, bail, ensure};
use homeroom_abi::plan::{Init, ModelInfo, ParamSpec, Plan};
use homeroom_engine::memory;

use crate::progress::size;

/// Bytes of a trained value: itself and two moments, each an f32. Its gradient is not always there.
const TRAINED_BYTES: u128 = 12;
/// Bytes of a frozen value.
const FROZEN_BYTES: u128 = 4;

/// Refuses a plan whose parameters cannot be in memory, swap included.
///
/// # Errors
/// How much they take, and how much there is.
pub fn check(plan: &Plan, model: &ModelInfo) -> Result<()> {
    let Some(there) = memory::free() else { return Ok(()) };
    let (values, wanted) = demand(plan, model);
    if wanted > u128::from(there) {
        let gib = wanted as f64 / f64::from(1 << 30);
        bail!(
            "its parameters have {values} values, which take {gib:.1} GiB with their moments; {} of memory are free",
            size(there)
        );
    }
    Ok(())
}

/// More than any machine has: what is only estimated is refused from here on, as no number of it would be right.
const BYTES_MAX: u128 = 1 << 50;

/// Refuses a plan of which not even an estimate could be made.
///
/// # Errors
/// How much its parameters take.
pub fn check_estimated(plan: &Plan, model: &ModelInfo) -> Result<()> {
    let (values, wanted) = demand(plan, model);
    ensure!(wanted < BYTES_MAX, "its parameters have {values} values, more than any machine has memory for");
    Ok(())
}

/// Values of all parameters, and their bytes.
fn demand(plan: &Plan, model: &ModelInfo) -> (u128, u128) {
    let storage = |path: &str| model.modules.iter().find(|module| module.path == path).map(|module| &module.storage);
    let (mut values, mut bytes) = (0_u128, 0_u128);
    let mut add = |spec: &ParamSpec| {
        let count = spec.shape.iter().fold(1_u128, |count, size| count.saturating_mul(*size as u128));
        let each = if spec.trainable { TRAINED_BYTES } else { FROZEN_BYTES };
        values = values.saturating_add(count);
        bytes = bytes.saturating_add(count.saturating_mul(each));
    };
    plan.params.iter().for_each(&mut add);
    // Modules that share a weight share the parameters that start as it.
    let mut tied = HashSet::new();
    for module in &plan.modules {
        for spec in &module.params {
            let known = spec.init == Init::Base && !tied.insert((storage(&module.path), &spec.name));
            if !known {
                add(spec);
            }
        }
    }
    (values, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tied_copies_count_once_and_products_do_not_overflow() {
        let module = |path: &str| json!({"path": path, "kind": "linear", "d_in": 3, "d_out": 5, "bias": false, "storage": "w", "output_embedding": false});
        let model: ModelInfo =
            serde_json::from_value(json!({"model_type": "llama", "modules": [module("a"), module("b")]}))
                .expect("it is a model");
        let param = |init: &str, shape: [u64; 2], trainable: bool| json!({"name": "w", "shape": shape, "init": init, "trainable": trainable, "tensor": "w"});
        let plan = |init: &str, shape, trainable| -> Plan {
            let module = |path: &str| json!({"path": path, "recipe": 0, "params": [param(init, shape, trainable)]});
            serde_json::from_value(json!({"modules": [module("a"), module("b")], "recipes": []})).expect("it is a plan")
        };
        assert_eq!(demand(&plan("base", [5, 3], true), &model), (15, 180));
        assert_eq!(demand(&plan("zeros", [5, 3], false), &model), (30, 120));
        assert_eq!(demand(&plan("zeros", [u64::MAX, 1 << 40], true), &model).0, ((u128::from(u64::MAX)) << 40) * 2);
        assert!(check(&plan("base", [5, 3], true), &model).is_ok());
        assert!(check_estimated(&plan("zeros", [u64::MAX, 1 << 40], true), &model).is_err());
        if memory::free().is_some() {
            let error = check(&plan("zeros", [1 << 40, 2], true), &model).expect_err("nobody has it").to_string();
            assert!(error.contains("4398046511104 values") && error.contains("of memory are free"), "{error}");
        }
    }
}
