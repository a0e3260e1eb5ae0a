//! What the tests share: where things are, plugins built once, models and plans.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};
use homeroom::plugin::Plugin;
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::serialize_f32;
use homeroom_engine::adapt::requantize::store_as_planned;
use homeroom_engine::data::{Example, Unit};
use homeroom_engine::files::tensors::map_safetensors;
use homeroom_engine::models::BaseModel;
use homeroom_engine::models::weight::NativeCodec;
use homeroom_engine::train::objective::Sft;
use homeroom_engine::train::{Data, Observer, State, TrainConfig, TrainReport, train};
use homeroom_kernels::Stream;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the manifest lies two levels down")
}

/// A file or directory of `tests/fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    root().join("tests/fixtures").join(path)
}

/// A tiny model of `tests/fixtures/models`.
pub fn model(name: &str) -> Result<BaseModel> {
    BaseModel::load(&fixture("models").join(name))
}

/// The program as cargo built it, with the plugins of this repository and none that the user has.
pub fn homeroom() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_homeroom"));
    let plugins = plugin_path("lora");
    command.env("HOMEROOM_PLUGINS", plugins.parent().expect("a library lies in a directory"));
    // Tests load strategies from directories of their own; those about trust take this away.
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("home-{}", std::process::id()));
    command.env("HOMEROOM_HOME", home).env("HOMEROOM_PLUGIN_POLICY", "dev");
    // Whoever runs the tests may have models of their own, and a network.
    command.env("HF_HUB_CACHE", "/nowhere/hub").env("HF_HUB_OFFLINE", "1").env_remove("HOMEROOM_BASES");
    command
}

/// What a command came to.
#[derive(Debug)]
pub struct Ran {
    /// `None`: a signal ended it.
    pub code: Option<i32>,
    /// Its result.
    pub stdout: String,
    /// Its story.
    pub stderr: String,
}

/// Runs a command to its end. It must not have panicked, whatever came of it.
pub fn run(command: &mut Command) -> Result<Ran> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    let ran = Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    };
    ensure!(!ran.stderr.contains("panicked at"), "{command:?} panicked:\n{}", ran.stderr);
    Ok(ran)
}

/// Runs a command that must succeed.
pub fn succeeds(command: &mut Command) -> Result<Ran> {
    let ran = run(command)?;
    ensure!(ran.code == Some(0), "{command:?} ended with {:?}:\n{}", ran.code, ran.stderr);
    Ok(ran)
}

/// Runs a command that must fail with one error, in which all of `words` stand, and with nothing on stdout.
pub fn refused(command: &mut Command, words: &[&str]) -> Result<()> {
    let Ran { code, stdout, stderr } = run(command)?;
    ensure!(code == Some(1), "{command:?} ended with {code:?}:\n{stderr}");
    ensure!(stdout.is_empty(), "{command:?} printed {stdout:?}");
    let error = stderr.find("error: ").map(|at| &stderr[at..]);
    let error = error.with_context(|| format!("{command:?} gave no error:\n{stderr}"))?;
    for word in words {
        ensure!(error.contains(word), "{command:?}: no `{word}` in\n{error}");
    }
    Ok(())
}

/// The object that a command printed with `--json`: one line, and nothing else on stdout.
pub fn printed_json(ran: &Ran) -> Result<Value> {
    ensure!(ran.stdout.lines().count() == 1, "more than one line:\n{}", ran.stdout);
    serde_json::from_str(&ran.stdout).with_context(|| format!("not JSON: {}", ran.stdout))
}

/// Sizes of a model of two layers.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub hidden: usize,
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub tied: bool,
}

/// A directory of a test's own. What runs write goes to `outputs/` in it.
pub struct Place(TempDir);

