//! Full fine-tuning: every weight of the model is a parameter that starts as the base's.
//!
//! Tied modules share one parameter, whose gradients the host sums.

use homeroom_sdk::prelude::*;

struct Full;

impl Strategy for Full {
    const NAME: &'static str = "full";
    const DOC: &'static str = "every weight is trained; the result is a model, not an adapter";

    fn options(_: &mut Options) {}

    fn new(_: &Values) -> Result<Self> {
        Ok(Self)
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        plan.learning_rate(2e-5);
        for module in model.modules() {
            let adapted = plan.adapt(module);
            match module.weight_shape()[..] {
                [rows, cols] => adapted.param("weight", [rows, cols], Init::Base),
                _ => adapted.param("weight", [module.d_out], Init::Base),
            };
            if module.bias {
                adapted.param("bias", [module.d_out], Init::Base);
            }
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let weight = module.param("weight");
        let y = match module.kind {
            ModuleKind::Linear => x.matmul_t(weight),
            ModuleKind::Embedding => x.matmul(weight),
            ModuleKind::Norm => x * weight,
        };
        if module.bias { y + module.param("bias") } else { y }
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        let merged = Merged::weight(module.param("weight"));
        Some(if module.bias { merged.bias(module.param("bias")) } else { merged })
    }
}

export_strategy!(Full);
