//! Numbers and results of scripts: what is refused before it costs anything, and what a training that ends badly leaves.

use anyhow::{Context, Result};
use serde_json::json;

use crate::pipelines::{Place, TRAIN};
use crate::support::loss;

#[test]
fn numbers_of_a_script_that_no_training_can_go_by_are_refused() -> Result<()> {
    let place = Place::new()?;
    let error = |options: &str| {
        place.error(&format!(
            "{TRAIN}return homeroom.fine_tune {{ model = model, dataset = data.train, steps = 1, {options} }}"
        ))
    };
    for (options, words) in [
        ("learning_rate = 1e38", "`learning_rate` should be a number above 0 and at most 10, not 1000"),
        ("learning_rate = 0/0", "`learning_rate` should be a number above 0 and at most 10"),
        ("lora_alpha = 0/0", "`lora_alpha` should be a number above 0"),
        ("lora_dropout = 0/0", "`lora_dropout` should be a number from 0 and below 1"),
        // Those that go to the strategy by a table have no type here, and JSON has no word for them.
        ("options = { lora_alpha = 0/0 }", "`lora_alpha` should be a finite number"),
        ("options = { lora_dropout = 1/0 }", "`lora_dropout` should be a finite number, not inf"),
        ("options = { rank_pattern = { q_proj = 0/0 } }", "`rank_pattern` should be a table from text to number"),
        ("lora_alpha = 1e300", "it is a number above 0 that f32 holds"),
        ("r = 100000", "q_proj: a rank of 100000 is above both its widths"),
        (
            "batch_size = 2^53, gradient_accumulation_steps = 2^53",
            "batch_size 9007199254740992 times gradient_accumulation_steps 9007199254740992 is more than can be counted",
        ),
        ("batch_size = 2^54", "`batch_size` should be a whole number from 1"),
    ] {
        let error = error(options)?;
        assert!(error.contains(words) && error.contains("s.lua:3"), "{options}: {error}");
    }
    let epochs = place
        .error(&format!("{TRAIN}return homeroom.fine_tune {{ model = model, dataset = data.train, epochs = 2^53 }}"))?;
    assert!(epochs.contains("9007199254740992 epochs of 3 steps are too many"), "{epochs}");
    let model = place.error(
        "local model = homeroom.load_model { name = params.model }\nmodel.options.lora_alpha = 0/0\n\
         local data = homeroom.prepare_dataset { path = params.dataset }\n\
         return homeroom.fine_tune { model = model, dataset = data.train, steps = 1 }",
    )?;
    assert!(model.contains("`lora_alpha` should be a finite number"), "{model}");
    Ok(())
}

/// A callback that scales the rate of the fourth update beyond all measure: the script's line, and what three steps had learned.
#[test]
fn a_training_of_a_script_that_ends_badly_keeps_what_it_had_learned() -> Result<()> {
    let place = Place::new()?;
    let error = place.error(&format!(
        "{TRAIN}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 9, learning_rate = 5e-3, \
         on_step = function(report) if report.step == 3 then return {{ learning_rate_scale = 1e40 }} end end }}\n\
         return homeroom.save_model {{ model = tuned, name = \"never\" }}"
    ))?;
    assert!(error.contains("s.lua:3") && error.contains("fine_tune: step 5: the loss is"), "{error}");
    let (_, path) = error.split_once("what it had learned by step 3 is in ").context("it says where")?;
    let path = std::path::PathBuf::from(path.lines().next().unwrap_or_default().trim());
    assert!(path.starts_with(place.home().join("runs")), "{error}");
    assert!(!place.home().join("models/never").exists());
    assert!(loss(&path, &place.path("rows.jsonl"))? > 0.0);
    Ok(())
}

/// What is evaluated before training is what training begins with: the base as the strategy stores it.
#[test]
fn a_model_that_is_not_trained_is_measured_as_its_strategy_stores_it() -> Result<()> {
    let place = Place::new()?;
    let result = place.result(
        "local data = homeroom.prepare_dataset { path = params.dataset, eval = 0.25 }\n\
         local function measure(strategy)\n\
         local model = homeroom.load_model { name = params.model, strategy = strategy, r = 4 }\n\
         local before = homeroom.evaluate { model = model, dataset = data.eval }\n\
         local tuned = homeroom.fine_tune { model = model, dataset = data.train, eval = data.eval, steps = 1 }\n\
         return { evaluated = before.loss, began_with = tuned.metrics.eval_loss_before }\nend\n\
         local named = homeroom.evaluate { model = params.model, dataset = data.eval }\n\
         return { lora = measure(\"lora\"), qlora = measure(\"qlora\"), int8 = measure(\"int8\"), named = named.loss }",
    )?;
    let number =
        |at: &str| result.pointer(at).and_then(serde_json::Value::as_f64).with_context(|| format!("{at}: {result}"));
    for strategy in ["lora", "qlora", "int8"] {
        let (evaluated, began) =
            (number(&format!("/{strategy}/evaluated"))?, number(&format!("/{strategy}/began_with"))?);
        assert!((evaluated - began).abs() < 1e-6 * began, "{strategy}: {evaluated} {began}");
    }
    // A name says no strategy, and is measured as its files are.
    assert_eq!(result["named"], result["lora"]["evaluated"]);
    assert!((number("/qlora/evaluated")? - number("/named")?).abs() > 1e-3, "{result}");
    assert_ne!(result["int8"], json!(result["lora"]));
    Ok(())
}

/// A held-out loss that is no number ends the training at that step, with what it had before, and says so at the script's line.
#[test]
fn an_evaluation_between_steps_that_fails_keeps_what_was_learned() -> Result<()> {
    let place = Place::new()?;
    let error = place.error(&format!(
        "{TRAIN}homeroom.fine_tune {{ model = model, dataset = data.train, eval = data.eval, steps = 9, eval_every = 2, \
         learning_rate = 5e-3, schedule = \"constant\", warmup = 0, lora_alpha = 4, \
         on_step = function(report) if report.step == 1 then return {{ learning_rate_scale = 1e40 }} end end }}"
    ))?;
    assert!(error.contains("s.lua:3") && error.contains("fine_tune: step 2: the loss after its update is"), "{error}");
    assert!(error.contains("what it had learned by step 1 is in "), "{error}");
    Ok(())
}