impl Place {
    /// An empty one, on the disk that the build is on.
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        std::fs::create_dir(dir.path().join("outputs"))?;
        Ok(Self(dir))
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file in it.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().context("a file lies in a directory")?)?;
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    /// A JSONL file of so many short conversations.
    pub fn rows(&self, name: &str, count: usize) -> Result<PathBuf> {
        let row = |number| {
            let answer = format!("{} is what you get", number * 7 % 10);
            json!({"messages": [
                {"role": "user", "content": format!("times seven: {number}")},
                {"role": "assistant", "content": answer},
            ]})
        };
        let lines: Vec<String> = (0..count).map(|number| format!("{}\n", row(number))).collect();
        self.write(name, lines.concat())
    }

    /// A copy of a directory's files, to change.
    pub fn copy(&self, from: &Path, name: &str) -> Result<PathBuf> {
        let to = self.path(name);
        std::fs::create_dir_all(&to)?;
        for entry in std::fs::read_dir(from)? {
            let path = entry?.path();
            std::fs::copy(&path, to.join(path.file_name().context("an entry has a name")?))?;
        }
        Ok(to)
    }

    /// A model of random weights with the tokenizer and template of the fixtures.
    pub fn random_model(&self, name: &str, sizes: &Sizes) -> Result<PathBuf> {
        let Sizes { hidden, inner, heads, kv_heads, head_dim, vocab, tied } = *sizes;
        let from = fixture("models/llama");
        let dir = self.path(name);
        std::fs::create_dir_all(&dir)?;
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
            std::fs::copy(from.join(file), dir.join(file))?;
        }
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": tied,
            "bos_token_id": 1, "eos_token_id": 2,
        });
        std::fs::write(dir.join("config.json"), config.to_string())?;
        let mut random = Stream::new(5, vocab as u64);
        let mut stored = Vec::new();
        let mut add = |name: String, shape: &[usize], middle: f64, spread: f64| {
            let values = (0..shape.iter().product()).map(|_| (middle + spread * random.normal()) as f32);
            stored.push((name, shape.to_vec(), values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>()));
        };
        let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
        add("model.embed_tokens.weight".into(), &[vocab, hidden], 0.0, 0.7);
        for layer in 0..2 {
            let at = |role: &str| format!("model.layers.{layer}.{role}.weight");
            add(at("input_layernorm"), &[hidden], 1.0, 0.1);
            add(at("post_attention_layernorm"), &[hidden], 1.0, 0.1);
            for (role, d_out, d_in) in [
                ("self_attn.q_proj", wide, hidden),
                ("self_attn.k_proj", narrow, hidden),
                ("self_attn.v_proj", narrow, hidden),
                ("self_attn.o_proj", hidden, wide),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ] {
                add(at(role), &[d_out, d_in], 0.0, (d_in as f64).powf(-0.5));
            }
        }
        add("model.norm.weight".into(), &[hidden], 1.0, 0.1);
        if !tied {
            add("lm_head.weight".into(), &[vocab, hidden], 0.0, (hidden as f64).powf(-0.5));
        }
        std::fs::write(dir.join("model.safetensors"), serialize_f32(&stored)?)?;
        Ok(dir)
    }

    /// `fine-tune` of a model into `outputs/out`.
    pub fn fine_tune(&self, model: &Path, rows: &Path) -> Command {
        let mut command = homeroom();
        command.arg("fine-tune").arg("--model-name").arg(model).arg("--training-file").arg(rows);
        command.arg("--output-dir").arg(self.path("outputs/out"));
        command
    }

    /// Everything in `outputs/`, hidden or not.
    pub fn outputs(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(self.path("outputs"))?;
        let mut names =
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }
}

/// `eval --json` of a model or adapter.
pub fn eval(model: &Path, rows: &Path) -> Command {
    let mut command = homeroom();
    command.arg("eval").arg("--model-dir").arg(model).arg("--file").arg(rows).arg("--json");
    command
}

/// The loss that `eval` finds.
pub fn loss(model: &Path, rows: &Path) -> Result<f64> {
    printed_json(&succeeds(&mut eval(model, rows))?)?["loss"].as_f64().context("a loss is a number")
}

/// The plugin's file, built by the first test that asks.
pub fn plugin_path(name: &str) -> PathBuf {
    static BUILT: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let names = ["lora", "qlora", "int8", "full", "ia3", "vera", "mxfp4", "hostile", "reloading"];
        build_plugins(&root(), &names).expect("the plugins build")
    });
    built.get(name).unwrap_or_else(|| panic!("plugin `{name}` was not built")).clone()
}

/// Builds plugin packages of a workspace as users do, and reads where cargo put them.
pub fn build_plugins(workspace: &Path, packages: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).args(["build", "--release", "--offline", "--message-format=json"]);
    // Another workspace shares this one's dependencies, which are built.
    cargo.env("CARGO_TARGET_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name(""));
    for package in packages {
        cargo.args(["-p", package]);
    }
    let output = cargo.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo build failed:\n{}", String::from_utf8_lossy(&output.stderr));
    let mut found = BTreeMap::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line)?;
        let kinds = message["target"]["crate_types"].as_array();
        if message["reason"] == "compiler-artifact" && kinds.is_some_and(|kinds| kinds.contains(&"cdylib".into())) {
            let name = message["target"]["name"].as_str().context("a target has a name")?;
            let files = message["filenames"].as_array().context("an artifact has files")?;
            let library =
                files.iter().filter_map(Value::as_str).find(|file| file.ends_with(std::env::consts::DLL_SUFFIX));
            found.insert(name.to_owned(), PathBuf::from(library.context("a cdylib is a library")?));
        }
    }
    for package in packages {
        ensure!(found.contains_key(*package), "cargo built no library for `{package}`");
    }
    Ok(found)
}

