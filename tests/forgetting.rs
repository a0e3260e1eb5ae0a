//! Forgetting: measured against transformers and against plain logits, told by the command line and by scripts, and a gate of pipelines.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use homeroom::job::ForgettingRows;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::data::Example;
use homeroom_engine::forgetting::{Forgetting, OwnRow, forgetting, own_rows};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::backends::trainer;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::recipe::Pass;
use serde_json::{Value, json};

use crate::invariants::examples;
use crate::pipelines::{Place, TRAIN};
use crate::support::{
    self, adapt, distance, fixture, homeroom, model, plugin_path, printed_json, root, shake, succeeds,
};

fn measure(
    base: &BaseModel,
    tuned: &BaseModel,
    adaptation: Option<&Adaptation>,
    rows: &[Example],
) -> Result<Forgetting> {
    let rows: Vec<&Example> = rows.iter().collect();
    forgetting((base, None), (tuned, adaptation), &rows, |_| Ok(()))
}

fn close(measured: &Forgetting, expected: [f64; 3], tolerance: f64, what: &str) {
    let Forgetting { loss_before, loss_after, kl, .. } = *measured;
    for (value, expected) in [loss_before, loss_after, kl].into_iter().zip(expected) {
        assert!((value - expected).abs() <= tolerance * (1.0 + expected), "{what}: {measured:?}, not {expected}");
    }
}

/// Divergence and losses of an adapter that PEFT trained, over the rows of its first step. The numbers are transformers' in f64:
///
/// ```python
/// load = lambda: AutoModelForCausalLM.from_pretrained("models/llama", dtype=torch.float64)
/// base, tuned = load(), PeftModel.from_pretrained(load(), "curves/lora/trained").double()
/// for row in rows:
///     ids, on = torch.tensor([row["ids"]]), torch.tensor(row["trained"])[1:]
///     p, q = (m(ids).logits[0, :-1].log_softmax(-1)[on] for m in (base, tuned))
///     t = ids[0, 1:][on]
///     kl += (p.exp() * (p - q)).sum(); n += len(t)
///     loss_before -= p.gather(1, t[:, None]).sum(); loss_after -= q.gather(1, t[:, None]).sum()
/// print(n, kl / n, loss_before / n, loss_after / n)
/// ```
#[test]
fn the_divergence_is_transformers() -> Result<()> {
    let model = model("llama")?;
    let dir = fixture("curves/lora");
    let curve: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("curve.json"))?)?;
    let rows =
        curve["steps"][0]["micro_batches"].as_array().context("batches")?.iter().flat_map(|rows| rows.as_array());
    let rows = rows.flatten().map(|row| {
        let ids = serde_json::from_value(row["ids"].clone())?;
        Ok(Example::new(ids, serde_json::from_value(row["trained"].clone())?, 0))
    });
    let rows = rows.collect::<Result<Vec<_>>>()?;
    let adaptation = AdapterFiles::read(&dir.join("trained"))?.adapt(&model, false)?;
    let measured = measure(&model, &model, Some(&adaptation), &rows)?;
    close(&measured, [7.869_235_049_787_619, 1.920_172_119_721_980_8, 2.322_494_559_805_310_4], 2e-6, "lora");
    assert_eq!(measured.tokens, 25);
    Ok(())
}

/// KL and losses by their formulas, from all logits at once, in f64.
fn reference(model: &BaseModel, adaptation: &Adaptation, rows: &[Example]) -> Result<[f64; 3]> {
    let vocab = model.architecture.vocab_size;
    let (mut sums, mut tokens) = ([0.0; 3], 0);
    for row in rows {
        let batch = Batch::of_tokens(&row.ids, 0);
        let log_probs = |adaptation| -> Result<Vec<Vec<f64>>> {
            let logits = Pass::evaluation(model, adaptation).logits(&batch)?.flatten_all()?.to_vec1::<f32>()?;
            let log_softmax = |logits: &[f32]| {
                let norm = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
                logits.iter().map(|logit| f64::from(*logit) - norm).collect()
            };
            Ok(logits.chunks(vocab).map(log_softmax).collect())
        };
        let (p, q) = (log_probs(None)?, log_probs(Some(adaptation))?);
        for t in (1..row.ids.len()).filter(|t| row.trained[*t]) {
            let (p, q, target) = (&p[t - 1], &q[t - 1], row.ids[t] as usize);
            sums[0] -= p[target];
            sums[1] -= q[target];
            sums[2] += p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            tokens += 1;
        }
    }
    Ok(sums.map(|sum| sum / tokens as f64))
}

