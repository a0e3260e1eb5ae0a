//! Checks that what a strategy says stays within the [`crate::limits`].

use std::fmt::Display;

use crate::describe::Description;
use crate::limits::{
    CODECS_MAX, DIMENSIONS_MAX, DIRECTIVES_MAX, DOC_BYTES_MAX, GROUPS_MAX, LOOKUPS_MAX, MODULES_MAX, NAME_BYTES_MAX,
    NODES_MAX, OPTIONS_MAX, PARAMETERS_MAX, RECIPES_MAX, SCALARS_MAX, VALUES_MAX, is_hidden, thousands, too_many,
};
use crate::plan::{AdaptedModule, Init, ParamSpec, Plan, Recipes};
use crate::recipe::{Op, Recipe};
use crate::shape::{Dim, words};
use crate::step::{Directive, StepAnswer};

fn at_most(verb: &str, count: usize, what: &str, most: usize) -> Result<(), String> {
    if count > most { Err(too_many(verb, count, what, most)) } else { Ok(()) }
}

/// A name stands in files and messages: it is neither endless nor does it write over a terminal.
fn name(what: impl Display, text: &str) -> Result<(), String> {
    if text.len() > NAME_BYTES_MAX {
        return Err(too_many(&format!("{what} has"), text.len(), "bytes", NAME_BYTES_MAX));
    }
    if text.chars().any(is_hidden) {
        return Err(format!("{what} has a control character: {text:?}"));
    }
    Ok(())
}

/// Checks the sizes of a description.
///
/// # Errors
/// What is too large, in words.
pub fn check_description(about: &Description) -> Result<(), String> {
    name("its name", &about.name)?;
    name("its version", &about.version)?;
    at_most("its doc has", about.doc.len(), "bytes", DOC_BYTES_MAX)?;
    at_most("it has", about.options.len(), "options", OPTIONS_MAX)?;
    for option in &about.options {
        name("the name of an option", &option.name)?;
        at_most(&format!("the doc of its option `{}` has", option.name), option.doc.len(), "bytes", DOC_BYTES_MAX)?;
    }
    Ok(())
}

/// Checks the sizes of a plan, whatever its model, and that its numbers are some.
///
/// # Errors
/// What is too large, in words.
pub fn check_plan(plan: &Plan) -> Result<(), String> {
    at_most("it adapts", plan.modules.len(), "modules", MODULES_MAX)?;
    at_most("it stores", plan.stored.len().saturating_add(plan.stored_natively.len()), "modules", MODULES_MAX)?;
    let params = plan.modules.iter().map(|module| module.params.len()).fold(plan.params.len(), usize::saturating_add);
    at_most("it plans", params, "parameters", PARAMETERS_MAX)?;
    at_most("it has", plan.recipes.len(), "recipes", RECIPES_MAX)?;
    at_most("it has", plan.scalars.len(), "scalars", SCALARS_MAX)?;
    at_most("it has", plan.groups.len(), "optimizer groups", GROUPS_MAX)?;
    at_most("it has", plan.codecs.len(), "codecs", CODECS_MAX)?;
    for path in plan.stored.keys().chain(plan.stored_natively.keys()) {
        name("the path of a module that it stores", path)?;
    }
    for (scalar, value) in &plan.scalars {
        name("the name of a scalar", scalar)?;
        number(&format!("the scalar `{scalar}`"), *value, f64::is_finite)?;
    }
    for (group, about) in &plan.groups {
        name("the name of an optimizer group", group)?;
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        number(&format!("the learning rate scale of the group `{group}`"), about.learning_rate_scale, not_negative)?;
        number(&format!("the weight decay of the group `{group}`"), about.weight_decay.unwrap_or(0.0), not_negative)?;
    }
    for codec in plan.codecs.iter().map(|codec| &codec.name).chain(plan.stored_natively.values()) {
        name("the name of a codec", codec)?;
    }
    let rate = plan.defaults.learning_rate.unwrap_or(1.0);
    number("the learning rate that it proposes", rate, |rate| (0.0..=10.0).contains(&rate) && rate > 0.0)?;
    let proposed = [&plan.defaults.optimizer, &plan.defaults.compute_dtype];
    proposed.into_iter().flatten().try_for_each(|word| name("what it proposes", word))?;
    if let Some(peft) = &plan.peft {
        name("its `peft_type`", &peft.peft_type)?;
    }
    plan.params.iter().try_for_each(|spec| check_param(spec, "the model"))?;
    for (index, recipes) in plan.recipes.iter().enumerate() {
        let Recipes { forward, merged_weight, merged_bias } = recipes;
        let all = [Some(forward), merged_weight.as_ref(), merged_bias.as_ref()];
        all.into_iter().flatten().try_for_each(|recipe| check_recipe(recipe, index))?;
    }
    let mut lookups = 0_usize;
    for AdaptedModule { path, recipe, params } in &plan.modules {
        name("the path of a module that it adapts", path)?;
        params.iter().try_for_each(|spec| check_param(spec, path))?;
        let nodes = plan.recipes.get(*recipe).map_or(0, |recipes| {
            let merged = recipes.merged_weight.iter().chain(&recipes.merged_bias);
            merged.map(|recipe| recipe.nodes.len()).sum::<usize>() + recipes.forward.nodes.len()
        });
        lookups = lookups.saturating_add(nodes.saturating_mul(params.len() + plan.params.len()));
    }
    at_most("its modules have", lookups, "nodes, times the parameters that each may mean", LOOKUPS_MAX)
}

fn number(what: &str, value: f64, admits: impl Fn(f64) -> bool) -> Result<(), String> {
    if admits(value) { Ok(()) } else { Err(format!("{what} is {value}")) }
}

