//! Low-rank adaptation, for strategies that are LoRA over weights stored in their own way.
//!
//! `y = W x + b + s B A x`, with s = alpha / r, or alpha / √r for rsLoRA. DoRA besides learns the length of each row of the
//! effective weight: `y = m / ‖W + s B A‖ ∘ (W x + s B A x) + b`, where the norm is taken as a constant.
//!
//! Sources: Hu et al. 2021, <https://arxiv.org/abs/2106.09685>, section 4.1; rsLoRA: Kalajdzievski 2023,
//! <https://arxiv.org/abs/2312.03732>; DoRA: Liu et al. 2024, <https://arxiv.org/abs/2402.09353>, equations 5 and 11. Names,
//! initial values and files are PEFT's.

use std::collections::BTreeMap;

use homeroom_abi::plan::{Init, ModuleInfo, ModuleKind};
use homeroom_abi::shape::Dim;
use serde_json::{Map, Value};

use crate::{Merged, Model, Module, Node, Options, Planner, Result, Targets, Values, number, pattern_value};

/// Options that [`Lora::options`] declares, which are fields of PEFT's configuration too.
const FIELDS: [&str; 8] =
    ["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"];

/// Length of each row of a DoRA module's effective weight.
const MAGNITUDE: &str = "lora_magnitude_vector";

/// LoRA, rsLoRA and DoRA.
pub struct Lora {
    r: usize,
    alpha: f64,
    dropout: f64,
    rslora: bool,
    dora: bool,
    targets: Targets,
    ranks: BTreeMap<String, f64>,
    alphas: BTreeMap<String, f64>,
    peft: Value,
}

impl Lora {
    /// Declares the options.
    pub fn options(options: &mut Options) {
        options
            .int("r", 16, "rank: more learns more, and costs memory and time")
            .float("lora_alpha", None, "strength: the update is scaled by lora_alpha / r (default 2 r)")
            .float("lora_dropout", 0.0, "dropout on the adapter's input, in training only")
            .targets("target_modules", "all-linear", "all-linear, name endings, or one regular expression")
            .bool("use_rslora", false, "scale by lora_alpha / sqrt(r)")
            .bool("use_dora", false, "learn each row's length too (DoRA): often better at a low rank, and slower")
            .map("rank_pattern", "other ranks by module name pattern")
            .map("alpha_pattern", "other lora_alpha by module name pattern");
    }

    /// Reads the options of a run.
    ///
    /// # Errors
    /// When a value is out of range.
    pub fn new(values: &Values) -> Result<Self> {
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
        let alphas = values.map("alpha_pattern")?;
        if let Some(alpha) =
            alphas.values().chain([&alpha]).find(|alpha| !(**alpha > 0.0 && (**alpha as f32).is_finite()))
        {
            return Err(format!("a lora_alpha is {alpha}, it is a number above 0 that f32 holds").into());
        }
        let mut peft = Map::new();
        for name in FIELDS {
            peft.insert(name.to_owned(), values.value(name)?.clone());
        }
        peft.insert("lora_alpha".to_owned(), number(alpha));
        Ok(Self {
            r,
            alpha,
            dropout,
            rslora: values.bool("use_rslora")?,
            dora: values.bool("use_dora")?,
            targets: values.targets("target_modules")?,
            ranks,
            alphas,
            peft: Value::Object(peft),
        })
    }

    /// Adapts the modules that are meant.
    ///
    /// # Errors
    /// When none is, or one cannot be adapted so, or a rank is above both widths of its module.
    pub fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        plan.peft("LORA", self.peft.clone());
        model.check_patterns("rank_pattern", self.ranks.keys())?;
        model.check_patterns("alpha_pattern", self.alphas.keys())?;
        for module in model.matching(&self.targets)? {
            let (r, [a, b]) = (self.rank(module)?, names(module));
            pattern_value(&self.alphas, &module.path)?;
            // The update has the smaller width for its rank at most. Between the two a rank only costs, above both it is a mistake,
            // which may cost all memory.
            let (d_in, d_out) = (module.d_in, module.d_out);
            if r > d_in.max(d_out) {
                return Err(format!(
                    "{}: a rank of {r} is above both its widths, {d_in} in and {d_out} out; {} already makes any update",
                    module.path,
                    d_in.min(d_out)
                )
                .into());
            }
            let adapted = plan.adapt(module);
            match module.kind {
                ModuleKind::Linear => adapted
                    .param(a, [r, module.d_in], Init::KaimingUniform { a: 5_f64.sqrt() })
                    .saved_as("lora_A.weight")
                    .param(b, [module.d_out, r], Init::Zeros)
                    .saved_as("lora_B.weight"),
                ModuleKind::Embedding if self.dora => {
                    return Err(format!("{}: an embedding; DoRA adapts linear modules here", module.path).into());
                }
                ModuleKind::Embedding => adapted.param(a, [r, module.d_in], Init::Zeros).param(
                    b,
                    [module.d_out, r],
                    Init::Normal { std: 1.0 },
                ),
                ModuleKind::Norm => {
                    return Err(format!("{} is a norm, LoRA adapts linear modules and embeddings", module.path).into());
                }
            };
            if self.dora {
                adapted.param(MAGNITUDE, [module.d_out], Init::BaseRowNorm);
            }
        }
        Ok(())
    }

    /// How an adapted module computes.
    pub fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let (a, b, scaling) = self.update(module);
        // PEFT has no dropout on an embedding's input: it is a token.
        let dropout = if module.kind == ModuleKind::Embedding { 0.0 } else { self.dropout };
        let dropped = x.dropout(dropout);
        let update = dropped.matmul_t(a).matmul_t(b) * scaling; // (N, d_out)
        if !self.dora {
            return module.base(x) + update;
        }
        let length = (module.weight() + b.matmul(a) * scaling).row_norm().detach(); // (d_out)
        let gain = module.param(MAGNITUDE) / length; // (d_out)
        if dropout == 0.0 {
            let y = gain * (module.linear(x) + update);
            return if module.bias { y + module.frozen_bias() } else { y };
        }
        // As in PEFT: what dropout takes from the input is missing from the change alone, not from the base's output.
        let frozen = module.linear(dropped);
        module.base(x) + (gain * (frozen + update) - frozen)
    }

    /// What an adapted module's weight amounts to.
    pub fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        let (a, b, scaling) = self.update(module);
        let update = b.matmul(a) * scaling; // (d_out, d_in)
        let embedding = module.kind == ModuleKind::Embedding; // whose weight is (vocabulary, d)
        let weight = module.weight() + if embedding { update.transpose() } else { update };
        if !self.dora {
            return Some(Merged::weight(weight));
        }
        let gain = module.param(MAGNITUDE) / weight.row_norm();
        Some(Merged::weight(weight * gain.reshape(&[Dim::Fixed(module.d_out), Dim::Fixed(1)])))
    }

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
