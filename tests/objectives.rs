//! Objectives against TRL, step by step, and in every strategy.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::data::{Encoder, Group, OnLongRow, Reading, Source, load_groups};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{
    Kind, Objective, ObjectiveConfig, Prepare, RewardSums, UnitLogProbs, Weighed, prepare, reference_log_probs,
};
use homeroom_engine::train::{Control, Data, State, StepReport, TrainConfig, TrainReport, evaluate_units, train};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::pipelines;
use crate::support::{Place, adapt_stored, eval, fixture, printed_json, refused, succeeds};

fn read_json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
}

fn model() -> Result<BaseModel> {
    BaseModel::load(&fixture("objectives/model"))
}

fn init(model: &BaseModel) -> Result<Adaptation> {
    AdapterFiles::read(&fixture("objectives/init"))?.adapt(model, true)
}

/// The rows of the fixture for an objective.
fn groups(model: &BaseModel, kind: Kind) -> Result<Vec<Group>> {
    let file = match kind {
        Kind::Kto => "objectives/rated.jsonl",
        Kind::Dpo | Kind::Orpo => "objectives/preference.jsonl",
        Kind::Sft => "rows/colours.jsonl",
    };
    let encoder = Encoder {
        tokenizer: &model.tokenizer,
        template: model.template.as_ref(),
        embeddings: model.architecture.vocab_size,
        max_seq_len: model.architecture.max_position_embeddings,
        on_long_row: OnLongRow::Refuse,
    };
    let files = [Source::file(fixture(file))];
    let mark = |groups: &mut [Group]| kind.mark(groups);
    let mut groups = load_groups(&files, &Reading::default(), encoder, kind.rows(), kind.name(), mark)?.examples;
    groups.truncate(11);
    Ok(groups)
}

/// Trains and returns the report.
fn run(
    model: &BaseModel,
    adaptation: &Adaptation,
    data: &Data<'_>,
    objective: &dyn Objective,
    config: &TrainConfig,
) -> Result<TrainReport> {
    let state = State::new(model, adaptation, config);
    let mut go_on = |_: &StepReport, _: u64| Ok(Control::Continue);
    Ok(train(model, state, data, objective, config, &mut go_on)?.report)
}

fn steps_of_4(max_steps: u64, compute: Compute) -> TrainConfig {
    TrainConfig {
        max_steps: Some(max_steps),
        batch_size: 4,
        learning_rate: 8e-3,
        warmup_ratio: 0.0,
        shuffle: false,
        compute,
        ..TrainConfig::default()
    }
}

/// A case of the fixture.
fn case(name: &str) -> Result<Value> {
    read_json(&fixture(&format!("objectives/{name}.json")))
}

/// Trains as the case says, by an objective made from the rows, and compares every step with TRL's.
fn check(
    name: &str,
    make: impl Fn(&BaseModel, &Adaptation, &TrainConfig, &[&Group], &Value) -> Result<Box<dyn Objective>>,
) -> Result<()> {
    let case = case(name)?;
    let steps = case["steps"].as_array().context("a case has steps")?;
    let kind = case["config"]["objective"].as_str().filter(|kind| *kind != "ipo").unwrap_or("dpo").parse()?;
    for compute in [Compute::F32, Compute::Plain] {
        let model = model()?;
        let groups = groups(&model, kind)?;
        let groups: Vec<&Group> = groups.iter().collect();
        let adaptation = init(&model)?;
        let config = steps_of_4(steps.len() as u64, compute);
        let objective = make(&model, &adaptation, &config, &groups, &case["config"])?;
        let report = run(&model, &adaptation, &Data::of_groups(&groups, &[]), &*objective, &config)?;
        ensure!(report.steps.len() == steps.len(), "{} steps", report.steps.len());
        let mut apart = 0_f64;
        for (number, (got, want)) in report.steps.iter().zip(steps).enumerate() {
            let rewards = got.rewards.context("a step has rewards")?;
            for (what, got, bound) in [
                ("loss", got.loss, 1e-4),
                ("grad_norm", got.grad_norm, 1e-3),
                ("learning_rate", got.learning_rate, 1e-9),
                ("rewards/chosen", rewards.chosen, 1e-3),
                ("rewards/rejected", rewards.rejected, 1e-3),
                ("rewards/margins", rewards.margin, 1e-3),
                ("rewards/accuracies", rewards.accuracy, 1e-6),
            ] {
                // Of rated answers TRL reports no accuracy. With equal rewards it depends on rounding.
                let Some(want) = want[what].as_f64() else { continue };
                if what == "rewards/accuracies" && rewards.margin.abs() < 1e-3 {
                    continue;
                }
                let difference = (got - want).abs() / want.abs().max(1.0);
                ensure!(difference <= bound, "{name}, step {number}: {what} is {got}, TRL has {want}");
                if what == "loss" {
                    apart = apart.max(difference);
                }
            }
        }
        println!("{name}, {}: losses are at most {apart:.1e} apart", compute.name());
    }
    Ok(())
}