/// A strategy, loaded from its file.
pub fn plugin(name: &str) -> Result<Plugin> {
    Plugin::load(&plugin_path(name))
}

/// A strategy's plan for a model, traced by the plugin.
pub fn plan(strategy: &str, options: &Value, model: &BaseModel) -> Result<Plan> {
    let options = options.as_object().cloned().context("options are an object")?;
    plugin(strategy)?.plan(&PlanRequest { options, model: model.info() })
}

/// A strategy's adaptation of a model.
pub fn adapt(strategy: &str, options: &Value, model: &BaseModel, seed: u64) -> Result<Adaptation> {
    Adaptation::new(model, plan(strategy, options, model)?, seed)
}

/// A strategy's adaptation of a model whose weights are stored as it asks for.
pub fn adapt_stored(
    strategy: &str,
    options: &Value,
    model: BaseModel,
    seed: u64,
) -> Result<(Arc<BaseModel>, Adaptation)> {
    let plan = plan(strategy, options, &model)?;
    let model = store_as_planned(Arc::new(model), &plan, false, &no_native, None, |_, _| {})?;
    let adaptation = Adaptation::new(&model, plan, seed)?;
    Ok((model, adaptation))
}

/// For plans without a native codec.
pub fn no_native(name: &str) -> Result<Arc<dyn NativeCodec>> {
    anyhow::bail!("there is no native codec `{name}` here")
}

/// The same with every parameter moved off its first value, so that nothing in it is 0 or 1.
pub fn shake(adaptation: Adaptation) -> Result<Adaptation> {
    for (number, param) in adaptation.params.iter().enumerate() {
        let values: Vec<f32> = param.var.flatten_all()?.to_vec1()?;
        let mut random = Stream::new(11, number as u64);
        let values: Vec<f32> = values.iter().map(|value| value + 0.2 * random.normal() as f32).collect();
        param.var.set(&candle_core::Tensor::from_vec(values, param.var.shape(), &candle_core::Device::Cpu)?)?;
    }
    Ok(adaptation)
}

/// A tensor's shape and values.
pub type Values = (Vec<usize>, Vec<f32>);

/// The tensors of a safetensors file as f32.
pub fn tensors(path: &Path) -> Result<BTreeMap<String, Values>> {
    let mapped = map_safetensors(path)?;
    mapped.into_iter().map(|(name, tensor)| Ok((name, (tensor.shape.clone(), tensor.values()?)))).collect()
}

/// The `ids_0`, `logits_0`, `ids_1` … of a file that transformers' answers are in.
pub fn expected(path: &Path) -> Result<Vec<(Vec<u32>, Vec<f32>)>> {
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let ids = |name: &str| -> Result<Vec<u32>> {
        let words = file.tensor(name)?.data().chunks_exact(8).map(|word| word.try_into().map(i64::from_le_bytes));
        Ok(words.map(|word| word.map(|id| id as u32)).collect::<Result<_, _>>()?)
    };
    let floats = |name: &str| -> Result<Vec<f32>> {
        let words = file.tensor(name)?.data().chunks_exact(4).map(|word| word.try_into().map(f32::from_le_bytes));
        Ok(words.collect::<Result<_, _>>()?)
    };
    let count = file.names().iter().filter(|name| name.starts_with("logits_")).count();
    ensure!(count > 0, "{}: it holds no logits", path.display());
    (0..count).map(|i| Ok((ids(&format!("ids_{i}"))?, floats(&format!("logits_{i}"))?))).collect()
}

/// Integer ids stored as i64 under one name.
pub fn stored_ids(path: &Path, name: &str) -> Result<Vec<u32>> {
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let words = file.tensor(name)?.data().chunks_exact(8).map(|word| word.try_into().map(i64::from_le_bytes));
    Ok(words.map(|word| word.map(|id| id as u32)).collect::<Result<_, _>>()?)
}

/// Largest absolute difference.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Trains on examples from the beginning, and returns what was reported; the parameters are the adaptation's.
pub fn learn_on(
    model: &BaseModel,
    adaptation: &Adaptation,
    examples: &[&Example],
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<TrainReport> {
    let data = Data::of_examples(examples, &[]);
    let state = State::new(model, adaptation, config);
    Ok(train(model, state, &data, &Sft, config, observer)?.report)
}

/// Examples as units, by number.
pub fn units<'a>(examples: impl IntoIterator<Item = (u32, &'a Example)>) -> Vec<Unit<'a>> {
    examples.into_iter().map(|(number, example)| Unit::of(number, example)).collect()
}
