//! The plugin boundary: what is refused before foreign code runs, what a misbehaving strategy is answered, and what works
//! without any plugin.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom::plugin::Plugin;
use homeroom_abi::plan::PlanRequest;
use homeroom_abi::table::{Descriptor, MAGIC};
use serde_json::{Map, Value, json};

use crate::support::{
    Place, build_plugins, fixture, homeroom, loss, model, plan, plugin_path, printed_json, refused, root, run, succeeds,
};

/// Loads a file that must be refused, for a reason in which all of `words` stand.
fn check_refused(path: &Path, words: &[&str]) -> Result<()> {
    let error = Plugin::load(path).err().with_context(|| format!("{} was loaded", path.display()))?;
    let error = format!("{error:#}");
    for word in words {
        ensure!(error.contains(word), "{}: no `{word}` in: {error}", path.display());
    }
    Ok(())
}

/// A copy of a plugin, its bytes changed.
fn changed(place: &Place, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Result<PathBuf> {
    let mut bytes = fs::read(plugin_path(name))?;
    change(&mut bytes);
    place.write(&format!("lib{name}.so"), bytes)
}

#[test]
fn an_unknown_strategy_is_told_with_its_nearest_name_and_where_it_was_looked_for() -> Result<()> {
    let place = Place::new()?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 2)?);
    command.args(["--strategy", "lroa", "--plugin-dir"]).arg(place.path("mine"));
    let [mine, plugins] = [place.path("mine"), plugin_path("lora").with_file_name("")].map(|p| p.display().to_string());
    let plugins = plugins.trim_end_matches('/');
    let words = ["unknown strategy `lroa`", "did you mean `lora`?", "liblroa.so", &mine, plugins, "/plugins"];
    refused(&mut command, &words)?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 2)?);
    refused(command.args(["--strategy", "../lora"]), &["`../lora` is not a strategy's name"])?;
    assert!(place.outputs()?.is_empty());
    Ok(())
}

#[test]
fn a_file_that_is_no_library_is_refused() -> Result<()> {
    let place = Place::new()?;
    check_refused(&place.write("libempty.so", "")?, &["not a library", "0 bytes"])?;
    check_refused(&place.write("libtext.so", "import torch\n".repeat(20))?, &["not a library", "ELF"])?;
    check_refused(place.path("outputs").as_path(), &["not a file"])?;
    check_refused(&place.path("libnone.so"), &["cannot read"])
}

/// The dynamic linker maps what it is given: of a file cut short it raises SIGBUS, or finds out much later.
#[test]
fn a_truncated_library_is_refused_wherever_it_ends() -> Result<()> {
    let place = Place::new()?;
    let whole = fs::read(plugin_path("lora"))?;
    let cuts =
        (0..20).map(|part| whole.len() * part / 20).chain([1, 63, 64, 200, whole.len() * 999 / 1000, whole.len() - 1]);
    for cut in cuts {
        let path = place.write("liblora.so", &whole[..cut])?;
        let word = if cut < 64 { "not a library" } else { "truncated" };
        check_refused(&path, &[word]).with_context(|| format!("cut at {cut} of {}", whole.len()))?;
    }
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 2)?);
    refused(command.arg("--plugin-dir").arg(place.path("")), &["plugin ", "liblora.so", "truncated"])
}

#[test]
fn a_library_that_is_no_strategy_is_refused_before_it_is_loaded() -> Result<()> {
    let place = Place::new()?;
    // The C library of this very process.
    let maps = fs::read_to_string("/proc/self/maps")?;
    let foreign = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.contains("/libc.so"));
    fs::copy(foreign.context("this process has a C library")?, place.path("libfoo.so"))?;
    check_refused(&place.path("libfoo.so"), &["not a strategy", "homeroom_strategy_entry"])?;
    // A program, which looks like a library, and has the entry's name among its texts.
    fs::copy(env!("CARGO_BIN_EXE_homeroom"), place.path("libbar.so"))?;
    check_refused(&place.path("libbar.so"), &["cannot load"])
}

