//! The strategies that store the base in their own way: what is stored, and that an adapter is run as it was trained.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use homeroom::plugin::{Plugin, native};
use homeroom_abi::codec::{Absmax, Block, Codec as PlannedCodec};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::merge::merge;
use homeroom_engine::adapt::requantize::{StoredAs, store_as, store_as_planned};
use homeroom_engine::data::Example;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::train::{Run, TrainConfig};
use homeroom_kernels::{Codec, ScaleStorage};
use serde_json::{Value, json};

use crate::support::{
    Place, adapt_stored, distance, fixture, homeroom, model, no_native, plan, plugin_path, printed_json, refused,
    shake, succeeds,
};

fn storages(model: &BaseModel) -> Vec<(String, String)> {
    model.modules.iter().map(|module| (module.info.path.clone(), module.weight.storage_name())).collect()
}

/// The kernels' own NF4 and int8 are held to bitsandbytes' bytes; these are the ones that the plugins state.
#[test]
fn the_codecs_of_the_plugins_are_those_that_equal_bitsandbytes() -> Result<()> {
    for (strategy, codec) in [("qlora", Codec::nf4()), ("int8", Codec::int8())] {
        let (stored, _) = adapt_stored(strategy, &json!({"target_modules": ["q_proj"]}), model("llama")?, 1)?;
        let expected = store_as(&model("llama")?, &StoredAs::Codec(codec), None, |_, _| {})?;
        assert_eq!(storages(&stored), storages(&expected), "{strategy}");
        for (got, want) in stored.modules.iter().zip(&expected.modules) {
            let rows = got.weight.rows();
            assert!(got.weight.decode(0..rows) == want.weight.decode(0..rows), "{strategy}: {}", got.info.path);
        }
    }
    Ok(())
}

/// Blocks of 4 bits have lost what 4 bits would lose once more.
#[test]
fn a_quantised_weight_keeps_its_storage_unless_the_user_wants_it_otherwise() -> Result<()> {
    let base = fixture("models").join("llama-gguf/model-mixed.gguf");
    let stored = |requantize| -> Result<Vec<String>> {
        let model = Arc::new(BaseModel::load(&base)?);
        let plan = plan("qlora", &json!({}), &model)?;
        let model = store_as_planned(model, &plan, requantize, &no_native, None, |_, _| {})?;
        Adaptation::new(&model, plan, 1)?;
        let paths = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"];
        let index = |path| model.module_index(path).context("a module");
        paths.iter().map(|path| Ok(model.modules[index(path)?].weight.storage_name())).collect()
    };
    assert_eq!(stored(false)?, ["q5_0", "q8_0", "nf4"]);
    assert_eq!(stored(true)?, ["q5_0", "nf4", "nf4"]);

    let place = Place::new()?;
    for (flags, kept) in [(&[][..], true), (&["--requantize"][..], false)] {
        let output = place.path("outputs").join(format!("kept-{kept}"));
        let mut command = fine_tune(&place, &base, "qlora", &output)?;
        let ran = succeeds(command.args(flags))?;
        assert_eq!(ran.stderr.contains("keeps its storage"), kept, "{}", ran.stderr);
        let manifest: Value = serde_json::from_slice(&fs::read(output.join("homeroom.json"))?)?;
        assert_eq!(manifest["base"]["requantize"], !kept);
        answer(&output)?;
    }
    Ok(())
}

