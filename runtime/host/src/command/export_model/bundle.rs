//! `--format bundle`: a folder with a model, this program and what starts it, for a machine with no network.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adapter::{AdapterFiles, is_adapter};
use homeroom_engine::export::Floats;
use homeroom_engine::files::gguf::shard_paths;
use homeroom_engine::models::BaseModel;
use serde_json::json;

use super::{Arguments, Export, Written, gguf, merged};
use crate::command::this_program;
use crate::models::{here, last_part};
use crate::pipeline::api::model_files;
use crate::progress::size;
use crate::registry::Sources;

/// Folders of a bundle.
const MODEL: &str = "model";
const ADAPTER: &str = "adapter";
const PROGRAM: &str = "bin/homeroom";
/// What starts it, handlers, and what a reader should know.
const START: &str = "start.sh";
const HANDLERS: &str = "handlers.toml";
const README: &str = "README.md";

/// Whether a file is one of a bundle's, beyond those of a model.
pub fn is_part(file: &Path) -> bool {
    [PROGRAM, START, HANDLERS, README].iter().any(|name| file == Path::new(name))
        || file.starts_with(MODEL)
        || file.starts_with(ADAPTER)
}

/// Whether a directory is a bundle.
pub fn is_one(directory: &Path) -> bool {
    [PROGRAM, START, HANDLERS].iter().all(|name| directory.join(name).exists())
}

/// Refuses what cannot be put into a bundle, before a base is loaded.
pub fn check(arguments: &Arguments) -> Result<()> {
    if !as_gguf(arguments) {
        arguments.floats()?;
    }
    ensure!(cfg!(unix), "a bundle is started by a script of a Unix shell, and this is another system");
    Ok(())
}

/// Whether the model is to be one of the types of GGUF files.
fn as_gguf(arguments: &Arguments) -> bool {
    arguments.dtype.as_ref().is_some_and(|word| word.parse::<Floats>().is_err()) && gguf::check(arguments).is_ok()
}

/// Writes the bundle: the base as it lies and the adapter beside it, or with `--dtype` the merged model, of a quantised type as a GGUF file.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let model = export.model;
    let native = export.adaptation.is_some_and(|adaptation| !adaptation.plan.stored_natively.is_empty());
    let name = export.arguments.model.model_dir.display();
    ensure!(
        !native || export.arguments.dtype.is_some(),
        "{name}: its base is stored by a codec of its strategy's plugin, which is not in a bundle; `--dtype` puts the merged model there"
    );
    let program = this_program()?;
    let program_bytes = std::fs::metadata(&program).with_context(|| program.display().to_string())?.len();
    let mut said = Written::default();
    let adapter = match export.arguments.dtype {
        Some(_) => {
            export.ensure_room(program_bytes)?;
            if as_gguf(export.arguments) {
                said = gguf::write_file(export, &handler_name(export), "model.gguf")?;
            } else {
                said = merged::write(export)?;
            }
            into_folder(export)?;
            None
        }
        None => {
            let sources = base_files(&model.path)?.below(MODEL);
            let adapter =
                here(&export.arguments.model.model_dir)?.map(|located| located.path).filter(|at| is_adapter(at));
            let adapter = adapter.map(|path| Sources::open(&path, &named_files)).transpose()?;
            let bytes = sources.bytes() + adapter.as_ref().map_or(0, Sources::bytes);
            export.ensure_room(bytes + program_bytes)?;
            sources.copy_into(export.directory)?;
            let there = adapter.is_some();
            adapter.map(|adapter| adapter.below(ADAPTER).copy_into(export.directory)).transpose()?;
            compare_files(export, there)?;
            said.line("check     its files are read, and are those of the model".to_owned());
            there.then_some(ADAPTER)
        }
    };
    copy_program(export, &program)?;
    let route = handler_name(export);
    export.directory.write(HANDLERS, handlers(&route, adapter, export.arguments.model.any_base).as_bytes())?;
    export.directory.write(START, START_SCRIPT.as_bytes())?;
    let bytes = homeroom_engine::files::bytes_below(export.directory.path());
    export.directory.write(README, readme(&route, bytes).as_bytes())?;
    said.line(format!("size      {}   `sh {START}` in it serves the model, without a network", size(bytes)));
    said.field("bytes", bytes);
    said.field("route", route);
    Ok(said)
}

/// Moves all that was written into the model's folder.
fn into_folder(export: &Export<'_>) -> Result<()> {
    let root = export.directory.path();
    let entries =
        || -> std::io::Result<Vec<_>> { std::fs::read_dir(root)?.map(|entry| Ok(entry?.file_name())).collect() };
    let names = entries().with_context(|| export.directory.cannot_write(MODEL))?;
    export.directory.subdirectory(Path::new(MODEL)).with_context(|| export.directory.cannot_write(MODEL))?;
    for name in names {
        let moved = std::fs::rename(root.join(&name), root.join(MODEL).join(&name));
        moved.with_context(|| export.directory.cannot_write(MODEL))?;
    }
    Ok(())
}

/// The files that a base lies in: those of a directory, or of a GGUF file.
fn base_files(path: &Path) -> Result<Sources> {
    match path.is_file() {
        true => Sources::of_files(&shard_paths(path)),
        false => Sources::open(path, &named_files),
    }
}

