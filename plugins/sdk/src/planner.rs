//! Collects what a strategy adapts.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use homeroom_abi::codec::Codec;
use homeroom_abi::limits::{MODULES_MAX, PARAMETERS_MAX, too_many};
use homeroom_abi::plan::{Defaults, Group, Init, Migrate, ModuleInfo, ParamSpec, Peft, Plan};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The plan in the making. Recipes are added when the strategy's `plan` has returned.
#[derive(Default)]
pub struct Planner {
    pub(crate) plan: Plan,
    pub(crate) adapted: Vec<Adapted>,
    count: Rc<Count>,
}

/// An adapted module in the making.
pub struct Adapted {
    pub(crate) module: ModuleInfo,
    pub(crate) params: Vec<ParamSpec>,
    count: Rc<Count>,
}

/// How many modules and parameters were asked for, and where the first was that is one too many. Those are not kept, so that a
/// mistake is told before it takes all memory.
#[derive(Default)]
struct Count {
    modules: Cell<usize>,
    params: Cell<usize>,
    over: RefCell<Option<Error>>,
}

impl Count {
    /// One more; whether it is kept.
    #[track_caller]
    fn add(&self, count: &Cell<usize>, most: usize) -> bool {
        count.set(count.get() + 1);
        if count.get() == most + 1 {
            let error = Error::new("");
            self.over.borrow_mut().get_or_insert(error);
        }
        count.get() <= most
    }

    fn check(&self) -> Result<()> {
        let Some(Error(mut error)) = self.over.take() else { return Ok(()) };
        let (modules, params) = (self.modules.get(), self.params.get());
        error.message = if params > PARAMETERS_MAX {
            too_many("it plans", params, "parameters", PARAMETERS_MAX)
        } else {
            too_many("it adapts", modules, "modules", MODULES_MAX)
        };
        Err(Error(error))
    }
}

/// A parameter of the model as a whole.
pub struct Shared<'a>(&'a mut ParamSpec);

impl Shared<'_> {
    /// Freezes it: it is saved and used, and not trained.
    pub fn frozen(self) -> Self {
        self.0.trainable = false;
        self
    }

    /// Names it in the adapter's file; else that is its own name.
    pub fn saved_as(self, name: &str) -> Self {
        self.0.tensor = name.to_owned();
        self
    }

    /// Gives it another shape in the adapter's file.
    pub fn saved_shape<const N: usize>(self, shape: [usize; N]) -> Self {
        self.0.tensor_shape = Some(shape.to_vec());
        self
    }

    /// Puts it into an optimizer group.
    pub fn in_group(self, group: &str) -> Self {
        self.0.group = Some(group.to_owned());
        self
    }
}

impl Planner {
    /// The plan and the adapted modules.
    ///
    /// # Errors
    /// When it asks for more of them than a plan may have.
    pub(crate) fn finish(self) -> Result<(Plan, Vec<Adapted>)> {
        self.count.check()?;
        Ok((self.plan, self.adapted))
    }

    /// Adapts a module.
    #[track_caller]
    pub fn adapt(&mut self, module: &ModuleInfo) -> &mut Adapted {
        let adapted = Adapted { module: module.clone(), params: Vec::new(), count: self.count.clone() };
        if !self.count.add(&self.count.modules, MODULES_MAX) {
            self.adapted.pop();
        }
        self.adapted.push(adapted);
        self.adapted.last_mut().expect("one was pushed on the line above")
    }

