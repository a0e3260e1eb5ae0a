//! Gradients against central differences in f64: every operation, and a whole model.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use homeroom_abi::plan::{AdaptedModule, Init, ParamSpec, Plan, Recipes};
use homeroom_abi::recipe::{Node, Op, Recipe};
use homeroom_abi::shape::Dim;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::data::Example;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::train::{Run, TrainConfig};
use homeroom_kernels::Stream;
use serde_json::json;

use crate::support::{adapt, model};

/// Central difference: f(x + h) - f(x - h) over 2h, whose error is h² f'''/6; with rounding of 1e-16 / h, h = 1e-5 leaves
/// about 1e-10 of values near one.
const H: f64 = 1e-5;

/// Loss and gradients of some rows; parameters in f64.
fn loss_and_gradients(
    model: &BaseModel,
    adaptation: &Adaptation,
    batches: &[Batch],
) -> Result<(f64, Vec<Option<Tensor>>)> {
    let config = TrainConfig { seed: 5, ..TrainConfig::default() };
    let mut run = Run::new(model, adaptation, &config, 1);
    let (outcome, gradients) = run.gradients(batches)?;
    let gradients = (0..adaptation.params.len()).map(|param| gradients.get(param).cloned()).collect();
    Ok((outcome.loss_sum / outcome.trained as f64, gradients))
}

/// Compares the gradient of a few entries of every trainable parameter with central differences. `spoil` changes the gradient
/// first, to show that a wrong one is found.
fn check(model: &BaseModel, adaptation: &Adaptation, spoil: impl Fn(Tensor) -> Result<Tensor>) -> Result<()> {
    let batches = rows(model);
    let (_, gradients) = loss_and_gradients(model, adaptation, &batches)?;
    for (param, gradient) in adaptation.params.iter().zip(gradients).filter(|(param, _)| param.spec.trainable) {
        let name = &param.spec.tensor;
        let Some(gradient) = gradient else { anyhow::bail!("`{name}` has no gradient") };
        let gradient = spoil(gradient)?.flatten_all()?.to_vec1::<f64>()?;
        let values = param.var.flatten_all()?.to_vec1::<f64>()?;
        let scale = gradient.iter().fold(1e-3_f64, |scale, value| scale.max(value.abs()));
        let stride = (values.len() / 5).max(1);
        for entry in (0..values.len()).step_by(stride) {
            let loss_at = |shift: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[entry] += shift;
                param.var.set(&Tensor::from_vec(moved, param.spec.shape.clone(), &Device::Cpu)?)?;
                Ok(loss_and_gradients(model, adaptation, &batches)?.0)
            };
            let difference = (loss_at(H)? - loss_at(-H)?) / (2.0 * H);
            param.var.set(&Tensor::from_vec(values.clone(), param.spec.shape.clone(), &Device::Cpu)?)?;
            let apart = (difference - gradient[entry]).abs() / scale;
            ensure!(
                apart < 1e-6,
                "`{name}` entry {entry}: {} by backward, {difference} by differences",
                gradient[entry]
            );
        }
    }
    Ok(())
}

/// Two batches, three rows, of unequal lengths and masks.
fn rows(model: &BaseModel) -> Vec<Batch> {
    let mut stream = Stream::new(3, 0);
    let mut example = |length: usize| {
        Example::new(
            (0..length).map(|_| stream.below(model.architecture.vocab_size) as u32).collect(),
            (0..length).map(|t| t > 0 && t % 3 != 1).collect(),
            0,
        )
    };
    let [a, b, c] = [example(7), example(4), example(9)];
    vec![Batch::of_examples([(0, &a), (1, &b)]), Batch::of_examples([(2, &c)])]
}

/// All parameters in f64, at random values: at their usual start half of all gradients are zero.
fn shaken(adaptation: Adaptation) -> Result<Adaptation> {
    let adaptation = adaptation.to_dtype(DType::F64)?;
    let mut stream = Stream::new(11, 1);
    for param in &adaptation.params {
        let noise: Vec<f64> = (0..param.spec.shape.iter().product()).map(|_| 0.2 * stream.normal()).collect();
        let noise = Tensor::from_vec(noise, param.spec.shape.clone(), &Device::Cpu)?;
        param.var.set(&(param.var.as_detached_tensor() + noise)?)?;
    }
    Ok(adaptation)
}

#[test]
fn lora_on_a_whole_model_has_the_gradients_of_its_loss() -> Result<()> {
    for name in ["llama", "qwen2", "llama3-rope", "llama-gguf/model-mixed.gguf"] {
        let model = model(name)?;
        let options = json!({"r": 3, "lora_alpha": 5, "lora_dropout": 0.2});
        check(&model, &shaken(adapt("lora", &options, &model, 1)?)?, Ok)?;
    }
    Ok(())
}

#[test]
fn every_weight_of_a_tied_model_has_the_gradient_of_its_loss() -> Result<()> {
    let model = model("qwen2")?; // tied, with biases
    check(&model, &shaken(adapt("full", &json!({}), &model, 1)?)?, Ok)
}

