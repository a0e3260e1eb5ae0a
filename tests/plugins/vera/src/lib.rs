//! VeRA: one frozen random pair of projections for the whole model, and two trained vectors a module:
//! `y = W x + b ∘ (B (d ∘ (A x)))`.
//!
//! Source: Kopiczko et al. 2023, <https://arxiv.org/abs/2310.11454>, section 3.1; names and files are PEFT's.

use homeroom_sdk::prelude::*;

struct Vera {
    r: usize,
    d_initial: f64,
    targets: Targets,
    peft: Value,
}

impl Vera {
    /// The rows of A and columns of B that a module uses are the first ones.
    fn projections<'t>(&self, module: &Module<'t>) -> (Node<'t>, Node<'t>) {
        let a = module.param("vera_A").slice(1, 0, module.d_in); // (r, d_in)
        let b = module.param("vera_B").slice(0, 0, module.d_out); // (d_out, r)
        (a, b)
    }
}

impl Strategy for Vera {
    const NAME: &'static str = "vera";
    const DOC: &'static str = "shared frozen projections with learned scales";

    fn options(options: &mut Options) {
        options
            .int("r", 256, "rank of the shared projections")
            .float("d_initial", 0.1, "first value of the scale between the projections")
            .int("projection_prng_key", 0, "noted in the configuration; the projections are in the file")
            .bool("save_projection", true, "noted in the configuration; the projections are always saved")
            .targets("target_modules", r".*\.(q_proj|v_proj)", "adapted modules");
    }

    fn new(values: &Values) -> Result<Self> {
        Ok(Self {
            r: values.int("r")?,
            d_initial: values.float("d_initial")?,
            targets: values.targets("target_modules")?,
            peft: values.peft_fields(),
        })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        plan.peft("VERA", self.peft.clone());
        let modules = model.matching(&self.targets)?;
        let d_in = modules.iter().map(|module| module.d_in).max().unwrap_or(0);
        let d_out = modules.iter().map(|module| module.d_out).max().unwrap_or(0);
        plan.shared("vera_A", [self.r, d_in], Init::KaimingUniform { a: 5_f64.sqrt() }).frozen();
        plan.shared("vera_B", [d_out, self.r], Init::KaimingUniform { a: 5_f64.sqrt() }).frozen();
        for module in modules {
            plan.adapt(module).param("vera_lambda_b", [module.d_out], Init::Zeros).param(
                "vera_lambda_d",
                [self.r],
                Init::Constant(self.d_initial),
            );
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let (a, b) = self.projections(module);
        let down = x.matmul_t(a) * module.param("vera_lambda_d"); // (N, r)
        module.base(x) + down.matmul_t(b) * module.param("vera_lambda_b") // (N, d_out)
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        let (a, b) = self.projections(module);
        let lambda_b = module.param("vera_lambda_b").reshape(&[Dim::Fixed(module.d_out), Dim::Fixed(1)]);
        let update = (b * module.param("vera_lambda_d")).matmul(a) * lambda_b; // (d_out, d_in)
        Some(Merged::weight(module.weight() + update))
    }
}

export_strategy!(Vera);
