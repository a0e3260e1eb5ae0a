//! IA3: learned factors on keys, values and the input of the down projection.
//!
//! Source: Liu et al. 2022, <https://arxiv.org/abs/2205.05638>, section 3.3; names and files are PEFT's.

use homeroom_sdk::prelude::*;

struct Ia3 {
    targets: Targets,
    feedforward: Targets,
    peft: Value,
}

impl Ia3 {
    fn scales_input(&self, path: &str) -> bool {
        match &self.feedforward {
            Targets::Endings(names) => names.iter().any(|name| path.ends_with(name.as_str())),
            _ => false,
        }
    }
}

impl Strategy for Ia3 {
    const NAME: &'static str = "ia3";
    const DOC: &'static str = "learned factors on keys, values and the down projection's input";

    fn options(options: &mut Options) {
        options.targets("target_modules", r".*\.(k_proj|v_proj|down_proj)", "modules with a factor").targets(
            "feedforward_modules",
            "",
            "those of them whose input is scaled",
        );
    }

    fn new(values: &Values) -> Result<Self> {
        Ok(Self {
            targets: values.targets("target_modules")?,
            feedforward: values.targets("feedforward_modules")?,
            peft: values.peft_fields(),
        })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        plan.peft("IA3", self.peft.clone());
        for module in model.matching(&self.targets)? {
            let adapted = plan.adapt(module);
            if self.scales_input(&module.path) {
                adapted.param("ia3_l", [module.d_in], Init::Ones).saved_shape([1, module.d_in]);
            } else {
                adapted.param("ia3_l", [module.d_out], Init::Ones).saved_shape([module.d_out, 1]);
            }
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let l = module.param("ia3_l");
        if self.scales_input(&module.path) { module.base(x * l) } else { module.base(x) * l }
    }
}

export_strategy!(Ia3);