#[test]
fn a_library_for_another_machine_is_refused() -> Result<()> {
    let place = Place::new()?;
    let other = if cfg!(target_arch = "x86_64") { 183 } else { 62 };
    let path = changed(&place, "hostile", |bytes| bytes[18..20].copy_from_slice(&u16::to_le_bytes(other)))?;
    check_refused(&path, &["another processor", &format!("ELF machine {other}")])?;
    check_refused(&changed(&place, "hostile", |bytes| bytes[4] = 1)?, &["not a 64-bit"])?;
    check_refused(&changed(&place, "hostile", |bytes| bytes[5] = 2)?, &["not a 64-bit little-endian"])?;
    check_refused(&changed(&place, "hostile", |bytes| bytes[16] = 1)?, &["not a shared library"])
}

/// Where the descriptor lies in a plugin's bytes: the magic, then its own size.
fn descriptor_at(bytes: &[u8]) -> usize {
    let mut start = MAGIC.to_le_bytes().to_vec();
    start.extend((size_of::<Descriptor>() as u32).to_le_bytes());
    let places: Vec<usize> = (0..bytes.len() - 12).filter(|at| bytes[*at..].starts_with(&start)).collect();
    assert_eq!(places.len(), 1, "one descriptor in a plugin");
    places[0]
}

#[test]
fn a_strategy_of_another_abi_is_refused_and_says_which() -> Result<()> {
    let place = Place::new()?;
    let patched = |offset: usize, value: u8| {
        changed(&place, "hostile", |bytes| {
            let at = descriptor_at(bytes) + offset;
            bytes[at] = value;
        })
    };
    check_refused(&patched(0, b'h')?, &["not a strategy of this ABI"])?;
    check_refused(&patched(8, 80)?, &["its descriptor has 80 bytes, this host reads 88", "rebuild"])?;
    check_refused(&patched(12, 2)?, &["built for ABI 2.1, this host has 1.1", "rebuild"])?;
    check_refused(&patched(14, 2)?, &["built for ABI 1.2, this host has 1.1", "rebuild"])?;
    assert_eq!(Plugin::load(&patched(14, 0)?)?.description.name, "hostile");
    check_refused(&patched(64, 0)?, &["panic=abort"])?;
    // What a later SDK appends is not read.
    assert_eq!(Plugin::load(&patched(8, 96)?)?.description.name, "hostile");
    Ok(())
}

#[test]
fn a_file_that_everybody_may_write_is_refused() -> Result<()> {
    let place = Place::new()?;
    let path = changed(&place, "lora", |_| {})?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o757))?;
    check_refused(&path, &["everybody may write it", "chmod o-w"])?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    assert_eq!(Plugin::load(&path)?.description.name, "lora");
    Ok(())
}

/// Names on the command line, in adapters and in lists are the file's: a strategy under another name would be mistaken.
#[test]
fn a_strategy_in_a_file_of_another_name_is_refused_and_listed_so() -> Result<()> {
    let place = Place::new()?;
    let bytes = fs::read(plugin_path("lora"))?;
    place.write("plugins/libtarget.so", bytes)?;
    let words = ["libtarget.so", "calls itself `lora`", "its file says `target`"];
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 2)?);
    refused(command.args(["--strategy", "target", "--plugin-dir"]).arg(place.path("plugins")), &words)?;
    let mut list = homeroom();
    list.args(["plugins", "list", "--json", "--plugin-dir"]).arg(place.path("plugins"));
    let listed = printed_json(&succeeds(&mut list)?)?;
    let target = listed.as_array().context("a list")?.iter().find(|item| item["name"] == "target");
    let error = target.context("the file is listed")?["error"].as_str().context("with its error")?;
    assert!(error.contains("calls itself `lora`"), "{error}");
    Ok(())
}