#[test]
fn lora_on_the_embedding_and_the_head_has_the_gradients_of_its_loss() -> Result<()> {
    let model = model("llama")?;
    let options = json!({"r": 2, "target_modules": ["embed_tokens", "lm_head", "down_proj"]});
    check(&model, &shaken(adapt("lora", &options, &model, 1)?)?, Ok)
}

#[test]
fn recomputation_yields_the_same_gradients_bit_for_bit() -> Result<()> {
    let model = model("llama")?;
    let adaptation = adapt("lora", &json!({"lora_dropout": 0.3}), &model, 1)?;
    let gradients = |gradient_checkpointing: bool| -> Result<Vec<Vec<f32>>> {
        let config = TrainConfig { gradient_checkpointing, ..TrainConfig::default() };
        let (_, gradients) = Run::new(&model, &adaptation, &config, 1).gradients(&rows(&model))?;
        let all = (0..adaptation.params.len()).filter_map(|param| gradients.get(param));
        all.map(|gradient| Ok(gradient.flatten_all()?.to_vec1()?)).collect()
    };
    assert_eq!(gradients(true)?, gradients(false)?);
    Ok(())
}

/// The check itself: a transposed gradient, and one that lacks a term, are found.
#[test]
fn a_wrong_gradient_is_found() -> Result<()> {
    let model = model("llama")?;
    let adaptation = shaken(adapt("lora", &json!({"r": 3}), &model, 1)?)?;
    let transposed = |gradient: Tensor| Ok(gradient.t()?.contiguous()?.reshape(gradient.shape())?);
    assert!(check(&model, &adaptation, transposed).is_err());
    let one_term_less = |gradient: Tensor| Ok((gradient * (1.0 - 1e-4))?);
    assert!(check(&model, &adaptation, one_term_less).is_err());
    check(&model, &adaptation, Ok)
}

/// A recipe on every `up_proj`, whose parameters are given by name and shape.
fn with_recipe(model: &BaseModel, params: &[(&str, &[usize])], ops: Vec<Op>) -> Result<Adaptation> {
    let recipe = Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() };
    let modules = model.modules.iter().filter(|module| module.info.path.ends_with("up_proj"));
    let modules = modules.map(|module| AdaptedModule {
        path: module.info.path.clone(),
        recipe: 0,
        params: params
            .iter()
            .map(|(name, shape)| ParamSpec {
                name: (*name).to_owned(),
                shape: shape.to_vec(),
                init: Init::Normal { std: 0.5 },
                trainable: true,
                tensor: format!("{}.{name}", module.info.path),
                tensor_shape: None,
                group: None,
                migrate: None,
            })
            .collect(),
    });
    let plan = Plan {
        modules: modules.collect(),
        recipes: vec![Recipes { forward: recipe, merged_weight: None, merged_bias: None }],
        scalars: BTreeMap::from([("strength".to_owned(), 0.75)]),
        ..Plan::default()
    };
    Adaptation::new(model, plan, 7)?.to_dtype(DType::F64)
}

