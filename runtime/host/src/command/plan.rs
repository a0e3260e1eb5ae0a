//! `homeroom plan`: what a training needs, before it is begun.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::Args;
use homeroom_engine::data::{OnLongRow, Source};
use homeroom_engine::estimate::{Estimate, Measured, Parts, Request};
use homeroom_engine::memory;
use homeroom_engine::train::objective::Kind;
use homeroom_engine::train::{TrainConfig, planned_steps};
use homeroom_kernels::{isa, threads, use_threads};
use serde_json::{Map, Value, json};

use super::arguments::{COUNT_MAX, PluginArgs, whole};
use super::rows::{self, ReadArgs};
use super::strategy::{PassArgs, StrategyArgs};
use super::{Done, print};
use crate::job::defaults::{self, Open};
use crate::job::{Estimator, fit};
use crate::machine::{mapped_memory_bytes, resident_memory_bytes};
use crate::models::{Network, Sketched, load_rows, longest_row};
use crate::plugin::Plugin;
use crate::progress::{line, millions, size, thousands};
use crate::table::{Column, lines};

/// Arguments of `plan`.
#[derive(Args)]
pub struct Arguments {
    /// Base model: a name on the Hugging Face hub as `owner/name`, of which its config.json alone is read; a directory, a .gguf file, or a name from `homeroom list-models`
    #[arg(long, value_name = "MODEL")]
    model_name: PathBuf,
    /// Training strategy [default: all that are installed, one a line]
    #[arg(long, value_name = "NAME")]
    strategy: Option<String>,
    /// Rows of one batch [default: 8, fewer where there are fewer than 64 rows]
    #[arg(long, value_name = "ROWS", value_parser = whole::<u32>(1..=COUNT_MAX))]
    batch_size: Option<u32>,
    /// Batches of one step [default: 1]
    #[arg(long, value_name = "N", value_parser = whole::<u32>(1..=COUNT_MAX))]
    gradient_accumulation_steps: Option<u32>,
    /// Tokens of each row [default: of the longest row of the training file; else the model's context, at most 2048]
    #[arg(long, alias = "seq-len", value_name = "TOKENS", value_parser = whole::<usize>(2..=COUNT_MAX))]
    max_seq_len: Option<usize>,
    #[command(flatten)]
    strategy_options: StrategyArgs,
    #[command(flatten)]
    passes: PassArgs,
    /// Rows to train on, for the time of the whole training
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1..=COUNT_MAX), conflicts_with = "training_file")]
    rows: Option<usize>,
    /// Files of rows, whose number and lengths count; the model's tokenizer has to be here
    #[arg(long, value_name = "FILE", num_args = 1..)]
    training_file: Vec<PathBuf>,
    #[command(flatten)]
    read: ReadArgs,
    /// Passes over the rows [default: as `fine-tune` chooses by their number]
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    epochs: Option<u64>,
    /// Plan for so much memory, such as 12GB, as on another machine [default: what can be had here now]
    #[arg(long, value_name = "SIZE", value_parser = a_size)]
    memory: Option<u64>,
    /// Plan for so many threads of this processor, as a training with RAYON_NUM_THREADS has [default: all]
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1..=THREADS_MAX))]
    threads: Option<usize>,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// More threads than any machine has.
const THREADS_MAX: u64 = 4096;

fn a_size(text: &str) -> Result<u64, String> {
    memory::bytes_of(text)
        .filter(|bytes| *bytes >= 1_000_000)
        .ok_or_else(|| "it takes a size such as 12GB or 800MB".to_owned())
}

