//! The memory of a training: blocks are gone through in the order in which backends run them, with sizes in the place of values.

use std::collections::HashMap;

use homeroom_abi::plan::{ModuleInfo, ParamSpec, Plan};
use homeroom_kernels::{Codec, bf16, isa};

use super::sketch::Outline;
use super::time::{Operation, StoredAs, Work};
use super::{Estimate, Parts, Request, Sketch};
use crate::adapt::adaptation::{Adapted, laid_out};
use crate::models::architecture::{EMBEDDING, FINAL_NORM, HEAD, layer_path};
use crate::run::batch::{packed_parts, pass_rows_of};
use crate::run::compute::Compute;
use crate::run::cpu::low_rank::low_rank;
use crate::run::cpu::size::{HeadSize, Held, LayerSize, Pools, SiteSize, padded, scratch_bytes};
use crate::run::plain::tape::{
    Grads, Id, Ledger, Products, Tape, TapedModule, TapedPlan, TapedRows, head as plain_head,
};
use crate::train::optimizer::keeps;

/// Most rows of a batch that are gone through one by one; a batch of more fits nowhere.
const ROWS_MAX: usize = 1 << 18;

const FLOAT: usize = size_of::<f32>();
/// The part of what each step takes and gives back that the allocator keeps beside: between a twelfth and an eighth was measured.
const KEPT_PART: f64 = 1.0 / 8.0;
/// The same with plain blocks, whose pages are never given back, see [`crate::run::pages`]: from 0.2 to 0.6 was measured.
const KEPT_PART_OF_PLAIN: f64 = 0.3;
/// The part of encoded weights that lies idle beside them: from a tenth of 7B to a sixth of 0.5B was measured. The allocator's sizes are
/// an eighth apart.
const BESIDE_ENCODED: f64 = 1.0 / 8.0;

/// A base with a strategy's plan, from shapes alone.
pub struct Outlook<'a> {
    pub(super) sketch: &'a Sketch,
    plan: &'a Plan,
    specs: Vec<ParamSpec>,
    /// Of each parameter, its shape, and whether it is trained.
    params: Vec<(Vec<usize>, bool)>,
    adapted: Vec<Option<Adapted>>,
}

/// How blocks are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Bytes of a value in fused blocks; `None`: all blocks are plain.
    pub element: Option<usize>,
    pub integers: bool,
}

/// What comes between two blocks.
#[derive(Clone, Copy)]
enum Stream {
    Tensor,
    Buffer(Held),
}

/// What forward keeps of a block.
enum Keeps {
    Nothing,
    Fused(crate::run::cpu::size::Kept),
    FusedInput(Held),
    Tape(Tape, Id),
    /// Whether a tensor is kept, which the embedding has none of.
    Input(bool),
}

/// A pass that was gone through.
struct Passed {
    ledger: Ledger,
    pools: Pools,
    gradients: Grads,
    /// Bytes of the largest logits.
    logits: usize,
    fused: usize,
    /// Bytes that are in use when the head is reached.
    at_top: usize,
    /// Products of plain blocks.
    plain_products: Products,
}

impl<'a> Outlook<'a> {
    /// A plan on a base.
    pub fn new(sketch: &'a Sketch, plan: &'a Plan) -> Self {
        let infos: Vec<&ModuleInfo> = sketch.modules.iter().map(|module| &module.info).collect();
        let (specs, adapted) = laid_out(plan, &infos);
        let specs: Vec<ParamSpec> = specs.into_iter().map(|(spec, _)| spec).collect();
        let params = specs.iter().map(|spec| (spec.shape.clone(), spec.trainable)).collect();
        Self { sketch, plan, specs, params, adapted }
    }

    /// What a `compute` comes to with the plan, as backends are chosen.
    pub(super) fn blocks(&self, compute: Compute) -> (Blocks, Compute) {
        let compute = compute.resolved_for(self.plan.defaults.compute_dtype.as_deref());
        let integers = compute == Compute::Int8;
        let narrow = compute == Compute::Bf16 || integers && isa().has_bf16();
        let element = (compute != Compute::Plain).then_some(if narrow { size_of::<bf16>() } else { FLOAT });
        (Blocks { element, integers }, compute)
    }