/// The objective of this program that the case names.
fn ours(
    model: &BaseModel,
    adaptation: &Adaptation,
    config: &TrainConfig,
    groups: &[&Group],
    case: &Value,
) -> Result<Box<dyn Objective>> {
    let options = &case["options"];
    let option = |key: &str, default: f64| options[key].as_f64().unwrap_or(default);
    let kind: Kind = case["objective"].as_str().context("a case has an objective")?.parse()?;
    let objective = ObjectiveConfig {
        objective: kind,
        beta: option("beta", 0.1),
        desirable_weight: option("desirable_weight", 1.0),
        undesirable_weight: option("undesirable_weight", 1.0),
    };
    let reference = (case["reference"] == "adapter").then_some(adaptation);
    let (adaptation, train) = (Some(adaptation), groups);
    let from = Prepare { objective, train, held_out: &[], model, adaptation, reference, config, kept: None };
    prepare(&from, &mut |_, _| Ok(()))
}

#[test]
fn dpo_learns_as_in_trl() -> Result<()> {
    check("dpo", ours)?;
    check("dpo-base", ours)
}

#[test]
fn kto_learns_as_in_trl() -> Result<()> {
    check("kto", ours)?;
    check("kto-weighted", ours)
}

#[test]
fn orpo_learns_as_in_trl() -> Result<()> {
    check("orpo", ours)?;
    check("orpo-strong", ours)
}

/// IPO by tokens, `(h − 1/2β)²`, h being the difference of the mean log ratios of a token.
///
/// Source: Azar et al. 2023, <https://arxiv.org/abs/2310.12036>, equation 17. `∂/∂c = 2 (h − 1/2β)` for the chosen mean.
struct Ipo {
    beta: f64,
    reference: Vec<f64>,
}

impl Objective for Ipo {
    fn name(&self) -> &'static str {
        "ipo"
    }

    fn count(&self, targets: &[Vec<usize>]) -> usize {
        targets.len()
    }

    fn weigh(&self, units: &[UnitLogProbs<'_>], n: usize, _: f64) -> Result<Weighed> {
        let (mut weighed, mut rewards) = (Weighed::default(), RewardSums::default());
        for unit in units {
            let pair = unit.pair()?;
            let first = 2 * unit.number as usize;
            let ratios = [0, 1].map(|k| pair[k].iter().sum::<f64>() - self.reference[first + k]);
            let [chosen, rejected] = [0, 1].map(|k| ratios[k] / pair[k].len() as f64);
            let short = chosen - rejected - 0.5 / self.beta;
            weighed.add(pair[0].len(), -2.0 * short / (pair[0].len() * n) as f64);
            weighed.add(pair[1].len(), 2.0 * short / (pair[1].len() * n) as f64);
            weighed.loss_sum += short * short;
            rewards.add_pair(self.beta * ratios[0], self.beta * ratios[1]);
        }
        weighed.rewards = Some(rewards);
        Ok(weighed)
    }
}

/// All that another objective takes is its `impl`.
#[test]
fn a_fifth_objective_is_one_impl_and_learns_as_in_trl() -> Result<()> {
    check("ipo", |model, adaptation, config, groups, case| {
        let sequences: Vec<_> = groups.iter().flat_map(|group| &group.sequences).collect();
        let reference = reference_log_probs(model, Some(adaptation), &sequences, config.compute, &mut |_| Ok(()))?;
        Ok(Box::new(Ipo { beta: case["options"]["beta"].as_f64().context("ipo has a beta")?, reference }))
    })
}

const PREFERRING: [Kind; 3] = [Kind::Dpo, Kind::Kto, Kind::Orpo];