/// Whatever blocks run: fused ones, a head with a recipe of its own, plain ones, all weights trained.
#[test]
fn the_divergence_is_that_of_plain_logits_for_every_strategy() -> Result<()> {
    for name in ["llama", "gemma2", "llama-gguf/model-mixed.gguf"] {
        let model = model(name)?;
        let rows = examples(&model, 23, 5);
        for (strategy, options) in [
            ("lora", json!({"r": 3})),
            ("lora", json!({"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]})),
            ("lora", json!({"r": 2, "use_dora": true})),
            ("lora", json!({"r": 2, "use_dora": true, "lora_dropout": 0.1})),
            ("full", json!({})),
        ] {
            let adaptation = match adapt(strategy, &options, &model, 3) {
                Ok(adaptation) => shake(adaptation)?,
                // A tied head takes no adapter of its own.
                Err(_) if name == "gemma2" => continue,
                Err(error) => return Err(error),
            };
            let expected = reference(&model, &adaptation, &rows)?;
            assert!(expected[2] > 1e-3, "{strategy} {options} on {name}: it moved nothing");
            let measured = measure(&model, &model, Some(&adaptation), &rows)?;
            close(&measured, expected, 1e-4, &format!("{strategy} {options} on {name}"));
        }
    }
    Ok(())
}

#[test]
fn a_fresh_adapter_has_forgotten_nothing() -> Result<()> {
    let model = model("llama")?;
    let rows = examples(&model, 9, 6);
    let adaptation = adapt("lora", &json!({"r": 3}), &model, 3)?;
    let measured = measure(&model, &model, Some(&adaptation), &rows)?;
    assert!(measured.kl < 1e-9 && (measured.loss_before - measured.loss_after).abs() < 1e-6, "{measured:?}");
    let refused = forgetting((&model, None), (&support::model("qwen2")?, None), &[], |_| Ok(()));
    assert!(refused.is_err(), "another vocabulary, or no rows");
    Ok(())
}

/// What enters the head is the same by plain blocks and by fused ones, of the rows with a target and in their order.
#[test]
fn every_backend_gives_the_residual_stream_of_the_targets() -> Result<()> {
    let model = model("llama")?;
    let mut rows = examples(&model, 5, 7);
    for all_trained in [false, true] {
        if all_trained {
            rows.iter_mut().for_each(|row| row.trained = (0..row.ids.len()).map(|t| t > 0).collect());
        }
        let batch = Batch::of_examples((0..).zip(&rows));
        let adaptation = shake(adapt("lora", &json!({"r": 3}), &model, 3)?)?;
        for adaptation in [None, Some(&adaptation)] {
            let pass = Pass::evaluation(&model, adaptation);
            let of = |compute| -> Result<Vec<f32>> {
                let residual = trainer(&model, adaptation, compute).residual(&pass, &batch)?;
                assert_eq!(residual.dims(), [batch.targets.len(), model.architecture.hidden_size]);
                Ok(residual.flatten_all()?.to_vec1()?)
            };
            let (plain, fused) = (of(Compute::Plain)?, of(Compute::F32)?);
            assert!(distance(&plain, &fused) < 1e-4, "{}", distance(&plain, &fused));
        }
    }
    Ok(())
}

/// A sequence that was drawn at temperature 1 has on average the cross-entropy that is the entropy of what it was drawn from; at a lower
/// temperature it has less. Both are summed over the same tokens, and the difference has the variance of −log p, token by token.
#[test]
fn own_rows_are_drawn_from_the_base_as_it_is() -> Result<()> {
    let pocket = Arc::new(BaseModel::load(&root().join("runtime/pocket/model"))?);
    let mut bare = BaseModel::load(&fixture("models/llama"))?;
    bare.template = None;
    for model in [pocket, Arc::new(bare)] {
        let rows = own_rows(&model, |_, _| Ok(()))?;
        assert_eq!(rows, own_rows(&model, |_, _| Ok(()))?, "they are the same each time");
        assert!(rows.len() > 30, "{} rows", rows.len());
        let rows: Vec<Example> = rows.iter().filter_map(OwnRow::example).collect();
        let vocab = model.architecture.vocab_size;
        let (mut apart, mut variance, mut tokens) = (0.0, 0.0, 0);
        for row in &rows {
            let logits = Pass::evaluation(&model, None).logits(&Batch::of_tokens(&row.ids, 0))?;
            let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
            for t in (1..row.ids.len()).filter(|t| row.trained[*t]) {
                let logits = &logits[(t - 1) * vocab..][..vocab];
                let norm = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
                let log_p = |v: usize| f64::from(logits[v]) - norm;
                let entropy = (0..vocab).map(|v| -log_p(v).exp() * log_p(v)).sum::<f64>();
                apart += -log_p(row.ids[t] as usize) - entropy;
                variance += (0..vocab).map(|v| log_p(v).exp() * (log_p(v) + entropy).powi(2)).sum::<f64>();
                tokens += 1;
            }
        }
        assert!(tokens > 200 && variance > 0.0, "{tokens} tokens");
        assert!(apart.abs() < 4.0 * variance.sqrt(), "{apart} apart, deviation {}", variance.sqrt());
    }
    Ok(())
}

#[test]
fn rows_that_were_drawn_are_found_again_and_damaged_ones_are_drawn_anew() -> Result<()> {
    let model = Arc::new(BaseModel::load(&root().join("runtime/pocket/model"))?);
    let place = tempfile::tempdir()?;
    let kl = |directory: Option<&Path>| -> Result<usize> {
        Ok(ForgettingRows::own(&model, directory)?.measure((&*model, None), (&*model, None))?.tokens)
    };
    let drawn = kl(None)?;
    assert_eq!(kl(Some(place.path()))?, drawn);
    let file = std::fs::read_dir(place.path())?.next().context("they are kept")??.path();
    let kept = std::fs::read_to_string(&file)?;
    std::fs::write(&file, "[{\"ids\": [5, 6, 7], \"from\": 1}]")?;
    assert_eq!(kl(Some(place.path()))?, 2, "what is kept counts");
    for damaged in ["[{\"ids\": [5, 6, 7], \"from\": 9}]", "[]", &kept[..kept.len() / 2]] {
        std::fs::write(&file, damaged)?;
        assert_eq!(kl(Some(place.path()))?, drawn, "{damaged}");
        assert_eq!(std::fs::read_to_string(&file)?, kept);
    }
    Ok(())
}

fn pocket_fine_tune(place: &support::Place) -> Command {
    let mut command =
        place.fine_tune(&root().join("runtime/pocket/model"), &root().join("runtime/pocket/quickstart/train.jsonl"));
    command.args(["--max-steps", "4", "--learning-rate", "5e-3", "--json"]).env("HOMEROOM_HOME", place.path("home"));
    command
}

fn events(home: &Path, name: &str) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    for run in std::fs::read_dir(home.join("runs"))? {
        let text = std::fs::read_to_string(run?.path().join("events.jsonl"))?;
        for line in text.lines() {
            let event: Value = serde_json::from_str(line)?;
            found.extend(Some(event).filter(|event| event["event"] == name));
        }
    }
    Ok(found)
}

#[test]
fn fine_tune_tells_and_records_what_is_forgotten() -> Result<()> {
    let place = support::Place::new()?;
    let ran = succeeds(pocket_fine_tune(&place).arg("--forgetting"))?;
    let line = ran.stderr.lines().find(|line| line.starts_with("forgets "));
    let line = line.with_context(|| format!("no line of it:\n{}", ran.stderr))?;
    let told = &printed_json(&ran)?["forgetting"];
    let number = |value: &Value, name: &str| value[name].as_f64().with_context(|| format!("no {name}: {value}"));
    let (before, after, kl) = (number(told, "loss_before")?, number(told, "loss_after")?, number(told, "kl")?);
    assert!(kl > 1e-4 && after > before, "{told}");
    let words = format!("loss on the base's own answers {before:.4} before, {after:.4} after; KL {kl:.4} nats a token");
    assert!(line.ends_with(&words), "{line}");
    let manifest: Value = serde_json::from_str(&std::fs::read_to_string(place.path("outputs/out/homeroom.json"))?)?;
    assert_eq!(&manifest["training"]["result"]["forgetting"], told);
    let events = events(&place.path("home"), "forgetting")?;
    assert_eq!(events.len(), 1);
    for name in ["loss_before", "loss_after", "kl"] {
        assert_eq!(events[0][name], told[name]);
    }
    // On a file of the user's; the result of before stays where that is gone.
    let file = place.write("mine.jsonl", "{\"text\": \"two words\"}\n")?;
    let mut again = pocket_fine_tune(&place);
    let ran = succeeds(again.arg("--overwrite").arg("--forgetting").arg(&file))?;
    assert!(ran.stderr.contains(&format!("forgets   loss on {} ", file.display())), "{}", ran.stderr);
    support::refused(pocket_fine_tune(&place).args(["--overwrite", "--forgetting", "gone.jsonl"]), &["gone.jsonl"])?;
    let ran = succeeds(pocket_fine_tune(&place).arg("--overwrite"))?;
    assert!(!ran.stderr.contains("forgets ") && printed_json(&ran)?["forgetting"].is_null(), "only if it is asked for");
    Ok(())
}

#[test]
fn a_script_is_told_what_a_model_has_forgotten() -> Result<()> {
    let place = Place::new()?;
    let result = place.result(&format!(
        "{TRAIN}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 3, learning_rate = 2e-2 }}\n\
         local saved = homeroom.save_model {{ model = tuned, name = \"saved\" }}\n\
         local whole = homeroom.fine_tune {{ model = homeroom.load_model {{ name = params.model, strategy = \"full\" }}, dataset = data.train, steps = 3, learning_rate = 1e-2 }}\n\
         homeroom.save_model {{ model = whole, name = \"whole\" }}\n\
         return {{ own = homeroom.forgetting {{ model = tuned }}, again = homeroom.forgetting {{ model = saved }},\n\
         rows = homeroom.forgetting {{ model = tuned, rows = data.eval }}, loss = homeroom.evaluate {{ model = tuned, dataset = data.eval }}.loss,\n\
         whole = homeroom.forgetting {{ model = whole }}, named = homeroom.forgetting {{ model = \"whole\", base = params.model }} }}"
    ))?;
    let number =
        |name: &str, field: &str| result[name][field].as_f64().with_context(|| format!("{name}.{field}: {result}"));
    assert!(number("own", "kl")? > 1e-4 && number("whole", "kl")? > 1e-4, "{result}");
    assert_eq!(result["own"], result["again"]);
    assert_eq!(result["whole"], result["named"]);
    assert_eq!(result["own"]["loss_before"], result["whole"]["loss_before"], "the same rows of the same base");
    assert!((number("rows", "loss")? - result["loss"].as_f64().context("a loss")?).abs() < 1e-5, "{result}");
    for (call, expected) in [
        ("model = params.model", "does not say what it was trained from"),
        ("model = \"whole\"", "does not say what it was trained from"),
        ("model = \"saved\", base = \"saved\"", "`base` is a trained model"),
        ("model = \"saved\", dateset = 1", "unknown option `dateset`, did you mean `dataset`?"),
    ] {
        let error = place.error(&format!("\nreturn homeroom.forgetting {{ {call} }}"))?;
        assert!(error.contains(expected) && error.contains("s.lua:2"), "{call}: {error}");
    }
    Ok(())
}

fn shipped(place: &support::Place, config: &str, settings: &[&str]) -> Result<(Value, String)> {
    let mut command = homeroom();
    command.arg("run").arg(root().join("configs").join(config)).arg("--json").env("HOMEROOM_HOME", place.path("home"));
    command.env("HOMEROOM_PLUGINS", plugin_path("lora").parent().context("a file lies in a directory")?);
    settings.iter().for_each(|setting| {
        command.args(["--set", setting]);
    });
    let ran = succeeds(&mut command)?;
    Ok((serde_json::from_str(&ran.stdout)?, ran.stderr))
}

/// Three rounds of the shipped pipeline: one is promoted; one learned too little to be better than it; one is better and moved far from
/// the base on what it was not to change.
#[test]
fn a_model_is_replaced_only_by_a_better_one_that_forgets_little() -> Result<()> {
    let place = support::Place::new()?;
    let adapter = || std::fs::read(place.path("home/models/pig-latin/adapter_model.safetensors"));
    let number = |result: &Value, name: &str| result[name].as_f64().with_context(|| format!("no {name}: {result}"));

    let (first, _) = shipped(&place, "improve.toml", &[])?;
    assert_eq!((&first["promoted"], &first["reasons"]), (&json!(true), &json!([])), "{first}");
    let saved = adapter()?;

    let (second, story) = shipped(&place, "improve.toml", &["max_steps=3"])?;
    assert_eq!(second["promoted"], false, "{second}");
    assert_eq!(second["eval_loss_before"], first["eval_loss"], "it is compared with the present model");
    assert!(number(&second, "eval_loss")? > 1.2 * number(&first, "eval_loss")?, "{second}");
    assert!(second["reasons"].as_array().is_some_and(|reasons| reasons.len() == 1), "{second}");
    assert!(story.contains("not promoted, pig-latin stays as it is: the held-out loss is"), "{story}");

    let (third, story) = shipped(&place, "improve.toml", &["epochs=8", "learning_rate=1e-2"])?;
    assert_eq!(third["promoted"], false, "{third}");
    assert!(number(&third, "eval_loss")? < 0.8 * number(&first, "eval_loss")?, "{third}");
    assert!(story.contains("it forgets: the KL divergence from the base is"), "{story}");
    assert!(third["reasons"].as_array().is_some_and(|reasons| reasons.len() == 1), "{third}");
    assert_eq!(adapter()?, saved, "the present model is as it was");
    Ok(())
}

/// KTO learns from both thumbs, whatever they are called, and with `start=present` the present model is what is trained.
#[test]
fn ratings_teach_by_kto_and_the_present_model_goes_on() -> Result<()> {
    let place = support::Place::new()?;
    let row = |(number, word): (usize, &str)| match number % 3 {
        0 => json!({"prompt": format!("Say {word}."), "completion": "I do not know.", "label": "down"}),
        1 => json!({"prompt": format!("Say {word}."), "completion": word, "label": "up"}),
        _ => json!({"prompt": format!("Say {word}."), "completion": word, "label": true}),
    };
    let words = ["dog", "cat", "rain", "sun", "tree", "bird", "road", "door", "lamp"];
    let rows: Vec<String> = words.into_iter().enumerate().map(|word| row(word).to_string()).collect();
    let ratings = format!("ratings={}", place.write("thumbs.jsonl", rows.join("\n"))?.display());
    let loose = ["max_steps=3", "learning_rate=1e-3", "max_kl=100", "name=thumbs", &ratings];
    let mut settings = loose.to_vec();
    let (first, _) = shipped(&place, "improve.toml", &settings)?;
    assert_eq!((&first["rated"], &first["trained"]), (&json!(9), &json!(6)), "{first}");
    settings.extend(["objective=kto", "start=present"]);
    let (second, story) = shipped(&place, "improve.toml", &settings)?;
    assert_eq!((&second["rated"], &second["trained"]), (&json!(9), &json!(9)), "{second}");
    let (present, second) = (first["promoted"].as_bool(), second["promoted"].as_bool());
    assert!(present.is_some() && second.is_some(), "{story}");
    let bad = place.write("bad.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\", \"label\": \"yes\"}\n")?;
    let mut command = homeroom();
    command.arg("run").arg(root().join("configs/improve.toml")).env("HOMEROOM_HOME", place.path("home"));
    command.arg("--set").arg(format!("ratings={}", bad.display()));
    support::refused(&mut command, &["improve.lua:", "`label` is yes; it should be true or false"])?;
    Ok(())
}

#[test]
fn variants_are_compared_on_the_same_rows() -> Result<()> {
    let place = support::Place::new()?;
    let variants = "variants=lora r=4 learning_rate=1e-4, lora r=4, qlora r=4";
    let (results, story) = shipped(&place, "compare.toml", &["max_steps=6", variants])?;
    let results = results.as_array().context("a list")?;
    assert_eq!(results.len(), 3);
    let losses: Vec<f64> = results.iter().filter_map(|result| result["eval_loss"].as_f64()).collect();
    assert!(losses.len() == 3 && losses.is_sorted(), "{results:?}");
    assert_eq!(results[2]["variant"], "lora r=4 learning_rate=1e-4", "it learned least: {results:?}");
    for result in results {
        assert!(result["kl"].as_f64().is_some_and(|kl| kl >= 0.0) && result["seconds"].as_f64().is_some(), "{result}");
        let variant = result["variant"].as_str().context("a name")?;
        assert!(story.lines().any(|line| line.starts_with(&format!("{variant} "))), "{story}");
    }
    Ok(())
}