#[test]
fn every_operation_of_a_recipe_has_the_gradient_of_its_value() -> Result<()> {
    let model = model("llama")?; // up_proj is (80, 48)
    let p = |name: &str| Op::Param(name.to_owned());
    let fixed = |sizes: &[usize]| sizes.iter().map(|size| Dim::Fixed(*size)).collect::<Vec<_>>();
    type Case<'a> = (&'a str, Vec<(&'a str, &'a [usize])>, Vec<Op>);
    let cases: Vec<Case> = vec![
        ("linear, matmul", vec![("a", &[80, 80])], vec![Op::X, Op::Linear(0), p("a"), Op::Matmul(1, 2)]),
        ("base, matmul_t", vec![("a", &[80, 80])], vec![Op::X, Op::Base(0), p("a"), Op::MatmulT(1, 2)]),
        ("add, broadcast", vec![("a", &[80])], vec![Op::X, Op::Base(0), p("a"), Op::Add(1, 2)]),
        ("sub, broadcast", vec![("a", &[1, 80])], vec![Op::X, Op::Base(0), p("a"), Op::Sub(2, 1)]),
        ("mul, broadcast", vec![("a", &[80])], vec![Op::X, Op::Base(0), p("a"), Op::Mul(1, 2)]),
        (
            "div",
            vec![("a", &[80])],
            vec![
                Op::X,
                Op::Base(0),
                p("a"),
                Op::Mul(2, 2),
                Op::Scalar("strength".into()),
                Op::Add(3, 4),
                Op::Div(1, 5),
            ],
        ),
        (
            "scale, silu",
            vec![("a", &[80])],
            vec![Op::X, Op::Base(0), p("a"), Op::Mul(1, 2), Op::Silu(3), Op::Scale(4, -1.5)],
        ),
        (
            "scalar, transpose",
            vec![("a", &[48, 80])],
            vec![Op::X, p("a"), Op::Transpose(1), Op::MatmulT(0, 2), Op::Scalar("strength".into()), Op::Mul(3, 4)],
        ),
        (
            "slice, reshape",
            vec![("a", &[3, 5, 40])],
            vec![
                Op::X,
                Op::Base(0),
                p("a"),
                Op::Slice { of: 2, dim: 1, start: 2, len: 2 },
                Op::Slice { of: 3, dim: 0, start: 1, len: 1 },
                Op::Reshape { of: 4, shape: fixed(&[80]) },
                Op::Mul(1, 5),
            ],
        ),
        (
            "reshape of activations",
            vec![("a", &[2, 40])],
            vec![
                Op::X,
                Op::Base(0),
                Op::Reshape { of: 1, shape: vec![Dim::Rows, Dim::Fixed(2), Dim::Fixed(40)] },
                p("a"),
                Op::Mul(2, 3),
                Op::Reshape { of: 4, shape: vec![Dim::Rows, Dim::Fixed(80)] },
            ],
        ),
        ("dropout", vec![("a", &[80])], vec![Op::X, Op::Base(0), p("a"), Op::Mul(1, 2), Op::Dropout { of: 3, p: 0.4 }]),
        (
            // DoRA: m · (W + BA) x / ‖W + BA‖, the norm not detached, so that its own gradient is checked too.
            "weight, row_norm",
            vec![("a", &[3, 48]), ("b", &[80, 3]), ("m", &[80])],
            vec![
                Op::X,
                Op::Weight,
                p("a"),
                p("b"),
                Op::Matmul(3, 2),
                Op::Add(1, 4),
                Op::RowNorm(5),
                Op::MatmulT(0, 5),
                p("m"),
                Op::Mul(7, 8),
                Op::Div(9, 6),
            ],
        ),
    ];
    for (name, params, ops) in cases {
        let adaptation = with_recipe(&model, &params, ops)?;
        check(&model, &adaptation, Ok).map_err(|error| error.context(name))?;
    }
    Ok(())
}

/// d/da of f(a) · detach(a) is f'(a) · a: the detached factor counts as a constant.
#[test]
fn no_gradient_flows_through_detach() -> Result<()> {
    let model = model("llama")?;
    let p = Op::Param("a".to_owned());
    let both = vec![Op::X, Op::Base(0), p.clone(), Op::Detach(2), Op::Add(1, 3), Op::Scale(2, 0.5), Op::Add(4, 5)];
    let half = vec![Op::X, Op::Base(0), p.clone(), Op::Scale(2, 1.5), Op::Add(1, 3)];
    let gradient = |ops| -> Result<Vec<f64>> {
        let adaptation = with_recipe(&model, &[("a", &[80])], ops)?;
        let (_, gradients) = loss_and_gradients(&model, &adaptation, &rows(&model))?;
        let gradient = gradients[0].as_ref().expect("`a` is used");
        Ok(gradient.to_vec1()?)
    };
    // The same value, 1.5 a, of which a third is seen by the gradient.
    for (seen, whole) in gradient(both)?.iter().zip(gradient(half)?) {
        assert!((3.0 * seen - whole).abs() < 1e-9, "{seen} is not a third of {whole}");
    }
    let cut = with_recipe(&model, &[("a", &[80])], vec![Op::X, Op::Base(0), p, Op::Detach(2), Op::Add(1, 3)])?;
    let (_, gradients) = loss_and_gradients(&model, &cut, &rows(&model))?;
    assert!(gradients[0].is_none());
    Ok(())
}

/// The frozen product's own backward: dX = dY W, and nothing for W.
#[test]
fn the_product_with_a_frozen_weight_has_the_gradient_of_its_value() -> Result<()> {
    use homeroom_engine::run::plain::frozen_linear::frozen_linear;
    for name in ["llama", "llama-gguf/model-mixed.gguf", "llama-gguf/model-f32.gguf"] {
        let model = model(name)?;
        for module in &model.modules {
            let weight = &module.weight;
            let mut stream = Stream::new(2, 9);
            let mut random = |rows: usize, cols: usize| {
                let values: Vec<f64> = (0..rows * cols).map(|_| stream.normal()).collect();
                Tensor::from_vec(values, (rows, cols), &Device::Cpu)
            };
            let (x, dy) = (Var::from_tensor(&random(3, weight.cols())?)?, random(3, weight.rows())?);
            let value = |x: &Tensor| frozen_linear(x, weight)?.mul(&dy)?.sum_all();
            let gradient = value(x.as_tensor())?.backward()?.remove(x.as_tensor()).expect("x is tracked");
            // The value is linear in x, so that along any direction the difference is exact.
            let direction = random(3, weight.cols())?;
            let difference = (value(&(x.as_tensor() + &direction)?)? - value(x.as_tensor())?)?.to_scalar::<f64>()?;
            let along = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            assert!(
                (along - difference).abs() < 1e-9 * difference.abs().max(1.0),
                "{}: {along} {difference}",
                module.info.path
            );
        }
    }
    Ok(())
}