    pub(super) fn module(&self, index: usize) -> &Outline {
        &self.sketch.modules[index]
    }

    fn is_frozen(&self, index: usize) -> bool {
        self.adapted[index].is_none()
    }

    fn trains(&self, index: usize) -> bool {
        let trained = |adapted: &Adapted| adapted.params.values().any(|param| self.params[*param].1);
        self.adapted[index].as_ref().is_some_and(trained)
    }

    fn values(&self, param: usize) -> usize {
        self.params[param].0.iter().product()
    }

    fn trainable(&self) -> usize {
        (0..self.params.len()).filter(|param| self.params[*param].1).map(|param| self.values(param)).sum()
    }

    /// The lowest block with a trained parameter, the embedding being 0.
    pub(super) fn lowest(&self) -> usize {
        if self.sketch.index(EMBEDDING).is_some_and(|module| self.trains(module)) {
            return 0;
        }
        let layers = &self.sketch.layers;
        let trained = layers.iter().position(|layer| layer.all().any(|module| self.trains(module)));
        trained.unwrap_or(layers.len()) + 1
    }

    /// A site; `None`: it is not run fused.
    fn site(&self, modules: &[usize], blocks: Blocks) -> Option<SiteSize> {
        let per_word = size_of::<u32>() / blocks.element?;
        let mut site = SiteSize::default();
        for &index in modules {
            let Outline { info, .. } = self.module(index);
            if !info.d_in.is_multiple_of(per_word) || !info.d_out.is_multiple_of(per_word) {
                return None;
            }
            let update = match &self.adapted[index] {
                None => None,
                Some(adapted) => {
                    let update = low_rank(&self.plan.recipes[adapted.recipe].forward, adapted, info.bias)?;
                    let fits = update.fits(|param| &self.params[param].0, (info.d_in, info.d_out));
                    Some(fits.then_some(update)?)
                }
            };
            site.d_in = info.d_in;
            site.d_out.push(info.d_out);
            site.gains |= update.as_ref().is_some_and(|update| update.magnitude.is_some());
            site.drops |= update.as_ref().is_some_and(|update| update.dropout.is_some());
            site.r.push(update.map_or(0, |update| self.params[update.a].0[0]));
            site.integers.push(blocks.integers && self.module(index).multiplies_in_integers());
        }
        Some(site)
    }