/// Also of a shuffled run with its rows held out, and whatever takes part in a pass.
#[test]
fn how_a_step_is_cut_changes_no_loss() -> Result<()> {
    for kind in PREFERRING {
        let losses = |batch_size, accumulation, packing, checkpointing, shuffle| -> Result<Vec<f64>> {
            let model = model()?;
            let groups = groups(&model, kind)?;
            let groups: Vec<&Group> = groups.iter().collect();
            let (groups, held_out) = groups.split_at(8);
            let adaptation = init(&model)?;
            let config = TrainConfig {
                batch_size,
                gradient_accumulation_steps: accumulation,
                packing,
                gradient_checkpointing: checkpointing,
                shuffle,
                eval_steps: Some(2),
                load_best_model_at_end: false,
                ..steps_of_4(6, Compute::F32)
            };
            let from = Prepare {
                objective: ObjectiveConfig::of(kind),
                train: groups,
                held_out,
                model: &model,
                adaptation: Some(&adaptation),
                reference: None,
                config: &config,
                kept: None,
            };
            let objective = prepare(&from, &mut |_, _| Ok(()))?;
            let report = run(&model, &adaptation, &Data::of_groups(groups, held_out), &*objective, &config)?;
            let evaluations = report.evaluations.iter().map(|report| report.evaluation.loss);
            Ok(report.steps.iter().map(|step| step.loss).chain(evaluations).collect())
        };
        for shuffle in [false, true] {
            let whole = losses(4, 1, true, false, shuffle)?;
            assert_eq!(whole.len(), 6 + 4, "steps, and evaluations before, between and after them");
            assert_eq!(losses(4, 1, true, true, shuffle)?, whole, "what is computed again is the same");
            for (batch_size, accumulation, packing) in [(2, 2, false), (1, 4, false), (2, 2, true)] {
                let cut = losses(batch_size, accumulation, packing, false, shuffle)?;
                let apart = whole.iter().zip(&cut).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(apart < 1e-4, "{}: {batch_size} by {accumulation}: {apart}", kind.name());
            }
        }
    }
    Ok(())
}

