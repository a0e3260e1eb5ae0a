//! `fine-tune --dry-run`: what a training would do, take and learn; nothing is trained or written.

use anyhow::{Context, Result};
use homeroom_abi::plan::PlanRequest;
use homeroom_engine::data::Group;
use homeroom_engine::data::report::{PLACES_NAMED, Survey};
use homeroom_engine::estimate::{Measured, Request, Sketch};
use homeroom_engine::memory;
use homeroom_engine::models::BaseModel;
use homeroom_engine::train::objective::Kind;
use homeroom_engine::train::{TrainConfig, planned_steps};
use homeroom_kernels::{isa, threads};
use serde_json::json;

use super::arguments::config;
use super::{Prepared, Rows};
use crate::command::plan::{a_step, duration};
use crate::command::preview::{Look, Rendered, render, rows_as_text};
use crate::command::{Done, print};
use crate::data_report;
use crate::interrupt;
use crate::job::{Before, Estimator, fit, training_words};
use crate::models::{encoder, shown};
use crate::plugin::Plugin;
use crate::progress::{millions, size, thousands};
use crate::stdout::Stdout;
use crate::terminal;

/// Rows that are shown.
const SHOWN: usize = 2;

/// What a training takes.
struct Needs {
    seconds: f64,
    seconds_per_step: f64,
    peak_memory_bytes: u64,
    /// What there was for it before anything was tried out.
    available_memory_bytes: Option<u64>,
    /// Where that is too little: flags by which the same steps fit, and what they take then.
    fits: Option<(String, u64)>,
    trainable: usize,
}

/// Says what the training would do.
pub(super) fn run(prepared: &Prepared<'_>, model: &BaseModel, rows: Rows) -> Result<Done> {
    let Prepared { arguments, objective, output_dir, plugin, options, sources, .. } = prepared;
    let plugin = plugin.as_ref().context("a dry run goes on with no earlier one")?;
    let plan = plugin.plan(&PlanRequest { options: options.clone(), model: model.info() })?;
    let config = config(arguments, plan.defaults.learning_rate, Some(rows.train.len()));
    let steps = planned_steps(rows.train.len(), &config)?;
    // Of the other objectives passes over a reference come on top.
    let sizes = (objective.objective == Kind::Sft).then(|| Sizes::of(&rows.train(), model, &config));
    let (examples, held_out, held_lines) = (rows.train.len(), rows.eval().len(), rows.held_lines());
    let of_file = |(name, words)| format!("data      {name}   {words}\n");
    let recognised: String = rows.data.recognised().into_iter().map(of_file).collect();
    // What follows takes memory of its own, and the report reads them anew.
    drop(rows);
    let needs = sizes.map(|sizes| needs(prepared, plugin, model, sizes, steps)).transpose()?;
    let source = Rows::source(arguments, sources, &held_lines);
    let encoder = encoder(model, arguments.rows.max_seq_len, arguments.rows.on_long_row)?;
    let survey = Survey {
        encoder: Some(encoder),
        context: model.architecture.max_position_embeddings,
        hold_out: None,
        shown: SHOWN,
        // Who reads JSON counts on all of them.
        named: if arguments.json { usize::MAX } else { PLACES_NAMED },
        check: &interrupt::stop_if_asked,
    };
    let (report, first) = survey.run(&source)?;
    let first: Vec<Rendered> =
        first.iter().map(|row| render(row, &report, &model.tokenizer, Some(encoder.max_seq_len))).collect();
    let available = needs.as_ref().map_or_else(memory::obtainable, |needs| needs.available_memory_bytes);
    if arguments.json {
        let json = json!({
            "dry_run": true,
            "model": shown(model, &arguments.model_name),
            "strategy": arguments.strategy,
            "output_dir": output_dir.to_string_lossy(),
            "examples": examples,
            "held_out": held_out,
            "steps": steps,
            "seconds_per_step": needs.as_ref().map(|needs| needs.seconds_per_step),
            "seconds": needs.as_ref().map(|needs| needs.seconds),
            "peak_memory_bytes": needs.as_ref().map(|needs| needs.peak_memory_bytes),
            "available_memory_bytes": available,
            "config": config,
            "rows": first,
            "report": report,
        });
        return print(&json.to_string()).map(|()| Done::Whole);
    }
    let mut out = format!(
        "model     {}   {} parameters, {}\n",
        shown(model, &arguments.model_name),
        millions(model.parameter_count()),
        model.storage_words()
    );
    let trained = needs.as_ref().map(|needs| format!("   {} trained", millions(needs.trainable)));
    out += &format!("strategy  {}{}\n", arguments.strategy, trained.unwrap_or_default());
    if objective.objective != Kind::Sft {
        out += &format!("objective {}\n", objective.words());
    }
    let held_out = match held_out {
        0 => String::new(),
        held_out => format!(", {} held out", thousands(held_out)),
    };
    out += &format!("examples  {}{held_out}\n{}\n", thousands(examples), training_words(steps, &config));
    if let Some(needs) = &needs {
        let fits = match available {
            Some(available) if needs.peak_memory_bytes > available => {
                let less = match &needs.fits {
                    Some((flags, peak)) if arguments.fit => format!("--fit takes `{flags}`: about {}", size(*peak)),
                    Some((flags, peak)) => format!("`{flags}` takes about {}, and --fit chooses so", size(*peak)),
                    None => "`homeroom plan` says what needs less".to_owned(),
                };
                format!("   too much: {} can be had; {less}", size(available))
            }
            Some(available) => format!("   {} can be had", size(available)),
            None => String::new(),
        };
        out += &format!(
            "time      {}, {}   ({}, {} threads, measured now; evaluations and saving come on top)\nmemory    about {}{fits}\n",
            duration(needs.seconds),
            a_step(needs.seconds_per_step),
            isa().name(),
            threads(),
            size(needs.peak_memory_bytes),
        );
    }
    out += &recognised;
    out += &format!("saves     {}\n", output_dir.display());
    out += &data_report::whole(&report);
    let rows = rows_as_text(&first, Look::of_stdout());
    let all = format!("{}{rows}\ndry run   nothing was trained or written\n", terminal::shown(&out));
    crate::command::preview::print_shown(&mut Stdout, &all)?;
    Ok(Done::Whole)
}

