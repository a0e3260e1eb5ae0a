//! The trait that a strategy implements, and the tracing of it.

use homeroom_abi::describe::Description;
use homeroom_abi::limits::{RECIPES_MAX, too_many};
use homeroom_abi::plan::{AdaptedModule, ParamSpec, Plan, PlanRequest, Recipes};
use homeroom_abi::shape::{Dim, check_result};
use homeroom_abi::step::{StepAnswer, StepRequest};

use crate::record::{Scope, record};
use crate::{Error, Model, Module, Node, Options, Planner, Result, Step, Values};

/// A training strategy.
pub trait Strategy: Sized {
    /// Name that users type; the library's file is `lib<NAME>.so`.
    const NAME: &'static str;
    /// One line for `homeroom plugins list`.
    const DOC: &'static str;

    /// Declares the options.
    fn options(options: &mut Options);

    /// Reads the options of a run.
    ///
    /// # Errors
    /// When a value is out of range.
    fn new(values: &Values) -> Result<Self>;

    /// Says which modules are adapted and which parameters each gets. It has ten seconds, in a process of its own: what it leaves in a
    /// `static` is not there in [`Strategy::on_step`].
    ///
    /// # Errors
    /// When the strategy cannot adapt this model.
    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()>;

    /// How an adapted module computes. Called once for each adapted module, to be recorded.
    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t>;

    /// What an adapted module's weight and bias amount to; `None` when it cannot be said as one matrix.
    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        let _ = module;
        None
    }

    /// Hears of each step, and says what is done before the next one. It has two seconds: a later answer is not waited for,
    /// and it is not asked again. `self` is made anew from the options each time; what it has to remember goes into
    /// [`Step::state`].
    ///
    /// # Errors
    /// An error is reported once; the training goes on without this hook.
    fn on_step(&self, step: &mut Step) -> Result<()> {
        step.unused();
        Ok(())
    }
}

/// The effective weight of an adapted module and, where it is not the frozen one, its effective bias.
pub struct Merged<'t> {
    weight: Node<'t>,
    bias: Option<Node<'t>>,
}

impl<'t> Merged<'t> {
    /// The weight; the bias stays the frozen one.
    pub fn weight(weight: Node<'t>) -> Self {
        Self { weight, bias: None }
    }

    /// Another bias.
    pub fn bias(self, bias: Node<'t>) -> Self {
        Self { bias: Some(bias), ..self }
    }
}

/// What `S` says of itself.
pub fn describe<S: Strategy>(version: &str) -> Description {
    let mut options = Options::default();
    S::options(&mut options);
    Description {
        name: S::NAME.to_owned(),
        version: version.to_owned(),
        doc: S::DOC.to_owned(),
        options: options.into_specs(),
    }
}

/// What `S` has a run do after a step; `None`: it wants to hear of no step.
///
/// # Errors
/// What the strategy answers, or options that it does not have.
pub(crate) fn on_step<S: Strategy>(request: StepRequest) -> Result<Option<StepAnswer>> {
    let mut options = Options::default();
    S::options(&mut options);
    let strategy = S::new(&Values::check(&options.into_specs(), &request.options)?)?;
    let mut step = Step::new(request);
    strategy.on_step(&mut step)?;
    Ok(step.into_answer())
}

/// The plan of `S` for a model: its modules and parameters, and its recipes as recorded.
///
/// # Errors
/// What the strategy answers, options that it does not have, or a recipe whose shapes do not fit; with the author's line.
pub fn trace<S: Strategy>(request: &PlanRequest) -> Result<Plan> {
    let mut options = Options::default();
    S::options(&mut options);
    let strategy = S::new(&Values::check(&options.into_specs(), &request.options)?)?;
    let mut planner = Planner::default();
    strategy.plan(&Model::new(request.model.clone()), &mut planner)?;
    let (mut plan, adapted) = planner.finish()?;
    // The names that PEFT gives tensors all begin with `base_model.`; a model directory's are the module's paths alone.
    let (shared_prefix, prefix) = match plan.peft {
        Some(_) => ("base_model.", "base_model.model."),
        None => ("", ""),
    };
    for param in &mut plan.params {
        param.tensor = format!("{shared_prefix}{}", param.tensor);
    }
    for adapted in adapted {
        let module = adapted.module;
        let shape_of = |param: &ParamSpec| (param.name.clone(), param.shape.clone());
        let scope = Scope {
            module: &module,
            params: plan.params.iter().chain(&adapted.params).map(shape_of).collect(),
            scalars: plan.scalars.keys().cloned().collect(),
        };
        let forward = record(&scope, true, |module, x| x.map(|x| strategy.forward(module, x)))?;
        let weight = record(&scope, false, |module, _| Some(strategy.merged(module)?.weight))?;
        let bias = record(&scope, false, |module, _| strategy.merged(module)?.bias)?;
        let forward = forward.expect("`forward` always yields a node");
        let output = [Dim::Rows, Dim::Fixed(module.d_out)];
        let param = |name: &str| scope.params.get(name).cloned();
        let scalar = |name: &str| scope.scalars.iter().any(|known| known == name);
        check_result(&forward, &module, &output, &param, &scalar)
            .map_err(|message| Error::new(format!("forward: {message}")))?;
        let recipes = Recipes { forward, merged_weight: weight, merged_bias: bias };
        let known = plan.recipes.iter().position(|known| *known == recipes);
        if known.is_none() && plan.recipes.len() == RECIPES_MAX {
            return Err(Error::new(too_many("it has", RECIPES_MAX + 1, "recipes", RECIPES_MAX)));
        }
        let recipe = known.unwrap_or_else(|| {
            plan.recipes.push(recipes);
            plan.recipes.len() - 1
        });
        let params = adapted.params.into_iter().map(|mut param| {
            param.tensor = format!("{prefix}{}.{}", module.path, param.tensor);
            param
        });
        plan.modules.push(AdaptedModule { path: module.path.clone(), recipe, params: params.collect() });
    }
    Ok(plan)
}
