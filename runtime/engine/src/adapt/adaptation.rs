//! A plan made real on a model: its parameters with their values, and what each module computes.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};
use homeroom_abi::plan::{AdaptedModule, Init, ModuleInfo, ParamSpec, Plan};
use homeroom_abi::recipe::{Op, Recipe};
use homeroom_abi::shape::{Dim, Shape, check_result};
use homeroom_kernels::Stream;

use crate::adapt::requantize::is_float;
use crate::files::tensors::TensorValues;
use crate::models::BaseModel;

/// A strategy's plan with its parameters, ready to train or to run. A clone has the same parameters, not copies of them.
#[derive(Clone)]
pub struct Adaptation {
    /// What was planned.
    pub plan: Plan,
    /// All parameters, each once.
    pub params: Vec<Param>,
    /// For each module of the model, its entry in the plan.
    by_module: Vec<Option<Adapted>>,
}

/// One parameter and its values.
#[derive(Clone)]
pub struct Param {
    /// What the plan says of it. Of parameters that tied modules share, what it says at the first.
    pub spec: ParamSpec,
    /// The values, f32 (f64 in gradient checks).
    pub var: Var,
    /// Path of the module it belongs to; `None`: the model as a whole.
    pub module: Option<String>,
}

/// The adaptation of one module.
#[derive(Clone)]
pub struct Adapted {
    /// Index into [`Plan::recipes`].
    pub recipe: usize,
    /// Indices into [`Adaptation::params`] by the names that recipes use.
    pub params: HashMap<String, usize>,
}

impl Adaptation {
    /// Checks a plan against a model and gives its parameters their first values.
    ///
    /// # Errors
    /// When the plan names what the model does not have, asks for what this host does not run, or a recipe does not fit.
    pub fn new(model: &BaseModel, plan: Plan, seed: u64) -> Result<Self> {
        Self::with_values(model, plan, |spec, module| var(first_values(spec, module, model, seed)?, spec))
    }

    /// Checks a plan against a model and has `values` make its parameters, each with the number of its module.
    pub(crate) fn with_values(
        model: &BaseModel,
        plan: Plan,
        mut values: impl FnMut(&ParamSpec, Option<usize>) -> Result<Var>,
    ) -> Result<Self> {
        let problems = check(model, &plan);
        ensure!(problems.is_empty(), "the plan does not fit the model:\n  {}", problems.join("\n  "));
        let modules: Vec<&ModuleInfo> = model.modules.iter().map(|module| &module.info).collect();
        let (specs, by_module) = laid_out(&plan, &modules);
        let mut params = Vec::with_capacity(specs.len());
        for (spec, module) in specs {
            let var = values(&spec, module)?;
            params.push(Param { var, spec, module: module.map(|module| modules[module].path.clone()) });
        }
        let adaptation = Self { plan, params, by_module };
        ensure!(adaptation.params.iter().any(|param| param.spec.trainable), "the plan trains no parameter");
        Ok(adaptation)
    }

    /// The adaptation of a module; `None`: it stays as it is.
    pub fn of(&self, module: usize) -> Option<&Adapted> {
        self.by_module[module].as_ref()
    }

    /// Whether a module has a trainable parameter.
    pub fn trains(&self, module: usize) -> bool {
        self.of(module).is_some_and(|adapted| adapted.params.values().any(|param| self.params[*param].spec.trainable))
    }

    /// Number of trained values.
    pub fn trainable_count(&self) -> usize {
        let trainable = self.params.iter().filter(|param| param.spec.trainable);
        trainable.map(|param| param.spec.shape.iter().product::<usize>()).sum()
    }

    /// Whether every parameter stands for a base weight, so that the result is a model and not an adapter.
    pub fn is_whole_model(&self) -> bool {
        self.plan.peft.is_none() && self.params.iter().all(|param| param.spec.init == Init::Base)
    }