/// Estimates.
pub fn run(arguments: &Arguments) -> Result<Done> {
    if let Some(count) = arguments.threads {
        ensure!(use_threads(count), "--threads: the threads are running already");
    }
    let search = arguments.plugins.search()?;
    let options = arguments.strategy_options.options()?;
    let plugins: Vec<Plugin> = match &arguments.strategy {
        Some(name) => {
            let plugin = search.load(name)?;
            plugin.check_options(&options)?;
            vec![plugin]
        }
        None => {
            let mut plugins = Vec::new();
            for file in search.list() {
                match search.load_file(&file) {
                    Ok((plugin, _)) => plugins.push(plugin),
                    Err(error) => line(format_args!("note: {} is left out: {error:#}", file.name)),
                }
            }
            ensure!(
                !plugins.is_empty(),
                "no strategy can be loaded\nhint: `homeroom plugins list` shows where they are looked for"
            );
            plugins
        }
    };
    let base = Sketched::find(&arguments.model_name, Network::Allowed)?;
    let rows = Rows::of(arguments, &base)?;
    let (program_bytes, mapped) = (resident_memory_bytes().unwrap_or(0), mapped_memory_bytes());
    // What this program has already is its own.
    let all = memory::limit().unwrap_or(u64::MAX);
    let obtainable = memory::obtainable().map(|free| free.saturating_add(program_bytes).min(all));
    let machine = match arguments.memory {
        Some(budget) => Machine { available: Some(budget), total: None },
        None => Machine { available: obtainable, total: memory::limit() },
    };
    if base.model.is_none() {
        line("note: the model's tokenizer is not here, so that its memory is left out");
    }
    let request = Request {
        batch_size: match (arguments.batch_size, arguments.gradient_accumulation_steps, arguments.epochs) {
            (Some(rows), ..) => rows as usize,
            // As `fine-tune` chooses.
            (None, None, None) => rows.count.map_or(defaults::BATCH, defaults::batch_size),
            _ => defaults::BATCH,
        },
        gradient_accumulation_steps: arguments.gradient_accumulation_steps.unwrap_or(1) as usize,
        row_tokens: rows.longest,
        trained_tokens: rows.longest,
        gradient_checkpointing: arguments.passes.gradient_checkpointing,
        packing: !arguments.passes.no_packing,
        pass_rows: arguments.passes.pass_tokens,
        compute: arguments.passes.compute,
        program_bytes,
    };
    let planner = Planner { arguments, base: &base, request, rows: &rows, machine };
    let mut measured = Measured::new();
    let mut outlooks = Vec::new();
    for plugin in &plugins {
        // With several strategies each gets the options that it has.
        let own = if arguments.strategy.is_some() { options.clone() } else { own_options(plugin, &options) };
        match planner.outlook(plugin, &own, &mut measured) {
            Ok(outlook) => outlooks.push((plugin.description.name.clone(), outlook)),
            Err(error) if arguments.strategy.is_none() => {
                line(format_args!("note: {} is left out: {error:#}", plugin.description.name));
            }
            Err(error) => return Err(error),
        }
    }
    // What was measured has touched the pages of the program that training touches.
    let touched = mapped_memory_bytes().zip(mapped).map_or(0, |(now, before)| now.saturating_sub(before));
    for (_, Outlook { estimate, .. }) in &mut outlooks {
        estimate.parts.program += touched;
        estimate.peak_memory_bytes = estimate.parts.total();
    }
    let fits = outlooks.iter().any(|(_, outlook)| machine.fits(outlook.estimate.peak_memory_bytes) != Some(false));
    let changes = if fits { Vec::new() } else { planner.changes(&plugins, &options, &mut measured) };
    let smaller = if fits { None } else { planner.smaller_base() };
    if arguments.json {
        let of_strategy = arguments.strategy.as_deref();
        let changes: Vec<Value> = changes.iter().map(|change| change.json(of_strategy)).collect();
        let mut all = outlooks.iter().map(|(name, outlook)| planner.json(name, outlook));
        let json = match arguments.strategy {
            Some(_) => all.next().unwrap_or_default(),
            None => json!({"model": base.shown, "strategies": all.collect::<Vec<Value>>()}),
        };
        let mut json = json;
        json["changes"] = changes.into();
        json["smaller_base_parameters"] = smaller.into();
        print(&json.to_string())?;
        return Ok(Done::Whole);
    }
    planner.head()?;
    match &outlooks[..] {
        [(name, outlook)] if arguments.strategy.is_some() => planner.whole(name, outlook)?,
        all => planner.table(all)?,
    }
    if !fits {
        planner.tell_changes(&changes, smaller)?;
    }
    Ok(Done::Whole)
}

/// The rows that a training goes through.
struct Rows {
    /// How many, if that is known.
    count: Option<usize>,
    /// Tokens of the longest.
    longest: usize,
    /// Tokens of all together over their number.
    mean: f64,
}

