//! The memory of fused blocks from shapes alone: the buffers of a pass are lent and given back in the order in which [`super::layer`]
//! does, and counted. What changes there changes here; a test holds one to the other.

use std::collections::BTreeMap;

use homeroom_kernels::{
    attention_scratch_bytes, key_value_gradient_bytes, product_scratch_bytes, rounded_bytes, threads,
};

use super::head::chunk_rows;
use super::updates::RANK_STEP;
use crate::models::architecture::LayerSpec;

/// The buffers of a pass over `rows` rows, whose activations take `element` bytes a value.
pub(crate) struct Pools {
    rows: usize,
    element: usize,
    narrow: Lent,
    wide: Lent,
    /// Bytes of all buffers that were lent, one after another.
    pub traffic: usize,
}

/// Of each width, the buffers that are lent, and the most that were at once.
type Lent = BTreeMap<usize, (usize, usize)>;

/// A buffer that is lent.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    is_wide: bool,
    width: usize,
}

impl Pools {
    pub(crate) fn new(rows: usize, element: usize) -> Self {
        Self { rows, element, narrow: Lent::new(), wide: Lent::new(), traffic: 0 }
    }

    pub(crate) fn narrow(&mut self, width: usize) -> Held {
        self.take(false, width)
    }

    pub(crate) fn wide(&mut self, width: usize) -> Held {
        self.take(true, width)
    }

    fn take(&mut self, is_wide: bool, width: usize) -> Held {
        let (now, most) = self.lent(is_wide).entry(width).or_default();
        *now += 1;
        *most = (*now).max(*most);
        self.traffic += self.rows * width * self.size(is_wide);
        Held { is_wide, width }
    }

    pub(crate) fn give(&mut self, held: impl IntoIterator<Item = Held>) {
        for Held { is_wide, width } in held {
            if let Some((now, _)) = self.lent(is_wide).get_mut(&width) {
                *now -= 1;
            }
        }
    }

    fn lent(&mut self, is_wide: bool) -> &mut Lent {
        if is_wide { &mut self.wide } else { &mut self.narrow }
    }

    fn size(&self, is_wide: bool) -> usize {
        if is_wide { size_of::<f32>() } else { self.element }
    }

    /// Bytes that both pools have come to.
    pub(crate) fn bytes(&self) -> usize {
        let of = |lent: &Lent| lent.iter().map(|(width, (_, most))| width * most).sum::<usize>();
        self.rows * (of(&self.narrow) * self.element + of(&self.wide) * size_of::<f32>())
    }
}

/// A rank as products take it.
pub(crate) fn padded(r: usize) -> usize {
    r.next_multiple_of(RANK_STEP)
}

/// What a site is made of.
#[derive(Clone, Debug, Default)]
pub(crate) struct SiteSize {
    pub d_in: usize,
    /// Of each module, its output.
    pub d_out: Vec<usize>,
    /// Of each module, the rank of its update; 0: it has none.
    pub r: Vec<usize>,
    /// Whether an update has dropout on its input.
    pub drops: bool,
    /// Of each module, whether it is multiplied in integers.
    pub integers: Vec<bool>,
    /// Whether outputs have gains.
    pub gains: bool,
}

impl SiteSize {
    /// Width of all outputs together, if they have gains.
    fn gained(&self) -> Option<usize> {
        self.gains.then(|| self.d_out.iter().sum())
    }

    fn rank(&self) -> usize {
        self.r.iter().map(|r| padded(*r)).sum()
    }

    /// Bytes of A and B as products take them, and of gains.
    pub(crate) fn update_bytes(&self, element: usize) -> usize {
        let b: usize = self.r.iter().zip(&self.d_out).map(|(r, d_out)| padded(*r) * d_out).sum();
        // A gain is a factor and a length, and of its weight the square of that.
        let gains = self.gained().unwrap_or(0) * (2 * size_of::<f32>() + size_of::<f64>());
        element * (self.rank() * self.d_in + b) + gains
    }