    /// Replaces the values of all parameters by those of an adapter's file.
    ///
    /// # Errors
    /// When a tensor is missing, left over or of another size; all problems together.
    pub fn load(&mut self, mut tensors: TensorValues) -> Result<()> {
        let mut problems = Vec::new();
        for param in &self.params {
            let Some((shape, values)) = tensors.remove(&param.spec.tensor) else {
                problems.push(format!("tensor `{}` is missing", param.spec.tensor));
                continue;
            };
            let wanted = param.spec.tensor_shape.as_ref().unwrap_or(&param.spec.shape);
            if shape != *wanted {
                problems.push(format!("tensor `{}` is {shape:?}, it should be {wanted:?}", param.spec.tensor));
            } else if values.iter().any(|value| !value.is_finite()) {
                problems.push(format!("tensor `{}` holds a value that is not finite", param.spec.tensor));
            } else {
                let values = Tensor::from_vec(values, param.spec.shape.clone(), &Device::Cpu)?;
                param.var.set(&values.to_dtype(param.var.dtype())?)?;
            }
        }
        problems.extend(tensors.keys().map(|name| format!("tensor `{name}` belongs to no adapted module")));
        problems.truncate(8);
        ensure!(problems.is_empty(), "the weights do not fit:\n  {}", problems.join("\n  "));
        Ok(())
    }

    /// The same adaptation with parameters of another type, for gradient checks in f64.
    ///
    /// # Errors
    /// When a conversion fails.
    pub fn to_dtype(mut self, dtype: DType) -> Result<Self> {
        for param in &mut self.params {
            param.var = Var::from_tensor(&param.var.as_detached_tensor().to_dtype(dtype)?.copy()?)?;
        }
        Ok(self)
    }
}

/// Of each parameter what the plan says, with the number of its module.
type LaidOut = Vec<(ParamSpec, Option<usize>)>;

/// The parameters of a plan, each once, with the module that it belongs to; and for each module of a model its entry in the plan. The
/// plan names no module twice, and what it names that the model does not have is left out.
pub(crate) fn laid_out(plan: &Plan, modules: &[&ModuleInfo]) -> (LaidOut, Vec<Option<Adapted>>) {
    let by_path: HashMap<&str, usize> =
        modules.iter().enumerate().map(|(index, module)| (module.path.as_str(), index)).collect();
    let (mut params, mut by_module) = (Vec::new(), Vec::new());
    by_module.resize_with(modules.len(), || None);
    let mut shared = HashMap::new();
    for spec in &plan.params {
        shared.insert(spec.name.clone(), params.len());
        params.push((spec.clone(), None));
    }
    // Parameters that start as a copy of a tied weight are one parameter.
    let mut copies: HashMap<(&str, &str), usize> = HashMap::new();
    for AdaptedModule { path, recipe, params: specs } in &plan.modules {
        let Some(&index) = by_path.get(path.as_str()) else { continue };
        let mut by_name = shared.clone();
        for spec in specs {
            let tie = (modules[index].storage.as_str(), spec.name.as_str());
            let known = copies.get(&tie).filter(|_| spec.init == Init::Base).copied();
            let param = known.unwrap_or_else(|| {
                params.push((spec.clone(), Some(index)));
                params.len() - 1
            });
            if spec.init == Init::Base {
                copies.insert(tie, param);
            }
            by_name.insert(spec.name.clone(), param);
        }
        by_module[index] = Some(Adapted { recipe: *recipe, params: by_name });
    }
    (params, by_module)
}

pub(crate) fn var(values: Vec<f32>, spec: &ParamSpec) -> Result<Var> {
    Ok(Var::from_vec(values, spec.shape.clone(), &Device::Cpu)?)
}