/// Asks a strategy for a plan that it must refuse.
fn check_plan_refused(strategy: &str, options: Value, words: &[&str]) -> Result<()> {
    let error = plan(strategy, &options, &model("llama")?).err().with_context(|| format!("{options} was planned"))?;
    let error = format!("{error:#}");
    for word in [&format!("strategy `{strategy}`"), words[0]].into_iter().chain(words[1..].iter().copied()) {
        ensure!(error.contains(word), "{strategy} {options}: no `{word}` in: {error}");
    }
    Ok(())
}

/// `file:line` of the only line of the strategy's source in which `text` stands.
fn line_of(source: &str, text: &str) -> Result<String> {
    let content = fs::read_to_string(root().join(source))?;
    let mut lines = (1..).zip(content.lines()).filter(|(_, line)| line.contains(text));
    let (number, _) = lines.next().with_context(|| format!("{source} has no `{text}`"))?;
    ensure!(lines.next().is_none(), "{source} has more than one `{text}`");
    Ok(format!("({source}:{number})"))
}

#[test]
fn what_goes_wrong_in_a_strategy_is_told_with_its_authors_file_and_line() -> Result<()> {
    let source = "tests/plugins/hostile/src/lib.rs";
    let at = |text: &str| line_of(source, text);
    check_plan_refused("hostile", json!({"how": "panic"}), &["panicked: as asked", &at("panic!(\"as asked\")")?])?;
    check_plan_refused("hostile", json!({"how": "error"}), &["an error, as asked", &at("return Err(\"an error")?])?;
    let shape = ["model.layers.0.self_attn.q_proj: matmul: (48) is not a matrix", &at("matmul(shift)")?];
    check_plan_refused("hostile", json!({"how": "shape"}), &shape)?;
    check_plan_refused("hostile", json!({"how": "name"}), &["there is no parameter `shfit`", &at("\"shfit\"")?])?;
    // The host stays well: the same library answers the next call.
    assert!(!plan("hostile", &json!({}), &model("llama")?)?.modules.is_empty());
    Ok(())
}

#[test]
fn a_strategy_that_panics_ends_the_command_with_an_error() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    for (how, word) in [("panic", "panicked: as asked"), ("cut", "gets no gradient"), ("zero", "learns nothing")] {
        let mut command = place.fine_tune(&fixture("models/llama"), &rows);
        command.args(["--strategy", "hostile", "--max-steps", "9", "--set-option"]).arg(format!("how={how}"));
        // The hook of the plugin keeps the standard library's "panicked at" off stderr, which `refused` insists on.
        refused(&mut command, &[word])?;
    }
    assert!(place.outputs()?.is_empty());
    Ok(())
}

#[test]
fn wrong_options_are_told_all_together() -> Result<()> {
    let options = json!({"lora_alhpa": 3, "use_rslora": 1, "r": -2, "temperature": 1});
    let words = [
        "unknown option `lora_alhpa`, did you mean `lora_alpha`?",
        "`use_rslora` is 1, it takes true or false",
        "`r` is -2, it takes a whole number",
        "unknown option `temperature`",
    ];
    check_plan_refused("lora", options, &words)?;
    check_plan_refused("hostile", json!({"how": 3}), &["`how` is 3, it takes a text"])?;
    let place = Place::new()?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 2)?);
    refused(command.args(["--set-option", "lora_alhpa=3"]), &["strategy `lora`", "did you mean `lora_alpha`?"])
}