    /// The most that its products and gradients need beside the buffers, for so many rows.
    fn beside(&self, rows: usize) -> usize {
        let forward = if self.integers.contains(&true) { rounded_bytes(rows, self.d_in) } else { 0 };
        let own = self.d_out.iter().zip(&self.integers).filter(|(_, integers)| **integers);
        let backward: usize = own.map(|(d_out, _)| rounded_bytes(rows, *d_out)).sum();
        // Gradients of A, stacked and each; of B, transposed and not.
        let down = size_of::<f32>() * self.d_in * (self.rank() + self.r.iter().max().unwrap_or(&0));
        let up = self.r.iter().zip(&self.d_out).map(|(r, d_out)| size_of::<f32>() * d_out * (padded(*r) + r));
        forward.max(backward).max(down).max(up.max().unwrap_or(0))
    }
}

/// A decoder layer that is run fused.
pub(crate) struct LayerSize<'a> {
    pub spec: &'a LayerSpec,
    pub hidden: usize,
    /// Of q, k and v; of o; of gate and up; of down.
    pub sites: [SiteSize; 4],
}

/// Buffers that forward keeps of a layer, by what they are given back with.
pub(crate) struct Kept {
    input: Vec<Held>,
    attention: Vec<Held>,
    mixed: Vec<Held>,
    fed_input: Vec<Held>,
    gate_up: Held,
    fed: Vec<Held>,
    /// Of each site u, and v where there are gains.
    sites: [Vec<Held>; 4],
}

impl Kept {
    fn all(self) -> impl Iterator<Item = Held> {
        let lists = [self.input, self.attention, self.mixed, self.fed_input, vec![self.gate_up], self.fed];
        lists.into_iter().chain(self.sites).flatten()
    }
}

impl LayerSize<'_> {
    fn adds(&self, after: Option<&str>) -> bool {
        after.is_none() && self.spec.residual_scale == 1.0
    }

    /// The input of a part: what is kept of it, and the normalised copy.
    fn input(&self, pools: &mut Pools, before: Option<&str>) -> (Vec<Held>, Option<Held>) {
        match before {
            None => (vec![pools.narrow(self.hidden)], None),
            Some(_) => {
                let [normal, scaled] = [0; 2].map(|_| pools.narrow(self.hidden));
                (vec![normal, pools.wide(1)], Some(scaled))
            }
        }
    }

    fn site(&self, pools: &mut Pools, number: usize) -> Vec<Held> {
        let site = &self.sites[number];
        let u = pools.narrow(site.rank());
        if site.drops {
            let dropped = pools.narrow(site.d_in);
            pools.give([dropped]);
        }
        std::iter::once(u).chain(site.gained().map(|width| pools.narrow(width))).collect()
    }

    /// The output of a part: u, and what is kept of its norm.
    fn output(&self, pools: &mut Pools, after: Option<&str>, site: usize) -> (Vec<Held>, Vec<Held>) {
        if self.adds(after) {
            return (self.site(pools, site), Vec::new());
        }
        let y = pools.wide(self.hidden);
        let u = self.site(pools, site);
        let kept = after.map(|_| vec![pools.narrow(self.hidden), pools.wide(1)]).unwrap_or_default();
        pools.give([y]);
        (u, kept)
    }

    /// Forward; x is lent throughout.
    pub(crate) fn forward(&self, pools: &mut Pools) -> Kept {
        let (spec, attention, inner) = (self.spec, self.spec.attention(), self.spec.feed_forward.inner);
        let (q, kv) = (attention.q_width(), attention.kv_width());
        let (input, scaled) = self.input(pools, spec.mixer_norms.before);
        let unrotated = pools.wide(q + 2 * kv);
        let u_qkv = self.site(pools, 0);
        pools.give(scaled);
        let mut kept = Vec::new();
        if let Some(norm) = attention.qk_norm {
            let groups = match norm {
                crate::models::architecture::QkNorm::Head => attention.heads + attention.kv_heads,
                crate::models::architecture::QkNorm::Width => 2,
            };
            kept.extend([pools.narrow(q + kv), pools.wide(groups)]);
        }
        kept.push(pools.narrow(q + 2 * kv));
        pools.give([unrotated]);
        kept.extend([pools.narrow(q), pools.wide(attention.heads)]);
        let (u_o, mixed) = self.output(pools, spec.mixer_norms.after, 1);
        let (fed_input, scaled) = self.input(pools, spec.feed_forward_norms.before);
        let gate_up = pools.narrow(2 * inner);
        let u_gate_up = self.site(pools, 2);
        pools.give(scaled);
        let h = pools.narrow(inner);
        let (u_down, fed) = self.output(pools, spec.feed_forward_norms.after, 3);
        pools.give([h]);
        Kept { input, attention: kept, mixed, fed_input, gate_up, fed, sites: [u_qkv, u_o, u_gate_up, u_down] }
    }

    /// Gives back what forward kept, where there is no backward.
    pub(crate) fn forget(&self, pools: &mut Pools, kept: Kept) {
        pools.give(kept.all());
    }

    fn site_backward(&self, pools: &mut Pools, number: usize, kept: Vec<Held>) {
        let site = &self.sites[number];
        let dv = site.gained().map(|width| pools.narrow(width));
        let du = pools.narrow(site.rank());
        if site.drops {
            let part = pools.wide(site.d_in);
            pools.give([part]);
            let dropped = pools.narrow(site.d_in);
            pools.give([dropped]);
        }
        pools.give([du].into_iter().chain(dv).chain(kept));
    }

    /// Backward; dx and the same as E are lent throughout.
    pub(crate) fn backward(&self, pools: &mut Pools, kept: Kept) {
        let (spec, attention, inner) = (self.spec, self.spec.attention(), self.spec.feed_forward.inner);
        let (q, kv, c) = (attention.q_width(), attention.kv_width(), self.hidden);
        let Kept {
            input,
            attention: of_attention,
            mixed,
            fed_input,
            gate_up,
            fed,
            sites: [u_qkv, u_o, u_gate_up, u_down],
        } = kept;
        let [dh, d_gate_up] = [pools.narrow(inner), pools.narrow(2 * inner)];
        let own = (!self.adds(spec.feed_forward_norms.after)).then(|| pools.narrow(c));
        self.site_backward(pools, 3, u_down);
        pools.give([dh, gate_up].into_iter().chain(own).chain(fed));
        let scaled = spec.feed_forward_norms.before.map(|_| pools.narrow(c));
        let dy = pools.wide(c);
        self.site_backward(pools, 2, u_gate_up);
        pools.give([d_gate_up, dy].into_iter().chain(scaled).chain(fed_input));
        let d_attended = pools.narrow(q);
        let own = (!self.adds(spec.mixer_norms.after)).then(|| pools.narrow(c));
        self.site_backward(pools, 1, u_o);
        pools.give(own.into_iter().chain(mixed));
        let d_qkv = pools.narrow(q + 2 * kv);
        pools.give([d_attended]);
        let scaled = spec.mixer_norms.before.map(|_| pools.narrow(c));
        let dy = pools.wide(c);
        self.site_backward(pools, 0, u_qkv);
        pools.give([d_qkv, dy].into_iter().chain(scaled).chain(input).chain(of_attention));
    }

    /// The most that an operation of the layer needs beside the buffers.
    pub(crate) fn beside(&self, rows: usize) -> usize {
        self.sites.iter().map(|site| site.beside(rows)).max().unwrap_or(0)
    }
}