/// First values of a parameter. Random ones are a stream of their own for each tensor name, so that they depend on the seed
/// and the name alone.
pub(crate) fn first_values(spec: &ParamSpec, module: Option<usize>, model: &BaseModel, seed: u64) -> Result<Vec<f32>> {
    let count: usize = spec.shape.iter().product();
    let mut stream = Stream::new(seed, fnv1a(&spec.tensor));
    let base = || {
        let module = module.with_context(|| format!("`{}` of the whole model cannot start as a weight", spec.name))?;
        Ok::<_, anyhow::Error>(&model.modules[module])
    };
    let values = match spec.init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Constant(value) => vec![value as f32; count],
        Init::Normal { std } => (0..count).map(|_| (std * stream.normal()) as f32).collect(),
        Init::KaimingUniform { a } => {
            let fan_in = *spec.shape.last().context("a scalar has no fan-in")? as f64;
            let bound = (6.0 / ((1.0 + a * a) * fan_in)).sqrt();
            (0..count).map(|_| (bound * (2.0 * stream.uniform() - 1.0)) as f32).collect()
        }
        Init::Base => {
            let module = base()?;
            match &module.bias {
                Some(bias) if spec.name == "bias" => bias.to_vec(),
                _ => module.weight.decode(0..module.weight.rows()),
            }
        }
        Init::BaseRowNorm => {
            let weight = &base()?.weight;
            let norm =
                |row| weight.decode(row..row + 1).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
            (0..weight.rows()).map(norm).collect()
        }
    };
    ensure!(
        values.iter().all(|value| value.is_finite()),
        "parameter `{}` would start with values that are not finite: {}",
        spec.tensor,
        match spec.init {
            Init::Base | Init::BaseRowNorm => "the base's weight is damaged".to_owned(),
            other => format!("{other:?} is beyond what f32 holds"),
        }
    );
    Ok(values)
}

/// FNV-1a, 64 bits: names a random stream. <http://www.isthe.com/chongo/tech/comp/fnv/>
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// All reasons why a plan does not fit a model. A plan may come from an adapter's directory, so nothing in it is trusted.
fn check(model: &BaseModel, plan: &Plan) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some(optimizer) = plan.defaults.optimizer.as_deref().filter(|name| *name != "adamw") {
        problems.push(format!("optimizer `{optimizer}` is not known; known is adamw"));
    }
    if let Some(dtype) = plan.defaults.compute_dtype.as_deref().filter(|name| !matches!(*name, "f32" | "bf16" | "int8"))
    {
        problems.push(format!("compute dtype `{dtype}` is not known; known are f32, bf16 and int8"));
    }
    if plan.modules.is_empty() {
        problems.push("it adapts no module".to_owned());
    }
    problems.extend(
        plan.scalars
            .iter()
            .filter(|(_, value)| !in_f32(**value))
            .map(|(name, value)| format!("scalar `{name}` is {value}, which f32 does not hold")),
    );
    for (name, group) in &plan.groups {
        let (scale, decay) = (group.learning_rate_scale, group.weight_decay.unwrap_or(0.0));
        if !(in_f32(scale) && scale >= 0.0 && (0.0..1.0).contains(&decay)) {
            problems.push(format!(
                "group `{name}`: its learning_rate_scale is {scale} and its weight_decay {decay}; the one is from 0, the other from 0 and below 1"
            ));
        }
    }
    for (number, recipes) in plan.recipes.iter().enumerate() {
        let all = [Some(&recipes.forward), recipes.merged_weight.as_ref(), recipes.merged_bias.as_ref()];
        let nodes = all.into_iter().flatten().flat_map(|recipe| &recipe.nodes);
        let factors = nodes.filter_map(|node| match node.op {
            Op::Scale(_, factor) => Some(factor),
            _ => None,
        });
        if let Some(factor) = factors.into_iter().find(|factor| !in_f32(*factor)) {
            problems.push(format!("recipe {number} scales by {factor}, which f32 does not hold"));
        }
    }
    for path in plan.stored.keys().chain(plan.stored_natively.keys()) {
        let weight = model.module_index(path).map(|module| &model.modules[module].weight);
        match weight {
            None => problems.push(format!("it stores `{path}`, which the model does not have")),
            Some(weight) if is_float(weight.storage()) => {
                problems.push(format!("{path}: its weight is still stored as {}", weight.storage_name()));
            }
            Some(_) => {}
        }
    }
    let (mut seen, mut tensors) = (HashSet::new(), HashSet::new());
    for spec in &plan.params {
        check_param(spec, plan, None, &mut problems);
        let same_name = plan.params.iter().filter(|other| other.name == spec.name).count();
        if same_name > 1 || !tensors.insert(spec.tensor.clone()) {
            problems.push(format!("the model: parameter `{}` is there twice", spec.name));
        }
    }
    for adapted in &plan.modules {
        let Some(index) = model.module_index(&adapted.path) else {
            problems.push(format!("the model has no module `{}`", adapted.path));
            continue;
        };
        let module = &model.modules[index].info;
        if !seen.insert(index) {
            problems.push(format!("{}: adapted twice", adapted.path));
        }
        let mut names = HashSet::new();
        for spec in &adapted.params {
            check_param(spec, plan, Some(module), &mut problems);
            if !names.insert(&spec.name) || !tensors.insert(spec.tensor.clone()) {
                problems.push(format!("{}: parameter `{}` is there twice", adapted.path, spec.name));
            }
        }
        match plan.recipes.get(adapted.recipe) {
            None => problems.push(format!("{}: there is no recipe {}", adapted.path, adapted.recipe)),
            Some(recipes) => {
                let find = |name: &str| adapted.params.iter().chain(&plan.params).find(|spec| spec.name == name);
                let param = |name: &str| find(name).map(|spec| spec.shape.clone());
                let scalar = |name: &str| plan.scalars.contains_key(name);
                let fixed = |shape: Vec<usize>| shape.into_iter().map(Dim::Fixed).collect::<Shape>();
                let output = vec![Dim::Rows, Dim::Fixed(module.d_out)];
                let weight = recipes.merged_weight.as_ref().map(|recipe| (recipe, fixed(module.weight_shape())));
                let bias = recipes.merged_bias.as_ref().map(|recipe| (recipe, fixed(vec![module.d_out])));
                for (recipe, want) in [Some((&recipes.forward, output)), weight, bias].into_iter().flatten() {
                    if let Err(message) = check_result(recipe, module, &want, &param, &scalar) {
                        problems.push(format!("{}: {message}", adapted.path));
                    }
                }
                let merged = recipes.merged_weight.iter().chain(&recipes.merged_bias);
                let reads_input = |recipe: &Recipe| recipe.nodes.iter().any(|node| matches!(node.op, Op::X));
                if merged.into_iter().any(reads_input) {
                    problems.push(format!("{}: a merged weight cannot depend on the input", adapted.path));
                }
            }
        }
        if problems.len() > 8 {
            break;
        }
    }
    problems
}