#[test]
fn values_that_lora_cannot_use_are_refused() -> Result<()> {
    check_plan_refused("lora", json!({"r": 0}), &["the smallest is 1"])?;
    // Whose line it is helps who wrote a strategy; of the SDK's it helps nobody.
    let error = plan("lora", &json!({"r": 0}), &model("llama")?).map(drop).expect_err("a rank of 0");
    assert!(!format!("{error:#}").contains(".rs:"), "{error:#}");
    check_plan_refused("lora", json!({"rank_pattern": {"q_proj": 1.5}}), &["a rank is a whole number"])?;
    check_plan_refused("lora", json!({"lora_dropout": 1.0}), &["lora_dropout is 1", "below 1"])?;
    check_plan_refused("lora", json!({"lora_dropout": -0.1}), &["lora_dropout is -0.1"])?;
    let none = ["matches no module", "this model has", "q_proj"];
    check_plan_refused("lora", json!({"target_modules": ["query"]}), &none)?;
    check_plan_refused("lora", json!({"target_modules": []}), &none)?;
    for strategy in ["lora", "qlora", "int8", "ia3", "vera"] {
        let slip = ["`q_prj` (did you mean `q_proj`?) matches no module; this model has "];
        check_plan_refused(strategy, json!({"target_modules": ["q_prj", "v_proj"]}), &slip)?;
    }
    let slip = ["alpha_pattern: `v_porj` matches no module, did you mean `v_proj`?"];
    check_plan_refused("lora", json!({"alpha_pattern": {"v_porj": 2, "q_proj": 3}}), &slip)?;
    check_plan_refused("lora", json!({"target_modules": "q_proj"}), &none)?;
    check_plan_refused("lora", json!({"target_modules": "(q_proj"}), &["`(q_proj` is not a regular expression"])?;
    check_plan_refused("lora", json!({"alpha_pattern": {"(": 2}}), &["not a regular expression"])?;
    check_plan_refused("lora", json!({"target_modules": ["model.norm"]}), &["model.norm is a norm"])
}

/// What is mapped is a private copy: a compiler or `cp` that writes over the file does not change running code.
#[test]
fn a_loaded_strategy_works_on_when_its_file_is_overwritten() -> Result<()> {
    let place = Place::new()?;
    let path = changed(&place, "lora", |_| {})?;
    let loaded = Plugin::load(&path)?;
    let length = fs::metadata(&path)?.len() as usize;
    fs::write(&path, vec![0xcc; length])?;
    let request = PlanRequest { options: Map::new(), model: model("llama")?.info() };
    assert!(!loaded.plan(&request)?.modules.is_empty());
    check_refused(&path, &["not a library"])?;
    // A file that becomes another strategy is that strategy from then on.
    fs::copy(plugin_path("full"), &path)?;
    assert_eq!(Plugin::load(&path)?.description.name, "full");
    assert_eq!(loaded.description.name, "lora");
    Ok(())
}

/// Losses of the first steps of a run with the plugins of a directory.
fn losses(place: &Place, plugins: &Path) -> Result<Vec<f64>> {
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 4)?);
    command.args(["--overwrite", "--warmup-ratio", "0", "--learning-rate", "1e-2", "--max-steps", "3"]);
    command.args(["--compute", "f32"]);
    succeeds(command.arg("--plugin-dir").arg(plugins))?;
    let state = fs::read_to_string(place.path("outputs/out/trainer_state.json"))?;
    let state: Value = serde_json::from_str(&state)?;
    let history = state["log_history"].as_array().context("a history")?;
    history.iter().map(|step| step["loss"].as_f64().context("a step has a loss")).collect()
}

/// Builds `plugins/lora` with its scale doubled, as a crate of its own, and puts the library at `to`.
fn build_doubled_lora(to: &Path) -> Result<()> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lora-doubled");
    let source = fs::read_to_string(root().join("plugins/lora/src/lib.rs"))?;
    const FORWARD: &str = "self.0.forward(module, x)";
    ensure!(source.contains(FORWARD), "the source of `lora` scales its update otherwise");
    let workspace = fs::read_to_string(root().join("Cargo.toml"))?;
    let profile = workspace.find("[profile.release]").context("the workspace has a release profile")?;
    let sdk = root().join("plugins/sdk");
    let manifest = format!(
        "[package]\nname = \"lora_doubled\"\nedition = \"2024\"\n\n[lib]\ncrate-type = [\"cdylib\"]\n\n\
         [dependencies]\nhomeroom-sdk = {{ path = {sdk:?} }}\n\n[workspace]\n\n{}",
        &workspace[profile..],
    );
    fs::create_dir_all(dir.join("src"))?;
    fs::write(
        dir.join("src/lib.rs"),
        source.replace(FORWARD, &format!("let y = {FORWARD};\n        y + (y - module.base(x))")),
    )?;
    fs::write(dir.join("Cargo.toml"), manifest)?;
    fs::copy(root().join("Cargo.lock"), dir.join("Cargo.lock"))?;
    let built = build_plugins(&dir, &["lora_doubled"])?;
    // Moved, for it lies among this repository's plugins.
    Ok(fs::rename(&built["lora_doubled"], to)?)
}