impl Rows {
    fn of(arguments: &Arguments, base: &Sketched) -> Result<Self> {
        let context = base.sketch.architecture.max_position_embeddings;
        let longest = longest_row(context, arguments.max_seq_len)?;
        let paths = &arguments.training_file;
        if paths.is_empty() {
            return Ok(Self { count: arguments.rows, longest, mean: longest as f64 });
        }
        let Some(model) = &base.model else {
            bail!(
                "{}: its rows cannot be counted in tokens, as the tokenizer of {} is not here\nhint: give --rows and --max-seq-len instead, or `homeroom pull` the model",
                rows::named(paths),
                base.shown
            )
        };
        let files = rows::to_learn_from(paths, Source::standard_input)?.files;
        let reading = arguments.read.reading();
        let data = load_rows(&files, &reading, model, arguments.max_seq_len, OnLongRow::Truncate, Kind::Sft)?;
        rows::tell(&data);
        let lengths = data.examples.iter().flat_map(|group| &group.sequences).map(|example| example.ids.len());
        let (count, sum) = (data.examples.len(), lengths.clone().sum::<usize>());
        Ok(Self { count: Some(count), longest: lengths.max().unwrap_or(2), mean: sum as f64 / count.max(1) as f64 })
    }
}

/// The memory that there is.
#[derive(Clone, Copy)]
struct Machine {
    available: Option<u64>,
    total: Option<u64>,
}

impl Machine {
    /// Whether so much can be had now; `None`: the system does not say.
    fn fits(&self, bytes: u64) -> Option<bool> {
        self.available.map(|available| bytes <= available)
    }
}

/// What one strategy comes to.
struct Outlook {
    estimate: Estimate,
    /// Tokens of a pass, where nothing else is said.
    pass_rows: usize,
    seconds_per_step: f64,
    /// Of a row as long as rows are on the average.
    tokens_per_second: f64,
    /// Steps of the whole training with its epochs, if the rows are known.
    steps: Option<(u64, u64)>,
}

struct Planner<'a> {
    arguments: &'a Arguments,
    base: &'a Sketched,
    request: Request,
    rows: &'a Rows,
    machine: Machine,
}