#[test]
fn an_adapter_is_run_merged_and_exported_with_its_plugin_file_gone() -> Result<()> {
    let place = Place::new()?;
    let plugins = place.path("plugins");
    fs::create_dir(&plugins)?;
    for strategy in ["qlora", "int8"] {
        let file = plugin_path(strategy);
        let copy = plugins.join(file.file_name().context("a library has a name")?);
        fs::copy(&file, &copy)?;
        let output = place.path("outputs").join(strategy);
        let mut command = fine_tune(&place, &fixture("models").join("llama"), strategy, &output)?;
        succeeds(command.env("HOMEROOM_PLUGINS", &plugins))?;
        fs::remove_file(&copy)?;
        let first = answer(&output)?;
        assert_eq!(first, answer(&output)?, "{strategy}");
        let mut export = homeroom();
        export.env("HOMEROOM_PLUGINS", &plugins).arg("export-model").arg("--model-dir").arg(&output);
        let merged = place.path("outputs").join(format!("{strategy}-merged"));
        let ran = succeeds(export.args(["--format", "merged", "--json", "--output-dir"]).arg(&merged))?;
        let kl = printed_json(&ran)?["kl"].as_f64().context("kl")?;
        assert!((0.0..1e-6).contains(&kl), "{strategy}: {kl}");
    }
    Ok(())
}

/// The values that training saw are those that are merged: what the codec stores, not what the files hold.
#[test]
fn merging_into_a_coded_base_changes_nothing() -> Result<()> {
    for strategy in ["qlora", "int8"] {
        let (base, adaptation) = adapt_stored(strategy, &json!({"r": 3, "use_dora": true}), model("llama")?, 1)?;
        let adaptation = shake(adaptation)?;
        let merged = merge(&base, &adaptation)?;
        let batch = Batch::of_tokens(&[1, 5, 9, 30, 4], 0);
        let logits = |model, adaptation| -> Result<Vec<f32>> {
            Ok(Pass::evaluation(model, adaptation).logits(&batch)?.flatten_all()?.to_vec1()?)
        };
        let (unmerged, merged) = (logits(&base, Some(&adaptation))?, logits(&merged, None)?);
        let apart = distance(&unmerged, &merged);
        assert!(apart < 1e-4, "{strategy}: {apart}");
        let plain = logits(&base, None)?;
        assert!(distance(&unmerged, &plain) > 1e-2, "the adapter changes something");
    }
    Ok(())
}

#[test]
fn options_of_the_storage_are_checked() -> Result<()> {
    let place = Place::new()?;
    let output = place.path("outputs/out");
    let base = fixture("models").join("llama");
    let mut command = fine_tune(&place, &base, "qlora", &output)?;
    refused(command.args(["--set-option", "block_size=48"]), &["block_size is 48", "power of two"])?;
    let mut command = fine_tune(&place, &base, "qlora", &output)?;
    refused(command.args(["--set-option", "double_quants=true"]), &["double_quants", "did you mean `double_quant`"])?;
    let mut command = fine_tune(&place, &base, "qlora", &output)?;
    refused(command.args(["--set-option", "r=4"]), &["--lora-r is 2", "--set-option r is 4"])
}

fn fine_tune(place: &Place, base: &Path, strategy: &str, output: &Path) -> Result<std::process::Command> {
    let row = json!({"prompt": "a b c", "completion": " d e"}).to_string();
    let rows = place.write("rows.jsonl", format!("{row}\n{row}\n"))?;
    let mut command = homeroom();
    command.arg("fine-tune").arg("--model-name").arg(base).arg("--training-file").arg(rows);
    command.args(["--strategy", strategy, "--max-steps", "2", "--lora-r", "2", "--output-dir"]).arg(output);
    Ok(command)
}

/// What an adapter says to a prompt.
fn answer(adapter: &Path) -> Result<String> {
    let mut command = homeroom();
    command.arg("chat").arg("--model-dir").arg(adapter).args(["--prompt", "a b", "--max-tokens", "4"]);
    Ok(succeeds(&mut command)?.stdout)
}

/// A directory as transformers writes it when bitsandbytes stores the linear layers.
pub fn saved_by_bitsandbytes(place: &Place, kind: &str) -> Result<std::path::PathBuf> {
    let dir = place.copy(&fixture("models/llama"), kind)?;
    let saved = fixture("bitsandbytes");
    fs::copy(saved.join(format!("{kind}.safetensors")), dir.join("model.safetensors"))?;
    fs::copy(saved.join("config.json"), dir.join("config.json"))?;
    Ok(dir)
}

