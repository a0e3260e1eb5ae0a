//! my_strategy: a low-rank update of linear modules, `y = W x + b + (alpha / r) B A x`.
//!
//! Source: Hu et al. 2021, <https://arxiv.org/abs/2106.09685>, section 4.1. Names and files are PEFT's.

use homeroom_sdk::prelude::*;

struct LowRank {
    r: usize,
    scaling: f64,
    targets: Targets,
    peft: Value,
}

impl Strategy for LowRank {
    const NAME: &'static str = "my_strategy"; // what `--strategy` takes; the library is libmy_strategy.so
    const DOC: &'static str = "low-rank adaptation, to begin from";

    /// Declares the options: name, default, and a line for `homeroom plugins list`.
    fn options(options: &mut Options) {
        options
            .int("r", 8, "rank: more learns more, and costs memory and time")
            .float("lora_alpha", 16.0, "strength: the update is scaled by lora_alpha / r")
            .targets("target_modules", "all-linear", "all-linear, name endings, or one regular expression");
    }

    /// Reads the options of a run; names and types are right by now, ranges are yours to check.
    fn new(values: &Values) -> Result<Self> {
        let r = values.int("r")?;
        if r == 0 {
            return Err("r is 0, the smallest rank is 1".into());
        }
        let (scaling, targets) = (values.float("lora_alpha")? / r as f64, values.targets("target_modules")?);
        Ok(Self { r, scaling, targets, peft: values.peft_fields() })
    }

    /// Says which modules are adapted, and which parameters each gets: A at random and B zero, so that training begins at the
    /// base model.
    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        plan.peft("LORA", self.peft.clone());
        for module in model.matching(&self.targets)? {
            if module.kind != ModuleKind::Linear {
                return Err(format!("{} is not a linear module", module.path).into());
            }
            let a = Init::KaimingUniform { a: 5_f64.sqrt() };
            plan.adapt(module)
                .param("lora_A", [self.r, module.d_in], a)
                .saved_as("lora_A.weight")
                .param("lora_B", [module.d_out, self.r], Init::Zeros)
                .saved_as("lora_B.weight");
        }
        Ok(())
    }

    /// How an adapted module computes, recorded once. x is (N, d_in), one row a token.
    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let down = x.matmul_t(module.param("lora_A")); // (N, r)
        module.base(x) + down.matmul_t(module.param("lora_B")) * self.scaling // (N, d_out)
    }

    /// What the weight amounts to, for export: (d_out, d_in).
    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        let update = module.param("lora_B").matmul(module.param("lora_A"));
        Some(Merged::weight(module.weight() + update * self.scaling))
    }
}

export_strategy!(LowRank);

#[cfg(test)]
mod tests {
    use super::*;
    use homeroom_sdk::testing::request;
    use homeroom_sdk::trace;

    #[test]
    fn every_linear_module_but_the_head_is_adapted() -> Result<()> {
        let plan = trace::<LowRank>(&request("{}"))?;
        assert_eq!(plan.modules.len(), 14);
        assert!(plan.modules.iter().all(|module| module.path.ends_with("_proj")));
        Ok(())
    }

    #[test]
    fn parameters_have_the_rank_that_is_asked_for() -> Result<()> {
        let plan = trace::<LowRank>(&request(r#"{"r": 3, "target_modules": ["down_proj"]}"#))?;
        let shapes: Vec<_> = plan.modules[0].params.iter().map(|param| param.shape.clone()).collect();
        assert_eq!(shapes, [[3, 20], [8, 3]]);
        Ok(())
    }

    #[test]
    fn a_rank_of_zero_is_refused() {
        let error = trace::<LowRank>(&request(r#"{"r": 0}"#)).unwrap_err();
        assert!(error.to_string().contains("smallest rank is 1"), "{error}");
    }
}