impl Planner<'_> {
    fn outlook(&self, plugin: &Plugin, options: &Map<String, Value>, measured: &mut Measured) -> Result<Outlook> {
        let estimator = self.estimator(plugin, options)?;
        let estimate = estimator.estimate(&self.request);
        // Memory is that of the longest rows, time that of all.
        let mean = (self.rows.mean.round() as usize).max(2);
        let usual = if mean == self.request.row_tokens {
            estimate.clone()
        } else {
            estimator.estimate(&Request { row_tokens: mean, trained_tokens: mean, ..self.request })
        };
        let seconds_per_step = measured.seconds(&usual.work)?;
        let tokens_per_second = usual.tokens_per_step as f64 / seconds_per_step;
        let steps = self.rows.count.map(|rows| self.steps(rows)).transpose()?;
        let pass_rows = estimator.pass_rows();
        Ok(Outlook { estimate, pass_rows, seconds_per_step, tokens_per_second, steps })
    }

    fn estimator(&self, plugin: &Plugin, options: &Map<String, Value>) -> Result<Estimator> {
        Estimator::new(plugin, options, &self.base.sketch, self.arguments.passes.requantize)
    }

    /// Steps over so many rows, and the epochs.
    fn steps(&self, rows: usize) -> Result<(u64, u64)> {
        let mut config = TrainConfig {
            batch_size: self.request.batch_size,
            gradient_accumulation_steps: self.request.gradient_accumulation_steps,
            epochs: self.arguments.epochs.unwrap_or(1),
            ..TrainConfig::default()
        };
        defaults::choose(&mut config, Open { epochs: self.arguments.epochs.is_none(), batch_size: false }, rows);
        Ok((planned_steps(rows, &config)?, config.epochs))
    }

    fn json(&self, strategy: &str, outlook: &Outlook) -> Value {
        let Outlook { estimate, pass_rows, seconds_per_step, tokens_per_second, steps } = outlook;
        let peak = estimate.peak_memory_bytes;
        json!({
            "model": self.base.shown,
            "strategy": strategy,
            "peak_memory_bytes": peak,
            "parts": estimate.parts,
            "seconds_per_step": seconds_per_step,
            "tokens_per_second": tokens_per_second,
            "tokens_per_step": estimate.tokens_per_step,
            "passes_per_step": estimate.passes_per_step,
            "steps": steps.map(|(steps, _)| steps),
            "epochs": steps.map(|(_, epochs)| epochs),
            "seconds": steps.map(|(steps, _)| steps as f64 * seconds_per_step),
            "fits": self.machine.fits(peak),
            "available_memory_bytes": self.machine.available,
            "memory_bytes": self.machine.total,
            "parameters": estimate.parameters,
            "trainable": estimate.trainable,
            "storage": estimate.storage,
            "compute": estimate.compute,
            "fused_layers": estimate.fused_layers.0,
            "layers": estimate.fused_layers.1,
            "batch_size": self.request.batch_size,
            "gradient_accumulation_steps": self.request.gradient_accumulation_steps,
            "max_seq_len": self.request.row_tokens,
            "gradient_checkpointing": self.request.gradient_checkpointing,
            "pass_tokens": self.request.pass_rows.unwrap_or(*pass_rows),
            "cpu": isa().name(),
            "threads": threads(),
        })
    }

    fn head(&self) -> Result<()> {
        let sketch = &self.base.sketch;
        print(&format!(
            "model     {}   {} parameters, {}",
            self.base.shown,
            millions(sketch.parameter_count()),
            sketch.storage_words()
        ))?;
        let Request { batch_size, gradient_accumulation_steps, row_tokens, .. } = self.request;
        let count = self.rows.count.map(|count| format!("{}, ", thousands(count))).unwrap_or_default();
        print(&format!(
            "rows      {count}{gradient_accumulation_steps} x {batch_size} a step, of {} tokens",
            thousands(row_tokens)
        ))
    }

    fn whole(&self, name: &str, outlook: &Outlook) -> Result<()> {
        let Outlook { estimate, seconds_per_step, tokens_per_second, steps, .. } = outlook;
        let (fused, layers) = estimate.fused_layers;
        let plain = if fused == layers {
            String::new()
        } else {
            format!("; {} of {layers} layers plain in f32", layers - fused)
        };
        print(&format!(
            "strategy  {name}   {} trained, base in {}, products in {}{plain}",
            millions(estimate.trainable),
            estimate.storage,
            estimate.compute
        ))?;
        print(&format!("memory    {} at the highest", size(estimate.peak_memory_bytes)))?;
        for (part, bytes) in parts(&estimate.parts) {
            print(&format!("  {part:<22} {:>8}", size(bytes)))?;
        }
        print(&format!(
            "time      {}   {} tokens/s   ({}, {} threads, measured now)",
            a_step(*seconds_per_step),
            thousands(tokens_per_second.round() as usize),
            isa().name(),
            threads()
        ))?;
        if let Some((steps, epochs)) = steps {
            let of = if *epochs == 1 { "1 epoch".to_owned() } else { format!("{epochs} epochs") };
            print(&format!(
                "training  {} steps in {of}   {}",
                thousands(*steps as usize),
                duration(*steps as f64 * seconds_per_step)
            ))?;
        }
        self.verdict(estimate.peak_memory_bytes)
    }

    fn verdict(&self, peak: u64) -> Result<()> {
        let Some(available) = self.machine.available else { return Ok(()) };
        let of = self.machine.total.map(|total| format!(" of {}", size(total))).unwrap_or_default();
        let of = if self.arguments.memory.is_some() { " by --memory".to_owned() } else { of };
        match peak <= available {
            true => print(&format!("fits      {} can be had{of}", size(available))),
            false => {
                print(&format!("too much  {} can be had{of}: it lacks {}", size(available), size(peak - available)))
            }
        }
    }

    fn table(&self, outlooks: &[(String, Outlook)]) -> Result<()> {
        let columns = [(false, 0), (true, 0), (true, 0), (true, 2), (true, 3), (false, 1)];
        let columns = columns.map(|(right, spare)| Column { right, spare });
        let header = [
            "strategy",
            "memory",
            "a step",
            "tokens/s",
            "trained",
            if self.arguments.memory.is_some() { "by --memory" } else { "on this machine" },
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for (name, outlook) in outlooks {
            let peak = outlook.estimate.peak_memory_bytes;
            let fits = match self.machine.fits(peak) {
                Some(true) => "fits".to_owned(),
                Some(false) => "too much".to_owned(),
                None => "unknown".to_owned(),
            };
            let time = outlook.steps.map(|(steps, _)| duration(steps as f64 * outlook.seconds_per_step));
            rows.push(vec![
                name.clone(),
                size(peak),
                a_step(outlook.seconds_per_step).replace(" a step", ""),
                thousands(outlook.tokens_per_second.round() as usize).to_string(),
                millions(outlook.estimate.trainable),
                time.map_or(fits.clone(), |time| format!("{fits}, {time}")),
            ]);
        }
        lines(&columns, &rows, None).iter().try_for_each(|line| print(line))
    }

    /// What can be changed so that it fits, those first that cost least: the same steps in less memory, by their time; another strategy, or
    /// storage of the base; shorter rows, where nothing else would do. Each is estimated.
    fn changes(&self, plugins: &[Plugin], options: &Map<String, Value>, measured: &mut Measured) -> Vec<Change> {
        let Some(available) = self.machine.available else { return Vec::new() };
        let search = self.arguments.plugins.search().ok();
        let named = |name: &str| plugins.iter().any(|plugin| plugin.description.name == name);
        let others = OTHERS.iter().filter(|name| !named(name));
        let others: Vec<Plugin> =
            others.filter_map(|name| search.as_ref().and_then(|search| search.load(name).ok())).collect();
        let known: Vec<(&str, Estimator)> = plugins
            .iter()
            .chain(&others)
            .filter_map(|plugin| {
                let estimator = self.estimator(plugin, &own_options(plugin, options)).ok()?;
                Some((plugin.description.name.as_str(), estimator))
            })
            .collect();
        // Ways to go through the steps of a request that fit, itself first.
        let ways = |request: Request, (name, estimator): &(&str, Estimator)| -> Vec<Change> {
            let all = std::iter::once(request).chain(fit::less(&request, estimator.pass_rows()));
            let all = all.map(|request| self.change(&request, name, estimator.estimate(&request)));
            all.filter(|change| change.estimate.peak_memory_bytes <= available).take(WAYS).collect()
        };
        let mut changes = Vec::new();
        for one in &known {
            let mut same = ways(self.request, one);
            if named(one.0) {
                same.iter_mut().for_each(|change| change.measure(measured));
                same.sort_by(|a, b| a.seconds_per_step.total_cmp(&b.seconds_per_step));
            }
            changes.extend(same.into_iter().take(if named(one.0) && plugins.len() == 1 { SHOWN } else { 1 }));
        }
        let shorter = [2, 4, 8].map(|divisor| self.request.row_tokens / divisor);
        for tokens in shorter.into_iter().filter(|tokens| *tokens >= SHORTEST) {
            if !changes.is_empty() {
                break;
            }
            let request = Request { row_tokens: tokens, trained_tokens: tokens, ..self.request };
            changes.extend(known.iter().find_map(|one| ways(request, one).into_iter().next()));
        }
        changes.iter_mut().filter(|change| change.seconds_per_step == 0.0).for_each(|change| change.measure(measured));
        changes
    }

    /// A request with a strategy, and what it takes.
    fn change(&self, request: &Request, strategy: &str, estimate: Estimate) -> Change {
        let mut flags = fit::flags(&self.request, request);
        if self.arguments.strategy.as_deref() != Some(strategy) {
            flags = format!("--strategy {strategy} {flags}").trim_end().to_owned();
        }
        let keeps_rows = request.row_tokens == self.request.row_tokens;
        Change { strategy: strategy.to_owned(), flags, keeps_rows, estimate, seconds_per_step: 0.0 }
    }

    /// How many parameters a base of this shape may have, with fewer layers, so that the least that is known fits: a base in 4 bits, one
    /// row a pass, layers computed again. `None`: not even one layer fits, or all do.
    fn smaller_base(&self) -> Option<usize> {
        let available = self.machine.available?;
        let plugin = self.arguments.plugins.search().ok()?.load(SMALLEST).ok()?;
        let request = Request { gradient_checkpointing: true, pass_rows: Some(1), ..self.request };
        let peak = |layers: usize| {
            let sketch = self.base.sketch.of_layers(layers);
            let estimator = Estimator::new(&plugin, &Map::new(), &sketch, self.arguments.passes.requantize).ok()?;
            let estimate = estimator.estimate(&request);
            Some((estimate.peak_memory_bytes, estimate.parameters))
        };
        let (mut low, mut high) = (0, self.base.sketch.architecture.layers.len());
        if peak(high)?.0 <= available {
            return None;
        }
        while low + 1 < high {
            let middle = usize::midpoint(low, high);
            if peak(middle)?.0 <= available { low = middle } else { high = middle }
        }
        (low > 0).then(|| peak(low).map(|(_, parameters)| parameters)).flatten()
    }

    /// Says what would fit.
    fn tell_changes(&self, changes: &[Change], smaller: Option<usize>) -> Result<()> {
        let columns = [(false, 0), (false, 0), (true, 0), (true, 0), (false, 1)];
        let columns = columns.map(|(right, spare)| Column { right, spare });
        let rows: Vec<Vec<String>> = changes
            .iter()
            .enumerate()
            .map(|(at, change)| {
                vec![
                    if at == 0 { "to fit  " } else { "" }.to_owned(),
                    change.flags.clone(),
                    size(change.estimate.peak_memory_bytes),
                    a_step(change.seconds_per_step),
                    change.effect(self.arguments.strategy.as_deref()).to_owned(),
                ]
            })
            .collect();
        if !rows.is_empty() {
            lines(&columns, &rows, None).iter().try_for_each(|line| print(line))?;
        }
        if changes.iter().any(|change| change.keeps_rows) {
            return Ok(());
        }
        print(&match smaller {
            Some(parameters) => format!(
                "hint: a smaller base: of this shape one of about {} parameters fits, by strategy {}",
                billions(parameters),
                SMALLEST
            ),
            None => "hint: no setting that was tried fits; close other programs, or choose a smaller model".to_owned(),
        })
    }
}

