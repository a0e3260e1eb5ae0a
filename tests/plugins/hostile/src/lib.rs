//! A strategy that misbehaves in the way its option says, to show that the host stays well.

use homeroom_sdk::prelude::*;

struct Hostile {
    how: String,
}

impl Strategy for Hostile {
    const NAME: &'static str = "hostile";
    const DOC: &'static str = "misbehaves in the way its option says";

    fn options(options: &mut Options) {
        options.string("how", "well", "panic, error, shape, name, cut, zero");
    }

    fn new(values: &Values) -> Result<Self> {
        Ok(Self { how: values.string("how")? })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        match self.how.as_str() {
            "panic" => panic!("as asked"),
            "error" => return Err("an error, as asked".into()),
            _ => {}
        }
        for module in model.matching(&Targets::AllLinear)? {
            plan.adapt(module).param("shift", [module.d_out], Init::Zeros);
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let shift = module.param(if self.how == "name" { "shfit" } else { "shift" });
        match self.how.as_str() {
            "shape" => module.base(x).matmul(shift),
            "cut" => module.base(x) + shift.detach(),
            "zero" => module.base(x) + (shift - module.param("shift")),
            _ => module.base(x) + shift,
        }
    }
}

export_strategy!(Hostile);
