//! `homeroom bench train`: training on random tokens.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use homeroom_abi::plan::ModuleKind;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::requantize::{StoredAs, store_as};
use homeroom_engine::data::{Example, Unit};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::{Batch, pass_rows};
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::profile;
use homeroom_engine::train::{Run, TrainConfig};
use homeroom_kernels::{Stream, bf16_register_loop_gflops, f32_register_loop_gflops, isa, threads};
use serde_json::{Map, Value, json};

use super::super::arguments::{COMPUTE, COUNT_MAX, PluginArgs, Word, key_value, one_of, whole};
use super::super::{Done, print};
use super::median;
use crate::job::{Job, encode};
use crate::machine::peak_memory_bytes;
use crate::models::{Network, Use, load_base, locate, refuse_other, shown};
use crate::processor;
use crate::progress::line;

/// Arguments of `bench train`.
#[derive(Args)]
pub struct Arguments {
    /// Base model: a name on the Hugging Face hub as `owner/name`, a directory, a .gguf file, or a name from `homeroom list-models`
    #[arg(long, value_name = "MODEL")]
    model_name: PathBuf,
    /// Training strategy; `homeroom plugins list` shows what there is
    #[arg(long, default_value = "lora", value_name = "NAME")]
    strategy: String,
    /// Rank of the adapter [default: 16]
    #[arg(long, alias = "r", value_name = "R", value_parser = whole::<u64>(0..=u64::MAX))]
    lora_r: Option<u64>,
    /// Any other option of the strategy, its value as JSON or text; may be repeated
    #[arg(long = "set-option", value_name = "KEY=VALUE", value_parser = key_value)]
    options: Vec<(String, Value)>,
    /// Rows of one step
    #[arg(long, default_value = "4", value_name = "ROWS", value_parser = whole::<u32>(1..=COUNT_MAX))]
    batch_size: u32,
    /// Tokens of one row
    #[arg(long, default_value = "256", value_name = "TOKENS", value_parser = whole::<usize>(2..=u64::MAX))]
    seq_len: usize,
    /// Steps that are timed
    #[arg(long, default_value = "5", value_name = "N", value_parser = whole::<u32>(1..=STEPS_MAX))]
    steps: u32,
    /// Steps before those
    #[arg(long, default_value = "2", value_name = "N", value_parser = whole::<u32>(0..=STEPS_MAX))]
    warmup: u32,
    /// Number format of the products
    #[arg(long, default_value = "auto", value_name = "FORMAT", value_parser = one_of::<Compute>(&COMPUTE))]
    compute: Compute,
    /// Storage of the base [default: as its files have it]
    #[arg(long, value_name = "STORAGE", value_parser = one_of::<StoredAs>(&STORAGES))]
    storage: Option<StoredAs>,
    /// Keep only the input of each layer, and compute the layer again in the backward pass
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Print the time that each operation takes
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const STEPS_MAX: u64 = 999_999;

const STORAGES: [Word; 4] = [
    ("bf16", "All weights as 16-bit floats"),
    ("f32", "All weights as 32-bit floats"),
    ("nf4", "Linear layers as 4-bit NormalFloat in blocks of 64, with double quantisation"),
    ("int8", "Linear layers as 8-bit integers by rows"),
];

/// Trains on random tokens.
pub fn train(arguments: &Arguments) -> Result<Done> {
    let plugin = arguments.plugins.search()?.load(&arguments.strategy)?;
    let mut options: Map<String, Value> = arguments.options.iter().cloned().collect();
    if let Some(r) = arguments.lora_r {
        options.insert("r".to_owned(), r.into());
    }
    plugin.check_options(&options)?;
    // Rows of a pass are counted in 32 bits.
    let tokens = (arguments.batch_size as usize).checked_mul(arguments.seq_len);
    ensure!(
        tokens.is_some_and(|tokens| u32::try_from(tokens).is_ok()),
        "--batch-size {} times --seq-len {} are more tokens than a step can have, {}",
        arguments.batch_size,
        arguments.seq_len,
        u32::MAX
    );
    let base = locate(&arguments.model_name, Network::Allowed)?;
    refuse_other(&arguments.model_name, &base.path, Use::Measuring)?;
    let mut model = Arc::new(load_base(&base)?);
    if let Some(storage) = &arguments.storage {
        model = encode(|kept, progress| store_as(&model, storage, kept, progress).map(Arc::new))?;
    }
    let job = Job::new(model, &plugin, options, 42, None, false)?;
    let compute = arguments.compute.resolved(Some(&job.adaptation));
    let config = TrainConfig {
        batch_size: arguments.batch_size as usize,
        gradient_checkpointing: arguments.gradient_checkpointing,
        compute,
        ..TrainConfig::default()
    };
    line(format_args!(
        "model     {}   {:.1} M parameters, {}",
        shown(&job.model, &arguments.model_name),
        job.model.parameter_count() as f64 / 1e6,
        job.model.storage_words()
    ));
    line(format_args!("strategy  {}   {}", job.strategy.name, job.blocks(compute)));
    line(processor::words());
    let steps = arguments.warmup + arguments.steps;
    let measured = Measured::run(&job, arguments, &config, u64::from(steps))?;
    // The limit is asked for before and after, as the machine may be busy with something else for a while.
    let limit = || match compute {
        Compute::Bf16 | Compute::Int8 if isa().has_bf16() => bf16_register_loop_gflops(),
        _ => f32_register_loop_gflops(),
    };
    let limit = limit().max(limit());
    let seconds = median(&measured.seconds);
    let tokens = (arguments.batch_size as usize * arguments.seq_len) as f64;
    let gflops = measured.operations / seconds / 1e9;
    let share = gflops / limit;
    let peak = measured.peak_memory_bytes;
    if arguments.json {
        let operations = measured
            .profile
            .iter()
            .map(|operation| json!({"name": operation.name, "seconds": operation.seconds, "calls": operation.calls}));
        let json = json!({
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": measured.seconds,
            "gflops": gflops,
            "register_loop_gflops": limit,
            "share_of_register_loop": share,
            "peak_memory_bytes": peak,
            "compute": compute.name(),
            "storage": job.model.storage_words(),
            "blocks": job.blocks(compute),
            "cpu": isa().name(),
            "threads": threads(),
            "loss": measured.loss,
            "profile": operations.collect::<Vec<_>>(),
        });
        print(&json.to_string())?;
        return Ok(Done::Whole);
    }
    let memory = peak.map_or_else(|| "unknown".to_owned(), |bytes| format!("{:.2} GB", bytes as f64 / 1e9));
    print(&format!(
        "speed     {:.0} tokens/s   {seconds:.3} s a step, {} steps after {} of warm-up\n\
         products  {gflops:.0} GFLOP/s   {:.0} % of {limit:.0} on registers alone ({}, {} threads)\n\
         memory    {memory} at the highest",
        tokens / seconds,
        arguments.steps,
        arguments.warmup,
        100.0 * share,
        isa().name(),
        threads(),
    ))?;
    for operation in &measured.profile {
        let part = operation.seconds / f64::from(arguments.steps);
        print(&format!("  {:<22} {:8.1} ms   {:4.1} %", operation.name, 1e3 * part, 100.0 * part / seconds))?;
    }
    Ok(Done::Whole)
}

/// What was measured.
struct Measured {
    /// Of each step after the warm-up.
    seconds: Vec<f64>,
    /// Floating-point operations of a step.
    operations: f64,
    loss: f64,
    profile: Vec<profile::Operation>,
    peak_memory_bytes: Option<u64>,
}

impl Measured {
    fn run(job: &Job, arguments: &Arguments, config: &TrainConfig, steps: u64) -> Result<Self> {
        let mut run = Run::new(&job.model, &job.adaptation, config, steps);
        let mut random = Stream::new(config.seed, 7);
        let (mut seconds, mut loss, mut profile) = (Vec::new(), f64::NAN, Vec::new());
        for step in 0..steps {
            let examples: Vec<Example> = (0..arguments.batch_size)
                .map(|_| {
                    let ids = (0..arguments.seq_len)
                        .map(|_| random.below(job.model.architecture.vocab_size) as u32)
                        .collect();
                    Example::new(ids, vec![true; arguments.seq_len], 0)
                })
                .collect();
            let units: Vec<Unit> = (0..).zip(&examples).map(|(number, example)| Unit::of(number, example)).collect();
            let batches = Batch::packed(&units, pass_rows(&job.model));
            if arguments.profile && step == u64::from(arguments.warmup) {
                profile::start();
            }
            let start = Instant::now();
            loss = run.step(&batches).context("a step of the benchmark")?.loss;
            if step >= u64::from(arguments.warmup) {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        if arguments.profile {
            profile = profile::finish();
        }
        let rows = (arguments.batch_size as usize * (arguments.seq_len - 1)) as f64;
        let operations = rows * operations_per_row(&job.model, &job.adaptation);
        Ok(Self { seconds, operations, loss, profile, peak_memory_bytes: peak_memory_bytes() })
    }
}

/// Floating-point operations that training takes for a row: two for each frozen value of a linear module forward and two
/// backward, six for each trained one. Attention, norms and recomputation are not counted.
fn operations_per_row(model: &BaseModel, adaptation: &Adaptation) -> f64 {
    let linear = model.modules.iter().filter(|module| module.info.kind == ModuleKind::Linear);
    let frozen: usize = linear.map(|module| module.info.d_in * module.info.d_out).sum();
    4.0 * frozen as f64 + 6.0 * adaptation.trainable_count() as f64
}