/// Strategies that may take less than the one that was asked for: an adapter, and those that store a base in 8 bits and in 4.
const OTHERS: [&str; 3] = ["lora", "int8", SMALLEST];
/// The one that takes the least.
const SMALLEST: &str = "qlora";
/// Ways to go through the same steps that are measured,
const WAYS: usize = 4;
/// and that are shown.
const SHOWN: usize = 2;
/// Rows are not cut to fewer tokens.
const SHORTEST: usize = 64;

/// A change that makes a training fit.
struct Change {
    strategy: String,
    /// What is typed for it.
    flags: String,
    keeps_rows: bool,
    estimate: Estimate,
    /// 0 until it is measured.
    seconds_per_step: f64,
}

impl Change {
    fn measure(&mut self, measured: &mut Measured) {
        // What cannot be measured is no reason not to name it.
        self.seconds_per_step = measured.seconds(&self.estimate.work).unwrap_or(f64::MAX);
    }

    /// What it does to what is learned. `strategy`: the one that was asked for.
    fn effect(&self, strategy: Option<&str>) -> &'static str {
        match (self.keeps_rows, strategy == Some(&*self.strategy) || strategy.is_none()) {
            (false, _) => "longer rows are cut",
            (true, true) => "the same steps",
            (true, false) if self.strategy == OTHERS[0] => "an adapter",
            (true, false) => "an adapter, the base in fewer bits",
        }
    }

    fn json(&self, strategy: Option<&str>) -> Value {
        json!({
            "flags": self.flags,
            "strategy": self.strategy,
            "effect": self.effect(strategy),
            "peak_memory_bytes": self.estimate.peak_memory_bytes,
            "seconds_per_step": self.seconds_per_step,
        })
    }
}