/// What is asked of rows to say what they take.
struct Sizes {
    /// Tokens of a row, on average.
    mean: usize,
    /// What it takes to learn them, if all were as long as the longest.
    request: Request,
    /// The memory of the process while it has them.
    before: Before,
}

impl Sizes {
    fn of(rows: &[&Group], model: &BaseModel, config: &TrainConfig) -> Self {
        let lengths = rows.iter().flat_map(|group| &group.sequences).map(|sequence| sequence.ids.len());
        let mean = (lengths.sum::<usize>() as f64 / rows.len().max(1) as f64).round() as usize;
        let before = Before::now(model);
        Self { mean, request: fit::request(rows, config, before.program_bytes()), before }
    }
}

fn needs(prepared: &Prepared<'_>, plugin: &Plugin, model: &BaseModel, rows: Sizes, steps: u64) -> Result<Needs> {
    let Prepared { arguments, options, .. } = prepared;
    let Sizes { mean, request, before } = rows;
    let sketch = Sketch::of_model(model);
    let requantize = arguments.passes.requantize;
    let estimator = Estimator::new(plugin, options, &sketch, requantize)?;
    let estimate = estimator.estimate(&request);
    let peak_memory_bytes = estimate.peak_memory_bytes;
    let fits = before.lacking(peak_memory_bytes).and_then(|there| fit::fitting(&estimator, &request, there));
    // Memory is that of the longest rows, time that of all.
    let usual = Request { row_tokens: mean.max(2), trained_tokens: mean.max(2), ..request };
    let usual = estimator.estimate(&usual);
    let seconds_per_step = Measured::new().seconds(&usual.work)?;
    Ok(Needs {
        seconds: steps as f64 * seconds_per_step,
        seconds_per_step,
        peak_memory_bytes,
        available_memory_bytes: before.available(),
        fits: fits.map(|(fitting, peak)| (fit::flags(&request, &fitting), peak)),
        trainable: estimate.trainable,
    })
}
