//! Low-rank adaptation: `y = W x + b + s B A x`, with s = alpha / r, or alpha / √r for rsLoRA.
//!
//! Sources: Hu et al. 2021, <https://arxiv.org/abs/2106.09685>, section 4.1; rsLoRA: Kalajdzievski 2023,
//! <https://arxiv.org/abs/2312.03732>. Names, initial values and files are PEFT's.

use std::collections::BTreeMap;

use homeroom_sdk::prelude::*;

struct Lora {
    r: usize,
    alpha: f64,
    dropout: f64,
    rslora: bool,
    targets: Targets,
    ranks: BTreeMap<String, f64>,
    alphas: BTreeMap<String, f64>,
    peft: Value,
}

impl Lora {
    /// Rank of a module.
    fn rank(&self, module: &ModuleInfo) -> Result<usize> {
        Ok(pattern_value(&self.ranks, &module.path)?.map_or(self.r, |r| r as usize))
    }

    /// `A` and `B` by PEFT's names, and the scaling of their product.
    fn update<'t>(&self, module: &Module<'t>) -> (Node<'t>, Node<'t>, f64) {
        // `plan` has read both tables without an error.
        let r = self.rank(module).unwrap_or(self.r) as f64;
        let alpha = pattern_value(&self.alphas, &module.path).ok().flatten().unwrap_or(self.alpha);
        let scaling = alpha / if self.rslora { r.sqrt() } else { r };
        let [a, b] = names(module);
        (module.param(a), module.param(b), scaling)
    }
}

fn names(module: &ModuleInfo) -> [&'static str; 2] {
    match module.kind {
        ModuleKind::Embedding => ["lora_embedding_A", "lora_embedding_B"],
        _ => ["lora_A", "lora_B"],
    }
}

impl Strategy for Lora {
    const NAME: &'static str = "lora";
    const DOC: &'static str = "low-rank adaptation (LoRA, rsLoRA)";

    fn options(options: &mut Options) {
        options
            .int("r", 16, "rank: more learns more, and costs memory and time")
            .float("lora_alpha", None, "strength: the update is scaled by lora_alpha / r (default 2 r)")
            .float("lora_dropout", 0.0, "dropout on the adapter's input, in training only")
            .targets("target_modules", "all-linear", "all-linear, name endings, or one regular expression")
            .bool("use_rslora", false, "scale by lora_alpha / sqrt(r)")
            .map("rank_pattern", "other ranks by module name pattern")
            .map("alpha_pattern", "other lora_alpha by module name pattern");
    }

    fn new(values: &Values) -> Result<Self> {
        let r = values.int("r")?;
        let dropout = values.float("lora_dropout")?;
        let ranks = values.map("rank_pattern")?;
        if r == 0 || ranks.values().any(|r| *r < 1.0 || r.fract() != 0.0) {
            return Err("a rank is a whole number, the smallest is 1".into());
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(format!("lora_dropout is {dropout}, it is a probability below 1").into());
        }
        let alpha = values.float_or("lora_alpha", 2.0 * r as f64)?;
        let mut peft = values.peft_fields();
        peft["lora_alpha"] = number(alpha);
        Ok(Self {
            r,
            alpha,
            dropout,
            rslora: values.bool("use_rslora")?,
            targets: values.targets("target_modules")?,
            ranks,
            alphas: values.map("alpha_pattern")?,
            peft,
        })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        plan.peft("LORA", self.peft.clone());
        for module in model.matching(&self.targets)? {
            let (r, [a, b]) = (self.rank(module)?, names(module));
            pattern_value(&self.alphas, &module.path)?;
            let adapted = plan.adapt(module);
            match module.kind {
                ModuleKind::Linear => adapted
                    .param(a, [r, module.d_in], Init::KaimingUniform { a: 5_f64.sqrt() })
                    .saved_as("lora_A.weight")
                    .param(b, [module.d_out, r], Init::Zeros)
                    .saved_as("lora_B.weight"),
                ModuleKind::Embedding => adapted.param(a, [r, module.d_in], Init::Zeros).param(
                    b,
                    [module.d_out, r],
                    Init::Normal { std: 1.0 },
                ),
                ModuleKind::Norm => {
                    return Err(format!("{} is a norm, LoRA adapts linear modules and embeddings", module.path).into());
                }
            };
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let (a, b, scaling) = self.update(module);
        // PEFT has no dropout on an embedding's input: it is a token.
        let dropout = if module.kind == ModuleKind::Embedding { 0.0 } else { self.dropout };
        let down = x.dropout(dropout).matmul_t(a); // (N, r)
        module.base(x) + down.matmul_t(b) * scaling // (N, d_out)
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        let (a, b, scaling) = self.update(module);
        let update = b.matmul(a) * scaling; // (d_out, d_in)
        let embedding = module.kind == ModuleKind::Embedding; // whose weight is (vocabulary, d)
        Some(Merged::weight(module.weight() + if embedding { update.transpose() } else { update }))
    }
}

export_strategy!(Lora);