/// Bytes of what kernels keep between calls, for passes of `rows` rows in sequences of `longest` at most: scratch of all threads, and
/// what attention writes between its passes.
pub(crate) fn scratch_bytes(spec: &LayerSpec, rows: usize, longest: usize, element: usize) -> usize {
    let attention = spec.attention();
    let of_thread = product_scratch_bytes(rows) + attention_scratch_bytes(longest, attention.head_dim, element);
    threads() * of_thread + key_value_gradient_bytes(rows, attention.heads, attention.head_dim)
}

/// The fused head over n rows that have a target.
pub(crate) struct HeadSize {
    pub hidden: usize,
    pub vocab: usize,
    pub integers: bool,
}

impl HeadSize {
    /// Bytes of the logits that exist at once.
    pub(crate) fn logits(&self, n: usize, element: usize) -> usize {
        if n == 0 { 0 } else { chunk_rows(n, self.vocab * element) * self.vocab * element }
    }

    /// Bytes beside them: of all n rows x, x̂ and `w ∘ x̂`, and the gradient.
    pub(crate) fn beside(&self, n: usize, element: usize) -> usize {
        if n == 0 {
            return 0;
        }
        let chunk = chunk_rows(n, self.vocab * element);
        let rounded = rounded_bytes(chunk, self.vocab.max(self.hidden));
        n * self.hidden * 2 * (size_of::<f32>() + element) + if self.integers { rounded } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::Result;
    use homeroom_abi::plan::Plan;
    use homeroom_kernels::bf16;

    use crate::adapt::adaptation::Adaptation;
    use crate::data::Example;
    use crate::estimate::{Outlook, Sketch};
    use crate::models::BaseModel;
    use crate::run::batch::Batch;
    use crate::run::cpu::{Fused, InIntegers};
    use crate::run::gradients::Gradients;
    use crate::run::plain::recipe::Pass;
    use crate::run::waist::Weigh;

    /// Updates with dropout on their input, or with learned lengths of rows.
    fn plan(model: &BaseModel, dropout: f64, lengths: bool) -> Result<Plan> {
        use homeroom_abi::plan::{AdaptedModule, Init, ModuleKind, ParamSpec, Recipes};
        use homeroom_abi::recipe::{Node, Op, Recipe};
        let mut ops = vec![
            Op::X,
            if lengths { Op::Linear(0) } else { Op::Base(0) },
            Op::Dropout { of: 0, p: dropout },
            Op::Param("A".to_owned()),
            Op::MatmulT(2, 3),
            Op::Param("B".to_owned()),
            Op::MatmulT(4, 5),
            Op::Add(1, 6),
        ];
        if lengths {
            ops.extend([
                Op::Weight,
                Op::Matmul(5, 3),
                Op::Add(8, 9),
                Op::RowNorm(10),
                Op::Detach(11),
                Op::Param("m".to_owned()),
                Op::Div(13, 12),
                Op::Mul(7, 14),
            ]);
        }
        let forward = Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() };
        let recipes = vec![Recipes { forward, merged_weight: None, merged_bias: None }];
        let linear = model.modules.iter().map(|module| &module.info);
        let linear = linear.filter(|info| info.kind == ModuleKind::Linear && !info.output_embedding);
        let modules = linear.map(|info| {
            let param = |name: &str, shape: &[usize]| ParamSpec {
                name: name.to_owned(),
                shape: shape.to_vec(),
                init: Init::Normal { std: 0.1 },
                trainable: true,
                tensor: format!("{}.{name}", info.path),
                tensor_shape: None,
                group: None,
                migrate: None,
            };
            let mut params = vec![param("A", &[5, info.d_in]), param("B", &[info.d_out, 5])];
            params.extend(lengths.then(|| param("m", &[info.d_out])));
            AdaptedModule { path: info.path.clone(), recipe: 0, params }
        });
        Ok(Plan { modules: modules.collect(), recipes, ..Plan::default() })
    }