/// A strategy's code is what trains: B starts at zero, so twice the scale shows after the first update, and not before.
#[test]
fn a_rebuilt_strategy_changes_the_loss_from_its_second_step_on() -> Result<()> {
    let place = Place::new()?;
    fs::create_dir(place.path("plugins"))?;
    build_doubled_lora(&place.path("plugins/liblora.so"))?;
    let plain = losses(&place, plugin_path("lora").parent().context("a library lies in a directory")?)?;
    let doubled = losses(&place, &place.path("plugins"))?;
    // One is fused, the other is not.
    assert!((plain[0] - doubled[0]).abs() < 1e-5, "{plain:?}, {doubled:?}");
    for step in [1, 2] {
        assert!((plain[step] - doubled[step]).abs() > 1e-3, "step {}: {plain:?}, {doubled:?}", step + 1);
    }
    Ok(())
}

/// An adapter carries its recipes: it answers where no plugin is, and where nothing can be trained.
#[test]
fn without_any_plugin_an_adapter_still_evaluates_and_chats() -> Result<()> {
    let place = Place::new()?;
    let (base, rows, out) = (fixture("models/llama"), place.rows("rows.jsonl", 6)?, place.path("outputs/out"));
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "3", "--learning-rate", "1e-2"]))?;
    let with_plugins = loss(&out, &rows)?;
    assert!((with_plugins - loss(&base, &rows)?).abs() > 1e-3, "the adapter changes the loss");

    // The program alone in a directory, since it looks for plugins beside itself.
    fs::create_dir(place.path("bin"))?;
    let alone = place.path("bin/homeroom");
    if fs::hard_link(env!("CARGO_BIN_EXE_homeroom"), &alone).is_err() {
        fs::copy(env!("CARGO_BIN_EXE_homeroom"), &alone)?;
    }
    let program = |arguments: &[&str]| {
        let mut command = std::process::Command::new(&alone);
        command.env("HOMEROOM_PLUGINS", "").env("HOMEROOM_HOME", place.path("home")).args(arguments);
        command
    };
    let [base, rows, out, new] = [base, rows, out, place.path("outputs/new")].map(|path| path.display().to_string());
    let train = ["fine-tune", "--model-name", &base, "--training-file", &rows, "--output-dir", &new];
    refused(&mut program(&train), &["unknown strategy `lora`", &place.path("bin").display().to_string()])?;
    assert_eq!(place.outputs()?, ["out"]);
    let eval = succeeds(&mut program(&["eval", "--model-dir", &out, "--file", &rows, "--json"]))?;
    assert_eq!(printed_json(&eval)?["loss"].as_f64(), Some(with_plugins));
    let chat = ["chat", "--model-dir", &out, "--prompt", "times seven: 2", "--temperature", "0", "--max-tokens", "4"];
    assert_eq!(succeeds(&mut program(&chat))?.stdout, succeeds(homeroom().args(chat))?.stdout);
    let list = run(&mut program(&["plugins", "list"]))?;
    assert!(list.code == Some(0) && list.stdout.is_empty() && list.stderr.contains("no strategies in:"), "{list:?}");
    Ok(())
}