#[test]
fn a_model_that_bitsandbytes_stored_has_the_values_that_we_store() -> Result<()> {
    let place = Place::new()?;
    let plain = Codec { scales: ScaleStorage::F32, ..Codec::nf4() };
    for (kind, codec) in [("nf4", Codec::nf4()), ("nf4-plain-scales", plain), ("int8", Codec::int8())] {
        let theirs = BaseModel::load(&saved_by_bitsandbytes(&place, kind)?)?;
        let ours = store_as(&model("llama")?, &StoredAs::Codec(codec), None, |_, _| {})?;
        assert_eq!(storages(&theirs), storages(&ours), "{kind}");
        for (got, want) in theirs.modules.iter().zip(&ours.modules) {
            let rows = got.weight.rows();
            let (got_values, want_values) = (got.weight.decode(0..rows), want.weight.decode(0..rows));
            let largest = want_values.iter().fold(0_f32, |most, value| most.max(value.abs()));
            let bound = match kind {
                // The mean of the scales, which nested scales are stored without, is summed in another order.
                "nf4" => 1e-6,
                // Its layer rounds to f16 before it encodes: a value near the middle of two levels may fall to the other.
                "int8" => largest / 126.0,
                _ => 0.0,
            };
            let apart = distance(&got_values, &want_values);
            assert!(apart <= bound, "{kind}: {} {apart:e}", got.info.path);
        }
    }
    Ok(())
}

#[test]
fn a_model_that_bitsandbytes_stored_is_trained_on_and_merged_into_floats() -> Result<()> {
    let place = Place::new()?;
    let base = saved_by_bitsandbytes(&place, "nf4")?;
    let output = place.path("outputs/out");
    let ran = succeeds(&mut fine_tune(&place, &base, "qlora", &output)?)?;
    assert!(!ran.stderr.contains("keeps its storage"), "{}", ran.stderr);
    let merged = place.path("outputs/merged");
    let mut export = homeroom();
    export.arg("export-model").arg("--model-dir").arg(&output).args(["--format", "merged", "--output-dir"]);
    succeeds(export.arg(&merged))?;
    let config = fs::read_to_string(merged.join("config.json"))?;
    assert!(!config.contains("quantization_config"), "{config}");
    BaseModel::load(&merged)?;
    Ok(())
}

#[test]
fn what_bitsandbytes_stored_otherwise_or_not_whole_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let refusal = |dir: &Path| BaseModel::load(dir).err().map(|error| format!("{error:#}")).context("it is refused");
    let error = refusal(&saved_by_bitsandbytes(&place, "fp4")?)?;
    assert!(error.contains("bitsandbytes__fp4") && error.contains("nf4 is run here"), "{error}");

    let dir = saved_by_bitsandbytes(&place, "nf4")?;
    let file = dir.join("model.safetensors");
    let whole = fs::read(&file)?;
    let text = |bytes: &[u8], from: &str, to: &str| -> Result<Vec<u8>> {
        let (from, to) = (from.as_bytes(), to.as_bytes());
        let at = bytes.windows(from.len()).position(|window| window == from).context("it is in the file")?;
        Ok([&bytes[..at], to, &bytes[at + from.len()..]].concat())
    };
    for (from, to, words) in [
        ("down_proj.weight.absmax", "down_proj.weight.absmix", "its `absmax` is missing"),
        ("\"blocksize\": 64", "\"blocksize\": 32", "takes"),
        ("\"blocksize\": 64", "\"blocksize\":  0", "a block holds 1 to"),
        ("\"shape\": [48", "\"shape\": [84", "it should be"),
        ("\"nested_offset\"", "\"nested_0ffset\"", "nested_offset"),
    ] {
        fs::write(&file, text(&whole, from, to)?)?;
        let error = refusal(&dir)?;
        assert!(error.contains(words), "{from}: {error}");
    }
    Ok(())
}