    /// Adds a trainable parameter of the model as a whole, which the recipe of any module may use.
    #[track_caller]
    pub fn shared<const N: usize>(&mut self, name: &str, shape: [usize; N], init: Init) -> Shared<'_> {
        if !self.count.add(&self.count.params, PARAMETERS_MAX) {
            self.plan.params.pop();
        }
        self.plan.params.push(spec(name, shape, init));
        Shared(self.plan.params.last_mut().expect("one was pushed on the line above"))
    }

    /// Names a number that recipes use by `module.scalar(name)`.
    pub fn scalar(&mut self, name: &str, value: f64) {
        self.plan.scalars.insert(name.to_owned(), value);
    }

    /// Declares an optimizer group.
    pub fn group(&mut self, name: &str, group: Group) {
        self.plan.groups.insert(name.to_owned(), group);
    }

    /// Has the frozen weight of a module, adapted or not, stored by a codec where it is stored as floats.
    pub fn store(&mut self, module: &ModuleInfo, codec: &Codec) {
        let codecs = &mut self.plan.codecs;
        let known = codecs.iter().position(|known| known == codec);
        let index = known.unwrap_or_else(|| {
            codecs.push(codec.clone());
            codecs.len() - 1
        });
        self.plan.stored.insert(module.path.clone(), index);
    }

    /// As [`Planner::store`], by the codec that this plugin exports beside its strategy.
    pub fn store_natively<C: crate::native::Codec>(&mut self, module: &ModuleInfo) {
        self.plan.stored_natively.insert(module.path.clone(), C::NAME.to_owned());
    }

    /// Says how PEFT calls the result: its `peft_type` and the fields of its configuration beside the common ones.
    pub fn peft(&mut self, peft_type: &str, fields: Value) {
        let fields = match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        self.plan.peft = Some(Peft { peft_type: peft_type.to_owned(), fields });
    }

    /// What the strategy proposes where the user says nothing.
    pub fn defaults(&mut self, defaults: Defaults) {
        self.plan.defaults = defaults;
    }

    /// Proposes what products are computed in: `f32`, `bf16` or `int8`, see [`Defaults::compute_dtype`].
    pub fn compute(&mut self, dtype: &str) {
        self.plan.defaults.compute_dtype = Some(dtype.to_owned());
    }

    /// Proposes a peak learning rate.
    pub fn learning_rate(&mut self, learning_rate: f64) {
        self.plan.defaults.learning_rate = Some(learning_rate);
    }
}

impl Adapted {
    /// Adds a trainable parameter.
    #[track_caller]
    pub fn param<const N: usize>(&mut self, name: &str, shape: [usize; N], init: Init) -> &mut Self {
        if !self.count.add(&self.count.params, PARAMETERS_MAX) {
            self.params.pop();
        }
        self.params.push(spec(name, shape, init));
        self
    }

    /// Freezes the parameter that was added last: it is saved and used, and not trained.
    pub fn frozen(&mut self) -> &mut Self {
        self.last(|param| param.trainable = false)
    }

    /// Names the parameter that was added last in the adapter's file, after the module's path; else it is its own name.
    pub fn saved_as(&mut self, ending: &str) -> &mut Self {
        self.last(|param| param.tensor = ending.to_owned())
    }

    /// Gives the parameter that was added last another shape in the adapter's file.
    pub fn saved_shape<const N: usize>(&mut self, shape: [usize; N]) -> &mut Self {
        self.last(|param| param.tensor_shape = Some(shape.to_vec()))
    }

    /// Puts the parameter that was added last into an optimizer group.
    pub fn in_group(&mut self, group: &str) -> &mut Self {
        self.last(|param| param.group = Some(group.to_owned()))
    }

    /// Lets a running training go on with another shape of the parameter that was added last; else it refuses one.
    pub fn migrate(&mut self, how: Migrate) -> &mut Self {
        self.last(|param| param.migrate = Some(how))
    }

    fn last(&mut self, change: impl FnOnce(&mut ParamSpec)) -> &mut Self {
        if let Some(param) = self.params.last_mut() {
            change(param);
        }
        self
    }
}

fn spec<const N: usize>(name: &str, shape: [usize; N], init: Init) -> ParamSpec {
    ParamSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        init,
        trainable: true,
        tensor: name.to_owned(),
        tensor_shape: None,
        group: None,
        migrate: None,
    }
}
