//! What `fine-tune` says: what it is about to do, and what came of it.

use std::path::Path;

use homeroom_engine::data::note_endless;
use homeroom_engine::data::report::{PLACES_NAMED, Survey};
use homeroom_engine::train::objective::{Kind, ObjectiveConfig, Rewards};
use homeroom_engine::train::{TrainConfig, TrainReport};

use super::arguments::Arguments;
use super::{Inputs, Rows};
use crate::command::rows::{named, tell as tell_files};
use crate::data_report;
use crate::interrupt;
use crate::job::{Job, Sample, defaults, training_words};
use crate::models::shown;
use crate::processor;
use crate::progress::{line, millions, thousands};
use crate::registry;

/// Restates the run, so that a wrong one is seen before it has cost anything.
pub(super) fn restate(
    arguments: &Arguments,
    objective: ObjectiveConfig,
    job: &Job,
    rows: &Rows,
    config: &TrainConfig,
    steps: u64,
) {
    let Job { model, adaptation, strategy, .. } = job;
    let parameters = model.parameter_count();
    let trained = adaptation.trainable_count();
    let share = 100.0 * trained as f64 / parameters as f64;
    line(format_args!(
        "model     {}   {:.1} M parameters, {}",
        shown(model, &arguments.model_name),
        parameters as f64 / 1e6,
        model.storage_words()
    ));
    line(format_args!(
        "strategy  {} {}   {} trained ({share:.2} %) in {} modules   {}",
        strategy.name,
        strategy.version,
        millions(trained),
        adaptation.plan.modules.len(),
        job.blocks(config.compute),
    ));
    line(processor::words());
    if objective.objective != Kind::Sft {
        let reference = match (objective.objective.has_reference(), &job.init_from) {
            (false, _) => "",
            (true, None) => "   held to the base",
            (true, Some(_)) => "   held to the adapter that it starts from",
        };
        line(format_args!("objective {}{reference}", objective.words()));
    }
    if let Some(note) = defaults::balance(objective, &rows.train()) {
        line(format_args!("note: {note}"));
    }
    let held_out = rows.eval().len();
    let held_out = if held_out > 0 { format!(", {} held out", thousands(held_out)) } else { String::new() };
    let left_out = match (rows.data.skipped, rows.data.truncated) {
        (0, 0) => String::new(),
        (skipped, 0) => format!(", {skipped} left out as too long"),
        (_, truncated) => format!(", {truncated} cut to length"),
    };
    let how = match model.template {
        Some(_) => "by the model's chat template",
        None => "as plain text",
    };
    tell_files(&rows.data);
    rows.eval_file.iter().for_each(tell_files);
    line(format_args!(
        "data      {}   {} examples{held_out}{left_out}, {how}",
        named(&arguments.training_file),
        thousands(rows.train.len()),
    ));
    if let Some(note) = note_endless(rows.data.endless, rows.data.examples.len()) {
        line(note);
    }
    line(training_words(steps, config));
    if steps < STEPS_FEW && arguments.max_steps.is_none() && arguments.epochs.is_some_and(|epochs| epochs < EPOCHS_MANY)
    {
        let steps = if steps == 1 { "one step teaches".to_owned() } else { format!("{steps} steps teach") };
        line(format_args!("note: {steps} a model little; more rows or epochs do more"));
    }
}

/// Says what was found in the rows that should be looked at: a line each, and no reason to stop.
pub(super) fn tell_findings(arguments: &Arguments, sources: &Inputs, rows: &Rows) {
    let held_lines = rows.held_lines();
    let (encoder, context, hold_out, check) = (None, usize::MAX, None, &interrupt::stop_if_asked);
    let survey = Survey { encoder, context, hold_out, shown: 0, named: PLACES_NAMED, check };
    // The rows have been read once; what ends this reading ends the training as well, and is heard of there.
    if let Ok((report, _)) = survey.run(&Rows::source(arguments, sources, &held_lines)) {
        data_report::lines(&report).for_each(line);
    }
}

/// Who asks for so many epochs knows.
const EPOCHS_MANY: u64 = 10;
/// Fewer steps than these leave little trace at the default learning rate, which is said.
const STEPS_FEW: u64 = 30;

/// How often the better answer is preferred, in words; nothing of an objective without rewards.
pub(super) fn rewards(rewards: Option<Rewards>) -> String {
    rewards.map_or_else(String::new, |rewards| format!("   {:.0} % judged right", 100.0 * rewards.accuracy))
}

/// What was written, and what to do next.
pub(super) fn tell(path: &Path, run: Option<&str>, report: &TrainReport, samples: &[Sample]) {
    if let (Some(before), Some(after)) = (report.before(), report.after()) {
        let right = rewards(after.rewards);
        line(format_args!("held-out  loss {:.4} before, {:.4} after{right}", before.loss, after.loss));
    }
    if let (Some(before), Some(after)) = (report.before(), report.after())
        && after.loss > before.loss
    {
        line(format_args!(
            "note: the held-out loss has risen: what was learned does not carry over to these rows; try fewer epochs, a lower --learning-rate or more rows"
        ));
    }
    if let Some(why) = &report.stopped {
        line(format_args!("stopped   {why}"));
    }
    if let Some(step) = report.kept_step {
        line(format_args!("result    of step {step}, the best on the held-out rows; --keep-last keeps the last"));
    }
    samples.iter().for_each(Sample::tell);
    let done = report.steps.len();
    line(format_args!("saved     {}", path.display()));
    if report.interrupted {
        line(format_args!(
            "stopped after step {done} of {}; what it had learned by then is saved",
            report.planned_steps
        ));
        line(match run {
            Some(run) => format!("next      homeroom resume {run}"),
            None => format!("next      train it further: the same command with --init-from {}", registry::short(path)),
        });
    } else {
        line(format_args!("next      homeroom chat --model-dir {} --prompt \"...\"", registry::short(path)));
    }
}