    /// A layer; `None`: it is not run fused.
    pub(super) fn fused_layer(&self, number: usize, blocks: Blocks) -> Option<LayerSize<'_>> {
        let (spec, at) = (&self.sketch.architecture.layers[number], &self.sketch.layers[number]);
        let norms = [at.mixer_norm, at.mixer_post_norm, at.feed_forward_norm, at.feed_forward_post_norm];
        let mut norms = norms.into_iter().flatten().chain(at.qk_norms.into_iter().flatten());
        let per_word = size_of::<u32>() / blocks.element?;
        let whole = |width: usize| width.is_multiple_of(per_word);
        let fits = whole(spec.feed_forward.inner) && whole(spec.attention().head_dim);
        (fits && norms.all(|norm| self.is_frozen(norm))).then_some(())?;
        let sites = [
            self.site(&at.qkv, blocks)?,
            self.site(&[at.o], blocks)?,
            self.site(&at.gate_up, blocks)?,
            self.site(&[at.down], blocks)?,
        ];
        Some(LayerSize { spec, hidden: self.sketch.architecture.hidden_size, sites })
    }

    /// The head with the bytes of a value in it; `None`: it is not run fused.
    pub(super) fn fused_head(&self, blocks: Blocks) -> Option<(HeadSize, usize)> {
        let (norm, head) = (self.sketch.index(FINAL_NORM)?, self.sketch.index(HEAD)?);
        let element = blocks.element?;
        (self.is_frozen(norm) && self.is_frozen(head)).then_some(())?;
        let (hidden, vocab) = (self.module(head).info.d_in, self.module(head).info.d_out);
        let per_word = size_of::<u32>() / element;
        let fits = hidden.is_multiple_of(per_word) && vocab.is_multiple_of(per_word);
        let integers = blocks.integers && hidden.is_multiple_of(4) && vocab.is_multiple_of(4);
        Some((HeadSize { hidden, vocab, integers }, if fits { element } else { FLOAT }))
    }

    fn taped(&self, index: usize) -> TapedModule<'_> {
        TapedModule { info: &self.module(index).info, adapted: self.adapted[index].as_ref() }
    }

    /// The buffers of one fused pass over `sequences` sequences that share `rows` rows evenly, and how many layers run fused.
    #[cfg(test)]
    pub(crate) fn fused_pass(&self, rows: usize, sequences: usize, integers: bool, recompute: bool) -> (Pools, usize) {
        let blocks = Blocks { element: Some(size_of::<bf16>()), integers };
        let passes = self.passes(&vec![rows / sequences; sequences], rows, blocks, recompute);
        (passes.pools, passes.fused)
    }

    /// Goes through a pass over these sequences with n rows that have a target.
    fn passes(&self, sequences: &[usize], n: usize, blocks: Blocks, recompute: bool) -> Passed {
        let rows: usize = sequences.iter().sum();
        let mut passes = Passed {
            ledger: Ledger::default(),
            pools: Pools::new(rows, blocks.element.unwrap_or(FLOAT)),
            gradients: vec![false; self.params.len()],
            logits: 0,
            fused: 0,
            at_top: 0,
            plain_products: Products::default(),
        };
        self.pass(&mut passes, sequences, n, blocks, recompute);
        passes
    }

    fn pass(&self, passes: &mut Passed, sequences: &[usize], n: usize, blocks: Blocks, recompute: bool) {
        let architecture = &self.sketch.architecture;
        let (c, rows) = (architecture.hidden_size, sequences.iter().sum::<usize>());
        let plan = TapedPlan { plan: self.plan, params: &self.params };
        let taped_rows = TapedRows { architecture, sequences, plan };
        let tensor = FLOAT * rows * c;
        let lowest = self.lowest();
        let Passed { ledger, pools, gradients, logits, fused, at_top, plain_products } = passes;
        let of_layer = |number: usize| {
            let at: HashMap<String, usize> =
                self.sketch.layers[number].all().map(|index| (self.module(index).info.path.clone(), index)).collect();
            move |path: &str| at.get(&layer_path(number, path)).map(|index| self.taped(*index))
        };
        // A plain block; its input's gradient is asked for above the lowest that trains.
        let tape = |ledger: &mut Ledger, index: usize, gradient: bool| {
            let mut tape = Tape::default();
            let output = match index.checked_sub(1) {
                None => {
                    let embedding = self.sketch.index(EMBEDDING).map(|index| self.taped(index));
                    embedding.map(|embedding| tape.embed(ledger, &taped_rows, embedding))
                }
                Some(number) => {
                    let x = tape.input(ledger, rows * c, gradient);
                    Some(tape.layer(ledger, &taped_rows, number, &of_layer(number), x))
                }
            };
            (tape, output)
        };
        let embedding_is_frozen = self.sketch.index(EMBEDDING).is_none_or(|module| self.is_frozen(module));

        // Up.
        let mut kept = Vec::new();
        let plain_up = |ledger: &mut Ledger, index: usize, kept: &mut Vec<Keeps>, products: &mut Products| {
            let (block, output) = tape(ledger, index, !recompute && index > lowest);
            products.add(&block.products, recompute);
            match output {
                Some(output) if index >= lowest && !recompute => kept.push(Keeps::Tape(block, output)),
                _ => {
                    block.forget(ledger);
                    let has_input = index > 0 && index >= lowest;
                    if has_input {
                        ledger.take(tensor);
                    }
                    kept.push(if index >= lowest { Keeps::Input(has_input) } else { Keeps::Nothing });
                }
            }
            ledger.take(tensor);
        };
        let mut h = match blocks.element.is_some() && embedding_is_frozen {
            true => {
                kept.push(Keeps::Nothing);
                Stream::Buffer(pools.wide(c))
            }
            false => {
                plain_up(ledger, 0, &mut kept, plain_products);
                Stream::Tensor
            }
        };
        *fused = 0;
        for number in 0..self.sketch.layers.len() {
            let index = number + 1;
            let Some(layer) = self.fused_layer(number, blocks) else {
                if let Stream::Buffer(x) = h {
                    pools.give([x]);
                    ledger.take(tensor);
                }
                plain_up(ledger, index, &mut kept, plain_products);
                ledger.give(tensor);
                h = Stream::Tensor;
                continue;
            };
            *fused += 1;
            h = Stream::Buffer(into_buffer(h, pools, ledger, tensor, c));
            let input = (recompute && index >= lowest).then(|| pools.wide(c));
            let activations = layer.forward(pools);
            ledger.pass(layer.beside(rows));
            kept.push(match input {
                _ if index < lowest => {
                    layer.forget(pools, activations);
                    Keeps::Nothing
                }
                None => Keeps::Fused(activations),
                Some(input) => {
                    layer.forget(pools, activations);
                    Keeps::FusedInput(input)
                }
            });
        }

        // The top.
        *at_top = pools.bytes() + ledger.now();
        let mut dh = match self.fused_head(blocks) {
            Some((head, element)) => {
                let x = into_buffer(h, pools, ledger, tensor, c);
                let dx = pools.wide(c);
                *logits = head.logits(n, element).max(*logits);
                ledger.pass(head.beside(n, element));
                pools.give([x]);
                Stream::Buffer(dx)
            }
            None => {
                if let Stream::Buffer(x) = h {
                    pools.give([x]);
                    ledger.take(tensor);
                }
                let modules = (self.sketch.index(FINAL_NORM), self.sketch.index(HEAD));
                if let (Some(norm), Some(head)) = modules {
                    let modules = (self.taped(norm), self.taped(head));
                    plain_products.add(&plain_head(ledger, &taped_rows, modules, n, gradients), false);
                }
                // The gradient, and the stream that it is of.
                ledger.take(tensor);
                ledger.give(tensor);
                Stream::Tensor
            }
        };

        // Down.
        let mut narrow = None;
        while let Some(activations) = kept.pop() {
            let index = kept.len();
            if index < lowest {
                break;
            }
            let layer = index.checked_sub(1).and_then(|number| self.fused_layer(number, blocks));
            let Some(layer) = layer else {
                if let Stream::Buffer(dx) = dh {
                    pools.give([dx]);
                    ledger.take(tensor);
                }
                pools.give(narrow.take());
                let (block, output, input) = match activations {
                    Keeps::Tape(block, output) => (block, Some(output), false),
                    Keeps::Input(has_input) => {
                        let (block, output) = tape(ledger, index, index > lowest);
                        plain_products.add(&block.products, false);
                        (block, output, has_input)
                    }
                    _ => break,
                };
                if let Some(output) = output {
                    block.block_backward(ledger, output, gradients);
                }
                if input {
                    ledger.give(tensor);
                }
                dh = Stream::Tensor;
                continue;
            };
            let dx = into_buffer(dh, pools, ledger, tensor, c);
            let own = narrow.take().unwrap_or_else(|| pools.narrow(c));
            let activations = match activations {
                Keeps::Fused(activations) => activations,
                Keeps::FusedInput(input) => {
                    let activations = layer.forward(pools);
                    pools.give([input]);
                    activations
                }
                _ => break,
            };
            ledger.pass(layer.beside(rows));
            layer.backward(pools, activations);
            for param in self.params_of_layer(index - 1) {
                if !std::mem::replace(&mut gradients[param], true) {
                    ledger.take(FLOAT * self.values(param));
                }
            }
            dh = Stream::Buffer(dx);
            narrow = Some(own);
        }
        match dh {
            Stream::Tensor => ledger.give(tensor),
            Stream::Buffer(dx) => pools.give([dx]),
        }
        pools.give(narrow);
    }

    /// The trained parameters of a layer's modules.
    fn params_of_layer(&self, number: usize) -> Vec<usize> {
        let adapted = self.sketch.layers[number].all().filter_map(|module| self.adapted[module].as_ref());
        let params = adapted.flat_map(|adapted| adapted.params.values().copied());
        params.filter(|param| self.params[*param].1).collect()
    }

    pub(super) fn estimate(&self, request: &Request) -> Estimate {
        let (blocks, compute) = self.blocks(request.compute);
        let sketch = self.sketch;
        let inputs = request.row_tokens.saturating_sub(1).max(1);
        let targets = request.trained_tokens.min(inputs).max(1);
        let batch = request.batch_size.clamp(1, ROWS_MAX);
        let batches = request.gradient_accumulation_steps.max(1);
        let per_step = request.batch_size.max(1).saturating_mul(batches);
        // Rows are alike, so that what many passes come to is seen in few.
        let most = request.pass_rows.unwrap_or(pass_rows_of(sketch.is_coded()));
        // The rows of the largest pass, and how many passes there are.
        let parts_of = |count: usize| {
            let seen = count.min(ROWS_MAX);
            let parts = packed_parts(&vec![inputs; seen], most);
            let largest = parts.iter().map(|part| part.len()).max().unwrap_or(1);
            (largest, parts.len().max(1).saturating_mul(count.div_ceil(seen)))
        };
        let (largest, passes_per_step) = match (request.packing, request.pass_rows) {
            (true, _) => parts_of(per_step),
            (false, None) => (batch, batches),
            (false, Some(_)) => {
                let (largest, parts) = parts_of(batch);
                (largest, parts.saturating_mul(batches))
            }
        };
        let sequences = vec![inputs; largest];
        let rows = largest * inputs;
        let recompute = request.gradient_checkpointing;
        let passes = self.passes(&sequences, largest * targets, blocks, recompute);
        let trainable = self.trainable();
        let gradients = FLOAT * trainable;
        let moving = passes.ledger.most().max(gradients) - gradients;
        // Gradients of passes wait for each other, two neighbours being added to one, see `Reduce`.
        let waiting = passes_per_step.ilog2() as usize;
        let kept = if keeps(trainable, sketch.parameter_count()) { FLOAT * trainable } else { 0 };
        let element = blocks.element.unwrap_or(FLOAT);
        let layers = (0..sketch.layers.len()).filter_map(|number| self.fused_layer(number, blocks));
        let (mut updates, mut scratch) = (0, 0);
        for layer in layers {
            updates += layer.sites.iter().map(|site| site.update_bytes(element)).sum::<usize>();
            scratch = scratch_bytes(layer.spec, rows, inputs, element).max(scratch);
        }
        let head = self.fused_head(blocks).filter(|(head, _)| head.integers);
        let rounded = head.as_ref().map_or(0, |(head, _)| Codec::int8().encoded_bytes(head.vocab, head.hidden));
        let positions = inputs.next_power_of_two().min(sketch.architecture.max_position_embeddings).max(inputs);
        let rotary: usize = sketch.architecture.ropes.iter().map(|rope| positions * rope.dims * FLOAT).sum();
        let all: usize = (0..self.params.len()).map(|param| self.values(param)).sum();
        let stored = sketch.stored_bytes() + rounded;
        // Of an embedding that only tokens are looked up in, the pages around those of a pass are read.
        let unread = self
            .looked_up_bytes(head.is_some())
            .map_or(0, |bytes| (bytes as f64 * (1.0 - share_read(bytes, rows))) as usize);
        // A head of its own is given back once it is rounded: only the rounded copy is multiplied.
        let is_own = !sketch.architecture.tie_word_embeddings;
        let given_back = match (&head, sketch.index(HEAD)) {
            (Some(_), Some(module)) if is_own => self.module(module).bytes(),
            _ => 0,
        };
        let mut parts = Parts {
            weights: (stored - unread - given_back) as u64,
            parameters: (FLOAT * all + updates) as u64,
            moments: (2 * FLOAT * trainable + kept) as u64,
            gradients: (gradients * (1 + waiting)) as u64,
            activations: (passes.pools.bytes() + moving) as u64,
            logits: passes.logits as u64,
            scratch: (scratch + rotary) as u64,
            allocator: 0,
            program: request.program_bytes,
        };
        let is_plain = passes.fused < sketch.layers.len() || self.fused_head(blocks).is_none();
        let kept = if is_plain { KEPT_PART_OF_PLAIN } else { KEPT_PART };
        let moving = parts.gradients + parts.activations + parts.logits;
        let encoded = sketch.encoded_bytes() + rounded;
        parts.allocator = (kept * moving as f64 + BESIDE_ENCODED * encoded as f64) as u64;
        // The head is rounded when it is first reached: all of it is read, and moments are not touched yet.
        let rounding = Parts {
            weights: stored as u64,
            moments: 0,
            gradients: 0,
            activations: passes.at_top as u64,
            logits: 0,
            ..parts
        };
        match rounding.total().checked_sub(parts.total()).filter(|_| head.is_some()) {
            // Until it is given back, the head takes more than all that comes later.
            Some(more) if given_back > 0 => parts.weights += more,
            Some(_) => parts = rounding,
            None => {}
        }
        Estimate {
            peak_memory_bytes: parts.total(),
            parts,
            trainable,
            parameters: sketch.parameter_count(),
            tokens_per_step: per_step * request.row_tokens,
            passes_per_step,
            fused_layers: (passes.fused, sketch.layers.len()),
            storage: sketch.storage_words(),
            compute: compute.name(),
            work: self.work(&passes, (inputs, largest), largest * targets, per_step as f64 / largest as f64, request),
        }
    }

    /// What a step computes: `times` passes over `count` sequences of `inputs` rows each, n of which have a target.
    fn work(&self, passes: &Passed, (inputs, count): (usize, usize), n: usize, times: f64, request: &Request) -> Work {
        let (blocks, _) = self.blocks(request.compute);
        let (rows, lowest) = (inputs * count, self.lowest());
        let mut operations: Vec<(Operation, f64)> = Vec::new();
        let mut add =
            |operation: Operation, times: f64| match operations.iter_mut().find(|(known, _)| *known == operation) {
                Some((_, sum)) => *sum += times,
                None => operations.push((operation, times)),
            };
        for number in 0..self.sketch.layers.len() {
            let (Some(layer), Some(element)) = (self.fused_layer(number, blocks), blocks.element) else { continue };
            let is_trained = number + 1 >= lowest;
            let forward = if is_trained && request.gradient_checkpointing { 2.0 * times } else { times };
            let at = &self.sketch.layers[number];
            let modules = [&at.qkv[..], &[at.o], &at.gate_up, &[at.down]];
            for (site, modules) in layer.sites.iter().zip(modules) {
                let rank: usize = site.r.iter().map(|r| padded(*r)).sum();
                for (i, module) in modules.iter().enumerate() {
                    let of_module = |backward| Operation::Product {
                        m: rows,
                        weight: (site.d_out[i], site.d_in),
                        stored: StoredAs::of(&self.module(*module).stored),
                        rank: padded(site.r[i]),
                        element,
                        integers: site.integers[i],
                        backward,
                    };
                    add(of_module(false), forward);
                    if is_trained {
                        add(of_module(true), times);
                    }
                    if is_trained && site.r[i] > 0 {
                        let (m, p) = (rows, padded(site.r[i]));
                        add(Operation::Small { m, k: site.d_out[i], n: p, element }, times);
                        add(Operation::Outer { m, p, n: site.d_out[i], element }, times);
                    }
                }
                if rank > 0 {
                    add(Operation::Small { m: rows, k: site.d_in, n: rank, element }, forward);
                    if is_trained {
                        add(Operation::Outer { m: rows, p: rank, n: site.d_in, element }, times);
                    }
                }
            }
            let attention = layer.spec.attention();
            let of_attention = |backward| Operation::Attention {
                t: inputs,
                count,
                heads: attention.heads / attention.kv_heads,
                head_dim: attention.head_dim,
                window: attention.window.filter(|window| *window < inputs),
                cap: attention.soft_cap.is_some(),
                element,
                backward,
            };
            add(of_attention(false), forward * attention.kv_heads as f64);
            if is_trained {
                add(of_attention(true), times * attention.kv_heads as f64);
            }
            let (heads, rotated) = (attention.heads + 2 * attention.kv_heads, attention.heads + attention.kv_heads);
            if attention.rope.is_some() {
                let turn = Operation::Rotate { m: rows, heads, rotated, head_dim: attention.head_dim, element };
                add(turn, if is_trained { forward + times } else { forward });
            }
            // A norm behind a part costs what one before it does.
            let ends = [&layer.spec.mixer_norms, &layer.spec.feed_forward_norms];
            let norms = ends.iter().flat_map(|norms| [norms.before, norms.after]).flatten().map(|_| layer.hidden);
            let of_heads = attention.qk_norm.map(|_| rotated * attention.head_dim);
            let unit = &layer.spec.feed_forward;
            for backward in if is_trained { &[false, true][..] } else { &[false] } {
                let times = if *backward { times } else { forward };
                for c in norms.clone().chain(of_heads) {
                    add(Operation::Norm { m: rows, c, element, backward: *backward }, times);
                }
                let (n, gate) = (unit.inner, unit.gate);
                add(Operation::Gate { m: rows, n, gate, element, backward: *backward }, times);
            }
        }
        if let (Some((head, element)), Some(module)) = (self.fused_head(blocks), self.sketch.index(HEAD)) {
            let row = head.logits(n, element) / (head.vocab * element).max(1);
            let stored = match head.integers {
                true => StoredAs::Codec(Codec::int8()),
                false => StoredAs::of(&self.module(module).stored),
            };
            let chunks = times * n as f64 / row.max(1) as f64;
            for backward in [false, true] {
                let (weight, stored) = ((head.vocab, head.hidden), stored.clone());
                let product =
                    Operation::Product { m: row, weight, stored, rank: 0, element, integers: head.integers, backward };
                add(product, chunks);
            }
            add(Operation::Loss { vocab: head.vocab, element }, times * n as f64);
        }
        for (part, sizes) in &passes.plain_products.linear {
            add(Operation::Linear { part: *part, sizes: *sizes }, times);
        }
        // The optimizer reads and writes a parameter and its moments and reads its gradient, once more for the norm.
        let optimizer = FLOAT * 5 * self.trainable();
        Work {
            operations,
            bytes: times * passes.pools.traffic as f64 + optimizer as f64,
            plain: (times, passes.ledger.traffic),
            plain_products: times * (passes.plain_products.forward + passes.plain_products.backward),
        }
    }

    /// Bytes of the embedding, if it lies in a file and nothing but tokens is looked up in it: it is frozen, and the head has another
    /// weight or multiplies with a rounded copy.
    fn looked_up_bytes(&self, head_is_rounded: bool) -> Option<usize> {
        let embedding = self.sketch.index(EMBEDDING)?;
        let is_tied = self.sketch.architecture.tie_word_embeddings;
        let alone = self.is_frozen(embedding) && (!is_tied || head_is_rounded);
        alone.then(|| self.module(embedding).bytes())
    }

    /// What the plan says of a parameter.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }
}

/// Bytes of a file that come to memory around one that is read: Linux maps so many of those that it has at hand.
const READ_AROUND: f64 = 65_536.0;

/// The share of a table of so many bytes that is in memory once so many tokens were looked up in it, if they lie anywhere in it.
fn share_read(bytes: usize, tokens: usize) -> f64 {
    let windows = (bytes as f64 / READ_AROUND).max(1.0);
    1.0 - (-(tokens as f64) / windows).exp()
}

/// The stream as a buffer.
fn into_buffer(stream: Stream, pools: &mut Pools, ledger: &mut Ledger, tensor: usize, c: usize) -> Held {
    match stream {
        Stream::Buffer(held) => held,
        Stream::Tensor => {
            let held = pools.wide(c);
            ledger.give(tensor);
            held
        }
    }
}