    /// Of families with norms in all places, with dropout and checkpointing: what the pools hold after a pass is what was counted.
    #[test]
    fn buffers_that_were_counted_are_those_that_are_there() -> Result<()> {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models");
        for name in ["llama", "gemma3", "qwen3", "olmo2", "granite", "phi3"] {
            let model = BaseModel::load(&models.join(name))?;
            let cases =
                [(0.0, false, false), (0.0, true, false), (0.25, false, false), (0.0, false, true), (0.25, true, true)];
            for (dropout, recompute, lengths) in cases {
                let plan = plan(&model, dropout, lengths)?;
                let sketch = Sketch::of_model(&model);
                let adaptation = Adaptation::new(&model, plan.clone(), 1)?;
                let mut fused = Fused::<bf16>::new(&model, InIntegers::None);
                let mut updates = fused.updates(&model, Some(&adaptation), false);
                let pass = Pass::training(&model, &adaptation, 1, 0);
                updates.load(&pass)?;
                let example = |len: usize| Example::new((0..len as u32).collect(), vec![true; len], 0);
                let examples = [example(20), example(14)];
                let batch = Batch::of_examples((0..).zip(&examples));
                let mut gradients = Gradients::new(adaptation.params.len());
                fused.forward_backward(&pass, &updates, &batch, Weigh::Alike(1.0), recompute, &mut gradients)?;
                let there = fused.workspace.narrow.bytes() + fused.workspace.wide.bytes();
                let outlook = Outlook::new(&sketch, &plan);
                let (pools, blocks) = outlook.fused_pass(32, 2, false, recompute);
                assert_eq!(blocks, model.layers.len(), "{name}: all layers are fused");
                assert_eq!(pools.bytes(), there, "{name}, {dropout}, {recompute}, {lengths}");
            }
        }
        Ok(())
    }
}