#[test]
fn every_strategy_learns_by_every_objective() -> Result<()> {
    for strategy in ["lora", "qlora", "int8", "full"] {
        for kind in [Kind::Sft, Kind::Dpo, Kind::Kto, Kind::Orpo] {
            let options = if strategy == "full" { json!({}) } else { json!({"r": 3, "target_modules": "all-linear"}) };
            let (model, adaptation) = adapt_stored(strategy, &options, model()?, 1)?;
            let groups = groups(&model, kind)?;
            let groups: Vec<&Group> = groups.iter().collect();
            let (groups, held_out) = groups.split_at(8);
            let config = TrainConfig { learning_rate: 3e-3, ..steps_of_4(12, Compute::F32) };
            let from = Prepare {
                objective: ObjectiveConfig::of(kind),
                train: groups,
                held_out,
                model: &model,
                adaptation: Some(&adaptation),
                reference: None,
                config: &config,
                kept: None,
            };
            let objective = prepare(&from, &mut |_, _| Ok(()))?;
            let data = Data::of_groups(groups, held_out);
            let report = run(&model, &adaptation, &data, &*objective, &config)?;
            let losses: Vec<f64> = report.steps.iter().map(|step| step.loss).collect();
            let what = format!("{strategy}, {}: {losses:?}", kind.name());
            // Two steps meet every row once.
            assert!(losses[10] + losses[11] < losses[0] + losses[1], "{what}");
            let before = report.before().context("held-out rows are measured")?;
            let rewards = report.steps[11].rewards;
            assert_eq!(rewards.is_some(), kind != Kind::Sft, "{what}");
            assert_eq!(before.rewards.is_some(), kind != Kind::Sft, "{what}");
            match kind {
                // A fresh adapter is its reference.
                Kind::Dpo => {
                    assert!((losses[0] - 2f64.ln()).abs() < 1e-4 && (before.loss - 2f64.ln()).abs() < 1e-4, "{what}")
                }
                Kind::Kto => assert!((losses[0] - 0.5).abs() < 1e-4 && (before.loss - 0.5).abs() < 1e-4, "{what}"),
                Kind::Sft | Kind::Orpo => {}
            }
            if let Some(rewards) = rewards {
                assert!(rewards.margin > 0.0 && rewards.accuracy > 0.5, "{what}: {rewards:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_reference_is_computed_once_and_kept_under_what_it_is_of() -> Result<()> {
    let place = tempdir()?;
    let path = place.path().join("reference.safetensors");
    let model = model()?;
    let adaptation = init(&model)?;
    let groups = groups(&model, Kind::Kto)?;
    let groups: Vec<&Group> = groups.iter().collect();
    let (groups, held_out) = groups.split_at(8);
    let config = steps_of_4(3, Compute::F32);
    let made = |name: &str, adapted_reference: bool| -> Result<(usize, f64)> {
        let from = Prepare {
            objective: ObjectiveConfig::of(Kind::Kto),
            train: groups,
            held_out,
            model: &model,
            adaptation: Some(&adaptation),
            reference: adapted_reference.then_some(&adaptation),
            config: &config,
            kept: Some((&path, name)),
        };
        let mut passes = 0;
        let objective = prepare(&from, &mut |done, all| {
            assert!(done <= all && all == 22);
            passes += 1;
            Ok(())
        })?;
        let data = Data::of_groups(groups, held_out);
        let evaluation = evaluate_units(&model, Some(&adaptation), &data.held_out, &*objective, Compute::F32, |_| {})?;
        Ok((passes, evaluation.loss))
    };
    let (passes, loss) = made("base", false)?;
    assert!(passes > 0);
    assert_eq!(made("base", false)?, (0, loss), "it is read");
    let (passes, other) = made("adapter", true)?;
    assert!(passes > 0 && other != loss, "another reference is computed");
    std::fs::write(&path, b"half")?;
    assert_eq!(made("base", false)?.1, loss, "a damaged file is none");
    Ok(())
}

/// What is drawn depends on the row and its place, not on how a step is cut nor on the backend, and nothing is drawn to evaluate.
#[test]
fn noise_on_embeddings_is_drawn_alike_however_a_step_is_run() -> Result<()> {
    let run = |neftune_noise_alpha, packing, gradient_checkpointing, compute| -> Result<(Vec<f64>, f64)> {
        let model = model()?;
        let groups = groups(&model, Kind::Dpo)?;
        let groups: Vec<&Group> = groups.iter().collect();
        let (groups, held_out) = groups.split_at(8);
        let adaptation = init(&model)?;
        let batch_size = if packing { 4 } else { 2 };
        let config = TrainConfig {
            neftune_noise_alpha,
            packing,
            batch_size,
            gradient_accumulation_steps: 4 / batch_size,
            gradient_checkpointing,
            ..steps_of_4(4, compute)
        };
        let from = Prepare {
            objective: ObjectiveConfig::of(Kind::Dpo),
            train: groups,
            held_out,
            model: &model,
            adaptation: Some(&adaptation),
            reference: Some(&adaptation),
            config: &config,
            kept: None,
        };
        let objective = prepare(&from, &mut |_, _| Ok(()))?;
        let report = run(&model, &adaptation, &Data::of_groups(groups, held_out), &*objective, &config)?;
        let before = report.before().context("held-out rows are measured")?.loss;
        Ok((report.steps.iter().map(|step| step.loss).collect(), before))
    };
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let (plain, before) = run(0.0, true, false, Compute::F32)?;
    let (noisy, noisy_before) = run(5.0, true, false, Compute::F32)?;
    assert!((plain[0] - 2f64.ln()).abs() < 1e-6 && (noisy[0] - 2f64.ln()).abs() > 1e-3, "{plain:?} {noisy:?}");
    assert_eq!(before, noisy_before);
    assert_eq!(run(5.0, true, true, Compute::F32)?.0, noisy);
    for (packing, compute) in [(false, Compute::F32), (true, Compute::Plain)] {
        let other = run(5.0, packing, false, compute)?.0;
        assert!(apart(&other, &noisy) < 1e-4, "{packing}, {}: {other:?} {noisy:?}", compute.name());
    }
    Ok(())
}

/// The program in a place of its own, with a home of its own.
fn fine_tune(place: &Place, rows: &str) -> Command {
    let mut command = place.fine_tune(&fixture("objectives/model"), &fixture(rows));
    command.env("HOMEROOM_HOME", place.path("home"));
    command
}

#[test]
fn the_program_learns_by_each_objective_and_measures_by_it() -> Result<()> {
    for (objective, rows, options, rate) in [
        ("dpo", "objectives/preference.jsonl", json!({"beta": 0.3}), 2e-5),
        (
            "kto",
            "objectives/rated.jsonl",
            json!({"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 1.0}),
            2e-5,
        ),
        ("orpo", "objectives/preference.jsonl", json!({"beta": 0.3}), 1e-4),
    ] {
        let place = Place::new()?;
        let mut command = fine_tune(&place, rows);
        command.args(["--objective", objective, "--beta", "0.3", "--neftune-noise-alpha", "2", "--max-steps", "4"]);
        command.args(["--eval-every", "2", "--keep-last", "--json", "--eval-file"]).arg(fixture(rows));
        if objective == "kto" {
            command.args(["--desirable-weight", "1.25"]);
        }
        let ran = succeeds(&mut command)?;
        let said = format!("objective {objective}   beta 0.3");
        ensure!(ran.stderr.contains(&said) && ran.stderr.contains("% judged right"), "{}", ran.stderr);
        let summary = printed_json(&ran)?;
        ensure!(summary["eval_reward_accuracy"].is_number() && summary["eval_loss"].is_number(), "{summary}");
        let out = place.path("outputs/out");
        let training = read_json(&out.join("homeroom.json"))?["training"].clone();
        assert_eq!(training["objective"], objective);
        assert_eq!(training["objective_options"], options);
        assert_eq!(training["config"]["neftune_noise_alpha"], 2.0);
        assert!(
            (training["config"]["learning_rate"].as_f64().unwrap_or_default() / rate - 1.0).abs() < 1e-9,
            "{training}"
        );
        let history = read_json(&out.join("trainer_state.json"))?["log_history"].clone();
        assert!(
            history[0]["rewards/margins"].is_number() && history[2]["eval_rewards/accuracies"].is_number(),
            "{history}"
        );
        let reference = place.path("home/runs").join(summary["run"].as_str().context("a run has an id")?);
        let reference = reference.join("trainings/1/reference.safetensors");
        assert_eq!(reference.exists(), objective != "orpo");

        let mut measure = eval(&out, &fixture(rows));
        measure.args(["--objective", objective, "--beta", "0.3"]);
        if objective == "kto" {
            measure.args(["--desirable-weight", "1.25"]);
        }
        let measured = printed_json(&succeeds(&mut measure)?)?;
        let (got, want) = (measured["loss"].as_f64(), summary["eval_loss"].as_f64());
        let apart = got.zip(want).map_or(f64::NAN, |(got, want)| (got - want).abs());
        assert!(apart < 1e-5, "{objective}: {measured} {summary}");
        assert_eq!(measured["rewards"]["accuracy"], summary["eval_reward_accuracy"]);
    }
    Ok(())
}

#[test]
fn rows_and_options_of_another_objective_are_refused_with_the_one_to_choose() -> Result<()> {
    let place = Place::new()?;
    let (preference, rated, plain) = ("objectives/preference.jsonl", "objectives/rated.jsonl", "rows/colours.jsonl");
    let check =
        |rows: &str, arguments: &[&str], words: &[&str]| refused(fine_tune(&place, rows).args(arguments), words);
    check(
        preference,
        &[],
        &["all 11 rows: has `chosen` and `rejected`: rows for dpo or orpo; sft learns", "--objective"],
    )?;
    check(rated, &[], &["rows: has a `label` that rates its completion: rows for kto; sft learns"])?;
    check(
        plain,
        &["--objective", "dpo"],
        &["rows for sft; dpo learns from rows with `prompt`, `chosen` and `rejected`"],
    )?;
    check(preference, &["--objective", "kto"], &["rows for dpo or orpo; kto learns", "`label` (true or false)"])?;
    check(plain, &["--beta", "0.2"], &["objective sft: `beta` is an option of dpo, kto and orpo"])?;
    check(preference, &["--objective", "dpo", "--desirable-weight", "2"], &["`desirable_weight` is an option of kto"])?;
    refused(
        eval(&fixture("objectives/model"), &fixture(preference)).args(["--objective", "dpo"]),
        &["dpo measures an adapter against its base"],
    )
}

#[test]
fn scripts_choose_an_objective_and_hear_its_accuracy() -> Result<()> {
    let place = pipelines::Place::new()?;
    std::fs::copy(fixture("objectives/rated.jsonl"), place.path("rated.jsonl"))?;
    let script = |options: &str| {
        format!(
            "local model = homeroom.load_model {{ name = params.model, r = 2 }}\n\
             local data = homeroom.prepare_dataset {{ path = \"rated.jsonl\", eval = 0.3 }}\n\
             local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, eval = data.eval, max_steps = 2, {options} }}\n\
             return tuned.metrics"
        )
    };
    let metrics =
        place.result(&script("objective = \"kto\", beta = 0.2, desirable_weight = 1.2, neftune_noise_alpha = 5"))?;
    ensure!(metrics["eval_reward_accuracy"].is_number() && metrics["eval_loss"].is_number(), "{metrics}");
    let error = place.error(&script("beta = 0.2"))?;
    ensure!(error.contains("objective sft: `beta` is an option of dpo, kto and orpo"), "{error}");
    let error = place.error(&script("objective = \"dpo\""))?;
    ensure!(error.contains("rows for kto; dpo learns from rows with"), "{error}");
    let error = place.error(&script("objective = \"ppo\""))?;
    ensure!(error.contains("`objective` should be \"sft\" or \"dpo\" or \"kto\" or \"orpo\""), "{error}");
    Ok(())
}