/// Whether an f32 holds a number, near enough.
fn in_f32(value: f64) -> bool {
    (value as f32).is_finite()
}

fn check_param(spec: &ParamSpec, plan: &Plan, module: Option<&ModuleInfo>, problems: &mut Vec<String>) {
    let place = module.map_or("the model", |module| module.path.as_str());
    let mut problem = |message: String| problems.push(format!("{place}: parameter `{}`: {message}", spec.name));
    let count = |shape: &[usize]| shape.iter().try_fold(1_usize, |n, size| n.checked_mul(*size));
    match count(&spec.shape) {
        Some(1..=0x4000_0000) => {}
        _ => problem(format!("its shape {:?} is empty or too large", spec.shape)),
    }
    if spec.tensor_shape.as_ref().is_some_and(|shape| count(shape) != count(&spec.shape)) {
        problem("its shape in the file holds another number of values".to_owned());
    }
    if spec.group.as_ref().is_some_and(|group| !plan.groups.contains_key(group)) {
        problem("its group is not declared".to_owned());
    }
    let base_shape = module.map(|module| match spec.init {
        Init::Base if spec.name == "bias" && module.bias => vec![module.d_out],
        Init::Base => module.weight_shape(),
        Init::BaseRowNorm => module.weight_shape()[..1].to_vec(),
        _ => spec.shape.clone(),
    });
    match base_shape {
        Some(shape) if shape != spec.shape => {
            problem(format!("it is {:?}, what it starts as is {shape:?}", spec.shape))
        }
        None if matches!(spec.init, Init::Base | Init::BaseRowNorm) => {
            problem("the model has no one weight".to_owned())
        }
        _ => {}
    }
}

/// Refuses a recipe that this host cannot have written or recorded.
///
/// # Errors
/// When the JSON is not a plan, naming an operation that is not known.
pub fn parse_plan(json: &str) -> Result<Plan> {
    match serde_json::from_str(json) {
        Ok(plan) => Ok(plan),
        Err(error) => bail!("a plan that this host cannot read: {error}"),
    }
}