/// The files of a model or an adapter, by their names in its directory.
fn named_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let names = model_files(directory)?.into_iter();
    Ok(names.filter_map(|file| file.strip_prefix(directory).map(Path::to_owned).ok()).collect())
}

/// Whether what was copied is what was there.
fn compare_files(export: &Export<'_>, adapted: bool) -> Result<()> {
    let from = export.directory.path();
    let copied = BaseModel::load(&model_in(export, from)).context("the copy of the model cannot be read")?;
    let original = BaseModel::load(&export.model.path)?;
    ensure!(copied.digest() == original.digest(), "the copy of the model has other values, so nothing is saved");
    if adapted {
        let read = |path: &Path| AdapterFiles::read(path)?.into_tensors(&original);
        let original = here(&export.arguments.model.model_dir)?.context("the adapter was there")?.path;
        let copied = read(&from.join(ADAPTER)).context("the copy of the adapter cannot be read")?;
        ensure!(copied == read(&original)?, "the copy of the adapter has other values, so nothing is saved");
    }
    Ok(())
}

/// Where the base lies in a bundle: a folder, or the first file of a GGUF model in it.
fn model_in(export: &Export<'_>, bundle: &Path) -> PathBuf {
    let folder = bundle.join(MODEL);
    match export.model.path.file_name().filter(|_| export.model.path.is_file()) {
        Some(name) => folder.join(name),
        None => folder,
    }
}

fn copy_program(export: &Export<'_>, program: &Path) -> Result<()> {
    let to = export.directory.path().join(PROGRAM);
    let parent = Path::new(PROGRAM).parent().context("the program lies in a folder")?;
    export.directory.subdirectory(parent).with_context(|| export.directory.cannot_write(PROGRAM))?;
    let copy = || -> std::io::Result<()> {
        std::fs::copy(program, &to)?;
        File::open(&to)?.sync_all()
    };
    copy().with_context(|| export.directory.cannot_write(PROGRAM))
}

/// The name that clients give as `model`: that of what was exported.
fn handler_name(export: &Export<'_>) -> String {
    let name = last_part(&export.arguments.model.model_dir).unwrap_or_else(|| MODEL.to_owned());
    let name = name.strip_suffix(".gguf").unwrap_or(&name).to_owned();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '-' };
    let name: String = name.chars().map(plain).collect();
    let name = name.trim_start_matches('-');
    if name.is_empty() { MODEL.to_owned() } else { name.to_owned() }
}

fn handlers(route: &str, adapter: Option<&str>, any_base: bool) -> String {
    let model = match adapter {
        Some(adapter) => format!("model = {}\nbase_model = {}\n", json!(adapter), json!(MODEL)),
        None => format!("model = {}\n", json!(MODEL)),
    };
    let any_base = if any_base && adapter.is_some() { "any_base = true\n" } else { "" };
    format!(
        "# What this folder serves; paths are relative to this file.\n[handlers.{route}]\nkind = \"local\"\n{model}{any_base}"
    )
}

/// Runs with any POSIX shell. A stick may not hold which files are programs.
const START_SCRIPT: &str = r#"#!/bin/sh
# Serves the model in this folder on this machine alone; nothing is fetched and nothing is sent away.
# Options of `homeroom serve` may follow, such as --port 9000.
set -e
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
program="$here/bin/homeroom"
HOMEROOM_HOME="${HOMEROOM_HOME:-$here/home}"
HF_HUB_OFFLINE=1
export HOMEROOM_HOME HF_HUB_OFFLINE
[ -x "$program" ] || chmod +x "$program" 2>/dev/null || true
"$program" --version >/dev/null 2>&1 || {
    # Programs do not run from here: a copy does, for as long as it serves.
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    trap : INT TERM
    cp "$here/bin/homeroom" "$copy/homeroom"
    chmod 700 "$copy/homeroom"
    "$copy/homeroom" serve --config "$here/handlers.toml" "$@"
    exit
}
exec "$program" serve --config "$here/handlers.toml" "$@"
"#;

fn readme(route: &str, bytes: u64) -> String {
    format!(
        "# {route}\n\nA language model and the program that answers by it. It needs no network and installs nothing; it runs on\n{} with {}.\n\n    sh start.sh\n\nserves it at http://127.0.0.1:8080/v1, as OpenAI's API has it; clients name the model `{route}`. Ctrl-C ends it.\n`sh start.sh --port 9000` takes another port. To ask it in a terminal:\n\n    HOMEROOM_HOME=home HF_HUB_OFFLINE=1 bin/homeroom chat --handler {route} --config handlers.toml\n\nThe folder takes {}. It may be copied as it is, to a memory stick, too; what the program notes down is put into `home/`.\n\n| here | what it is |\n|---|---|\n| `model/` | the model |\n| `adapter/` | what was trained of it, if it lies apart |\n| `bin/homeroom` | the program; `bin/homeroom --help` lists what else it does |\n| `handlers.toml` | what is served |\n",
        std::env::consts::OS,
        match std::env::consts::ARCH {
            "x86_64" => "a processor of Intel's or AMD's (x86-64)",
            "aarch64" => "an ARM processor (64 bits)",
            other => other,
        },
        size(bytes)
    )
}