/// Those of these options that a strategy has.
fn own_options(plugin: &Plugin, options: &Map<String, Value>) -> Map<String, Value> {
    let has = |name: &str| plugin.description.options.iter().any(|option| option.name == name);
    options.iter().filter(|(name, _)| has(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// A number of parameters, in words.
fn billions(parameters: usize) -> String {
    match parameters {
        ..1_000_000_000 => millions(parameters),
        _ => format!("{:.1} B", parameters as f64 / 1e9),
    }
}

/// The parts of the memory, the largest first.
fn parts(parts: &Parts) -> Vec<(&'static str, u64)> {
    let Parts { weights, parameters, moments, gradients, activations, logits, scratch, allocator, program } = *parts;
    let mut named = vec![
        ("weights of the base", weights),
        ("trained parameters", parameters),
        ("moments", moments),
        ("gradients", gradients),
        ("activations", activations),
        ("logits", logits),
        ("scratch of kernels", scratch),
        ("kept by the allocator", allocator),
        ("the program", program),
    ];
    named.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    named
}

/// The time of a step, in words.
pub(super) fn a_step(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.0} ms a step", 1e3 * seconds) } else { format!("{seconds:.1} s a step") }
}

/// A time, in words.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        ..60.0 => format!("about {:.0} s", seconds.max(1.0)),
        60.0..7200.0 => format!("about {:.0} min", seconds / 60.0),
        _ => format!("about {:.1} h", seconds / 3600.0),
    }
}