/// A plan is not trusted: it may come from an adapter's directory.
#[test]
fn a_plan_that_would_break_what_runs_it_is_refused() -> Result<()> {
    let model = Arc::new(model("llama")?);
    let mut twice = plan("vera", &json!({}), &model)?;
    twice.params.push(twice.params[0].clone());
    let error = Adaptation::new(&model, twice, 1).err().context("it is taken")?.to_string();
    assert!(error.contains("the model: parameter `vera_A` is there twice"), "{error}");
    for (what, change) in [
        (
            "a block holds 1 to",
            (|codec: &mut PlannedCodec| codec.block = Block::Flat(1 << 63)) as fn(&mut PlannedCodec),
        ),
        ("a block of 1 to", |codec| {
            if let Absmax::Nested { block, .. } = &mut codec.absmax {
                *block = 1 << 53;
            }
        }),
    ] {
        let mut endless = plan("qlora", &json!({}), &model)?;
        change(&mut endless.codecs[0]);
        let stored = store_as_planned(model.clone(), &endless, false, &no_native, None, |_, _| {});
        let error = format!("{:#}", stored.err().context("it is taken")?);
        assert!(error.contains(what), "{error}");
    }
    Ok(())
}

/// What a plugin's functions encode is multiplied as any other storage: fused, plain and in f64.
#[test]
fn a_native_codec_stores_the_base_and_trains_on_it() -> Result<()> {
    let plugin = Plugin::load(&plugin_path("mxfp4"))?;
    let base = Arc::new(model("llama-gguf")?);
    let plan = plan("mxfp4", &json!({"r": 3}), &base)?;
    let find = |name: &str| native::of_plugin(&plugin, name);
    let stored = store_as_planned(base.clone(), &plan, false, &find, None, |_, _| {})?;
    let down = stored.module_index("model.layers.1.mlp.down_proj").context("a module")?;
    assert_eq!(stored.modules[down].weight.storage_name(), "mxfp4");
    assert_eq!(stored.modules[down].weight.stored_bytes(), 64 * 96 / 32 * 17);

    // The same values as floats.
    let as_floats = store_as(&stored, &StoredAs::F32, None, |_, _| {})?;
    let adaptation = shake(Adaptation::new(&stored, plan.clone(), 1)?)?;
    let floats_plan = homeroom_abi::plan::Plan { stored_natively: Default::default(), ..plan };
    let on_floats = shake(Adaptation::new(&as_floats, floats_plan, 1)?)?;
    let rows = Example::new(vec![1, 5, 9, 30, 4, 17, 2], vec![true; 7], 0);
    for compute in [Compute::Plain, Compute::F32] {
        let config = TrainConfig { compute, ..TrainConfig::default() };
        let batch = || Batch::of_examples([(0, &rows)]);
        let (ours, _) = Run::new(&stored, &adaptation, &config, 1).gradients(&[batch()])?;
        let (theirs, _) = Run::new(&as_floats, &on_floats, &config, 1).gradients(&[batch()])?;
        assert!((ours.loss_sum - theirs.loss_sum).abs() < 1e-5 * theirs.loss_sum, "{compute:?}");
    }
    Ok(())
}

#[test]
fn an_adapter_over_a_native_codec_names_the_plugin_that_it_lacks() -> Result<()> {
    let place = Place::new()?;
    let output = place.path("outputs/out");
    succeeds(&mut fine_tune(&place, &fixture("models/llama-gguf"), "mxfp4", &output)?)?;
    answer(&output)?;
    // Beside the program there may be one that the tests built.
    let alone = place.path("bin");
    fs::create_dir(&alone)?;
    fs::copy(env!("CARGO_BIN_EXE_homeroom"), alone.join("homeroom"))?;
    let mut command = std::process::Command::new(alone.join("homeroom"));
    command.env("HOMEROOM_HOME", place.path("home")).env("HOMEROOM_PLUGINS", "").arg("chat").arg("--model-dir");
    command.arg(&output).args(["--prompt", "a"]);
    refused(&mut command, &["native codec `mxfp4`", "plugin `mxfp4` 0.1.0", "unknown strategy `mxfp4`"])
}