fn check_param(spec: &ParamSpec, place: &str) -> Result<(), String> {
    name(format_args!("{place}: the name of a parameter"), &spec.name)?;
    let param = || format!("{place}: parameter `{}`", spec.name);
    name(format_args!("{}: the name of its tensor", param()), &spec.tensor)?;
    if let Some(group) = &spec.group {
        name(format_args!("{}: the name of its group", param()), group)?;
    }
    for shape in [Some(&spec.shape), spec.tensor_shape.as_ref()].into_iter().flatten() {
        at_most(&format!("{} has", param()), shape.len(), "dimensions", DIMENSIONS_MAX)?;
        let count = shape.iter().try_fold(1_usize, |count, size| count.checked_mul(*size));
        if count.is_none_or(|count| count > VALUES_MAX) {
            let shape = shape.iter().map(|size| Dim::Fixed(*size)).collect::<Vec<_>>();
            let (param, most) = (param(), thousands(VALUES_MAX));
            return Err(format!("{param} is {}, {most} values are the most", words(&shape)));
        }
    }
    let value = match spec.init {
        Init::Constant(value) | Init::Normal { std: value } => value,
        Init::KaimingUniform { a } => a,
        Init::Zeros | Init::Ones | Init::Base | Init::BaseRowNorm => 0.0,
    };
    // Parameters are f32.
    number(&format!("{}: the number that it starts from", param()), value, |value| (value as f32).is_finite())
}

fn check_recipe(recipe: &Recipe, index: usize) -> Result<(), String> {
    at_most(&format!("its recipe {index} has"), recipe.nodes.len(), "nodes", NODES_MAX)?;
    for node in &recipe.nodes {
        match &node.op {
            Op::Param(param) => name(format_args!("the name of a parameter in recipe {index}"), param)?,
            Op::Scalar(scalar) => name(format_args!("the name of a scalar in recipe {index}"), scalar)?,
            Op::Reshape { shape, .. } => {
                at_most(&format!("a reshape in recipe {index} has"), shape.len(), "dimensions", DIMENSIONS_MAX)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Checks the sizes of an answer to a step.
///
/// # Errors
/// What is too large, in words.
pub fn check_answer(answer: &StepAnswer) -> Result<(), String> {
    at_most("it gives", answer.directives.len(), "directives", DIRECTIVES_MAX)?;
    answer.directives.iter().try_for_each(|directive| match directive {
        Directive::LearningRateScale(_) => Ok(()),
        Directive::Scalar { name: text, .. } => name("the name of a scalar", text),
        Directive::Freeze(text) | Directive::Unfreeze(text) | Directive::ResetMoments(text) => name("a pattern", text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Node;
    use serde_json::json;

    /// A plan of one module with one parameter, changed.
    fn check(change: impl FnOnce(&mut Plan)) -> Result<(), String> {
        let mut plan: Plan = serde_json::from_value(json!({
            "modules": [{"path": "m", "recipe": 0, "params":
                [{"name": "a", "shape": [2, 3], "init": "zeros", "trainable": true, "tensor": "m.a"}]}],
            "recipes": [{"forward": {"nodes": [{"op": "x"}]}}],
        }))
        .expect("it is a plan");
        change(&mut plan);
        check_plan(&plan)
    }

    fn param(plan: &mut Plan) -> &mut ParamSpec {
        &mut plan.modules[0].params[0]
    }

    #[test]
    fn a_plan_that_is_far_too_large_is_told_by_what_is() {
        check(|_| {}).expect("it is small");
        let refused = |change: fn(&mut Plan), words: &str| {
            let error = check(change).expect_err(words);
            assert!(error.contains(words), "no `{words}` in: {error}");
        };
        refused(
            |plan| plan.modules[0].params = vec![param(plan).clone(); PARAMETERS_MAX + 1],
            "it plans 262,145 parameters, 262,144 are the most",
        );
        refused(|plan| plan.modules = vec![plan.modules[0].clone(); MODULES_MAX + 1], "it adapts 65,537 modules");
        refused(|plan| param(plan).shape = vec![usize::MAX, usize::MAX], "values are the most");
        refused(|plan| param(plan).shape = vec![1 << 40], "(1099511627776), 2,147,483,648 values are the most");
        refused(|plan| param(plan).tensor_shape = Some(vec![1; 9]), "9 dimensions");
        refused(
            |plan| param(plan).name = "x".repeat(1 << 20),
            "the name of a parameter has 1,048,576 bytes, 512 are the most",
        );
        refused(
            |plan| param(plan).tensor = "\x1b[2J".to_owned(),
            "the name of its tensor has a control character: \"\\u{1b}[2J\"",
        );
        refused(|plan| param(plan).init = Init::Normal { std: 1e300 }, "the number that it starts from");
        refused(|plan| plan.defaults.learning_rate = Some(-1.0), "the learning rate that it proposes is -1");
        refused(
            |plan| plan.recipes[0].forward.nodes = vec![Node { op: Op::X, at: None }; 100_000],
            "its recipe 0 has 100,000 nodes, 1,024 are the most",
        );
        refused(|plan| plan.scalars.extend((0..100_000).map(|i| (i.to_string(), 1.0))), "100,000 scalars");
        refused(
            |plan| {
                plan.recipes[0].forward.nodes = vec![Node { op: Op::X, at: None }; NODES_MAX];
                plan.params = vec![param(plan).clone(); 1 << 11];
                plan.modules = vec![plan.modules[0].clone(); 1 << 10];
            },
            "times the parameters that each may mean",
        );
    }
}
